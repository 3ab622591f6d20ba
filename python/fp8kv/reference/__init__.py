"""The executable specification: every operator in plain PyTorch, with the same names, arguments and bytes.

Slow and simple on purpose; it works on CPU and CUDA tensors and is what the tests compare every kernel with.
The rules are in docs/numerics.md. `paged_attention` alone does not give the same bytes: it computes in
fp64, and the kernels within the bound that `fp8kv.paged_attention` names.

Example:
    >>> import torch, fp8kv
    >>> x = torch.randn(8, 64)
    >>> q, scale = fp8kv.quantize(x, group_shape=(1, -1))
    >>> expected, expected_scale = fp8kv.reference.quantize(x, group_shape=(1, -1))
    >>> torch.equal(q.view(torch.uint8), expected.view(torch.uint8)), torch.equal(scale, expected_scale)
    (True, True)
"""

from __future__ import annotations

from fp8kv.reference.attention import paged_attention
from fp8kv.reference.kv_cache import (
    gather_and_dequant_cache,
    reshape_and_cache_flash,
    reshape_and_cache_flash_dynamic,
    rope_quant_and_cache,
)
from fp8kv.reference.quantization import (
    dequantize,
    dynamic_scaled_fp8_quant,
    group_amax,
    quantize,
    scaled_fp8_dequant,
    static_scaled_fp8_quant,
)
from fp8kv.reference.rules import dynamic_scale, encode, finite_magnitude, min_scale, round_to

__all__ = [
    "dequantize",
    "dynamic_scale",
    "dynamic_scaled_fp8_quant",
    "encode",
    "finite_magnitude",
    "gather_and_dequant_cache",
    "group_amax",
    "min_scale",
    "paged_attention",
    "quantize",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_dynamic",
    "rope_quant_and_cache",
    "round_to",
    "scaled_fp8_dequant",
    "static_scaled_fp8_quant",
]
