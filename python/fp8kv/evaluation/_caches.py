"""The caches that an evaluation compares.

All of them get keys and values rounded to 16 bits, as a model in 16 bits has them, and dequantize to 16-bit
values: so the arithmetic of the model may be of higher precision, and what differs is the cache alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from fp8kv.nn import AttentionScales
from fp8kv.transformers import Fp8Cache


class _Rounding:
    """Rounds what the `update` of a cache gets, and keeps its dtype, so that no step of decoding converts."""

    rounded_to = torch.bfloat16

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = (x.to(self.rounded_to).to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)  # type: ignore[misc]


class _RoundingBack(_Rounding):
    """Rounds what `update` returns as well; in place, as `Fp8Cache` marks its tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = super().update(key_states, value_states, *args, **kwargs)
        if key_states.dtype != self.rounded_to:
            for x in seen:
                x.copy_(x.to(self.rounded_to))
        return seen


class Cache16(_Rounding, DynamicCache):
    """Transformers' own cache, of values of 16 bits."""

    def __init__(self, config: Any, rounded_to: torch.dtype) -> None:
        super().__init__(config=config)
        self.rounded_to = rounded_to

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values take in 16 bits."""
        layers: Any = self.layers
        held = [x for layer in layers if layer.is_initialized for x in (layer.keys, layer.values)]
        num_elements: int = sum(x.numel() for x in held)
        return num_elements * self.rounded_to.itemsize


class Cache8(_RoundingBack, Fp8Cache):
    """`Fp8Cache`."""

    def __init__(self, config: Any, rounded_to: torch.dtype, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rounded_to = rounded_to


class _ReadBack:
    """Makes attention see the first tokens, too, as the cache returns them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        if seen[0] is not key_states:
            return seen
        nothing = key_states[:, :, :0], value_states[:, :, :0]
        return super().update(*nothing, *args, **kwargs)  # type: ignore[misc]


class TransformersCache8(_RoundingBack, _ReadBack, QuantizedCache):
    """Transformers' own FP8 cache, of version 5.21 and newer.

    Raises:
        ValueError: Transformers is older; or the model has layers without full attention.
    """

    def __init__(self, config: Any, rounded_to: torch.dtype) -> None:
        super().__init__("fp8", config)
        self.rounded_to = rounded_to

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that it holds."""
        held = [x for layer in self.layers for x in vars(layer).values()]
        tensors = [x for group in held for x in (group if isinstance(group, tuple) else (group,))]
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


class ObservingCache(Cache16):
    """A 16-bit cache whose layers observe their inputs, as in an engine that calculates its scales.

    Args:
        attention: by layer; missing layers are added.
    """

    def __init__(self, config: Any, rounded_to: torch.dtype, attention: dict[int, AttentionScales]) -> None:
        super().__init__(config, rounded_to)
        self.attention = attention

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        _, heads, _, size = key_states.shape
        if layer_idx not in self.attention:
            self.attention[layer_idx] = AttentionScales(heads, heads, size, calculate_kv_scales=True, device=key_states.device)
        key, value = (x.to(self.rounded_to).transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        self.attention[layer_idx].observe(None, key, value)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
