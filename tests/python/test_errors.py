"""Every error sentence of the ops, in full; nothing is written when there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8kv
from helpers import assert_same_bytes, raw

E4M3 = torch.float8_e4m3fn
Make = Callable[[torch.device], Any]


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Make:
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


def sevens(*shape: int, dtype: torch.dtype = E4M3) -> Make:
    """What is to be written, with something in it that must stay."""
    return lambda device: torch.full(shape, 7.0, device=device).to(dtype)


def integers(*numbers: int, dtype: torch.dtype = torch.int64) -> Make:
    return lambda device: torch.tensor(numbers, dtype=dtype, device=device)


def text(string: str) -> Make:
    return lambda device: string


@dataclass(frozen=True)
class Case:
    """One mistake: the arguments that are not the op's usual ones, and the sentence without the op's name."""

    id: str
    sentence: str
    arguments: dict[str, Make] = field(default_factory=dict)


USUAL: dict[str, dict[str, Make]] = {
    "static_scaled_fp8_quant": {"result": sevens(4, 6), "input": new(4, 6), "scale": new(1)},
    "dynamic_scaled_fp8_quant": {
        "result": sevens(4, 6), "input": new(4, 6), "scale": sevens(1, dtype=torch.float32),
    },
    "scaled_fp8_dequant": {
        "result": sevens(4, 6, dtype=torch.bfloat16), "input": new(4, 6, dtype=E4M3), "scale": new(1),
    },
    "group_amax": {
        "amax": sevens(1, dtype=torch.float32), "input": new(4, 6), "group_shape": lambda device: [-1, -1],
    },
    "reshape_and_cache_flash": {
        "key": new(3, 4, 6), "value": new(3, 4, 6), "key_cache": sevens(2, 5, 4, 6),
        "value_cache": sevens(2, 5, 4, 6), "slot_mapping": integers(7, -1, 0), "kv_cache_dtype": text("fp8"),
        "k_scale": sevens(1, dtype=torch.float32), "v_scale": sevens(4, dtype=torch.float32),
    },
    "reshape_and_cache_flash_dynamic": {
        "key": new(3, 4, 6), "value": new(3, 4, 6), "key_cache": sevens(2, 5, 4, 6),
        "value_cache": sevens(2, 5, 4, 6), "k_scale_cache": sevens(2, 5, 4, dtype=torch.float32),
        "v_scale_cache": sevens(2, 5, 4, dtype=torch.float32), "slot_mapping": integers(7, -1, 0),
        "kv_cache_dtype": text("fp8"),
    },
    "rope_quant_and_cache": {
        "query": new(3, 8, 6), "key": new(3, 4, 6), "value": new(3, 4, 6), "query_out": sevens(3, 8, 6),
        "key_cache": sevens(2, 5, 4, 6), "value_cache": sevens(2, 5, 4, 6),
        "slot_mapping": integers(7, -1, 0), "kv_cache_dtype": text("fp8"),
        "q_scale": sevens(4, dtype=torch.float32),
        "k_scale": sevens(1, dtype=torch.float32), "v_scale": sevens(4, dtype=torch.float32),
    },
    "gather_and_dequant_cache": {
        "key_cache": new(2, 5, 4, 6, dtype=E4M3), "value_cache": new(2, 5, 4, 6, dtype=E4M3),
        "key": sevens(3, 4, 6, dtype=torch.float32), "value": sevens(3, 4, 6, dtype=torch.float32),
        "block_table": new(2, 3, dtype=torch.int32), "cu_seq_lens": integers(0, 2, 3, dtype=torch.int32),
        "kv_cache_dtype": text("fp8"), "k_scale": sevens(1, dtype=torch.float32),
        "v_scale": sevens(4, dtype=torch.float32),
    },
    "paged_attention": {
        "query": new(3, 8, 6), "key_cache": new(2, 5, 4, 6, dtype=E4M3),
        "value_cache": new(2, 5, 4, 6, dtype=E4M3), "out": sevens(3, 8, 6, dtype=torch.float32),
        "block_table": new(2, 3, dtype=torch.int32), "seq_lens": integers(11, 1, dtype=torch.int32),
        "kv_cache_dtype": text("fp8"), "k_scale": sevens(1, dtype=torch.float32),
        "v_scale": sevens(4, dtype=torch.float32), "cu_query_lens": integers(0, 2, 3, dtype=torch.int32),
        "lse": sevens(3, 8, dtype=torch.float32),
    },
}  # fmt: skip
WRITTEN = {
    "static_scaled_fp8_quant": ["result"],
    "dynamic_scaled_fp8_quant": ["result", "scale"],
    "scaled_fp8_dequant": ["result"],
    "group_amax": ["amax"],
    "reshape_and_cache_flash": ["key_cache", "value_cache"],
    "reshape_and_cache_flash_dynamic": ["key_cache", "value_cache", "k_scale_cache", "v_scale_cache"],
    "rope_quant_and_cache": ["query_out", "key_cache", "value_cache"],
    "gather_and_dequant_cache": ["key", "value"],
    "paged_attention": ["out", "lse"],
}
REAL = "float32, float16 or bfloat16"
QUANTIZED = "float8_e4m3fn, float8_e5m2 or int8"
EXTENTS = "group_shape must have two extents"
F32 = torch.float32
OTHER_DTYPES = {
    "float64": torch.float64, "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16,
    "int32": torch.int32, "int64": torch.int64, "bool": torch.bool,
}  # fmt: skip


def group(*extents: int) -> dict[str, Make]:
    return {"group_shape": lambda device: list(extents)}


def wrong_scales(name: str) -> list[Case]:
    """The rules on scale shapes; the input is [4, 6]."""
    both = " for group_shape {} and an input of shape [4, 6], got shape {}"

    def case(extents: tuple[int, int], expected: str, shape: tuple[int, ...]) -> Case:
        return Case(
            f"{name}-{list(shape)}-{extents}",
            f"{name} must have {expected}" + both.format(extents, list(shape)),
            {name: sevens(*shape, dtype=F32), **group(*extents)},
        )

    return [
        case((-1, -1), "1 element", (2,)),
        case((-1, -1), "1 element", (0,)),
        case((4, 6), "1 element", (4, 6)),
        case((100, 100), "1 element", (6,)),
        case((1, -1), "shape [4] or [4, 1]", (6,)),
        case((1, -1), "shape [4] or [4, 1]", (1, 4)),
        case((1, -1), "shape [4] or [4, 1]", (1,)),
        case((1, -1), "shape [4] or [4, 1]", ()),
        case((3, -1), "shape [2] or [2, 1]", (4,)),
        case((-1, 1), "shape [6] or [1, 6]", (4,)),
        case((-1, 1), "shape [6] or [1, 6]", (6, 1)),
        case((-1, 4), "shape [2] or [1, 2]", (6,)),
        case((2, 3), "shape [2, 2]", (4,)),
        case((3, 4), "shape [2, 2]", (1, 1)),
        case((1, 1), "shape [4, 6]", (24,)),
        Case(f"{name}-group of 0 rows", f"{EXTENTS}, each -1 or at least 1, got (0, 1)", group(0, 1)),
        Case(f"{name}-group of -2 columns", f"{EXTENTS}, each -1 or at least 1, got (1, -2)", group(1, -2)),
        Case(f"{name}-one extent", f"{EXTENTS}, rows and columns, got 1", group(1)),
        Case(f"{name}-three extents", f"{EXTENTS}, rows and columns, got 3", group(1, 2, 3)),
        Case(f"{name}-no extents", f"{EXTENTS}, rows and columns, got 0", group()),
    ]  # fmt: skip


def wrong_scales_without_group(name: str) -> list[Case]:
    divide = f"{name} must have 1 element, or come with a group_shape, or have sizes that divide those of the input, [4, 6]"
    return [
        Case(
            f"{name}-one dimension",
            f"{name} must come with a group_shape when it has one dimension and more than one element, "
            "got shape [4] and no group_shape",
            {name: sevens(4, dtype=F32)},
        ),
        Case(f"{name}-does not divide", f"{divide}, got shape [3, 1]", {name: sevens(3, 1, dtype=F32)}),
        Case(f"{name}-too large", f"{divide}, got shape [4, 12]", {name: sevens(4, 12, dtype=F32)}),
        Case(f"{name}-dimensions", f"{divide}, got shape [1, 4, 1]", {name: sevens(1, 4, 1, dtype=F32)}),
        Case(f"{name}-empty", f"{divide}, got shape [4, 0]", {name: sevens(4, 0, dtype=F32)}),
    ]  # fmt: skip


def wrong_dtype(name: str, expected: str, *others: str) -> list[Case]:
    return [
        Case(
            f"{name}-{other}",
            f"{name} must be {expected}, got {other}",
            {name: new(4, 6, dtype=(OTHER_DTYPES | EVERY_DTYPE)[other])},
        )
        for other in (*OTHER_DTYPES, *others)
        if other != "int8" or expected != QUANTIZED
    ]


EVERY_DTYPE = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


def wrong_float32(name: str) -> list[Case]:
    return [
        Case(f"{name}-{other}", f"{name} must be float32, got {other}", {name: new(1, dtype=dtype)})
        for other, dtype in (OTHER_DTYPES | EVERY_DTYPE).items()
        if other != "float32"
    ]


def shared(size: int, **views: tuple[torch.dtype, int, tuple[int, ...]]) -> dict[str, Make]:
    """Arguments that are views of one buffer: dtype, first byte, shape."""
    buffers: dict[torch.device, Tensor] = {}

    def view(dtype: torch.dtype, start: int, shape: tuple[int, ...]) -> Make:
        def make(device: torch.device) -> Tensor:
            buffer = buffers.setdefault(device, torch.zeros(size, dtype=torch.uint8, device=device))
            count = dtype.itemsize * torch.Size(shape).numel()
            return buffer[start : start + count].view(dtype).view(shape)

        return make

    return {name: view(*spec) for name, spec in views.items()}


def wrong_shapes(dtype: torch.dtype) -> list[Case]:
    """Of the result, which is of this dtype, and too many dimensions of the result and of the scale."""
    shapes = {"transposed": (6, 4), "flat": (24,), "0-D": (), "one dimension more": (1, 4, 6)}
    cases = [
        Case(
            f"result is {id}",
            f"result must have the shape of input, [4, 6], got shape {list(shape)}",
            {"result": sevens(*shape, dtype=dtype)},
        )
        for id, shape in shapes.items()
    ]
    return [
        *cases,
        too_many_dimensions("result", dtype),
        too_many_dimensions("scale", F32),
    ]


def too_many_dimensions(name: str, dtype: torch.dtype) -> Case:
    sentence = f"{name} must have at most 8 dimensions, got 9"
    return Case(f"9-D {name}", sentence, {name: sevens(*[1] * 9, dtype=dtype)})


# Of the operators on a paged cache: 2 blocks of 5 slots, 4 heads of 6; 3 tokens

CACHE = "[num_blocks, block_size, num_kv_heads, head_size]"
HEADS = "[num_tokens, num_kv_heads, head_size]"
STRINGS = '"auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2" or "int8"'
INT32, INT64 = torch.int32, torch.int64


def every_dtype_but(name: str, sentence: str, *allowed: str) -> list[Case]:
    return [
        Case(f"{name}-{other}", f"{name} must be {sentence}, got {other}", {name: new(4, 6, dtype=dtype)})
        for other, dtype in (OTHER_DTYPES | EVERY_DTYPE).items()
        if other not in allowed
    ]


def every_dtype_of_rows(name: str, sentence: str, allowed: tuple[str, ...], *, or_stored: bool) -> list[Case]:
    """Dtypes of one byte are told what else they may be, where rows may be quantized."""
    cases = every_dtype_but(name, sentence, *allowed, *(("float8_e4m3fn", "uint8") if or_stored else ()))
    of_one_byte = {name for name, dtype in (OTHER_DTYPES | EVERY_DTYPE).items() if dtype.itemsize == 1}
    return [
        replace(case, sentence=case.sentence.replace(", got", ", or float8_e4m3fn to be stored as it is, got"))
        if or_stored and case.sentence.split()[-1] in of_one_byte
        else case
        for case in cases
    ]


def wrong_shape(name: str, sentence: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Case]:
    return [
        Case(
            f"{name} of shape {list(shape)}",
            f"{name} must have {sentence}, got shape {list(shape)}",
            {name: sevens(*shape, dtype=dtype)},
        )
        for shape in shapes
    ]


def wrong_caches(*, alike: bool = False, or_stored: bool = False) -> list[Case]:
    """What is the same for all operators.

    Args:
        alike: K and V must have heads of one size and elements of one dtype.
        or_stored: key and value may be quantized.
    """
    fits = "num_kv_heads=4 and head_size=6 as {} has"
    names = {name: "key_cache" if alike else f"{name}_cache" for name in ("key", "value")}
    one_dtype = "float8_e4m3fn as key_cache is" + ("" if alike else ", as v_cache_dtype is not given")
    sizes = (
        "the shape of key_cache, [2, 5, 4, 6]" if alike else "num_blocks=2, block_size=5 and num_kv_heads=4 as key_cache has"
    )
    shapes = [(3, 5, 4, 6), (2, 4, 5, 6), *([(5, 4, 6)] if alike else [])]
    return [
        *(too_many_dimensions(name, F32) for name in ("key", "value")),
        *(too_many_dimensions(name, E4M3) for name in ("key_cache", "value_cache")),
        *every_dtype_of_rows("key", REAL, ("float32", "float16", "bfloat16"), or_stored=or_stored),
        *every_dtype_of_rows("value", "float32 as key is", ("float32",), or_stored=or_stored),
        *every_dtype_but(
            "key_cache", 'float8_e4m3fn or uint8 as kv_cache_dtype is "fp8"', "float8_e4m3fn", "uint8"
        ),
        *every_dtype_but("value_cache", one_dtype, "float8_e4m3fn"),
        *wrong_shape("key_cache", f"the shape {CACHE}", E4M3, (5, 4, 6), (1, 2, 5, 4, 6), ()),
        *wrong_shape("value_cache", sizes, E4M3, *shapes),
        *([] if alike else wrong_shape("value_cache", f"the shape {CACHE}", E4M3, (5, 4, 6))),
        *(
            case
            for name in ("key", "value")
            for case in (
                *wrong_shape(name, f"the shape {HEADS}", F32, (3, 24), (1, 3, 4, 6), ()),
                *wrong_shape(name, fits.format(names[name]), F32, (3, 6, 4), (3, 4, 7), (3, 1, 6), (3, 0, 6)),
            )
        ),
    ]  # fmt: skip


def contradictions(*, quantized_only: bool) -> list[Case]:
    """Strings there are not, and strings that say something else than the caches."""
    known = '"fp8", "fp8_e4m3", "fp8_e5m2" or "int8"' if quantized_only else STRINGS
    unknown = ["fp8e4m3", "int16", "fp8_e4m3fnuz", "", "FP8"]
    unknown += ["auto", "float16", "bfloat16", "float32"] if quantized_only else []
    cases = [
        Case(f"kv_cache_dtype {s!r}", f'kv_cache_dtype must be {known}, got "{s}"', {"kv_cache_dtype": text(s)})
        for s in unknown
    ]
    e4m3, e5m2 = "float8_e4m3fn or uint8", "float8_e5m2 or uint8"
    pairs = [
        ("fp8", "float8_e5m2", e4m3), ("fp8_e4m3", "float8_e5m2", e4m3), ("fp8_e4m3", "float16", e4m3),
        ("fp8_e5m2", "float8_e4m3fn", e5m2), ("fp8_e5m2", "float16", e5m2),
        ("fp8", "int8", e4m3), ("int8", "uint8", "int8"), ("int8", "float8_e4m3fn", "int8"),
    ]  # fmt: skip
    if not quantized_only:
        pairs += [
            ("auto", "float8_e4m3fn", REAL), ("auto", "uint8", REAL), ("auto", "float64", REAL),
            ("auto", "int8", REAL),
            ("float16", "bfloat16", "float16"), ("bfloat16", "float32", "bfloat16"),
            ("float32", "float8_e4m3fn", "float32"), ("float16", "uint8", "float16"),
        ]  # fmt: skip
    for string, dtype, expected in pairs:
        said = "fp8" if string == "fp8_e4m3" else string  # two names of one format
        make = new(2, 5, 4, 6, dtype=(OTHER_DTYPES | EVERY_DTYPE)[dtype])
        cases.append(
            Case(
                f"{string} and {dtype}",
                f'key_cache must be {expected} as kv_cache_dtype is "{said}", got {dtype}',
                {"kv_cache_dtype": text(string), "key_cache": make, "value_cache": make},
            )
        )
    return cases


def wrong_slots() -> list[Case]:
    few = "at least 3 rows, one for each element of slot_mapping"
    return [
        *every_dtype_but("slot_mapping", "int32 or int64", "int32", "int64"),
        too_many_dimensions("slot_mapping", INT64),
        *wrong_shape("slot_mapping", "the shape [num_tokens]", INT64, (3, 1), ()),
        *(
            case
            for name in ("key", "value")
            for case in wrong_shape(name, few, F32, (2, 4, 6), (0, 4, 6))
        ),
    ]  # fmt: skip


def wrong_attention() -> list[Case]:
    """What no other operator has: rows of query and out, sequences, scales, options."""
    rows, heads = "the shape [num_tokens, num_heads, head_size]", "num_heads=8 and head_size=6"
    scales = (
        "1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=6] or [num_blocks=2, block_size=5, num_kv_heads]"
    )
    fits = "num_seqs=2 elements, as block_table has rows"
    formats = f"float8_e4m3fn or uint8 as the caches are, or {REAL}"
    unquantized = plain_caches(new)
    without_sums: dict[str, Make] = {"cu_query_lens": lambda device: None}

    def number(name: str, value: float, expected: str, got: str | None = None) -> Case:
        return Case(
            f"{name}={value}",
            f"{name} must be {expected}, got {got or value}",
            {name: lambda device: value},
        )

    def few(name: str, make: Make, shape: str) -> Case:
        return Case(
            f"few rows of {name}",
            f"{name} must have at least 2 rows, one for each sequence, got shape {shape}",
            {name: make, **without_sums},
        )

    return [
        *every_dtype_but(
            "query", formats, "float8_e4m3fn", "uint8", "float32", "float16", "bfloat16"
        ),
        *every_dtype_but("out", REAL, "float32", "float16", "bfloat16"),
        *every_dtype_but("lse", "float32", "float32"),
        *(
            too_many_dimensions(name, dtype)
            for name, dtype in (("query", F32), ("out", F32), ("lse", F32), ("block_table", INT32),
                                ("seq_lens", INT32), ("cu_query_lens", INT32), ("seq_starts", INT32),
                                ("k_scale", F32), ("v_scale", F32), ("sinks", F32), ("k_offset", F32),
                                ("v_offset", F32), ("key_cache", E4M3), ("value_cache", E4M3))
        ),
        *wrong_shape("query", rows, F32, (3, 48), (1, 3, 8, 6), (3,), ()),
        *wrong_shape("query", heads, F32, (3, 8, 7)),
        Case(
            "heads that are no multiple",
            "query must have a number of heads that is a multiple of num_kv_heads=4, got num_heads=6",
            {"query": new(3, 6, 6)},
        ),
        *wrong_shape("out", rows, F32, (3, 48), (1, 3, 8, 6), ()),
        *wrong_shape("out", heads, F32, (3, 4, 6), (3, 8, 7)),
        *wrong_shape("lse", "the shape [num_tokens, num_heads]", F32, (24,), (3, 8, 1)),
        *wrong_shape("lse", "num_heads=8 columns", F32, (3, 4), (8, 3)),
        few("query", new(1, 8, 6), "[1, 8, 6]"),
        few("out", sevens(1, 8, 6, dtype=F32), "[1, 8, 6]"),
        few("lse", sevens(0, 8, dtype=F32), "[0, 8]"),
        *every_dtype_but(
            "key_cache", 'float8_e4m3fn or uint8 as kv_cache_dtype is "fp8"', "float8_e4m3fn", "uint8"
        ),
        *every_dtype_but("value_cache", "float8_e4m3fn as key_cache is", "float8_e4m3fn"),
        *wrong_shape("key_cache", f"the shape {CACHE}", E4M3, (5, 4, 6), ()),
        *wrong_shape(
            "value_cache", "the shape [num_blocks, block_size, num_kv_heads, v_head_size]", E4M3, (5, 4, 6), (),
        ),
        *wrong_shape(
            "value_cache", "num_blocks=2, block_size=5 and num_kv_heads=4 as key_cache has", E4M3,
            (3, 5, 4, 6), (2, 4, 4, 6), (2, 5, 2, 6), (2, 5, 1, 3),
        ),
        *wrong_shape("value_cache", "a head size of at least 1 as key_cache has", E4M3, (2, 5, 4, 0)),
        *of_two_kinds(),
        *(
            case
            for name in ("block_table", "seq_lens", "cu_query_lens", "seq_starts")
            for case in every_dtype_but(name, "int32", "int32")
        ),
        *wrong_shape("block_table", "the shape [num_seqs, max_blocks]", INT32, (2,), (1, 2, 3), ()),
        *(
            case
            for name in ("seq_lens", "seq_starts")
            for case in (
                *wrong_shape(name, "the shape [num_seqs]", INT32, (2, 1), ()),
                *wrong_shape(name, fits, INT32, (1,), (3,), (0,)),
            )
        ),
        *wrong_shape("cu_query_lens", "the shape [num_seqs + 1]", INT32, (3, 1), ()),
        *wrong_shape(
            "cu_query_lens", "num_seqs + 1 = 3 elements, as block_table has num_seqs rows", INT32, (2,), (4,)
        ),
        *(
            case
            for name in ("k_scale", "v_scale")
            for case in (
                *every_dtype_but(name, "float32", "float32"),
                *wrong_shape(name, scales, F32, (2,), (0,), (8,), (6, 4), (24,), (5, 2, 4), (2, 5, 4, 1)),
            )
        ),
        Case(
            "k_scale with several strides",
            "k_scale must be evenly strided, got several strides in shape [2, 2]",
            {"k_scale": lambda device: torch.ones(2, 9, device=device)[:, :2]},
        ),
        Case(
            "q_scale of a query that is not quantized",
            "q_scale must be None as query is float32, got shape [1]", {"q_scale": new(1)},
        ),
        Case(
            "no q_scale", "q_scale must be given as query is float8_e4m3fn, got None",
            {"query": new(3, 8, 6, dtype=E4M3)},
        ),
        Case(
            "2 elements of q_scale",
            "q_scale must have 1, num_kv_heads=4 or num_heads=8 elements, got shape [2]",
            {"query": new(3, 8, 6, dtype=E4M3), "q_scale": new(2)},
        ),
        Case(
            "q_scale in float16", "q_scale must be float32, got float16",
            {"query": new(3, 8, 6, dtype=E4M3), "q_scale": new(1, dtype=torch.float16)},
        ),
        Case(
            "FP8 query of plain caches",
            f"query must be {REAL} as the caches are not FP8, got float8_e4m3fn",
            {"query": new(3, 8, 6, dtype=E4M3), "q_scale": new(1), **unquantized},
        ),
        Case(
            "sinks in bfloat16 with an FP8 query", "sinks must be float32, got bfloat16",
            {"query": new(3, 8, 6, dtype=E4M3), "q_scale": new(1), "sinks": new(8, dtype=torch.bfloat16)},
        ),
        Case(
            "sinks in bfloat16 with a query in float16",
            "sinks must be float32 or float16 as query is, got bfloat16",
            {"query": new(3, 8, 6, dtype=torch.float16), "sinks": new(8, dtype=torch.bfloat16)},
        ),
        *wrong_shape("sinks", "the shape [num_heads]", F32, (8, 1), ()),
        *wrong_shape("sinks", "num_heads=8 elements", F32, (4,), (1,), (0,)),
        *wrong_offsets(unquantized),
        *(number("softmax_scale", x, "finite", str(x)) for x in (math.nan, math.inf)),
        *(number("softcap", x, "finite and at least 0", str(x)) for x in (-0.5, math.nan, math.inf)),
        number("max_query_len", 0, "at least 1"),
        number("max_query_len", -3, "at least 1"),
        number("max_seq_len", -1, "at least 0"),
        number("sliding_window", -1, "at least 0"),
        number("num_splits", -2, "at least 0"),
    ]  # fmt: skip


def of_two_kinds() -> list[Case]:
    """K and V of two head sizes or formats."""
    smaller = {"value_cache": new(2, 5, 4, 3, dtype=E4M3), "out": sevens(3, 8, 3, dtype=F32)}
    plain = {"value_cache": new(2, 5, 4, 6, dtype=torch.bfloat16), "v_cache_dtype": text("auto")}
    plain_keys = {
        "key_cache": new(2, 5, 4, 6, dtype=torch.bfloat16),
        "kv_cache_dtype": text("auto"),
        "v_cache_dtype": text("fp8"),
    }
    quantized_query = {"query": new(3, 8, 6, dtype=E4M3), "q_scale": new(1)}
    shapes = (
        "1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size={}] or [num_blocks=2, block_size=5, num_kv_heads]"
    )
    names = '"auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2" or "int8"'
    return [
        Case(
            "out as wide as K", "out must have num_heads=8 and v_head_size=3, got shape [3, 8, 6]",
            {**smaller, "out": sevens(3, 8, 6, dtype=F32)},
        ),
        Case(
            "query as wide as V", "query must have num_heads=8 and head_size=6, got shape [3, 8, 3]",
            {**smaller, "query": new(3, 8, 3)},
        ),
        Case(
            "v_scale of the channels of K", f"v_scale must have {shapes.format(3)}, got shape [4, 6]",
            {**smaller, "v_scale": new(4, 6)},
        ),
        Case(
            "k_scale of the channels of V", f"k_scale must have {shapes.format(6)}, got shape [4, 3]",
            {**smaller, "k_scale": new(4, 3)},
        ),
        Case(
            "v_offset of the channels of K",
            "v_offset must have the shape [num_kv_heads=4, head_size=3], got shape [4, 6]",
            {**smaller, "v_offset": new(4, 6)},
        ),
        Case("a format that is none", f'v_cache_dtype must be {names}, got "fp4"', {"v_cache_dtype": text("fp4")}),
        Case(
            "another format of V", 'value_cache must be float8_e5m2 or uint8 as v_cache_dtype is "fp8_e5m2", '
            "got float8_e4m3fn", {"v_cache_dtype": text("fp8_e5m2")},
        ),
        Case(
            "int8 V in bytes", 'value_cache must be int8 as v_cache_dtype is "int8", got uint8',
            {"v_cache_dtype": text("int8"), "value_cache": new(2, 5, 4, 6, dtype=torch.uint8)},
        ),
        Case(
            "V that is not plain", f'value_cache must be {REAL} as v_cache_dtype is "auto", '
            "got float8_e4m3fn", {"v_cache_dtype": text("auto")},
        ),
        Case(
            "FP8 query beside a K in bfloat16",
            f"query must be {REAL} as key_cache is not FP8, got float8_e4m3fn", {**plain_keys, **quantized_query},
        ),
        Case(
            "k_offset of a K in bfloat16",
            "k_offset must be None as key_cache is not quantized, got shape [4, 6]",
            {**plain_keys, "k_offset": new(4, 6)},
        ),
        Case(
            "v_offset of a V in bfloat16",
            "v_offset must be None as value_cache is not quantized, got shape [4, 6]",
            {**plain, "v_offset": new(4, 6)},
        ),
    ]  # fmt: skip


def plain_caches(make: Callable[..., Make]) -> dict[str, Make]:
    caches = make(2, 5, 4, 6, dtype=torch.bfloat16)
    return {"key_cache": caches, "value_cache": caches, "kv_cache_dtype": text("auto")}


def wrong_offsets(unquantized: dict[str, Make], *, alike: bool = True) -> list[Case]:
    """`unquantized`: arguments with caches that are not. Without them, where caches must be quantized.

    Args:
        alike: K and V must have elements of one dtype.
    """
    caches = {"k_offset": "key_cache is", "v_offset": "value_cache is"}
    per_channel = "the shape [num_kv_heads=4, head_size=6]"
    return [
        case
        for name in ("k_offset", "v_offset")
        for case in (
            *every_dtype_but(name, "float32", "float32"),
            too_many_dimensions(name, F32),
            *wrong_shape(name, per_channel, F32, (4,), (24,), (6, 4), (1, 4, 6), (0,), ()),
            *(
                [
                    Case(
                        f"{name} of plain caches",
                        f"{name} must be None as {'the caches are' if alike else caches[name]} not quantized, got shape [4, 6]",
                        {name: new(4, 6), **unquantized},
                    )
                ]
                if unquantized
                else []
            ),
        )
    ]


def wrong_cache_scales(*, or_cache: bool) -> list[Case]:
    count = "1 or num_kv_heads=4 elements, or the shape [num_kv_heads, head_size=6]"
    if or_cache:
        count += " or [num_blocks=2, block_size=5, num_kv_heads]"
    return [
        case
        for name in ("k_scale", "v_scale")
        for case in (
            *every_dtype_but(name, "float32", "float32"),
            too_many_dimensions(name, F32),
            *wrong_shape(
                name,
                count,
                F32,
                (2,),
                (0,),
                (8,),
                (4, 4),
                (6, 4),
                (24,),
                (1, 4, 6),
                (2, 5, 3),
                (5, 2, 4),
                (2, 5, 4, 1),
            ),
            *([] if or_cache else wrong_shape(name, count, F32, (2, 5, 4))),
            Case(
                f"{name} with several strides",
                f"{name} must be evenly strided, got several strides in shape [2, 2]",
                {name: lambda device: torch.ones(2, 9, device=device)[:, :2]},
            ),
            Case(
                f"{name} expanded in one dimension",
                f"{name} must be evenly strided, got several strides in shape [2, 2]",
                {name: lambda device: torch.ones(2, 1, device=device).expand(2, 2)},
            ),
        )
    ]


def wrong_scale_caches() -> list[Case]:
    shape = "the shape [num_blocks=2, block_size=5, num_kv_heads=4]"
    return [
        case
        for name in ("k_scale_cache", "v_scale_cache")
        for case in (
            *every_dtype_but(name, "float32", "float32"),
            too_many_dimensions(name, F32),
            *wrong_shape(name, shape, F32, (1,), (4,), (2, 5, 4, 1), (5, 2, 4), (2, 4, 5), (10, 4), ()),
        )
    ]


def wrong_sequences() -> list[Case]:
    rows = "num_seqs + 1 = 3 elements, as block_table has num_seqs rows"
    return [
        *(
            case
            for name in ("block_table", "cu_seq_lens", "seq_starts")
            for case in (*every_dtype_but(name, "int32", "int32"), too_many_dimensions(name, INT32))
        ),
        *wrong_shape("block_table", "the shape [num_seqs, max_blocks]", INT32, (2,), (1, 2, 3), ()),
        *wrong_shape("cu_seq_lens", "the shape [num_seqs + 1]", INT32, (3, 1), ()),
        *wrong_shape("cu_seq_lens", rows, INT32, (2,), (4,), (0,)),
        *wrong_shape("seq_starts", "the shape [num_seqs]", INT32, (2, 1), ()),
        *wrong_shape("seq_starts", "num_seqs=2 elements, as block_table has rows", INT32, (1,), (3,), (0,)),
        *wrong_shape("value", "as many rows as key, 3", F32, (2, 4, 6), (4, 4, 6)),
    ]


def overlaps(written: dict[str, Make], read: dict[str, Make]) -> list[Case]:
    """Each written argument with stride 0, and over each of the others: both begin at the same byte."""
    device = torch.device("cpu")

    def spec(make: Make) -> tuple[torch.dtype, int, tuple[int, ...]]:
        tensor = make(device)
        return tensor.dtype, 0, tuple(tensor.shape)

    def expanded(make: Make) -> Make:
        def first(device: torch.device) -> Tensor:
            whole = make(device)
            return whole[:1].expand(whole.shape)

        return first

    cases = []
    for i, (name, make) in enumerate(written.items()):
        cases.append(
            Case(
                f"{name} is expanded",
                f"{name} must not overlap itself, as it is written, "
                f"got stride 0 in dimension 0 of size {make(device).shape[0]}",
                {name: expanded(make)},
            )
        )
        for other, other_make in (*[*written.items()][i + 1 :], *read.items()):
            cases.append(
                Case(
                    f"{name} over {other}",
                    f"{name} must not overlap {other}, got views that share memory",
                    shared(4096, **{name: spec(make), other: spec(other_make)}),
                )
            )
    return cases


OFFSETS = (("k_offset", new(4, 6)), ("v_offset", new(4, 6)))


def cache_overlaps(op: str, *more: tuple[str, Make]) -> list[Case]:
    arguments = {name: make for name, make in (*USUAL[op].items(), *more) if name != "kv_cache_dtype"}
    written = {name: make for name, make in arguments.items() if name in WRITTEN[op]}
    return overlaps(written, {name: make for name, make in arguments.items() if name not in WRITTEN[op]})


EXPANDED = Case(
    "result is expanded",
    "result must not overlap itself, as it is written, got stride 0 in dimension 0 of size 4",
    {"result": lambda device: sevens(1, 6)(device).expand(4, 6)},
)
CASES: dict[str, list[Case]] = {
    "static_scaled_fp8_quant": [
        *wrong_dtype("input", REAL, "float8_e4m3fn", "float8_e5m2"),
        *wrong_dtype("result", QUANTIZED, "float32", "float16", "bfloat16"),
        *wrong_float32("scale"),
        *wrong_shapes(E4M3),
        too_many_dimensions("input", F32),
        *wrong_scales("scale"),
        *wrong_scales_without_group("scale"),
        EXPANDED,
        Case(
            "result over input", "result must not overlap input, got views that share memory",
            shared(96, result=(E4M3, 72, (4, 6)), input=(F32, 0, (4, 6))),
        ),
        Case(
            "result over scale", "result must not overlap scale, got views that share memory",
            shared(24, result=(E4M3, 0, (4, 6)), scale=(F32, 20, (1,))),
        ),
    ],
    "dynamic_scaled_fp8_quant": [
        *wrong_dtype("input", REAL, "float8_e4m3fn", "float8_e5m2"),
        *wrong_dtype("result", QUANTIZED, "float32", "float16", "bfloat16"),
        *wrong_float32("scale"),
        *wrong_float32("scale_ub"),
        *wrong_shapes(E4M3),
        too_many_dimensions("input", F32),
        *wrong_scales("scale"),
        *wrong_scales_without_group("scale"),
        EXPANDED,
        Case(
            "scale is expanded",
            "scale must not overlap itself, as it is written, got stride 0 in dimension 0 of size 4",
            {"scale": lambda device: sevens(1, dtype=F32)(device).expand(4), **group(1, -1)},
        ),
        Case(
            "result over input", "result must not overlap input, got views that share memory",
            shared(96, result=(E4M3, 72, (4, 6)), input=(F32, 0, (4, 6))),
        ),
        Case(
            "result over scale", "result must not overlap scale, got views that share memory",
            shared(24, result=(E4M3, 0, (4, 6)), scale=(F32, 20, (1,))),
        ),
        Case(
            "scale over input", "scale must not overlap input, got views that share memory",
            shared(96, input=(F32, 0, (4, 6)), scale=(F32, 92, (1,))),
        ),
        Case(
            "result over scale_ub", "result must not overlap scale_ub, got views that share memory",
            shared(24, result=(E4M3, 0, (4, 6)), scale_ub=(F32, 4, (1,))),
        ),
        Case(
            "scale over scale_ub", "scale must not overlap scale_ub, got views that share memory",
            shared(4, scale=(F32, 0, (1,)), scale_ub=(F32, 0, (1,))),
        ),
        Case("two bounds", "scale_ub must have 1 element, got shape [2]", {"scale_ub": new(2)}),
        Case("no bound", "scale_ub must have 1 element, got shape [0]", {"scale_ub": new(0)}),
        too_many_dimensions("scale_ub", F32),
    ],
    "scaled_fp8_dequant": [
        *wrong_dtype("input", QUANTIZED, "float32", "float16", "bfloat16"),
        *wrong_dtype("result", REAL, "float8_e4m3fn", "float8_e5m2"),
        *wrong_float32("scale"),
        *wrong_shapes(torch.bfloat16),
        too_many_dimensions("input", E4M3),
        *wrong_scales("scale"),
        *wrong_scales_without_group("scale"),
        Case(
            EXPANDED.id, EXPANDED.sentence,
            {"result": lambda device: torch.ones(1, 6, device=device).expand(4, 6)},
        ),
        Case(
            "result over input", "result must not overlap input, got views that share memory",
            shared(96, result=(F32, 0, (4, 6)), input=(E4M3, 72, (4, 6))),
        ),
        Case(
            "result over scale", "result must not overlap scale, got views that share memory",
            shared(96, result=(F32, 0, (4, 6)), scale=(F32, 0, (1,))),
        ),
    ],
    "group_amax": [
        *wrong_dtype("input", REAL, "float8_e4m3fn", "float8_e5m2"),
        *wrong_float32("amax"),
        too_many_dimensions("amax", F32),
        too_many_dimensions("input", F32),
        *wrong_scales("amax"),
        Case(
            "amax is expanded",
            "amax must not overlap itself, as it is written, got stride 0 in dimension 0 of size 4",
            {"amax": lambda device: sevens(1, dtype=F32)(device).expand(4), **group(1, -1)},
        ),
        Case(
            "amax over input", "amax must not overlap input, got views that share memory",
            shared(96, input=(F32, 0, (4, 6)), amax=(F32, 92, (1,))),
        ),
    ],
    "reshape_and_cache_flash": [
        *wrong_caches(or_stored=True), *contradictions(quantized_only=False), *wrong_slots(),
        *wrong_cache_scales(or_cache=False), *wrong_offsets(plain_caches(sevens), alike=False),
        *cache_overlaps("reshape_and_cache_flash", *OFFSETS),
    ],
    "reshape_and_cache_flash_dynamic": [
        *wrong_caches(), *contradictions(quantized_only=True), *wrong_slots(), *wrong_scale_caches(),
        *wrong_offsets({}), *cache_overlaps("reshape_and_cache_flash_dynamic", *OFFSETS),
    ],
    "rope_quant_and_cache": [
        *wrong_caches(alike=True), *contradictions(quantized_only=False), *wrong_slots(),
        *wrong_cache_scales(or_cache=False),
        *wrong_offsets(plain_caches(sevens) | {"query_out": sevens(3, 8, 6, dtype=torch.bfloat16)}),
        *cache_overlaps("rope_quant_and_cache", *OFFSETS),
    ],
    "gather_and_dequant_cache": [
        *wrong_caches(), *contradictions(quantized_only=False), *wrong_cache_scales(or_cache=True),
        *wrong_sequences(), *wrong_offsets(plain_caches(new), alike=False),
        *cache_overlaps("gather_and_dequant_cache", ("seq_starts", new(2, dtype=INT32)), *OFFSETS),
    ],
    "paged_attention": [
        *wrong_attention(), *contradictions(quantized_only=False),
        *cache_overlaps(
            "paged_attention", ("seq_starts", new(2, dtype=INT32)), ("sinks", new(8)), *OFFSETS
        ),
    ],
}  # fmt: skip


def refuse(device: torch.device, op: str, case: Case) -> None:
    arguments = {name: make(device) for name, make in (USUAL[op] | case.arguments).items()}
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(RuntimeError) as error:
        getattr(fp8kv, op)(**arguments)
    assert str(error.value) == f"fp8kv::{op}: {case.sentence}", case.id
    for name, value in before.items():
        assert_same_bytes(arguments[name], value)


def mistakes_by_sentence() -> dict[tuple[str, str], list[Case]]:
    """All that lead to one sentence of an op, but for what it says it got."""
    mistakes: dict[tuple[str, str], list[Case]] = {}
    for op, cases in CASES.items():
        for case in cases:
            mistakes.setdefault((op, case.sentence.split(", got ")[0]), []).append(case)
    return mistakes


@pytest.mark.parametrize(
    ("op", "cases"),
    [pytest.param(op, cases, id=f"{op}-{rule}") for (op, rule), cases in mistakes_by_sentence().items()],
)
def test_the_sentence(op: str, cases: list[Case]) -> None:
    """With every mistake that leads to it."""
    for case in cases:
        refuse(torch.device("cpu"), op, case)


@pytest.mark.parametrize("op", CASES)
def test_all_sentences_on_cuda(cuda: torch.device, op: str) -> None:
    for case in CASES[op]:
        refuse(cuda, op, case)


@pytest.mark.parametrize("op", USUAL)
def test_none_in_place_of_a_tensor(device: torch.device, op: str) -> None:
    """PyTorch lets it pass."""
    for position, name in enumerate(USUAL[op], 1):
        arguments = {name: make(device) for name, make in USUAL[op].items()}
        may_be_none = op == "paged_attention" and name in ("out", "cu_query_lens", "lse")
        if isinstance(arguments[name], Tensor) and not may_be_none:
            before = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
            with pytest.raises(RuntimeError) as error:
                getattr(fp8kv, op)(**arguments | {name: None})
            argument = r"\d+" if op == "paged_attention" else position  # whose operator has another order
            assert re.fullmatch(rf"fp8kv(: argument {argument}|::\w+: {name}) must be a tensor, got None", str(error.value))
            for n, x in before.items():
                assert_same_bytes(arguments[n], x)


@pytest.mark.parametrize("op", USUAL)
def test_the_usual_arguments_are_accepted(device: torch.device, op: str) -> None:
    """So that each case has one mistake only."""
    arguments = {name: make(device) for name, make in USUAL[op].items()}
    before = {name: raw(arguments[name]) for name in WRITTEN[op]}
    getattr(fp8kv, op)(**arguments)
    if op != "group_amax":
        assert any(not torch.equal(raw(arguments[name]), before[name]) for name in WRITTEN[op])


@pytest.mark.parametrize(
    ("op", "argument", "other"),
    [
        ("static_scaled_fp8_quant", "result", "input"),
        ("static_scaled_fp8_quant", "scale", "input"),
        ("dynamic_scaled_fp8_quant", "result", "input"),
        ("dynamic_scaled_fp8_quant", "scale", "input"),
        ("dynamic_scaled_fp8_quant", "scale_ub", "input"),
        ("scaled_fp8_dequant", "result", "input"),
        ("scaled_fp8_dequant", "scale", "input"),
        ("group_amax", "amax", "input"),
        *(
            (op, argument, "key")
            for op in (
                "reshape_and_cache_flash",
                "reshape_and_cache_flash_dynamic",
                "rope_quant_and_cache",
                "gather_and_dequant_cache",
            )
            for argument in (*USUAL[op], "k_offset", "v_offset")
            if argument not in ("key", "kv_cache_dtype")
        ),
        ("gather_and_dequant_cache", "seq_starts", "key"),
        *(
            ("paged_attention", argument, "query")
            for argument in (*USUAL["paged_attention"], "seq_starts", "sinks", "k_offset", "v_offset")
            if argument not in ("query", "kv_cache_dtype")
        ),
    ],
)
@pytest.mark.parametrize("stray", ["cpu", "cuda:0"])
def test_devices_that_differ(cuda: torch.device, op: str, argument: str, other: str, stray: str) -> None:
    home = "cuda:0" if stray == "cpu" else "cpu"
    arguments = {name: make(torch.device(home)) for name, make in USUAL[op].items()}
    optional = {
        "scale_ub": new(1), "seq_starts": new(2, dtype=INT32), "sinks": new(8), **dict(OFFSETS)
    }  # fmt: skip
    arguments[argument] = (USUAL[op] | optional)[argument](torch.device(stray))
    with pytest.raises(RuntimeError) as error:
        getattr(fp8kv, op)(**arguments)
    assert str(error.value) == f"fp8kv::{op}: {argument} must be on the device of {other}, {home}, got {stray}"


@pytest.mark.parametrize("op", ["static_scaled_fp8_quant", "dynamic_scaled_fp8_quant", "scaled_fp8_dequant"])
def test_views_beside_each_other_do_not_overlap(device: torch.device, op: str) -> None:
    """Input and result may be columns of one buffer."""
    buffer = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    fp8, real = buffer[:, :6].view(E4M3), buffer[:, 8:32].view(torch.float32)
    scale = torch.ones(1, device=device)
    if op == "scaled_fp8_dequant":
        fp8kv.scaled_fp8_dequant(real, fp8, scale)
    else:
        getattr(fp8kv, op)(fp8, real, scale)
    assert not buffer[:, 6:8].any()
    assert not buffer[:, 32:].any()


def test_what_quantize_refuses_itself(device: torch.device) -> None:
    one = torch.ones(1, device=device)
    with pytest.raises(ValueError) as error:
        fp8kv.quantize(one, one, scale_ub=one)
    expected = "fp8kv.quantize: scale_ub must be None when a scale is given, as it bounds computed scales"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: fp8kv.quantize(x, dtype=torch.uint8),
         "dynamic_scaled_fp8_quant: result must be " + QUANTIZED + ", got uint8"),
        (lambda x: fp8kv.quantize(x, group_shape=(1,)),
         "dynamic_scaled_fp8_quant: group_shape must have two extents, rows and columns, got 1"),
        (lambda x: fp8kv.quantize(x, group_shape=(0, 5)),
         "dynamic_scaled_fp8_quant: group_shape must have two extents, each -1 or at least 1, got (0, 5)"),
        (lambda x: fp8kv.quantize(x.double()),
         "dynamic_scaled_fp8_quant: input must be " + REAL + ", got float64"),
        (lambda x: fp8kv.dequantize(x, x[:1, 0]),
         "scaled_fp8_dequant: input must be " + QUANTIZED + ", got float32"),
        (lambda x: fp8kv.dequantize(x.to(E4M3), x[:1, 0], dtype=torch.float64),
         "scaled_fp8_dequant: result must be " + REAL + ", got float64"),
    ],
    ids=["dtype", "one extent", "extent 0", "input", "dequantize input", "dequantize dtype"],
)  # fmt: skip
def test_the_functions_pass_on_what_the_ops_say(device: torch.device, call: Callable[[Tensor], object], sentence: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call(torch.ones(4, 6, device=device))
    assert str(error.value) == f"fp8kv::{sentence}"
