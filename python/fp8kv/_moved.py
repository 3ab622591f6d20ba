"""Modules that have moved: the old names still work, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "fp8kv.attention_scales": "fp8kv.nn.attention_scales",
    "fp8kv.demo": "fp8kv.cli.demo",
    "fp8kv.doctor": "fp8kv.cli.doctor",
    "fp8kv.inspection": "fp8kv.evaluation.inspection",
    "fp8kv.observations": "fp8kv.nn.statistics",
    "fp8kv.observers": "fp8kv.calibration.observers",
    "fp8kv.quant_fp8": "fp8kv.nn.quant_fp8",
    "fp8kv.texts": "fp8kv.calibration.texts",
}


def moved(name: str, stacklevel: int) -> ModuleType:
    """The module that had this name."""
    warnings.warn(f"{name} is now {MOVED[name]}", DeprecationWarning, stacklevel=stacklevel + 1)
    return importlib.import_module(MOVED[name])


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = moved(name, stacklevel=2)  # which the import takes in place of the empty one


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Loader()) if fullname in MOVED else None


def install() -> None:
    """Lets imports find modules under their old names. Called once, by `import fp8kv`."""
    sys.meta_path.append(_Finder())
    # The attribute of this name is the function, which an import that is not cached would replace.
    sys.modules["fp8kv.quantize"] = importlib.import_module("fp8kv.quantization")
