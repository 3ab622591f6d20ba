"""Random problems: shapes, strides, offsets, group shapes and dtypes nobody thought of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8kv import (
    dynamic_scaled_fp8_quant,
    group_amax,
    quantize,
    reference,
    scaled_fp8_dequant,
    static_scaled_fp8_quant,
)
from helpers import FP8, INTEGER, LAYOUTS, REAL, assert_same_bytes, empty_view, placed

CPU = torch.device("cpu")
often = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(LAYOUTS)
shapes = st.lists(st.integers(0, 40), min_size=0, max_size=4).filter(lambda s: math.prod(s) <= 20_000)
extents = st.one_of(st.just(-1), st.integers(1, 9), st.sampled_from([16, 32, 128]))


@st.composite
def scales_of(draw: st.DrawFn, shape: list[int]) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """A group shape, or None, and a shape of the scale that goes with it for an input of `shape`."""
    if draw(st.booleans()) and len(shape) > 1:
        return None, tuple(draw(st.sampled_from(divisors(n))) for n in shape)
    rows, cols = draw(extents), draw(extents)
    matrix = (math.prod(shape[:-1]), shape[-1] if shape else 1)
    r, c = (1 if e == -1 else math.ceil(n / e) for n, e in zip(matrix, (rows, cols), strict=True))
    forms: list[tuple[int, ...]] = [(r, c), (1, r, c)]
    if r == 1 or c == 1:
        forms.append((r * c,))
    if rows == 1:
        forms.append((*shape[:-1], c))
    return (rows, cols), draw(st.sampled_from(forms))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] or [0]


def random_bits(shape: list[int] | tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit patterns whatever."""
    if dtype in FP8.values():
        return torch.randint(0, 256, tuple(shape), generator=generator, dtype=torch.uint8).view(dtype)
    bits = torch.randint(-(1 << 31), 1 << 31, tuple(shape), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).to(INTEGER[dtype]).view(dtype)


def random_reals(shape: list[int], dtype: torch.dtype, generator: torch.Generator, ordinary: bool) -> Tensor:
    if not ordinary:
        return random_bits(shape, dtype, generator)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def scale_values(shape: tuple[int, ...], generator: torch.Generator, ordinary: bool) -> Tensor:
    if not ordinary:
        return random_bits(shape, torch.float32, generator)
    return torch.rand(shape, generator=generator) + 2.0**-8


def draw_problem(data: st.DataObject) -> tuple[Any, ...]:
    """Shape, group shape, shape of the scales, both dtypes, layouts of the three tensors, generator."""
    shape = data.draw(shapes, "shape")
    group, scale_shape = data.draw(scales_of(shape), "group shape, scale shape")
    real, fp8 = data.draw(st.sampled_from([*REAL.values()])), data.draw(st.sampled_from([*FP8.values()]))
    places = [data.draw(layouts, name) for name in ("input", "scale", "result")]
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    return shape, group, scale_shape, real, fp8, places, generator


@often
@given(st.data())
def test_static(device: torch.device, data: st.DataObject) -> None:
    shape, group, scale_shape, real, fp8, places, generator = draw_problem(data)
    x = random_reals(shape, real, generator, data.draw(st.booleans(), "ordinary values"))
    scale = scale_values(scale_shape, generator, data.draw(st.booleans(), "ordinary scales"))

    actual, buffer = empty_view(shape, fp8, places[2], device)
    static_scaled_fp8_quant(actual, placed(x, places[0], device), placed(scale, places[1], device), group)
    expected, expected_buffer = empty_view(shape, fp8, places[2], CPU)
    reference.static_scaled_fp8_quant(expected, x, scale, group)
    assert_same_bytes(actual, expected)
    assert_same_bytes(buffer, expected_buffer)


@often
@given(st.data())
def test_dynamic(device: torch.device, data: st.DataObject) -> None:
    shape, group, scale_shape, real, fp8, places, generator = draw_problem(data)
    x = random_reals(shape, real, generator, data.draw(st.booleans(), "ordinary values"))
    bound = random_bits((1,), torch.float32, generator) if data.draw(st.booleans(), "bounded") else None

    actual, buffer = empty_view(shape, fp8, places[2], device)
    scale, scale_buffer = empty_view(scale_shape, torch.float32, places[1], device)
    on_device = None if bound is None else bound.to(device)
    dynamic_scaled_fp8_quant(actual, placed(x, places[0], device), scale, on_device, group)
    expected, expected_buffer = empty_view(shape, fp8, places[2], CPU)
    expected_scale, expected_scale_buffer = empty_view(scale_shape, torch.float32, places[1], CPU)
    reference.dynamic_scaled_fp8_quant(expected, x, expected_scale, bound, group)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(actual, expected)
    assert_same_bytes(buffer, expected_buffer)
    assert_same_bytes(scale_buffer, expected_scale_buffer)


@often
@given(st.data())
def test_dequant(device: torch.device, data: st.DataObject) -> None:
    shape, group, scale_shape, real, fp8, places, generator = draw_problem(data)
    q = random_bits(shape, fp8, generator)
    scale = scale_values(scale_shape, generator, data.draw(st.booleans(), "ordinary scales"))

    actual, buffer = empty_view(shape, real, places[2], device)
    scaled_fp8_dequant(actual, placed(q, places[0], device), placed(scale, places[1], device), group)
    expected, expected_buffer = empty_view(shape, real, places[2], CPU)
    reference.scaled_fp8_dequant(expected, q, scale, group)
    assert_same_bytes(actual, expected)
    assert_same_bytes(buffer, expected_buffer)


@often
@given(st.data())
def test_amax(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes, "shape")
    group, amax_shape = data.draw(
        scales_of(shape).filter(lambda s: s[0] is not None), "group shape, shape of amax"
    )
    real = data.draw(st.sampled_from([*REAL.values()]))
    place = data.draw(layouts, "input")
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    x = random_reals(shape, real, generator, data.draw(st.booleans(), "ordinary values"))
    before = random_bits(amax_shape, torch.float32, generator)

    amax = before.to(device)
    group_amax(amax, placed(x, place, device), group)
    expected = before.clone()
    reference.group_amax(expected, x, group)
    assert_same_bytes(amax, expected)


@often
@given(st.data())
def test_quantize_allocates_what_the_reference_does(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(shapes, "shape")
    group = data.draw(st.one_of(st.none(), st.tuples(extents, extents)), "group shape")
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    x = torch.randn(shape, generator=generator, dtype=torch.float32)
    q, scale = quantize(x.to(device), group_shape=group)
    expected, expected_scale = reference.quantize(x, group_shape=group)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(q, expected)


@settings(often, max_examples=600)
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=4),
    scale_shape=st.lists(st.integers(0, 6), min_size=0, max_size=4),
    group=st.one_of(st.none(), st.tuples(st.integers(-2, 7), st.integers(-2, 7))),
)
def test_a_scale_shape_is_accepted_exactly_if_the_reference_accepts_it(
    device: torch.device, shape: list[int], scale_shape: list[int], group: tuple[int, int] | None
) -> None:
    x, scale = torch.ones(shape), torch.ones(scale_shape)
    try:
        expected, _ = reference.quantize(x, scale, group_shape=group)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="fp8kv::static_scaled_fp8_quant: "):
            quantize(x.to(device), scale.to(device), group_shape=group)
        return
    assert_same_bytes(quantize(x.to(device), scale.to(device), group_shape=group)[0], expected)
