"""KVCacheScheme.from_config: the KV cache in configs of all producers, and unsupported schemes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint_files import config, scheme
from fp8kv import KVCacheScheme

from_config = KVCacheScheme.from_config

FP8_LINEAR = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}


def attention_group(targets: Any = ("LlamaAttention",), **changes: Any) -> dict[str, Any]:
    activations = scheme(**changes)
    return {"targets": list(targets), "weights": None, "input_activations": activations}


def quark_layer(**changes: Any) -> dict[str, Any]:
    outputs = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": None}
    return {"weight": {"dtype": "int4"}, "input_tensors": None, "output_tensors": outputs | changes}


def quark(**changes: Any) -> dict[str, Any]:
    layers = {
        "*k_proj": quark_layer(**changes),
        "*v_proj": quark_layer(),
        "*q_proj": {"output_tensors": None},
    }
    return {
        "quant_method": "quark",
        "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
        "layer_quant_config": layers,
        "global_quant_config": {"weight": {"dtype": "int4"}},
    }


# compressed-tensors


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize("query", [False, True], ids=["kv", "qkv"])
def test_strategy_and_query(strategy: str, query: bool) -> None:
    found = from_config(config(strategy, query=query))
    assert found.strategy == strategy
    assert found.quantizes_query is query
    assert found.observer == "static_minmax"
    assert found.producer == "compressed-tensors"


@pytest.mark.parametrize("observer", ["minmax", "memoryless_minmax", "mse", None])
def test_the_observer(observer: str | None) -> None:
    assert from_config(config(kv_cache_scheme=scheme(observer=observer))).observer == observer


def test_the_observer_of_the_attention_group_where_the_scheme_has_none() -> None:
    given = config(query=True, kv_cache_scheme=scheme(observer=None))
    assert from_config(given).observer == "static_minmax"


@pytest.mark.parametrize(
    "targets",
    [
        ["LlamaAttention"], ["Qwen3MoeAttention"], ["re:.*self_attn$"], [r"re:.*\.self_attn"],
        ["LlamaFlashAttn"], ["MistralAttention", "re:.*self_attn$"], ["Linear", "LlamaAttention"],
        ["model.layers.0.self_attn"],
    ],
    ids=str,
)  # fmt: skip
def test_targets_that_are_attention(targets: list[str]) -> None:
    given = config(config_groups={"group_0": attention_group(targets)})
    assert from_config(given).quantizes_query


@pytest.mark.parametrize(
    "group",
    [
        FP8_LINEAR,
        attention_group(["Linear"]),
        attention_group([r"re:.*self_attn\.q_proj$"]),
        attention_group() | {"weights": scheme("channel")},
        attention_group() | {"input_activations": None},
        attention_group() | {"targets": None},
        {"targets": 3, "input_activations": scheme()},
        ["Linear"],
        None,
    ],
    ids=[
        "fp8 linear",
        "linear",
        "projection",
        "weights",
        "no activations",
        "null",
        "number",
        "preset",
        "none",
    ],
)
def test_groups_that_are_none_of_attention(group: Any) -> None:
    assert not from_config(config(config_groups={"group_0": group})).quantizes_query


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_an_attention_group_alone_is_the_scheme_of_keys_and_values_too(strategy: str) -> None:
    found = from_config(config(strategy, query=True, kv_cache_scheme=None))
    assert (found.strategy, found.quantizes_query) == (strategy, True)


def test_fp8_linears_and_unknown_fields_are_tolerated() -> None:
    groups = {"group_0": FP8_LINEAR, "group_1": attention_group(new_field={"a": 1})}
    given = config(config_groups=groups, kv_cache_scheme=scheme(color="blue"), ignore=["lm_head"], more=[1])
    assert from_config(given) == KVCacheScheme("attn_head", True, "static_minmax")


def test_no_strategy_means_tensor() -> None:
    assert from_config({"kv_cache_scheme": {"num_bits": 8, "type": "FLOAT"}}).strategy == "tensor"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_bits": 4}, "num_bits must be 8, got 4"),
        ({"num_bits": None}, "num_bits must be 8, got null"),
        ({"type": "int"}, 'type must be "float", got "int"'),
        ({"type": None}, 'type must be "float", got null'),
        ({"symmetric": False}, "symmetric must be true, got false"),
        ({"dynamic": True}, "dynamic must be false, got true"),
        ({"dynamic": "local"}, 'dynamic must be false, got "local"'),
        ({"strategy": "group"}, 'strategy must be "tensor" or "attn_head", got "group"'),
        ({"strategy": "channel"}, 'strategy must be "tensor" or "attn_head", got "channel"'),
        ({"strategy": "token"}, 'strategy must be "tensor" or "attn_head", got "token"'),
        ({"strategy": "block"}, 'strategy must be "tensor" or "attn_head", got "block"'),
        ({"strategy": ["tensor"]}, 'strategy must be "tensor" or "attn_head", got ["tensor"]'),
        ({"strategy": None, "group_size": 128}, 'strategy must be "tensor" or "attn_head", got "group"'),
    ],
    ids=str,
)
def test_what_is_not_supported(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        from_config(config(kv_cache_scheme=scheme(**changes)))
    assert str(error.value) == f"KVCacheScheme.from_config: kv_cache_scheme.{sentence}"


def test_what_is_not_supported_in_an_attention_group() -> None:
    given = config(kv_cache_scheme=None, config_groups={"group_0": attention_group(num_bits=4)})
    with pytest.raises(ValueError) as error:
        from_config(given)
    assert str(error.value) == ("KVCacheScheme.from_config: config_groups.group_0.input_activations.num_bits must be 8, got 4")


def test_strategies_that_contradict() -> None:
    given = config(kv_cache_scheme=scheme("tensor"), config_groups={"g": attention_group(strategy="attn_head")})
    with pytest.raises(ValueError) as error:
        from_config(given)
    assert str(error.value) == (
        "KVCacheScheme.from_config: config_groups.g.input_activations.strategy must be that of "
        'kv_cache_scheme, "tensor", got "attn_head"'
    )


# ModelOpt, AutoFP8, Quark


@pytest.mark.parametrize(
    ("given", "producer"),
    [
        (
            {"producer": {"name": "modelopt", "version": "0.29"},
             "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": []}},
            "modelopt",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "modelopt"),
        ({"quant_method": "fp8", "kv_cache_quant_algo": "fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, "modelopt"),
        (
            {"quant_method": "modelopt", "producer": {"name": "modelopt"},
             "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
            "modelopt",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}, "fp8"),
        (quark(), "quark"),
        (quark() | {"export": {}, "kv_cache_group": ["*k_proj", "*v_proj"]}, "quark"),
        (
            {"quant_method": "quark", "export": {"kv_cache_group": []},
             "kv_cache_quant_config": {"*k_proj": quark_layer()}},
            "quark",
        ),
    ],
    ids=["hf_quant_config", "modelopt", "fp8", "nested", "modelopt scheme", "autofp8", "quark", "quark group",
         "quark new"],
)  # fmt: skip
def test_other_producers(given: dict[str, Any], producer: str) -> None:
    assert from_config(given) == KVCacheScheme("tensor", producer=producer)


def test_another_producer_in_a_whole_config() -> None:
    given = {"model_type": "llama", "quantization_config": quark()}
    assert from_config(given) == KVCacheScheme("tensor", producer="quark")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"kv_cache_quant_algo": "NVFP4"}, 'kv_cache_quant_algo must be "FP8", got "NVFP4"'),
        ({"kv_cache_quant_algo": "INT8"}, 'kv_cache_quant_algo must be "FP8", got "INT8"'),
        ({"kv_cache_quant_algo": {}}, 'kv_cache_quant_algo must be "FP8", got {}'),
        ({"kv_cache_scheme": "dynamic"}, 'kv_cache_scheme must be "static", got "dynamic"'),
        ({"kv_cache_scheme": [8]}, "kv_cache_scheme must be an object, got list"),
        (
            quark(dtype="int8"),
            'layer_quant_config.*k_proj.output_tensors.dtype must be "fp8_e4m3", got "int8"',
        ),
        (
            quark(qscheme="per_channel"),
            'layer_quant_config.*k_proj.output_tensors.qscheme must be "per_tensor", got "per_channel"',
        ),
        (
            quark(is_dynamic=True),
            "layer_quant_config.*k_proj.output_tensors.is_dynamic must be false, got true",
        ),
        (
            quark(symmetric=False),
            "layer_quant_config.*k_proj.output_tensors.symmetric must be true, got false",
        ),
        (
            quark() | {"layer_quant_config": {}},
            "layer_quant_config must have the layers of kv_cache_group with output_tensors, got none",
        ),
        (
            quark() | {"layer_quant_config": {"*k_proj": {"output_tensors": "fp8"}}},
            "layer_quant_config.*k_proj.output_tensors must be an object, got str",
        ),
    ],
    ids=str,
)
def test_what_is_not_supported_of_other_producers(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        from_config(given)
    assert str(error.value) == f"KVCacheScheme.from_config: {sentence}"


# Location of the config


def test_a_quantization_config_alone() -> None:
    assert from_config(config("tensor")["quantization_config"]).strategy == "tensor"


@pytest.mark.parametrize("outer", ["text_config", "llm_config", "language_config"])
def test_in_the_config_of_the_language_model(outer: str) -> None:
    assert from_config({"model_type": "llava", outer: config("tensor")}).strategy == "tensor"


def test_at_the_top_of_a_multimodal_config() -> None:
    given = config("tensor")
    quantization = given.pop("quantization_config")
    multimodal = {"text_config": given, "vision_config": {}, "quantization_config": quantization}
    assert from_config(multimodal).strategy == "tensor"


def test_the_older_key() -> None:
    given = config("tensor")
    given["compression_config"] = given.pop("quantization_config")
    assert from_config(given).strategy == "tensor"


@pytest.mark.parametrize("as_text", [False, True], ids=["Path", "str"])
def test_a_file_and_a_directory(tmp_path: Path, as_text: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("attn_head", query=True)))
    for path in (tmp_path, tmp_path / "config.json"):
        found = from_config(str(path) if as_text else path)
        assert found == KVCacheScheme("attn_head", True, "static_minmax")


def test_a_file_of_modelopt_beside_a_config_without_a_scheme(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(modelopt))
    assert from_config(tmp_path) == KVCacheScheme("tensor", producer="modelopt")


def test_config_json_counts_where_both_have_a_scheme(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("attn_head")))
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(modelopt))
    assert from_config(tmp_path).strategy == "attn_head"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model_type": "llama"},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        config(kv_cache_scheme=None),
        config(kv_cache_scheme=None, config_groups={"group_0": FP8_LINEAR}),
        config(kv_cache_scheme=None, config_groups=[1]),
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}},
        {
            "quant_method": "quark",
            "export": {"kv_cache_group": []},
            "layer_quant_config": {"*": quark_layer()},
        },
        {"quant_method": "quark", "export": None, "layer_quant_config": None},
    ],
    ids=["empty", "none", "null", "gptq", "no scheme", "linears", "list", "modelopt", "quark", "bare quark"],
)
def test_a_cache_that_is_not_quantized(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        from_config(given)
    assert str(error.value) == ("KVCacheScheme.from_config: the config must have a KV cache in FP8 (kv_cache_scheme), got none")


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/config.json", "."])
def test_a_missing_file(tmp_path: Path, missing: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^KVCacheScheme.from_config: .* but does not exist$"):
        from_config(tmp_path / missing)


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (b"", "must be JSON, got: Expecting value"),
        (b"{", "must be JSON, got: Expecting"),
        (b"\xff\xfe", "must be JSON, got: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "must be JSON, got: maximum recursion depth"),
        (b'{"text_config": ' * 450 + b"{}" + b"}" * 450, "must have at most 100 objects and lists in each other, got more"),
        (b"[]", "must hold an object, got list"),
        (b"null", "must hold an object, got NoneType"),
    ],
    ids=["empty", "cut off", "no text", "too deep", "deep", "list", "null"],
)
def test_a_file_that_is_no_config(tmp_path: Path, contents: bytes, sentence: str) -> None:
    (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(ValueError) as error:
        from_config(tmp_path)
    assert str(error.value).startswith(f"KVCacheScheme.from_config: {tmp_path / 'config.json'} {sentence}")


def test_how_deep_a_config_may_be() -> None:
    found = config()
    for _ in range(96):  # there are 4 objects in each other: the innermost is the observer_kwargs of the scheme
        found = {"text_config": found}
    assert from_config(found).strategy == "attn_head"
    with pytest.raises(ValueError) as error:
        from_config({"text_config": found})
    assert (
        str(error.value) == "KVCacheScheme.from_config: config must have at most 100 objects and lists in each other, got more"
    )


def test_neither_a_dict_nor_a_path() -> None:
    with pytest.raises(ValueError) as error:
        from_config(3)  # type: ignore[arg-type]
    assert str(error.value) == "KVCacheScheme.from_config: config must be a dict or a path, got int"
