"""Scales in checkpoints: load, check, shard for tensor parallelism, and save.

Formats, defects and remedies are described in docs/checkpoints.md.
"""

from __future__ import annotations

from fp8kv.checkpoint.audit import audit_checkpoint
from fp8kv.checkpoint.load import load_kv_scales
from fp8kv.checkpoint.names import remap_scale_name
from fp8kv.checkpoint.problems import CheckpointError, Problem
from fp8kv.checkpoint.scales import KVScales, LayerScales, kv_heads_of_rank, reduce_query_scale
from fp8kv.checkpoint.scheme import KVCacheScheme

__all__ = [
    "CheckpointError",
    "KVCacheScheme",
    "KVScales",
    "LayerScales",
    "Problem",
    "audit_checkpoint",
    "kv_heads_of_rank",
    "load_kv_scales",
    "reduce_query_scale",
    "remap_scale_name",
]
