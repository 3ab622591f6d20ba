"""Attention on the paged KV cache in plain PyTorch: fp64 on the dequantized values, query by query."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

from fp8kv._dtypes import CACHE_DTYPES, FORMATS, FP8_DTYPES, REAL_DTYPES
from fp8kv.reference.rules import fail

_OP = "paged_attention"


@torch.no_grad()
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    kv_cache_dtype: str = "fp8",
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float | None = None,
    cu_query_lens: Tensor | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    q_scale: Tensor | None = None,
    seq_starts: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    lse: Tensor | None = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    v_cache_dtype: str | None = None,
) -> Tensor:
    """See `fp8kv.paged_attention`. Only the last rounding, to the dtype of `out` and of `lse`, is not fp64.

    `out` may be float64 here. `max_query_len`, `max_seq_len` and `num_splits` change nothing.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> key_cache = torch.zeros(2, 2, 1, 1)  # 2 blocks of 2 slots
        >>> value_cache = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(2, 2, 1, 1)
        >>> table, lengths = torch.tensor([[1, 0]]).int(), torch.tensor([3]).int()
        >>> one = torch.ones(1)
        >>> reference.paged_attention(
        ...     torch.ones(1, 2, 1), key_cache, value_cache, table, lengths, kv_cache_dtype="auto",
        ...     k_scale=one, v_scale=one).flatten().tolist()  # the mean of 3, 4 and 1
        [2.6666667461395264, 2.6666667461395264]
    """
    key_cache, value_cache = _caches(key_cache, value_cache, kv_cache_dtype, v_cache_dtype)
    q = _queries(query, key_cache, q_scale)
    _, num_heads, head_size = q.shape
    of_out = (num_heads, value_cache.shape[3])
    if out is None:
        dtype = query.dtype if query.dtype in REAL_DTYPES else torch.bfloat16
        out = torch.empty((len(query), *of_out), dtype=dtype, device=query.device)
    if out.shape[1:] != of_out or (lse is not None and lse.shape[1:] != (num_heads,)):
        fail(_OP, f"out must be [num_tokens, {num_heads}, {of_out[1]}] and lse [num_tokens, {num_heads}]")
    if sinks is not None and sinks.shape != (num_heads,):
        fail(_OP, f"sinks must be [{num_heads}], got {list(sinks.shape)}")
    softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
    k_parameters = _parameters(k_scale, k_offset, key_cache)
    v_parameters = _parameters(v_scale, v_offset, value_cache)
    num_rows = min(len(x) for x in (q, out, lse) if x is not None)
    rows_of = _rows(cu_query_lens, block_table, seq_lens, seq_starts, num_rows)
    starts = [0] * len(rows_of) if seq_starts is None else seq_starts.tolist()
    lengths = seq_lens.tolist()
    seen = [_seen_positions(lengths[s], starts[s], len(rows), sliding_window) for s, rows in enumerate(rows_of)]
    # Every block is looked up before anything is written.
    found = [_look_up(s, ranges, block_table, key_cache) for s, ranges in enumerate(seen)]

    group = num_heads // max(1, key_cache.shape[2])
    sink = q.new_empty(num_heads, 0) if sinks is None else sinks.double().unsqueeze(-1)
    for rows, ranges, (positions, place) in zip(rows_of, seen, found, strict=True):
        # [num_kv_heads, positions, head_size]
        keys = _dequantized(key_cache, place, *k_parameters).transpose(0, 1)
        values = _dequantized(value_cache, place, *v_parameters).transpose(0, 1)
        for row, sees in zip(rows, ranges, strict=True):
            part = slice(bisect_left(positions, sees.start), bisect_left(positions, sees.stop))
            k, v = keys[:, part], values[:, part]
            logits = softmax_scale * (q[row].reshape(-1, group, head_size) @ k.mT).flatten(0, 1)
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            log_sum = torch.cat((logits, sink), 1).logsumexp(1)
            weights = torch.exp(logits - log_sum.unsqueeze(-1))
            out[row] = (weights.reshape(len(v), group, -1) @ v).flatten(0, 1).to(out.dtype)
            if lse is not None:
                lse[row] = log_sum.to(lse.dtype)
    return out


def _seen_positions(length: int, start: int, num_queries: int, sliding_window: int | None) -> list[range]:
    """What each query of a sequence sees."""
    ranges = []
    for i in range(num_queries):
        own = length - num_queries + i
        first = max(start, own - sliding_window + 1) if sliding_window else start
        ranges.append(range(max(first, 0), own + 1))
    return ranges


def _look_up(sequence: int, seen: list[range], block_table: Tensor, cache: Tensor) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """The positions of a sequence that any query sees, ascending, with their blocks and offsets."""
    num_blocks, block_size = cache.shape[:2]
    table = block_table[sequence].tolist()
    positions, blocks, offsets = [], [], []
    # One position beyond the table stands for all of them.
    end = len(table) * block_size
    bounded = (range(x.start, min(x.stop, max(x.start, end) + 1)) for x in seen)
    for position in sorted(set().union(*bounded)):
        entry, offset = divmod(position, block_size)
        block = table[entry] if entry < len(table) else -1
        if 0 <= block < num_blocks:
            positions.append(position)
            blocks.append(block)
            offsets.append(offset)
        elif cache.device.type == "cpu":
            fail(
                _OP,
                f"block_table has no block of the cache for position {position} of sequence {sequence}",
            )
    index = torch.tensor([blocks, offsets], dtype=torch.int64, device=cache.device)
    return positions, (index[0], index[1])


def _rows(
    cu_query_lens: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None,
    num_rows: int,
) -> list[range]:
    """The rows that are queries of each sequence."""
    num_seqs = len(block_table)
    numbers = [seq_lens] if seq_starts is None else [seq_lens, seq_starts]
    if any(len(x) != num_seqs for x in numbers):
        fail(_OP, f"seq_lens and seq_starts must have {num_seqs} elements, the rows of block_table")
    if cu_query_lens is not None and len(cu_query_lens) != num_seqs + 1:
        fail(_OP, f"cu_query_lens must have {num_seqs + 1} elements, got {len(cu_query_lens)}")
    sums = list(range(num_seqs + 1)) if cu_query_lens is None else cu_query_lens.tolist()
    if block_table.device.type == "cpu":
        if sums[0] != 0 or sums != sorted(sums) or sums[-1] > num_rows:
            fail(_OP, f"cu_query_lens must rise from 0 to at most {num_rows}, the rows of query, got {sums}")
        if any(x.lt(0).any() for x in numbers):
            fail(_OP, "seq_lens and seq_starts must be at least 0")
    return [range(max(first, 0), min(end, num_rows)) for first, end in pairwise(sums)]


def _dequantized(cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """[positions, num_kv_heads, head_size]"""
    integers = cache.view(torch.uint8) if cache.dtype in FORMATS else cache
    x = integers[place].view(cache.dtype).double()
    if scale is not None:
        x = x * scale[place].double()
    return x if offset is None else x + offset.double()


def _parameters(scale: Tensor, offset: Tensor | None, cache: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The scale of each element of the cache, and the offset of each channel; None: neither."""
    heads, channels = cache.shape[2:3], cache.shape[2:]
    if scale.dtype == torch.float32 and scale.numel() in (1, *heads):
        expanded = scale.reshape(-1, 1).expand(cache.shape)
    elif scale.dtype == torch.float32 and scale.shape == channels:
        expanded = scale.expand(cache.shape)
    elif scale.dtype == torch.float32 and scale.shape == cache.shape[:3]:
        expanded = scale.unsqueeze(-1).expand(cache.shape)
    else:
        fail(_OP, f"scales can't be {scale.dtype} of shape {list(scale.shape)}")
    if offset is not None and (offset.dtype != torch.float32 or offset.shape != channels):
        fail(_OP, f"offsets must be float32 of shape {list(channels)}, got {list(offset.shape)}")
    if cache.dtype in FORMATS:
        return expanded, offset
    if offset is not None:
        fail(_OP, f"offsets go with quantized caches, got {cache.dtype}")
    return None, None


def _queries(query: Tensor, cache: Tensor, q_scale: Tensor | None) -> Tensor:
    """Dequantized."""
    num_kv_heads, head_size = cache.shape[2:]
    if query.dim() != 3 or query.shape[2] != head_size or query.shape[1] % max(1, num_kv_heads):
        fail(
            _OP,
            f"query must be [num_tokens, a multiple of {num_kv_heads}, {head_size}], got {list(query.shape)}",
        )
    if query.dtype in REAL_DTYPES:
        if q_scale is not None:
            fail(_OP, f"q_scale goes with an FP8 query, got {query.dtype}")
        return query.double()
    if query.dtype not in (cache.dtype, torch.uint8) or cache.dtype not in FP8_DTYPES or q_scale is None:
        fail(_OP, f"query can't be {query.dtype} with caches of {cache.dtype}, and FP8 needs q_scale")
    num_heads = query.shape[1]
    if q_scale.dtype != torch.float32 or q_scale.numel() not in (1, num_kv_heads, num_heads):
        fail(_OP, f"q_scale can't be {q_scale.dtype} of shape {list(q_scale.shape)}")
    scale = q_scale.reshape(-1, 1).repeat_interleave(num_heads // max(1, q_scale.numel()), 0)
    return query.view(cache.dtype).double() * scale.double()


def _caches(key_cache: Tensor, value_cache: Tensor, kv_cache_dtype: str, v_cache_dtype: str | None) -> tuple[Tensor, Tensor]:
    """As tensors of the dtypes that kv_cache_dtype and v_cache_dtype say."""
    if key_cache.dim() != 4 or value_cache.dim() != 4 or value_cache.shape[:3] != key_cache.shape[:3]:
        fail(
            _OP,
            "caches must have four dimensions, of one size but for the last, got "
            f"{list(key_cache.shape)} and {list(value_cache.shape)}",
        )
    if v_cache_dtype is None and value_cache.dtype != key_cache.dtype:
        fail(
            _OP,
            f"caches must have one dtype without v_cache_dtype, got {key_cache.dtype} and {value_cache.dtype}",
        )
    return _cache(key_cache, kv_cache_dtype), _cache(value_cache, v_cache_dtype or kv_cache_dtype)


def _cache(cache: Tensor, name: str) -> Tensor:
    actual = cache.dtype
    dtype = actual if name == "auto" and actual in REAL_DTYPES else CACHE_DTYPES.get(name)
    if dtype is None or (actual != dtype and not (actual == torch.uint8 and dtype in FP8_DTYPES)):
        fail(_OP, f"caches can't be {actual} in the format {name!r}")
    return cache.view(dtype)
