"""Checkpoints: their scales read, checked, shared out to tensor-parallel ranks, and written.

Formats, defects and remedies are described in docs/checkpoints.md.
"""

from __future__ import annotations

from fp8kv.checkpoint.problems import CheckpointError, Problem
from fp8kv.checkpoint.scales import KVScales, LayerScales, kv_heads_of_rank, reduce_query_scale
from fp8kv.checkpoint.scheme import KVCacheScheme

__all__ = [
    "CheckpointError",
    "KVCacheScheme",
    "KVScales",
    "LayerScales",
    "Problem",
    "kv_heads_of_rank",
    "reduce_query_scale",
]
