"""The specification of attention against PyTorch's own in fp64, and against tables written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fp8kv import reference
from helpers import FP8, each_fp8, sentinels

ONE = torch.ones(1)
INF, NAN = math.inf, math.nan


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def paged(x: Tensor, block_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [positions, heads, ...] in blocks in a random order, one of them unused, and the block table."""
    used = -(-len(x) // block_size)
    table = torch.randperm(used + 1, generator=torch.Generator().manual_seed(seed))[:used]
    cache = torch.zeros((used + 1) * block_size, *x.shape[1:], dtype=x.dtype)
    position = torch.arange(len(x))
    integers = cache.view(torch.uint8) if x.dtype in FP8.values() else cache
    integers[table[position // block_size] * block_size + position % block_size] = x.view(integers.dtype)
    return cache.unflatten(0, (used + 1, block_size)), table.to(torch.int32)[None]


def attend(query: Tensor, key: Tensor, value: Tensor, block_size: int = 4, **options: Any) -> Tensor:
    """All rows of `query` belong to the one sequence of K and V, whose scales are 1 unless given."""
    (key_cache, table), (value_cache, _) = paged(key, block_size), paged(value, block_size)
    names = {FP8["e4m3"]: "fp8", FP8["e5m2"]: "fp8_e5m2", torch.int8: "int8"}
    name, v_name = (names.get(x.dtype, "auto") for x in (key, value))
    out = torch.empty(*query.shape[:2], value.shape[2], dtype=torch.float64)
    options = {"k_scale": ONE, "v_scale": ONE, "cu_query_lens": int32(0, len(query)), "out": out} | options
    return reference.paged_attention(
        query, key_cache, value_cache, table, int32(len(key)), kv_cache_dtype=name,
        v_cache_dtype=None if value.dtype == key.dtype else v_name, **options,
    )  # fmt: skip


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's attention of tokens [length, heads, head_size], in fp64."""
    q, k, v = (x.double().transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def causal(queries: int, tokens: int) -> Tensor:
    """The last query sees the last token."""
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# PyTorch's attention


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (32, 1)], ids=str)
@pytest.mark.parametrize("head_size", [1, 7, 64])
def test_one_query_sees_everything(heads: tuple[int, int], head_size: int) -> None:
    query, key, value = (
        random(n, h, head_size, seed=n) for n, h in zip((1, 13, 13), (heads[0], heads[1], heads[1]), strict=True)
    )
    value = value.flip(0)
    assert_near(attend(query, key, value), dense(query, key, value))


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (2, 2), (9, 9), (2, 9), (5, 6), (12, 40)])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_last_query_is_the_last_token(queries: int, tokens: int, block_size: int) -> None:
    query, key, value = random(queries, 4, 8), random(tokens, 2, 8), random(tokens, 2, 8, seed=1)
    actual = attend(query, key, value, block_size)
    assert_near(actual, dense(query, key, value, causal(queries, tokens)))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 100])
def test_a_window_counts_the_token_itself(window: int) -> None:
    query, key, value = random(3, 4, 8), random(9, 2, 8), random(9, 2, 8, seed=1)
    mask = causal(3, 9) & ~torch.ones(3, 9, dtype=torch.bool).tril(6 - window)
    assert mask.sum(1).tolist() == [min(window, n) for n in (7, 8, 9)]
    assert_near(attend(query, key, value, sliding_window=window), dense(query, key, value, mask))


def test_a_sequence_may_start_later() -> None:
    query, key, value = random(3, 4, 8), random(9, 2, 8), random(9, 2, 8, seed=1)
    mask = causal(3, 9)
    mask[:, :5] = False
    assert_near(attend(query, key, value, seq_starts=int32(5)), dense(query, key, value, mask))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_the_scale_of_the_logits(scale: float) -> None:
    query, key, value = random(2, 4, 8), random(5, 2, 8), random(5, 2, 8, seed=1)
    expected = dense(query, key, value, causal(2, 5), scale=scale)
    assert_near(attend(query, key, value, softmax_scale=scale), expected)


@each_fp8
@pytest.mark.parametrize("kind", ["tensor", "head", "channel", "slot"])
def test_scales_and_offsets(fp8: torch.dtype, kind: str) -> None:
    query, key, value = random(3, 4, 8), random(9, 2, 8).to(fp8), random(9, 2, 8, seed=1).to(fp8)
    shape = {"tensor": (1, 1, 1), "head": (1, 2, 1), "channel": (1, 2, 8), "slot": (9, 2, 1)}[kind]
    k_scale, v_scale = random(*shape).exp(), random(*shape, seed=1).exp()
    k_offset, v_offset = random(2, 8), random(2, 8, seed=1)
    given = {
        "tensor": lambda scale: scale.view(1),
        "head": lambda scale: scale.view(2),
        "channel": lambda scale: scale.view(2, 8),
        "slot": lambda scale: paged(scale.view(9, 2), 4)[0],
    }[kind]
    k = key.double() * k_scale.double()
    v = value.double() * v_scale.double()
    options = {"k_scale": given(k_scale), "v_scale": given(v_scale)}
    assert_near(attend(query, key, value, **options), dense(query, k, v, causal(3, 9)))
    expected = dense(query, k + k_offset.double(), v + v_offset.double(), causal(3, 9))
    actual = attend(query, key, value, **options, k_offset=k_offset, v_offset=v_offset)
    assert_near(actual, expected)


@each_fp8
@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_fp8_query(fp8: torch.dtype, count: int) -> None:
    """Neighboring heads share a scale."""
    query, key, value = random(3, 4, 8).to(fp8), random(9, 2, 8).to(fp8), random(9, 2, 8, seed=1).to(fp8)
    q_scale = random(count).exp()
    q = query.double() * torch.stack([q_scale[h * count // 4] for h in range(4)]).double().view(1, 4, 1)
    offset = random(2, 8)
    actual = attend(query, key, value, q_scale=q_scale, k_offset=offset)
    assert_near(actual, dense(q, key.double() + offset.double(), value, causal(3, 9)))


@pytest.mark.parametrize(("k_size", "v_size"), [(24, 16), (8, 13), (1, 5)])
def test_two_head_sizes(k_size: int, v_size: int) -> None:
    query, key, value = random(3, 4, k_size), random(9, 2, k_size), random(9, 2, v_size)
    assert_near(attend(query, key, value), dense(query, key, value, causal(3, 9)))
    key, value = key.to(FP8["e4m3"]), value.to(FP8["e4m3"])
    scale, offset = random(2, v_size).exp(), random(2, v_size, seed=1)
    expected = dense(query, key, value.double() * scale.double() + offset.double(), causal(3, 9))
    assert_near(attend(query, key, value, v_scale=scale, v_offset=offset), expected)


@pytest.mark.parametrize("k_dtype", [FP8["e4m3"], torch.int8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("v_dtype", [FP8["e5m2"], torch.int8, torch.bfloat16], ids=str)
def test_two_dtypes(k_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    query, key, value = random(3, 4, 8), (3 * random(9, 2, 8)).to(k_dtype), (3 * random(9, 2, 6)).to(v_dtype)
    k_scale, v_scale = random(2).exp(), random(2, seed=1).exp()
    k, v = (
        x.double() * scale.double().view(1, 2, 1) if x.dtype.itemsize == 1 else x
        for x, scale in ((key, k_scale), (value, v_scale))
    )
    actual = attend(query, key, value, k_scale=k_scale, v_scale=v_scale)
    assert_near(actual, dense(query, k, v, causal(3, 9)))


def test_a_batch_of_all_kinds_of_sequences() -> None:
    """Empty ones, one without queries, rows beyond the last that stay as they are."""
    lengths, queries = [7, 0, 3, 12, 5], [2, 0, 0, 12, 1]
    sums = [0, 2, 2, 2, 14, 15]
    keys = [random(n, 2, 8, seed=n) for n in lengths]
    values = [random(n, 2, 8, seed=n + 1) for n in lengths]
    query = random(18, 4, 8)
    key_cache, table = paged(torch.cat([torch.cat([k, torch.zeros(-len(k) % 4, 2, 8)]) for k in keys]), 4)
    value_cache, _ = paged(torch.cat([torch.cat([v, torch.zeros(-len(v) % 4, 2, 8)]) for v in values]), 4)
    blocks = table[0].split([-(-n // 4) for n in lengths])
    tables = torch.stack([torch.cat([b, torch.full((3 - len(b),), -5).int()]) for b in blocks])
    out = sentinels((18, 4, 8), torch.float64, torch.device("cpu"))
    before = out.clone()
    reference.paged_attention(
        query, key_cache, value_cache, tables, int32(*lengths), kv_cache_dtype="auto", k_scale=ONE,
        v_scale=ONE, cu_query_lens=int32(*sums), out=out,
    )  # fmt: skip
    for s, count in enumerate(queries):
        rows = slice(sums[s], sums[s + 1])
        if count:
            assert_near(out[rows], dense(query[rows], keys[s], values[s], causal(count, lengths[s])))
    assert torch.equal(out[15:].view(torch.int64), before[15:].view(torch.int64))


def test_without_sums_each_sequence_has_one_query() -> None:
    key, value, query = random(8, 2, 8), random(8, 2, 8, seed=1), random(2, 4, 8)
    out = torch.empty(2, 4, 8, dtype=torch.float64)
    reference.paged_attention(
        query, key.view(2, 4, 2, 8), value.view(2, 4, 2, 8), int32(1, 0)[:, None], int32(3, 4),
        kv_cache_dtype="auto", k_scale=ONE, v_scale=ONE, out=out,
    )  # fmt: skip
    assert_near(out[:1], dense(query[:1], key[4:7], value[4:7]))
    assert_near(out[1:], dense(query[1:], key[:4], value[:4]))


# Tables

LOG3 = math.log(3.0)


def column(*numbers: float) -> Tensor:
    """Tokens of one head of one element."""
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)


# logits, sink, out for the values 4 and 8, denominator
SINKS = [
    ((0.0, LOG3), None, 7.0, 4.0),
    ((0.0, LOG3), math.log(4.0), 3.5, 8.0),
    ((0.0, LOG3), -INF, 7.0, 4.0),
    ((0.0, 0.0), 0.0, 4.0, 3.0),
    ((0.0, -INF), None, 4.0, 1.0),
]


@pytest.mark.parametrize(("logits", "sink", "out", "denominator"), SINKS)
def test_a_sink_takes_weight_and_gives_no_value(
    logits: tuple[float, float], sink: float | None, out: float, denominator: float
) -> None:
    lse = torch.empty(1, 1, dtype=torch.float64)
    sinks = None if sink is None else torch.tensor([sink])
    actual = attend(column(1.0), column(*logits), column(4.0, 8.0), sinks=sinks, lse=lse)
    assert actual.item() == pytest.approx(out, rel=1e-6)
    assert lse.item() == pytest.approx(math.log(denominator), rel=1e-6)


@pytest.mark.parametrize("softcap", [0.5, 1.0, 30.0])
def test_softcap_bounds_the_scaled_logit(softcap: float) -> None:
    logits = [softcap * math.tanh(0.5 * x / softcap) for x in (-3.0, 0.25, 7.0)]
    weights = [math.exp(x) for x in (*logits, 1.5)]
    lse = torch.empty(1, 1, dtype=torch.float64)
    actual = attend(
        column(1.0), column(-3.0, 0.25, 7.0), column(1.0, 2.0, 4.0), softmax_scale=0.5, softcap=softcap,
        sinks=torch.tensor([1.5]), lse=lse,
    )  # fmt: skip
    expected = (weights[0] + 2 * weights[1] + 4 * weights[2]) / sum(weights)  # nothing bounds the sink
    assert actual.item() == pytest.approx(expected, rel=1e-12)
    assert lse.item() == pytest.approx(math.log(sum(weights)), rel=1e-12)


def test_lse_is_that_of_the_true_logits() -> None:
    """The offset of K changes all logits alike, and with them the lse."""
    lse = torch.empty(1, 1, dtype=torch.float64)
    key = column(0.0, 0.5).to(FP8["e4m3"])
    attend(column(2.0), key, key, k_offset=torch.tensor([[3.0]]), softmax_scale=0.25, lse=lse)
    assert lse.item() == pytest.approx(math.log(math.exp(1.5) + math.exp(1.75)), rel=1e-12)


def test_results_for_parts_of_a_sequence_can_be_merged() -> None:
    query, key, value = random(1, 4, 8), random(12, 2, 8), random(12, 2, 8, seed=1)
    lses = [torch.empty(1, 4, dtype=torch.float64) for _ in range(3)]
    first = attend(query, key[:5], value[:5], lse=lses[0])
    second = attend(query, key, value, lse=lses[1], seq_starts=int32(5))
    whole = attend(query, key, value, lse=lses[2])
    weights = [(lse - lses[2]).exp().unsqueeze(-1) for lse in lses[:2]]
    assert_near(weights[0] + weights[1], torch.ones(1, 4, 1, dtype=torch.float64))
    assert_near(first * weights[0] + second * weights[1], whole)


@pytest.mark.parametrize("sink", [None, 0.75])
@pytest.mark.parametrize("case", ["empty", "starts beyond", "more queries than tokens"])
def test_a_query_that_sees_nothing_gets_zeros(case: str, sink: float | None) -> None:
    tokens = 0 if case == "empty" else 3
    key = torch.full((tokens, 2, 8), 0.5)
    query = torch.ones(5 if case.startswith("more") else 1, 4, 8)
    lse = torch.full((len(query), 4), NAN)
    options = {"seq_starts": int32(3)} if case == "starts beyond" else {}
    sinks = None if sink is None else torch.full((4,), sink)
    out = attend(query, key, key, **options, sinks=sinks, lse=lse)
    assert torch.equal(out[0], torch.zeros(4, 8, dtype=torch.float64))
    assert lse[0].tolist() == [-INF if sink is None else sink] * 4
    if case.startswith("more"):  # of 5 queries, the last 3 are tokens
        assert out.view(5, -1)[:, 0].ne(0).tolist() == [False, False, True, True, True]


# What is not seen


@each_fp8
def test_what_is_not_seen_does_not_matter(fp8: torch.dtype) -> None:
    """Bytes and scales before the start and after the length, entries of the table of whole blocks."""
    query = random(1, 4, 8)
    key, value = random(6, 2, 8).to(fp8), random(6, 2, 8, seed=1).to(fp8)
    caches = torch.full((2, 3, 4, 2, 8), 0x7F, dtype=torch.uint8).view(fp8)  # NaN
    scales = torch.full((2, 3, 4, 2), NAN)
    for cache, x in zip(caches, (key, value), strict=True):
        slots = cache.view(torch.uint8).view(12, 2, 8)
        slots[10:12], slots[0:4] = x.view(torch.uint8)[:2], x.view(torch.uint8)[2:]
    scales.view(2, 12, 2)[:, 10:12] = scales.view(2, 12, 2)[:, 0:4] = 1.0
    table = torch.tensor([[-7, 2, 0, 1 << 30, -(1 << 31)]]).int()  # positions 6 to 11
    out = torch.empty(1, 4, 8, dtype=torch.float64)
    name = "fp8" if fp8 == FP8["e4m3"] else "fp8_e5m2"
    for options in ({"seq_starts": int32(6)}, {"sliding_window": 6}):
        reference.paged_attention(
            query, *caches, table, int32(12), kv_cache_dtype=name, k_scale=scales[0], v_scale=scales[1],
            out=out, **options,
        )  # fmt: skip
        assert_near(out, dense(query, key, value))


def test_a_nan_that_is_seen_gives_nan_to_those_who_see_it() -> None:
    key, value = random(6, 2, 8), random(6, 2, 8, seed=1)
    value[4, 1, 3] = NAN
    out = attend(random(3, 4, 8), key, value)  # tokens 3, 4 and 5
    wrong = torch.zeros(3, 4, 8, dtype=torch.bool)
    wrong[1:, 2:, 3] = True
    assert torch.equal(out.isnan(), wrong)
    key[4, 0, 0] = NAN
    wrong[1:, :2] = True
    assert torch.equal(attend(random(3, 4, 8), key, value).isnan(), wrong)


# Wrong calls


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_table": int32(3)[None]}, "block_table has no block of the cache for position 0"),
        ({"block_table": int32(-1)[None]}, "block_table has no block of the cache for position 0"),
        ({"seq_lens": int32(5)}, "block_table has no block of the cache for position 4"),
        ({"seq_lens": int32((1 << 31) - 1)}, "block_table has no block of the cache for position 4"),
        ({"seq_lens": int32(-1)}, "seq_lens and seq_starts must be at least 0"),
        ({"seq_starts": int32(-1)}, "seq_lens and seq_starts must be at least 0"),
        ({"cu_query_lens": int32(1, 1)}, "cu_query_lens must rise from 0"),
        ({"cu_query_lens": int32(0, 3)}, "cu_query_lens must rise from 0 to at most 2"),
        ({"q_scale": ONE}, "q_scale goes with an FP8 query"),
        ({"k_offset": torch.ones(2)}, "offsets must be float32"),
        ({"k_scale": torch.ones(3)}, "scales can't be"),
        ({"v_cache_dtype": "fp8_e5m2"}, "caches can't be torch.float8_e4m3fn in the format 'fp8_e5m2'"),
        ({"out": torch.full((2, 2, 7), 7.0)}, r"out must be \[num_tokens, 2, 8\]"),
    ],
)  # fmt: skip
def test_a_wrong_call_writes_nothing(options: dict[str, Any], sentence: str) -> None:
    cache = torch.zeros(3, 4, 1, 8, dtype=FP8["e4m3"])
    out = torch.full((2, 2, 8), 7.0)
    arguments = {
        "block_table": int32(1)[None], "seq_lens": int32(4), "cu_query_lens": int32(0, 2),
        "k_scale": ONE, "v_scale": ONE, "out": out,
    } | options  # fmt: skip
    with pytest.raises(RuntimeError, match=sentence):
        reference.paged_attention(torch.ones(2, 2, 8), cache, cache, **arguments)
    assert out.unique().tolist() == [7.0]
