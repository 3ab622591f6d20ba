"""Every program of examples/ runs with the expected output; on the GPU if there is one, except C++."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fp8kv

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BUILDING = ROOT / "docs" / "building.md"

#: A CMake package for `find_package(fp8kv)`: the library and the headers of the Python package.
PACKAGE = """\
add_library(fp8kv::core SHARED IMPORTED)
set_target_properties(fp8kv::core PROPERTIES
  IMPORTED_LOCATION "{library}"
  INTERFACE_INCLUDE_DIRECTORIES "{include}"
  INTERFACE_COMPILE_FEATURES cxx_std_20)
"""


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a Python program with its arguments, in this process, and returns its output."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_append_attend(python: Callable[..., str]) -> None:
    output = python("append_attend.py")
    assert "233,472 bytes of K and V, 116,736 in the cache" in output
    error = re.search(r"relative error of the attention: (\d\.\d+)", output)
    assert error is not None
    assert 0 < float(error[1]) < 2**-4  # the largest rounding error of e4m3


def test_decode_loop(python: Callable[..., str]) -> None:
    output = python("decode_loop.py", "--steps", "20")  # into the second block
    assert "20 steps of 3 sequences" in output
    assert "tokens in the cache: [20, 20, 20]" in output


@pytest.mark.usefixtures("one_thread")
def test_calibrate_evaluate(python: Callable[..., str], tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = python("calibrate_evaluate.py", tiny_model, tiny_text, out, "--window", "32", "--windows", "2")
    rows = [line.split("  ")[0] for line in output.splitlines()]
    assert rows == ["cache", "16-bit", "e4m3 scale 1.0", "calibrated", "e4m3 per token-head"]
    assert fp8kv.load_kv_scales(out).scheme.strategy == "attn_head"


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cpp(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no CMake")
    include = Path(fp8kv.include_dir())
    package = PACKAGE.format(library=include.parent / "libfp8kv.so", include=include)
    (tmp_path / "fp8kv-config.cmake").write_text(package)
    build = tmp_path / "build"
    run(
        cmake,
        "-S",
        EXAMPLES / "cpp",
        "-B",
        build,
        f"-Dfp8kv_DIR={tmp_path}",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra",
    )
    run(cmake, "--build", build)
    shown = re.search(r"It prints:\n\n```\n(.*?)```", BUILDING.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert run(build / "quantize") == shown[1]
    # The weights of the second head are exp(0), exp(4) and exp(8).
    assert run(build / "attend") == "mean of the values: 2.000\nnearer to the last value: 2.981\n"


def test_all_programs_are_listed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[`(\w+\.py)`\]", page)) == {path.name for path in EXAMPLES.glob("*.py")}
