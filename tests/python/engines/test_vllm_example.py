"""The example for vLLM, as far as it goes without a GPU: with an engine that repeats the prompts."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "serve_vllm.py"


def test_serve_vllm(vllm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Any] = []

    class Engine:
        def __init__(self, model: str, **how: Any) -> None:
            made.append((model, how))

        def generate(self, prompts: list[str], sampling: Any) -> list[Any]:
            text = f" ... {sampling.max_tokens} tokens"
            return [SimpleNamespace(prompt=prompt, outputs=[SimpleNamespace(text=text)]) for prompt in prompts]

    module = sys.modules.get("vllm") or pytest.importorskip("vllm")
    monkeypatch.setattr(module, "LLM", Engine, raising=False)
    monkeypatch.setattr(module, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(sys, "argv", ["serve_vllm.py", "MODEL", "One", "Two", "--max-tokens", "3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")

    release = module.__version__ if vllm == "installed" else vllm
    ours = "CUSTOM" if release.startswith("0.26") else "FP8KV"
    assert made == [("MODEL", {"kv_cache_dtype": "fp8", "attention_backend": ours})]
    assert capsys.readouterr().out == "One ... 3 tokens\nTwo ... 3 tokens\n"
