"""Random problems: shapes, strides, offsets, group shapes and dtypes nobody thought of."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8kv import (
    gather_and_dequant_cache,
    quantize,
    reference,
    reshape_and_cache_flash,
    reshape_and_cache_flash_dynamic,
    rope_quant_and_cache,
)
from helpers import (
    CACHE_LAYOUTS,
    LAYOUTS,
    PLAIN_CACHES,
    QUANTIZED_CACHES,
    REAL,
    assert_same_bytes,
    copy_bits,
    empty_caches,
    empty_view,
    placed,
    random_bits,
)
from quantization_family import DYNAMIC, Operator, check, dtype_pairs_of, each_operator

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


def random_reals(shape: list[int], dtype: torch.dtype, generator: torch.Generator, ordinary: bool) -> Tensor:
    if not ordinary:
        return random_bits(shape, dtype, generator)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def scale_values(shape: tuple[int, ...], generator: torch.Generator, ordinary: bool) -> Tensor:
    if not ordinary:
        return random_bits(shape, torch.float32, generator)
    return torch.rand(shape, generator=generator) + 2.0**-8


@each_operator
@often
@given(st.data())
def test_quantization(device: torch.device, operator: Operator, data: st.DataObject) -> None:
    shape = data.draw(shapes, "shape")
    group, scale_shape = data.draw(
        scales_of(shape).filter(lambda s: s[0] is not None or operator.group_is_optional),
        "group shape, scale shape",
    )
    input_dtype, result_dtype = data.draw(st.sampled_from(dtype_pairs_of(operator)), "dtypes")
    places = {name: data.draw(layouts, name) for name in ("input", "scale", "result")}
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    ordinary = operator.inputs is REAL and data.draw(st.booleans(), "ordinary values")
    x = random_reals(shape, input_dtype, generator, ordinary)
    scale = scale_values(scale_shape, generator, data.draw(st.booleans(), "ordinary scales"))
    bounded = operator is DYNAMIC and data.draw(st.booleans(), "bounded")
    bound = random_bits((1,), torch.float32, generator) if bounded else None
    check(operator, device, x, scale, group, result_dtype, places, bound)


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


# The paged cache


@st.composite
def cache_shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Number and size of blocks, number and size of heads."""
    heads = draw(st.integers(0, 9))
    head_size = draw(st.one_of(st.integers(0, 20), st.sampled_from([32, 40, 64, 80, 128, 130])))
    return draw(st.integers(0, 6)), draw(st.integers(0, 9)), heads, head_size


def draw_slots(data: st.DataObject, device: torch.device, num_slots: int, generator: torch.Generator) -> Tensor:
    """Of one dimension, any steps; on the CPU the same slot more than once."""
    tokens = data.draw(st.integers(0, 25), "tokens")
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), "slots")
    if device.type == "cpu":
        slots = torch.randint(-3, num_slots, (tokens,), generator=generator)
    else:
        slots = torch.randperm(num_slots + 9, generator=generator)[:tokens] - 9
        slots = torch.nn.functional.pad(slots, (0, tokens - len(slots)), value=-1)
    return slots.to(dtype)


def draw_scales(data: st.DataObject, generator: torch.Generator, forms: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Of K and V, each in one of the forms."""
    k, v = (data.draw(st.sampled_from(forms), name) for name in ("k_scale", "v_scale"))
    ordinary = data.draw(st.booleans(), "ordinary scales")
    return scale_values(k, generator, ordinary), scale_values(v, generator, ordinary)


def forms_of(device: torch.device, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the scales of a cache."""
    heads = shape[2]
    forms: list[tuple[int, ...]] = [(), (1,), (1, 1), (heads,), (1, heads), (heads, 1, 1)]
    return forms if device.type == "cuda" else [*forms, shape[2:], shape[2:]]


def draw_offsets(
    data: st.DataObject,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Of K, of V, of both or of none, in any layout; none with caches and devices that take none."""
    if device.type == "cuda" or dtype in REAL.values():
        return {}
    names = data.draw(st.sets(st.sampled_from(["k_offset", "v_offset"])), "offsets")
    ordinary = data.draw(st.booleans(), "ordinary offsets")
    return {
        name: placed(random_reals([*shape[2:]], torch.float32, generator, ordinary), data.draw(layouts, name), CPU)
        for name in sorted(names)
    }


#: All but those in which the elements of scales of more than one dimension have no even steps.
even_layouts = st.sampled_from(["contiguous", "offset 1", "offset 3"])


def draw_heads(data: st.DataObject, tokens: int, shape: tuple[int, ...], generator: torch.Generator) -> Any:
    """K and V of at least so many tokens, and their layouts."""
    real = data.draw(st.sampled_from([*REAL.values()]), "type")
    ordinary = data.draw(st.booleans(), "ordinary values")
    sides = [
        random_reals([tokens + data.draw(st.integers(0, 2), "spare rows"), *shape[2:]], real, generator, ordinary) for _ in "kv"
    ]
    return sides, [data.draw(layouts, name) for name in ("key", "value")]


@often
@given(st.data())
def test_append(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(cache_shapes(), "cache")
    name, dtype, _ = data.draw(st.sampled_from([*QUANTIZED_CACHES.values(), *PLAIN_CACHES.values()]), "elements")
    cache_layout = data.draw(st.sampled_from(CACHE_LAYOUTS), "layout")
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    slots = draw_slots(data, device, shape[0] * shape[1], generator)
    heads, places = draw_heads(data, len(slots), shape, generator)
    scales = draw_scales(data, generator, forms_of(device, shape))
    scale_layout, slot_layout = data.draw(even_layouts, "scales"), data.draw(layouts, "slots")
    offsets = draw_offsets(data, device, shape, dtype, generator)

    key_cache, value_cache, actual = empty_caches(shape, dtype, cache_layout, device)
    reshape_and_cache_flash(
        *(placed(x, place, device) for x, place in zip(heads, places, strict=True)), key_cache, value_cache,
        placed(slots, slot_layout, device), name, *(placed(s, scale_layout, device) for s in scales),
        **offsets,
    )  # fmt: skip
    key_cache, value_cache, expected = empty_caches(shape, dtype, cache_layout, CPU)
    reference.reshape_and_cache_flash(*heads, key_cache, value_cache, slots, name, *scales, **offsets)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bytes(a, e)


@often
@given(st.data())
def test_append_dynamic(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(cache_shapes(), "cache")
    name, dtype, _ = data.draw(st.sampled_from([*QUANTIZED_CACHES.values()]), "elements")
    cache_layout = data.draw(st.sampled_from(CACHE_LAYOUTS), "layout")
    scale_layouts = [data.draw(layouts, name) for name in ("scales of K", "scales of V")]
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    slots = draw_slots(data, device, shape[0] * shape[1], generator)
    heads, places = draw_heads(data, len(slots), shape, generator)
    offsets = draw_offsets(data, device, shape, dtype, generator)

    buffers = []
    for at in (device, CPU):
        key_cache, value_cache, caches = empty_caches(shape, dtype, cache_layout, at)
        scales = [empty_view(shape[:3], torch.float32, layout, at) for layout in scale_layouts]
        op = reshape_and_cache_flash_dynamic if not buffers else reference.reshape_and_cache_flash_dynamic
        op(
            *(placed(x, place, at) for x, place in zip(heads, places, strict=True)), key_cache, value_cache,
            *(scale for scale, _ in scales), slots.to(at), name, **offsets,
        )  # fmt: skip
        buffers.append([*caches, *(buffer for _, buffer in scales)])
    for a, e in zip(*buffers, strict=True):
        assert_same_bytes(a, e)


@often
@given(st.data())
def test_step(device: torch.device, data: st.DataObject) -> None:
    """Without a norm, whose sum has no fixed order."""
    shape = data.draw(cache_shapes(), "cache")
    kv_heads, head_size = shape[2:]
    num_heads = kv_heads * data.draw(st.integers(0, 4), "query heads for one of K")
    name, dtype, _ = data.draw(st.sampled_from([*QUANTIZED_CACHES.values(), *PLAIN_CACHES.values()]), "elements")
    out_dtypes = [*REAL.values()] if dtype == torch.int8 else [dtype, *REAL.values()]
    out_dtype = data.draw(st.sampled_from(out_dtypes), "query_out")
    cache_layout = data.draw(st.sampled_from(CACHE_LAYOUTS), "layout")
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    slots = draw_slots(data, device, shape[0] * shape[1], generator)
    heads, places = draw_heads(data, len(slots), shape, generator)
    query = random_reals([len(slots), num_heads, head_size], heads[0].dtype, generator, False)
    q_scale = scale_values(data.draw(st.sampled_from([(1,), (kv_heads,), (num_heads,)]), "q_scale"), generator, False)
    scales = draw_scales(data, generator, forms_of(device, shape))
    offsets = draw_offsets(data, device, shape, dtype, generator)
    rope: list[Any] = [None, None, True]
    sections: dict[str, Any] = {}
    if head_size >= 2 and data.draw(st.booleans(), "rope"):
        rotary_dim = 2 * data.draw(st.integers(1, head_size // 2), "half of rotary_dim")
        table = torch.randn(9, rotary_dim, generator=generator)
        table = table.to(data.draw(st.sampled_from([torch.float32, query.dtype]), "table"))
        positions = torch.randint(0, 9, (3, len(slots)), generator=generator)
        if data.draw(st.booleans(), "three positions"):
            ends = sorted(data.draw(st.tuples(*[st.integers(0, rotary_dim // 2)] * 2), "ends of sections"))
            sections["mrope_section"] = [ends[0], ends[1] - ends[0], rotary_dim // 2 - ends[1]]
            sections["mrope_interleaved"] = data.draw(st.booleans(), "mrope_interleaved")
        rope = [positions if sections else positions[0], table, data.draw(st.booleans(), "is_neox")]
    others = [data.draw(layouts, name) for name in ("query", "query_out", "positions", "cos_sin_cache")]

    places = [others[0], *places]
    buffers = []
    for at in (device, CPU):
        key_cache, value_cache, caches = empty_caches(shape, dtype, cache_layout, at)
        out, out_buffer = empty_view(query.shape, out_dtype, others[1], at)
        inputs = [placed(x, place, at) for x, place in zip([query, *heads], places, strict=True)]
        if rope[0] is not None:
            rope[:2] = [placed(x, place, at) for x, place in zip(rope[:2], others[2:], strict=True)]
        op = rope_quant_and_cache if not buffers else reference.rope_quant_and_cache
        op(
            *inputs, out, key_cache, value_cache, slots.to(at), name,
            *(scale.to(at) for scale in (q_scale, *scales)), *rope, **offsets, **sections,
        )  # fmt: skip
        buffers.append([*caches, out_buffer])
    for a, e in zip(*buffers, strict=True):
        assert_same_bytes(a, e)


@often
@given(st.data())
def test_gather(device: torch.device, data: st.DataObject) -> None:
    shape = data.draw(cache_shapes(), "cache")
    blocks, block_size = shape[:2]
    name, dtype, _ = data.draw(st.sampled_from([*QUANTIZED_CACHES.values(), *PLAIN_CACHES.values()]), "elements")
    real = data.draw(st.sampled_from([*REAL.values()]), "type")
    cache_layout = data.draw(st.sampled_from(CACHE_LAYOUTS), "layout")
    places = [data.draw(layouts, name) for name in ("key", "value")]
    index_layout = data.draw(layouts, "indices")
    longest = 20 if blocks * block_size else 0
    lengths = data.draw(st.lists(st.integers(0, longest), max_size=6), "lengths")
    starts = [data.draw(st.integers(0, longest), "start") for _ in lengths]
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    scales = draw_scales(data, generator, [*forms_of(device, shape), shape[:3]])
    offsets = draw_offsets(data, device, shape, dtype, generator)
    contents = random_bits((2, *shape), dtype, generator)
    max_blocks = -(-2 * longest // block_size) if longest else data.draw(st.integers(0, 2), "max_blocks")
    table = torch.randint(0, max(1, blocks), (len(lengths), max_blocks), generator=generator).to(torch.int32)
    indices = [table, *(torch.tensor(x, dtype=torch.int32) for x in ([0, *accumulate(lengths)], starts))]
    rows = sum(lengths) + data.draw(st.integers(0, 3), "spare rows")

    buffers = []
    for at in (device, CPU):
        key_cache, value_cache, _ = empty_caches(shape, dtype, cache_layout, at)
        copy_bits(key_cache, contents[0])
        copy_bits(value_cache, contents[1])
        outputs = [empty_view((rows, *shape[2:]), real, place, at) for place in places]
        op = gather_and_dequant_cache if not buffers else reference.gather_and_dequant_cache
        block_table, sums, seq_starts = (placed(x, index_layout, at) for x in indices)
        op(
            key_cache, value_cache, *(x for x, _ in outputs), block_table, sums, name,
            *(scale.to(at) for scale in scales), seq_starts, **offsets,
        )  # fmt: skip
        buffers.append([buffer for _, buffer in outputs])
    for a, e in zip(*buffers, strict=True):
        assert_same_bytes(a, e)
