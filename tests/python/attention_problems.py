"""Random problems for paged attention, and how near the result must be to the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import fp8kv
from fp8kv import reference
from fp8kv._dtypes import FORMATS
from helpers import (
    PLAIN_CACHES,
    QUANTIZED_CACHES,
    assert_same_bytes,
    copy_bits,
    empty_caches,
    empty_view,
    placed,
    sentinels,
)

CACHES = QUANTIZED_CACHES | PLAIN_CACHES
CPU = torch.device("cpu")
#: Entries of a block table that nobody may use.
GARBAGE = torch.tensor([-1, (1 << 31) - 1, -(1 << 31), 12345678])
#: norm(out - reference) / norm(reference), for a whole result.
NORM_RULE = {torch.bfloat16: 2.5e-3, torch.float16: 1e-3, torch.float32: 1e-3}


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@dataclass(frozen=True)
class Problem:
    """One call. Whatever is not seen is NaN or out of range.

    Attributes:
        lengths: tokens of each sequence.
        queries: of each sequence; None: one each, and no cu_query_lens.
        heads: num_heads, num_kv_heads.
        v_head_size: of V; None: that of K.
        v_cache: what the elements of V are; None: what those of K are.
        shared: V is the first elements of each head of K.
        query: dtype of the query; None: that of K.
        out: dtype of the result; None: as the op chooses.
        scales: "tensor", "head", "channel" or "slot", of K and of V.
        size: factor of the query; the scale of the logits is divided by it.
        sizes: further factors, of each head of the query.
        extreme: K and V are the largest values of their format, positive or negative.
        spare_rows: rows of query, of out and of lse beyond the tokens.
        layouts: of query, out and lse.
        index_layout: of the block table, lengths, sums and starts.
        scale_layout: of scales, offsets and sinks.
    """

    lengths: Sequence[int] = (37,)
    queries: Sequence[int] | None = None
    heads: tuple[int, int] = (4, 2)
    head_size: int = 64
    block_size: int = 16
    cache: str = "e4m3"
    query: torch.dtype | None = torch.bfloat16
    out: torch.dtype | None = None
    scales: tuple[str, str] = ("head", "head")
    q_scales: int = 1
    starts: Sequence[int] | None = None
    window: int | None = None
    softcap: float = 0.0
    sinks: torch.dtype | None = None
    offsets: bool = False
    num_splits: int = 0
    bounds: tuple[int | None, int | None] = (None, None)
    size: float = 1.0
    sizes: tuple[float, ...] = (1.0,)
    extreme: bool = False
    spare_rows: tuple[int, int, int] = (1, 2, 3)
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    cache_layout: str = "NHD"
    index_layout: str = "contiguous"
    scale_layout: str = "contiguous"
    seed: int = 0
    v_head_size: int | None = None
    v_cache: str | None = None
    shared: bool = False

    def num_queries(self) -> list[int]:
        return [1] * len(self.lengths) if self.queries is None else list(self.queries)

    def seen(self) -> list[list[range]]:
        """Positions that each query of each sequence sees."""
        starts = self.starts or [0] * len(self.lengths)
        result = []
        for length, start, count in zip(self.lengths, starts, self.num_queries(), strict=True):
            own = [length - count + i for i in range(count)]
            first = [max(start, p - self.window + 1 if self.window else 0, 0) for p in own]
            result.append([range(a, p + 1) for a, p in zip(first, own, strict=True)])
        return result


@dataclass
class Inputs:
    """Of a problem, on the CPU."""

    query: Tensor
    caches: tuple[Tensor, Tensor]
    table: Tensor
    options: dict[str, Any]
    largest_v: Tensor  # [num_tokens, num_heads], of what each query sees


def make(problem: Problem) -> Inputs:
    generator = torch.Generator().manual_seed(problem.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kinds = (problem.cache, problem.v_cache or problem.cache)
    elements = [CACHES[kind][2] for kind in kinds]
    quantized = [kind in QUANTIZED_CACHES for kind in kinds]
    num_heads, num_kv_heads = problem.heads
    head_size, block_size = problem.head_size, problem.block_size
    seen = problem.seen()
    num_tokens = sum(problem.num_queries())

    # Blocks for what is seen, garbage for the rest
    width = -(-max(problem.lengths, default=0) // block_size) + 2
    table = GARBAGE[torch.randint(0, 4, (len(problem.lengths), width), generator=generator)]
    used = sorted({(s, p // block_size) for s, each in enumerate(seen) for positions in each for p in positions})
    num_blocks = len(used) + 2
    order = torch.randperm(num_blocks, generator=generator)
    for block, (s, entry) in zip(order, used, strict=False):
        table[s, entry] = block
    slots = [sorted({p for positions in each for p in positions}) for each in seen]  # of each sequence, as positions
    is_seen = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    for s, positions in enumerate(slots):
        p = torch.tensor(positions, dtype=torch.int64)
        is_seen[table[s, p // block_size] * block_size + p % block_size] = True
    is_seen = is_seen.view(num_blocks, block_size)

    # Around another mean for each channel, of 8 times the size that the scales bring it to
    slots_and_heads = (num_blocks, block_size, num_kv_heads)
    shapes = [(*slots_and_heads, size) for size in (head_size, problem.v_head_size or head_size)]
    kv = [8 * (normal(*x) + normal(*x[2:])) if q else normal(*x) for x, q in zip(shapes, quantized, strict=True)]
    spreads = [8.0, 8.0]
    if problem.extreme:
        spreads = [FORMATS[element].max for element in elements]
        kv = [spread * x.sign() for x, spread in zip(kv, spreads, strict=True)]
    nan = torch.full((), math.nan)
    caches = [torch.where(is_seen[..., None, None], x, nan).to(element) for x, element in zip(kv, elements, strict=True)]
    if problem.shared:
        caches[1] = caches[0][..., : shapes[1][3]]
    scales = []
    for kind, shape, spread in zip(problem.scales, shapes, spreads, strict=True):
        of_kind = {"tensor": (1,), "head": (num_kv_heads,), "channel": shape[2:], "slot": shape[:3]}[kind]
        scale = (normal(*of_kind).clamp(-2, 2) / 2).exp2() / spread
        scales.append(torch.where(is_seen[..., None], scale, nan) if kind == "slot" else scale)
    offsets = [normal(*x[2:]) if problem.offsets and q else None for x, q in zip(shapes, quantized, strict=True)]

    query = normal(num_tokens + problem.spare_rows[0], num_heads, head_size)
    query = query * torch.tensor(problem.sizes).view(-1, 1)
    query = (query * problem.size if problem.query else 8 * query).to(problem.query or elements[0])
    q_scale = None if problem.query else (normal(problem.q_scales) / 4).exp2() / 8

    # The largest |v| that each query sees
    v = caches[1].double()
    if quantized[1]:
        views = {"tensor": (1, 1), "head": (-1, 1), "channel": shapes[1][2:], "slot": (*slots_and_heads, 1)}
        v = v * scales[1].double().view(views[problem.scales[1]])
        v = v if offsets[1] is None else v + offsets[1].double()
    largest = torch.zeros(num_tokens, num_heads, dtype=torch.float64)
    row = 0
    for s, each in enumerate(seen):
        for positions in each:
            if positions:
                p = torch.tensor([*positions])
                of_kv_heads = v[table[s, p // block_size], p % block_size].abs().amax((0, 2))
                largest[row] = of_kv_heads.repeat_interleave(num_heads // num_kv_heads)
            row += 1

    (name, k_dtype, _), (v_name, v_dtype, _) = (CACHES[kind] for kind in kinds)
    return Inputs(
        query.view(torch.uint8) if k_dtype == torch.uint8 and problem.query is None else query,
        (caches[0].view(k_dtype), caches[1].view(v_dtype)),
        table.to(torch.int32),
        {
            "seq_lens": int32(*problem.lengths),
            "kv_cache_dtype": name,
            "k_scale": scales[0],
            "v_scale": scales[1],
            "softmax_scale": head_size**-0.5 / problem.size,
            "cu_query_lens": None if problem.queries is None else int32(0, *accumulate(problem.queries)),
            "max_query_len": problem.bounds[0],
            "max_seq_len": problem.bounds[1],
            "q_scale": q_scale,
            "seq_starts": None if problem.starts is None else int32(*problem.starts),
            "sliding_window": problem.window,
            "softcap": problem.softcap,
            "sinks": None if problem.sinks is None else normal(num_heads).to(problem.sinks),
            "k_offset": offsets[0],
            "v_offset": offsets[1],
            "num_splits": problem.num_splits,
            "v_cache_dtype": None if problem.v_cache is None else v_name,
        },
        largest,
    )


def check(device: torch.device, problem: Problem | None = None, **changes: Any) -> tuple[Tensor, Tensor]:
    """Compares with the reference what the op writes on `device`, and that it writes nothing else.

    Returns:
        `out` and `lse`, without spare rows.
    """
    problem = replace(problem or Problem(), **changes)
    inputs = make(problem)
    num_tokens, num_heads = inputs.largest_v.shape
    indices = ("seq_lens", "cu_query_lens", "seq_starts")
    kwargs = {
        k: placed(x, problem.index_layout if k in indices else problem.scale_layout, device) if isinstance(x, Tensor) else x
        for k, x in inputs.options.items()
    }
    table = placed(inputs.table, problem.index_layout, device)
    key_cache, value_cache = place_caches(problem, inputs, device)
    query = placed(inputs.query, problem.layouts[0], device)
    chosen = problem.out or (query.dtype if problem.query else torch.bfloat16)
    shape = (num_heads, problem.v_head_size or problem.head_size)
    out, out_buffer = empty_view((num_tokens + problem.spare_rows[1], *shape), chosen, problem.layouts[1], device)
    lse, lse_buffer = empty_view((num_tokens + problem.spare_rows[2], num_heads), torch.float32, problem.layouts[2], device)
    result = fp8kv.paged_attention(query, key_cache, value_cache, table, **kwargs, out=out, lse=lse)
    assert result is out
    for view, buffer in ((out, out_buffer), (lse, lse_buffer)):
        assert_untouched(view, buffer, num_tokens)

    exact = torch.full((num_tokens + problem.spare_rows[1], *shape), math.nan, dtype=torch.float64)
    exact_lse = torch.full((num_tokens + problem.spare_rows[2], num_heads), math.nan, dtype=torch.float64)
    reference.paged_attention(inputs.query, *inputs.caches, inputs.table, **inputs.options, out=exact, lse=exact_lse)
    actual, actual_lse = out[:num_tokens].cpu(), lse[:num_tokens].cpu()
    assert_near(actual, exact[:num_tokens], inputs.largest_v)
    # On CUDA, most calls without lse have kernels of their own.
    without_lse, buffer = empty_view((num_tokens + problem.spare_rows[1], *shape), chosen, problem.layouts[1], device)
    fp8kv.paged_attention(query, key_cache, value_cache, table, **kwargs, out=without_lse)
    assert_untouched(without_lse, buffer, num_tokens)
    assert_near(without_lse[:num_tokens].cpu(), exact[:num_tokens], inputs.largest_v)
    assert_near_lse(actual_lse, exact_lse[:num_tokens], rounded=problem.query == torch.float32)
    return actual, actual_lse


def check_nan(device: torch.device, which: int, **changes: Any) -> None:
    """A NaN of K (0) or V (1) gives NaN to those queries that see it and to no other: of K to all elements, of V to its own."""
    problem = Problem(**changes | {"lengths": (60, 60), "queries": (4, 1), "heads": (4, 2)})
    inputs = make(problem)
    block, offset = inputs.table[0, 58 // 16], 58 % 16
    inputs.caches[which].view(torch.uint8)[block, offset, 1, 5] = 0xFF
    size = inputs.caches[1].shape[3]
    expected = torch.zeros(5, 4, size, dtype=torch.bool)
    expected[2:4, 2:, :] = which == 0
    expected[2:4, 2:, 5] = True
    for ops, at in ((fp8kv, device), (reference, CPU)):
        options = {k: x.to(at) if isinstance(x, Tensor) else x for k, x in inputs.options.items()}
        tensors = [x.to(at) for x in (inputs.query, *inputs.caches, inputs.table)]
        out, lse = torch.zeros(5, 4, size, device=at), torch.zeros(5, 4, device=at)
        ops.paged_attention(*tensors, **options, out=out, lse=lse)
        assert torch.equal(out.isnan().cpu(), expected)
        assert torch.equal(lse.isnan().cpu(), expected.all(-1))


def place_caches(problem: Problem, inputs: Inputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Its caches on `device`, in their layout."""
    keys, values = inputs.caches
    key_cache, value_cache, _ = empty_caches(keys.shape, keys.dtype, problem.cache_layout, device)
    copy_bits(key_cache, keys)
    if problem.shared:
        return key_cache, key_cache[..., : values.shape[3]].view(values.dtype)
    if (values.shape, values.dtype) != (keys.shape, keys.dtype):
        _, value_cache, _ = empty_caches(values.shape, values.dtype, problem.cache_layout, device)
    copy_bits(value_cache, values)
    return key_cache, value_cache


def assert_untouched(view: Tensor, buffer: Tensor, num_rows: int) -> None:
    """What a view lies in, but for its first rows, is as `empty_view` made it."""
    actual, before = buffer.cpu().clone(), sentinels(buffer.shape, buffer.dtype, CPU)
    for whole in (actual, before):
        whole.as_strided(view.shape, view.stride(), view.storage_offset())[:num_rows] = 0
    assert_same_bytes(actual, before)


def assert_near(actual: Tensor, expected: Tensor, largest_v: Tensor) -> None:
    """By element, by query and head, and, if it is not a matter of few roundings, as a whole."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    error = (actual.double() - expected).abs()
    if error.numel() == 0:
        return
    excess = (error.amax(-1) - largest_v * 2.0**-8).max().item()
    assert excess <= 0, f"off by {excess} more than 2^-8 * max|v|"
    rule = NORM_RULE[actual.dtype]
    # Values that cancel each other leave little to measure an error by.
    least = largest_v * math.sqrt(actual.shape[-1]) * 2.0**-5
    share = error.norm(dim=-1) / torch.maximum(expected.norm(dim=-1), least).clamp_min(1e-300)
    assert share.max() <= 12 * rule, f"off by {share.max().item()} of its norm in one query and head"
    if actual.numel() >= 256 and expected.norm() > 0:
        whole = (error.norm() / expected.norm()).item()
        assert whole <= rule, f"off by {whole} of its norm"


def assert_near_lse(actual: Tensor, expected: Tensor, *, rounded: bool) -> None:
    atol, rtol = (3e-3, 6e-4) if rounded else (2e-3, 1e-5)
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=rtol)
