"""The paged KV cache: `PagedKVCache`, and one documented function per operator."""

from __future__ import annotations

from fp8kv.kv_cache.attention import attention_workspace_size, merge_attention, paged_attention
from fp8kv.kv_cache.ops import (
    gather_and_dequant_cache,
    reshape_and_cache_flash,
    reshape_and_cache_flash_dynamic,
    rope_quant_and_cache,
)
from fp8kv.kv_cache.paged import PagedKVCache

__all__ = [
    "PagedKVCache",
    "attention_workspace_size",
    "gather_and_dequant_cache",
    "merge_attention",
    "paged_attention",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_dynamic",
    "rope_quant_and_cache",
]
