"""group_amax against the reference, byte for byte."""

from __future__ import annotations

import math

import pytest
import torch

from fp8kv import group_amax, reference
from helpers import all_patterns, assert_same_bytes, each_real, from_bits, values
from quantization_family import AMAX, GRANULARITIES, check, each_granularity


@each_granularity
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
def test_what_was_in_amax(device: torch.device, bits: int) -> None:
    """Bit patterns compare as signed integers: what is negative gives way, infinity and positive NaN stay."""
    for group, amax_shape in GRANULARITIES.values():
        before = from_bits(bits).expand(amax_shape(6, 40))
        check(AMAX, device, values((6, 40), torch.bfloat16), before, group)
        check(AMAX, device, torch.full((6, 40), math.nan), before, group)


@each_real
def test_one_element_that_is_not_finite(device: torch.device, real: torch.dtype) -> None:
    for length in (1, 7, 8, 64, 1000, 9001):
        for special in (math.nan, math.inf, -math.inf):
            for place in {0, length // 2, length - 1}:
                x = values((2, length), real, specials=False)
                x[0, place] = special
                check(AMAX, device, x, torch.zeros(2), (1, -1))
                check(AMAX, device, x, torch.zeros(1), (-1, -1))


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value(device: torch.device, real: torch.dtype) -> None:
    x = all_patterns(real)
    check(AMAX, device, x, torch.zeros(len(x)), (1, 1))
    check(AMAX, device, x.view(256, 256), torch.zeros(256), (-1, 1))
