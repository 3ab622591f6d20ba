"""The C++ headers that come with the installed package."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fp8kv

FOLDER = Path(fp8kv.include_dir()) / "fp8kv"
SOURCE = Path(__file__).parents[2] / "include" / "fp8kv"
HEADERS = sorted(path.name for path in FOLDER.glob("*.h"))


def test_all_headers_are_installed() -> None:
    if not SOURCE.exists():
        pytest.skip("an installed package without its source tree")
    assert sorted(path.name for path in SOURCE.glob("*.h")) == HEADERS
    assert HEADERS


def test_their_version_is_that_of_the_package() -> None:
    text = (FOLDER / "version.h").read_text()
    parts = [re.search(rf"VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    assert ".".join(part[1] for part in parts if part) == fp8kv.__version__


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_needs_nothing_but_the_standard_library(header: str, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "fp8kv/{header}"\n#include "fp8kv/{header}"\nint main() {{}}\n')
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I", fp8kv.include_dir()]
    done = subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
