"""rope_quant_and_cache against the reference: byte for byte, but with a norm within one step of FP8."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import _ops, reference
from helpers import (
    PLAIN_CACHES,
    QUANTIZED_CACHES,
    REAL,
    TRAP_SCALES,
    assert_same_bytes,
    bad_slots,
    each_cache_layout,
    each_kind_of_layout,
    each_real,
    empty_caches,
    empty_view,
    placed,
    random_scales,
    random_slots,
    raw,
    torch_threads,
    values,
)

CPU = torch.device("cpu")
CACHES = QUANTIZED_CACHES | PLAIN_CACHES
ROPE = {"none": None, "neox": True, "interleaved": False}
each_rope = pytest.mark.parametrize("rope", ROPE)


def cos_sin(max_position: int, rotary_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / (rotary_dim // 2))
    angles = torch.arange(max_position, dtype=torch.float64).unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).to(dtype)


@dataclass
class Step:
    """The arguments of one call, all on the CPU and contiguous; `layouts` says how they are placed."""

    tokens: int = 37
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 64
    real: torch.dtype = torch.bfloat16
    cache: str = "e4m3"
    query_out: torch.dtype | None = torch.float8_e4m3fn
    rope: str = "neox"
    rotary_dim: int | None = None
    table: torch.dtype = torch.float32
    section: tuple[int, int, int] | None = None
    interleaved: bool = False
    norm: bool = False
    norm_after_rope: bool = False
    weight: torch.dtype | None = None
    scales: tuple[int, int, int] = (1, 1, 1)
    blocks: tuple[int, int] = (4, 16)
    cache_layout: str = "NHD"
    layouts: dict[str, str] = field(default_factory=dict)
    specials: bool = True
    max_position: int = 200
    changes: dict[str, Tensor] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """By name, but for the written ones."""
        generator = torch.Generator().manual_seed(self.tokens)
        shape = (self.tokens, self.num_kv_heads, self.head_size)
        step: dict[str, Any] = {
            "query": values((self.tokens, self.num_heads, self.head_size), self.real, 1, self.specials),
            "key": values(shape, self.real, 2, self.specials),
            "value": values(shape, self.real, 3, self.specials),
            "slot_mapping": random_slots(self.tokens, self.blocks[0] * self.blocks[1]),
            "kv_cache_dtype": CACHES[self.cache][0],
        }
        for seed, (name, count) in enumerate(zip(("q", "k", "v"), self.scales, strict=True)):
            step[f"{name}_scale"] = random_scales((count,), seed + 5)
        if self.rope != "none":
            shape = (self.tokens,) if self.section is None else (3, self.tokens)
            step["positions"] = torch.randint(0, self.max_position, shape, generator=generator)
            step["cos_sin_cache"] = cos_sin(self.max_position, self.rotary_dim or self.head_size, self.table)
            step["is_neox"] = bool(ROPE[self.rope])
        if self.norm:
            for name in ("q_norm_weight", "k_norm_weight"):
                weight = 1 + 0.2 * torch.randn(self.head_size, generator=generator)
                step[name] = weight.to(self.weight or self.real)
            step["norm_eps"] = 1e-5
        if self.section is not None:
            step |= {"mrope_section": list(self.section), "mrope_interleaved": self.interleaved}
        if self.norm_after_rope:
            step["norm_after_rope"] = True
        return step | self.changes

    def run(self, ops: ModuleType, device: torch.device) -> list[Tensor]:
        """The buffers that query_out and the caches lie in."""
        step = self.arguments()
        arguments = {
            name: placed(x, self.layouts.get(name, "contiguous"), device) if isinstance(x, Tensor) else x
            for name, x in step.items()
        }
        out, out_buffer = empty_view(
            step["query"].shape,
            self.query_out or self.real,
            self.layouts.get("query_out", "contiguous"),
            device,
        )
        shape = (*self.blocks, self.num_kv_heads, self.head_size)
        key_cache, value_cache, buffers = empty_caches(shape, CACHES[self.cache][1], self.cache_layout, device)
        ops.rope_quant_and_cache(query_out=out, key_cache=key_cache, value_cache=value_cache, **arguments)
        return [out_buffer, *buffers]

    def check(self, device: torch.device) -> None:
        for actual, expected in zip(self.run(fp8kv, device), self.run(reference, CPU), strict=True):
            if self.norm:
                assert_within_one_step(actual, expected)
            else:
                assert_same_bytes(actual, expected)


def assert_within_one_step(actual: Tensor, expected: Tensor) -> None:
    """Of a quantized type: the same sign, or both about zero, and neighbors in the order of magnitudes.

    Of a real type: a step, or the rounding of fp32 where two terms of RoPE cancel.
    """
    if actual.is_floating_point() and actual.dtype.itemsize > 1:
        eps = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.cpu(), expected, rtol=max(eps, 1e-5), atol=4e-6, equal_nan=True)
        return
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    a, e = (x.contiguous().cpu().view(torch.int8).int() for x in (actual, expected))
    is_fp8 = actual.dtype != torch.int8
    ordered = [torch.where(bits < 0, -128 - bits, bits) if is_fp8 else bits for bits in (a, e)]
    assert int((ordered[0] - ordered[1]).abs().max()) <= 1
    assert float((a == e).float().mean()) > 0.98


# Against the reference


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@each_rope
@each_real
@pytest.mark.parametrize("cache", QUANTIZED_CACHES)
def test_every_combination(device: torch.device, cache: str, real: torch.dtype, rope: str, norm: bool) -> None:
    for query_out in (None,) if cache == "int8" else (CACHES[cache][1], None):
        for scales in ((1, 1, 1), (2, 2, 2), (8, 1, 2)):
            Step(cache=cache, real=real, rope=rope, norm=norm, query_out=query_out, scales=scales,
                 specials=not norm).check(device)  # fmt: skip


@each_rope
@each_real
@pytest.mark.parametrize("cache", PLAIN_CACHES)
def test_caches_that_are_not_quantized(device: torch.device, cache: str, real: torch.dtype, rope: str) -> None:
    for query_out in REAL.values():
        Step(cache=cache, real=real, rope=rope, query_out=query_out).check(device)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@each_rope
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"),
    [(32, 8, 128), (9, 3, 64), (4, 4, 256), (6, 1, 96), (2, 1, 80), (3, 3, 20), (2, 2, 2), (5, 1, 7),
     (4, 2, 33), (2, 1, 264), (2, 2, 576), (1, 1, 577), (2, 2, 8), (40, 8, 16)],
    ids=str,
)  # fmt: skip
def test_every_geometry(device: torch.device, num_heads: int, num_kv_heads: int, head_size: int, rope: str, norm: bool) -> None:
    Step(
        tokens=19, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, rope=rope, norm=norm,
        rotary_dim=head_size // 2 * 2, scales=(num_heads, num_kv_heads, num_kv_heads), specials=not norm,
    ).check(device)  # fmt: skip


@pytest.mark.parametrize("table", REAL.values(), ids=REAL.keys())
@pytest.mark.parametrize("rotary_dim", [2, 6, 8, 24, 32, 64, 126, 128])
@pytest.mark.parametrize("rope", ["neox", "interleaved"])
def test_partial_rotation(device: torch.device, rope: str, rotary_dim: int, table: torch.dtype) -> None:
    for real in REAL.values():
        if table not in (torch.float32, real):
            continue
        for norm in (False, True):
            Step(tokens=11, head_size=128, rope=rope, rotary_dim=rotary_dim, table=table, real=real,
                 norm=norm, specials=not norm).check(device)  # fmt: skip


@pytest.mark.parametrize("argument", ["query", "key", "value", "query_out", "q_scale", "slot_mapping",
                                      "positions", "cos_sin_cache", "q_norm_weight"])  # fmt: skip
@each_kind_of_layout
def test_every_memory_layout(device: torch.device, layout: str, argument: str) -> None:
    norm = argument == "q_norm_weight"
    for rope in ("neox", "interleaved"):
        Step(tokens=13, scales=(8, 2, 1), rope=rope, layouts={argument: layout}, norm=norm,
             specials=not norm).check(device)  # fmt: skip


@each_cache_layout
def test_every_cache_layout(device: torch.device, cache_layout: str) -> None:
    for head_size in (64, 20):
        Step(cache_layout=cache_layout, head_size=head_size, scales=(2, 2, 2)).check(device)


@pytest.mark.parametrize("offset", range(1, 8))
def test_all_misaligned(device: torch.device, offset: int) -> None:
    names = ("query", "key", "value", "query_out", "cos_sin_cache", "positions", "slot_mapping")
    Step(layouts=dict.fromkeys(names, f"offset {offset}"), cache_layout=f"offset {offset}").check(device)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("tokens", [1, 16, 400])
def test_slices_of_one_qkv_tensor(device: torch.device, tokens: int, norm: bool) -> None:
    """As a model has them: 32 + 2 * 8 heads of 128, with int32 indices."""
    qkv = values((tokens, 48, 128), torch.bfloat16, 7, specials=not norm)
    query, key, value = qkv.split((32, 8, 8), 1)
    step = Step(tokens=tokens, num_heads=32, num_kv_heads=8, head_size=128, blocks=(150, 16), norm=norm,
                scales=(8, 8, 8), cache_layout="[nb, 2] HND")  # fmt: skip
    step.changes = {"query": query.contiguous(), "key": key.contiguous(), "value": value.contiguous()}
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in step.arguments().items()}
    on_device = qkv.to(device)
    arguments["query"], arguments["key"], arguments["value"] = on_device.split((32, 8, 8), 1)
    for name in ("slot_mapping", "positions"):
        arguments[name] = arguments[name].int()
    out = torch.empty(tokens, 32, 128, dtype=torch.float8_e4m3fn, device=device)
    key_cache, value_cache, buffers = empty_caches((150, 16, 8, 128), out.dtype, "[nb, 2] HND", device)
    fp8kv.rope_quant_and_cache(query_out=out, key_cache=key_cache, value_cache=value_cache, **arguments)
    compare = assert_within_one_step if norm else assert_same_bytes
    for actual, wanted in zip([out, *buffers], step.run(reference, CPU), strict=True):
        compare(actual, wanted)


@pytest.mark.parametrize(
    ("rope", "norm"),
    [("none", True), ("neox", False), ("neox", True), ("interleaved", False), ("interleaved", True)],
)
def test_many_tokens(device: torch.device, rope: str, norm: bool) -> None:
    """So many that a CUDA thread takes several heads."""
    for real, cache in ((torch.bfloat16, "e4m3"), (torch.float16, "e5m2"), (torch.bfloat16, "e5m2 in uint8"),
                        (torch.float16, "e4m3 in uint8")):  # fmt: skip
        Step(
            tokens=400, num_heads=32, num_kv_heads=8, head_size=128, blocks=(30, 16),
            real=real, cache=cache, query_out=CACHES[cache][1], rope=rope, norm=norm, specials=not norm,
            scales=(32, 8, 8),
        ).check(device)  # fmt: skip


CHANNELS = 0.01 + torch.rand(8, 64, generator=torch.Generator().manual_seed(1))
#: Steps for which CUDA threads take two vectors of several heads, or of one where nothing is shared.
MANY: dict[str, dict[str, Any]] = {
    "2 heads": {"tokens": 700},
    "4 heads": {"tokens": 1400},
    "3 heads": {"tokens": 2300, "num_heads": 9, "num_kv_heads": 3},
    "5 heads": {"tokens": 1400, "num_heads": 25, "num_kv_heads": 1},
    "6 threads a head": {"tokens": 500, "head_size": 96},
    "16 threads a head": {"tokens": 200, "head_size": 256},
    "1 thread a head": {"tokens": 2800, "head_size": 16},
    "partial rotation": {"tokens": 400, "head_size": 128, "rotary_dim": 48},
    "table of the input type": {"tokens": 700, "real": torch.float16, "table": torch.float16},
    "fp32 weights": {"tokens": 700, "weight": torch.float32},
    "real query_out": {"tokens": 700, "query_out": None},
    "E5M2, HND": {"tokens": 700, "cache": "e5m2", "query_out": torch.float8_e5m2, "cache_layout": "HND"},
    "INT8": {"tokens": 700, "cache": "int8", "query_out": None, "cache_layout": "[nb, 2] HND"},
    "three positions": {"tokens": 700, "section": (12, 10, 10)},
    "three positions, interleaved": {"tokens": 700, "section": (12, 10, 10), "interleaved": True},
    "scales that divide": {"tokens": 700, "changes": {"q_scale": torch.tensor([1e-40] + [1.0] * 31),
                                                      "v_scale": torch.tensor([1.0] * 7 + [3e38])}},
    "scales per channel": {"tokens": 1400, "changes": {"k_scale": CHANNELS, "v_scale": CHANNELS.flip(0)}},
    "offsets": {"tokens": 1400, "changes": {"k_offset": CHANNELS - 0.5, "v_offset": CHANNELS.flip(1) - 0.5}},
    "channels of V, INT8": {"tokens": 1400, "cache": "int8", "query_out": None, "cache_layout": "HND",
                            "changes": {"v_scale": CHANNELS, "v_offset": CHANNELS.flip(0) - 0.5}},
    "channels that divide": {"tokens": 1400, "changes": {"k_scale": CHANNELS * torch.tensor([1e-38] + [1.0] * 63)}},
}  # fmt: skip


@pytest.mark.parametrize("norm", ["", "norm", "norm after", "norm of Q", "norm of K"])
@pytest.mark.parametrize(("case", "rope"), [(c, r) for c in MANY for r in ROPE if r != "none" or "section" not in MANY[c]])
def test_many_heads_per_thread(cuda: torch.device, case: str, rope: str, norm: str) -> None:
    """Some positions and slots are wrong, and some slots are -1."""
    step = Step(**{"num_heads": 32, "num_kv_heads": 8, "rope": rope, "specials": not norm, **MANY[case]})
    step.blocks = (step.tokens // 16 + 1, 16)
    step.scales = (step.num_heads, step.num_kv_heads, step.num_kv_heads)
    step.norm, step.norm_after_rope = norm in ("norm", "norm after"), norm == "norm after"
    arguments = step.arguments()
    changes: dict[str, Tensor] = {}
    if norm.startswith("norm of"):
        changes[f"{norm[-1].lower()}_norm_weight"] = torch.linspace(0.5, 2, step.head_size).to(step.weight or step.real)
    changes["slot_mapping"] = arguments["slot_mapping"]
    changes["slot_mapping"][[3, 7, -1]] = torch.tensor([-1, 1 << 40, -1])
    if rope != "none":
        changes["positions"] = arguments["positions"]
        changes["positions"][..., [0, step.tokens // 2]] = torch.tensor([-1, 1 << 40])
    if norm and "k_offset" in step.changes:
        # Far from K: where they nearly cancel, a step of K in 16 bits, which the order of a sum may change, is several
        # steps of the result.
        changes |= {"k_offset": step.changes["k_offset"] + 32, "k_scale": torch.full((8,), 0.25)}
    step.changes = step.changes | changes
    compare = assert_within_one_step if norm else assert_same_bytes
    for actual, expected in zip(step.run(fp8kv, cuda), step.run(reference, cuda), strict=True):
        compare(actual, expected.cpu())


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_scales_nobody_should_have(device: torch.device, which: str) -> None:
    count = len(TRAP_SCALES)
    Step(tokens=5, num_heads=count, num_kv_heads=count, head_size=16, blocks=(1, 16), scales=(count,) * 3,
         changes={f"{which}_scale": TRAP_SCALES}).check(device)  # fmt: skip


def test_equal_to_the_separate_operators(device: torch.device) -> None:
    """RoPE in plain PyTorch, then `quantize` and `reshape_and_cache_flash`."""
    step = Step(scales=(2, 2, 2), specials=False)
    a = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in step.arguments().items()}
    cos, sin = a["cos_sin_cache"][a["positions"]].unsqueeze(1).chunk(2, -1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    q, _ = fp8kv.quantize(rotated(a["query"]).flatten(1), a["q_scale"], group_shape=fp8kv.GroupShape.per_head(4 * 64))
    expected = empty_caches((4, 16, 2, 64), q.dtype, "NHD", device)
    fp8kv.reshape_and_cache_flash(
        rotated(a["key"]), a["value"], *expected[:2], a["slot_mapping"], "fp8", a["k_scale"], a["v_scale"]
    )
    out, key_cache, value_cache = step.run(fp8kv, device)
    assert_same_bytes(out, q.view(-1, 8, 64))
    assert_same_bytes(key_cache, expected[2][0])
    assert_same_bytes(value_cache, expected[2][1])


# Multimodal RoPE, and a norm after RoPE

#: Head size, rotary_dim and the lengths of time, height and width.
SECTIONS = [
    (128, 128, (24, 20, 20)), (64, 64, (8, 12, 12)), (256, 64, (11, 11, 10)), (128, 128, (0, 0, 64)),
    (128, 32, (16, 0, 0)), (20, 20, (4, 3, 3)), (128, 126, (61, 1, 1)), (7, 6, (1, 1, 1)), (2, 2, (0, 1, 0)),
    (96, 96, (5, 40, 3)), (577, 576, (96, 96, 96)),
]  # fmt: skip
each_interleaving = pytest.mark.parametrize("interleaved", [False, True], ids=["contiguous", "interleaved"])
#: Where a norm comes: nowhere, before RoPE, after it.
NORMS: dict[str, dict[str, Any]] = {
    "": {}, "norm": {"norm": True}, "norm after": {"norm": True, "norm_after_rope": True}
}  # fmt: skip
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


@each_norm
@each_interleaving
@pytest.mark.parametrize("rope", ["neox", "interleaved"])
@pytest.mark.parametrize(("head_size", "rotary_dim", "section"), SECTIONS, ids=str)
def test_three_positions(
    device: torch.device,
    head_size: int,
    rotary_dim: int,
    section: tuple[int, int, int],
    rope: str,
    interleaved: bool,
    norm: dict[str, Any],
) -> None:
    for real, table in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        Step(tokens=19, head_size=head_size, rotary_dim=rotary_dim, rope=rope, section=section, interleaved=interleaved,
             real=real, table=table, scales=(8, 2, 2), specials=not norm, **norm).check(device)  # fmt: skip


@each_interleaving
@each_norm
def test_three_positions_of_many_tokens(device: torch.device, interleaved: bool, norm: dict[str, Any]) -> None:
    """So many that a thread takes several heads."""
    for rope in ("neox", "interleaved"):
        Step(tokens=400, num_heads=32, num_kv_heads=8, head_size=128, blocks=(30, 16), rope=rope, section=(24, 20, 20),
             interleaved=interleaved, scales=(32, 8, 8), specials=not norm, **norm).check(device)  # fmt: skip


@each_kind_of_layout
def test_memory_layouts_of_three_positions(device: torch.device, layout: str) -> None:
    for dtype in (torch.int32, torch.int64):
        step = Step(tokens=13, section=(8, 12, 12), layouts={"positions": layout})
        step.changes = {"positions": step.arguments()["positions"].to(dtype)}
        step.check(device)
    expanded = torch.arange(13).expand(3, 13)
    Step(tokens=13, section=(8, 12, 12), layouts={"positions": "as given"}, changes={"positions": expanded}).check(device)


@each_interleaving
def test_three_equal_positions_are_one(device: torch.device, interleaved: bool) -> None:
    one = Step()
    three = Step(section=(16, 8, 8), interleaved=interleaved)
    three.changes = {"positions": one.arguments()["positions"].expand(3, -1).contiguous()}
    for actual, expected in zip(three.run(fp8kv, device), one.run(fp8kv, device), strict=True):
        assert_same_bytes(actual, expected.cpu())


def test_columns_beyond_the_slots_are_not_read(device: torch.device) -> None:
    step = Step(section=(16, 8, 8))
    arguments = step.arguments()
    arguments["positions"][:, 20:] = -1
    step.changes = {"positions": arguments["positions"], "slot_mapping": arguments["slot_mapping"][:20]}
    step.check(device)


@pytest.mark.parametrize("rope", ["none", "neox", "interleaved"])
@pytest.mark.parametrize("cache", ["e4m3", "e5m2", "int8", "bf16"])
def test_norm_after_rope(device: torch.device, cache: str, rope: str) -> None:
    query_out = torch.bfloat16 if cache in ("int8", "bf16") else CACHES[cache][1]
    for head_size, rotary_dim in ((64, 64), (128, 32), (80, 40), (20, 6), (7, 2), (264, 264), (576, 64)):
        Step(tokens=11, cache=cache, query_out=query_out, head_size=head_size, rotary_dim=rotary_dim, rope=rope,
             norm=True, norm_after_rope=True, specials=False).check(device)  # fmt: skip


def test_norm_after_rope_of_channels(device: torch.device) -> None:
    channels = {f"{side}_offset": torch.linspace(-1, 1, 2 * 64).view(2, 64) for side in "kv"}
    Step(cache="int8", query_out=torch.bfloat16, norm=True, norm_after_rope=True, specials=False,
         changes=channels | {"k_scale": 0.01 + torch.rand(2, 64)}).check(device)  # fmt: skip


def test_a_norm_after_rope_is_not_one_before_it(device: torch.device) -> None:
    """Weights of paired elements differ."""
    before, after = (
        Step(norm=True, norm_after_rope=last, specials=False, query_out=None).run(fp8kv, device)[0] for last in (False, True)
    )
    assert float((before != after).float().mean()) > 0.5


def test_every_instruction_set_gives_the_same_bytes() -> None:
    for rope in ("neox", "interleaved"):
        for head_size, section in ((128, (24, 20, 20)), (20, (4, 3, 3)), (64, None)):
            step = Step(tokens=9, rope=rope, head_size=head_size, section=section, norm=True, norm_after_rope=True)
            results = [step.run(fp8kv, CPU) for _ in _ops.each_cpu_isa()]
            for result in results[1:]:
                for actual, expected in zip(result, results[0], strict=True):
                    assert_same_bytes(actual, expected)


# Edges


def test_no_tokens(device: torch.device) -> None:
    for norm in (False, True):
        Step(tokens=0, norm=norm).check(device)


def test_query_is_written_for_tokens_without_a_slot_and_for_a_cache_without_blocks(
    device: torch.device,
) -> None:
    Step(changes={"slot_mapping": torch.full((37,), -1)}).check(device)
    Step(blocks=(0, 16), changes={"slot_mapping": torch.full((37,), -1)}).check(device)


def test_rows_beyond_the_slots_stay(device: torch.device) -> None:
    step = Step()
    step.changes = {"slot_mapping": step.arguments()["slot_mapping"][:20]}
    step.check(device)


def test_one_norm_without_the_other(device: torch.device) -> None:
    for name in ("q_norm_weight", "k_norm_weight"):
        for rope in ROPE:
            step = Step(norm=True, rope=rope, specials=False)
            step.changes = {name: None}  # type: ignore[dict-item]
            step.check(device)


@pytest.mark.parametrize("weight", REAL.values(), ids=REAL.keys())
def test_dtypes_of_norm_weights(device: torch.device, weight: torch.dtype) -> None:
    for real in REAL.values():
        if weight in (torch.float32, real):
            Step(norm=True, real=real, weight=weight, specials=False).check(device)


def test_a_head_of_zeros_stays_zero_under_a_norm(device: torch.device) -> None:
    step = Step(norm=True, changes={"query": torch.zeros(37, 8, 64, dtype=torch.bfloat16)})
    assert not (raw(step.run(fp8kv, device)[0]) & 0x7F).any()


def test_threads_do_not_matter() -> None:
    step = Step(tokens=400, blocks=(40, 16), num_heads=16, num_kv_heads=4, scales=(4, 4, 4))
    expected = step.run(reference, CPU)
    for count in (1, 2, 3):
        with torch_threads(count):
            for actual, wanted in zip(step.run(fp8kv, CPU), expected, strict=True):
                assert_same_bytes(actual, wanted)


def test_every_instruction_set(isa: str) -> None:
    for rope in ROPE:
        for real in REAL.values():
            for head_size in (128, 100, 64, 20, 6):
                for norm in (False, True):
                    Step(tokens=9, rope=rope, real=real, head_size=head_size, rotary_dim=head_size // 4 * 2,
                         norm=norm, specials=not norm).check(CPU)  # fmt: skip


def test_the_last_of_several_tokens_with_one_slot_stays() -> None:
    Step(changes={"slot_mapping": torch.arange(37) % 5}).check(CPU)


# Positions and slots that lead nowhere

BAD_POSITIONS = [-1, 200, 1 << 31, (1 << 32) + 3, -(1 << 40)]


@pytest.mark.parametrize("position", BAD_POSITIONS)
def test_positions_outside_the_table_raise_on_cpu(position: int) -> None:
    step = Step()
    positions = step.arguments()["positions"]
    positions[11] = position
    step.changes = {"positions": positions}
    with pytest.raises(RuntimeError, match=rf"positions must be from 0 to max_position - 1 = 199, .*{position} for token 11"):
        step.run(fp8kv, CPU)


@pytest.mark.parametrize("row", range(3))
def test_each_of_three_positions_must_be_in_the_table(device: torch.device, row: int) -> None:
    """Also one whose section has no frequency."""
    for position in BAD_POSITIONS:
        for head_size, section in ((64, (32, 0, 0)), (20, (0, 5, 5))):
            step = Step(head_size=head_size, section=section)
            positions = step.arguments()["positions"]
            positions[row, 11] = position
            step.changes = {"positions": positions}
            if device.type == "cpu":
                with pytest.raises(RuntimeError, match=rf"max_position - 1 = 199, .*{position} for token 11 in row {row}"):
                    step.run(fp8kv, CPU)
            else:
                for a, e in zip(step.run(fp8kv, device), step.run(reference, device), strict=True):
                    assert_same_bytes(a, e.cpu())


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("head_size", [64, 20])
@pytest.mark.parametrize("position", BAD_POSITIONS)
def test_tokens_with_positions_outside_the_table_are_skipped_on_cuda(
    cuda: torch.device, position: int, head_size: int, norm: bool
) -> None:
    step = Step(head_size=head_size, norm=norm, specials=not norm)
    positions = step.arguments()["positions"]
    positions[[0, 11, 36]] = position
    step.changes = {"positions": positions}
    actual, expected = step.run(fp8kv, cuda), step.run(reference, cuda)
    for a, e in zip(actual, expected, strict=True):
        (assert_within_one_step if norm else assert_same_bytes)(a, e.cpu())
    assert int(raw(actual[0])[11].min()) == 0xA5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_beyond_the_cache(device: torch.device, dtype: torch.dtype) -> None:
    for slot in bad_slots(dtype, 64):
        step = Step()
        slots = step.arguments()["slot_mapping"]
        slots[5] = slot
        step.changes = {"slot_mapping": slots.to(dtype)}
        if device.type == "cpu":
            with pytest.raises(RuntimeError, match=r"slot_mapping must have slots below .* = 64"):
                step.run(fp8kv, device)
        else:
            for a, e in zip(step.run(fp8kv, device), step.run(reference, device), strict=True):
                assert_same_bytes(a, e.cpu())


def test_debugging_raises_on_cuda(cuda: torch.device) -> None:
    """In a process of its own, as it is the environment that asks for it."""
    program = """
import torch, fp8kv
torch.set_default_device("cuda")
q, kv = torch.zeros(2, 4, 16), torch.zeros(2, 2, 16)
caches = torch.zeros(2, 1, 16, 2, 16).to(torch.float8_e4m3fn)
one, slots = torch.ones(1), torch.tensor([0, 1])
try:
    fp8kv.rope_quant_and_cache(q, kv, kv, torch.empty_like(q), *caches, slots, "fp8", one, one, one,
                               torch.tensor([3, 9]), torch.ones(9, 16))
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"FP8KV_DEBUG": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "positions must be from 0 to max_position - 1 = 8, rows of cos_sin_cache, got 9 for token 1" in result.stdout


# Sentences

HEADS = torch.zeros(37, 8, 64, dtype=torch.bfloat16)
LONGS = torch.zeros(37, dtype=torch.int64)
ROWS = "have at least 37"
ROTARY = "cos_sin_cache must have an even rotary_dim from 2 to head_size=64, got shape"
SECTION = "mrope_section must be lengths of at least 0 with the sum rotary_dim / 2 = 32"
SENTENCES: list[tuple[dict[str, Any], str]] = [
    ({"query": HEADS[:, :7]},
     "query must have a number of heads that is a multiple of num_kv_heads=2, got num_heads=7"),
    ({"query": HEADS[:36]},
     f"query must {ROWS} rows, one for each element of slot_mapping, got shape [36, 8, 64]"),
    ({"query": HEADS.float()}, "query must be bfloat16 as key is, got float32"),
    ({"query": HEADS[..., :32]}, "query must have num_heads=8 and head_size=64, got shape [37, 8, 32]"),
    ({"query": HEADS[0]},
     "query must have the shape [num_tokens, num_heads, head_size], got shape [8, 64]"),
    ({"q_scale": torch.ones(4)},
     "q_scale must have 1, num_kv_heads=2 or num_heads=8 elements, got shape [4]"),
    ({"q_scale": torch.ones(1).double()}, "q_scale must be float32, got float64"),
    ({"k_scale": torch.ones(8)}, "k_scale must have 1 or num_kv_heads=2 elements, or the shape "),
    ({"positions": LONGS[:36]},
     f"positions must {ROWS} elements, as slot_mapping has, got shape [36]"),
    ({"positions": torch.zeros(37)}, "positions must be int32 or int64, got float32"),
    ({"positions": LONGS.view(37, 1)}, "positions must have the shape [num_tokens], got shape [37, 1]"),
    ({"positions": None}, "positions must be given with cos_sin_cache, got None"),
    ({"cos_sin_cache": None}, "cos_sin_cache must be given with positions, got None"),
    ({"cos_sin_cache": torch.zeros(9, 63)}, f"{ROTARY} [9, 63]"),
    ({"cos_sin_cache": torch.zeros(9, 66)}, f"{ROTARY} [9, 66]"),
    ({"cos_sin_cache": torch.zeros(9, 0)}, f"{ROTARY} [9, 0]"),
    ({"cos_sin_cache": torch.zeros(9)},
     "cos_sin_cache must have the shape [max_position, rotary_dim], got shape [9]"),
    ({"cos_sin_cache": torch.zeros(9, 64).half()},
     "cos_sin_cache must be float32 or bfloat16 as query is, got float16"),
    ({"q_norm_weight": torch.ones(32)}, "q_norm_weight must have head_size=64 elements, got shape [32]"),
    ({"k_norm_weight": torch.ones(1, 64)},
     "k_norm_weight must have the shape [head_size], got shape [1, 64]"),
    ({"k_norm_weight": torch.ones(64).half()},
     "k_norm_weight must be float32 or bfloat16 as query is, got float16"),
    ({"kv_cache_dtype": "fp8_e5m2"},
     'key_cache must be float8_e5m2 or uint8 as kv_cache_dtype is "fp8_e5m2", got float8_e4m3fn'),
    ({"kv_cache_dtype": "int16"}, "kv_cache_dtype must be"),
    ({"mrope_section": [16, 8, 8]}, "positions must have the shape [3, num_tokens] with mrope_section, got shape [37]"),
    ({"positions": LONGS.expand(3, 37)}, "mrope_section must be given with positions of shape [3, num_tokens], got None"),
    ({"positions": LONGS.expand(4, 37), "mrope_section": [16, 8, 8]},
     "positions must have the shape [3, num_tokens] with mrope_section, got shape [4, 37]"),
    ({"positions": LONGS.expand(37, 37)[:, :3], "mrope_section": [16, 8, 8]},
     "positions must have the shape [3, num_tokens] with mrope_section, got shape [37, 3]"),
    ({"positions": LONGS[:36].expand(3, 36), "mrope_section": [16, 8, 8]},
     f"positions must {ROWS} columns, as slot_mapping has, got shape [3, 36]"),
    ({"positions": LONGS.expand(3, 37).float(), "mrope_section": [16, 8, 8]},
     "positions must be int32 or int64, got float32"),
    ({"positions": LONGS.expand(3, 37), "mrope_section": [16, 16]},
     "mrope_section must have three lengths, of time, height and width, got 2"),
    ({"positions": LONGS.expand(3, 37), "mrope_section": []},
     "mrope_section must have three lengths, of time, height and width, got 0"),
    ({"positions": LONGS.expand(3, 37), "mrope_section": [16, 8, 9]}, f"{SECTION}, got [16, 8, 9]"),
    ({"positions": LONGS.expand(3, 37), "mrope_section": [33, -1, 0]}, f"{SECTION}, got [33, -1, 0]"),
    ({"positions": None, "cos_sin_cache": None, "mrope_section": [16, 8, 8]},
     "mrope_section must be None without positions, got [16, 8, 8]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), SENTENCES, ids=[s[1][:60] for s in SENTENCES])
def test_sentences(device: torch.device, changes: dict[str, Any], sentence: str) -> None:
    step = Step(layouts={})
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in (step.arguments() | changes).items()}
    num_heads = 7 if "num_heads=7" in sentence else 8
    out, _ = empty_view((37, num_heads, 64), torch.float8_e4m3fn, "contiguous", device)
    key_cache, value_cache, buffers = empty_caches((4, 16, 2, 64), torch.float8_e4m3fn, "NHD", device)
    with pytest.raises(RuntimeError) as error:
        fp8kv.rope_quant_and_cache(query_out=out, key_cache=key_cache, value_cache=value_cache, **arguments)
    assert f"fp8kv::rope_quant_and_cache: {sentence}" in str(error.value)
    for untouched in (out, *buffers):
        assert bool((raw(untouched) == 0xA5).all())


@pytest.mark.parametrize(
    ("dtype", "cache", "sentence"),
    [
        (torch.float8_e5m2, "e4m3",
         "query_out must be float8_e4m3fn or uint8 as the caches are, or float32, float16 or bfloat16, "
         "got float8_e5m2"),
        (torch.float8_e4m3fn, "bf16",
         "query_out must be float32, float16 or bfloat16 as the caches are not FP8, got float8_e4m3fn"),
        (torch.int8, "e4m3", "query_out must be float8_e4m3fn or uint8 as the caches are"),
    ],
    ids=["another format", "caches of 16 bits", "an integer"],
)  # fmt: skip
def test_query_out_that_does_not_fit(device: torch.device, dtype: torch.dtype, cache: str, sentence: str) -> None:
    with pytest.raises(RuntimeError) as error:
        Step(query_out=dtype, cache=cache).run(fp8kv, device)
    assert sentence in str(error.value)


def test_overlaps_are_refused(device: torch.device) -> None:
    step = Step(query_out=None)
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in step.arguments().items()}
    key_cache, value_cache, _ = empty_caches((4, 16, 2, 64), torch.float8_e4m3fn, "NHD", device)
    with pytest.raises(RuntimeError, match="query_out must not overlap query"):
        fp8kv.rope_quant_and_cache(query_out=arguments["query"], key_cache=key_cache, value_cache=value_cache, **arguments)
    with pytest.raises(RuntimeError, match="key_cache must not overlap value_cache"):
        fp8kv.rope_quant_and_cache(
            query_out=torch.empty_like(arguments["query"]),
            key_cache=key_cache,
            value_cache=key_cache,
            **arguments,
        )
