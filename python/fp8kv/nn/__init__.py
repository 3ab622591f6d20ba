"""Modules for models: the scales of an attention layer, and a quantization layer."""

from __future__ import annotations

from fp8kv.nn.attention_scales import AttentionScales
from fp8kv.nn.quant_fp8 import QuantFP8
from fp8kv.nn.statistics import Observations, Observed

__all__ = ["AttentionScales", "Observations", "Observed", "QuantFP8"]
