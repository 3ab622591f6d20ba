"""Layers that have attention and a recurrent state, as in Falcon H1 and Zamba."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from fp8kv.transformers.layers.base import Fp8Layer
from fp8kv.transformers.layers.dynamic import DynamicFp8Layer
from fp8kv.transformers.layers.static import StaticFp8Layer
from fp8kv.transformers.layers.window import StaticWindowFp8Layer


class _Hybrid(LinearAttentionLayer):  # type: ignore[no-untyped-call]
    """Transformers' states of linear attention in front of the class that comes next in a list of bases.

    Args:
        number_of_states: of the layer.
        args: of the other class.
    """

    attention: type[Fp8Layer]

    def __init__(self, number_of_states: int, *args: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)  # type: ignore[no-untyped-call]
        self.attention.__init__(self, *args)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, which come by position, or of states, which come by name."""
        kind = self.attention if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        return self.attention.is_compileable and not self.record_past

    @property
    def is_croppable(self) -> bool:
        states = LinearAttentionCacheLayerMixin.is_croppable.fget(self)
        return self.attention.is_croppable and states

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.attention.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.attention.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.attention.crop(self, tokens_to_remove)

    def get_max_length(self) -> int:
        return self.attention.get_max_length(self)


class HybridDynamicFp8Layer(_Hybrid, DynamicFp8Layer):  # type: ignore[misc]
    """A layer that grows, beside a recurrent state."""

    attention = DynamicFp8Layer


class HybridStaticFp8Layer(_Hybrid, StaticFp8Layer):  # type: ignore[misc]
    """A layer of fixed size, beside a recurrent state."""

    attention = StaticFp8Layer


class HybridStaticWindowFp8Layer(_Hybrid, StaticWindowFp8Layer):  # type: ignore[misc]
    """A layer of fixed size with a window, beside a recurrent state."""

    attention = StaticWindowFp8Layer
