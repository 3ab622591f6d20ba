"""What the operator libraries ask of the PyTorch they are loaded into: the stable C interface only."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import fp8kv
from fp8kv import _introspect

FOLDER = Path(_introspect.__file__).parent
LIBRARIES = [
    pytest.param(FOLDER / name, id=name) for name in ("_ops_cpu.so", "_ops_cuda.so", "libfp8kv.so") if (FOLDER / name).exists()
]
each_library = pytest.mark.parametrize("library", LIBRARIES)

#: Beginnings of mangled names of at:: and c10::, as functions, const methods, typeinfo, vtables and guards.
UNSTABLE = tuple(
    f"_Z{prefix}{namespace}" for namespace in ("2at", "3c10") for prefix in ("N", "NK", "TIN", "TSN", "TVN", "GVN", "NSt", "NO")
)


def tool(name: str, *arguments: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def symbols(library: Path, kind: str) -> list[str]:
    lines = tool("nm", "-D", f"--{kind}-only", str(library)).splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


@each_library
def test_no_unstable_symbol_of_pytorch_is_needed(library: Path) -> None:
    assert [name for name in symbols(library, "undefined") if name.startswith(UNSTABLE)] == []


@each_library
def test_python_is_not_needed(library: Path) -> None:
    needed = [line for line in tool("readelf", "-d", str(library)).splitlines() if "(NEEDED)" in line]
    assert [line for line in needed if "libpython" in line] == []
    assert [name for name in symbols(library, "undefined") if name.startswith(("Py", "_Py"))] == []


def test_the_cpu_library_is_there_and_open() -> None:
    assert (FOLDER / "_ops_cpu.so").exists()
    assert Path(fp8kv.build_info()["libraries"]["cpu"]) == FOLDER / "_ops_cpu.so"
