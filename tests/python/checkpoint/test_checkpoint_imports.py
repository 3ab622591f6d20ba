"""Imports of fp8kv.checkpoint: private packages import nothing above them, and no optional packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fp8kv.checkpoint
from checkpoint_files import make_checkpoint

PACKAGE = Path(str(fp8kv.checkpoint.__file__)).parent
#: Modules that each private package may import from this one, besides its own.
MAY_IMPORT = {
    "_read": {"names", "problems"},
    "_audit": {"_read", "problems", "scheme"},
    "_write": {"_read", "names", "problems", "scheme"},
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_private_packages_import_what_is_below_them(package: str) -> None:
    files = list((PACKAGE / package).glob("*.py"))
    assert len(files) > 2
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fp8kv.checkpoint"):
                module = str(node.module).split(".")[2:3]
                assert module, f"{file} imports the whole package"
                assert module[0] in MAY_IMPORT[package] | {package}, f"{file} imports {node.module}"


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
