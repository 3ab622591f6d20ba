"""FlashAttention of vLLM on a copy of the cache in 16 bits, for long queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8kv.kv_cache import gather_and_dequant_cache
from fp8kv.vllm.batch import Copy, Part
from fp8kv.vllm.cache import LayerCache


class FlashAttention(NamedTuple):
    """That of vLLM which fits a layer.

    Attributes:
        function: ``flash_attn_varlen_func``.
        version: its argument `fa_version`.
    """

    function: Callable[..., Any]
    version: int

    @staticmethod
    def find(head_size: int, dtype: torch.dtype, sinks: Tensor | None) -> FlashAttention | None:
        """None: there is none for such a layer, or in such a vLLM."""
        if head_size > 256 or head_size % 8 or dtype not in (torch.float16, torch.bfloat16):
            return None
        try:
            from vllm.v1.attention.backends import fa_utils
        except ImportError:
            return None
        names: Any = vars(fa_utils)
        if "flash_attn_varlen_func" not in names:
            return None
        version = names["get_flash_attn_version"](head_size=head_size)
        if version is None or (sinks is not None and not names["flash_attn_supports_sinks"]()):
            return None
        return FlashAttention(names["flash_attn_varlen_func"], version)

    def attend(
        self,
        part: Part,
        copy: Copy,
        query: Tensor,
        out: Tensor,
        block_table: Tensor,
        cache: LayerCache,
        scales: tuple[Tensor, Tensor],
        **options: Any,
    ) -> None:
        """Copies and attends.

        Args:
            query: of the whole batch, as is `out`.
            block_table: of the part.
            options: ``softmax_scale``, ``softcap`` and ``s_aux`` (sinks) of ``flash_attn_varlen_func``.
        """
        key, value = query.new_empty(2, copy.num_tokens, *cache.key_cache.shape[2:])
        gather_and_dequant_cache(
            cache.key_cache, cache.value_cache, key, value, block_table, copy.cu_seq_lens,
            cache.dtype, *scales,
        )  # fmt: skip
        self.function(
            q=query[part.rows],
            k=key,
            v=value,
            out=out[part.rows],
            cu_seqlens_q=part.cu_query_lens,
            cu_seqlens_k=copy.cu_seq_lens,
            max_seqlen_q=part.max_query_len,
            max_seqlen_k=copy.max_seq_len,
            causal=True,
            fa_version=self.version,
            **options,
        )
