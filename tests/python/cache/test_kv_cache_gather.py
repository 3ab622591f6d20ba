"""gather_and_dequant_cache against the reference, byte for byte, with all that lies around the rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate, product
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import gather_and_dequant_cache, reference
from helpers import (
    OFFSETS,
    PLAIN_CACHES,
    QUANTIZED_CACHES,
    REAL,
    TRAP_SCALES,
    all_fp8,
    all_patterns,
    assert_same_bytes,
    copy_bits,
    each_cache_layout,
    each_geometry,
    each_kind_of_layout,
    each_large_cache,
    each_layout,
    each_offset,
    each_pair_of_kinds_of_layouts,
    each_quantized_cache,
    each_real,
    empty_caches,
    empty_view,
    from_bits,
    key_and_value,
    neighbors,
    placed,
    random_bits,
    random_scales,
    require_gpu_memory,
    sentinels,
    torch_threads,
)

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")
CACHES = QUANTIZED_CACHES | PLAIN_CACHES
ONE = torch.ones(1)
LENGTHS = (0, 5, 1, 17, 0, 33, 2)
GARBAGE = torch.tensor([-1, (1 << 31) - 1, -(1 << 31), 12345678])


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def sums_of(lengths: Sequence[int]) -> Tensor:
    return int32(0, *accumulate(lengths))


def table_of(lengths: Sequence[int], blocks: tuple[int, int], starts: Sequence[int] | None = None, spare: int = 2) -> Tensor:
    """Random blocks where positions are wanted, and garbage everywhere else."""
    generator = torch.Generator().manual_seed(sum(lengths))
    starts = starts or [0] * len(lengths)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    table = torch.randint(0, max(1, blocks[0]), (len(ends), -(-max(ends, default=0) // blocks[1]) + spare),
                          generator=generator)  # fmt: skip
    position = torch.arange(table.shape[1]) * blocks[1]
    first = torch.tensor(starts, dtype=torch.int64)[:, None] // blocks[1] * blocks[1]
    unused = (position < first) | (position >= torch.tensor(ends, dtype=torch.int64)[:, None])
    garbage = GARBAGE[torch.randint(0, len(GARBAGE), table.shape, generator=generator)]
    return torch.where(unused, garbage, table).to(torch.int32)


def check(
    device: torch.device,
    contents: tuple[Tensor, Tensor],
    table: Tensor,
    sums: Tensor,
    name: str = "fp8",
    real: torch.dtype = torch.bfloat16,
    scales: tuple[Tensor, Tensor] = (ONE, ONE),
    starts: Sequence[int] | None = None,
    spare_rows: int = 3,
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    cache_layout: str = "NHD",
    scale_layout: str = "contiguous",
) -> None:
    """Compares on `device`: key and value, and every byte of what they lie in."""

    def run(ops: ModuleType, at: torch.device) -> list[Tensor]:
        shape = contents[0].shape
        key_cache, value_cache, _ = empty_caches(shape, contents[0].dtype, cache_layout, at)
        copy_bits(key_cache, contents[0])
        copy_bits(value_cache, contents[1])
        outputs = [empty_view((int(sums[-1]) + spare_rows, *shape[2:]), real, layout, at) for layout in layouts]
        ops.gather_and_dequant_cache(
            key_cache, value_cache, outputs[0][0], outputs[1][0], table.to(at), sums.to(at), name,
            placed(scales[0], scale_layout, at), placed(scales[1], scale_layout, at),
            None if starts is None else int32(*starts).to(at),
        )  # fmt: skip
        return [buffer for _, buffer in outputs]

    for actual, expected in zip(run(fp8kv, device), run(reference, CPU), strict=True):
        assert_same_bytes(actual, expected)


def any_contents(blocks: tuple[int, int], num_heads: int, head_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V caches of any bits."""
    key, value = random_bits((2, *blocks, num_heads, head_size), dtype)
    return key, value


def all_scales(blocks: tuple[int, int], num_heads: int) -> list[tuple[Tensor, Tensor]]:
    """Per tensor, per head, and per token and head."""
    shapes = [(1,), (num_heads,), (*blocks, num_heads)]
    return [(random_scales(shape), random_scales(shape, seed=2)) for shape in shapes]


# Geometries and types


@each_real
@each_geometry
def test_every_geometry(device: torch.device, geometry: tuple[int, int, int], real: torch.dtype) -> None:
    blocks = (5, geometry[0])
    table, sums = table_of(LENGTHS, blocks), sums_of(LENGTHS)
    for name, dtype, _ in QUANTIZED_CACHES.values():
        contents = any_contents(blocks, *geometry[1:], dtype)
        for scales in all_scales(blocks, geometry[1]):
            check(device, contents, table, sums, name, real, scales)


@each_geometry
def test_every_geometry_for_each_instruction_set(isa: str, geometry: tuple[int, int, int]) -> None:
    blocks = (3, geometry[0])
    table, sums = table_of(LENGTHS[:5], blocks), sums_of(LENGTHS[:5])
    for cache in ("e4m3", "e5m2", "int8", "bf16"):
        name, dtype, _ = CACHES[cache]
        contents = any_contents(blocks, *geometry[1:], dtype)
        for real in REAL.values():
            for scales in all_scales(blocks, geometry[1]):
                check(CPU, contents, table, sums, name, real, scales, cache_layout="[nb, 2] HND")


@pytest.mark.parametrize("cache_layout", ["[nb, 2] NHD", "[nb, 2] HND"])
@pytest.mark.parametrize("lengths", [[1], [1] * 16, [1000, 17, 3079]], ids=["1", "16 times 1", "4096"])
def test_sizes_of_models(device: torch.device, lengths: list[int], cache_layout: str) -> None:
    contents = any_contents((300, 16), 8, 128, E4M3)
    for scales in all_scales((300, 16), 8):
        check(
            device, contents, table_of(lengths, (300, 16)), sums_of(lengths), scales=scales,
            cache_layout=cache_layout,
        )  # fmt: skip


@pytest.mark.parametrize("cache", PLAIN_CACHES)
@each_real
def test_plain_copies(device: torch.device, real: torch.dtype, cache: str) -> None:
    """Of any bits: NaN with payloads stay as they are where the type does, and scales do not matter."""
    name, dtype, _ = PLAIN_CACHES[cache]
    for geometry in ((16, 2, 64), (16, 8, 3), (1, 1, 1), (4, 3, 40)):
        blocks = (5, geometry[0])
        contents = any_contents(blocks, *geometry[1:], dtype)
        scales = (torch.tensor([0.0]), torch.full((*blocks, geometry[1]), torch.nan))
        for cache_layout in ("NHD", "HND", "steps", "offset 3"):
            check(
                device, contents, table_of(LENGTHS, blocks), sums_of(LENGTHS), name, real, scales,
                cache_layout=cache_layout,
            )  # fmt: skip


def everything(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Table and sums of one sequence that is the whole cache."""
    return torch.arange(len(cache), dtype=torch.int32)[None], sums_of([len(cache) * cache.shape[1]])


@each_real
@pytest.mark.parametrize("cache", ["fp16", "bf16"])
def test_plain_copies_of_every_16_bit_value(device: torch.device, cache: str, real: torch.dtype) -> None:
    x = all_patterns(REAL[cache]).view(32, 16, 1, 128)
    check(device, (x, x.flip(0)), *everything(x), "auto", real)


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_plain_copies_round_to_nearest_even(device: torch.device, real: torch.dtype) -> None:
    """fp32 values at and beside all ties between values of the result."""
    exact = all_patterns(real).float()
    exact = exact[exact.isfinite() & (exact >= 0)].sort().values
    ties = (exact[1:].double() + exact[:-1].double()) / 2
    x = torch.cat([neighbors(ties.float(), 1).view(-1, 1, 1, 3), torch.full((1, 1, 1, 3), 3.4e38)])
    check(device, (x, -x), *everything(x), "float32", real)


# Values and scales that trap shortcuts

#: Products that overflow, that become subnormal in each output type, and that lie on ties of its rounding.
SCALES = torch.cat(
    [
        TRAP_SCALES,
        torch.exp2(torch.arange(-149.0, 128.0)),
        from_bits([0x3F808000, 0x3F808001, 0x3F818000, 0x3F801000, 0x3F803000, 0x3F801001, 0x42DA0000]),
        torch.tensor([65520.0 / 448, 3.4e38 / 448, 1.17e-38, 6.1e-5, 5.96e-8, 2.98e-8]),
    ]
)


@each_quantized_cache
@each_real
@pytest.mark.parametrize("scales", ["head", "slot"])
def test_every_byte_with_trap_scales(device: torch.device, scales: str, real: torch.dtype, cache: str) -> None:
    name, dtype, _ = QUANTIZED_CACHES[cache]
    if scales == "head":
        q = all_fp8(dtype).expand(1, 1, len(SCALES), -1)
        check(device, (q, q), *everything(q), name, real, (SCALES, SCALES.flip(0)))
    else:
        q = all_fp8(dtype).expand(len(SCALES), 1, 1, -1)
        per_slot = SCALES.view(-1, 1, 1)
        check(device, (q, q), *everything(q), name, real, (per_slot, per_slot.flip(0)))


@each_quantized_cache
@each_real
def test_every_byte_with_trap_scales_per_tensor(device: torch.device, real: torch.dtype, cache: str) -> None:
    name, dtype, _ = QUANTIZED_CACHES[cache]
    q = all_fp8(dtype).view(2, 2, 1, 64)
    for scale in TRAP_SCALES.split(1):
        check(device, (q, q.flip(0)), *everything(q), name, real, (scale, torch.tensor(0.3)))


@each_real
def test_trap_scales_for_each_instruction_set(isa: str, real: torch.dtype) -> None:
    for cache in ("e4m3", "e5m2", "int8"):
        name, dtype, _ = QUANTIZED_CACHES[cache]
        q = all_fp8(dtype).expand(1, 1, len(SCALES), -1)
        check(CPU, (q, q), *everything(q), name, real, (SCALES, SCALES))


# Memory


@each_kind_of_layout
@pytest.mark.parametrize("sides", ["key", "value", "both"])
def test_layouts_of_key_and_value(device: torch.device, sides: str, layout: str) -> None:
    layouts = tuple(layout if sides in (side, "both") else "contiguous" for side in ("key", "value"))
    for geometry, real in (((16, 2, 64), torch.bfloat16), ((8, 3, 37), torch.float32)):
        blocks = (5, geometry[0])
        contents = any_contents(blocks, *geometry[1:], E4M3)
        for scales in all_scales(blocks, geometry[1]):
            check(
                device, contents, table_of(LENGTHS, blocks), sums_of(LENGTHS), "fp8", real, scales,
                layouts=layouts,
            )  # fmt: skip


@each_cache_layout
def test_layouts_of_caches(device: torch.device, cache_layout: str) -> None:
    for geometry, real in (
        ((16, 2, 64), torch.bfloat16),
        ((8, 3, 37), torch.float32),
        ((4, 8, 1), torch.float16),
    ):
        blocks = (5, geometry[0])
        for cache in ("e4m3", "e5m2 in uint8", "fp16"):
            name, dtype, _ = CACHES[cache]
            contents = any_contents(blocks, *geometry[1:], dtype)
            for scales in all_scales(blocks, geometry[1]):
                check(
                    device, contents, table_of(LENGTHS, blocks), sums_of(LENGTHS), name, real, scales,
                    cache_layout=cache_layout,
                )  # fmt: skip


@each_pair_of_kinds_of_layouts
def test_pairs_of_layouts(device: torch.device, layout: str, cache_layout: str) -> None:
    contents = any_contents((5, 4), 2, 40, E4M3)
    check(
        device, contents, table_of([3, 6], (5, 4)), sums_of([3, 6]), scales=(random_scales((2,)), ONE),
        layouts=(layout, "columns"), cache_layout=cache_layout,
    )  # fmt: skip


@each_offset
def test_misaligned_by_every_number_of_elements(device: torch.device, offset: str) -> None:
    """Key and value, and the caches, each by any number."""
    for real, cache_offset, cache in product(REAL.values(), OFFSETS, ("e4m3", "fp16")):
        name, dtype, _ = CACHES[cache]
        contents = any_contents((5, 4), 2, 40, dtype)
        check(
            device, contents, table_of([3, 6], (5, 4)), sums_of([3, 6]), name, real,
            (random_scales((2,)), ONE), layouts=(offset, offset), cache_layout=cache_offset,
        )  # fmt: skip


@each_layout
def test_layouts_of_scale_caches(device: torch.device, layout: str) -> None:
    blocks = (5, 8)
    check(
        device, any_contents(blocks, 3, 37, E4M3), table_of(LENGTHS, blocks), sums_of(LENGTHS),
        scales=all_scales(blocks, 3)[2], scale_layout=layout,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("k", "v"),
    [
        (torch.tensor(0.3), random_scales((8,))),
        (random_scales((8, 1, 1)), random_scales((5, 4, 8))),
        (random_scales((5, 4, 8)), torch.tensor([[0.7]])),
        (random_scales((1, 8)), random_scales((2, 4))),
    ],
    ids=["tensor and head", "head and slot", "slot and tensor", "other shapes"],
)
def test_scales_of_k_and_v_are_independent(device: torch.device, k: Tensor, v: Tensor) -> None:
    check(device, any_contents((5, 4), 8, 24, E4M3), table_of(LENGTHS, (5, 4)), sums_of(LENGTHS), scales=(k, v))


def test_key_and_value_are_slices_of_one_buffer(device: torch.device) -> None:
    contents = any_contents((5, 4), 2, 24, E4M3)
    table, sums = table_of(LENGTHS, (5, 4)), sums_of(LENGTHS)

    def run(ops: ModuleType, at: torch.device) -> Tensor:
        buffer = sentinels((60, 2, 3, 24), torch.float16, at)
        ops.gather_and_dequant_cache(
            contents[0].to(at), contents[1].to(at), buffer[:, :, 0], buffer[:, :, 2], table.to(at),
            sums.to(at), "fp8", ONE.to(at), ONE.to(at),
        )  # fmt: skip
        return buffer

    assert_same_bytes(run(fp8kv, device), run(reference, CPU))


@pytest.mark.parametrize("layout", ["columns", "steps", "rows", "transposed", "inside", "offset 1"])
def test_layouts_of_index_tensors(device: torch.device, layout: str) -> None:
    blocks, starts = (5, 4), [3, 0, 9, 1, 0, 2, 5]
    contents = any_contents(blocks, 2, 24, E4M3)
    table, sums = table_of(LENGTHS, blocks, starts), sums_of(LENGTHS)

    def run(ops: ModuleType, at: torch.device, layout: str) -> list[Tensor]:
        outputs = [sentinels((60, 2, 24), torch.bfloat16, at) for _ in "kv"]
        one = ONE.to(at)
        ops.gather_and_dequant_cache(
            contents[0].to(at), contents[1].to(at), *outputs, placed(table, layout, at),
            placed(sums, layout, at), "fp8", one, one, placed(int32(*starts), layout, at),
        )  # fmt: skip
        return outputs

    for actual, expected in zip(run(fp8kv, device, layout), run(reference, CPU, "contiguous"), strict=True):
        assert_same_bytes(actual, expected)


def test_what_is_read_stays(device: torch.device) -> None:
    key_cache, value_cache = (x.to(device) for x in any_contents((5, 4), 2, 24, E4M3))
    read = [
        key_cache, value_cache, table_of(LENGTHS, (5, 4)).to(device), sums_of(LENGTHS).to(device),
        random_scales((2,)).to(device), random_scales((5, 4, 2)).to(device), int32(*[0] * 7).to(device),
    ]  # fmt: skip
    before = [x.clone() for x in read]
    outputs = [torch.empty(58, 2, 24, device=device) for _ in "kv"]
    gather_and_dequant_cache(*read[:2], *outputs, *read[2:4], "fp8", *read[4:])
    for x, copy in zip(read, before, strict=True):
        assert_same_bytes(x, copy)


# Sequences


@pytest.mark.parametrize("block_size", [1, 16, 7])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 300, 1100])
@pytest.mark.parametrize("geometry", [(2, 24), (1, 8)], ids=str)
def test_numbers_of_sequences(device: torch.device, geometry: tuple[int, int], count: int, block_size: int) -> None:
    """Of few tokens each, with stretches of empty ones; a warp has the tokens of many of them."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(0, 6, (count,), generator=generator)
    lengths[count // 3 : count // 2] = 0
    lengths[0] = 3
    blocks = (40, block_size)
    check(
        device, any_contents(blocks, *geometry, E4M3), table_of(lengths.tolist(), blocks),
        sums_of(lengths.tolist()), scales=all_scales(blocks, geometry[0])[2],
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [[], [0], [0] * 40, [0, 0, 3], [3, 0, 0], [1], [64]], ids=str)
@pytest.mark.parametrize("spare", [0, 2], ids=["exact table", "wider table"])
def test_lengths(device: torch.device, lengths: list[int], spare: int) -> None:
    contents = any_contents((5, 16), 2, 24, E4M3)
    for spare_rows in (0, 5):
        check(
            device, contents, table_of(lengths, (5, 16), spare=spare), sums_of(lengths),
            spare_rows=spare_rows,
        )  # fmt: skip


@pytest.mark.parametrize("block_size", [1, 16, 7])
def test_seq_starts(device: torch.device, block_size: int) -> None:
    """Anywhere in a block; blocks before the first position are never looked at."""
    lengths, starts = [5, 0, 16, 1, 33, 40, 2], [3, 999, 16, 15, 7, 0, 100]
    blocks = (9, block_size)
    for name, dtype, _ in CACHES.values():
        for scales in all_scales(blocks, 2):
            check(
                device, any_contents(blocks, 2, 24, dtype), table_of(lengths, blocks, starts),
                sums_of(lengths), name, scales=scales, starts=starts,
            )  # fmt: skip


def test_where_an_empty_sequence_starts_does_not_matter(device: torch.device) -> None:
    check(
        device, any_contents((5, 4), 2, 24, E4M3), table_of([0, 3, 0], (5, 4)), sums_of([0, 3, 0]),
        starts=[-5, 0, (1 << 31) - 1],
    )  # fmt: skip


# Indices that lead nowhere

TABLE = [[1, 0, 4], [2, 3, 0]]
#: block_table, cu_seq_lens, seq_starts, the sentence, and the rows that are written on CUDA; of a cache of 5
#: blocks of 4 tokens and 10 rows of key and value.
BAD_INDICES: dict[str, tuple[list[list[int]], list[int], list[int] | None, str, list[int]]] = {
    "no block": (
        [[1, -1, 4], [2, 3, 0]], [0, 6, 10], None,
        "block_table must have blocks from 0 to num_blocks - 1 = 4, got -1 at 1 in sequence 0",
        [0, 1, 2, 3, 6, 7, 8, 9],
    ),
    "a block beyond": (
        [[1, 0, 4], [5, 3, 0]], [0, 6, 10], None,
        "block_table must have blocks from 0 to num_blocks - 1 = 4, got 5 at 0 in sequence 1",
        [0, 1, 2, 3, 4, 5],
    ),
    "a block far beyond": (
        [[1, 0, 4], [2, (1 << 31) - 1, 0]], [0, 4, 10], None,
        "block_table must have blocks from 0 to num_blocks - 1 = 4, got 2147483647 at 1 in sequence 1",
        [0, 1, 2, 3, 4, 5, 6, 7],
    ),
    "a block far below": (
        [[-(1 << 31), 0, 4], [2, 3, 0]], [0, 2, 10], None,
        "block_table must have blocks from 0 to num_blocks - 1 = 4, got -2147483648 at 0 in sequence 0",
        [2, 3, 4, 5, 6, 7, 8, 9],
    ),
    "a table that is too short": (
        [[1], [2]], [0, 6, 10], None,
        "block_table must have blocks for all positions, max_blocks * block_size = 4, "
        "got a last position of 5 in sequence 0",
        [0, 1, 2, 3, 6, 7, 8, 9],
    ),
    "a table without blocks": (
        [[], []], [0, 6, 10], None,
        "block_table must have blocks for all positions, max_blocks * block_size = 0, "
        "got a last position of 5 in sequence 0",
        [],
    ),
    "a start beyond": (
        TABLE, [0, 6, 10], [0, 10],
        "block_table must have blocks for all positions, max_blocks * block_size = 12, "
        "got a last position of 13 in sequence 1",
        [0, 1, 2, 3, 4, 5, 6, 7],
    ),
    "a start far beyond": (
        TABLE, [0, 6, 10], [0, (1 << 31) - 1],
        "block_table must have blocks for all positions, max_blocks * block_size = 12, "
        "got a last position of 2147483650 in sequence 1",
        [0, 1, 2, 3, 4, 5],
    ),
    "a negative start": (
        TABLE, [0, 6, 10], [-(1 << 31), 0], "seq_starts must be at least 0, got -2147483648 in sequence 0",
        [6, 7, 8, 9],
    ),
    "a start just below 0": (
        TABLE, [0, 6, 10], [-2, 0], "seq_starts must be at least 0, got -2 in sequence 0", [6, 7, 8, 9],
    ),
    "more rows than there are": (
        TABLE, [0, 6, 12], None, "key must have at least cu_seq_lens[-1]=12 rows, got shape [10, 2, 24]",
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ),
    "many more rows": (
        TABLE, [0, 6, (1 << 31) - 1], None,
        "key must have at least cu_seq_lens[-1]=2147483647 rows, got shape [10, 2, 24]",
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ),
    "not from 0": (
        TABLE, [2, 6, 10], None, "cu_seq_lens must begin with 0, got 2", [2, 3, 4, 5, 6, 7, 8, 9],
    ),
}  # fmt: skip


def check_rows(device: torch.device, case: str, cache: str, count: int) -> None:
    """With the first `count` sequences of a case: on the CPU the op raises, on CUDA these rows are written."""
    blocks, sums, starts, sentence, rows = BAD_INDICES[case]
    blocks, sums, starts = blocks[:count], sums[: count + 1], starts[:count] if starts else None
    name, dtype, _ = CACHES[cache]
    contents = any_contents((5, 4), 2, 24, dtype)
    table = torch.tensor(blocks, dtype=torch.int32)
    outputs = [empty_view((10, 2, 24), torch.bfloat16, "inside", device) for _ in "kv"]

    def run() -> None:
        gather_and_dequant_cache(
            contents[0].to(device), contents[1].to(device), outputs[0][0], outputs[1][0], table.to(device),
            int32(*sums).to(device), name, ONE.to(device), ONE.to(device),
            None if starts is None else int32(*starts).to(device),
        )  # fmt: skip

    if device.type == "cpu":
        with pytest.raises(RuntimeError) as error:
            run()
        assert str(error.value) == f"fp8kv::gather_and_dequant_cache: {sentence}"
        rows = []
    else:
        run()
    for (_, buffer), content in zip(outputs, contents, strict=True):
        expected, expected_buffer = empty_view((10, 2, 24), torch.bfloat16, "inside", CPU)
        for row in rows:
            if row >= sums[-1]:
                continue
            s = 0 if row < sums[1] else 1
            position = row - sums[s] + (starts[s] if starts else 0)
            x = content[table[s, position // 4], position % 4]
            expected[row] = reference.dequantize(x, ONE) if cache == "e4m3" else x
        assert_same_bytes(buffer, expected_buffer)


@pytest.mark.parametrize("cache", ["e4m3", "bf16"])
@pytest.mark.parametrize("case", BAD_INDICES)
def test_indices_that_lead_nowhere(device: torch.device, case: str, cache: str) -> None:
    """On the CPU the op raises and writes nothing; on CUDA such rows are skipped."""
    check_rows(device, case, cache, 2)


@pytest.mark.parametrize("cache", ["e4m3", "bf16"])
@pytest.mark.parametrize("case", BAD_INDICES)
def test_indices_of_one_sequence_that_lead_nowhere(cuda: torch.device, case: str, cache: str) -> None:
    """The first sequence of each case without the second."""
    check_rows(cuda, case, cache, 1)


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_one_sequence(device: torch.device, length: int, start: int) -> None:
    """From any position on, in results with more rows than it has tokens."""
    for heads, size in ((1, 8), (2, 24), (8, 128)):
        blocks = (9, 4)
        check(
            device, any_contents(blocks, heads, size, E4M3), table_of([length], blocks, [start]), sums_of([length]),
            scales=all_scales(blocks, heads)[1], starts=[start], spare_rows=40,
        )  # fmt: skip


@pytest.mark.parametrize("sums", [[0, 6, 4, 9], [0, -3, 2, 9], [0, 9, 0, 3]], ids=str)
def test_sums_that_fall(device: torch.device, sums: list[int]) -> None:
    """On CUDA some rows come from somewhere in the cache; nothing is written outside."""
    contents = [x.to(device) for x in any_contents((5, 4), 2, 24, E4M3)]
    outputs = [empty_view((10, 2, 24), torch.bfloat16, "inside", device) for _ in "kv"]
    table = torch.zeros(3, 3, dtype=torch.int32, device=device)
    one = ONE.to(device)

    def run() -> None:
        gather_and_dequant_cache(*contents, outputs[0][0], outputs[1][0], table, int32(*sums).to(device), "fp8", one, one)

    if device.type == "cpu":
        with pytest.raises(RuntimeError) as error:
            run()
        fall = next(i for i in range(3) if sums[i + 1] < sums[i])
        assert str(error.value) == (
            f"fp8kv::gather_and_dequant_cache: cu_seq_lens must be non-decreasing, got {sums[fall + 1]} after {sums[fall]}"
        )
    else:
        run()
        for view, _ in outputs:
            copy_bits(view, sentinels(view.shape, view.dtype, CPU))
    for _, buffer in outputs:
        assert_same_bytes(buffer, sentinels(buffer.shape, buffer.dtype, CPU))


def test_debug_mode_raises_on_cuda_before_anything_is_written(cuda: torch.device) -> None:
    code = """
import torch, fp8kv
cache = torch.ones(5, 4, 2, 8, device="cuda").to(torch.float8_e4m3fn)
key, value = torch.zeros(2, 10, 2, 8, device="cuda")
one = torch.ones(1, device="cuda")
def attempt(table, sums, starts=None):
    table, sums = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (table, sums))
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32, device="cuda")
    try:
        fp8kv.gather_and_dequant_cache(cache, cache, key, value, table, sums, "fp8", one, one, starts)
    except RuntimeError as error:
        print(str(error).split(": ", 1)[1])
attempt([[0, 5]], [0, 6])
attempt([[0]], [0, 6])
attempt([[0, 1]], [0, 12])
attempt([[0, 1]], [1, 6])
attempt([[0, 1]], [0, 6], [-1])
assert not key.any() and not value.any()
attempt([[0, 1]], [0, 6])
assert key[:6].all() and value[:6].all()
"""
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"FP8KV_DEBUG": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "block_table must have blocks from 0 to num_blocks - 1 = 4, got 5 at 1 in sequence 0",
        "block_table must have blocks for all positions, max_blocks * block_size = 4, got a last position of 5 in sequence 0",
        "key must have at least cu_seq_lens[-1]=12 rows, got shape [10, 2, 8]",
        "cu_seq_lens must begin with 0, got 1",
        "seq_starts must be at least 0, got -1 in sequence 0",
    ]


# Sizes


@pytest.mark.parametrize(
    ("lengths", "blocks", "num_heads", "head_size"),
    [
        ([3, 2], (3, 4), 0, 24), ([3, 2], (3, 4), 2, 0), ([0, 0], (0, 4), 2, 24), ([0, 0], (3, 1), 2, 24),
        ([], (3, 4), 2, 24), ([], (0, 1), 0, 0),
    ],
)  # fmt: skip
def test_empty(device: torch.device, lengths: list[int], blocks: tuple[int, int], num_heads: int, head_size: int) -> None:
    for cache in ("e4m3", "bf16"):
        name, dtype, _ = CACHES[cache]
        contents = any_contents(blocks, num_heads, head_size, dtype)
        for scales in all_scales(blocks, num_heads):
            check(device, contents, table_of(lengths, blocks), sums_of(lengths), name, scales=scales)


def test_blocks_without_slots(device: torch.device) -> None:
    empty = torch.empty(3, 0, 2, 24).to(E4M3)
    check(device, (empty, empty), torch.zeros(2, 5, dtype=torch.int32), sums_of([0, 0]))


@each_real
def test_a_long_head(device: torch.device, real: torch.dtype) -> None:
    for num_heads, head_size in ((1, 20_000), (2, 5137)):
        contents = any_contents((2, 2), num_heads, head_size, E4M3)
        for scales in all_scales((2, 2), num_heads):
            check(device, contents, table_of([3], (2, 2)), sums_of([3]), "fp8", real, scales)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_number_of_threads_does_not_show(threads: int) -> None:
    lengths = [3000, 0, 1, 7, 999]
    contents = any_contents((40, 16), 3, 37, E4M3)
    with torch_threads(threads):
        for scales in all_scales((40, 16), 3):
            check(CPU, contents, table_of(lengths, (40, 16)), sums_of(lengths), scales=scales)


@pytest.mark.large
@each_large_cache
def test_the_far_end_of_a_large_cache(cuda: torch.device, blocks: tuple[int, int], num_heads: int, head_size: int) -> None:
    require_gpu_memory(cuda, 40)
    caches = torch.zeros(2, *blocks, num_heads, head_size, dtype=torch.uint8, device=cuda)
    scales = torch.ones(2, *blocks, num_heads, device=cuda)
    tail = random_bits((2, 2, blocks[1], num_heads, head_size), E4M3)
    tail_scales = random_scales((2, 2, blocks[1], num_heads))
    caches[:, -2:] = tail.view(torch.uint8).to(cuda)
    scales[:, -2:] = tail_scales.to(cuda)
    table, sums = int32(1, 0)[None], sums_of([2 * blocks[1] - 5])
    expected = torch.empty(2, int(sums[-1]), num_heads, head_size, dtype=torch.bfloat16)
    reference.gather_and_dequant_cache(*tail, *expected, table, sums, "fp8", *tail_scales)
    actual = torch.empty_like(expected, device=cuda)
    gather_and_dequant_cache(*caches, *actual, (table + blocks[0] - 2).to(cuda), sums.to(cuda), "fp8", *scales)
    assert_same_bytes(actual, expected)


@pytest.mark.large
def test_more_than_2_to_the_31_elements_of_key_and_value(cuda: torch.device) -> None:
    require_gpu_memory(cuda, 24)
    rows = (1 << 21) + 100
    contents = any_contents((300, 16), 8, 128, E4M3)
    table = table_of([rows], (300, 16))
    outputs = [torch.empty(rows, 8, 128, dtype=torch.bfloat16, device=cuda) for _ in "kv"]
    one = ONE.to(cuda)
    gather_and_dequant_cache(
        contents[0].to(cuda), contents[1].to(cuda), *outputs, table.to(cuda), sums_of([rows]).to(cuda),
        "fp8", one, one,
    )  # fmt: skip
    tail = [torch.empty(200, 8, 128, dtype=torch.bfloat16) for _ in "kv"]
    reference.gather_and_dequant_cache(*contents, *tail, table, sums_of([200]), "fp8", ONE, ONE, int32(rows - 200))
    for x, expected in zip(outputs, tail, strict=True):
        assert_same_bytes(x[-200:], expected)


@pytest.mark.large
@pytest.mark.parametrize("which", ["caches", "table rows", "table columns", "sums", "starts"])
def test_strides_of_more_than_32_bits(cuda: torch.device, which: str) -> None:
    """Counted in bytes."""
    require_gpu_memory(cuda, 24)
    contents = any_contents((2, 16), 4, 64, E4M3)
    scales = [random_scales((4,), seed) for seed in (1, 2)]
    table, sums, starts = int32(1, 0, 0, 1).view(2, 2), sums_of([20, 7]), int32(3, 9)
    expected = torch.empty(2, 27, 4, 64, dtype=torch.bfloat16)
    reference.gather_and_dequant_cache(*contents, *expected, table, sums, "fp8", *scales, starts)

    def spread(x: Tensor, name: str, dim: int = 0) -> Tensor:
        strides = list(x.stride())
        if name == which:
            strides[dim] = (1 << 32) // x.element_size() + 64
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
        return torch.empty(size, dtype=x.dtype, device=cuda).as_strided(x.shape, strides).copy_(x)

    actual = torch.empty_like(expected, device=cuda)
    gather_and_dequant_cache(
        *(spread(x, "caches") for x in contents), *actual,
        spread(table, which, ["table rows", "table columns"].index(which)) if "table" in which else table.to(cuda),
        spread(sums, "sums"), "fp8", *(x.to(cuda) for x in scales), spread(starts, "starts"),
    )  # fmt: skip
    assert_same_bytes(actual, expected)


# Round trips


@each_real
@each_geometry
def test_what_was_stored_comes_back(device: torch.device, geometry: tuple[int, int, int], real: torch.dtype) -> None:
    """As dequantize(quantize(x)) of each token, whichever way the scales are made."""
    block_size, num_heads, head_size = geometry
    tokens = 37
    blocks = -(-60 // block_size)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    slots = order[torch.arange(tokens) // block_size] * block_size + torch.arange(tokens) % block_size
    table, sums = order.to(torch.int32)[None].to(device), sums_of([tokens]).to(device)
    inputs = key_and_value(tokens, num_heads, head_size, real)
    on_device = [x.to(device) for x in inputs]
    outputs = [torch.empty_like(x) for x in on_device]

    for name, dtype, element in QUANTIZED_CACHES.values():
        caches = empty_caches((blocks, block_size, num_heads, head_size), dtype, "[nb, 2] HND", device)[:2]
        for count in {1, num_heads}:
            scales = [random_scales((count,), seed) for seed in (1, 2)]
            at = [scale.to(device) for scale in scales]
            fp8kv.reshape_and_cache_flash(*on_device, *caches, slots.to(device), name, *at)
            gather_and_dequant_cache(*caches, *outputs, table, sums, name, *at)
            for x, scale, actual in zip(inputs, scales, outputs, strict=True):
                q, blocked = reference.quantize(x, scale.view(1, -1, 1), dtype=element)
                assert_same_bytes(actual, reference.dequantize(q, blocked, dtype=real))

        scale_caches = torch.full((2, blocks, block_size, num_heads), math.nan, device=device)
        fp8kv.reshape_and_cache_flash_dynamic(*on_device, *caches, *scale_caches, slots.to(device), name)
        gather_and_dequant_cache(*caches, *outputs, table, sums, name, *scale_caches)
        for x, actual in zip(inputs, outputs, strict=True):
            q, per_token_and_head = reference.quantize(x, group_shape=(1, -1), dtype=element)
            expected = reference.dequantize(q, per_token_and_head, group_shape=(1, -1), dtype=real)
            assert_same_bytes(actual, expected)


@each_real
def test_what_was_copied_comes_back_bit_for_bit(device: torch.device, real: torch.dtype) -> None:
    key, value = random_bits((2, 40, 3, 24), real).to(device)
    slots = torch.arange(40, device=device)
    caches = empty_caches((4, 16, 3, 24), real, "HND", device)[:2]
    one = ONE.to(device)
    fp8kv.reshape_and_cache_flash(key, value, *caches, slots, "auto", one, one)
    outputs = [torch.empty_like(key) for _ in "kv"]
    table = torch.arange(4, dtype=torch.int32, device=device)[None]
    gather_and_dequant_cache(*caches, *outputs, table, sums_of([40]).to(device), "auto", one, one)
    assert_same_bytes(outputs[0], key)
    assert_same_bytes(outputs[1], value)
