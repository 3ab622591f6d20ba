"""Layers that have attention and a recurrent state, as in Falcon H1 and Zamba."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import cache_utils

from fp8kv.transformers.layers.dynamic import DynamicFp8Layer
from fp8kv.transformers.layers.static import StaticFp8Layer
from fp8kv.transformers.layers.window import StaticWindowFp8Layer

_LinearLayer: Any = cache_utils.LinearAttentionLayer


class _Hybrid(_LinearLayer):  # type: ignore[misc]
    """Transformers' states of linear attention, and `attention`, a class that a subclass has as base as well.

    Args:
        number_of_states: of the layer.
        args: of the other class.
    """

    attention: Any
    is_croppable = False  # a recurrent state cannot be rolled back

    def __init__(self, number_of_states: int, *args: Any) -> None:
        _LinearLayer.__init__(self, number_of_states=number_of_states)
        self.attention.__init__(self, *args)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """For keys and values, passed by position, or for states, passed by name."""
        (self.attention if args else _LinearLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        _LinearLayer.reset(self)
        self.attention.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        _LinearLayer.reorder_cache(self, beam_idx)
        self.attention.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        _LinearLayer.crop(self, tokens_to_remove)
        self.attention.crop(self, tokens_to_remove)

    def get_max_length(self) -> int:
        length: int = self.attention.get_max_length(self)
        return length


class HybridDynamicFp8Layer(_Hybrid, DynamicFp8Layer):  # type: ignore[no-untyped-call]
    """A layer that grows, with a recurrent state."""

    attention = DynamicFp8Layer
    is_compileable = False


class HybridStaticFp8Layer(_Hybrid, StaticFp8Layer):  # type: ignore[no-untyped-call]
    """A layer of fixed size, with a recurrent state."""

    attention = StaticFp8Layer
    is_compileable = True


class HybridStaticWindowFp8Layer(_Hybrid, StaticWindowFp8Layer):  # type: ignore[no-untyped-call]
    """A layer of fixed size with a window and a recurrent state."""

    attention = StaticWindowFp8Layer
    is_compileable = True
