"""All that differs between the versions of vLLM: tested with 0.26, and with the interfaces of 0.33."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from fp8kv.vllm.cache import SCALE_BYTES, content_size

try:
    from vllm.config import get_current_vllm_config_or_none as current_config
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
        AttentionType,
        CommonAttentionMetadata,
    )
    from vllm.v1.attention.backends import registry
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills
except ImportError as error:
    raise ImportError(
        f"fp8kv.vllm: vLLM must be installed, in a version with the attention backends of 0.26 or newer ({error})",
        name=error.name,
    ) from error

__all__ = [
    "BACKEND_NAME",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionType",
    "CacheLayout",
    "CommonAttentionMetadata",
    "current_config",
    "register_backends",
    "replace_backend",
    "split_decodes_and_prefills",
]

logger = logging.getLogger("vllm.fp8kv")

#: 0.33 takes new names; before, there is one name for all that is not vLLM's.
CAN_ADD_NAMES = hasattr(registry.AttentionBackendEnum, "register")
BACKEND_NAME = "FP8KV" if CAN_ADD_NAMES else "CUSTOM"
BACKEND = "fp8kv.vllm.backend.Fp8KVBackend"


def register_backends() -> None:
    """Makes the backend known under `BACKEND_NAME`, unless another plug-in has that name."""
    backends: Any = registry.AttentionBackendEnum
    register: Any = registry.register_backend
    if CAN_ADD_NAMES:
        if BACKEND_NAME not in backends.__members__:
            register(BACKEND_NAME, BACKEND)
    elif not backends.CUSTOM.is_overridden():
        register(backends.CUSTOM, BACKEND)
    elif backends.CUSTOM.get_path() != BACKEND:
        logger.warning("fp8kv.vllm: CUSTOM is %s already, so its own backend is unavailable", backends.CUSTOM.get_path())


def replace_backend(name: str, path: str) -> None:
    """Puts a subclass in the place of one of vLLM's backends.

    Raises:
        ValueError: another plug-in has done so.
    """
    backend: Any = registry.AttentionBackendEnum[name]
    if backend.get_path() not in (backend.value, path):
        raise ValueError(
            f"fp8kv.vllm: {name} must be vLLM's own with FP8KV_VLLM_WRITES=1, got {backend.get_path()} of another plug-in"
        )
    registry.register_backend(backend, path)


class CacheLayout:
    """Part of the backend: how the cache lies in memory, which 0.26 asks and 0.33 decides.

    In both it is, for a layer, ``[num_blocks, num_kv_heads, block_size, content_size]`` with any strides.
    """

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """0.26."""
        return (num_blocks, num_kv_heads, block_size, content_size(head_size, cache_dtype_str))

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """0.26: the dimensions of that shape, of all layers if asked so, from the outermost in memory on."""
        from vllm.v1.attention.backends import utils

        orders = {
            ("NHD", False): (0, 2, 1, 3),
            ("NHD", True): (1, 0, 3, 2, 4),
            ("HND", False): (0, 1, 2, 3),
            ("HND", True): (1, 2, 0, 3, 4),
        }
        layout_of: Any = vars(utils)["get_kv_cache_layout"]
        return orders[layout_of(), include_num_layers_dimension]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """0.33: room for the scales of single tokens; 0.26 adds it itself."""
        if not spec.kv_quant_mode.is_per_token_head or spec.state_content_bytes is not None:
            return spec
        return replace(spec, state_content_bytes=spec.head_size + spec.head_size_v + 2 * SCALE_BYTES)
