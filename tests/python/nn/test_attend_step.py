"""`AttentionScales.attend_step`: attention of the queries of `append_step` to the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_problems import assert_near
from fp8kv import AttentionScales, PagedKVCache, reference
from helpers import assert_same_bytes, each_fp8, each_strategy

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 8, 2, 64
SIZES = [NUM_HEADS * HEAD_SIZE, NUM_KV_HEADS * HEAD_SIZE, NUM_KV_HEADS * HEAD_SIZE]
E4M3 = torch.float8_e4m3fn
#: Two sequences, of 5 and 3 tokens, in blocks 2, 0 and 1.
TABLE = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
SLOTS = [
    torch.tensor([8, 4]),
    torch.tensor([9, 5]),
    torch.tensor([10, 6]),
    torch.tensor([11, -1]),
    torch.tensor([0, -1]),
]
LENGTHS = torch.tensor([5, 3], dtype=torch.int32)


def layer(strategy: str = "tensor", dtype: torch.dtype = E4M3) -> AttentionScales:
    scales = AttentionScales(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, strategy=strategy, dtype=dtype)
    for name, start in (("q_scale", 0.01), ("k_scale", 0.02), ("v_scale", 0.03)):
        buffer = getattr(scales, name)
        buffer.copy_(start * torch.arange(1, buffer.numel() + 1))
    return scales


def qkv(step: int) -> list[Tensor]:
    """Flat rows of query, key and value for both sequences."""
    rows = torch.randn(2, sum(SIZES), generator=torch.Generator().manual_seed(step)).bfloat16()
    return list(rows.split(SIZES, dim=-1))


def new_cache(dtype: Any = "fp8", **options: Any) -> PagedKVCache:
    return PagedKVCache(3, 4, NUM_KV_HEADS, HEAD_SIZE, dtype=dtype, **options)


def append(scales: AttentionScales, cache: Any, **options: Any) -> Tensor:
    """All steps; the queries of the last one."""
    for step, slots in enumerate(SLOTS):
        query = scales.append_step(*qkv(step), cache, slots, **options)
    return query


def expected(scales: AttentionScales, name: str, real_query: bool = False, **options: Any) -> Tensor:
    """From the reference alone: ``[2, NUM_HEADS, HEAD_SIZE]``."""
    caches = torch.zeros(2, 3, 4, NUM_KV_HEADS, HEAD_SIZE).to(scales.dtype)
    for step, slots in enumerate(SLOTS):
        query, key, value = (x.unflatten(1, (-1, HEAD_SIZE)) for x in qkv(step))
        reference.reshape_and_cache_flash(key, value, *caches, slots, name, scales.k_scale, scales.v_scale)
    if not real_query:
        groups = query.unflatten(1, (scales.q_scale.numel(), -1)).float() / scales.q_scale.view(1, -1, 1, 1)
        query = reference.encode(groups, scales.dtype).flatten(1, 2)
        options["q_scale"] = scales.q_scale
    out = torch.empty(query.shape, dtype=torch.float64)
    return reference.paged_attention(
        query, *caches, TABLE, LENGTHS, kv_cache_dtype=name, k_scale=scales.k_scale, v_scale=scales.v_scale,
        out=out, **options,
    )  # fmt: skip


@each_fp8
@each_strategy
@pytest.mark.parametrize("kind", ["PagedKVCache", "HND", "pair", "bytes"])
def test_a_step_of_fp8_queries(kind: str, strategy: str, fp8: torch.dtype) -> None:
    scales, cache = layer(strategy, fp8), new_cache(fp8, layout="HND" if kind == "HND" else "NHD")
    pair = cache.key_cache, cache.value_cache
    given = {"pair": pair, "bytes": tuple(x.view(torch.uint8) for x in pair)}.get(kind, cache)
    out = scales.attend_step(append(scales, given), given, TABLE, LENGTHS)
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, SIZES[0])
    name = "fp8_e4m3" if fp8 == E4M3 else "fp8_e5m2"
    assert_near(out.view(2, NUM_HEADS, HEAD_SIZE), expected(scales, name), torch.full((2, NUM_HEADS), 4.0))


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
def test_queries_that_stay_in_16_bits(dtype: str) -> None:
    """Without `q_scale`, and in a cache of 16 bits without any scale."""
    scales, cache = layer(), new_cache(dtype)
    query = append(scales, cache, out=torch.empty(2, NUM_HEADS, HEAD_SIZE, dtype=torch.bfloat16))
    assert_same_bytes(query, qkv(4)[0].view(2, NUM_HEADS, HEAD_SIZE))
    out = scales.attend_step(query, cache, TABLE, LENGTHS)
    assert out.shape == (2, NUM_HEADS, HEAD_SIZE)
    if dtype == "fp8":
        wanted = expected(scales, "fp8", real_query=True)
    else:
        one = torch.ones(1)
        wanted = reference.paged_attention(
            query, cache.key_cache, cache.value_cache, TABLE, LENGTHS, kv_cache_dtype=dtype, k_scale=one,
            v_scale=one, out=torch.empty(query.shape, dtype=torch.float64),
        )  # fmt: skip
    assert_near(out, wanted, torch.full((2, NUM_HEADS), 4.0))


def test_all_options_reach_the_operator() -> None:
    scales, cache = layer("attn_head"), new_cache()
    query = append(scales, cache)
    options: dict[str, Any] = {
        "softmax_scale": 0.3,
        "seq_starts": torch.tensor([0, 1], dtype=torch.int32),
        "sliding_window": 4,
        "softcap": 2.0,
        "sinks": torch.linspace(-1, 1, NUM_HEADS),
        "cu_query_lens": torch.tensor([0, 1, 2], dtype=torch.int32),
    }
    lse, out = torch.zeros(2, NUM_HEADS), torch.zeros(2, SIZES[0], dtype=torch.float32)
    more = {"max_query_len": 1, "max_seq_len": 8, "num_splits": 1, "lse": lse}
    assert scales.attend_step(query, cache, TABLE, LENGTHS, out=out, **options, **more) is out
    wanted_lse = torch.zeros(2, NUM_HEADS)
    wanted = expected(scales, "fp8", **options, lse=wanted_lse)
    assert_near(out.view(2, NUM_HEADS, HEAD_SIZE), wanted, torch.full((2, NUM_HEADS), 4.0))
    torch.testing.assert_close(lse, wanted_lse, atol=3e-3, rtol=1e-3)
    for name in options.keys() - {"cu_query_lens"}:  # all of them affect the result
        others = {other: x for other, x in options.items() if other != name}
        assert (expected(scales, "fp8", **others) - wanted).abs().max() > 0.01, name


def test_a_paged_cache_is_read_with_the_scales_that_it_was_written_with() -> None:
    """The module's scales only once it has appended to the cache."""
    scales, cache = layer(), new_cache()
    key = torch.ones(1, NUM_KV_HEADS, HEAD_SIZE)
    cache.append(key, 2 * key, torch.tensor([0]))
    query = torch.ones(1, NUM_HEADS, HEAD_SIZE)
    table, length = torch.tensor([[0]]).int(), torch.tensor([1]).int()
    assert scales.attend_step(query, cache, table, length).unique().tolist() == [2.0]
    scales.update_cache(key, 0.03 * key, cache, torch.tensor([0]))
    out = scales.attend_step(query, cache, table, length)
    torch.testing.assert_close(out, torch.full_like(out, 0.03))


def test_scales_that_change_in_place_are_used_at_the_next_step() -> None:
    scales, cache = layer(), new_cache()
    query = append(scales, cache)
    before = scales.attend_step(query, cache, TABLE, LENGTHS)
    scales.v_scale.mul_(2)
    assert_same_bytes(scales.attend_step(query, cache, TABLE, LENGTHS), 2 * before)


class Called(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_nothing_is_read_on_the_host_and_only_the_result_is_allocated(flat: bool) -> None:
    """So a CUDA graph can capture a step as soon as there are CUDA kernels."""
    scales, cache = layer("attn_head"), new_cache()
    query = append(scales, cache)
    query = query if flat else query.view(2, NUM_HEADS, HEAD_SIZE)
    with Called() as called:
        out = scales.attend_step(query, cache, TABLE, LENGTHS)
    no_views = [name for name in called.names if "view" not in name]
    assert no_views == ["aten.empty.memory_format", "fp8kv.paged_attention.default"]
    with Called() as called:
        scales.attend_step(query, cache, TABLE, LENGTHS, out=out)
    assert [name for name in called.names if "view" not in name] == ["fp8kv.paged_attention.default"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_step_compiled(backend: str) -> None:
    """Append, then attend: in one graph, which serves all lengths."""
    scales = layer("attn_head")
    caches = [new_cache(), new_cache()]

    def step(cache: PagedKVCache, query: Tensor, key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        query = scales.append_step(query, key, value, cache, slots)
        return scales.attend_step(query, cache, TABLE, lengths)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for number, slots in enumerate(SLOTS):
        lengths = torch.tensor([number + 1, min(number + 1, 3)], dtype=torch.int32)
        results = [f(cache, *qkv(number), slots, lengths) for f, cache in zip((compiled, step), caches, strict=True)]
        assert_same_bytes(*results)
    assert_same_bytes(caches[0].storage, caches[1].storage)
    assert_near(results[0].view(2, NUM_HEADS, HEAD_SIZE), expected(scales, "fp8"), torch.full((2, NUM_HEADS), 4.0))


QUERY = torch.zeros(2, SIZES[0], dtype=E4M3)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"query": torch.zeros(2, 100)},
            ValueError,
            "AttentionScales.attend_step: query must have the shape [num_tokens, 8, 64] or [num_tokens, 512]",
        ),
        (
            {"out": torch.zeros(2, 100)},
            ValueError,
            "AttentionScales.attend_step: out must have the shape [num_tokens, 8, 64] or [num_tokens, 512]",
        ),
        (
            {"cache": new_cache(scales="dynamic")},
            ValueError,
            "AttentionScales.attend_step: cache must take the scales of this module, got a dynamic",
        ),
        (
            {"seq_lens": LENGTHS.long()},
            RuntimeError,
            "fp8kv::paged_attention: seq_lens must be int32, got int64",
        ),
        (
            {"query": QUERY.to(torch.float8_e5m2)},
            RuntimeError,
            "fp8kv::paged_attention: query must be float8_e4m3fn",
        ),
        ({"cache": new_cache("bfloat16")}, RuntimeError, "fp8kv::paged_attention: "),
    ],
    ids=["query", "out", "dynamic", "indices", "another format", "fp8 query of a plain cache"],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], error: type[Exception], sentence: str) -> None:
    usual = {"query": QUERY, "cache": new_cache(), "block_table": TABLE, "seq_lens": LENGTHS}
    with pytest.raises(error) as caught:
        layer().attend_step(**usual | changes)
    assert str(caught.value).startswith(sentence)
