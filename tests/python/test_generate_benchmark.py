"""`benchmarks/generate.py`: a small run on the CPU, and the context length that fits in memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generate.py"


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_every_cache_is_measured_at_every_size(generate: Any, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--json", str(tmp_path / "x.json")],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["note"] for row in rows] == [""] * len(rows)
    expected = [(*size, kind.name, kind.compiled) for size in generate.QUICK_SIZES for kind in generate.kinds()]
    assert [(row["batch"], row["context"], row["cache"], row["compiled"]) for row in rows] == expected
    assert {"16-bit dynamic", "16-bit static", "Fp8Cache, dequantized, static"} <= {x["cache"] for x in rows}
    for row in rows:
        assert row["ms"] > 0
        assert f"| {row['cache']} |" in result.stdout


@pytest.mark.parametrize("layers", [2, 32])
def test_the_context_that_fits_beside_the_weights_of_llama_3_1_8b(layers: int, generate: Any) -> None:
    model = generate.make_model(transformers.LlamaConfig(**generate.SHAPE, num_hidden_layers=layers), torch.device("meta"))
    room = 80 * 2**30 - 2 * 8_030_261_248
    for kind in generate.kinds():
        token = 2 * 8 * 128 * (2 * 32 if "16-bit" in kind.name else 32)
        copy = 0 if "16-bit" in kind.name or "direct" in kind.name else 2 * 8 * 128 * 2
        assert generate.fitting(kind, model, 80) == room // (16 * (token + copy))


def test_what_does_not_work_is_a_note(generate: Any) -> None:
    def no_room(config: Any, size: int) -> Any:
        raise torch.OutOfMemoryError("no room\nand more")

    config = transformers.LlamaConfig(**generate.QUICK_SHAPE, num_hidden_layers=1)
    model = generate.make_model(config, torch.device("cpu"))
    row = generate.measure(generate.Kind("x", no_room), model, 1, 8, 80)
    assert (row.note, row.ms, row.fits) == ("OutOfMemoryError: no room", None, None)
