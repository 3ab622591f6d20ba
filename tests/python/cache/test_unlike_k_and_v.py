"""K and V with heads of two sizes or elements of two dtypes, rows that are quantized already, latent caches.

Against the reference, byte for byte, with all that lies around the slots; and the reference against plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import reference
from helpers import (
    KINDS_OF_LAYOUTS,
    TRAP_SCALES,
    all_fp8,
    assert_same_bytes,
    copy_bits,
    each_real,
    empty_view,
    placed,
    random_bits,
    random_scales,
    random_slots,
    raw,
    sentinels,
    values,
)

CPU = torch.device("cpu")
ONE = torch.ones(1)
BLOCKS = (7, 5)  # number, size
TOKENS = 23
SLOTS = random_slots(TOKENS, BLOCKS[0] * BLOCKS[1])
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: Head sizes of K and V: of MiMo and DeepSeek, of a tiny model, of a latent and its RoPE part, odd, without V.
SIZES = [(192, 128), (24, 16), (512, 64), (64, 512), (33, 7), (1, 3), (8, 1), (128, 0), (576, 0), (0, 16)]
#: dtypes of the caches: names and dtypes of K and V.
FORMATS = {
    "bf16 and e4m3": (("auto", torch.bfloat16), ("fp8", E4M3)),
    "e4m3 and bf16": (("fp8", E4M3), ("bfloat16", torch.bfloat16)),
    "e4m3 and e5m2": (("fp8", E4M3), ("fp8_e5m2", E5M2)),
    "int8 and e4m3 in uint8": (("int8", torch.int8), ("fp8_e4m3", torch.uint8)),
    "fp16 and fp32": (("float16", torch.float16), ("auto", torch.float32)),
}
#: The `kv_cache_dtype` of each quantized format, and its dtype.
QUANTIZED_NAMES = {"fp8": E4M3, "fp8_e5m2": E5M2, "int8": torch.int8}
#: How the two caches lie in memory.
CACHE_LAYOUTS = ("NHD", "HND", "one tensor NHD", "one tensor HND", "steps", "offset 1", "offset 4")

each_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
each_formats = pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS.keys())


def two_caches(
    heads: int, sizes: Sequence[int], dtypes: Sequence[torch.dtype], layout: str, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """K and V ``[num_blocks, block_size, heads, size]``, and the buffers they lie in, full of sentinels."""
    hnd = layout.endswith("HND")

    def logical(cache: Tensor) -> Tensor:
        return cache.transpose(1, 2) if hnd else cache

    inner = (heads, BLOCKS[1]) if hnd else (BLOCKS[1], heads)
    if layout.startswith("one tensor") and dtypes[0] == dtypes[1]:
        whole = sentinels((BLOCKS[0], *inner, sum(sizes)), dtypes[0], device)
        return logical(whole[..., : sizes[0]]), logical(whole[..., sizes[0] :]), [whole]
    kind = "contiguous" if layout.endswith(("NHD", "HND")) else layout
    views = [empty_view((BLOCKS[0], *inner, size), dtype, kind, device) for size, dtype in zip(sizes, dtypes, strict=True)]
    return logical(views[0][0]), logical(views[1][0]), [buffer for _, buffer in views]


def compare_appends(
    device: torch.device,
    rows: Sequence[Tensor],
    slots: Tensor,
    formats: Sequence[tuple[str, torch.dtype]],
    given: Sequence[Tensor | None],
    cache_layout: str = "NHD",
    row_layout: str = "as given",
) -> None:
    """The op on `device` and the reference write the same bytes; `given`: scales and offsets."""
    heads, sizes, dtypes = rows[0].shape[1], [x.shape[2] for x in rows], [dtype for _, dtype in formats]
    results = []
    for ops, at in ((fp8kv, device), (reference, CPU)):
        *caches, buffers = two_caches(heads, sizes, dtypes, cache_layout, at)
        ops.reshape_and_cache_flash(
            *(placed(x, row_layout, at) for x in rows), *caches, slots.to(at), formats[0][0], *moved(given, at),
            v_cache_dtype=None if formats[0] == formats[1] else formats[1][0],
        )  # fmt: skip
        results.append(buffers)
    assert_all_same(*results)


def compare_dynamic_appends(
    device: torch.device,
    rows: Sequence[Tensor],
    slots: Tensor,
    formats: Sequence[tuple[str, torch.dtype]],
    offsets: Sequence[Tensor | None],
    cache_layout: str,
) -> None:
    """The same, and scales of the sides that are there."""
    heads, sizes, dtypes = rows[0].shape[1], [x.shape[2] for x in rows], [dtype for _, dtype in formats]
    results = []
    for ops, at in ((fp8kv, device), (reference, CPU)):
        *caches, buffers = two_caches(heads, sizes, dtypes, cache_layout, at)
        scales = [sentinels((*BLOCKS, heads), torch.float32, at) for _ in range(2)]
        ops.reshape_and_cache_flash_dynamic(
            *(x.to(at) for x in rows), *caches, *scales, slots.to(at), formats[0][0], *moved(offsets, at),
            v_cache_dtype=None if formats[0] == formats[1] else formats[1][0],
        )  # fmt: skip
        results.append([*buffers, *(scale for scale, size in zip(scales, sizes, strict=True) if size > 0)])
    assert_all_same(*results)


def assert_all_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_same_bytes(a, e)


def rows_of(heads: int, sizes: Sequence[int], real: torch.dtype) -> list[Tensor]:
    return [values((TOKENS + 2, heads, size), real, seed) for seed, size in enumerate(sizes)]


def parameters(heads: int, sizes: Sequence[int], kind: str) -> list[Tensor | None]:
    """k_scale, v_scale, k_offset, v_offset."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "tensor": [(1,), (1,)],
        "head": [(heads,), (heads,)],
        "channel": [(heads, size) for size in sizes],
        "tensor and channel": [(1,), (heads, sizes[1])],
        "offset": [(heads,), (1,)],
    }
    scales = [random_scales(shape, seed) for seed, shape in enumerate(shapes[kind])]
    offsets = [values((heads, size), torch.float32, 5 + size, specials=False) for size in sizes]
    return [*scales, *(offsets if kind == "offset" else (None, None))]


def moved(tensors: Sequence[Tensor | None], device: torch.device) -> list[Any]:
    return [x if x is None else x.to(device) for x in tensors]


KINDS = ("tensor", "head", "channel", "tensor and channel", "offset")


# Append


@each_sizes
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_append_with_two_head_sizes(device: torch.device, sizes: tuple[int, int], layout: str) -> None:
    for heads, kind in product((1, 2), KINDS):
        rows, given = rows_of(heads, sizes, torch.bfloat16), parameters(heads, sizes, kind)
        compare_appends(device, rows, SLOTS, [("fp8", E4M3)] * 2, given, layout)


def test_append_with_two_head_sizes_for_each_instruction_set(isa: str) -> None:
    for sizes, kind, format in product(((192, 128), (33, 7)), KINDS, QUANTIZED_NAMES.items()):
        rows, given = rows_of(2, sizes, torch.float16), parameters(2, sizes, kind)
        compare_appends(CPU, rows, SLOTS, [format] * 2, given, "one tensor NHD")


@each_real
@pytest.mark.parametrize("layout", KINDS_OF_LAYOUTS)
def test_rows_of_two_sizes_in_any_memory(device: torch.device, real: torch.dtype, layout: str) -> None:
    rows, given = rows_of(2, (24, 16), real), parameters(2, (24, 16), "head")
    compare_appends(device, rows, SLOTS, [("fp8", E4M3)] * 2, given, "one tensor HND", layout)


@each_formats
@each_real
@pytest.mark.parametrize("sizes", [(24, 24), (40, 16), (7, 33), (0, 8)], ids=str)
def test_append_with_two_dtypes(
    device: torch.device, formats: Sequence[tuple[str, torch.dtype]], real: torch.dtype, sizes: tuple[int, int]
) -> None:
    rows = rows_of(2, sizes, real)
    for kind, layout in product(("tensor", "head", "channel"), ("NHD", "HND", "offset 1")):
        compare_appends(device, rows, SLOTS.int(), formats, parameters(2, sizes, kind)[:2], layout)


def test_offsets_of_the_quantized_side_alone(device: torch.device) -> None:
    offset = values((2, 24), torch.float32, specials=False)
    formats = ("bfloat16", torch.bfloat16), ("int8", torch.int8)
    compare_appends(device, rows_of(2, (16, 24), torch.bfloat16), SLOTS, formats, [ONE, ONE, None, offset])


@pytest.mark.parametrize("real", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_extreme_scales_of_one_side(device: torch.device, real: torch.dtype) -> None:
    """A scale of K that divides the slow way leaves V alone, and the other way round."""
    rows = rows_of(1, (48, 32), real)
    for scale in TRAP_SCALES[:24].view(-1, 1):
        for given in ([scale, ONE], [ONE, scale]):
            compare_appends(device, rows, SLOTS, [("fp8", E4M3)] * 2, given)


# Rows that are quantized already


@pytest.mark.parametrize("kv_cache_dtype", QUANTIZED_NAMES)
@pytest.mark.parametrize("sizes", [(64, 64), (24, 16), (5, 9), (16, 0)], ids=str)
@pytest.mark.parametrize("layout", KINDS_OF_LAYOUTS)
def test_quantized_rows_are_stored_as_they_are(
    device: torch.device, kv_cache_dtype: str, sizes: tuple[int, int], layout: str
) -> None:
    """Every byte, NaN of every kind too; scales and offsets are not used. No operator says what is expected."""
    dtype = QUANTIZED_NAMES[kv_cache_dtype]
    rows = [random_bits((TOKENS, 3, size), dtype, torch.Generator().manual_seed(size)) for size in sizes]
    scales = [torch.tensor([float("nan")]), random_scales((3, sizes[1]))]
    for cache_layout, as_bytes in product(("NHD", "one tensor HND", "offset 1", "steps"), (False, True)):
        if as_bytes and dtype == torch.int8:
            continue
        *caches, buffers = two_caches(3, sizes, (dtype, dtype), cache_layout, device)
        given = [placed(x.view(torch.uint8) if as_bytes else x, layout, device) for x in rows]
        offsets = [torch.ones(3, size, device=device) for size in sizes]
        fp8kv.reshape_and_cache_flash(*given, *caches, SLOTS.to(device), kv_cache_dtype, *moved(scales, device), *offsets)
        *expected, all_expected = two_caches(3, sizes, (dtype, dtype), cache_layout, CPU)
        for cache, x in zip(expected, rows, strict=True):
            for token, slot in enumerate(SLOTS.tolist()):
                if slot >= 0:
                    copy_bits(cache[slot // BLOCKS[1], slot % BLOCKS[1]], x[token])
        for a, e in zip(buffers, all_expected, strict=True):
            assert_same_bytes(a, e)


def test_the_reference_stores_quantized_rows_as_they_are() -> None:
    for name, dtype in QUANTIZED_NAMES.items():
        rows = all_fp8(torch.uint8).view(dtype).view(1, 2, 128)
        caches = torch.zeros(2, 1, 1, 2, 128, dtype=dtype)
        reference.reshape_and_cache_flash(rows, rows, *caches, torch.tensor([0]), name, ONE / 3, ONE)
        for cache in caches:
            assert_same_bytes(cache[0], rows)


def test_one_side_may_be_quantized_already(device: torch.device) -> None:
    rows = random_bits((TOKENS, 2, 24), E5M2), values((TOKENS, 2, 24), torch.bfloat16)
    formats = ("fp8_e5m2", E5M2), ("fp8", E4M3)
    compare_appends(device, rows, SLOTS, formats, [random_scales((2, 24), seed) for seed in range(2)])


def test_the_last_of_several_quantized_tokens_of_a_slot_stays() -> None:
    rows = random_bits((40, 2, 16), E4M3)
    slots = torch.tensor([3, 1, 3, -1, 3] * 8)
    caches = torch.zeros(2, 1, 4, 2, 16, dtype=E4M3)
    fp8kv.reshape_and_cache_flash(rows, rows, *caches, slots, "fp8", ONE, ONE)
    for cache in caches:
        assert_same_bytes(cache[0, 3], rows[39])
        assert_same_bytes(cache[0, 1], rows[36])


# Dynamic append


@each_sizes
@pytest.mark.parametrize("layout", ["NHD", "one tensor HND", "offset 1", "steps"])
def test_dynamic_append_with_two_head_sizes(device: torch.device, sizes: tuple[int, int], layout: str) -> None:
    for heads, kind in product((1, 2), ("tensor", "offset")):
        rows, offsets = rows_of(heads, sizes, torch.bfloat16), parameters(heads, sizes, kind)[2:]
        compare_dynamic_appends(device, rows, SLOTS, [("fp8", E4M3)] * 2, offsets, layout)


@each_real
def test_dynamic_append_with_two_dtypes(device: torch.device, real: torch.dtype) -> None:
    formats = ("int8", torch.int8), ("fp8_e5m2", E5M2)
    compare_dynamic_appends(device, rows_of(2, (40, 24), real), SLOTS, formats, [None, None], "HND")


# Gather


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """block_table, cu_seq_lens, seq_starts: of 3 sequences with 0, 11 and 8 tokens."""
    table = torch.tensor([[6, 5, 4], [2, 0, 6], [1, 3, -1]], dtype=torch.int32)
    return table, torch.tensor([0, 0, 11, 19], dtype=torch.int32), torch.tensor([0, 3, 2], dtype=torch.int32)


def compare_gathers(
    device: torch.device,
    heads: int,
    sizes: Sequence[int],
    formats: Sequence[tuple[str, torch.dtype]],
    real: torch.dtype,
    layouts: tuple[str, str],
    given: Sequence[Tensor | None],
) -> None:
    """Rows in the first layout, caches of random bytes in the second; rows that are not written keep their bytes."""
    results = []
    for ops, at in ((fp8kv, device), (reference, CPU)):
        *caches, _ = two_caches(heads, sizes, [dtype for _, dtype in formats], layouts[1], at)
        for seed, cache in enumerate(caches):
            copy_bits(cache, random_bits(cache.shape, cache.dtype, torch.Generator().manual_seed(seed)))
        rows = [empty_view((21, heads, size), real, layouts[0], at) for size in sizes]
        ops.gather_and_dequant_cache(
            *caches, *(view for view, _ in rows), *moved(sequences()[:2], at), formats[0][0], *moved(given[:2], at),
            sequences()[2].to(at), *moved(given[2:], at), v_cache_dtype=formats[1][0],
        )  # fmt: skip
        results.append([buffer for _, buffer in rows])
    assert_all_same(*results)


@each_sizes
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_gather_with_two_head_sizes(device: torch.device, sizes: tuple[int, int], layout: str) -> None:
    for heads, kind in product((1, 2), KINDS):
        given = parameters(heads, sizes, kind)
        compare_gathers(device, heads, sizes, [("fp8", E4M3)] * 2, torch.bfloat16, ("contiguous", layout), given)


@pytest.mark.parametrize("layout", KINDS_OF_LAYOUTS)
@each_real
def test_gather_of_two_sizes_into_any_memory(device: torch.device, layout: str, real: torch.dtype) -> None:
    for sizes in ((24, 16), (3, 17)):
        given = parameters(2, sizes, "head")
        compare_gathers(device, 2, sizes, [("fp8", E4M3)] * 2, real, (layout, "NHD"), given)


@pytest.mark.parametrize("sizes", [(24, 24), (24, 16), (5, 9)], ids=str)
def test_gather_with_scales_of_each_token(device: torch.device, sizes: tuple[int, int]) -> None:
    given = [*(random_scales((*BLOCKS, 2), seed) for seed in range(2)), None, None]
    compare_gathers(device, 2, sizes, [("fp8", E4M3)] * 2, torch.float16, ("contiguous", "HND"), given)


@each_formats
@each_real
@pytest.mark.parametrize("sizes", [(24, 24), (40, 16), (7, 33), (0, 8)], ids=str)
def test_gather_with_two_dtypes(
    device: torch.device, formats: Sequence[tuple[str, torch.dtype]], real: torch.dtype, sizes: tuple[int, int]
) -> None:
    for kind, layout in product(("tensor", "head", "channel"), ("NHD", "offset 1")):
        given = [*parameters(2, sizes, kind)[:2], None, None]
        compare_gathers(device, 2, sizes, formats, real, ("contiguous", layout), given)


def test_gather_with_two_head_sizes_for_each_instruction_set(isa: str) -> None:
    for sizes, kind in product(((192, 128), (33, 7)), KINDS):
        given = parameters(2, sizes, kind)
        for formats in ([("fp8", E4M3)] * 2, [("int8", torch.int8), ("fp8_e5m2", E5M2)]):
            compare_gathers(CPU, 2, sizes, formats, torch.bfloat16, ("contiguous", "HND"), given)


# Expected values from plain PyTorch alone


def test_what_lies_in_the_halves_of_a_latent_cache(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(3, 1, 512, generator=generator).bfloat16()
    rope = torch.randn(3, 1, 64, generator=generator).bfloat16()
    cache = torch.zeros(4, 16, 1, 576, dtype=E4M3, device=device)
    scale, slots = torch.tensor([0.03125], device=device), torch.tensor([0, 17, 5], device=device)
    fp8kv.reshape_and_cache_flash(
        latent.to(device), rope.to(device), cache[..., :512], cache[..., 512:], slots, "fp8", scale, scale
    )
    expected = torch.zeros(64, 576, dtype=torch.uint8)
    whole = torch.cat((latent, rope), -1).float() / 0.03125  # a power of two: exact, and below 448
    expected[[0, 17, 5]] = whole.squeeze(1).to(E4M3).view(torch.uint8)
    assert_same_bytes(cache.view(torch.uint8).view(64, 576), expected)

    rows = torch.empty(1, 1, 512, device=device), torch.empty(1, 1, 64, device=device)
    table = torch.tensor([[1]], dtype=torch.int32, device=device)
    sums, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1], [1]))
    fp8kv.gather_and_dequant_cache(cache[..., :512], cache[..., 512:], *rows, table, sums, "fp8", scale, scale, starts)
    back = expected[17].view(E4M3).float() * 0.03125
    assert torch.equal(torch.cat(rows, -1).cpu().flatten(), back)


def test_sixteen_bit_keys_beside_fp8_values(device: torch.device) -> None:
    key, value = values((4, 2, 6), torch.bfloat16, 1), values((4, 2, 10), torch.bfloat16, 2, specials=False)
    caches = torch.zeros(3, 2, 2, 6, dtype=torch.bfloat16, device=device), torch.zeros(3, 2, 2, 10, dtype=E5M2, device=device)
    slots = torch.tensor([5, -1, 0, 2], device=device)
    one = ONE.to(device)
    fp8kv.reshape_and_cache_flash(key.to(device), value.to(device), *caches, slots, "auto", one, one, v_cache_dtype="fp8_e5m2")
    for token, slot in ((0, 5), (2, 0), (3, 2)):
        assert_same_bytes(caches[0].view(6, 2, 6)[slot], key[token])
        assert torch.equal(raw(caches[1].view(6, 2, 10)[slot]), raw(value[token].float().to(E5M2)))


# Refused, with nothing written


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"v_cache_dtype": "fp8e4m3"}, 'v_cache_dtype must be "auto", "float16", "bfloat16", "float32", "fp8", '
         '"fp8_e4m3", "fp8_e5m2" or "int8", got "fp8e4m3"'),
        ({"v_cache_dtype": "int8"}, 'value_cache must be int8 as v_cache_dtype is "int8", got float8_e4m3fn'),
        ({"v_cache_dtype": "auto"}, 'value_cache must be float32, float16 or bfloat16 as v_cache_dtype is "auto", '
         "got float8_e4m3fn"),
        ({"value_cache": torch.zeros(2, 5, 3, 4, dtype=E5M2)},
         "value_cache must be float8_e4m3fn as key_cache is, as v_cache_dtype is not given, got float8_e5m2"),
        ({"value_cache": torch.zeros(2, 4, 3, 4, dtype=E4M3)},
         "value_cache must have num_blocks=2, block_size=5 and num_kv_heads=3 as key_cache has, got shape [2, 4, 3, 4]"),
        ({"value": torch.ones(1, 3, 6)},
         "value must have num_kv_heads=3 and head_size=4 as value_cache has, got shape [1, 3, 6]"),
        ({"key": torch.ones(1, 3, 4)}, "key must have num_kv_heads=3 and head_size=6 as key_cache has, got shape [1, 3, 4]"),
        ({"v_scale": torch.ones(3, 6)}, "v_scale must have 1 or num_kv_heads=3 elements, or the shape "
         "[num_kv_heads, head_size=4], got shape [3, 6]"),
        ({"v_offset": torch.ones(3, 6)}, "v_offset must have the shape [num_kv_heads=3, head_size=4], got shape [3, 6]"),
        ({"key": torch.ones(1, 3, 6).to(E5M2)},
         "key must be float32, float16 or bfloat16, or float8_e4m3fn to be stored as it is, got float8_e5m2"),
        ({"value": torch.ones(1, 3, 4).to(torch.int8)},
         "value must be float32 as key is, or float8_e4m3fn to be stored as it is, got int8"),
    ],
)  # fmt: skip
def test_what_append_refuses(device: torch.device, changes: dict[str, Any], sentence: str) -> None:
    caches = {"key_cache": torch.zeros(2, 5, 3, 6, dtype=E4M3), "value_cache": torch.zeros(2, 5, 3, 4, dtype=E4M3)}
    usual = {
        "key": torch.ones(1, 3, 6), "value": torch.ones(1, 3, 4), **caches, "slot_mapping": torch.tensor([7]),
        "kv_cache_dtype": "fp8", "k_scale": ONE, "v_scale": ONE,
    }  # fmt: skip
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in (usual | changes).items()}
    with pytest.raises(RuntimeError) as error:
        fp8kv.reshape_and_cache_flash(**arguments)
    assert str(error.value) == f"fp8kv::reshape_and_cache_flash: {sentence}"
    assert not any(arguments[name].view(torch.uint8).any() for name in caches)


def test_halves_that_share_an_element_are_refused(device: torch.device) -> None:
    cache = torch.zeros(4, 16, 1, 576, dtype=E4M3, device=device)
    key, value = torch.ones(1, 1, 512, device=device), torch.ones(1, 1, 65, device=device)
    one, slots = ONE.to(device), torch.tensor([3], device=device)
    with pytest.raises(RuntimeError, match=r"key_cache must not overlap value_cache, got views that share memory"):
        fp8kv.reshape_and_cache_flash(key, value, cache[..., :512], cache[..., 511:], slots, "fp8", one, one)
    assert not cache.view(torch.uint8).any()


def test_dynamic_append_and_gather_take_no_quantized_rows(device: torch.device) -> None:
    caches = torch.zeros(2, 1, 4, 1, 8, dtype=E4M3, device=device)
    scales = torch.zeros(2, 1, 4, 1, device=device)
    rows = torch.zeros(2, 1, 1, 8, dtype=E4M3, device=device)
    with pytest.raises(RuntimeError, match=r"dynamic: key must be float32, float16 or bfloat16, got float8_e4m3fn"):
        fp8kv.reshape_and_cache_flash_dynamic(*rows, *caches, *scales, torch.tensor([0], device=device), "fp8")
    table, sums = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.tensor([0, 1], dtype=torch.int32, device=device)
    one = ONE.to(device)
    with pytest.raises(RuntimeError, match=r"cache: key must be float32, float16 or bfloat16, got float8_e4m3fn"):
        fp8kv.gather_and_dequant_cache(*caches, *rows, table, sums, "fp8", one, one)
