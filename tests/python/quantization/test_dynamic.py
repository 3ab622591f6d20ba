"""dynamic_scaled_fp8_quant against the reference, scales and results byte for byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import quantization_family
from fp8kv import dynamic_scaled_fp8_quant, reference
from helpers import (
    REAL,
    all_patterns,
    assert_same_bytes,
    each_quantized,
    each_real,
    from_bits,
    require_gpu_memory,
    values,
)
from quantization_family import DYNAMIC, E4M3, GRANULARITIES, Group

PER_TOKEN = (1, -1)


def check(
    device: torch.device,
    x: Tensor,
    scale_shape: Sequence[int],
    group: Group,
    fp8: torch.dtype = E4M3,
    **options: Any,
) -> None:
    quantization_family.check(DYNAMIC, device, x, DYNAMIC.initial_scale(scale_shape), group, fp8, **options)


# Rows: a kernel holds one in a part of a warp, in a block, in several blocks, or reads it twice


def around(*lengths: int) -> list[int]:
    return [length + step for length in lengths for step in (-1, 0, 1)]


@pytest.mark.parametrize(
    "length",
    [*range(1, 7), *around(8, 16, 24, 32, 64, 128, 256, 264), 4096, 5137, *around(8192), 20000, 70000],
)
def test_lengths_of_rows(device: torch.device, length: int) -> None:
    """Around powers of two: how many lanes hold a row; and around a warp of vectors, where blocks begin."""
    for real in REAL.values():
        for rows in (1, 3) if length > 8193 else (1, 5, 33):
            x = values((rows, length), real, seed=length, specials=False)
            check(device, x, (rows, 1), PER_TOKEN)
            check(device, x, (1,), None)


ONE_PASS = {
    "registers of a block": (3, 512),
    "two vectors a thread": (300, 4096),
    "more vectors a thread": (2, 20_000),
    "read twice": (2, 70_000),
    "several blocks read all": (1, 9_000),
    "several blocks read more": (1, 20_000),
    "several blocks read most": (1, 40_000),
    "a cluster": (1, 100_000),
    "a cluster, two vectors": (1, 200_000),
    "a cluster, four": (1, 400_000),
    "a cluster, eight": (1, 600_000),
    "all multiprocessors": (1, 1_200_000),
}


@each_quantized
@each_real
@pytest.mark.parametrize("shape", ONE_PASS.values(), ids=ONE_PASS.keys())
def test_kernels_of_one_pass(device: torch.device, shape: tuple[int, int], real: torch.dtype, fp8: torch.dtype) -> None:
    """Aligned, with gaps between rows, and misaligned. Names are those of 16-bit inputs on an H200."""
    x = values(shape, real, specials=False)
    for layout in ("contiguous", "offset 3", *(["rows"] if shape[0] > 1 else [])):
        check(device, x, shape[:1], PER_TOKEN, fp8, layouts={"input": layout, "result": layout})


@pytest.mark.parametrize("length", [64, 100, 128, 4096, 5137, 8192, 20000, 70000])
@pytest.mark.parametrize("offset", range(1, 8))
def test_misaligned_rows(device: torch.device, offset: int, length: int) -> None:
    layouts = {"input": f"offset {offset}", "result": f"offset {8 - offset}"}
    for real in REAL.values():
        x = values((2, length), real, specials=False)
        check(device, x, (2, 1), PER_TOKEN, layouts=layouts)
        check(device, x, (1,), None, layouts=layouts)


# Elements that must not count


@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 64, 1000, 8192, 9001])
def test_one_element_that_is_not_finite(device: torch.device, length: int, special: float) -> None:
    """At the first, last and middle place of a row; the other rows have none."""
    for real, place in product(REAL.values(), {0, length // 2, length - 1}):
        x = values((3, length), real, specials=False)
        x[1, place] = special
        check(device, x, (3,), PER_TOKEN)
        check(device, x, (1,), None)


@each_quantized
@each_real
def test_every_granularity_with_nothing_finite(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    specials = torch.tensor([math.nan, math.inf, -math.inf])
    x = specials[torch.arange(40 * 48) % 3].view(40, 48).to(real)
    for group, scale_shape in GRANULARITIES.values():
        check(device, x, scale_shape(40, 48), group, fp8)


@each_quantized
@each_real
def test_zeros(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = torch.zeros(8, 64)
    x[:, 1::2] = -0.0
    x[3, 5] = 2.0
    for group, scale_shape in GRANULARITIES.values():
        check(device, x.to(real), scale_shape(8, 64), group, fp8)


@each_real
@each_quantized
def test_amax_around_the_smallest_scale(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    """Rows whose amax is a power of two from the smallest subnormal to the largest number."""
    exponents = range(-149, 128) if real != torch.float16 else range(-24, 16)
    x = torch.stack([torch.tensor([1.0, -0.7, 0.01]).double() * 2.0**e for e in exponents]).to(real)
    check(device, x, (len(x),), PER_TOKEN, fp8)


@each_quantized
def test_subnormal_fp32_elements_count(device: torch.device, fp8: torch.dtype) -> None:
    x = from_bits([0x00000001, 0x007FFFFF, 0x80400000, 0x00000000]).view(2, 2)
    check(device, x, (2,), PER_TOKEN, fp8)


@each_quantized
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_alone_and_as_the_largest(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = all_patterns(real)
    check(device, x.view(-1, 1), (len(x),), PER_TOKEN, fp8)
    scaled = torch.stack([x, (x.float() * -0.4).to(real), (x.float() * 0.001).to(real)], dim=1)
    check(device, scaled, (len(x), 1), PER_TOKEN, fp8)
    check(device, scaled.T.contiguous(), (1, len(x)), (-1, 1), fp8)


@each_real
def test_the_largest_at_every_position(device: torch.device, real: torch.dtype) -> None:
    for size in (5, 8, 31, 64, 200):
        x = torch.full((size, size), 0.25)
        x.fill_diagonal_(-3.0)
        check(device, x.to(real), (size,), PER_TOKEN)
        check(device, x.to(real), (size,), (-1, 1))
        for i in range(0, size, 7):
            check(device, x[i].to(real), (), None)


# The upper bound


@pytest.mark.parametrize(
    "bound",
    [1.0, 0.37, 100.0, 3e38, 1e-3, 1e-45, 0.0, -0.0, -1.0, math.inf, -math.inf, math.nan],
    ids=repr,
)
def test_scale_ub(device: torch.device, bound: float) -> None:
    for granularity in ("tensor", "token", "channel", "head 16", "block 3x5", "element"):
        group, scale_shape = GRANULARITIES[granularity]
        for real, shape in product(REAL.values(), [(), (1,), (1, 1)]):
            scale_ub = torch.full(shape, bound)
            check(device, values((12, 100), real), scale_shape(12, 100), group, scale_ub=scale_ub)


@pytest.mark.parametrize("length", [64, 4096, 5137, 20000])
def test_scale_ub_for_long_rows(device: torch.device, length: int) -> None:
    x = values((4, length), torch.bfloat16, specials=False)
    check(device, x, (4, 1), PER_TOKEN, scale_ub=torch.tensor(2.5))
    check(device, x, (1,), None, scale_ub=torch.tensor(2.5))


# Size and state


@pytest.mark.large
@pytest.mark.parametrize("group", [None, (1, -1), (-1, 1), (1, 128)], ids=str)
def test_more_than_2_to_the_31_elements(cuda: torch.device, group: tuple[int, int] | None) -> None:
    require_gpu_memory(cuda, 24)
    rows, cols = (1 << 19) + 300, 4096
    x = torch.ones(rows, cols, dtype=torch.bfloat16, device=cuda)
    x[:, 17] = 3.0
    x[rows - 1, 100] = -448.0
    width = 128 if group == (1, 128) else 1 if group == (-1, 1) else cols
    height = 1 if group and group[0] == 1 else rows
    scale = torch.empty(-(-rows // height), cols // width, device=cuda)
    result = torch.empty(x.shape, dtype=E4M3, device=cuda)
    dynamic_scaled_fp8_quant(result, x, scale, None, group)
    tail = x[-300:].cpu()
    if height == 1:
        expected, expected_scale = reference.quantize(tail, group_shape=group)
        assert_same_bytes(scale[-300:], expected_scale)
    else:
        column_amax = torch.ones(1, cols)
        column_amax[0, 17], column_amax[0, 100] = 3.0, 448.0
        amax = column_amax if width == 1 else column_amax.amax().view(1, 1)
        expected_scale = amax / torch.full_like(amax, 448.0)
        assert_same_bytes(scale, expected_scale)
        expected, _ = reference.quantize(tail, expected_scale, group_shape=group or (-1, -1))
    assert_same_bytes(result[-300:], expected)


def test_what_was_in_the_scale_does_not_matter(device: torch.device) -> None:
    x = values((16, 300), torch.bfloat16).to(device)
    for group, scale_shape in (((-1, -1), (1,)), ((1, -1), (16,)), ((-1, 1), (300,)), ((5, 7), (4, 43))):
        results = []
        for before in (0.0, math.nan, math.inf, -1.0, 3e38):
            scale = torch.full(scale_shape, before, device=device)
            result = torch.empty(x.shape, dtype=E4M3, device=device)
            dynamic_scaled_fp8_quant(result, x, scale, None, group)
            results.append((scale, result))
        for scale, result in results[1:]:
            assert_same_bytes(scale, results[0][0])
            assert_same_bytes(result, results[0][1])


def test_repeated_calls_give_the_same_bytes(device: torch.device) -> None:
    """An order of threads must not show."""
    x = values((513, 1031), torch.bfloat16).to(device)
    for group, scale_shape in (((-1, -1), (1,)), ((-1, 1), (1031,)), ((100, 100), (6, 11))):
        scales = [torch.empty(scale_shape, device=device) for _ in range(20)]
        for scale in scales:
            dynamic_scaled_fp8_quant(torch.empty(x.shape, dtype=E4M3, device=device), x, scale, None, group)
        for scale in scales[1:]:
            assert_same_bytes(scale, scales[0])
