"""The script that measures fp8kv in vLLM, as far as it goes without a GPU."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "vllm_decode.py"
module = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_arguments() -> None:
    options = module.parse([])
    assert options.settings == list(module.SETTINGS)
    assert module.cases(options)[0] == (1, 1024)
    assert (256, 8192) in module.cases(options)
    assert (256, 32768) not in module.cases(options)  # 128 GiB in 16 bits
    quick = module.parse(["--quick"])
    assert module.cases(quick) == [(8, 1024)]
    assert set(quick.settings) < set(module.SETTINGS)


@pytest.mark.parametrize(
    "arguments",
    [["--settings", "nothing"], ["--batches", "0"], ["--tensor-parallel", "3"], ["--strategy", "channel"]],
    ids=" ".join,
)
def test_arguments_that_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def output(tokens: list[int], *top: list[tuple[int, float]]) -> dict[str, Any]:
    return {"tokens": tokens, "top": [list(pair) for pair in top]}


def test_the_first_difference_is_told_from_a_tie() -> None:
    reference = output([5, 6, 7], [(5, -1.0), (9, -3.0)], [(6, -1.0), (8, -1.125)], [(7, -1.0), (1, -2.0)])
    same = output([5, 6, 7])
    tie = output([5, 8, 1])
    wrong = output([5, 2, 7])
    results = {
        "reference": {"tokens": [reference] * 3},
        "fp8kv": {"tokens": [same, tie, wrong]},
        "fp8kv-eager": {"error": "none"},
        "flash-fp8": {"tokens": [wrong] * 3},
    }
    (compared,) = module.compare_tokens(results).items()
    assert compared == (
        "fp8kv",
        {"tokens": 9, "equal_before_a_difference": 5, "gaps": [0.125, math.inf], "largest_gap": math.inf},
    )
    assert module.compare_tokens({"fp8kv": {"tokens": [same]}}) == {}


def test_kernels_by_what_they_do() -> None:
    kernels = {
        "void vllm::reshape_and_cache_flash_kernel<...>": 4.0,
        "fp8kv::cuda::append_kernel<...>": 1.5,
        "static_scaled_fp8_quant_kernel": 2.0,
        "fp8kv::cuda::attention_tiled": 20.0,
        "flash_fwd_splitkv_combine": 3.0,
        "nvjet_tst_128x64": 100.0,
    }
    assert module.by_kind(kernels) == {"cache write": 5.5, "query quantization": 2.0, "attention": 23.0}


def test_the_table() -> None:
    step = {"batch": 8, "context": 1024, "step_ms": 2.5, "kernels_us": 900.0, "cache write us": 1.5}
    step |= {"query quantization us": 0.0, "attention us": 50.25}
    report = {"results": {"fp8kv": {"steps": [step]}, "flash-fp8": {"error": "no GPU"}}}
    assert module.table(report).splitlines()[2:] == ["| fp8kv | 8 x 1024 | 2.5 | 900 | 1.5 | 0 | 50.2 |"]


def test_an_engine_that_fails_is_named() -> None:
    """Here it is the lack of vLLM or of a GPU."""
    command = [sys.executable, str(SCRIPT), "--settings", "flash-16bit", "--batches", "1", "--contexts", "8"]
    environment = {"PATH": "", "HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert result.stdout.startswith("flash-16bit: ")
    assert "Error" in result.stdout.splitlines()[0]
