"""What stands around SGLang's store of keys and values. Nothing here imports SGLang."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp8kv._dtypes import CACHE_NAMES, FORMATS, REAL_DTYPES
from fp8kv.kv_cache import reshape_and_cache_flash


def set_kv_buffer(
    original: Callable[..., Any],
    pool: Any,
    layer: Any,
    loc_info: Any,
    cache_k: Tensor,
    cache_v: Tensor,
    k_scale: Any = None,
    v_scale: Any = None,
    layer_id_override: int | None = None,
    dcp_kv_mask: Tensor | None = None,
) -> Any:
    """Stores tokens in an FP8 pool in one launch; whatever else is left to `original`.

    SGLang divides in the dtype of the model, in place, and casts: two roundings, and NaN for what lies beyond
    the range. Here it is one rounding, values are clipped, and `cache_k` and `cache_v` stay as they are.

    Args:
        original: ``MHATokenToKVPool.set_kv_buffer``.
        pool: the pool.
        layer: of the model, with ``layer_id``.
        loc_info: the slots, or an object whose ``loc`` they are.
        cache_k: ``[num_tokens, head_num, head_dim]``.
        cache_v: likewise.
        k_scale: None, a number, or a tensor of one element.
        v_scale: likewise.
        layer_id_override: in the place of that of the layer.
        dcp_kv_mask: of tokens that another rank stores.
    """
    if dcp_kv_mask is not None or not _is_ours(pool, cache_k, k_scale, v_scale):
        return original(pool, layer, loc_info, cache_k, cache_v, k_scale, v_scale, layer_id_override, dcp_kv_mask)
    pool._check_physical_write_loc(loc_info, "set_kv_buffer (fp8kv)")
    index = (layer.layer_id if layer_id_override is None else layer_id_override) - pool.start_layer
    key_cache, value_cache = (_blocks(buffer[index], pool.use_hnd) for buffer in (pool.k_buffer, pool.v_buffer))
    reshape_and_cache_flash(
        cache_k,
        cache_v,
        key_cache,
        value_cache,
        getattr(loc_info, "loc", loc_info),
        CACHE_NAMES[pool.dtype],
        _scale(k_scale, cache_k.device),
        _scale(v_scale, cache_v.device),
    )
    return None


def _is_ours(pool: Any, cache_k: Tensor, *scales: Any) -> bool:
    """A plain FP8 pool, not one of the classes derived from it, that is given values of another dtype."""
    return (
        type(pool).__name__ == "MHATokenToKVPool"
        and pool.dtype in FORMATS
        and cache_k.dtype in REAL_DTYPES
        and not pool.is_quantized_kv_cache
        and pool.kv_cache_layout in ("nhd", "hnd")
        and pool.head_dim == pool.v_head_dim
        and all(_fits(scale, cache_k.device) for scale in scales)
    )


def _fits(scale: Any, device: torch.device) -> bool:
    if not isinstance(scale, Tensor):
        return scale is None or isinstance(scale, (int, float))
    return scale.numel() == 1 and scale.dtype == torch.float32 and scale.device == device


def _blocks(buffer: Tensor, use_hnd: bool) -> Tensor:
    """``[num_blocks, block_size, num_kv_heads, head_size]``; without pages, blocks of one token."""
    return buffer.transpose(1, 2) if use_hnd else buffer.unsqueeze(1)


def _scale(scale: Any, device: torch.device) -> Tensor:
    return scale if isinstance(scale, Tensor) else _constant(1.0 if scale is None else float(scale), device)


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    """Made at the first call, which SGLang makes before it captures CUDA graphs."""
    return torch.full((1,), value, dtype=torch.float32, device=device)
