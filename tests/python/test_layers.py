"""The layers of the source tree, from its #include lines: which folder may include which."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".inc"}
STANDARD = r"[a-z_0-9]+"  # <vector>, <cstdint>: no slash, no suffix
INTRINSICS = r"[a-z0-9]+intrin\.h|arm_neon\.h|cpuid\.h"
CUDA = r"cuda[a-z0-9_]*\.h|cooperative_groups\.h|cooperative_groups/\w+\.h|cub/[\w/]+\.cuh|cuda/[\w/]+"
STABLE_TORCH = r"torch/csrc/stable/.+|torch/csrc/inductor/aoti_torch/c/.+|torch/headeronly/.+"


@dataclass(frozen=True)
class Layer:
    """A folder: the folders it may include besides itself, and the external headers."""

    below: tuple[str, ...] = ()
    foreign: str = STANDARD


LAYERS = {
    "include": Layer(),
    "csrc/core": Layer(("include",)),
    "csrc/device": Layer(("include", "csrc/core"), f"{STANDARD}|{CUDA}"),
    "csrc/cpu": Layer(("include", "csrc/core"), f"{STANDARD}|{INTRINSICS}"),
    "csrc/cuda": Layer(("include", "csrc/core", "csrc/device"), f"{STANDARD}|{CUDA}"),
    "csrc/torch": Layer(("include", "csrc/core"), f"{STANDARD}|{STABLE_TORCH}|{CUDA}"),
    "csrc/python": Layer(("include", "csrc/core"), rf"{STANDARD}|pybind11/\w+\.h"),
}
FILES = [
    pytest.param(folder, path, id=str(path.relative_to(ROOT)))
    for folder in LAYERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES
]


def home_of(name: str, path: Path, layer: Layer) -> str | None:
    """The layer that the file `name`, included by `path`, belongs to; None for a file of others."""
    places = [path.parent, ROOT / "include", ROOT / "csrc", *(ROOT / folder for folder in layer.below)]
    for place in places:
        found = (place / name).resolve()
        if found.exists():
            return next((folder for folder in LAYERS if found.is_relative_to(ROOT / folder)), "elsewhere")
    return None


def test_the_source_tree_is_read() -> None:
    if not (ROOT / "csrc").exists():
        pytest.skip("an installed package without its source tree")
    assert {folder for folder, _ in (p.values for p in FILES)} >= set(LAYERS) - {"csrc/device", "csrc/cuda"}


@pytest.mark.parametrize(("folder", "path"), FILES)
def test_includes_stay_within_the_layer(folder: str, path: Path) -> None:
    layer = LAYERS[folder]
    text = path.read_text(encoding="utf-8")
    wrong = []
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
        home = home_of(name, path, layer)
        if home not in (folder, *layer.below) if home else not re.fullmatch(layer.foreign, name):
            wrong.append(name)
    assert wrong == []


def test_python_loads_ops_and_not_symbols() -> None:
    """But for a system call that Python does not have, through the process itself."""
    for path in sorted((ROOT / "python" / "fp8kv").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "replace.py":
            assert re.findall(r"\w*(?:DLL|LoadLibrary)\w*\([^,)]*", text) == ["CDLL(None"]
        else:
            assert not re.search(r"\bctypes\b|\bcffi\b", text), path.name
