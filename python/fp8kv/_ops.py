"""Loads the two operator libraries, when it is imported, and tells PyTorch's tracers about the operators.

`_ops_cpu.so` defines every operator of the namespace `fp8kv` and its CPU kernels; `_ops_cuda.so` adds the
CUDA kernels. A build without nvcc has no `_ops_cuda.so`, and a PyTorch without CUDA does not open it.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: The libraries that were opened, by name: "cpu", "cuda".
loaded: dict[str, Path] = {}

#: Why there are no CUDA kernels; None when there are.
cuda_missing: str | None = None

_ops: Any = torch.ops.fp8kv


def operator(name: str) -> Any:
    """The overload of an operator that writes into its arguments; registers its fake kernel, so call it once.

    The overload is looked up once, as `torch.ops.fp8kv.x` costs an attribute chain on every call.
    """

    def fake(*args: Any, **kwargs: Any) -> None:
        """It returns nothing, so there is nothing to infer."""

    torch.library.register_fake(f"fp8kv::{name}", fake)
    return getattr(_ops, name).default


def version() -> str:
    """The version of the C++ library."""
    return str(_ops.version())


def compiler() -> str:
    """The compiler of the C++ library."""
    return str(_ops.compiler())


def cpu_isa() -> str:
    """The instruction set in use."""
    return str(_ops.cpu_isa())


def cpu_isas() -> list[str]:
    """The instruction sets of this build that this processor has, the best last."""
    return list(_ops.cpu_isas())


def cuda_architectures() -> str | None:
    """Those compiled in; None without CUDA kernels."""
    return str(_ops.cuda_architectures()) if "cuda" in loaded else None


def introspect() -> ModuleType:
    """What operators can't give: the choice of an instruction set, the scalar codec, launch plans.

    For tests, `fp8kv doctor` and `fp8kv bench`; everything else works without this module.
    """
    try:
        return importlib.import_module("fp8kv._introspect")
    except ImportError as error:
        raise ImportError(
            f"fp8kv is not built for this Python: its module fp8kv._introspect can't be imported ({error}); "
            "install it with `pip install .` in the source tree"
        ) from error


def each_cpu_isa() -> Iterator[str]:
    """Makes one instruction set after the other the one in use; afterwards restores the previous one.

    Without the module `introspect` it is only the one in use.
    """
    try:
        module = introspect()
    except ImportError:
        yield cpu_isa()
        return
    before = cpu_isa()
    try:
        for isa in cpu_isas():
            module.force_cpu_isa(isa)
            yield isa
    finally:
        module.force_cpu_isa(before)


def _load() -> None:
    global cuda_missing
    cpu, cuda = _find("cpu"), _find("cuda")
    if cpu is None:
        raise ImportError(
            f"fp8kv is not built: its operator library _ops_cpu.so is not in {Path(__file__).parent}; "
            "install it with `pip install .` in the source tree"
        )
    _open("cpu", cpu)
    if cuda is None:
        cuda_missing = "this build of fp8kv has no CUDA kernels: it was made without nvcc"
    elif torch.version.cuda is None:
        cuda_missing = f"PyTorch {torch.__version__} was built without CUDA"
    else:
        try:
            _open("cuda", cuda)
        except ImportError as error:
            cuda_missing = str(error)
            warnings.warn(f"fp8kv works on CPU tensors only: {error}", stacklevel=3)


def _find(name: str) -> Path | None:
    """By Python's own search, as an editable installation keeps its libraries elsewhere than its modules."""
    spec = importlib.util.find_spec(f"fp8kv._ops_{name}")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _open(name: str, path: Path) -> None:
    ops: Any = torch.ops
    try:
        ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"fp8kv can't open its operator library {path.name} with PyTorch {torch.__version__}: {error}; "
            "it needs PyTorch 2.11 or newer and the CUDA runtime it was built with"
        ) from error
    loaded[name] = path


_load()
