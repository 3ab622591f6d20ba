"""paged_attention within its bounds of the reference in fp64; it writes its rows and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fp8kv
from attention_problems import CACHES, CPU, Problem, check, check_nan, int32, make
from fp8kv import reference
from helpers import (
    CACHE_LAYOUTS,
    FP8_CACHES,
    LAYOUTS,
    PLAIN_CACHES,
    QUANTIZED_CACHES,
    REAL,
    assert_same_bytes,
    each_cache_layout,
    each_fp8,
    each_layout,
    each_real,
    raw,
)

E4M3 = torch.float8_e4m3fn
ONE = torch.ones(1)
INF, NAN = math.inf, math.nan
SCALES = ("tensor", "head", "channel", "slot")

#: Sequences of one query.
DECODE = {"lengths": (37, 1, 0, 16, 130)}
#: Few queries each, one with more than it has tokens, one without any.
FEW = {"lengths": (40, 3, 0, 17, 9), "queries": (2, 5, 1, 8, 0)}
#: Whole prompts, and one that goes on.
PREFILL = {"lengths": (33, 5, 90), "queries": (33, 5, 70)}
MODES = {"decode": DECODE, "few queries": FEW, "prefill": PREFILL}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())

#: Query heads, KV heads, head size, block size: those of models, then odd ones.
GEOMETRIES = [
    (32, 8, 128, 16), (8, 8, 128, 16), (64, 8, 128, 16), (7, 1, 128, 16), (8, 2, 64, 16), (4, 1, 256, 16),
    (4, 2, 96, 16), (2, 1, 192, 32), (32, 1, 128, 32), (8, 4, 128, 32), (8, 1, 64, 256), (4, 4, 64, 1),
    (14, 2, 64, 16), (4, 2, 80, 16), (6, 3, 100, 13), (3, 3, 1, 1), (2, 1, 7, 16), (5, 1, 33, 3),
    (2, 2, 512, 16), (16, 1, 72, 64),
]  # fmt: skip


def geometry_of(numbers: tuple[int, int, int, int]) -> dict[str, Any]:
    return {"heads": numbers[:2], "head_size": numbers[2], "block_size": numbers[3]}


# Geometries and types


@each_mode
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry(device: torch.device, geometry: tuple[int, int, int, int], mode: dict[str, Any]) -> None:
    check(device, **geometry_of(geometry), **mode)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry_for_each_instruction_set(isa: str, geometry: tuple[int, int, int, int]) -> None:
    for cache in ("e4m3", "e5m2", "fp16"):
        check(CPU, **geometry_of(geometry), **DECODE, cache=cache)
        check(CPU, **geometry_of(geometry), **FEW, cache=cache, query=torch.float32)


@each_real
@pytest.mark.parametrize("cache", CACHES)
def test_types_of_query_and_caches(device: torch.device, cache: str, real: torch.dtype) -> None:
    check(device, cache=cache, query=real, **FEW)


@each_real
@pytest.mark.parametrize("query", [*REAL.values(), None], ids=[*REAL, "fp8"])
def test_types_of_query_and_out(device: torch.device, query: torch.dtype | None, real: torch.dtype) -> None:
    check(device, query=query, out=real, **DECODE)


@pytest.mark.parametrize("cache", FP8_CACHES)
@pytest.mark.parametrize("count", [1, 2, 6])
def test_fp8_queries(device: torch.device, count: int, cache: str) -> None:
    """With one scale, and one for each KV head or each head."""
    check(device, cache=cache, query=None, heads=(6, 2), q_scales=count, offsets=True, **FEW)


@pytest.mark.parametrize("k", SCALES)
@pytest.mark.parametrize("v", SCALES)
def test_scales_of_k_and_v(device: torch.device, k: str, v: str) -> None:
    for offsets in (False, True):
        check(device, scales=(k, v), offsets=offsets, heads=(6, 3), head_size=40, **FEW)


@each_mode
@pytest.mark.parametrize("scales", SCALES)
def test_scales_of_both_kinds_of_caches(device: torch.device, scales: str, mode: dict[str, Any]) -> None:
    for cache in ("e4m3", "e5m2", "int8"):
        check(device, scales=(scales, scales), cache=cache, heads=(8, 2), head_size=128, **mode)


@pytest.mark.parametrize("cache", PLAIN_CACHES)
def test_scales_do_not_matter_to_plain_caches(device: torch.device, cache: str) -> None:
    inputs = make(Problem(cache=cache))
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    tensors = [x.to(device) for x in (inputs.query[:1], *inputs.caches, inputs.table)]
    expected = fp8kv.paged_attention(*tensors, **options)
    options |= {"k_scale": torch.tensor([NAN], device=device), "v_scale": torch.zeros(1, device=device)}
    assert_same_bytes(fp8kv.paged_attention(*tensors, **options), expected)
    assert expected.isfinite().all()


# Memory


@each_layout
def test_layouts_of_query_and_out(device: torch.device, layout: str) -> None:
    for layouts in ((layout, "contiguous", layout), ("contiguous", layout, "transposed"), (layout,) * 3):
        check(device, layouts=layouts, **FEW)
        check(device, layouts=layouts, query=torch.float32, heads=(3, 1), head_size=37, **DECODE)


@each_layout
def test_layouts_of_fp8_queries(device: torch.device, layout: str) -> None:
    check(device, layouts=(layout, "contiguous", "contiguous"), query=None, **FEW)


@each_cache_layout
def test_layouts_of_caches(device: torch.device, cache_layout: str) -> None:
    for cache in ("e4m3", "e5m2 in uint8", "bf16"):
        check(device, cache=cache, cache_layout=cache_layout, **DECODE)
        check(device, cache=cache, cache_layout=cache_layout, heads=(3, 3), head_size=37, block_size=8, **FEW)


@each_layout
def test_layouts_of_all_that_is_small(device: torch.device, layout: str) -> None:
    """Tables, lengths, scales, offsets and sinks."""
    for scales in ("channel", "slot"):
        check(
            device, index_layout=layout, scale_layout=layout, scales=(scales, scales), offsets=True,
            sinks=torch.float32, starts=(3, 0, 0, 16, 2), **FEW,
        )  # fmt: skip


def test_k_and_v_may_be_one_tensor(device: torch.device) -> None:
    inputs = make(Problem())
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    cache, query, table = (x.to(device) for x in (inputs.caches[0], inputs.query[:1], inputs.table))
    both = fp8kv.paged_attention(query, cache, cache, table, **options)
    assert_same_bytes(both, fp8kv.paged_attention(query, cache, cache.clone(), table, **options))


@pytest.mark.parametrize("queries", [None, ()])
def test_no_sequences(device: torch.device, queries: tuple[int, ...] | None) -> None:
    check(device, lengths=(), queries=queries)


# What is seen


@each_mode
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 1 << 40])
def test_windows(device: torch.device, window: int, mode: dict[str, Any]) -> None:
    check(device, window=window, **mode)
    check(device, window=window, starts=(3, 5, 0, 1, 7)[: len(mode["lengths"])], block_size=4, **mode)


@each_mode
def test_starts(device: torch.device, mode: dict[str, Any]) -> None:
    """At the beginning, in the middle, beyond the end."""
    count = len(mode["lengths"])
    for starts in ((0, 0, 0, 16, 128), (16, 1, 32, 3, 9), (37, 5, 90, 20, 130)):
        check(device, starts=starts[:count], **mode)


@pytest.mark.parametrize("queries", range(2, 9))
def test_few_queries(device: torch.device, queries: int) -> None:
    check(device, lengths=(50, 16, queries, queries - 1), queries=(queries,) * 4, heads=(8, 2))


@pytest.mark.parametrize("count", [1, 3, 17, 40])
def test_more_queries_than_tokens(device: torch.device, count: int) -> None:
    out, lse = check(device, lengths=(2, 0), queries=(count, count))
    assert not out[: max(0, count - 2)].any()
    assert not out[count:].any()
    assert lse[count:].eq(-INF).all()


@each_fp8
@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_a_nan_that_is_seen_gives_nan(device: torch.device, which: int, num_splits: int, fp8: torch.dtype) -> None:
    check_nan(device, which, cache="e4m3" if fp8 == E4M3 else "e5m2", num_splits=num_splits)


# The logits


@each_mode
@pytest.mark.parametrize("softcap", [0.3, 5.0, 50.0])
def test_softcap(device: torch.device, softcap: float, mode: dict[str, Any]) -> None:
    check(device, softcap=softcap, **mode)
    check(device, softcap=softcap, size=0.05, sizes=(0.05,), offsets=True, window=9, **mode)


@each_mode
@pytest.mark.parametrize("sinks", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sinks(device: torch.device, sinks: torch.dtype, mode: dict[str, Any]) -> None:
    _, lse = check(device, sinks=sinks, softcap=2.0, offsets=True, **mode)
    assert lse.isfinite().all()
    check(device, sinks=sinks, window=3, num_splits=2, **mode)


@each_real
def test_sinks_of_the_type_of_the_query(device: torch.device, real: torch.dtype) -> None:
    check(device, query=real, sinks=real)


@each_mode
@pytest.mark.parametrize("num_splits", [0, 1, 2, 5, 1000])
def test_splits(device: torch.device, num_splits: int, mode: dict[str, Any]) -> None:
    for problem in (Problem(**mode), Problem(**mode, window=20, softcap=3.0, sinks=torch.float32)):
        first = check(device, problem, num_splits=num_splits)
        for a, b in zip(check(device, problem, num_splits=num_splits), first, strict=True):
            assert_same_bytes(a, b)


@pytest.mark.parametrize("num_splits", [0, 1, 2, 7])
def test_a_long_sequence_beside_short_ones(device: torch.device, num_splits: int) -> None:
    check(device, lengths=(1, 3000, 0, 17), num_splits=num_splits, heads=(8, 2))


@pytest.mark.parametrize("mode", [DECODE, FEW], ids=["decode", "few queries"])
def test_one_split_does_not_depend_on_the_batch(device: torch.device, mode: dict[str, Any]) -> None:
    """Nor on bounds, nor on the width of the table."""
    problem = Problem(**mode, num_splits=1)
    inputs = make(problem)
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    query, *caches = (x.to(device) for x in (inputs.query, *inputs.caches))
    whole = fp8kv.paged_attention(query, *caches, inputs.table.to(device), **options)
    row = 0
    for s, count in enumerate(problem.num_queries()):
        wide = torch.nn.functional.pad(inputs.table[s : s + 1], (0, 500), value=-1).to(device)
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


@each_mode
def test_bounds_change_nothing(device: torch.device, mode: dict[str, Any]) -> None:
    """Exact, too large, and too small."""
    for bounds in ((70, 130), (1000, 10**6), (1 << 40, 1 << 40), (1, 1), (2, 16)):
        check(device, bounds=bounds, **mode)


# Sizes of the numbers


@each_mode
@each_real
@pytest.mark.parametrize("size", [1e30, 1e4, 1e-4, 1e-30])
def test_queries_of_any_size(device: torch.device, size: float, real: torch.dtype, mode: dict[str, Any]) -> None:
    if real == torch.float16 and size in (1e30, 1e-30):
        size = {1e30: 1e4, 1e-30: 1e-3}[size]
    check(device, query=real, size=size, out=torch.float32, **mode)


def test_heads_of_queries_of_different_sizes(device: torch.device) -> None:
    for cache in ("e4m3", "e5m2", "int8"):
        check(device, cache=cache, sizes=(1e-20, 1e-3, 1.0, 30.0), **DECODE)
        check(device, cache=cache, sizes=(1e-20, 0.0, 1.0, 3.0), query=torch.float32, **FEW)


@pytest.mark.parametrize("cache", QUANTIZED_CACHES)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_largest_values_of_the_format(device: torch.device, size: float, cache: str) -> None:
    check(device, cache=cache, extreme=True, sizes=(size,), **DECODE)
    check(device, cache=cache, extreme=True, sizes=(size,), out=torch.float32, **PREFILL)


def test_large_logits(device: torch.device) -> None:
    """One token takes all the weight, wherever it is."""
    key = torch.zeros(64, 64, 1, 16)  # block s belongs to sequence s
    key[:, :, 0, 0] = torch.eye(64)
    value = torch.arange(64.0).expand(64, 64).reshape(64, 64, 1, 1).expand(64, 64, 1, 16)
    query = torch.zeros(64, 1, 16, dtype=torch.bfloat16, device=device)
    query[:, 0, 0] = 300.0
    caches = [x.to(E4M3).to(device) for x in (key, value)]
    table = torch.arange(64, dtype=torch.int32, device=device)[:, None]
    one = ONE.to(device)
    lengths = torch.full((64,), 64, dtype=torch.int32, device=device)
    for num_splits in (0, 1, 4):
        out = fp8kv.paged_attention(
            query, *caches, table, lengths, k_scale=one, v_scale=one, softmax_scale=1.0, num_splits=num_splits
        )
        assert torch.equal(out[:, 0, 3].cpu().float(), torch.arange(64.0).to(E4M3).float())


# The Python function


def test_without_out_there_is_a_new_tensor(device: torch.device) -> None:
    for query, expected in (
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (None, torch.bfloat16),
    ):
        inputs = make(Problem(query=query, spare_rows=(0, 0, 0)))
        options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
        tensors = [x.to(device) for x in (inputs.query, *inputs.caches, inputs.table)]
        out = fp8kv.paged_attention(*tensors, **options)
        assert (out.shape, out.dtype, out.device) == (inputs.query.shape, expected, tensors[0].device)
        given = torch.empty_like(out)
        assert fp8kv.paged_attention(*tensors, **options, out=given) is given
        assert_same_bytes(given, out)


def test_the_usual_scale_of_the_logits(device: torch.device) -> None:
    inputs = make(Problem(head_size=64))
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    tensors = [x.to(device) for x in (inputs.query[:1], *inputs.caches, inputs.table)]
    expected = fp8kv.paged_attention(*tensors, **options | {"softmax_scale": 0.125})
    assert_same_bytes(fp8kv.paged_attention(*tensors, **options | {"softmax_scale": None}), expected)


CHANNELS = torch.linspace(0.01, 0.1, 128).view(2, 64)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", [
    {}, {"scales": "dynamic"}, {"dtype": "fp8_e5m2", "scales": "dynamic"}, {"dtype": "bfloat16"},
    {"dtype": "float32"},
    {"dtype": "int8", "scales": SimpleNamespace(k=CHANNELS, v=CHANNELS)},
    {"scales": "dynamic", "k_offset": -CHANNELS, "v_offset": CHANNELS},
], ids=["fp8", "dynamic", "e5m2 dynamic", "bfloat16", "float32", "int8 per channel", "offsets"])  # fmt: skip
def test_the_cache_supplies_what_is_its_own(device: torch.device, kind: dict[str, Any], layout: str) -> None:
    cache = fp8kv.PagedKVCache(6, 4, 2, 64, layout=layout, device=device, **kind)
    key, value = torch.randn(2, 11, 2, 64, generator=torch.Generator().manual_seed(0)).to(device)
    cache.append(key, value, torch.arange(4, 15, device=device))
    table = torch.tensor([[1, 2, 3], [2, 0, 0]])
    query = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(device)
    lse = torch.zeros(5, 4, device=device)
    options = {"softcap": 3.0, "sliding_window": 5}
    out = cache.attend(query, table, [11, 2], cu_query_lens=[0, 3, 5], lse=lse, seq_starts=[1, 0], **options)
    exact, exact_lse = torch.empty(5, 4, 64, dtype=torch.float64), torch.empty(5, 4, dtype=torch.float64)
    reference.paged_attention(
        query.cpu(), cache.key_cache.cpu(), cache.value_cache.cpu(), table.int(), int32(11, 2),
        kv_cache_dtype=cache.kv_cache_dtype, k_scale=cache.k_scale.cpu(), v_scale=cache.v_scale.cpu(),
        cu_query_lens=int32(0, 3, 5), seq_starts=int32(1, 0), out=exact, lse=exact_lse, **options,
        k_offset=kind.get("k_offset"), v_offset=kind.get("v_offset"),
    )  # fmt: skip
    torch.testing.assert_close(out.double().cpu(), exact, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(lse.double().cpu(), exact_lse, atol=3e-3, rtol=6e-4)
    on_device = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([11, 2], [0, 3, 5], [1, 0])]
    again = cache.attend(
        query, table.to(device, torch.int32), on_device[0], cu_query_lens=on_device[1],
        seq_starts=on_device[2], **options, out=torch.empty_like(out),
    )  # fmt: skip
    assert_same_bytes(again, out)


def test_attend_refuses_indices_that_are_not_integers() -> None:
    cache = fp8kv.PagedKVCache(6, 4, 2, 64)
    with pytest.raises(ValueError, match=r"^PagedKVCache\.attend: seq_lens must be integers, got float32$"):
        cache.attend(torch.ones(1, 2, 64), torch.tensor([[1]]), torch.ones(1))
    with pytest.raises(ValueError, match=r"^PagedKVCache\.attend: block_table must be integers, got bool$"):
        cache.attend(torch.ones(1, 2, 64), torch.tensor([[True]]), [1])


def test_parts_of_a_sequence_can_be_merged(device: torch.device) -> None:
    inputs = make(Problem(lengths=(100,), sinks=None))
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    tensors = [x.to(device) for x in (inputs.query[:1].float(), *inputs.caches, inputs.table)]
    lses = torch.zeros(3, 1, 4, device=device)
    first = fp8kv.paged_attention(*tensors, **options | {"seq_lens": int32(41).to(device)}, lse=lses[0])
    second = fp8kv.paged_attention(*tensors, **options | {"seq_starts": int32(41).to(device)}, lse=lses[1])
    whole = fp8kv.paged_attention(*tensors, **options, lse=lses[2])
    weights = (lses[:2] - lses[2]).exp().unsqueeze(-1)
    torch.testing.assert_close(first * weights[0] + second * weights[1], whole, atol=1e-2, rtol=1e-2)


# Indices out of range


@pytest.mark.parametrize(
    "changes",
    [
        {"table": (0, 1, 6)},
        {"table": (2, 0, -1)},
        {"seq_lens": int32(37, -1, 0)},
        {"seq_lens": int32(1 << 30, 1, 0)},
        {"cu_query_lens": int32(1, 1, 2, 3)},
        {"cu_query_lens": int32(0, 2, 1, 3)},
        {"cu_query_lens": int32(0, 1, 2, 1 << 30)},
        {"seq_starts": int32(0, -1, 0)},
    ],
    ids=str,
)
def test_indices_out_of_range(device: torch.device, changes: dict[str, Any]) -> None:
    """They raise on the CPU before anything is written; on CUDA such positions are not seen."""
    inputs = make(Problem(lengths=(37, 1, 40), queries=(1, 1, 1)))
    if "table" in changes:
        s, entry, block = changes["table"]
        inputs.table[s, entry] = block if block < 0 else len(inputs.caches[0]) + block
    options = inputs.options | {k: x for k, x in changes.items() if k != "table"}
    out = torch.full((4, 4, 64), 7.0, device=device)
    tensors = [x.to(device) for x in (inputs.query, *inputs.caches, inputs.table)]
    at = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"^fp8kv::paged_attention: (block_table|seq_|cu_query_lens|query|out)"):
            fp8kv.paged_attention(*tensors, **at, out=out)
        assert out.unique().tolist() == [7.0]
        return
    fp8kv.paged_attention(*tensors, **at, out=out)
    expected = torch.full((4, 4, 64), 7.0, device=device)
    reference.paged_attention(*tensors, **at, out=expected)
    once = [0, 2, 3] if "cu_query_lens" in changes else [0, 1, 2, 3]  # row 1 may be of two sequences
    # Behind the end of a sequence lies NaN, which a length beyond the table makes visible.
    torch.testing.assert_close(out[once], expected[once], atol=1e-2, rtol=1e-2, equal_nan=True)
    assert bool(expected[once].isnan().any()) == (options["seq_lens"].max() > 40)


# CUDA


def test_a_captured_graph_follows_the_lengths(cuda: torch.device) -> None:
    """Lengths and tables are read when the graph is replayed."""
    inputs = make(Problem(lengths=(100, 60, 80)))
    options = {k: x.to(cuda) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    tensors = [x.to(cuda) for x in (inputs.query, *inputs.caches, inputs.table)]
    out = torch.zeros(4, 4, 64, dtype=torch.bfloat16, device=cuda)
    fp8kv.paged_attention(*tensors, **options, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp8kv.paged_attention(*tensors, **options, out=out)
    for lengths in ((1, 60, 0), (99, 2, 17), (100, 60, 80)):
        options["seq_lens"].copy_(int32(*lengths))
        graph.replay()
        assert_same_bytes(out[:3], fp8kv.paged_attention(*tensors, **options)[:3])


def test_nothing_waits_for_the_gpu(cuda: torch.device) -> None:
    inputs = make(Problem(**FEW))
    options = {k: x.to(cuda) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
    tensors = [x.to(cuda) for x in (inputs.query, *inputs.caches, inputs.table)]
    expected = fp8kv.paged_attention(*tensors, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = fp8kv.paged_attention(*tensors, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bytes(out[:16], expected[:16])


# torch.compile


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", [{}, {"scales": "dynamic"}, {"dtype": "bfloat16"}], ids=str)
def test_compiled_step_of_a_layer(device: torch.device, kind: dict[str, str], backend: str) -> None:
    """Append, then attend: the graph must not read the cache before it is written."""
    caches = [fp8kv.PagedKVCache(4, 4, 2, 16, device=device, **kind) for _ in range(2)]
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)

    def step(cache: fp8kv.PagedKVCache, x: Tensor, slots: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.zeros(2, 4, device=x.device)
        query, key, value = (x * 2).view(2, 8, 16).split((4, 2, 2), 1)
        cache.append(key, value, slots)
        return cache.attend(query, table, lengths, lse=lse, softcap=5.0) + 1, lse

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for n in (1, 2, 6):
        x = torch.randn(2, 128, generator=torch.Generator().manual_seed(n)).to(device, torch.bfloat16)
        arguments = (x, torch.tensor([n - 1, n + 7], device=device), int32(n, n).to(device))
        for a, b in zip(compiled(caches[0], *arguments), step(caches[1], *arguments), strict=True):
            assert_same_bytes(a, b)
    assert raw(caches[0].storage).any()


# Random problems


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_seqs = draw(st.integers(0, 5))
    small = st.integers(0, 70)
    lengths = draw(st.lists(small, min_size=num_seqs, max_size=num_seqs))
    per_seq = st.lists(st.integers(0, 12), min_size=num_seqs, max_size=num_seqs)
    kv_heads = draw(st.integers(1, 4))
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16]))
    cache = draw(st.sampled_from([*CACHES]))
    query = draw(st.sampled_from([*REAL.values(), None] if cache in FP8_CACHES else [*REAL.values()]))
    return Problem(
        lengths=lengths,
        queries=draw(st.one_of(st.none(), per_seq)),
        heads=(kv_heads * group, kv_heads),
        head_size=draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 96, 128, 192, 256]))),
        block_size=draw(st.sampled_from([1, 2, 3, 8, 13, 16, 32, 64])),
        cache=cache,
        query=query,
        out=draw(st.sampled_from([None, *REAL.values()])),
        scales=(draw(st.sampled_from(SCALES)), draw(st.sampled_from(SCALES))),
        q_scales=draw(st.sampled_from([1, kv_heads, kv_heads * group])),
        starts=draw(st.one_of(st.none(), st.lists(small, min_size=num_seqs, max_size=num_seqs))),
        window=draw(st.one_of(st.none(), st.integers(1, 80))),
        softcap=draw(st.sampled_from([0.0, 0.5, 20.0])),
        sinks=draw(st.sampled_from([None, torch.float32] + ([query] if query else []))),
        offsets=cache in QUANTIZED_CACHES and draw(st.booleans()),
        num_splits=draw(st.integers(0, 6)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
        cache_layout=draw(st.sampled_from(CACHE_LAYOUTS)),
        index_layout=draw(st.sampled_from(LAYOUTS)),
        scale_layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 1 << 32)),
    )


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_random_problems(device: torch.device, problem: Problem) -> None:
    check(device, replace(problem))
