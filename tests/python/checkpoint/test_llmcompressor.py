"""Checkpoints made by llm-compressor itself, if it is installed (the extra `llmcompressor`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from fp8kv import KVCacheScheme, audit_checkpoint, calibrate, load_kv_scales
from helpers import each_strategy

llmcompressor = pytest.importorskip("llmcompressor")

TOKENS = torch.randint(1, 61, (4, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per strategy, and at "" their model."""
    from datasets import Dataset
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("llmcompressor")
    source = tiny_models.make_model(folder / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    dataset = Dataset.from_dict({"input_ids": TOKENS.tolist(), "attention_mask": torch.ones_like(TOKENS).tolist()})
    result = {"": source}
    for strategy in ("tensor", "attn_head"):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        scheme = {
            "num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True,
            "observer": "static_minmax",
        }  # fmt: skip
        llmcompressor.oneshot(
            model=model, dataset=dataset, recipe=QuantizationModifier(kv_cache_scheme=scheme),
            num_calibration_samples=len(TOKENS), max_seq_length=TOKENS.shape[1],
        )  # fmt: skip
        result[strategy] = folder / strategy
        model.save_pretrained(result[strategy], save_compressed=True)
        tokenizer.save_pretrained(result[strategy])
    return result


@each_strategy
def test_its_scheme_is_understood(strategy: str, made: dict[str, Path]) -> None:
    scheme = KVCacheScheme.from_config(made[strategy])
    assert (scheme.strategy, scheme.observer) == (strategy, "static_minmax")


@each_strategy
def test_the_audit_has_nothing_to_say(strategy: str, made: dict[str, Path]) -> None:
    assert [str(problem) for problem in audit_checkpoint(made[strategy])] == []


@each_strategy
def test_its_scales_are_those_of_calibrate(strategy: Any, made: dict[str, Path]) -> None:
    """Up to the dtype of the checkpoint, to which it rounds to the nearest."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made[""], dtype=torch.bfloat16)
    own, found = calibrate(model, [TOKENS], strategy=strategy), load_kv_scales(made[strategy])
    assert sorted(found) == list(range(tiny_models.LAYERS))
    for index, layer in found.items():
        torch.testing.assert_close(layer.k, own[index].k, rtol=0.02, atol=0)
        torch.testing.assert_close(layer.v, own[index].v, rtol=0.02, atol=0)


@each_strategy
def test_a_model_runs_with_them(strategy: str, made: dict[str, Path]) -> None:
    from fp8kv import _models, evaluation

    model = _models.load(made[strategy], "cpu").model
    caches = evaluation.caches(model.config, ["16-bit", "its"], {"its": load_kv_scales(made[strategy])})
    full, half = evaluation.evaluate(model, TOKENS[:2], caches, decoded_tokens=16)
    assert half.nbytes * 2 == full.nbytes
    assert 0 < half.kl < 0.1


@each_strategy
def test_what_fp8kv_writes_has_the_same_form(strategy: Any, made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    load_kv_scales(made[strategy]).save(tmp_path / "ours", source=made[""])
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (made[strategy], tmp_path / "ours"))
    names = [name for name in theirs if name.endswith("_scale")]
    assert len(names) == 2 * tiny_models.LAYERS
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name
    # Some releases omit empty fields.
    scheme, own = (
        json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
        for folder in (made[strategy], tmp_path / "ours")
    )
    assert {key: own[key] for key in scheme} == scheme
    assert all(not own[key] for key in own.keys() - scheme.keys())
