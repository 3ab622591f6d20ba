"""What the modules of fp8kv.checkpoint import: nothing above them, and no package that may be missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from checkpoint_files import make_checkpoint

ROOT = Path(__file__).parents[3] / "python"
PACKAGE = "fp8kv.checkpoint"
#: What the modules of each private package may import of this one, besides their own.
MAY_IMPORT = {
    "_read": {"names", "problems"},
    "_audit": {"_read", "problems", "scheme"},
    "_write": {"_read", "names", "problems", "scheme"},
}


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix(f"{PACKAGE}.") for name in found if f"{name}.".startswith(f"{PACKAGE}.")}


def module(file: Path) -> str:
    """Its name; below that of the package if it is in it."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__").removeprefix(f"{PACKAGE}.")


FILES = {module(file): file for file in sorted((ROOT / "fp8kv" / "checkpoint").rglob("*.py"))}


def test_no_module_imports_itself_in_a_circle() -> None:
    order = list(TopologicalSorter({name: imports(file) for name, file in FILES.items()}).static_order())
    assert set(order) == set(FILES)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_private_packages_import_what_is_below_them(package: str) -> None:
    files = {name: file for name, file in FILES.items() if name.startswith(f"{package}.")}
    assert files
    for name, file in files.items():
        assert {x.split(".")[0] for x in imports(file)} <= MAY_IMPORT[package] | {package}, name


def test_scales_are_loaded_and_saved_without_packages_that_are_optional(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", query=True)
    script = """
import sys
for name in ("numpy", "safetensors", "transformers", "rich", "typer", "matplotlib"):
    sys.modules[name] = None
import fp8kv
folder = sys.argv[1]
assert fp8kv.audit_checkpoint(folder) == []
fp8kv.load_kv_scales(folder).save(folder)
assert fp8kv.audit_checkpoint(folder) == []
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
