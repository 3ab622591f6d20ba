"""`fp8kv calibrate` and `fp8kv eval` with multimodal models."""

from __future__ import annotations

import json
import math
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from command_line import invoke
from fp8kv import load_kv_scales

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::FutureWarning"),  # such as that of an argument's old name
]

WINDOW, VOCABULARY = 16, 128
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": ENCODER | {"model_type": "pixtral", "image_size": 16, "patch_size": 8},
        "image_token_index": 120,
    },
    "qwen3_vl": {
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        "image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122,
        "vision_end_token_id": 123,
    },
    "voxtral": {
        "text_config": TEXT | {"model_type": "llama"},
        "audio_config": ENCODER | {"head_dim": 16, "num_mel_bins": 8, "max_source_positions": 16},
        "audio_token_id": 120,
    },
    # Transformers has a class for its language model alone, which loads only those weights.
    "llama4": {
        "text_config": TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 32},
        "vision_config": ENCODER
        | {
            "intermediate_size": 128, "vision_output_dim": 32, "image_size": 16, "patch_size": 8,
            "projector_input_dim": 32, "projector_output_dim": 32,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def multimodal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with random weights."""
    folder = tmp_path_factory.mktemp("models") / request.param
    config = transformers.AutoConfig.for_model(request.param, **MODELS[request.param])
    torch.manual_seed(0)
    model = transformers.AutoModelForMultimodalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_models.add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The number of tokens in two windows of calibration and two of evaluation."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(tiny_models.random_text(4 * WINDOW))
    return path


def windows_of(text: Path) -> Tensor:
    ids = [tiny_models.WORDS.index(word) + 1 for word in text.read_text().split()]
    return torch.tensor(ids).view(4, WINDOW)


def of_its_own_class(folder: Path, dtype: torch.dtype) -> Any:
    """The model, loaded with the class that its checkpoint names."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()
    return model.language_model if folder.name == "llama4" else model  # it requires an image in Transformers 5.24


def test_calibrate_finds_the_scales_of_the_language_model(multimodal: Path, text: Path, tmp_path: Path) -> None:
    invoke(
        "calibrate", multimodal, "-o", tmp_path / "out", "--text", text, "--num-samples", "4",
        "--seq-len", WINDOW, "--batch-size", "4", "--strategy", "attn_head", "--device", "cpu",
    )  # fmt: skip
    model, cache = of_its_own_class(multimodal, torch.bfloat16), transformers.DynamicCache()
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(windows_of(text), use_cache=True, **{name: cache})
    found = load_kv_scales(tmp_path / "out")
    assert sorted(found) == [0, 1]
    for index, layer in enumerate(cache.layers):
        for scale, states in ((found[index].k, layer.keys), (found[index].v, layer.values)):
            amax = states.float().abs().amax((0, 2, 3))
            assert scale.tolist() == pytest.approx((amax / 448).tolist(), rel=2**-7)  # stored in bf16


def test_eval_compares_caches_of_the_language_model(multimodal: Path, text: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "eval.json"
    invoke(
        "eval", multimodal, "--text", text, "--windows", "2", "--window", WINDOW, "--calibration-tokens",
        2 * WINDOW, "--device", "cpu", "--json", numbers,
    )  # fmt: skip
    found = json.loads(numbers.read_text())
    windows = windows_of(text)[2:]
    with torch.no_grad():
        logits = of_its_own_class(multimodal, torch.float32)(windows, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    full, *others = found["rows"]
    assert found["cache_dtype"] == "bfloat16"
    assert full["perplexity"] == pytest.approx(math.exp(loss), rel=5e-3)  # its cache is in bf16
    for row in others:
        assert 0 < row["kl"] < 0.05
