"""Attention that reads the paged KV cache as it is stored."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fp8kv._dtypes import REAL_DTYPES, dtype_name
from fp8kv._ops import operator

attention = operator("paged_attention")


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
    workspace: Tensor | None = None,
    v_cache_dtype: str | None = None,
) -> Tensor:
    """Causal attention of queries to sequences in a paged cache, which is dequantized as it is read.

    Position p of sequence s lies in block ``block_table[s, p // block_size]`` at ``p % block_size``. The i-th
    of the L queries of s is the token at position ``seq_lens[s] - L + i``, which was appended before; it sees
    the positions up to its own. With ``q = q_scale * query``, ``k = k_scale * key_cache + k_offset`` and
    ``v = v_scale * value_cache + v_offset``::

        logit[p] = softmax_scale * (q . k[p])
        logit[p] = softcap * tanh(logit[p] / softcap)        where softcap > 0
        lse      = log(sum(exp(logit[p])) + exp(sink))
        out      = sum(exp(logit[p] - lse) * v[p])

    Head h of the query reads head ``h // (num_heads // num_kv_heads)`` of K and V. A query that sees nothing
    gets zeros, and as `lse` the sink or -inf. Bytes and scales of positions that are not seen never matter.
    K and V may have heads of two sizes and elements of two dtypes, and may share memory.
    The result is within ``2^-8 * max|v|`` of `fp8kv.reference.paged_attention`, which computes in fp64.

    Lengths stay on the device: nothing is synchronized, so calls can be captured in CUDA graphs.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, any strides, such as a slice of a fused QKV tensor:
            float32, float16, bfloat16, or of the FP8 dtype of `key_cache`, with `q_scale`. num_heads is a
            multiple of num_kv_heads. Rows that belong to no sequence are padding.
        key_cache: as for `reshape_and_cache_flash`, as is `value_cache`; read.
        value_cache: ``[num_blocks, block_size, num_kv_heads, v_head_size]``. In a cache of latent attention it
            is a slice of `key_cache`, such as ``key_cache[..., :512]`` of 576.
        block_table: int32 ``[num_seqs, max_blocks]``; entries of positions that are not seen may be anything.
        seq_lens: int32 ``[num_seqs]``, tokens of each sequence in the cache, those of its queries included.
        kv_cache_dtype: as for `reshape_and_cache_flash`.
        k_scale: float32: 1 or num_kv_heads elements; per channel ``[num_kv_heads, head_size]``; or the scales
            of `reshape_and_cache_flash_dynamic`, ``[num_blocks, block_size, num_kv_heads]``. Not used
            where the caches are not quantized.
        v_scale: likewise, per channel ``[num_kv_heads, v_head_size]``.
        softmax_scale: None: ``head_size ** -0.5``.
        cu_query_lens: int32 ``[num_seqs + 1]``, 0 and the running sums of the numbers of queries: those of
            sequence s are the rows ``cu_query_lens[s]`` to ``cu_query_lens[s + 1]``. None: row s is the one
            query of s.
        max_query_len: an upper bound of the queries of a sequence, which chooses how the work is divided.
            None: 1 without `cu_query_lens`, else the rows of `query`.
        max_seq_len: likewise of `seq_lens`. None: what `block_table` can hold.
        q_scale: float32, 1, num_kv_heads or num_heads elements, of an FP8 query and only of that.
        seq_starts: int32 ``[num_seqs]``, the first position of each sequence that is seen, as in batches
            padded on the left; None: 0.
        sliding_window: a query sees that many positions at most, the last of which is its own; None: all.
        softcap: 0: none.
        sinks: float32 or the dtype of `query`, ``[num_heads]``; None: no sinks.
        k_offset: float32 ``[num_kv_heads, head_size]``; None: 0. For quantized caches.
        v_offset: likewise, ``[num_kv_heads, v_head_size]``.
        lse: float32 ``[num_tokens, num_heads]``, any strides; written. With it, results for parts of a
            sequence can be merged: `merge_attention`.
        num_splits: into how many parts the keys of a sequence are divided; 0: as many as are best. The same
            number gives the same bits in every run; with 1 they do not depend on the rest of the batch.
        out: float32, float16 or bfloat16 ``[num_tokens, num_heads, v_head_size]``, any strides; written. Rows
            that belong to no sequence stay as they are. None: a new tensor of the dtype of `query`, bfloat16
            for an FP8 query, in which such rows are not initialized.
        workspace: on CUDA, uint8 of `attention_workspace_size` bytes with any contents, for results of parts
            of sequences. Calls behind each other on one stream can share it. None: a new tensor, where one
            is needed.
        v_cache_dtype: the format of `value_cache`, one that `kv_cache_dtype` can be; None: that of
            `key_cache`.

    Returns:
        `out`, or the new tensor.

    Raises:
        RuntimeError: an argument doesn't fit, or, on the CPU, a length is out of range or a position that is
            seen has no block of the cache. Nothing is written then. On CUDA such positions are not seen; they
            raise with the environment variable FP8KV_DEBUG=1.

    Example:
        >>> import torch, fp8kv
        >>> key_cache, value_cache = torch.zeros(2, 4, 16, 1, 64, dtype=torch.float8_e4m3fn)
        >>> key, value, one = torch.zeros(20, 1, 64), torch.ones(20, 1, 64), torch.tensor([1.0])
        >>> slots = torch.arange(32, 52)  # 16 tokens in block 2, 4 in block 3
        >>> fp8kv.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, "fp8", one, one)
        >>> table, lengths = torch.tensor([[2, 3]]).int(), torch.tensor([20]).int()
        >>> out = fp8kv.paged_attention(
        ...     torch.randn(1, 8, 64), key_cache, value_cache, table, lengths, k_scale=one, v_scale=one)
        >>> out.shape, out.dtype, out.round(decimals=2).unique().tolist()
        (torch.Size([1, 8, 64]), torch.float32, [1.0])

        V with smaller heads, in a format of its own:

        >>> value_cache = torch.full((4, 16, 1, 48), 2.0, dtype=torch.bfloat16)
        >>> out = fp8kv.paged_attention(
        ...     torch.randn(1, 8, 64), key_cache, value_cache, table, lengths, k_scale=one, v_scale=one,
        ...     v_cache_dtype="bfloat16")
        >>> out.shape, out.round(decimals=2).unique().tolist()
        (torch.Size([1, 8, 48]), [2.0])

    See also: `reshape_and_cache_flash`, `PagedKVCache.attend`, `merge_attention`.
    """
    if query is None or key_cache is None or value_cache is None or block_table is None:
        tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "block_table": block_table}
        name = next(name for name, x in tensors.items() if x is None)
        raise RuntimeError(f"fp8kv::paged_attention: {name} must be a tensor, got None")
    # Of any number of dimensions, as it is the operator that refuses a query without three.
    if softmax_scale is None:
        softmax_scale = max(1, query.shape[-1] if query.dim() else 1) ** -0.5
    if max_query_len is None:
        max_query_len = 1 if cu_query_lens is None else max(1, math.prod(query.shape[:1]))
    if out is None:
        dtype = query.dtype if query.dtype in REAL_DTYPES else torch.bfloat16
        out = query.new_empty((*query.shape[:-1], *value_cache.shape[-1:]), dtype=dtype)
    dims = (query.dim(), key_cache.dim(), value_cache.dim(), block_table.dim())
    if workspace is None and query.is_cuda and dims == (3, 4, 4, 2):
        two_kinds = v_cache_dtype is not None or value_cache.shape != key_cache.shape
        size = attention_workspace_size(
            query, key_cache, block_table, max_query_len=max_query_len, num_splits=num_splits,
            value_cache=value_cache if two_kinds else None,
        )  # fmt: skip
        workspace = query.new_empty(size, dtype=torch.uint8) if size > 0 else None
    attention(
        query, key_cache, value_cache, out, block_table, seq_lens, kv_cache_dtype, k_scale, v_scale,
        softmax_scale, cu_query_lens, max_query_len, max_seq_len or 0, q_scale, seq_starts,
        sliding_window or 0, softcap, sinks, k_offset, v_offset, lse, workspace, num_splits, v_cache_dtype,
    )  # fmt: skip
    return out


def attention_workspace_size(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    *,
    max_query_len: int = 1,
    num_splits: int = 0,
    value_cache: Tensor | None = None,
) -> int:
    """Bytes of workspace with which `paged_attention` works for tensors like these, whatever they hold.

    An upper bound: the plan of a call may need less. It depends on shapes and the device, so that a workspace
    for the largest batch serves all, in CUDA graphs too.

    Args:
        query: ``[num_tokens, num_heads, head_size]``.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_size]``.
        block_table: ``[num_seqs, max_blocks]``.
        max_query_len: as for `paged_attention`.
        num_splits: likewise.
        value_cache: ``[num_blocks, block_size, num_kv_heads, v_head_size]``, where K and V have two head sizes
            or dtypes; None: they don't.

    Returns:
        0 where none is needed: on the CPU, and with ``num_splits=1``.

    Raises:
        ValueError: a tensor has another number of dimensions.

    Example:
        >>> import torch, fp8kv
        >>> cache, table = torch.zeros(4, 16, 1, 64, dtype=torch.float8_e4m3fn), torch.zeros(1, 2).int()
        >>> fp8kv.attention_workspace_size(torch.zeros(1, 8, 64), cache, table)
        0
    """
    for name, tensor, dims in (
        ("query", query, 3),
        ("key_cache", key_cache, 4),
        ("block_table", block_table, 2),
        ("value_cache", value_cache, 4),
    ):
        if tensor is not None and tensor.dim() != dims:
            raise ValueError(f"attention_workspace_size: {name} must have {dims} dimensions, got {tensor.dim()}")
    if not query.is_cuda or num_splits == 1:
        return 0
    num_tokens, num_heads, head_size = query.shape
    if value_cache is not None:
        head_size = max(head_size, value_cache.shape[3])
    # Weighted sums of V, what they are divided by, and of at least 8 columns a counter of 8 bytes.
    bytes_per_column = 4 * (head_size + 4) + 1
    if num_splits == 0:
        # Two items per block of threads that are not finished; 64 columns, and 4 blocks, per multiprocessor at most.
        return 2 * _num_multiprocessors(query.device) * 64 * bytes_per_column
    num_seqs, num_kv_heads = block_table.shape[0], key_cache.shape[2]
    group = max(1, num_heads // max(1, num_kv_heads))
    columns = _columns_of_block(group * max_query_len)
    by_length = num_seqs * -(-group * min(max_query_len, max(1, num_tokens)) // columns)
    by_rows = num_seqs + num_tokens * group // columns
    all_columns = min(by_length, by_rows) * columns
    if value_cache is not None:
        # Items of a query token each.
        columns = _columns_of_block(group)
        all_columns = max(all_columns, num_tokens * -(-group // columns) * columns)
    return all_columns * num_kv_heads * num_splits * bytes_per_column + 8


def _columns_of_block(count: int) -> int:
    """A power of two, from 8 to 64."""
    return max(8, 1 << (min(64, count) - 1).bit_length())


def _num_multiprocessors(device: torch.device) -> int:
    # Dynamo evaluates it once by itself, and warns of a cache.
    count = _count_multiprocessors if torch.compiler.is_compiling() else _num_multiprocessors_by_device
    return count(device)


def _count_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_num_multiprocessors_by_device = functools.cache(_count_multiprocessors)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The result of attention over two sets of keys, from the results over each of them.

    For parts of a sequence, or several caches, such as a prefix that many sequences share. With sinks, give
    them to one of the two only: each `lse` counts the sinks of its call. ::

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    A result whose lse is -inf, of a query that saw nothing, has no influence, whatever its `out` is. It is
    made of PyTorch's operations, in fp32, on any device.

    Args:
        out_a: float32, float16 or bfloat16 ``[num_tokens, num_heads, head_size]``, as of `paged_attention`.
        lse_a: float32 ``[num_tokens, num_heads]``, as `paged_attention` writes it.
        out_b: likewise, of the shape and dtype of `out_a`.
        lse_b: likewise.

    Returns:
        ``(out, lse)`` of both, of the dtype of `out_a` and float32, to be merged with further ones.

    Raises:
        ValueError: an argument doesn't fit.

    Example:
        >>> import torch, fp8kv
        >>> zero, one = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
        >>> of_one_key, of_three_keys = torch.full((1, 2), 1.0).log(), torch.full((1, 2), 3.0).log()
        >>> out, lse = fp8kv.merge_attention(zero, of_one_key, one, of_three_keys)
        >>> out.unique().tolist(), lse.exp().round(decimals=4).unique().tolist()
        ([0.75], [4.0])

    See also: `paged_attention`.
    """
    _check_results(out_a, lse_a, out_b, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (_share(out, part, lse) for out, part in ((out_a, lse_a), (out_b, lse_b)))
    return (a + b).to(out_a.dtype), lse


def _share(out: Tensor, part: Tensor, lse: Tensor) -> Tensor:
    """The weight of a partial result in that over all keys: float32, 0 where it saw none."""
    return torch.where((part == -math.inf).unsqueeze(-1), 0.0, (part - lse).exp().unsqueeze(-1) * out)


def _check_results(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    if out_a.dtype not in REAL_DTYPES or out_a.dim() == 0:
        raise ValueError(
            "merge_attention: out_a must be float32, float16 or bfloat16 "
            f"[num_tokens, num_heads, head_size], got {_described(out_a)}"
        )
    for name, x, dtype, shape in (
        ("lse_a", lse_a, torch.float32, out_a.shape[:-1]),
        ("out_b", out_b, out_a.dtype, out_a.shape),
        ("lse_b", lse_b, torch.float32, out_a.shape[:-1]),
    ):
        if x.dtype != dtype or x.shape != shape or x.device != out_a.device:
            raise ValueError(
                f"merge_attention: {name} must be {dtype_name(dtype)} of shape {list(shape)} on "
                f"{out_a.device} as out_a is, got {_described(x)}"
            )


def _described(x: Tensor) -> str:
    return f"{dtype_name(x.dtype)} of shape {list(x.shape)} on {x.device}"
