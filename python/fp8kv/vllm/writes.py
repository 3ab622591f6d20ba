"""FLASH_ATTN of vLLM with our cache writes. It needs vLLM, which imports it when it chooses a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn

from fp8kv._dtypes import CACHE_DTYPES
from fp8kv.vllm.cache import LayerCache
from fp8kv.vllm.scales import check_at_start

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class WritesBackend(flash_attn.FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[WritesImpl]:
        return WritesImpl

    @staticmethod
    def get_builder_cls() -> type[WritesBuilder]:
        return WritesBuilder


class WritesBuilder(flash_attn.FlashAttentionMetadataBuilder):
    """Checks scales when all is loaded."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_at_start(vllm_config, layer_names, letters="qkv", observe=0)


class WritesImpl(flash_attn.FlashAttentionImpl):
    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        ours = self.kv_cache_dtype in ("auto", *CACHE_DTYPES)
        if not ours or self.attn_type in (AttentionType.ENCODER_ONLY, AttentionType.ENCODER):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        cache = LayerCache.of(kv_cache, self.head_size, self.kv_cache_dtype)
        cache.append(key, value, slot_mapping, layer._k_scale, layer._v_scale)
