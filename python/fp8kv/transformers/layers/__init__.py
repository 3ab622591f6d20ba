"""The layers of `Fp8Cache`: one that grows, one of fixed size, and one of fixed size that keeps a window; and
each of them with a recurrent state as well.

Sequence ``s`` of ``num_rows`` has its tokens of block ``j`` in block ``j * num_rows + s`` of the storage, so
that a storage grows at its end. All sequences of a batch are of one length, padding included.
"""

from __future__ import annotations

from fp8kv.transformers.layers.base import Fp8Layer, Geometry, LayerOptions
from fp8kv.transformers.layers.dynamic import DynamicFp8Layer
from fp8kv.transformers.layers.hybrid import (
    HybridDynamicFp8Layer,
    HybridStaticFp8Layer,
    HybridStaticWindowFp8Layer,
)
from fp8kv.transformers.layers.static import StaticFp8Layer
from fp8kv.transformers.layers.window import StaticWindowFp8Layer

__all__ = [
    "DynamicFp8Layer",
    "Fp8Layer",
    "Geometry",
    "HybridDynamicFp8Layer",
    "HybridStaticFp8Layer",
    "HybridStaticWindowFp8Layer",
    "LayerOptions",
    "StaticFp8Layer",
    "StaticWindowFp8Layer",
]
