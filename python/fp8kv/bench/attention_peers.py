"""Peers of attention: one adapter each, which creates calls for the buffers of a case.

An adapter returns None if the peer doesn't support the case. It raises an ImportError if the peer is not
installed, and the peer may raise anything; both become notes in the report.

Only FP8 caches have peers. Peers that read 16 or 32 bits get the dequantized cache, rounded to bf16 or fp32.
Peers that read pages get them in random order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fp8kv
from fp8kv.bench.kv_cache import BLOCK_SIZE, KV_CACHE_DTYPE
from fp8kv.bench.measure import FP8, INPUT, Call

if TYPE_CHECKING:
    from fp8kv.bench.attention import AttentionCase, Buffers

Peer = Callable[["Buffers"], Call]


# Dense keys and values


def sdpa(
    case: AttentionCase,
    dtype: torch.dtype = INPUT,
    backend: SDPBackend | None = None,
    grouped: bool = False,
) -> Peer | None:
    """PyTorch's attention to dense K and V; see `_attend` for `grouped`."""
    if not _fits_sdpa(case) or (grouped and (case.how.queries > 1 or case.num_heads == case.num_kv_heads)):
        return None

    def peer(b: Buffers) -> Call:
        rows = _rows(case, dtype)
        _gather(case, b, rows)()
        attend = _attend(case, b, [x.contiguous() for x in _dense(case, rows)], grouped)

        def call() -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return attend()

        return call

    return peer


def gather_and_sdpa(case: AttentionCase) -> Peer | None:
    """`gather_and_dequant_cache` into a bf16 workspace shared by all calls, then PyTorch's attention."""
    if not _fits_sdpa(case):
        return None
    rows = _rows(case, INPUT)

    def peer(b: Buffers) -> Call:
        gather = _gather(case, b, rows)
        attend = _attend(case, b, _dense(case, rows), grouped=case.how.queries == 1)

        def call() -> Tensor:
            gather()
            return attend()

        return call

    return peer


def _fits_sdpa(case: AttentionCase) -> bool:
    how = case.how
    return not (how.ragged or how.softcap or how.sinks or (how.window and how.queries > 1))


def _rows(case: AttentionCase, dtype: torch.dtype, window: bool = True) -> Tensor:
    """For K and V of all sequences, of the sliding window only: [2, tokens, num_kv_heads, head_size]"""
    seen = min(case.context, case.how.window or case.context) if window else case.context
    return torch.empty(2, case.batch * seen, case.num_kv_heads, case.head_size, dtype=dtype, device=case.device)


def _gather(case: AttentionCase, b: Buffers, rows: Tensor) -> Call:
    """A call that fills `rows` with the last positions of each sequence."""
    seen = rows.shape[1] // case.batch
    sums = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device) * seen
    starts = torch.full_like(sums[1:], case.context - seen)
    key, value = rows
    return lambda: fp8kv.gather_and_dequant_cache(
        b.key_cache, b.value_cache, key, value, b.table, sums, KV_CACHE_DTYPE, b.k_scale, b.v_scale, starts
    )


def _dense(case: AttentionCase, rows: Tensor) -> list[Tensor]:
    """K and V, [batch, num_kv_heads, positions, head_size]"""
    shape = (2, case.batch, -1, case.num_kv_heads, case.head_size)
    return list(rows.view(shape).transpose(2, 3))


def _attend(case: AttentionCase, b: Buffers, dense: list[Tensor], grouped: bool) -> Callable[[], Tensor]:
    """PyTorch's attention; returns [tokens, num_heads, head_size].

    `grouped`: the query heads that share a KV head are the queries of one head, which reads K and V once.
    """
    key, value = dense
    query = b.query.to(key.dtype)
    if grouped:
        q = query.view(case.batch, case.num_kv_heads, -1, case.head_size)
        return lambda: scaled_dot_product_attention(q, key, value).view(query.shape)
    queries, seen = case.how.queries, key.shape[2]
    q = query.view(case.batch, queries, case.num_heads, case.head_size).transpose(1, 2)
    mask = None
    if queries > 1:
        mask = torch.ones(queries, seen, dtype=torch.bool, device=case.device).tril(seen - queries)
    gqa = case.num_heads > case.num_kv_heads
    return lambda: scaled_dot_product_attention(q, key, value, mask, enable_gqa=gqa).transpose(1, 2).flatten(0, 1)


# Pages


def flash_attention_3(case: AttentionCase, fp8: bool) -> Peer | None:
    """FlashAttention-3 of vLLM, without precomputed scheduler metadata; with FP8, its queries are FP8 too."""
    if fp8 and case.how.scales == "token-head":
        return None
    attend = importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    order = _order(case)
    window = case.how.window

    def peer(b: Buffers) -> Call:
        query, table = b.query, order.view_as(b.table).int()
        descales: dict[str, Tensor] = {}
        if fp8:
            groups = query.view(-1, case.num_kv_heads, case.group * case.head_size)
            amax = groups.abs().float().amax((0, 2))
            scale = amax / torch.finfo(FP8).max
            query = (query / scale.repeat_interleave(case.group).view(-1, 1)).to(FP8)
            names = {"q_descale": scale, "k_descale": b.k_scale, "v_descale": b.v_scale}
            descales = {name: x.expand(case.batch, case.num_kv_heads) for name, x in names.items()}
        key, value = _pages(case, b, order, fp8)
        out = torch.empty_like(b.query)
        sinks = None if b.sinks is None else b.sinks.to(INPUT)
        return lambda: attend(
            query, key, value, case.how.queries, b.cu_query_lens, case.context, seqused_k=b.lengths,
            causal=True, window_size=[window - 1, 0] if window else [-1, -1], softcap=case.how.softcap,
            block_table=table, out=out, fa_version=3, s_aux=sinks, **descales,
        )  # fmt: skip

    return peer


def flashinfer(case: AttentionCase, fp8: bool) -> Peer | None:
    """FlashInfer's decode, planned ahead. In FP8, scales per head are expanded to scales per token and head."""
    how = case.how
    decode = importlib.import_module("flashinfer.decode")
    order = _order(case)
    pages = [-(-length // BLOCK_SIZE) for length in case.lengths]
    table = order.view(case.batch, -1).int()
    indices = torch.cat([row[:count] for row, count in zip(table, pages, strict=True)])
    numbers = torch.tensor([0, *pages], device=case.device)
    sums = numbers.cumsum(0).int()
    last = torch.tensor([(n - 1) % BLOCK_SIZE + 1 for n in case.lengths], device=case.device).int()
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=case.device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(sums),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    of_slots = fp8 and how.scales != "tensor"
    # Arguments that older versions lack are passed only if needed.
    options = {"q_len_per_req": how.queries} if how.queries > 1 else {}
    options |= {"use_token_head_sf": True} if of_slots else {}
    wrapper.plan(
        sums, indices, last, case.num_heads, case.num_kv_heads, case.head_size, BLOCK_SIZE,
        window_left=how.window - 1, logits_soft_cap=how.softcap, q_data_type=INPUT,
        kv_data_type=FP8 if fp8 else INPUT, **options,
    )  # fmt: skip

    def peer(b: Buffers) -> Call:
        caches = tuple(_pages(case, b, order, fp8))
        out = torch.empty_like(b.query)
        options: dict[str, Any] = {} if b.sinks is None else {"sinks": b.sinks}
        if of_slots:
            scales = [b.k_scale, b.v_scale]
            if how.scales == "token-head":
                scales = [_reordered(x[b.table.flatten().long()], order) for x in scales]
            options["kv_cache_sf"] = tuple(x.expand(caches[0].shape[:3]) for x in scales)
        elif fp8:
            options |= {"k_scale": b.k_scale.item(), "v_scale": b.v_scale.item()}
        return lambda: wrapper.run(b.query, caches, out=out, **options)

    return peer


FLASHINFER_WORKSPACE = 128 << 20  # bytes, as its documentation recommends


def _order(case: AttentionCase) -> Tensor:
    """The destinations of the pages in the rows of a call's block table."""
    generator = torch.Generator(case.device).manual_seed(0)
    return torch.randperm(case.batch * (case.context // BLOCK_SIZE), generator=generator, device=case.device)


def _pages(case: AttentionCase, b: Buffers, order: Tensor, fp8: bool) -> list[Tensor]:
    """Copies of the pages of a call, in FP8 or bf16: K and V, [pages, block size, num_kv_heads, head_size]"""
    if fp8:
        used = b.table.flatten().long()
        return [_reordered(cache[used], order).view(FP8) for cache in (b.key_cache, b.value_cache)]
    rows = _rows(case, INPUT, window=False)
    _gather(case, b, rows)()
    shape = (-1, BLOCK_SIZE, case.num_kv_heads, case.head_size)
    return [_reordered(x.view(shape), order) for x in rows]


def _reordered(pages: Tensor, order: Tensor) -> Tensor:
    result = torch.empty_like(pages)
    result[order] = pages
    return result


Adapter = Callable[["AttentionCase"], Peer | None]


def _of_fp8(adapter: Callable[..., Peer | None], **options: Any) -> Adapter:
    """The adapter with these options; None for caches of another format."""
    return lambda case: adapter(case, **options) if case.how.dtype == FP8 else None


CUDA_PEERS: dict[str, Adapter] = {
    "SDPA cuDNN": _of_fp8(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": _of_fp8(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": _of_fp8(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": _of_fp8(sdpa, backend=SDPBackend.MATH),
    "SDPA grouped": _of_fp8(sdpa, grouped=True),
    "gather + SDPA": _of_fp8(gather_and_sdpa),
    "FA3 bf16": _of_fp8(flash_attention_3, fp8=False),
    "FA3 fp8": _of_fp8(flash_attention_3, fp8=True),
    "FlashInfer bf16": _of_fp8(flashinfer, fp8=False),
    "FlashInfer fp8": _of_fp8(flashinfer, fp8=True),
}
CPU_PEERS: dict[str, Adapter] = {
    "SDPA bf16": _of_fp8(sdpa),
    "SDPA fp32": _of_fp8(sdpa, dtype=torch.float32),
    "SDPA bf16 grouped": _of_fp8(sdpa, grouped=True),
    "SDPA fp32 grouped": _of_fp8(sdpa, dtype=torch.float32, grouped=True),
    "gather + SDPA": _of_fp8(gather_and_sdpa),
}
