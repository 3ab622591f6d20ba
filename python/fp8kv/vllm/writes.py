"""FLASH_ATTN of vLLM with FP8KV's cache writes, and its query quantization. It needs vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn

from fp8kv._dtypes import CACHE_DTYPES, REAL_DTYPES
from fp8kv.quantization import static_scaled_fp8_quant
from fp8kv.vllm import versions
from fp8kv.vllm.cache import LayerCache
from fp8kv.vllm.scales import check_at_start

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_QUANT_FP8 = "QuantFP8"


def take_over() -> None:
    """Puts the classes below in the place of vLLM's. It may be called many times.

    Raises:
        ValueError: another plug-in has replaced one of them.
    """
    versions.replace_backend("FLASH_ATTN", f"{__name__}.WritesBackend")
    present = op_registry_oot.get(_QUANT_FP8)
    if present is None:
        CustomOp.register_oot(name=_QUANT_FP8)(Fp8KVQuantFP8)
        ours: Any = Fp8KVQuantFP8
        ours.name = vars(QuantFP8)["name"]  # by which custom_ops turns it on and off
    elif present is not Fp8KVQuantFP8:
        raise ValueError(
            f"fp8kv.vllm: QuantFP8 must be vLLM's own with FP8KV_VLLM_WRITES=1, got {present.__qualname__} "
            "of another plug-in"
        )


class WritesBackend(flash_attn.FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[WritesImpl]:
        return WritesImpl

    @staticmethod
    def get_builder_cls() -> type[WritesBuilder]:
        return WritesBuilder


class WritesBuilder(flash_attn.FlashAttentionMetadataBuilder):
    """Checks scales when all is loaded."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_at_start(vllm_config, layer_names, letters="qkv", observe=0)


class WritesImpl(flash_attn.FlashAttentionImpl):
    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        ours = self.kv_cache_dtype in ("auto", *CACHE_DTYPES)
        if not ours or self.attn_type in (AttentionType.ENCODER_ONLY, AttentionType.ENCODER):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        cache = LayerCache.of(kv_cache, self.head_size, self.kv_cache_dtype)
        cache.append(key, value, slot_mapping, layer._k_scale, layer._v_scale)


class Fp8KVQuantFP8(QuantFP8):
    """Of queries, and of whatever else is quantized with given scales: the bytes are the same."""

    def forward_cuda(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        scale_ub: Tensor | None = None,
        use_triton: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if scale is None or self.num_token_padding is not None or x.dtype not in REAL_DTYPES:
            given: tuple[Tensor, Tensor] = super().forward_cuda(x, scale, scale_ub, use_triton)
            return given
        result = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        static_scaled_fp8_quant(result, x, scale, tuple(self.group_shape))
        return result, scale
