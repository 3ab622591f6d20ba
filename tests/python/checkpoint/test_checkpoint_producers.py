"""Format names and maps of producers: FP8 without scales, mixed precision, NVFP4, contradictory configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_files import scheme, write_checkpoint
from fp8kv import CheckpointError, KVCacheScheme, KVScales, audit_checkpoint, load_kv_scales

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
MODULE = "model.layers.{}.self_attn"
KEYS = {f"{MODULE.format(n)}.k_proj.weight": torch.ones(4, 4) for n in range(3)}


def scales(*layers: int) -> dict[str, Tensor]:
    return {f"{MODULE.format(n)}.{x}_proj.{x}_scale": torch.tensor(0.25) for n in layers for x in "kv"}


def checkpoint(folder: Path, quantization: dict[str, Any], *layers: int, **other: Any) -> Path:
    """Of ModelOpt, with scales of these layers; `other` is what hf_quant_config.json says."""
    config = SIZES | {"quantization_config": {"quant_method": "modelopt", **quantization}}
    write_checkpoint(folder, KEYS | scales(*layers), config)
    if other:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": other}))
    return folder


def findings(loaded: KVScales) -> list[tuple[str, str, int | None]]:
    return [(problem.kind, problem.severity, problem.layer) for problem in loaded.problems]


def mixed(*words: str | None) -> dict[str, Any]:
    layers = {MODULE.format(n): {"quant_algo": word} for n, word in enumerate(words) if word is not None}
    return {"kv_cache_quant_algo": "MIXED_PRECISION", "kv_cache_quantized_layers": layers}


# Strings and objects


@pytest.mark.parametrize(
    "quantization",
    [
        {"kv_cache_scheme": "FP8"}, {"kv_cache_scheme": "fp8_e4m3"}, {"kv_cache_scheme": "float8_e4m3fn"},
        {"kv_cache_quant_algo": "fp8"}, {"kv_cache_quant_algo": "FP8_CAST"}, {"kv_cache_dtype": "fp8"},
        {"kv_cache_scheme": {"num_bits": [4, 3], "axis": None}}, {"kv_cache_scheme": {"quant_algo": "FP8"}},
        {"kv_cache_scheme": scheme("per_tensor", symmetric=None, dynamic=None)},
        {"kv_cache_scheme": {"k": scheme("tensor"), "v": scheme("tensor")}},
        {"kv_cache_scheme": [scheme("tensor")] * 3}, {"kv_cache_quant_algo": ["FP8"] * 3},
        {"kv_cache_quant_algo": {MODULE.format(n): "FP8" for n in range(3)}},
        {"kv_cache_quant_algo": "FP8", "kv_cache_quantized_layers": [MODULE.format(n) for n in range(3)]},
        {"kv_cache_quant_algo": None, "kv_cache_quantized_layers": {"*self_attn": "FP8"}},
        {"kv_cache_quant_algo": "FP8", "kv_cache_quantized_layers": {}},
        {"kv_cache_quant_algo": {"*": "FP8"}},
        mixed("FP8", "FP8", "FP8"),
    ],
    ids=str,
)  # fmt: skip
def test_ways_to_say_fp8(tmp_path: Path, quantization: dict[str, Any]) -> None:
    loaded = load_kv_scales(checkpoint(tmp_path, quantization, 0, 1, 2))
    assert (list(loaded), loaded.problems) == ([0, 1, 2], [])
    assert KVCacheScheme.from_config(tmp_path).strategy == "tensor"


@pytest.mark.parametrize(
    ("quantization", "sentence"),
    [
        ({"kv_cache_quant_algo": "INT8"}, 'kv_cache_quant_algo must be "FP8", got "INT8"'),
        ({"kv_cache_quant_algo": "NVFP4_AFFINE"}, 'kv_cache_quant_algo must be "FP8", got "NVFP4_AFFINE"'),
        ({"kv_cache_scheme": "fp8_e5m2"}, 'kv_cache_scheme must be "static", got "fp8_e5m2"'),
        ({"kv_cache_quant_algo": ["FP8", "INT8"]}, 'kv_cache_quant_algo.1 must be "FP8", got "INT8"'),
        ({"kv_cache_scheme": {"k": scheme(), "v": scheme(num_bits=4, type="int")}},
         "kv_cache_scheme.v.num_bits must be 8, got 4"),
        (mixed("INT8"), f'kv_cache_quantized_layers.{MODULE.format(0)}.quant_algo must be "FP8", got "INT8"'),
        ({"kv_cache_quant_algo": "MIXED_PRECISION"},
         "kv_cache_quantized_layers must say what MIXED_PRECISION is for which layer, got none"),
    ],
    ids=str,
)  # fmt: skip
def test_other_formats_are_refused(tmp_path: Path, quantization: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_kv_scales(checkpoint(tmp_path, quantization, 0, 1, 2))
    assert f"has 1 problem: {sentence}. Quantize" in str(error.value)


# FP8 without scales


def test_modelopt_without_scales_means_1(tmp_path: Path) -> None:
    loaded = load_kv_scales(checkpoint(tmp_path, {"kv_cache_quant_algo": "FP8"}))
    one = [[1.0]] * 3
    assert [layer.k.tolist() for layer in loaded.values() if layer.k is not None] == one
    assert [layer.v.tolist() for layer in loaded.values() if layer.v is not None] == one
    assert findings(loaded) == [("unit-scales", "note", None)]
    assert loaded.scheme.strategy == "tensor"


def test_modelopt_without_scales_in_some_layers(tmp_path: Path) -> None:
    loaded = load_kv_scales(checkpoint(tmp_path, mixed("FP8", None, "FP8")))
    assert list(loaded) == [0, 2]


def test_some_scales_are_not_completed_with_1(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Layer 1: There are no scales of K and V"):
        load_kv_scales(checkpoint(tmp_path, {"kv_cache_quant_algo": "FP8"}, 0, 2))


@pytest.mark.parametrize("name", ["self_attn.k_scale_inv", "self_attn.q_proj.q_scale"])
def test_scales_of_other_names_are_not_taken_for_none(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path, {"kv_cache_quant_algo": "FP8"})
    config = json.loads((tmp_path / "config.json").read_text())
    write_checkpoint(tmp_path, KEYS | {f"model.layers.0.{name}": torch.ones(1)}, config)
    with pytest.raises(CheckpointError):
        load_kv_scales(tmp_path)


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_other_producers_without_scales_mean_a_fault(tmp_path: Path, method: str) -> None:
    quantization = {
        "quant_method": method,
        "kv_cache_scheme": "static" if method == "fp8" else scheme("tensor"),
    }
    with pytest.raises(CheckpointError, match="No layer has scales of K and V"):
        load_kv_scales(checkpoint(tmp_path, quantization))


# Mixed precision and NVFP4


@pytest.mark.parametrize("key", [MODULE, "language_model.model.layers.{}.self_attn", "*layers.{}.*", "{}", "re:.*s\\.{}\\..*"])
def test_layers_in_16_bits_on_purpose(tmp_path: Path, key: str) -> None:
    layers = {key.format(n): {"quant_algo": "FP8"} for n in (0, 2)}
    quantization = {"kv_cache_quant_algo": "MIXED_PRECISION", "kv_cache_quantized_layers": layers}
    loaded = load_kv_scales(checkpoint(tmp_path, quantization, 0, 2))
    assert list(loaded) == [0, 2]
    assert findings(loaded) == [("layer-unquantized", "note", 1)]


def test_names_count_before_patterns(tmp_path: Path) -> None:
    layers = {"*": "FP8", "*.layers.1.*": "NVFP4", MODULE.format(1): "NONE"}
    quantization = {"kv_cache_quant_algo": "MIXED_PRECISION", "kv_cache_quantized_layers": layers}
    assert findings(load_kv_scales(checkpoint(tmp_path, quantization, 0, 2))) == [("layer-unquantized", "note", 1)]


def test_a_map_of_another_model_is_of_no_concern(tmp_path: Path) -> None:
    layers = {f"talker.{MODULE.format(1)}": "NVFP4", **{MODULE.format(n): "FP8" for n in range(3)}}
    quantization = {"kv_cache_quant_algo": "MIXED_PRECISION", "kv_cache_quantized_layers": layers}
    assert findings(load_kv_scales(checkpoint(tmp_path, quantization, 0, 1, 2))) == []


@pytest.mark.parametrize("field", ["ignore", "exclude_modules"])
@pytest.mark.parametrize("pattern", [MODULE.format(1), "re:.*layers\\.1\\.self_attn$", "*.layers.1.self_attn"])
def test_modules_that_are_left_out_on_purpose(tmp_path: Path, field: str, pattern: str) -> None:
    loaded = load_kv_scales(checkpoint(tmp_path, {"kv_cache_quant_algo": "FP8", field: ["lm_head", pattern]}, 0, 2))
    assert findings(loaded) == [("layer-unquantized", "note", 1)]


#: Of linear layers whose weights stay in 16 bits.
OF_LINEARS = [
    "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.indexer.wk",
    "model.layers.1.input_layernorm", "model.layers.1.mlp", "*self_attn*", "model.layers.1.self_attn*",
    "*layers.1.self_attn.*", "re:.*[qkvo]_proj$", "re:.*layers.1.self_attn.o",
]  # fmt: skip
#: Of attention itself, or of a whole layer.
OF_ATTENTION = [
    "model.layers.1", "model.layers.1.self_attn", "model.layers.1*", "*.layers.1.*", "*layers.1.self_attn",
    "re:.*layers.1.self_attn$", "re:.*layers.1.self_attn.*", r"re:model\.layers\.1\..*", "re:.*layers.1",
]  # fmt: skip


def test_scales_that_are_elsewhere_are_not_replaced_by_ones(tmp_path: Path) -> None:
    """ModelOpt's FP8 without scales stands for 1.0 only if there are no scales at all."""
    folder = checkpoint(tmp_path, {"kv_cache_quant_algo": "FP8"})
    assert [problem.kind for problem in load_kv_scales(folder).problems] == ["unit-scales"]
    scaling = {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.25, "1": 0.5, "2": 0.5}}}}
    (folder / "kv_cache_scales.json").write_text(json.dumps(scaling))
    with pytest.raises(CheckpointError, match=r"kv_cache_scales\.json may have some"):
        load_kv_scales(folder)


@pytest.mark.parametrize("name", ["k_proj.k_cache_scale", "k_proj.output_scale_inv", "k_proj.output_quantizer._amax"])
def test_scales_next_to_weights_are_named(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, {"kv_cache_quant_algo": "FP8"})
    tensors = {f"{MODULE.format(n)}.{x}": torch.tensor(20.0) for n in range(3) for x in (name, name.replace("k_", "v_", 1))}
    write_checkpoint(folder, KEYS | tensors)
    problems = audit_checkpoint(folder)
    assert {problem.kind for problem in problems} == {"unknown-scale"}
    assert {problem.tensor for problem in problems} == tensors.keys()


@pytest.mark.parametrize("pattern", OF_LINEARS)
@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt"])
def test_linears_that_are_left_out_have_a_cache_all_the_same(tmp_path: Path, method: str, pattern: str) -> None:
    quantization = {"quant_method": method, "kv_cache_scheme": scheme("tensor"), "ignore": ["lm_head", pattern]}
    checkpoint(tmp_path, quantization, 0, 2)
    assert [(p.kind, p.layer) for p in audit_checkpoint(tmp_path)] == [("layer-missing", 1)]


@pytest.mark.parametrize("pattern", OF_ATTENTION)
def test_a_layer_that_is_left_out_needs_no_scales(tmp_path: Path, pattern: str) -> None:
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme("tensor"), "ignore": ["lm_head", pattern]}
    loaded = load_kv_scales(checkpoint(tmp_path, quantization, 0, 2))
    assert list(loaded) == [0, 2]
    assert findings(loaded) == [("layer-unquantized", "note", 1)]


@pytest.mark.parametrize("patterns", [["*.self_attn"], ["re:.*self_attn.*"], [MODULE.format(n) for n in range(3)]], ids=str)
def test_not_all_attention_is_left_out_of_an_fp8_cache(tmp_path: Path, patterns: list[str]) -> None:
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme("tensor"), "ignore": patterns}
    with pytest.raises(CheckpointError, match="has 1 problem: No layer has scales of K and V"):
        load_kv_scales(checkpoint(tmp_path, quantization))


@pytest.mark.parametrize("slow", ["(.*)*(.*)*(.*)*x$", "(.|.)*x$", ".*" * 20 + "x$", "[", "(" * 500])
def test_a_regex_that_takes_forever_matches_nothing(tmp_path: Path, slow: str) -> None:
    patterns = [f"re:{slow}", r"re:^(?!.*(?:mlp|experts)).*\.layers\.(?:1|7)\.self_attn$"]
    loaded = load_kv_scales(checkpoint(tmp_path, {"kv_cache_quant_algo": "FP8", "ignore": patterns}, 0, 2))
    assert findings(loaded) == [("layer-unquantized", "note", 1)]


def test_scales_of_a_layer_that_the_config_leaves_in_16_bits(tmp_path: Path) -> None:
    loaded = load_kv_scales(checkpoint(tmp_path, mixed("FP8", None, "FP8"), 0, 1, 2))
    assert list(loaded) == [0, 1, 2]
    assert findings(loaded) == [("unexpected-scale", "warning", 1)] * 2


@pytest.mark.parametrize(
    ("quantization", "layers"),
    [
        ({"kv_cache_quant_algo": "NVFP4"}, [None]),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}}, [None]),
        ({"kv_cache_quant_algo": "FP8_K_NVFP4_V"}, [None]),
        (mixed("FP8", "NVFP4", "FP8_K_NVFP4_V"), [1, 2]),
    ],
    ids=["all", "an object", "V", "some"],
)
def test_scales_of_nvfp4_need_consent(tmp_path: Path, quantization: dict[str, Any], layers: list[int | None]) -> None:
    checkpoint(tmp_path, quantization, 0, 1, 2)
    assert [(p.kind, p.layer) for p in audit_checkpoint(tmp_path)] == [("nvfp4-cache", n) for n in layers]
    with pytest.raises(CheckpointError, match=r"for a cache in NVFP4. load_kv_scales\(..., accept="):
        load_kv_scales(tmp_path)
    loaded = load_kv_scales(tmp_path, accept=["nvfp4-cache"])
    assert [layer.v.item() for layer in loaded.values() if layer.v is not None] == [0.25] * 3
    assert findings(loaded) == [("nvfp4-cache", "warning", n) for n in layers]


def test_nvfp4_without_scales_is_no_fp8(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='kv_cache_quant_algo must be "FP8", got "NVFP4"'):
        load_kv_scales(checkpoint(tmp_path, {"kv_cache_quant_algo": "NVFP4"}))


# Contradictions


@pytest.mark.parametrize(
    ("quantization", "other", "texts"),
    [
        ({"kv_cache_scheme": "FP8"}, {"kv_cache_quant_algo": "NVFP4"}, "got FP8 and NVFP4"),
        ({"kv_cache_scheme": "FP8"}, {"kv_cache_quant_algo": None}, "got FP8 and 16 bits"),
        ({"kv_cache_scheme": "FP8", "kv_cache_quant_algo": "FP8_K_NVFP4_V"}, {},
         "got FP8 and FP8 for K and NVFP4 for V"),
        ({"kv_cache_scheme": scheme("tensor")}, {"kv_cache_scheme": scheme("attn_head")},
         "got FP8 per tensor and FP8 per attn_head"),
        (mixed("FP8", "FP8", "FP8"), mixed("FP8", "FP8", "NVFP4"), "got a map"),
    ],
    ids=["NVFP4", "16 bits", "one file", "strategies", "maps"],
)  # fmt: skip
def test_configs_that_contradict(tmp_path: Path, quantization: dict[str, Any], other: dict[str, Any], texts: str) -> None:
    loaded = load_kv_scales(checkpoint(tmp_path, quantization, 0, 1, 2, **other))
    assert findings(loaded) == [("sources-differ", "warning", None)]
    assert texts in loaded.problems[0].message
    assert " in config.json must say the same as " in loaded.problems[0].message


@pytest.mark.parametrize(
    "other",
    [
        {"kv_cache_quant_algo": "FP8"}, {"quant_algo": "FP8"}, {"kv_cache_scheme": "fp8_e4m3"},
        mixed("FP8", "FP8", "FP8"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_agree(tmp_path: Path, other: dict[str, Any]) -> None:
    assert findings(load_kv_scales(checkpoint(tmp_path, {"kv_cache_scheme": "FP8"}, 0, 1, 2, **other))) == []


def test_the_file_of_a_format_that_is_refused_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"kv_cache_scheme": "FP8"}, 0, 1, 2, kv_cache_quant_algo="INT8")
    (problem,) = audit_checkpoint(tmp_path)
    assert problem.message == 'kv_cache_quant_algo must be "FP8", got "INT8" in hf_quant_config.json.'


@pytest.mark.parametrize("pattern", ["model.layers.1.self_attn.k_proj", "*layers.1.self_attn*", "re:.*layers.1.*[kv]_proj"])
def test_quark_quantizes_projections_which_may_be_left_out(tmp_path: Path, pattern: str) -> None:
    outputs = {"output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}}
    quantization = {
        "quant_method": "quark", "kv_cache_post_rope": True, "kv_cache_quant_config": {"*k_proj": outputs},
        "exclude": ["lm_head", "model.layers.0.self_attn.o_proj", pattern],
    }  # fmt: skip
    loaded = load_kv_scales(checkpoint(tmp_path, quantization, 0, 2))
    assert findings(loaded) == [("layer-unquantized", "note", 1)]


def test_a_quark_config_that_names_layers_one_by_one(tmp_path: Path) -> None:
    outputs = [{"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}]
    layers = {f"{MODULE.format(n)}.{x}_proj": {"output_tensors": outputs} for n in (0, 2) for x in "kv"}
    quantization = {
        "quant_method": "quark", "kv_cache_post_rope": True,
        "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
        "layer_quant_config": layers,
    }  # fmt: skip
    loaded = load_kv_scales(checkpoint(tmp_path, quantization, 0, 2))
    assert findings(loaded) == [("layer-unquantized", "note", 1)]


# TensorRT-LLM


@pytest.mark.parametrize(
    ("mapping", "files"),
    [
        ({"world_size": 1, "tp_size": 1, "pp_size": 1}, [[0, 1, 2, 3, 4]]),
        ({"world_size": 2, "tp_size": 2, "pp_size": 1}, [[0, 1, 2, 3, 4]] * 2),
        ({"world_size": 2, "tp_size": 1, "pp_size": 2}, [[0, 1, 2], [3, 4]]),
        ({"world_size": 3, "tp_size": 1, "pp_size": 3}, [[0, 1], [2, 3], [4]]),
        ({"world_size": 4, "tp_size": 2, "pp_size": 2}, [[0, 1, 2], [0, 1, 2], [3, 4], [3, 4]]),
        ({"world_size": 4, "cp_size": 2, "pp_size": 2}, [[0, 1, 2], [0, 1, 2], [3, 4], [3, 4]]),
    ],
    ids=str,
)
def test_files_of_ranks_whose_layers_count_from_0(tmp_path: Path, mapping: dict[str, Any], files: list[list[int]]) -> None:
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    config = {**SIZES, "num_hidden_layers": 5, "mapping": mapping, "quantization": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "transformer.layers.{}.attention.kv_cache_scaling_factor"
    for rank, layers in enumerate(files):
        tensors = {name.format(n - layers[0]): torch.tensor([2.0**-n]) for n in layers}
        save_file(tensors, tmp_path / f"rank{rank}.safetensors")
    loaded = load_kv_scales(tmp_path)
    assert {n: layer.k.item() for n, layer in loaded.items() if layer.k is not None} == {n: 2.0**-n for n in range(5)}
    assert {problem.kind for problem in loaded.problems} <= {"duplicate-scale"}
