"""The cache of a layer as vLLM allocates it, as the operators take it. Nothing here imports vLLM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp8kv._dtypes import CACHE_DTYPES, FP8_DTYPES, QUANTIZED_CACHE_NAMES
from fp8kv.kv_cache import reshape_and_cache_flash, reshape_and_cache_flash_dynamic

#: vLLM's name of a cache with a scale for each token and head.
PER_TOKEN_HEAD = "fp8_per_token_head"
#: Bytes of such a scale, which lies behind its head.
SCALE_BYTES = 4
#: The formats of caches that vLLM has names for, which INT8 is not among.
FP8_NAMES = tuple(name for name in QUANTIZED_CACHE_NAMES if CACHE_DTYPES[name] in FP8_DTYPES)
#: What `--kv-cache-dtype` may be for the backend.
CACHE_NAMES = ("auto", "float16", "bfloat16", *FP8_NAMES, PER_TOKEN_HEAD)


def content_size(head_size: int, kv_cache_dtype: str) -> int:
    """Elements of K and V of one token and head, scales included."""
    return 2 * (head_size + SCALE_BYTES if kv_cache_dtype == PER_TOKEN_HEAD else head_size)


class LayerCache(NamedTuple):
    """Views of the cache of one layer.

    Attributes:
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_size]``.
        value_cache: likewise.
        dtype: the `kv_cache_dtype` of the operators.
        k_scales: float32 ``[num_blocks, block_size, num_kv_heads]`` in a cache with scales of single tokens;
            None: the layer has them.
        v_scales: likewise.
    """

    key_cache: Tensor
    value_cache: Tensor
    dtype: str
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @staticmethod
    def of(kv_cache: Tensor, head_size: int, kv_cache_dtype: str) -> LayerCache:
        """The cache in vLLM's tensor.

        Args:
            kv_cache: ``[num_blocks, num_kv_heads, block_size, content_size]``, any strides but that of the
                last dimension, which is 1: K, and behind it V, of one token and head.
            head_size: of K, and of V.
            kv_cache_dtype: vLLM's name, one of `CACHE_NAMES`.

        Raises:
            ValueError: the last dimension has another size.
        """
        content = content_size(head_size, kv_cache_dtype)
        if kv_cache.shape[-1] != content:
            raise ValueError(
                f"fp8kv.vllm: the cache must have {content} elements for K and V of a token and head with "
                f"head_size={head_size} and {kv_cache_dtype}, got shape {list(kv_cache.shape)}"
            )
        tokens = kv_cache.transpose(1, 2)
        key, value = tokens[..., : content // 2], tokens[..., content // 2 :]
        if kv_cache_dtype != PER_TOKEN_HEAD:
            return LayerCache(key, value, kv_cache_dtype)
        k_scales, v_scales = (x[..., head_size:].view(torch.float32).squeeze(-1) for x in (key, value))
        return LayerCache(key[..., :head_size], value[..., :head_size], "fp8", k_scales, v_scales)

    @property
    def quantized(self) -> bool:
        return self.dtype in QUANTIZED_CACHE_NAMES

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the elements, which vLLM allocates as bytes if they are FP8."""
        return CACHE_DTYPES[self.dtype] if self.quantized else self.key_cache.dtype

    def scales(self, k_scale: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor]:
        """The scales of K and V: of single tokens, or else the layer's, which are passed."""
        if self.k_scales is None or self.v_scales is None:
            return k_scale, v_scale
        return self.k_scales, self.v_scales

    def append(self, key: Tensor, value: Tensor, slot_mapping: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
        """Stores tokens; rows of `key` beyond the slots are padding, as `fp8kv.reshape_and_cache_flash`."""
        if self.k_scales is None or self.v_scales is None:
            reshape_and_cache_flash(key, value, self.key_cache, self.value_cache, slot_mapping, self.dtype, k_scale, v_scale)
        else:
            reshape_and_cache_flash_dynamic(
                key, value, self.key_cache, self.value_cache, self.k_scales, self.v_scales, slot_mapping,
                self.dtype,
            )  # fmt: skip
