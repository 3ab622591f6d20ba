"""One attention layer of vLLM, its cache and its batches, and beside it what the reference makes of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attention_problems import assert_near, int32
from fp8kv import reference
from helpers import assert_same_bytes

BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64
#: Rows behind the tokens of a step, which vLLM adds so that a CUDA graph fits.
PADDING = 3


def config(**changes: Any) -> Any:
    """As much of vLLM's as the plug-in reads."""
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(model="org/model", max_model_len=512),
        "scheduler_config": SimpleNamespace(max_num_batched_tokens=256),
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1),
        "load_config": SimpleNamespace(load_format="auto"),
        "compilation_config": SimpleNamespace(static_forward_context={}),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**parts | changes)


def allocate(num_blocks: int, content: int, dtype: torch.dtype, layout: str) -> Tensor:
    """[num_blocks, KV_HEADS, BLOCK_SIZE, content], as vLLM has it; "BLHNC": between the blocks of others."""
    if layout == "NHD":
        return torch.zeros(num_blocks, BLOCK_SIZE, KV_HEADS, content, dtype=dtype).transpose(1, 2)
    if layout == "HND":
        return torch.zeros(num_blocks, KV_HEADS, BLOCK_SIZE, content, dtype=dtype)
    return torch.zeros(num_blocks, 3, KV_HEADS, BLOCK_SIZE, content, dtype=dtype)[:, 1]


class Layer:
    """Stores and attends through the backend.

    Args:
        kv_cache_dtype: vLLM's name.
        scales: of K and V, as vLLM keeps them.
        layout: of `allocate`.
        dtype: of the model.
        drafts: draft tokens of a sequence.
        impl: further arguments of the implementation.
    """

    def __init__(
        self,
        kv_cache_dtype: str = "fp8",
        scales: tuple[Tensor, Tensor] | None = None,
        layout: str = "NHD",
        dtype: torch.dtype = torch.bfloat16,
        drafts: int = 0,
        **impl: Any,
    ) -> None:
        self.backend: Any = importlib.import_module("fp8kv.vllm.backend")
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.options = impl
        self.layer = SimpleNamespace(num_kv_heads=KV_HEADS, kv_cache_dtype=kv_cache_dtype)
        self.layer._k_scale, self.layer._v_scale = scales or (torch.tensor(0.03), torch.tensor(0.02))
        self.impl = self.backend.Fp8KVImpl(HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, KV_HEADS, kv_cache_dtype=kv_cache_dtype, **impl)
        speculative = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
        self.config = config(speculative_config=speculative if drafts else None)
        self.config.compilation_config.static_forward_context["layer"] = self.layer
        self.builder = self.backend.Fp8KVMetadataBuilder(None, ["layer"], self.config, torch.device("cpu"))

        num_blocks, self.per_token = 80, kv_cache_dtype == "fp8_per_token_head"
        fp8 = kv_cache_dtype.startswith("fp8")
        element = torch.uint8 if fp8 else dtype
        self.name = "fp8" if self.per_token else kv_cache_dtype
        self.kv_cache = allocate(num_blocks, 2 * (HEAD_SIZE + 4 * self.per_token), element, layout)
        self.caches = torch.zeros(2, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE, dtype=element)
        self.scale_caches = torch.ones(2, num_blocks, BLOCK_SIZE, KV_HEADS)
        self.blocks = torch.randperm(num_blocks, generator=self.generator).int()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def batch(self, contexts: Sequence[int], queries: Sequence[int], padded: int = 0) -> Any:
        """Metadata of vLLM: sequences of so many tokens before this step and in it; `padded`: empty ones."""
        lengths = [a + b for a, b in zip(contexts, queries, strict=True)] + [0] * padded
        starts = int32(0, *accumulate([*queries, *[0] * padded]))
        width = -(-max(lengths) // BLOCK_SIZE) + 1
        table = torch.full((len(lengths), width), 12345678, dtype=torch.int32)
        used = 0
        for row, length in zip(table, lengths, strict=True):
            count = -(-length // BLOCK_SIZE)
            row[:count] = self.blocks[used : used + count]
            used += count
        slots = [
            self._slots(table[s], range(first, first + count))
            for s, (first, count) in enumerate(zip(contexts, queries, strict=True))
        ]
        attention: Any = importlib.import_module("vllm.v1.attention.backend")
        return attention.CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=int32(*lengths),
            num_reqs=len(lengths),
            num_actual_tokens=sum(queries),
            max_query_len=max(queries),
            max_seq_len=max(lengths),
            block_table_tensor=table,
            slot_mapping=torch.cat(slots),
            seq_lens_cpu_upper_bound=int32(*lengths),
        )

    @staticmethod
    def _slots(table: Tensor, positions: range) -> Tensor:
        p = torch.tensor([*positions], dtype=torch.int64)
        return table[p // BLOCK_SIZE].long() * BLOCK_SIZE + p % BLOCK_SIZE

    def store(self, slots: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> None:
        """Tokens of a step, through the backend and by the reference."""
        rows = len(slots) + PADDING
        qkv = self.normal(rows, (HEADS + 2 * KV_HEADS) * HEAD_SIZE)  # of which K and V are slices, as in vLLM
        parts = qkv[:, HEADS * HEAD_SIZE :].view(rows, 2, KV_HEADS, HEAD_SIZE)
        key, value = (parts[:, i] if given is None else given for i, given in enumerate((key, value)))
        self.impl.do_kv_cache_update(self.layer, key, value, self.kv_cache, slots)
        if self.per_token:
            reference.reshape_and_cache_flash_dynamic(key, value, *self.caches, *self.scale_caches, slots, "fp8")
        else:
            scales = self.layer._k_scale.detach(), self.layer._v_scale.detach()
            reference.reshape_and_cache_flash(key, value, *self.caches, slots, self.name, *scales)

    def fill(self, batch: Any, contexts: Sequence[int]) -> None:
        """The tokens of earlier steps, and of this one."""
        for s, context in enumerate(contexts):
            self.store(self._slots(batch.block_table_tensor[s], range(context)))
        self.store(batch.slot_mapping)

    def attend(self, batch: Any, metadata: Any = None, copied: Sequence[slice] = ()) -> Tensor:
        """Of random queries; rows behind the tokens must stay as they are.

        Rows that are `copied` attend to keys and values that are rounded to 16 bits.
        """
        rows = batch.num_actual_tokens
        query = self.normal(rows + PADDING, HEADS, HEAD_SIZE)
        out = torch.full_like(query, 7.0)
        metadata = metadata or self.builder.build(0, batch)
        assert self.impl.forward(self.layer, query, query, query, self.kv_cache, metadata, out) is out
        assert out[rows:].eq(7).all()
        expected = self.expected(batch, query[:rows], *self.stored())
        if copied:
            of_copies = self.expected(batch, query[:rows], *self.copies())
            for part in copied:
                expected[part] = of_copies[part]
        assert_near(out[:rows], expected, self.largest_value(rows))
        return out[:rows]

    def stored(self) -> tuple[Sequence[Tensor], str, Sequence[Tensor]]:
        """Caches, their dtype, and the scales of K and V."""
        scales = self.scale_caches if self.per_token else (self.layer._k_scale, self.layer._v_scale)
        return self.caches, self.name, [x.detach() for x in scales]

    def copies(self) -> tuple[Sequence[Tensor], str, Sequence[Tensor]]:
        """The same, rounded to the dtype of the model."""
        caches, _, scales = self.stored()
        shape = (*self.caches.shape[1:4], 1) if self.per_token else (1, 1, -1, 1)
        values = [
            (cache.view(torch.float8_e4m3fn).float() * scale.view(shape)).to(self.dtype)
            for cache, scale in zip(caches, scales, strict=True)
        ]
        return values, "auto", scales

    def expected(self, batch: Any, query: Tensor, caches: Sequence[Tensor], name: str, scales: Sequence[Tensor]) -> Tensor:
        return reference.paged_attention(
            query,
            *caches,
            batch.block_table_tensor,
            batch.seq_lens,
            kv_cache_dtype=name,
            k_scale=scales[0],
            v_scale=scales[1],
            cu_query_lens=batch.query_start_loc,
            sliding_window=self.options.get("sliding_window"),
            softcap=self.options.get("logits_soft_cap") or 0.0,
            sinks=self.options.get("sinks"),
            out=torch.zeros(query.shape, dtype=torch.float64),
        )

    def largest_value(self, rows: int) -> Tensor:
        return torch.full((rows, HEADS), 5.0, dtype=torch.float64)  # random numbers below 5 sigma

    def assert_same_cache(self) -> None:
        """Every byte of the cache is that of the reference."""
        key, value = self.kv_cache.transpose(1, 2).chunk(2, dim=-1)
        for of_vllm, ours, scales in zip((key, value), self.caches, self.scale_caches, strict=True):
            assert_same_bytes(of_vllm[..., :HEAD_SIZE].contiguous(), ours)
            if self.per_token:
                written = ours.ne(0).any(-1)
                found = of_vllm[..., HEAD_SIZE:].contiguous().view(torch.float32).squeeze(-1)
                assert torch.equal(found[written], scales[written])


def dense_attention(calls: list[dict[str, Any]]) -> Callable[..., None]:
    """In the place of ``flash_attn_varlen_func``: fp64, sequence by sequence; notes its arguments."""

    def attend(
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        softcap: float,
        s_aux: Tensor | None,
        fa_version: int,
    ) -> None:
        calls.append({"rows": len(q), "tokens": len(k), "bounds": (max_seqlen_q, max_seqlen_k)})
        assert causal
        assert (softcap, s_aux, fa_version) == (0.0, None, 3)
        for s in range(len(cu_seqlens_q) - 1):
            rows, tokens = (slice(*sums[s : s + 2].tolist()) for sums in (cu_seqlens_q, cu_seqlens_k))
            keys, values = (x[tokens].double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
            logits = softmax_scale * torch.einsum("qhd,khd->hqk", q[rows].double(), keys)
            length, count = len(keys), logits.shape[1]
            seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)

    return attend
