"""`KVScales.save`: what it writes, what it keeps, and what remains after a failure."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fp8kv
from checkpoint_files import SIZES, config, make_checkpoint, weights, write_checkpoint
from fp8kv import CheckpointError, KVCacheScheme, KVScales, LayerScales
from fp8kv.checkpoint._read.safetensors import StoredTensor
from fp8kv.checkpoint._write import replace
from fp8kv.checkpoint._write.scales import round_up
from helpers import each_strategy

LAYERS, HEADS, KV_HEADS = (SIZES[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SCALES_FILE = "model-kv-scales.safetensors"
each_query = pytest.mark.parametrize("query", [False, True], ids=["without query", "with query"])
each_number_of_files = pytest.mark.parametrize("shards", [1, 3], ids=["single file", "sharded"])


# Checkpoints and scales


def plain_config(**changes: Any) -> dict[str, Any]:
    """The config of a model without quantization."""
    fields = config() | changes
    if "quantization_config" not in changes:
        del fields["quantization_config"]
    return fields


def plain_checkpoint(folder: Path, tensors: dict[str, Tensor] | None = None, *, shards: int = 1, **changes: Any) -> Path:
    return write_checkpoint(folder, tensors or weights(), plain_config(**changes), shards=shards)


def some_scales(
    strategy: Any = "attn_head",
    *,
    query: bool = False,
    layers: int = LAYERS,
    observer: str | None = "static_minmax",
    seed: int = 3,
) -> KVScales:
    generator = torch.Generator().manual_seed(seed)
    count = 1 if strategy == "tensor" else KV_HEADS

    def scale() -> Tensor:
        return 0.01 + torch.rand(count, generator=generator)

    found = {n: LayerScales(q=scale() if query else None, k=scale(), v=scale()) for n in range(layers)}
    return KVScales(found, KVCacheScheme(strategy, query, observer))


def scales_with(**changes: Tensor | None) -> KVScales:
    """Per head, with the given tensors in layer 1."""
    scales = some_scales()
    fields = {name: getattr(scales[1], name) for name in "qkv"} | changes
    return KVScales({**scales, 1: LayerScales(**fields)}, scales.scheme)


def raw_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor, read without a library."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], content[8 + length + begin : 8 + length + end])
    return found


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file with tensors in exactly this order, of any dtype."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the real reader."""
    return {name: x for file in folder.glob("model*.safetensors") for name, x in load_file(file).items()}


def state(folder: Path) -> dict[str, str]:
    """The contents of a folder, with the hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def read_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


# Tensors


@pytest.mark.parametrize(
    ("strategy", "query", "shards", "dtype"),
    [
        ("tensor", False, 1, "bfloat16"),
        ("tensor", True, 3, "bfloat16"),
        ("attn_head", False, 3, "bfloat16"),
        ("attn_head", True, 1, "bfloat16"),
        ("attn_head", True, 3, "float16"),
        ("tensor", True, 1, "float32"),
    ],
)
def test_scales_are_named_shaped_and_typed_as_llm_compressor_does(
    tmp_path: Path, strategy: str, query: bool, shards: int, dtype: str
) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=shards, dtype=dtype)
    some_scales(strategy, query=query).save(tmp_path / "out", source)

    sizes = {"k": (KV_HEADS, 1, 1), "v": (KV_HEADS, 1, 1)} | ({"q": (HEADS, 1, 1)} if query else {})
    expected = {}
    for layer, (name, size) in itertools.product(range(LAYERS), sizes.items()):
        shape = (1,) if strategy == "tensor" else size
        expected[f"model.layers.{layer}.self_attn.{name}_scale"] = (FLOATS[dtype], shape)
        if query:
            expected[f"model.layers.{layer}.self_attn.{name}_zero_point"] = (torch.float8_e4m3fn, shape)
    found = {name: (x.dtype, tuple(x.shape)) for name, x in tensors_of(tmp_path / "out").items()}
    assert {name: found[name] for name in found if name not in weights()} == expected


def test_query_scales_are_repeated_for_the_heads_of_their_group(tmp_path: Path) -> None:
    scales = scales_with()
    layer = LayerScales(q=torch.tensor([1.0, 2.0, 3.0, 4.0]), k=scales[0].k, v=scales[0].v)
    KVScales(dict.fromkeys(range(LAYERS), layer), KVCacheScheme("attn_head", True)).save(
        tmp_path / "out", plain_checkpoint(tmp_path / "source")
    )
    stored = tensors_of(tmp_path / "out")["model.layers.2.self_attn.q_scale"]
    assert stored.flatten().tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_zero_points_are_zero(tmp_path: Path) -> None:
    some_scales(query=True).save(tmp_path / "out", plain_checkpoint(tmp_path / "source"))
    zero_points = [x for name, x in tensors_of(tmp_path / "out").items() if name.endswith("zero_point")]
    assert len(zero_points) == 3 * LAYERS
    assert all(x.float().eq(0).all() for x in zero_points)


@pytest.mark.parametrize(
    ("changes", "stored"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": None, "torch_dtype": "float32"}, torch.float32),
        ({"dtype": "torch.float16"}, torch.float16),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": None}, torch.bfloat16),
    ],
    ids=["dtype", "torch_dtype", "with torch.", "text_config", "auto: that of the weights", "none: likewise"],
)
def test_scales_have_the_dtype_of_the_model(tmp_path: Path, changes: dict[str, Any], stored: torch.dtype) -> None:
    some_scales().save(tmp_path / "out", plain_checkpoint(tmp_path / "source", **changes))
    assert tensors_of(tmp_path / "out")["model.layers.0.self_attn.k_scale"].dtype == stored


def test_the_dtype_of_quantized_weights_is_not_that_of_the_model(tmp_path: Path) -> None:
    tensors = {name: x.to(torch.float8_e4m3fn) for name, x in weights().items()}
    tensors["model.norm.weight"] = torch.ones(4, dtype=torch.float16)
    some_scales().save(tmp_path / "out", plain_checkpoint(tmp_path / "source", tensors, dtype=None))
    assert tensors_of(tmp_path / "out")["model.layers.0.self_attn.k_scale"].dtype == torch.float16


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("model.layers.{}.self_attn", []),
        ("layers.{}.self_attn", []),
        ("model.language_model.layers.{}.self_attn", ["model.vision_tower.encoder.layers.0.self_attn"]),
        (
            "language_model.model.layers.{}.self_attn",
            ["vision_tower.vision_model.encoder.layers.7.self_attn"],
        ),
        ("model.decoder.layers.{}.self_attn", ["model.encoder.layers.0.self_attn"]),
        ("backbone.layers.{}.mixer", ["mtp.layers.0.mixer"]),
        ("model.layers.{}.self_attn", ["model.layers.3.self_attn", "model.layers.0.cross_attn"]),
    ],
    ids=[
        "usual",
        "no prefix",
        "multimodal",
        "older multimodal",
        "decoder",
        "mixer",
        "layers beyond the last",
    ],
)
def test_scales_lie_beside_the_keys_of_their_layer(tmp_path: Path, module: str, others: list[str]) -> None:
    layers = [module.format(layer) for layer in range(LAYERS)]
    tensors = {f"{name}.k_proj.weight": torch.ones(2, 2) for name in [*layers, *others]}
    source = plain_checkpoint(tmp_path / "source", tensors)
    some_scales().save(tmp_path / "out", source)
    added = tensors_of(tmp_path / "out").keys() - tensors.keys()
    assert added == {f"{layer}.{name}_scale" for layer in layers for name in "kv"}


def test_keys_may_be_fused_with_queries_and_values(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.self_attn.qkv_proj.weight": torch.ones(2, 2) for n in range(LAYERS)}
    some_scales().save(tmp_path / "out", plain_checkpoint(tmp_path / "source", tensors))
    assert "model.layers.2.self_attn.v_scale" in tensors_of(tmp_path / "out")


def test_only_layers_with_attention_need_scales(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.self_attn.k_proj.weight": torch.ones(2, 2) for n in (1, 5)}
    tensors["model.layers.0.linear_attn.in_proj.weight"] = torch.ones(2, 2)
    layer = some_scales()[0]
    scales = KVScales({1: layer, 5: layer}, KVCacheScheme("attn_head"))
    scales.save(tmp_path / "out", plain_checkpoint(tmp_path / "source", tensors, num_hidden_layers=6))
    assert {int(name.split(".")[2]) for name in tensors_of(tmp_path / "out") if "k_scale" in name} == {1, 5}


def test_head_counts_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", num_attention_heads=[4, 8, 8], num_key_value_heads=[2, 1, 8])
    layers = {n: LayerScales(q=torch.ones(h), k=torch.ones(h), v=torch.ones(h)) for n, h in enumerate([2, 1, 8])}
    KVScales(layers, KVCacheScheme("attn_head", True)).save(tmp_path / "out", source)
    stored = tensors_of(tmp_path / "out")
    assert [len(stored[f"model.layers.{n}.self_attn.k_scale"]) for n in range(3)] == [2, 1, 8]
    assert [len(stored[f"model.layers.{n}.self_attn.q_scale"]) for n in range(3)] == [4, 8, 8]


def test_without_kv_heads_in_the_config_there_are_as_many_as_query_heads(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", num_attention_heads=KV_HEADS, num_key_value_heads=None)
    some_scales().save(tmp_path / "out", source)
    assert len(tensors_of(tmp_path / "out")["model.layers.0.self_attn.k_scale"]) == KV_HEADS


# Rounding


def next_below(stored: Tensor) -> Tensor:
    """The next smaller number of the type, as float32."""
    if stored.dtype == torch.bfloat16:
        bits = (stored.float().numpy().view(np.uint32) >> 16) - 1
        return torch.from_numpy((bits << 16).view(np.float32))
    return torch.from_numpy(np.nextafter(stored.numpy(), np.float16(0)).astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@hypothesis.given(
    st.lists(st.floats(min_value=2.0**-24, max_value=65504, width=32, exclude_min=False), min_size=1, max_size=20)
)
def test_rounding_goes_up_and_no_further_than_needed(dtype: torch.dtype, scales: list[float]) -> None:
    exact = torch.tensor(scales)
    stored = round_up(exact, dtype)
    assert stored.dtype == dtype
    assert (stored.double() >= exact.double()).all()
    assert (next_below(stored).double() < exact.double()).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_amax_is_clipped_after_saving(tmp_path: Path, dtype: str) -> None:
    scales = some_scales(query=True)
    scales.save(tmp_path / "out", plain_checkpoint(tmp_path / "source", dtype=dtype))
    stored = tensors_of(tmp_path / "out")
    for layer, name in itertools.product(range(LAYERS), "kv"):
        saved = stored[f"model.layers.{layer}.self_attn.{name}_scale"].flatten().double()
        assert (saved >= getattr(scales[layer], name).double()).all()


def test_a_float32_model_keeps_every_bit(tmp_path: Path) -> None:
    scales = some_scales()
    scales.save(tmp_path / "out", plain_checkpoint(tmp_path / "source", dtype="float32"))
    stored = tensors_of(tmp_path / "out")["model.layers.1.self_attn.v_scale"]
    assert stored.flatten().tolist() == scales[1].v.tolist()


@pytest.mark.parametrize(
    ("dtype", "value", "sentence"),
    [
        ("float16", 65505.0, "from 5.96e-08 to 65504, which float16"),
        ("float16", 1e30, "from 5.96e-08 to 65504, which float16"),
        ("float16", 5e-8, "from 5.96e-08 to 65504, which float16"),
        ("bfloat16", 3.4e38, "to 3.3895e+38, which bfloat16"),
        ("bfloat16", 1e-41, "from 9.18e-41"),
    ],
)
def test_a_scale_that_the_dtype_cannot_hold_is_refused(tmp_path: Path, dtype: str, value: float, sentence: str) -> None:
    source = plain_checkpoint(tmp_path / "source", dtype=dtype)
    with pytest.raises(ValueError) as error:
        scales_with(v=torch.tensor([1, 1, value, 1])).save(tmp_path / "out", source)
    assert "KVScales.save: scales[1].v must be from" in str(error.value)
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_least_scale_of_calibration_can_be_stored_in_float16(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", dtype="float16")
    scales_with(k=torch.full((KV_HEADS,), 1 / (448 * 512))).save(tmp_path / "out", source)
    stored = tensors_of(tmp_path / "out")["model.layers.1.self_attn.k_scale"].double()
    assert (stored >= 1 / (448 * 512)).all()
    assert (stored <= 1 / (448 * 512) * 1.02).all()


# Config


def arguments(strategy: str, observer: str | None) -> dict[str, Any]:
    return {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
        "observer": observer, "observer_kwargs": {}, "scale_dtype": None, "strategy": strategy,
        "symmetric": True, "type": "float", "zp_dtype": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "observer", "query"),
    [
        ("tensor", "static_minmax", False),
        ("tensor", None, True),
        ("attn_head", "static_minmax", True),
        ("attn_head", None, False),
    ],
)
def test_the_config_is_that_of_llm_compressor_field_by_field(
    tmp_path: Path, strategy: str, observer: str | None, query: bool
) -> None:
    source = plain_checkpoint(tmp_path / "source")
    some_scales(strategy, query=query, observer=observer).save(tmp_path / "out", source)
    attention = {
        "format": "dense",
        "input_activations": arguments(strategy, observer),
        "output_activations": None,
        "targets": ["LlamaAttention"],
        "weights": None,
    }
    assert read_config(tmp_path / "out") == {
        **plain_config(),
        "quantization_config": {
            "config_groups": {"group_0": attention} if query else {},
            "format": "dense",
            "global_compression_ratio": None,
            "ignore": [],
            "kv_cache_scheme": arguments(strategy, observer),
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.19.0",
        },
    }


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3Attention"),
        ({"architectures": ["NobodysForCausalLM"]}, "re:.*self_attn$"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "re:.*self_attn$"),
        ({"architectures": None}, "re:.*self_attn$"),
    ],
    ids=["another class", "unknown", "no class of the usual name", "none"],
)
def test_the_attention_group_names_the_class_or_the_module(tmp_path: Path, changes: dict[str, Any], target: str) -> None:
    source = plain_checkpoint(tmp_path / "source", **changes)
    some_scales(query=True).save(tmp_path / "out", source)
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == [target]


def test_without_transformers_the_attention_group_names_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    some_scales(query=True).save(tmp_path / "out", plain_checkpoint(tmp_path / "source"))
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["re:.*self_attn$"]


def test_fields_of_the_config_keep_order_and_values(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source")
    heads = '"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4'
    text = f'{{"z": 9.999999747378752e-06, "a": "Größe", {heads}}}'
    (source / "config.json").write_text(text, encoding="utf-8")
    some_scales().save(tmp_path / "out", source)
    written = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert written.startswith('{\n  "z": 9.999999747378752e-06,\n  "a": "Größe",\n  "num_hidden_layers": 3,')


# A source that is quantized

LINEAR = {
    "format": "float-quantized",
    "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"},
    "output_activations": None,
    "targets": ["Linear"],
    "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "type": "float"},
}
FP8_LINEARS = {
    "config_groups": {"group_0": LINEAR},
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "frozen",
    "something_new": 7,
}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_linears_stay_described(tmp_path: Path, key: str) -> None:
    source = plain_checkpoint(tmp_path / "source", **{key: FP8_LINEARS})
    some_scales("tensor").save(tmp_path / "out", source)
    written = read_config(tmp_path / "out")
    quantization = written["quantization_config"]
    assert "compression_config" not in written
    kept = {name: quantization[name] for name in FP8_LINEARS if name != "kv_cache_scheme"}
    assert kept == {name: value for name, value in FP8_LINEARS.items() if name != "kv_cache_scheme"}
    assert quantization["kv_cache_scheme"] == arguments("tensor", "static_minmax")


def test_the_attention_group_comes_after_those_of_linears(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", quantization_config=FP8_LINEARS)
    some_scales(query=True).save(tmp_path / "out", source)
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"]
    assert list(groups) == ["group_0", "group_1"]
    assert groups["group_0"] == LINEAR
    assert groups["group_1"]["targets"] == ["LlamaAttention"]


@each_query
@pytest.mark.parametrize(
    "targets",
    [["LlamaAttention"], ["re:.*self_attn$"], [f"model.layers.{n}.self_attn" for n in range(LAYERS)]],
    ids=["class", "pattern", "names"],
)
def test_an_older_attention_group_is_replaced(tmp_path: Path, targets: list[str], query: bool) -> None:
    older = {"targets": targets, "weights": None, "input_activations": arguments("tensor", "minmax")}
    quantization = FP8_LINEARS | {"config_groups": {"group_0": older, "group_1": LINEAR}}
    source = plain_checkpoint(tmp_path / "source", quantization_config=quantization)
    some_scales(query=query).save(tmp_path / "out", source)
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"]
    strategies = [group["input_activations"]["strategy"] for group in groups.values()]
    assert strategies == ["token", "attn_head"][: 1 + query]


def test_a_config_without_groups_or_method_is_that_of_compressed_tensors(tmp_path: Path) -> None:
    quantization = {"config_groups": None, "ignore": None, "quant_method": None, "format": "dense"}
    source = plain_checkpoint(tmp_path / "source", quantization_config=quantization)
    some_scales(query=True).save(tmp_path / "out", source)
    written = read_config(tmp_path / "out")["quantization_config"]
    assert list(written["config_groups"]) == ["group_0"]
    assert written["quant_method"] == "compressed-tensors"


def test_a_preset_group_stays(tmp_path: Path) -> None:
    quantization = FP8_LINEARS | {"config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    source = plain_checkpoint(tmp_path / "source", quantization_config=quantization)
    some_scales().save(tmp_path / "out", source)
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"]
    assert groups == {"FP8_DYNAMIC": ["Linear"]}


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("k_scale", 1),
        ("k_scale", 3),
        ("q_scale", 1),
        ("v_zero_point", 1),
        ("kv_scale", 3),
        ("v_proj.v_scale", 1),
        ("qkv_proj.k_scale", 1),
        ("attn.v_scale", 1),
        ("k_cache.scale", 3),
        ("q_proj.output_scale", 1),
    ],
)
def test_older_scales_are_replaced_whatever_their_name(tmp_path: Path, name: str, shards: int) -> None:
    older = {f"model.layers.1.self_attn.{name}": torch.tensor([77.0])}
    source = plain_checkpoint(tmp_path / "source", weights() | older, shards=shards)
    scales = some_scales()
    scales.save(tmp_path / "out", source)
    stored = tensors_of(tmp_path / "out")
    expected = {f"model.layers.{n}.self_attn.{x}_scale" for n in range(LAYERS) for x in "kv"}
    assert stored.keys() == weights().keys() | expected
    assert stored["model.layers.1.self_attn.k_scale"].max() < 2


def test_other_scales_stay(tmp_path: Path) -> None:
    others = {
        "model.layers.0.self_attn.k_proj.weight_scale": torch.ones(3),
        "model.layers.0.self_attn.k_proj.input_scale": torch.ones(1),
        "model.layers.0.mlp.down_proj.weight_scale": torch.ones(3),
    }
    some_scales().save(tmp_path / "out", plain_checkpoint(tmp_path / "source", weights() | others))
    assert others.keys() <= tensors_of(tmp_path / "out").keys()


# Everything else is unchanged


@each_query
def test_other_tensors_of_a_single_file_keep_their_bytes(tmp_path: Path, query: bool) -> None:
    source = make_checkpoint(tmp_path / "source", query=True)
    some_scales(query=query).save(tmp_path / "out", source)
    before, after = (raw_tensors(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {name: after[name] for name in weights()} == {name: before[name] for name in weights()}


def test_the_metadata_of_a_file_stays(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source")
    save_file(weights(), source / "model.safetensors", metadata={"format": "pt", "made by": "Größe"})
    some_scales().save(tmp_path / "out", source)
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt", "made by": "Größe"}


@pytest.mark.parametrize(("query", "dtype"), [(True, "bfloat16"), (True, "float16"), (True, "float32"), (False, "bfloat16")])
def test_every_tensor_is_aligned(tmp_path: Path, query: bool, dtype: str) -> None:
    """Odd sizes, small types before large ones, and an empty tensor at an odd place."""
    source = plain_checkpoint(tmp_path / "source", dtype=dtype)
    others = {
        "bytes": ("U8", [3], b"abc"),
        "empty": ("F32", [0, 7], b""),
        "small": ("F8_E4M3", [5], b"\x01\x02\x03\x04\x05"),
        "half": ("F4", [4], b"\x12\x34"),
        "large": ("I64", [1], b"12345678"),
        "scalar": ("F32", [], b"1234"),
        **raw_tensors(source / "model.safetensors"),
    }
    write_raw(source / "model.safetensors", others)
    some_scales(query=query).save(tmp_path / "out", source)

    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sizes = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1, "F4": 1}
    begins = {name: (8 + length + x["data_offsets"][0], sizes[x["dtype"]]) for name, x in header.items()}
    assert [name for name, (begin, size) in begins.items() if begin % size] == []
    written = raw_tensors(tmp_path / "out" / "model.safetensors")
    assert {name: written[name] for name in others} == others


def test_shards_stay_byte_for_byte_and_the_index_is_exact(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=3)
    index_file = source / "model.safetensors.index.json"
    before = json.loads(index_file.read_text())
    before["metadata"]["total_parameters"] = 5
    index_file.write_text(json.dumps(before))
    some_scales(query=True).save(tmp_path / "out", source)

    old, new = state(source), state(tmp_path / "out")
    shards = {name for name in old if name.startswith("model-0")}
    assert len(shards) == 3
    assert {name: new[name] for name in shards} == {name: old[name] for name in shards}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = tensors_of(tmp_path / "out")
    added = {name: SCALES_FILE for name in stored if name not in weights()}
    assert index["weight_map"] == before["weight_map"] | added
    assert index["metadata"] == {
        "total_size": sum(x.numel() * x.element_size() for x in stored.values()),
        "total_parameters": 5,
    }


def test_a_shard_with_older_scales_is_written_without_them_and_the_others_stay(tmp_path: Path) -> None:
    older = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    source = plain_checkpoint(tmp_path / "source", weights() | older, shards=3)
    some_scales().save(tmp_path / "out", source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    changed = index["weight_map"]["model.layers.0.self_attn.k_scale"]
    before, after = (raw_tensors(folder / changed) for folder in (source, tmp_path / "out"))
    del before["model.layers.0.self_attn.k_scale"]
    assert before
    assert after == before
    old, new = state(source), state(tmp_path / "out")
    assert {name for name in old if old[name] != new.get(name)} == {
        changed,
        "config.json",
        "model.safetensors.index.json",
    }


def test_a_shard_of_nothing_but_older_scales_goes(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=2)
    save_file({"model.layers.0.self_attn.k_scale": torch.ones(1)}, source / "old.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.k_scale"] = "old.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    some_scales().save(tmp_path / "out", source)
    assert not (tmp_path / "out" / "old.safetensors").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        SCALES_FILE,
    }


def test_other_files_and_folders_come_along(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source")
    others = {
        "tokenizer.json": b"{}",
        "consolidated.safetensors": b"whatever",
        "1_Pooling/config.json": b"{}",
        "original/deep/params.json": b"[]",
        ".hidden": b"",
    }
    for name, content in others.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    some_scales().save(tmp_path / "out", source)
    old, new = state(source), state(tmp_path / "out")
    assert new.keys() == old.keys()
    assert {name for name in old if new[name] != old[name]} == {"config.json", "model.safetensors"}


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    blobs = plain_checkpoint(tmp_path / "blobs", shards=2)
    (blobs / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    before = state(blobs)
    some_scales().save(tmp_path / "out", snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert len(tensors_of(tmp_path / "out")) == len(weights()) + 2 * LAYERS
    assert state(blobs) == before


def test_files_of_another_folder_are_copied_not_linked(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=2)
    some_scales().save(tmp_path / "out", source)
    links = {path.name: path.stat().st_nlink for path in (tmp_path / "out").iterdir()}
    assert set(links.values()) == {1}


def test_the_source_is_not_changed(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", query=True, shards=2)
    before = state(source)
    some_scales().save(tmp_path / "out", source)
    assert state(source) == before


def test_tensors_pass_through_in_pieces(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source")
    large = {"large": torch.zeros(96 << 20, dtype=torch.uint8)}
    save_file(weights() | large, source / "model.safetensors")
    del large
    tracemalloc.start()
    some_scales().save(tmp_path / "out", source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 48 << 20


# Existing contents


def test_missing_parents_are_made(tmp_path: Path) -> None:
    some_scales().save(tmp_path / "a" / "b" / "out", plain_checkpoint(tmp_path / "source"))
    assert (tmp_path / "a" / "b" / "out" / "config.json").exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    some_scales().save(tmp_path / "out", plain_checkpoint(tmp_path / "source"))
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


@each_number_of_files
@pytest.mark.parametrize("how", ["no source", "source named", "source by another name"])
def test_a_checkpoint_is_written_over_in_place(tmp_path: Path, shards: int, how: str) -> None:
    folder = plain_checkpoint(tmp_path / "model", shards=shards)
    (folder / "tokenizer.json").write_text("{}")
    expected = tmp_path / "expected"
    some_scales().save(expected, folder)
    (tmp_path / "link").symlink_to(folder)
    source = {"no source": None, "source named": folder, "source by another name": tmp_path / "link"}[how]
    some_scales().save(folder, source)
    assert state(folder) == state(expected)
    assert sorted(os.listdir(tmp_path)) == ["expected", "link", "model"]


def test_in_place_unchanged_files_are_not_copied(tmp_path: Path) -> None:
    folder = plain_checkpoint(tmp_path / "model", shards=2)
    before = {path.name: path.stat().st_ino for path in folder.glob("model-0*")}
    some_scales().save(folder)
    after = {path.name: path.stat().st_ino for path in folder.glob("model-0*")}
    assert after == before


def test_in_place_files_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plain_checkpoint(tmp_path / "model", shards=2)
    some_scales().save(tmp_path / "expected", folder)
    monkeypatch.setattr(os, "link", fails)
    some_scales().save(folder)
    assert state(folder) == state(tmp_path / "expected")


@each_number_of_files
def test_saving_again_gives_the_same_files(tmp_path: Path, shards: int) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=shards)
    some_scales(query=True).save(tmp_path / "out", source)
    before = state(tmp_path / "out")
    some_scales(query=True).save(tmp_path / "out")
    assert state(tmp_path / "out") == before


@each_number_of_files
def test_a_copy_of_the_source_is_written_over(tmp_path: Path, shards: int) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=shards)
    (source / "tokenizer.json").write_text("{}")
    some_scales("tensor", query=True).save(tmp_path / "out", source)
    some_scales("attn_head").save(tmp_path / "out", source)
    some_scales("attn_head").save(tmp_path / "fresh", source)
    assert state(tmp_path / "out") == state(tmp_path / "fresh")


def another_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"hidden_size": 1}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def one_more_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def one_file_less(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def another_weight(folder: Path) -> None:
    """A fine-tuned model: the header stays the same."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    path.write_bytes(content)


def another_tensor(folder: Path) -> None:
    save_file(weights() | {"lm_head.weight": torch.ones(2)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (another_config, "whose config.json differs"),
        (no_config, "which is no checkpoint"),
        (another_tokenizer, "whose tokenizer.json differs"),
        (one_more_file, "which has notes.txt besides"),
        (one_file_less, "which lacks tokenizer.json"),
        (another_weight, "whose model.safetensors has other tensors"),
        (another_tensor, "whose model.safetensors has other tensors"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_a_folder_with_anything_else_is_not_written_over_unless_asked(
    tmp_path: Path, change: Callable[[Path], None], difference: str
) -> None:
    source = plain_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    some_scales().save(out, source)
    expected = state(out)
    change(out)
    before = state(out)
    with pytest.raises(FileExistsError) as error:
        some_scales().save(out, source)
    assert str(error.value) == (
        "KVScales.save: checkpoint_dir must be new, empty or a copy of the source, unless overwrite=True, "
        f"got {out}, {difference}"
    )
    assert state(out) == before
    some_scales().save(out, source, overwrite=True)
    assert state(out) == expected


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    some_scales().save(tmp_path / "out", plain_checkpoint(tmp_path / "source"))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").exists()


def test_the_mode_of_the_folder_stays(tmp_path: Path) -> None:
    folder = plain_checkpoint(tmp_path / "model")
    folder.chmod(0o750)
    some_scales().save(folder)
    assert folder.stat().st_mode & 0o777 == 0o750


# Bad input


def of_value(value: float) -> Callable[[], KVScales]:
    return lambda: scales_with(v=torch.tensor([1.0, 1.0, value, 1.0]))


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        (lambda: scales_with(k=None), "scales[1].k must be a tensor, got None"),
        (of_value(float("nan")), "scales[1].v must be finite and above 0, got nan"),
        (of_value(float("inf")), "scales[1].v must be finite and above 0, got inf"),
        (of_value(0.0), "scales[1].v must be finite and above 0, got 0.0"),
        (of_value(-2.0), "scales[1].v must be finite and above 0, got -2.0"),
        (
            lambda: some_scales().shard(1, 2),
            "scales[0].k must have an element for each of the 4 KV heads of SOURCE, got 2 "
            "(of one tensor-parallel rank?)",
        ),
        (
            lambda: scales_with(k=torch.ones(8)),
            "scales[1].k must have an element for each of the 4 KV heads of SOURCE, got 8",
        ),
        (
            lambda: scales_with(k=torch.ones(0)),
            "scales[1].k must have an element for each of the 4 KV heads of SOURCE, got 0",
        ),
        (
            lambda: KVScales(some_scales(), KVCacheScheme("tensor")),
            'scales[0].k must have 1 element with strategy "tensor", got 4',
        ),
        (
            lambda: scales_with(q=torch.ones(4)),
            "scales must have query scales for all layers or for none, got none for layer 0",
        ),
        (
            lambda: some_scales(layers=2),
            "scales must have all 3 attention layers of SOURCE, got none for layer 2",
        ),
        (
            lambda: some_scales(layers=0),
            "scales must have all 3 attention layers of SOURCE, got none for layer 0",
        ),
        (
            lambda: some_scales(layers=4),
            "scales must have the 3 attention layers of SOURCE, got layer 3, which is not one of them",
        ),
    ],
    ids=[
        "no k", "NaN", "infinite", "zero", "negative", "of a rank", "too many heads", "no heads",
        "heads per tensor", "query of one layer", "a layer less", "empty", "a layer more",
    ],
)  # fmt: skip
def test_scales_are_checked_before_anything_is_written(tmp_path: Path, scales: Callable[[], KVScales], sentence: str) -> None:
    source = plain_checkpoint(tmp_path / "source")
    with pytest.raises(ValueError) as error:
        scales().save(tmp_path / "out", source)
    assert str(error.value) == "KVScales.save: " + sentence.replace("SOURCE", str(source))
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "source must be a checkpoint without quantization, or one quantized with compressed-tensors, "
            "got quant_method 'gptq'",
        ),
        ({"quantization_config": "fp8"}, "source must have an object as quantization_config in config.json, got str"),
        ({"compression_config": [FP8_LINEARS]}, "source must have an object as compression_config in config.json, got list"),
        (
            {"text_config": {"quantization_config": FP8_LINEARS}},
            "source must have its quantization_config outside of text_config",
        ),
        ({"num_attention_heads": None, "num_key_value_heads": None}, "got None and None for layer 0 in"),
        ({"num_attention_heads": 6}, "got 6 and 4 for layer 0 in"),
        (
            {"quantization_config": FP8_LINEARS | {"ignore": ["lm_head", "re:.*self_attn"]}},
            "got 're:.*self_attn' in its ignore list",
        ),
    ],
    ids=["another method", "a word", "a list", "a nested config", "no head counts", "uneven groups", "attention ignored"],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    source = plain_checkpoint(tmp_path / "source", **changes)
    with pytest.raises(ValueError) as error:
        some_scales(query=True).save(tmp_path / "out", source)
    assert str(error.value).startswith("KVScales.save: ")
    assert sentence in str(error.value)
    assert os.listdir(tmp_path) == ["source"]


def test_a_checkpoint_of_modelopt_is_refused(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source")
    (source / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"source must be a checkpoint without .* hf_quant_config\.json"):
        some_scales().save(tmp_path / "out", source)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["transformer.h.0.attn.out_proj.weight"], "none"),
        (
            ["a.layers.0.self_attn.k_proj.weight", "b.layers.0.self_attn.k_proj.weight"],
            "'a.layers', 'b.layers'",
        ),
    ],
    ids=["no keys", "two models"],
)
def test_a_source_without_known_layers_is_refused(tmp_path: Path, names: list[str], found: str) -> None:
    source = plain_checkpoint(tmp_path / "source", {name: torch.ones(1) for name in names})
    with pytest.raises(ValueError, match="the attention layers of one language model") as error:
        some_scales().save(tmp_path / "out", source)
    assert f"got {found} in" in str(error.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_missing_file_of_the_source_is_named(tmp_path: Path, missing: str) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=2 if "-of-" in missing else 1)
    (source / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        some_scales().save(tmp_path / "out", source)
    assert os.listdir(tmp_path) == ["source"]


def test_a_source_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source must be a folder with a config\.json"):
        some_scales().save(tmp_path / "out", tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []


def with_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[" * 100_000),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", with_header(b"[]")),
        ("model.safetensors", with_header(b"{}") + b"x"),
        ("model.safetensors", with_header(b'{"a": [1, 2]}')),
        ("model.safetensors", with_header(b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}')),
        ("model.safetensors", with_header(b'{"a": {"dtype": "U8", "shape": ["4"], "data_offsets": [0, 0]}}')),
    ],
    ids=[
        "half JSON", "a list", "no text", "deep", "empty", "garbage", "no object", "too long", "an odd entry",
        "before the start", "a text as shape",
    ],
)  # fmt: skip
def test_a_corrupt_file_of_the_source_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    source = plain_checkpoint(tmp_path / "source")
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        some_scales().save(tmp_path / "out", source)
    assert os.listdir(tmp_path) == ["source"]


def test_a_tensor_that_the_index_names_and_no_file_has_is_an_error(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"must have the tensor 'model\.norm\.weight'"):
        some_scales().save(tmp_path / "out", source)


def test_a_truncated_file_of_the_source_is_named(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=2)
    shard = source / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is no whole safetensors file"):
        some_scales().save(tmp_path / "out", source)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {"a": "../model.safetensors"}, {"a": 3}, {"a": ["x"]}],
    ids=["none", "a list", "outside", "a number", "unhashable"],
)
def test_an_index_that_leads_nowhere_is_refused(tmp_path: Path, weight_map: Any) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=2)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json must"):
        some_scales().save(tmp_path / "out", source)


def test_a_folder_inside_the_source_or_around_it_is_refused(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "all" / "source")
    before = state(tmp_path)
    for place in (source / "out", tmp_path / "all"):
        with pytest.raises(ValueError, match="checkpoint_dir must be a sibling of the source"):
            some_scales().save(place, source, overwrite=True)
    assert state(tmp_path) == before


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="checkpoint_dir must be a folder"):
        some_scales().save(tmp_path / "out", plain_checkpoint(tmp_path / "source"), overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_in_a_circle_is_an_error(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source")
    (source / "again").symlink_to(source)
    with pytest.raises(OSError, match="again is a link to a folder that it lies in"):
        some_scales().save(tmp_path / "out", source)


# Failures and crashes


def fails(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def fails_at(call: int, honest: Callable[..., Any]) -> Callable[..., Any]:
    """Works until the given call; that one fails, and so do all after it."""
    calls = itertools.count()

    def function(*args: Any, **kwargs: Any) -> Any:
        return honest(*args, **kwargs) if next(calls) < call else fails()

    return function


@pytest.mark.parametrize(
    ("there", "module", "name", "calls"),
    [
        ("nothing", shutil, "copy2", 4),
        ("nothing", os, "fsync", 8),
        ("nothing", os, "rename", 1),
        ("a checkpoint", shutil, "copy2", 4),
        ("a checkpoint", os, "fsync", 8),
        ("a checkpoint", replace, "_exchange", 1),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, module: Any, name: str, calls: int
) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=3)
    (source / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    if there == "a checkpoint":
        some_scales("tensor").save(out, source)
    before = state(tmp_path)
    for call in range(calls):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails_at(call, getattr(module, name)))
            with pytest.raises(OSError, match="No space left"):
                some_scales().save(out, source)
        assert state(tmp_path) == before, f"call {call}"


def test_a_failure_after_the_new_folder_has_taken_its_place_leaves_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_checkpoint(tmp_path / "model")
    some_scales().save(tmp_path / "expected", folder)
    # Two files, the new folder, and then the one that it lies in.
    monkeypatch.setattr(os, "fsync", fails_at(3, os.fsync))
    with pytest.raises(OSError, match="No space left"):
        some_scales().save(folder)
    assert state(folder) == state(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "model"]


def test_a_full_disk_in_the_middle_of_a_file_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plain_checkpoint(tmp_path / "model")
    before = state(tmp_path)
    monkeypatch.setattr(StoredTensor, "chunks", fails_at(2, StoredTensor.chunks))
    with pytest.raises(OSError, match="No space left"):
        some_scales().save(folder)
    assert state(tmp_path) == before


@pytest.mark.parametrize("there", ["nothing", "a checkpoint"])
def test_without_an_exchange_of_folders_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    source = plain_checkpoint(tmp_path / "source")
    some_scales().save(tmp_path / "expected", source)
    monkeypatch.setattr(replace, "_exchange", lambda a, b: False)
    if there == "a checkpoint":
        some_scales("tensor").save(tmp_path / "out", source)
    some_scales().save(tmp_path / "out", source)
    assert state(tmp_path / "out") == state(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "out", "source"]


def test_without_an_exchange_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plain_checkpoint(tmp_path / "model")
    before = state(tmp_path)
    honest, calls = os.rename, itertools.count()

    def rename(*args: Any) -> None:
        honest(*args) if next(calls) != 1 else fails()

    monkeypatch.setattr(replace, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        some_scales().save(folder)
    assert state(tmp_path) == before


CRASHES = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from fp8kv import KVCacheScheme, KVScales, LayerScales
from fp8kv.checkpoint._write import checkpoint, replace

folder, layers = Path(sys.argv[1]), int(sys.argv[2])
layer = LayerScales(q=None, k=torch.tensor([2.0]), v=torch.tensor([2.0]))
scales = KVScales(dict.fromkeys(range(layers), layer), KVCacheScheme("tensor"))

def save_and_crash(destination, crash):
    steps = 0
    def before_and_after(honest):
        def step(*args, **kwargs):
            nonlocal steps
            for run in (lambda: None, lambda: honest(*args, **kwargs)):
                result = run()
                steps += 1
                if steps == crash:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result
        return step
    for module, name in [(os, "fsync"), (os, "link"), (os, "rename"), (shutil, "copy2"), (shutil, "rmtree"),
                         (replace, "_exchange"), (checkpoint, "write_tensors"), (checkpoint, "_write_json")]:
        setattr(module, name, before_and_after(getattr(module, name)))
    scales.save(destination, folder / "source" if destination.name.startswith("copy") else None)

for kind in ("copy", "over"):
    for crash in range(1, 1000):
        destination = folder / f"{kind}{crash}"
        if kind == "over":
            shutil.copytree(folder / "source", destination)
        child = os.fork()
        if child == 0:
            save_and_crash(destination, crash)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
"""


def test_a_crash_at_any_step_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=2)
    (source / "tokenizer.json").write_text("{}")
    layer = LayerScales(q=None, k=torch.tensor([2.0]), v=torch.tensor([2.0]))
    KVScales(dict.fromkeys(range(LAYERS), layer), KVCacheScheme("tensor")).save(tmp_path / "new", source)
    subprocess.run([sys.executable, "-c", CRASHES, str(tmp_path), str(LAYERS)], check=True)

    old, new = state(source), state(tmp_path / "new")
    copies = [state(path) if path.exists() else None for path in numbered(tmp_path, "copy")]
    over = [state(path) for path in numbered(tmp_path, "over")]
    assert len(copies) > 15
    assert len(over) > 15
    assert [x for x in copies if x is not None and x != new] == []
    assert [x for x in over if x not in (old, new)] == []
    # Steps before and after the decisive one.
    assert (copies[0], copies[-1]) == (None, new)
    assert (over[0], over[-1]) == (old, new)


def numbered(folder: Path, stem: str) -> list[Path]:
    """STEM1, STEM2, ..., up to the last there is, and those between that are missing."""
    last = max(int(path.name.removeprefix(stem)) for path in folder.glob(f"{stem}[0-9]*"))
    return [folder / f"{stem}{number}" for number in range(1, last + 1)]


# Readers


@each_strategy
@each_query
@each_number_of_files
def test_scales_survive_a_save_and_a_load(tmp_path: Path, strategy: str, query: bool, shards: int) -> None:
    source = plain_checkpoint(tmp_path / "source", shards=shards, dtype="float32")
    scales = some_scales(strategy, query=query)
    scales.save(tmp_path / "out", source)
    loaded = fp8kv.load_kv_scales(tmp_path / "out")
    assert loaded.scheme == scales.scheme
    assert [problem for problem in loaded.problems if problem.severity == "error"] == []
    assert list(loaded) == list(range(LAYERS))
    for layer, name in itertools.product(range(LAYERS), "qkv"):
        ours, theirs = getattr(scales[layer], name), getattr(loaded[layer], name)
        assert (None if theirs is None else theirs.tolist()) == (None if ours is None else ours.tolist())


@each_strategy
@each_query
def test_compressed_tensors_parses_the_config(tmp_path: Path, strategy: str, query: bool) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    source = plain_checkpoint(tmp_path / "source", quantization_config=FP8_LINEARS)
    some_scales(strategy, query=query).save(tmp_path / "out", source)
    written = read_config(tmp_path / "out")["quantization_config"]
    parsed = quantization.QuantizationConfig.model_validate(written)
    of_attention = parsed.config_groups["group_1"].input_activations if query else parsed.kv_cache_scheme
    for found in (parsed.kv_cache_scheme, of_attention):
        assert (found.num_bits, found.type, found.strategy) == (8, "float", strategy)
        assert (found.symmetric, found.dynamic, found.observer) == (True, False, "static_minmax")
    assert parsed.config_groups["group_0"].weights.strategy == "channel"
    assert len(parsed.config_groups) == 1 + query
    assert parsed.quantization_status == "frozen"


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, random, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tiny = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=16, vocab_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    transformers.LlamaForCausalLM(tiny).to(torch.bfloat16).save_pretrained(folder)
    return folder


@each_strategy
@each_query
def test_transformers_loads_the_checkpoint(tmp_path: Path, tiny_llama: Path, strategy: str, query: bool) -> None:
    """Where compressed-tensors does not know the attention of this transformers, scales are left out."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    some_scales(strategy, query=query).save(tmp_path / "out", tiny_llama)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    stored = tensors_of(tmp_path / "out")
    scales = stored.keys() - tensors_of(tiny_llama).keys()
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) <= scales
    loaded = model.state_dict()
    for name in stored.keys() - set(report["unexpected_keys"]):
        assert torch.equal(loaded[name].float(), stored[name].float()), name


@each_strategy
@each_query
def test_scales_arrive_in_the_attention_of_a_model(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, query: bool
) -> None:
    """With a compressed-tensors that knows LlamaAttention by its class, whatever its arguments are named."""
    transformers = pytest.importorskip("transformers")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle")
    for module in (lifecycle.apply, lifecycle.initialize):
        monkeypatch.setattr(module, "is_cached_attention_module", lambda module: type(module).__name__ == "LlamaAttention")
    some_scales(strategy, query=query).save(tmp_path / "out", tiny_llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored, parameters = tensors_of(tmp_path / "out"), dict(model.named_parameters())
    for layer, name in itertools.product(range(LAYERS), "qkv" if query else "kv"):
        scale = f"model.layers.{layer}.self_attn.{name}_scale"
        assert parameters[scale].shape == stored[scale].shape
        assert torch.equal(parameters[scale], stored[scale])
