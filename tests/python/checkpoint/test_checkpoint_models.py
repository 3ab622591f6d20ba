"""The model of a checkpoint that scales belong to, and tensors that only look like scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_files import SIZES, config, scheme, write_checkpoint
from fp8kv import CheckpointError, KVScales, audit_checkpoint, load_kv_scales

MAIN = "model.layers.{}.self_attn"
SPEECH = {
    "thinker_config": {"text_config": SIZES},
    "talker_config": {"text_config": {**SIZES, "num_hidden_layers": 1}},
    "quantization_config": config("tensor")["quantization_config"],
}
WHISPER = {
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_hidden_layers": 7,  # the encoder's
    "quantization_config": config("tensor")["quantization_config"],
}


def pair(stem: str, k: float, v: float = 0.5, heads: int = 1) -> dict[str, Tensor]:
    return {f"{stem}.{name}_scale": torch.full((heads, 1, 1), x) for name, x in (("k", k), ("v", v))}


def layers(stem: str, *keys: float) -> dict[str, Tensor]:
    """Scales of as many layers: those of K."""
    return {name: x for n, k in enumerate(keys) for name, x in pair(stem.format(n), k).items()}


def keys_of(scales: KVScales) -> dict[int, float]:
    return {n: layer.k.item() for n, layer in scales.items() if layer.k is not None}


def found(folder: Path) -> list[tuple[str, str, str | None]]:
    return [(p.kind, p.severity, p.tensor) for p in audit_checkpoint(folder)]


# Models


@pytest.mark.parametrize(
    ("fields", "own", "others"),
    [
        (SPEECH, "thinker.model.layers.{}.self_attn",
         ["talker.model.layers.0.self_attn", "talker.code_predictor.model.layers.0.self_attn"]),
        (WHISPER, "model.decoder.layers.{}.self_attn",
         ["model.decoder.layers.0.encoder_attn", "model.encoder.layers.0.self_attn"]),
        (WHISPER, "decoder.block.{}.layer.0.SelfAttention",
         ["decoder.block.0.layer.1.EncDecAttention", "encoder.block.0.layer.0.SelfAttention"]),
        (config("tensor"), MAIN,
         ["midlayer.self_attn", "mtp.layers.0.self_attn", "eagle_module.layers.0.self_attn",
          "model.layers.3.mtp_block.self_attn", "depth_decoder.model.layers.0.self_attn",
          "model.vision_tower.encoder.layers.0.self_attn"]),
        (config("tensor"), "model.encoder.language_model.layers.{}.self_attn", []),
        (config("tensor"), "transformer.encoder.layers.{}.self_attention", []),
    ],
    ids=["Qwen3-Omni", "Whisper", "T5", "drafts", "DiffusionGemma", "ChatGLM"],
)  # fmt: skip
def test_the_language_model_is_loaded_and_others_are_named(
    tmp_path: Path, fields: dict[str, Any], own: str, others: list[str]
) -> None:
    count = 2 if fields is WHISPER else 3
    tensors = layers(own, *[0.125, 0.25, 0.375][:count])
    for number, stem in enumerate(others):
        tensors |= pair(stem, 1.0 + number)
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, fields))
    assert keys_of(loaded) == dict(enumerate([0.125, 0.25, 0.375][:count]))
    notes = [(p.severity, p.tensor) for p in loaded.problems if p.kind == "other-model"]
    assert sorted(notes) == sorted(("note", f"{stem}.k_scale") for stem in others)


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        (None, {0: 0.125, 1: 0.25}),
        ("decoder", {0: 0.125, 1: 0.25}),
        ("model.decoder", {0: 0.125, 1: 0.25}),
        ("encoder_attn", {0: 1.0, 1: 2.0}),
        ("decoder.encoder_attn", {0: 1.0, 1: 2.0}),
        ("encoder", {0: 4.0}),
    ],
)
def test_the_choice_of_a_model(tmp_path: Path, model: str | None, keys: dict[int, float]) -> None:
    tensors = layers("model.decoder.layers.{}.self_attn", 0.125, 0.25)
    tensors |= layers("model.decoder.layers.{}.encoder_attn", 1.0, 2.0)
    tensors |= layers("model.encoder.layers.{}.self_attn", 4.0)
    write_checkpoint(tmp_path, tensors, WHISPER)
    assert keys_of(load_kv_scales(tmp_path, model=model)) == keys


@pytest.mark.parametrize(("model", "key"), [("talker", 1.0), ("talker.code_predictor", 2.0), ("thinker", 4.0)])
def test_models_that_make_speech(tmp_path: Path, model: str, key: float) -> None:
    tensors = layers("thinker.model.layers.{}.self_attn", 4.0, 4.0, 4.0)
    tensors |= pair("talker.model.layers.0.self_attn", 1.0)
    tensors |= pair("talker.code_predictor.model.layers.0.self_attn", 2.0)
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, SPEECH), model=model)
    assert set(keys_of(loaded).values()) == {key}
    assert {problem.kind for problem in loaded.problems} == {"other-model"}


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layers(MAIN, 1.0, 1.0, 1.0) | pair("talker.layers.0.self_attn", 1.0), config("tensor"))
    for call in (load_kv_scales, audit_checkpoint):
        with pytest.raises(ValueError) as error:
            call(tmp_path, model="vocoder")
        assert str(error.value) == f'{call.__name__}: model must be "model.layers" or "talker", got \'vocoder\''


def test_two_models_that_nothing_tells_apart_need_a_choice(tmp_path: Path) -> None:
    tensors = layers("a.layers.{}.self_attn", 1.0, 1.0, 1.0) | layers("b.layers.{}.self_attn", 2.0, 2.0, 2.0)
    write_checkpoint(tmp_path, tensors, config("tensor"))
    with pytest.raises(CheckpointError, match=r'model must be "a" or "b", got None\. Choose one of them'):
        load_kv_scales(tmp_path)
    assert [kind for kind, _, _ in found(tmp_path)] == ["several-models"]
    assert keys_of(load_kv_scales(tmp_path, model="b")) == {0: 2.0, 1: 2.0, 2: 2.0}


@pytest.mark.parametrize("stem", ["midlayer.self_attn", "draft_model.layers.0.self_attn", "mtp.layers.0.self_attn"])
def test_a_checkpoint_of_a_draft_alone(tmp_path: Path, stem: str) -> None:
    fields = config("tensor") | {"num_hidden_layers": 1}
    loaded = load_kv_scales(write_checkpoint(tmp_path, pair(stem, 0.125), fields))
    assert (keys_of(loaded), loaded.problems) == ({0: 0.125}, [])


@pytest.mark.parametrize("stem", ["midlayer.self_attn", "draft_model.layers.0.self_attn", "mtp.layers.0.self_attn"])
@pytest.mark.parametrize("with_weights", [True, False])
def test_a_file_of_a_draft_beside_the_config_of_the_whole_model(tmp_path: Path, stem: str, with_weights: bool) -> None:
    weights = {f"{stem}.k_proj.weight": torch.ones(64, 4)} if with_weights else {}
    write_checkpoint(tmp_path, weights | pair(stem, 0.125), config("tensor") | {"num_hidden_layers": 48})
    loaded = load_kv_scales(tmp_path / "model.safetensors")
    assert (keys_of(loaded), loaded.problems) == ({0: 0.125}, [])


def test_a_draft_with_weights_of_a_layer_without_scales(tmp_path: Path) -> None:
    weights = {f"mtp.layers.{n}.self_attn.k_proj.weight": torch.ones(64, 4) for n in range(2)}
    for n, num_layers in enumerate((2, 48)):  # its own config, and that of the whole model
        folder = write_checkpoint(tmp_path / str(n), weights | pair("mtp.layers.0.self_attn", 0.125),
                                  config("tensor") | {"num_hidden_layers": num_layers})  # fmt: skip
        assert [(p.kind, p.layer) for p in audit_checkpoint(folder)] == [("layer-missing", 1)]


def test_a_vision_tower_is_never_taken_for_the_language_model(tmp_path: Path) -> None:
    tensors = layers("vision_tower.encoder.layers.{}.self_attn", 1.0, 1.0, 1.0)
    with pytest.raises(CheckpointError, match=r"No layer has scales.*there are some of vision_tower\.encoder\.layers"):
        load_kv_scales(write_checkpoint(tmp_path, tensors, config("tensor")))


# Cross-attention instead of self-attention


@pytest.mark.parametrize("with_cross", [True, False])
def test_layers_of_cross_attention_need_no_scales(tmp_path: Path, with_cross: bool) -> None:
    text = {**SIZES, "cross_attention_layers": [1]}
    fields = {"text_config": text, "quantization_config": config("tensor")["quantization_config"]}
    stem = "language_model.model.layers"
    tensors = pair(f"{stem}.0.self_attn", 0.125) | pair(f"{stem}.2.self_attn", 0.25)
    cross = pair(f"{stem}.1.cross_attn", 2.0) if with_cross else {}
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors | cross, fields))
    assert keys_of(loaded) == {0: 0.125, 2: 0.25} | ({1: 2.0} if with_cross else {})
    notes = [] if with_cross else [("layer-unquantized", "note", 1)]
    assert [(p.kind, p.severity, p.layer) for p in loaded.problems] == notes


def test_half_of_the_scales_of_a_cross_attention_layer(tmp_path: Path) -> None:
    fields = config("tensor") | {"cross_attention_layers": [1]}
    tensors = layers(MAIN, 1.0, 1.0, 1.0)
    half = {"model.layers.1.cross_attn.k_scale": torch.ones(1)}
    kept = {name: x for name, x in tensors.items() if ".1." not in name}
    assert found(write_checkpoint(tmp_path, kept | half, fields)) == [
        ("scale-missing", "error", "model.layers.1.self_attn.v_scale")
    ]


# Unknown names


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.{}_scale_inv", "self_attn.{}_bmm_quantizer._amax", "self_attn.{}_global_scale",
        "attn_block.{}_scale",
        "{}_scale", "self_attn.{}_proj.{}_descale_scale", "self_attn.{}_proj.scale",
    ],
)  # fmt: skip
def test_a_layer_of_unknown_names_is_not_missing(tmp_path: Path, name: str) -> None:
    tensors = layers(MAIN, 0.125, 0.25)
    unknown = [f"model.layers.2.{name.format(x, x)}" for x in "kv"]
    write_checkpoint(tmp_path, tensors | {x: torch.ones(1) for x in unknown}, config("tensor"))
    assert found(tmp_path) == [("unknown-scale", "error", x) for x in unknown]
    with pytest.raises(CheckpointError, match="looks like a scale of attention, but is none that is known"):
        load_kv_scales(tmp_path)


def test_all_names_unknown(tmp_path: Path) -> None:
    unknown = [f"model.layers.{n}.self_attn.{x}_scale_inv" for n in range(3) for x in "kv"]
    write_checkpoint(tmp_path, {name: torch.ones(1) for name in unknown}, config("tensor"))
    assert found(tmp_path) == [("unknown-scale", "error", name) for name in unknown]


def test_unknown_names_beside_a_whole_layer_are_a_note(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_scale_2"
    write_checkpoint(tmp_path, layers(MAIN, 1.0, 1.0, 1.0) | {name: torch.ones(1)}, config("tensor"))
    assert found(tmp_path) == [("unused-scale", "note", name)]


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.k_proj.weight_scale", "self_attn.v_proj.input_scale", "self_attn.o_proj.output_scale",
        "self_attn.prob_output_scale", "attention.wk.qscale_act", "self_attn.k_norm.scale",
        "self_attn.k_proj.scales",
        "self_attn.indexer.k_scale", "self_attn.logit_scale", "mlp.experts.0.w1.weight_scale",
        "self_attn.scale",
    ],
)  # fmt: skip
def test_scales_of_other_things_are_no_findings(tmp_path: Path, name: str) -> None:
    tensors = layers(MAIN, 1.0, 1.0, 1.0) | {f"model.layers.1.{name}": torch.ones(1)}
    assert found(write_checkpoint(tmp_path, tensors, config("tensor"))) == []


def test_the_scale_of_a_weight_by_the_name_of_scale_is_no_finding(tmp_path: Path) -> None:
    tensors = layers(MAIN, 1.0, 1.0, 1.0)
    tensors |= {f"model.layers.1.self_attn.k_proj.{name}": torch.ones(1) for name in ("weight", "scale")}
    assert found(write_checkpoint(tmp_path, tensors, config("tensor"))) == []


# Quark


def quark(**fields: Any) -> dict[str, Any]:
    outputs = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    quantization = {
        "quant_method": "quark",
        "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
        "layer_quant_config": {f"*{x}_proj": {"output_tensors": outputs} for x in "kv"},
    }
    return SIZES | {"quantization_config": quantization | fields}


def quark_scales() -> dict[str, Tensor]:
    return {f"model.layers.{n}.self_attn.{x}_proj.output_scale": torch.tensor(0.25) for n in range(3) for x in "kv"}


def test_scales_from_before_rope_need_consent(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, quark_scales(), quark(kv_cache_post_rope=False))
    name = "model.layers.0.self_attn.k_proj.output_scale"
    assert found(tmp_path) == [("before-rope", "error", name)]
    with pytest.raises(CheckpointError, match=r"of keys before norm and RoPE.* accept=\[.before-rope.\]"):
        load_kv_scales(tmp_path)
    with pytest.warns(UserWarning, match="before norm and RoPE"):
        without = load_kv_scales(tmp_path, on_problem="warn")
    assert all(layer.k is None and layer.v is not None for layer in without.values())
    accepted = load_kv_scales(tmp_path, accept=["before-rope"])
    assert keys_of(accepted) == {0: 0.25, 1: 0.25, 2: 0.25}
    assert [(p.kind, p.severity) for p in accepted.problems] == [("before-rope", "warning")]


def test_scales_from_before_rope_by_another_name(tmp_path: Path) -> None:
    tensors = layers(MAIN, 0.25, 0.25, 0.25)
    write_checkpoint(tmp_path, tensors, quark(kv_cache_post_rope=False))
    assert [kind for kind, _, _ in found(tmp_path)] == ["before-rope"]
    assert found(write_checkpoint(tmp_path, tensors, quark())) == []


#: Older versions of compressed-tensors quantize the outputs of projections.
OF_OUTPUTS = {"group_0": {"targets": ["re:.*k_proj", "re:.*v_proj"], "weights": None, "input_activations": None,
                          "output_activations": scheme("tensor")}}  # fmt: skip
KEY_NORM = {f"model.layers.{n}.self_attn.k_norm.weight": torch.ones(16) for n in range(3)}


@pytest.mark.parametrize(
    ("quantization", "tensors", "kinds"),
    [
        ({"kv_cache_scheme": None, "config_groups": OF_OUTPUTS}, quark_scales() | KEY_NORM, [("before-rope", "error")]),
        ({"kv_cache_scheme": None, "config_groups": OF_OUTPUTS}, quark_scales(), [("rope-unsaid", "warning")]),
        ({"kv_cache_scheme": None, "config_groups": OF_OUTPUTS}, layers(MAIN, 0.25, 0.25, 0.25) | KEY_NORM,
         [("before-rope", "error")]),
        ({}, quark_scales() | KEY_NORM, [("before-rope", "error")]),
        ({}, quark_scales(), [("rope-unsaid", "warning")]),
        ({}, layers(MAIN, 0.25, 0.25, 0.25) | KEY_NORM, []),
    ],
    ids=["groups", "groups without a norm", "groups and usual names", "names", "names without a norm", "usual names"],
)  # fmt: skip
def test_scales_of_the_outputs_of_projections(
    tmp_path: Path, quantization: dict[str, Any], tensors: dict[str, Tensor], kinds: list[tuple[str, str]]
) -> None:
    write_checkpoint(tmp_path, tensors, config("tensor", **quantization))
    assert [(kind, severity) for kind, severity, _ in found(tmp_path)] == kinds
    assert keys_of(load_kv_scales(tmp_path, accept=["before-rope"])) == {0: 0.25, 1: 0.25, 2: 0.25}


@pytest.mark.parametrize(("post", "kinds"), [(True, []), (None, [("rope-unsaid", "warning")])])
def test_scales_from_after_rope(tmp_path: Path, post: bool | None, kinds: list[tuple[str, str]]) -> None:
    fields = {} if post is None else {"kv_cache_post_rope": post}
    loaded = load_kv_scales(write_checkpoint(tmp_path, quark_scales(), quark(**fields)))
    assert [(p.kind, p.severity) for p in loaded.problems] == kinds
    assert keys_of(loaded) == {0: 0.25, 1: 0.25, 2: 0.25}


@pytest.mark.parametrize("accept", ["before-rope", ["not-finite"], [3], None, 3])
def test_what_cannot_be_accepted(tmp_path: Path, accept: Any) -> None:
    with pytest.raises(ValueError) as error:
        load_kv_scales(tmp_path, accept=accept)
    assert str(error.value) == (f'load_kv_scales: accept must be a list of "before-rope" and "nvfp4-cache", got {accept!r}')
