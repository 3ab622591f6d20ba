"""Loads the two operator libraries and tells PyTorch's tracers about the operators.

`_ops_cpu.so` defines every operator of the namespace `fp8kv` and its CPU kernels; `_ops_cuda.so` adds the
CUDA kernels. A build without nvcc has no `_ops_cuda.so`, and a PyTorch without CUDA does not open it.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_OPS = (
    "static_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "scaled_fp8_dequant",
    "group_amax",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_dynamic",
    "rope_quant_and_cache",
    "gather_and_dequant_cache",
)

#: The libraries that were opened, by name: "cpu", "cuda".
loaded: dict[str, Path] = {}

#: Why there are no CUDA kernels; None when there are.
cuda_missing: str | None = None


def introspect() -> ModuleType:
    """The C++ library as seen from Python: versions, instruction sets, the scalar codec, launch plans."""
    try:
        return importlib.import_module("fp8kv._introspect")
    except ImportError as error:
        raise ImportError(
            f"fp8kv is not built for this Python: its module fp8kv._introspect can't be imported ({error}); "
            "install it with `pip install .` in the source tree"
        ) from error


def load() -> None:
    """Opens the libraries and registers the fake kernels. Called once, by `import fp8kv`."""
    global cuda_missing
    module = introspect()
    folder = Path(str(module.__file__)).parent
    _open("cpu", folder / "_ops_cpu.so")
    cuda = folder / "_ops_cuda.so"
    if not cuda.exists():
        cuda_missing = "this build of fp8kv has no CUDA kernels: it was made without nvcc"
    elif torch.version.cuda is None:
        cuda_missing = f"PyTorch {torch.__version__} was built without CUDA"
    else:
        try:
            _open("cuda", cuda)
        except ImportError as error:
            cuda_missing = str(error)
            warnings.warn(f"fp8kv works on CPU tensors only: {error}", stacklevel=3)
    _register_fakes()


def _open(name: str, path: Path) -> None:
    if not path.exists():
        raise ImportError(
            f"fp8kv is not built: its operator library {path.name} is not in {path.parent}; "
            "install it with `pip install .` in the source tree"
        )
    ops: Any = torch.ops
    try:
        ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"fp8kv can't open its operator library {path.name} with PyTorch {torch.__version__}: {error}; "
            "it needs PyTorch 2.11 or newer and the CUDA runtime it was built with"
        ) from error
    loaded[name] = path


def _register_fakes() -> None:
    """All operators write into tensors they are given and return nothing, so there is nothing to infer."""

    def fake(*args: Any, **kwargs: Any) -> None:
        return None

    for op in _OPS:
        torch.library.register_fake(f"fp8kv::{op}", fake)
