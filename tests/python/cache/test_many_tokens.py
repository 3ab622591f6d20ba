"""Problems so large that the CUDA kernels give a thread several tokens, vectors or heads, against the reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import reference
from helpers import QUANTIZED, REAL, TRAP_SCALES, assert_same_bytes, random_bits, random_scales, values

CPU = torch.device("cpu")
NAMES = {"e4m3": "fp8", "e5m2": "fp8_e5m2", "int8": "int8", "bf16": "bfloat16", "fp32": "float32"}
#: Tokens, heads, head size: a number of tokens that nothing divides, and from which on plans change.
GEOMETRIES = [(8195, 8, 128), (8193, 16, 64), (16387, 1, 512), (8197, 2, 520)]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def slots_of(tokens: int, blocks: int) -> Tensor:
    """Distinct; some tokens are skipped."""
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.randperm(blocks * 16, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < 0.1] = -1
    return slots


def hostile_scales(count: int, seed: int) -> Tensor:
    """One in three needs a division, or is no scale at all."""
    scales = random_scales((count,), seed)
    picks = torch.randint(len(TRAP_SCALES), (count,), generator=torch.Generator().manual_seed(seed))
    scales[seed % 3 :: 3] = TRAP_SCALES[picks][seed % 3 :: 3]
    return scales


def caches_of(blocks: int, heads: int, size: int, dtype: torch.dtype, hnd: bool, device: torch.device) -> tuple[Tensor, ...]:
    shape = (2, blocks, heads, 16, size) if hnd else (2, blocks, 16, heads, size)
    caches = torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype, device=device)
    views = caches.view(dtype).unbind()
    return tuple(cache.transpose(1, 2) for cache in views) if hnd else views


@each_geometry
@pytest.mark.parametrize("cache", [*QUANTIZED, "bf16"])
@pytest.mark.parametrize("real", ["bf16", "fp32"])
def test_append(cuda: torch.device, geometry: tuple[int, int, int], cache: str, real: str) -> None:
    tokens, heads, size = geometry
    blocks = -(-tokens // 16) + 3
    dtype = (QUANTIZED | REAL)[cache]
    rows = [values((tokens, heads, size), REAL[real], seed) for seed in range(2)]
    slots = slots_of(tokens, blocks)
    for hnd, count in ((False, heads), (True, heads), (False, 1)):
        scales = [hostile_scales(count, seed) for seed in (1, 2)]
        results = []
        for ops, at in ((fp8kv, cuda), (reference, CPU)):
            caches = caches_of(blocks, heads, size, dtype, hnd, at)
            ops.reshape_and_cache_flash(
                *(x.to(at) for x in rows), *caches, slots.to(at), NAMES[cache], *(x.to(at) for x in scales)
            )
            results.append(caches)
        for actual, expected in zip(*results, strict=True):
            assert_same_bytes(actual, expected)


@pytest.mark.parametrize("cache", QUANTIZED)
@pytest.mark.parametrize("kinds", ["scales", "scales and offsets", "offsets", "of K alone"])
def test_append_with_channels(cuda: torch.device, cache: str, kinds: str) -> None:
    tokens, heads, size = 2051, 4, 128
    blocks = -(-tokens // 16)
    rows = [values((tokens, heads, size), torch.bfloat16, seed) for seed in range(2)]
    channels = [hostile_scales(heads * size, seed).view(heads, size) for seed in (1, 2)]
    offsets: list[Tensor | None] = [values((heads, size), torch.float32, seed) for seed in (3, 4)]
    scales = (
        channels if kinds.startswith("scales") else [channels[0] if kinds == "of K alone" else torch.ones(1), torch.ones(1)]
    )
    given = offsets if "offsets" in kinds else [None, None]
    results = []
    for ops, at in ((fp8kv, cuda), (reference, CPU)):
        caches = caches_of(blocks, heads, size, QUANTIZED[cache], False, at)
        ops.reshape_and_cache_flash(
            *(x.to(at) for x in rows), *caches, slots_of(tokens, blocks).to(at), NAMES[cache], *(x.to(at) for x in scales),
            *(None if x is None else x.to(at) for x in given),
        )  # fmt: skip
        results.append(caches)
    for actual, expected in zip(*results, strict=True):
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("geometry", [(8197, 8, 128), (16389, 4, 128), (16390, 8, 64)], ids=str)
@pytest.mark.parametrize("cache", QUANTIZED)
@pytest.mark.parametrize("real", ["bf16", "fp16"])
def test_dynamic_append(cuda: torch.device, geometry: tuple[int, int, int], cache: str, real: str) -> None:
    tokens, heads, size = geometry
    blocks = -(-tokens // 16) + 3
    rows = [values((tokens, heads, size), REAL[real], seed) for seed in range(2)]
    rows[0][::7] *= 2.0**6  # large scales
    rows[1][::5] = 0
    rows[1][1::5] = float("inf")
    rows[1][2::5, :, ::3] = float("nan")
    rows[1][3::5] = values((1, heads, size), REAL[real], 9, specials=False)
    for hnd in (False, True):
        results = []
        for ops, at in ((fp8kv, cuda), (reference, CPU)):
            caches = caches_of(blocks, heads, size, QUANTIZED[cache], hnd, at)
            scales = torch.zeros(2, blocks, 16, heads, device=at)
            ops.reshape_and_cache_flash_dynamic(
                *(x.to(at) for x in rows), *caches, *scales, slots_of(tokens, blocks).to(at), NAMES[cache]
            )
            results.append((*caches, scales))
        for actual, expected in zip(*results, strict=True):
            assert_same_bytes(actual, expected)


@pytest.mark.parametrize("geometry", [(1027, 8, 128), (1030, 7, 144), (8195, 1, 128), (1500, 3, 360)], ids=str)
@pytest.mark.parametrize("cache", [*QUANTIZED, "bf16", "fp32"])
@pytest.mark.parametrize("real", ["bf16", "fp16", "fp32"])
def test_gather(cuda: torch.device, geometry: tuple[int, int, int], cache: str, real: str) -> None:
    """Every byte, infinite and NaN scales too; sequences of 0, 1 and many tokens, rows that none fills."""
    tokens, heads, size = geometry
    dtype = (QUANTIZED | REAL)[cache]
    lengths = [0, 1, tokens // 3, 0, 2, tokens // 2]
    blocks, max_blocks = 211, -(-(tokens // 2 + 9) // 16)
    generator = torch.Generator().manual_seed(tokens)
    table = torch.randint(blocks, (len(lengths), max_blocks), generator=generator, dtype=torch.int32)
    sums = torch.tensor([0, *lengths]).cumsum(0).int()
    starts = torch.randint(9, (len(lengths),), generator=generator, dtype=torch.int32)
    stored = [random_bits((blocks, 16, heads, size), dtype, torch.Generator().manual_seed(seed)) for seed in range(2)]
    special = torch.tensor([float("inf"), float("nan"), 0.0, -1.0, 3e38, 1e-45])
    per_slot = [random_scales((blocks, 16, heads), seed) for seed in (5, 6)]
    per_slot[0].view(-1)[::11] = special.repeat(-(-per_slot[0].numel() // 66))[: len(per_slot[0].view(-1)[::11])]
    per_head = [random_scales((heads,), seed) for seed in (3, 4)]
    per_head[1][0] = float("inf")
    for scales in (per_head, per_slot, [torch.ones(1), torch.tensor([0.3])]):
        results = []
        for ops, at in ((fp8kv, cuda), (reference, CPU)):
            rows = [torch.full((tokens, heads, size), 7.0, dtype=REAL[real], device=at) for _ in range(2)]
            ops.gather_and_dequant_cache(
                *(x.to(at) for x in stored), *rows, table.to(at), sums.to(at), NAMES[cache], *(x.to(at) for x in scales),
                starts.to(at),
            )  # fmt: skip
            results.append(rows)
        for actual, expected in zip(*results, strict=True):
            assert_same_bytes(actual, expected)


@pytest.mark.parametrize("cache", QUANTIZED)
def test_gather_with_channels(cuda: torch.device, cache: str) -> None:
    tokens, heads, size, blocks = 1029, 8, 128, 70
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).int().view(5, 14)
    sums, starts = torch.tensor([0, 3, 3, 220, 221, 440]).int(), torch.tensor([5, 0, 1, 3, 0]).int()
    stored = [
        random_bits((blocks, 16, heads, size), QUANTIZED[cache], torch.Generator().manual_seed(seed)) for seed in range(2)
    ]
    channels = [random_scales((heads, size), seed) for seed in (1, 2)]
    offsets = [values((heads, size), torch.float32, seed) for seed in (3, 4)]
    kinds = {"channel": channels, "head": [random_scales((heads,), 5)] * 2,
             "slot": [random_scales((blocks, 16, heads), 6)] * 2}  # fmt: skip
    for kind, with_offsets in product(kinds, (False, True)):
        results = []
        for ops, at in ((fp8kv, cuda), (reference, CPU)):
            rows = [torch.full((tokens, heads, size), 7.0, dtype=torch.bfloat16, device=at) for _ in range(2)]
            ops.gather_and_dequant_cache(
                *(x.to(at) for x in stored), *rows, table.to(at), sums.to(at), NAMES[cache], *(x.to(at) for x in kinds[kind]),
                starts.to(at), *((x.to(at) for x in offsets) if with_offsets else ()),
            )  # fmt: skip
            results.append(rows)
        for actual, expected in zip(*results, strict=True):
            assert_same_bytes(actual, expected)
