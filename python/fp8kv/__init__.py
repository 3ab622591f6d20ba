"""FP8 quantization and KV caches: the same bytes on CPU, on CUDA and in plain PyTorch (`fp8kv.reference`).

Example:
    >>> import torch, fp8kv
    >>> x = torch.randn(16, 4096, dtype=torch.bfloat16)
    >>> q, scale = fp8kv.quantize(x, group_shape=fp8kv.GroupShape.PER_TOKEN)
    >>> q.dtype, scale.shape
    (torch.float8_e4m3fn, torch.Size([16, 1]))
    >>> fp8kv.dequantize(q, scale, group_shape=fp8kv.GroupShape.PER_TOKEN).dtype
    torch.bfloat16
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fp8kv import _moved, _ops
from fp8kv.calibration import calibrate
from fp8kv.checkpoint import (
    CheckpointError,
    KVCacheScheme,
    KVScales,
    LayerScales,
    Problem,
    audit_checkpoint,
    load_kv_scales,
    remap_scale_name,
)
from fp8kv.group_shape import GroupShape
from fp8kv.kv_cache import (
    PagedKVCache,
    attention_workspace_size,
    gather_and_dequant_cache,
    merge_attention,
    paged_attention,
    reshape_and_cache_flash,
    reshape_and_cache_flash_dynamic,
    rope_quant_and_cache,
)
from fp8kv.nn import AttentionScales, Observations, QuantFP8
from fp8kv.quantization import (
    dequantize,
    dynamic_scaled_fp8_quant,
    group_amax,
    quantize,
    scaled_fp8_dequant,
    static_scaled_fp8_quant,
)

if TYPE_CHECKING:
    from fp8kv import reference

_moved.install()

__version__ = _ops.version()

__all__ = [
    "AttentionScales",
    "CheckpointError",
    "GroupShape",
    "KVCacheScheme",
    "KVScales",
    "LayerScales",
    "Observations",
    "PagedKVCache",
    "Problem",
    "QuantFP8",
    "__version__",
    "attention_workspace_size",
    "audit_checkpoint",
    "build_info",
    "calibrate",
    "dequantize",
    "dynamic_scaled_fp8_quant",
    "gather_and_dequant_cache",
    "group_amax",
    "include_dir",
    "load_kv_scales",
    "merge_attention",
    "paged_attention",
    "quantize",
    "reference",
    "remap_scale_name",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_dynamic",
    "rope_quant_and_cache",
    "scaled_fp8_dequant",
    "static_scaled_fp8_quant",
]


def build_info() -> dict[str, Any]:
    """What this installation is made of and uses on this machine.

    Returns:
        ``version``; ``torch`` and ``torch_cuda``, PyTorch's version and the CUDA version it was built with
        (None without CUDA); ``compiler``; ``cpu_isa``, the instruction set in use, and ``cpu_isas``, those
        available, best last; ``libraries``, the operator libraries opened, by name; ``cuda_architectures``,
        those compiled in (None without CUDA kernels), and ``cuda_missing``, why there are no CUDA kernels
        (None when there are).

    Example:
        >>> import fp8kv
        >>> fp8kv.build_info()["version"] == fp8kv.__version__
        True
    """
    import torch

    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "compiler": _ops.compiler(),
        "cpu_isa": _ops.cpu_isa(),
        "cpu_isas": _ops.cpu_isas(),
        "libraries": {name: str(path) for name, path in _ops.loaded.items()},
        "cuda_architectures": _ops.cuda_architectures(),
        "cuda_missing": _ops.cuda_missing,
    }


def include_dir() -> str:
    """The folder of the C++ headers of this installation, for an include path.

    Programs write `#include "fp8kv/quantize.h"`. The headers have the version `__version__`. The
    library with the CPU backend, `libfp8kv.so`, is in the parent of this folder.

    Example:
        >>> import fp8kv, pathlib
        >>> (pathlib.Path(fp8kv.include_dir()) / "fp8kv" / "quantize.h").exists()
        True
    """
    return str(_ops.loaded["cpu"].parent / "include")


def __getattr__(name: str) -> Any:
    """`reference`, which nothing here needs, and modules under their old names."""
    if name == "reference":
        return importlib.import_module("fp8kv.reference")
    if f"fp8kv.{name}" in _moved.MOVED:
        return _moved.moved(f"fp8kv.{name}", stacklevel=2)
    raise AttributeError(f"module 'fp8kv' has no attribute {name!r}")
