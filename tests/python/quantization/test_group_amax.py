"""group_amax against the reference, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fp8kv import group_amax, reference
from helpers import (
    REAL,
    all_patterns,
    assert_same_bytes,
    each_layout,
    each_real,
    empty_view,
    from_bits,
    placed,
    values,
)

CPU = torch.device("cpu")


def check(
    device: torch.device,
    x: Tensor,
    before: Tensor,
    group: Sequence[int],
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
) -> None:
    """Compares on `device`, with input and amax in these layouts; nothing around amax may change."""
    actual, buffer = empty_view(before.shape, torch.float32, layouts[1], device)
    expected, expected_buffer = empty_view(before.shape, torch.float32, layouts[1], CPU)
    actual.view(torch.int32).copy_(before.view(torch.int32))
    expected.view(torch.int32).copy_(before.view(torch.int32))
    group_amax(actual, placed(x, layouts[0], device), group)
    reference.group_amax(expected, x, group)
    assert_same_bytes(actual, expected)
    assert_same_bytes(buffer, expected_buffer)


#: name, group shape, shape of amax for an input [M, N]
GRANULARITIES = {
    "tensor": ((-1, -1), lambda m, n: (1,)),
    "tensor 0-D": ((-1, -1), lambda m, n: ()),
    "token": ((1, -1), lambda m, n: (m, 1)),
    "channel": ((-1, 1), lambda m, n: (n,)),
    "head 4": ((-1, 4), lambda m, n: (1, -(-n // 4))),
    "head 16": ((-1, 16), lambda m, n: (-(-n // 16),)),
    "block 3x5": ((3, 5), lambda m, n: (-(-m // 3), -(-n // 5))),
    "block 16x16": ((16, 16), lambda m, n: (-(-m // 16), -(-n // 16))),
    "element": ((1, 1), lambda m, n: (m, n)),
}
SHAPES = [
    (1, 1),
    (1, 7),
    (3, 8),
    (5, 16),
    (7, 33),
    (16, 64),
    (33, 100),
    (64, 130),
    (2, 1024),
    (9, 513),
    (300, 256),
]


@each_real
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity(device: torch.device, granularity: str, real: torch.dtype) -> None:
    group, amax_shape = GRANULARITIES[granularity]
    for shape in SHAPES:
        check(device, values(shape, real, seed=sum(shape)), torch.zeros(amax_shape(*shape)), group)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_for_each_instruction_set(isa: str, granularity: str) -> None:
    group, amax_shape = GRANULARITIES[granularity]
    for shape in SHAPES:
        for real in REAL.values():
            check(CPU, values(shape, real), torch.zeros(amax_shape(*shape)), group)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_it_is_a_running_maximum(device: torch.device, granularity: str) -> None:
    group, amax_shape = GRANULARITIES[granularity]
    running = torch.zeros(amax_shape(20, 48), device=device)
    expected = torch.zeros(amax_shape(20, 48))
    for step in range(5):
        x = values((20, 48), torch.bfloat16, seed=step)
        group_amax(running, x.to(device), group)
        reference.group_amax(expected, x, group)
    assert_same_bytes(running, expected)


@pytest.mark.parametrize(
    "bits",
    [0x00000000, 0x80000000, 0x00000001, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
     0x7FC00000, 0x7F800001, 0xFFC00000],
    ids=hex,
)  # fmt: skip
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_was_in_amax(device: torch.device, granularity: str, bits: int) -> None:
    """Bit patterns compare as signed integers: what is negative gives way, infinity and positive NaN stay."""
    group, amax_shape = GRANULARITIES[granularity]
    shape = amax_shape(6, 40)
    before = from_bits([bits] * math.prod(shape)).reshape(shape)
    check(device, values((6, 40), torch.bfloat16), before, group)
    check(device, torch.full((6, 40), math.nan), before, group)


@each_real
def test_one_element_that_is_not_finite(device: torch.device, real: torch.dtype) -> None:
    for length in (1, 7, 8, 64, 1000, 9001):
        for special in (math.nan, math.inf, -math.inf):
            for place in {0, length // 2, length - 1}:
                x = values((2, length), real, specials=False)
                x[0, place] = special
                check(device, x, torch.zeros(2), (1, -1))
                check(device, x, torch.zeros(1), (-1, -1))


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value(device: torch.device, real: torch.dtype) -> None:
    x = all_patterns(real)
    check(device, x, torch.zeros(len(x)), (1, 1))
    check(device, x.view(256, 256), torch.zeros(256), (-1, 1))


@each_layout
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("side", ["input", "amax", "both"])
def test_layouts(device: torch.device, side: str, granularity: str, layout: str) -> None:
    group, amax_shape = GRANULARITIES[granularity]
    layouts = tuple(layout if side in (name, "both") else "contiguous" for name in ("input", "amax"))
    for shape, real in (((5, 48), torch.bfloat16), ((18, 37), torch.float32), ((3, 257), torch.float16)):
        check(device, values(shape, real), torch.zeros(amax_shape(*shape)), group, layouts)


@pytest.mark.parametrize(
    ("shape", "group", "amax_shape"),
    [
        ((5, 8, 64), (-1, 16), (4,)),
        ((2, 3, 64), (1, -1), (2, 3, 1)),
        ((2, 3, 64), (1, 16), (6, 4)),
        ((3, 5, 10), (4, 3), (4, 4)),
        ((64,), (-1, 16), (4,)),
        ((), (-1, -1), ()),
        ((0,), (-1, -1), (1,)),
        ((5, 0), (1, -1), (5,)),
        ((0, 5), (-1, 1), (5,)),
        ((0, 5), (1, -1), (0,)),
    ],
    ids=str,
)
def test_more_and_fewer_dimensions(
    device: torch.device, shape: tuple[int, ...], group: tuple[int, int], amax_shape: tuple[int, ...]
) -> None:
    for real in REAL.values():
        check(device, values(shape, real), torch.full(amax_shape, 0.125), group)
        check(device, values(shape, real), torch.full(amax_shape, -1.0), group)
    for layout in ("transposed", "columns", "rows", "inside") if 0 not in shape else ():
        check(device, values(shape, torch.bfloat16), torch.zeros(amax_shape), group, (layout, "contiguous"))


@pytest.mark.parametrize("layout", ["contiguous", "inside", "rows", "transposed"])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 11, 100])
def test_groups_of_rows_across_leading_dimensions(device: torch.device, rows: int, layout: str) -> None:
    for cols in (-1, 7):
        amax = torch.zeros(-(-60 // rows), 1 if cols == -1 else 4)
        check(device, values((3, 4, 5, 24), torch.bfloat16), amax, (rows, cols), (layout, "contiguous"))


def test_expanded_input(device: torch.device) -> None:
    x = values((1, 40), torch.bfloat16)
    amax = torch.zeros(40, device=device)
    group_amax(amax, x.to(device).expand(12, 40), (-1, 1))
    expected = torch.zeros(40)
    reference.group_amax(expected, x.expand(12, 40), (-1, 1))
    assert_same_bytes(amax, expected)
