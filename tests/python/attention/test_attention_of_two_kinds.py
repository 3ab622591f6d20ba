"""paged_attention with K and V of two head sizes or two dtypes: the same bounds, and what is theirs alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fp8kv
from attention_problems import CACHES, CPU, Problem, check, check_nan, int32, make, place_caches
from fp8kv import reference
from helpers import (
    CACHE_LAYOUTS,
    FP8_CACHES,
    LAYOUTS,
    QUANTIZED_CACHES,
    REAL,
    assert_same_bytes,
    each_cache_layout,
    each_layout,
    each_real,
)

INF = float("inf")
SCALES = ("tensor", "head", "channel", "slot")
DECODE = {"lengths": (37, 1, 0, 16, 130)}
FEW = {"lengths": (40, 3, 0, 17, 9), "queries": (2, 5, 1, 8, 0)}
PREFILL = {"lengths": (33, 5, 90), "queries": (33, 5, 70)}
MODES = {"decode": DECODE, "few queries": FEW, "prefill": PREFILL}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())

#: K of 192 and V of 128, as in the prompts of latent attention.
UNEVEN: dict[str, Any] = {"heads": (8, 1), "head_size": 192, "v_head_size": 128}
#: A cache of rows of latent attention: V is the first part of K.
LATENT: dict[str, Any] = {"heads": (12, 1), "head_size": 576, "v_head_size": 512, "shared": True}
MIXED: dict[str, Any] = {"cache": "e4m3", "v_cache": "e5m2"}
KINDS = {"uneven": UNEVEN, "latent": LATENT, "mixed": MIXED, "uneven and mixed": UNEVEN | {"v_cache": "int8"}}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())

#: Query heads, KV heads, head sizes of K and of V, block size.
GEOMETRIES = [
    (8, 1, 192, 128, 16), (64, 4, 192, 128, 16), (16, 16, 192, 128, 64), (4, 2, 24, 16, 16), (4, 4, 16, 24, 16),
    (2, 1, 64, 128, 16), (8, 2, 128, 64, 16), (6, 3, 100, 36, 13), (3, 3, 1, 5, 1), (2, 1, 7, 1, 16),
    (16, 1, 576, 512, 16), (128, 1, 576, 512, 64), (20, 1, 576, 512, 1), (72, 1, 48, 32, 32), (5, 1, 33, 65, 3),
    (8, 2, 96, 80, 8), (12, 1, 256, 192, 16), (33, 1, 32, 16, 4), (4, 2, 528, 520, 16), (4, 1, 64, 1024, 16),
]  # fmt: skip


def geometry_of(numbers: tuple[int, int, int, int, int]) -> dict[str, Any]:
    return {"heads": numbers[:2], "head_size": numbers[2], "v_head_size": numbers[3], "block_size": numbers[4]}


def on(device: torch.device, problem: Problem) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and options of a call."""
    inputs = make(problem)
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    return [inputs.query.to(device), *place_caches(problem, inputs, device), inputs.table.to(device)], options


# Head sizes


@each_mode
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry(device: torch.device, geometry: tuple[int, ...], mode: dict[str, Any]) -> None:
    check(device, **geometry_of(geometry), **mode)


@pytest.mark.parametrize("geometry", GEOMETRIES[:10], ids=str)
def test_every_geometry_for_each_instruction_set(isa: str, geometry: tuple[int, ...]) -> None:
    for cache, v_cache in (("e4m3", None), ("e5m2", "int8"), ("fp16", "e4m3")):
        check(CPU, **geometry_of(geometry), **FEW, cache=cache, v_cache=v_cache, query=torch.float32)


@pytest.mark.parametrize("cache", CACHES)
def test_v_may_be_a_part_of_k(device: torch.device, cache: str) -> None:
    for layout in ("NHD", "HND", "steps", "transposed", "offset 3"):
        check(device, heads=(4, 2), head_size=48, v_head_size=32, shared=True, cache=cache, cache_layout=layout, **FEW)
    check(device, **LATENT, cache=cache, **DECODE)


def test_v_as_a_part_of_k_gives_the_bits_of_a_copy(device: torch.device) -> None:
    (query, key_cache, value_cache, table), options = on(device, Problem(**LATENT, **DECODE))
    out, lse = (torch.empty(5, 12, *size, device=device) for size in ((512,), ()))
    fp8kv.paged_attention(query, key_cache, value_cache, table, **options, out=out, lse=lse)
    of_copy = [torch.empty_like(x) for x in (out, lse)]
    fp8kv.paged_attention(query, key_cache, value_cache.clone(), table, **options, out=of_copy[0], lse=of_copy[1])
    assert_same_bytes(of_copy[0], out)
    assert_same_bytes(of_copy[1], lse)


@pytest.mark.parametrize("group", [1, 8, 9, 32, 40, 100])
@pytest.mark.parametrize("sizes", [(64, 48), (96, 256), (576, 512), (800, 144), (272, 128)], ids=str)
def test_groups_of_query_heads(device: torch.device, sizes: tuple[int, int], group: int) -> None:
    """On CUDA they share a block, up to 64 of them, in kernels of their own."""
    options: dict[str, Any] = {"heads": (group, 1), "head_size": sizes[0], "v_head_size": sizes[1]}
    for cache, v_cache, scales, num_splits in (
        ("e4m3", None, "head", 0), ("e5m2", "int8", "slot", 1), ("int8", "e4m3", "channel", 3),
    ):  # fmt: skip
        kinds = {"cache": cache, "v_cache": v_cache, "scales": (scales, scales), "num_splits": num_splits}
        check(device, lengths=(150, 33, 0, 1), **options, **kinds, offsets=True)
    check(device, lengths=(150, 33, 2), queries=(3, 0, 2), **options, query=torch.float32, sinks=torch.float32)


# Types


@pytest.mark.parametrize("v_cache", CACHES)
@pytest.mark.parametrize("cache", CACHES)
def test_types_of_k_and_v(device: torch.device, cache: str, v_cache: str) -> None:
    check(device, cache=cache, v_cache=v_cache, offsets=True, **FEW)
    check(device, cache=cache, v_cache=v_cache, head_size=48, v_head_size=32, scales=("slot", "channel"), **FEW)


@each_kind
@each_real
@pytest.mark.parametrize("query", [*REAL.values(), None], ids=[*REAL, "fp8"])
def test_types_of_query_and_out(
    device: torch.device, query: torch.dtype | None, real: torch.dtype, kind: dict[str, Any]
) -> None:
    check(device, query=query, out=real, **DECODE, **kind)


@pytest.mark.parametrize("cache", FP8_CACHES)
@pytest.mark.parametrize("count", [1, 2, 6])
def test_an_fp8_query_is_of_the_format_of_k(device: torch.device, count: int, cache: str) -> None:
    options = {"heads": (6, 2), "q_scales": count, "offsets": True, "head_size": 48, "v_head_size": 32}
    for v_cache in ("e5m2", "int8", "bf16"):
        check(device, cache=cache, v_cache=v_cache, query=None, **options, **FEW)


@pytest.mark.parametrize("cache", ["e4m3", "e5m2", "int8"])
def test_the_default_format_of_v_is_that_of_k(device: torch.device, cache: str) -> None:
    tensors, options = on(device, Problem(cache=cache, **UNEVEN))
    expected = fp8kv.paged_attention(*tensors, **options)[:1]
    options["v_cache_dtype"] = options["kv_cache_dtype"]
    assert_same_bytes(fp8kv.paged_attention(*tensors, **options)[:1], expected)


@pytest.mark.parametrize(("cache", "v_cache"), [("bf16", "e4m3"), ("e4m3", "bf16")])
def test_the_scale_of_what_is_not_quantized_does_not_matter(device: torch.device, cache: str, v_cache: str) -> None:
    tensors, options = on(device, Problem(cache=cache, v_cache=v_cache))
    expected = fp8kv.paged_attention(*tensors, **options)[:1]
    name = "k_scale" if cache == "bf16" else "v_scale"
    options[name] = torch.full_like(options[name], float("nan"))
    assert_same_bytes(fp8kv.paged_attention(*tensors, **options)[:1], expected)
    assert expected.isfinite().all()


# Scales


@pytest.mark.parametrize("k", SCALES)
@pytest.mark.parametrize("v", SCALES)
def test_scales_of_k_and_v(device: torch.device, k: str, v: str) -> None:
    for offsets in (False, True):
        check(device, scales=(k, v), offsets=offsets, heads=(6, 3), head_size=48, v_head_size=32, **FEW)
        check(device, scales=(k, v), offsets=offsets, **DECODE, **LATENT)
        check(device, scales=(k, v), offsets=offsets, heads=(6, 2), head_size=37, v_head_size=21, v_cache="e5m2", **FEW)


@each_mode
@pytest.mark.parametrize("scales", SCALES)
def test_scales_in_each_mode(device: torch.device, scales: str, mode: dict[str, Any]) -> None:
    for cache, v_cache in (("e4m3", None), ("e5m2", "e4m3"), ("int8", "e5m2"), ("e4m3", "int8")):
        check(device, scales=(scales, scales), cache=cache, v_cache=v_cache, **UNEVEN, **mode)


# Memory


@each_layout
def test_layouts_of_query_and_out(device: torch.device, layout: str) -> None:
    for layouts in ((layout, "contiguous", layout), ("contiguous", layout, "transposed"), (layout,) * 3):
        check(device, layouts=layouts, **FEW, **UNEVEN)
        check(device, layouts=layouts, query=torch.float32, heads=(3, 1), head_size=37, v_head_size=23, **DECODE)


@each_layout
def test_layouts_of_fp8_queries(device: torch.device, layout: str) -> None:
    check(device, layouts=(layout, "contiguous", "contiguous"), query=None, **FEW, **UNEVEN)


@each_cache_layout
def test_layouts_of_caches(device: torch.device, cache_layout: str) -> None:
    for cache, v_cache in (("e4m3", "e5m2 in uint8"), ("int8", "e4m3"), ("bf16", "e4m3"), ("e4m3", None)):
        options = {"cache": cache, "v_cache": v_cache, "cache_layout": cache_layout}
        check(device, **options, head_size=96, v_head_size=64, **DECODE)
        check(device, **options, heads=(3, 3), head_size=37, v_head_size=22, block_size=8, **FEW)


@each_layout
def test_layouts_of_all_that_is_small(device: torch.device, layout: str) -> None:
    """Tables, lengths, scales, offsets and sinks."""
    for scales in ("channel", "slot"):
        check(
            device, index_layout=layout, scale_layout=layout, scales=(scales, scales), offsets=True,
            sinks=torch.float32, starts=(3, 0, 0, 16, 2), **FEW, **UNEVEN,
        )  # fmt: skip


# What is seen


@each_kind
@each_mode
@pytest.mark.parametrize("window", [1, 17, 32, 1 << 40])
def test_windows(device: torch.device, window: int, mode: dict[str, Any], kind: dict[str, Any]) -> None:
    check(device, window=window, **mode, **kind)
    check(device, window=window, starts=(3, 5, 0, 1, 7)[: len(mode["lengths"])], block_size=4, **mode, **kind)


@each_kind
@each_mode
def test_starts(device: torch.device, mode: dict[str, Any], kind: dict[str, Any]) -> None:
    """At the beginning, in the middle, beyond the end."""
    count = len(mode["lengths"])
    for starts in ((0, 0, 0, 16, 128), (16, 1, 32, 3, 9), (37, 5, 90, 20, 130)):
        check(device, starts=starts[:count], **mode, **kind)


@each_kind
@pytest.mark.parametrize("count", [1, 3, 40])
def test_more_queries_than_tokens(device: torch.device, count: int, kind: dict[str, Any]) -> None:
    out, lse = check(device, lengths=(2, 0), queries=(count, count), **kind)
    assert not out[: max(0, count - 2)].any()
    assert not out[count:].any()
    assert lse[count:].eq(-INF).all()


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("kind", [UNEVEN, UNEVEN | {"v_cache": "e5m2"}], ids=["uneven", "mixed"])
def test_a_nan_that_is_seen_gives_nan(device: torch.device, which: int, num_splits: int, kind: dict[str, Any]) -> None:
    check_nan(device, which, num_splits=num_splits, **kind)


# The logits


@each_kind
@each_mode
@pytest.mark.parametrize("softcap", [0.3, 50.0])
def test_softcap(device: torch.device, softcap: float, mode: dict[str, Any], kind: dict[str, Any]) -> None:
    check(device, softcap=softcap, **mode, **kind)
    check(device, softcap=softcap, size=0.05, sizes=(0.05,), offsets=True, window=9, **mode, **kind)


@each_kind
@each_mode
@pytest.mark.parametrize("sinks", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sinks(device: torch.device, sinks: torch.dtype, mode: dict[str, Any], kind: dict[str, Any]) -> None:
    _, lse = check(device, sinks=sinks, softcap=2.0, offsets=True, **mode, **kind)
    assert lse.isfinite().all()
    check(device, sinks=sinks, window=3, num_splits=2, **mode, **kind)


@each_kind
@each_mode
@pytest.mark.parametrize("num_splits", [0, 1, 5, 1000])
def test_splits(device: torch.device, num_splits: int, mode: dict[str, Any], kind: dict[str, Any]) -> None:
    for problem in (Problem(**mode, **kind), Problem(**mode, **kind, window=20, softcap=3.0, sinks=torch.float32)):
        first = check(device, problem, num_splits=num_splits)
        for a, b in zip(check(device, problem, num_splits=num_splits), first, strict=True):
            assert_same_bytes(a, b)


@each_kind
@pytest.mark.parametrize("num_splits", [0, 1, 7])
def test_a_long_sequence_beside_short_ones(device: torch.device, num_splits: int, kind: dict[str, Any]) -> None:
    check(device, lengths=(1, 3000, 0, 17), num_splits=num_splits, **kind)
    check(device, lengths=(2000,), num_splits=num_splits, scales=("slot", "slot"), **kind)


@each_kind
@pytest.mark.parametrize("mode", [DECODE, FEW], ids=["decode", "few queries"])
def test_one_split_does_not_depend_on_the_batch(device: torch.device, mode: dict[str, Any], kind: dict[str, Any]) -> None:
    """Nor on bounds, nor on the width of the table."""
    problem = Problem(**mode, **kind, num_splits=1)
    (query, *caches, table), options = on(device, problem)
    whole = fp8kv.paged_attention(query, *caches, table, **options)
    row = 0
    for s, count in enumerate(problem.num_queries()):
        wide = torch.nn.functional.pad(table[s : s + 1], (0, 500), value=-1)
        alone = fp8kv.paged_attention(
            query[row : row + count], *caches, wide,
            **options | {
                "seq_lens": options["seq_lens"][s : s + 1],
                "cu_query_lens": None if problem.queries is None else int32(0, count).to(device),
                "max_seq_len": 5000,
            },
        )  # fmt: skip
        assert_same_bytes(alone, whole[row : row + count])
        row += count


@each_kind
@each_mode
def test_bounds_change_nothing(device: torch.device, mode: dict[str, Any], kind: dict[str, Any]) -> None:
    """Exact, too large, and too small."""
    for bounds in ((70, 130), (1 << 40, 1 << 40), (1, 1), (2, 16)):
        check(device, bounds=bounds, **mode, **kind)


@each_kind
@each_real
@pytest.mark.parametrize("size", [1e30, 1e4, 1e-4, 1e-30])
def test_queries_of_any_size(device: torch.device, size: float, real: torch.dtype, kind: dict[str, Any]) -> None:
    if real == torch.float16 and size in (1e30, 1e-30):
        size = {1e30: 1e4, 1e-30: 1e-3}[size]
    check(device, query=real, size=size, out=torch.float32, **FEW, **kind)


@pytest.mark.parametrize("v_cache", QUANTIZED_CACHES)
@pytest.mark.parametrize("cache", QUANTIZED_CACHES)
def test_the_largest_values_of_the_formats(device: torch.device, cache: str, v_cache: str) -> None:
    for size in (1.0, 1e-3):
        check(device, cache=cache, v_cache=v_cache, extreme=True, sizes=(size,), out=torch.float32, **DECODE, **UNEVEN)


# The Python functions


def test_without_out_there_is_a_new_tensor(device: torch.device) -> None:
    for query, expected in ((torch.float16, torch.float16), (None, torch.bfloat16)):
        tensors, options = on(device, Problem(query=query, spare_rows=(0, 0, 0), **UNEVEN))
        out = fp8kv.paged_attention(*tensors, **options)
        assert (out.shape, out.dtype, out.device) == ((1, 8, 128), expected, tensors[0].device)


def test_the_usual_scale_of_the_logits_is_that_of_k(device: torch.device) -> None:
    tensors, options = on(device, Problem(head_size=64, v_head_size=16))
    expected = fp8kv.paged_attention(*tensors, **options | {"softmax_scale": 0.125})[:1]
    assert_same_bytes(fp8kv.paged_attention(*tensors, **options | {"softmax_scale": None})[:1], expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", [
    {}, {"v_dtype": "fp8_e5m2"}, {"scales": "dynamic"}, {"dtype": "int8", "v_dtype": "fp8", "scales": "dynamic"},
    {"v_dtype": "bfloat16"}, {"dtype": "float16", "v_dtype": "fp8"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("v_head_size", [48, 64])
def test_a_cache_of_two_kinds_attends(device: torch.device, v_head_size: int, kind: dict[str, Any], layout: str) -> None:
    cache = fp8kv.PagedKVCache(6, 4, 2, 64, v_head_size=v_head_size, layout=layout, device=device, **kind)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(11, 2, size, generator=generator).to(device) for size in (64, v_head_size))
    cache.append(key, value, torch.arange(4, 15, device=device))
    table, query = torch.tensor([[1, 2, 3]]), torch.randn(1, 4, 64, generator=generator).to(device)
    out = cache.attend(query, table, [11])
    exact = torch.empty(1, 4, v_head_size, dtype=torch.float64)
    reference.paged_attention(
        query.cpu(), cache.key_cache.cpu(), cache.value_cache.cpu(), table.int(), int32(11),
        kv_cache_dtype=cache.kv_cache_dtype, v_cache_dtype=cache.v_cache_dtype, k_scale=cache.k_scale.cpu(),
        v_scale=cache.v_scale.cpu(), out=exact,
    )  # fmt: skip
    torch.testing.assert_close(out.double().cpu(), exact, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("flat", [False, True])
def test_a_step_of_a_layer(device: torch.device, flat: bool) -> None:
    """`AttentionScales.attend_step` on caches of two head sizes."""
    (query, *caches, table), options = on(device, Problem(lengths=(20, 7), scales=("tensor", "tensor"), **UNEVEN))
    query, lengths = query[:2], options["seq_lens"]
    layer = fp8kv.AttentionScales(8, 1, 192).to(device)
    layer.k_scale.copy_(options["k_scale"])
    layer.v_scale.copy_(options["v_scale"])
    out = layer.attend_step(query.flatten(1) if flat else query, (caches[0], caches[1]), table, lengths)
    assert out.shape == ((2, 8 * 128) if flat else (2, 8, 128))
    assert_same_bytes(out.view(2, 8, 128), fp8kv.paged_attention(query, *caches, table, **options))
    with pytest.raises(ValueError, match=r"out must have the shape \[num_tokens, 8, 128\] or \[num_tokens, 1024\]"):
        layer.attend_step(query, (caches[0], caches[1]), table, lengths, out=torch.empty_like(query))


def test_parts_of_a_sequence_can_be_merged(device: torch.device) -> None:
    tensors, options = on(device, Problem(lengths=(100,), query=torch.float32, **LATENT))
    lses = torch.zeros(3, 1, 12, device=device)
    tensors[0] = tensors[0][:1]
    first = fp8kv.paged_attention(*tensors, **options | {"seq_lens": int32(41).to(device)}, lse=lses[0])
    second = fp8kv.paged_attention(*tensors, **options | {"seq_starts": int32(41).to(device)}, lse=lses[1])
    whole = fp8kv.paged_attention(*tensors, **options, lse=lses[2])
    merged, lse = fp8kv.merge_attention(first, lses[0], second, lses[1])
    torch.testing.assert_close(merged, whole, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, lses[2], atol=4e-3, rtol=1e-3)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(device: torch.device) -> None:
    """V is a view of the storage of K."""
    (query, key_cache, _, table), options = on(device, Problem(**LATENT, **DECODE))

    def attend(query: Tensor, cache: Tensor) -> Tensor:
        return fp8kv.paged_attention(query[:5] * 2, cache, cache[..., :512], table, **options) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same_bytes(compiled(query, key_cache), attend(query, key_cache))


def test_the_workspace_of_a_cache_that_has_no_four_dimensions() -> None:
    query, cache, table = torch.zeros(1, 8, 64), torch.zeros(4, 16, 1, 64), torch.zeros(1, 2).int()
    assert fp8kv.attention_workspace_size(query, cache, table, value_cache=cache[..., :48]) == 0
    message = r"^attention_workspace_size: value_cache must have 4 dimensions, got 3$"
    with pytest.raises(ValueError, match=message):
        fp8kv.attention_workspace_size(query, cache, table, value_cache=cache[0])


# CUDA


@each_kind
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("mode", [DECODE, FEW], ids=["decode", "few queries"])
def test_a_workspace_of_any_contents(cuda: torch.device, mode: dict[str, Any], num_splits: int, kind: dict[str, Any]) -> None:
    (query, *caches, table), options = on(cuda, Problem(**mode, **kind, num_splits=num_splits))
    expected = fp8kv.paged_attention(query, *caches, table, **options)[:5]
    size = fp8kv.attention_workspace_size(
        query, caches[0], table, value_cache=caches[1], num_splits=num_splits, max_query_len=len(query)
    )
    for byte in (0x00, 0x7F, 0xFF):
        workspace = torch.full((size,), byte, dtype=torch.uint8, device=cuda)
        actual = fp8kv.paged_attention(query, *caches, table, **options, workspace=workspace)[:5]
        assert_same_bytes(actual, expected)


@each_kind
def test_a_captured_graph_follows_the_lengths(cuda: torch.device, kind: dict[str, Any]) -> None:
    tensors, options = on(cuda, Problem(lengths=(100, 60, 80), **kind))
    out = fp8kv.paged_attention(*tensors, **options).zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp8kv.paged_attention(*tensors, **options, out=out)
    for lengths in ((1, 60, 0), (99, 2, 17), (100, 60, 80)):
        options["seq_lens"].copy_(int32(*lengths))
        graph.replay()
        assert_same_bytes(out[:3], fp8kv.paged_attention(*tensors, **options)[:3])


# Random problems


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_seqs = draw(st.integers(0, 5))
    small = st.integers(0, 100)
    lengths = draw(st.lists(small, min_size=num_seqs, max_size=num_seqs))
    per_seq = st.lists(st.integers(0, 9), min_size=num_seqs, max_size=num_seqs)
    kv_heads = draw(st.integers(1, 4))
    group = draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16, 33, 65]))
    shared = draw(st.booleans())
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 48, 64, 80, 96, 128, 192, 256, 512, 576]))
    head_size, v_head_size = draw(sizes), draw(sizes)
    cache = draw(st.sampled_from([*CACHES]))
    v_cache = None if shared else draw(st.sampled_from([None, *CACHES]))
    query = draw(st.sampled_from([*REAL.values(), None] if cache in FP8_CACHES else [*REAL.values()]))
    return Problem(
        lengths=lengths,
        queries=draw(st.one_of(st.none(), per_seq)),
        heads=(kv_heads * group, kv_heads),
        head_size=max(head_size, v_head_size) if shared else head_size,
        v_head_size=min(head_size, v_head_size) if shared else v_head_size,
        shared=shared,
        block_size=draw(st.sampled_from([1, 2, 3, 8, 13, 16, 32, 64])),
        cache=cache,
        v_cache=v_cache,
        query=query,
        out=draw(st.sampled_from([None, *REAL.values()])),
        scales=(draw(st.sampled_from(SCALES)), draw(st.sampled_from(SCALES))),
        q_scales=draw(st.sampled_from([1, kv_heads, kv_heads * group])),
        starts=draw(st.one_of(st.none(), st.lists(small, min_size=num_seqs, max_size=num_seqs))),
        window=draw(st.one_of(st.none(), st.integers(1, 80))),
        softcap=draw(st.sampled_from([0.0, 0.5, 20.0])),
        sinks=draw(st.sampled_from([None, torch.float32] + ([query] if query else []))),
        offsets=draw(st.booleans()),
        num_splits=draw(st.integers(0, 6)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
        cache_layout=draw(st.sampled_from(CACHE_LAYOUTS)),
        index_layout=draw(st.sampled_from(LAYOUTS)),
        scale_layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 1 << 32)),
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_random_problems(device: torch.device, problem: Problem) -> None:
    check(device, replace(problem))
