"""The layers with a KV cache and their heads: conventions of configs, and corrections by tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_files import config, scheme, write_checkpoint
from fp8kv import CheckpointError, KVCacheScheme, KVScales, LayerScales, audit_checkpoint, load_kv_scales

STEM = "model.layers.{}.self_attn"


def scales(counts: dict[int, int], v: dict[int, int] | None = None) -> dict[str, Tensor]:
    """Scales of K and V per head, in the given number for each layer."""
    return {
        f"{STEM.format(layer)}.{letter}_scale": torch.full((count, 1, 1), 0.05)
        for letter, numbers in (("k", counts), ("v", counts | (v or {})))
        for layer, count in numbers.items()
    }


def fields(num_layers: int, **changes: Any) -> dict[str, Any]:
    """The config of a model with 8 query heads, 4 KV heads and heads of 16 elements, and scales per head."""
    merged = config() | {"num_hidden_layers": num_layers} | changes
    return {key: value for key, value in merged.items() if value is not None}


def weights(shapes: dict[int, dict[str, int]], module: str = "self_attn") -> dict[str, Tensor]:
    """Projections by layer: the rows of each."""
    return {
        f"model.layers.{layer}.{module}.{name}.weight": torch.ones(rows, 4)
        for layer, rows_of in shapes.items()
        for name, rows in rows_of.items()
    }


def heads(loaded: KVScales) -> dict[int, int]:
    return {n: layer.k.numel() for n, layer in loaded.items() if layer.k is not None}


def kinds(folder: Path) -> list[tuple[str, int | None]]:
    return [(problem.kind, problem.layer) for problem in audit_checkpoint(folder)]


# Conventions of configs


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3, 5]}}, [1, 3]),
        ({"attn": {"layers": [0, 3], "num_heads": 8}}, [0, 3]),
        ({"attn_layer_idx": [4]}, [4]),
        ({"hybrid_layer_ids": [1, 4]}, [1, 4]),
        ({"layer_group_size": 2}, [1, 3, 4]),
        ({"mixer_types": ["minicpm4", "lightning-attn", "minicpm4", "minicpm4", "lightning-attn"]},
         [0, 2, 3]),
        ({"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]}, [1, 3]),
        ({"layer_types": ["conv", "full_attention", "compressed_sparse_attention", "minimax_m3_sparse",
                          "moe"]},
         [1, 2, 3]),
        ({"use_cla": True, "cla_share_factor": 2}, [0, 2, 4]),
        ({"kv_reuse_group": [[1, 2, 3]], "kv_reuse_every_i_layer": -1}, [0, 1, 4]),
        ({"kv_reuse_group": None, "kv_reuse_every_i_layer": 2}, [0, 2, 4]),
        ({"mb_per_layer": 2, "num_hidden_layers": 8}, [1, 3, 5]),
    ],
    ids=["Kimi", "flash-linear-attention", "Mamba 2", "Zamba 2", "Ling", "MiniCPM-SALA", "hybrid", "types",
         "Hunyuan", "Hymba", "Hymba, a period", "Phi-4-mini-flash"],
)  # fmt: skip
def test_layers_with_attention(tmp_path: Path, changes: dict[str, Any], layers: list[int]) -> None:
    loaded = load_kv_scales(write_checkpoint(tmp_path, scales(dict.fromkeys(layers, 4)), fields(5) | changes))
    assert (list(loaded), loaded.problems) == (layers, [])


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"swa_num_key_value_heads": 2, "hybrid_layer_pattern": [0, 1, 0]}, [4, 2, 4]),
        ({"swa_num_key_value_heads": 2, "local_layer_ids": [0, 2]}, [2, 4, 2]),
        ({"swa_num_key_value_heads": 2,
          "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
         [4, 2, 4]),
        ({"swa_num_key_value_heads": 2, "sliding_window_pattern": 2}, [2, 4, 2]),
        ({"num_global_key_value_heads": 2,
          "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
         [2, 4, 4]),
        ({"per_layer_config": {"1": {"num_key_value_heads": 1, "head_dim": 32}}}, [4, 1, 4]),
        ({"num_key_value_heads": None, "num_attention_groups": 2,
          "layer_types": ["full_attention", "sliding_attention", "full_attention"],
          "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 16,
                                      "num_attention_groups": 8}}, [2, 8, 2]),
        ({"num_key_value_heads": None, "num_key_value_heads_per_layer": [1, 2, 4]}, [1, 2, 4]),
        ({"num_key_value_heads": None, "attn_config": {"kv_n_heads": 2}}, [2, 2, 2]),
    ],
    ids=["MiMo-V2", "Inkling", "types", "a pattern", "Gemma 4",
         "per_layer_config", "Step-3.5", "a list", "DBRX"],
)  # fmt: skip
def test_kv_heads_of_layers(tmp_path: Path, changes: dict[str, Any], counts: list[int]) -> None:
    given = fields(3, **changes)
    loaded = load_kv_scales(write_checkpoint(tmp_path / "a", scales(dict(enumerate(counts))), given))
    assert (heads(loaded), loaded.problems) == (dict(enumerate(counts)), [])
    # A known convention is authoritative: other numbers are wrong.
    write_checkpoint(tmp_path / "b", scales({0: counts[0], 1: 3, 2: counts[2]}), given)
    assert kinds(tmp_path / "b") == [("head-count", 1)] * 2


# Layers, from tensors


def test_layers_without_projections_to_keys_need_no_scales(tmp_path: Path) -> None:
    tensors = weights({1: {"k_proj": 64}}) | weights({0: {"in_proj": 8}, 2: {"in_proj": 8}}, "linear_attn")
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors | scales({1: 4}), fields(3)))
    assert (list(loaded), loaded.problems) == ([1], [])


def test_layers_of_another_build_than_those_with_scales_need_none(tmp_path: Path) -> None:
    linear = {"q_proj": 8, "k_proj": 8, "v_proj": 8, "f_a_proj": 8}
    tensors = weights({0: linear, 1: {"q_proj": 8, "kv_a_proj_with_mqa": 8}, 2: linear})
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors | scales({1: 4}), fields(3)))
    assert (list(loaded), loaded.problems) == ([1], [])


def test_layers_of_the_same_build_as_those_with_scales_do_need_them(tmp_path: Path) -> None:
    tensors = weights({n: {"q_proj": 128, "k_proj": 64, "v_proj": 64} for n in range(3)})
    write_checkpoint(tmp_path, tensors | scales({1: 4}), fields(3))
    assert kinds(tmp_path) == [("layer-missing", 0), ("layer-missing", 2)]


def test_layers_that_the_config_names_need_scales_whatever_their_build(tmp_path: Path) -> None:
    tensors = weights({0: {"k_proj": 64, "v_proj": 64}, 1: {"k_proj": 64}})  # Gemma 4: V is K
    types = ["sliding_attention", "full_attention"]
    write_checkpoint(tmp_path, tensors | scales({0: 4}), fields(2, layer_types=types))
    assert kinds(tmp_path) == [("layer-missing", 1)]


@pytest.mark.parametrize(
    "convention",
    [
        {"softmax_layers": [1, 3]}, {"mix": {"softmax": [2, 4]}}, {"kinds": ["a", "b", "a", "b"]},
        {"kinds": "MAMA"},
        {"mamba_layers": [0, 2]}, {"linear_attn_config": {"kda_layers": [1, 3]}},
        {"softmax_interval": 2}, {"is_softmax": [False, True, False, True]},
    ],
    ids=str,
)  # fmt: skip
def test_a_convention_that_is_not_known_explains_layers_without_scales(tmp_path: Path, convention: dict[str, Any]) -> None:
    loaded = load_kv_scales(write_checkpoint(tmp_path, scales({1: 4, 3: 4}), fields(4, **convention)))
    assert list(loaded) == [1, 3]
    assert [(p.kind, p.severity) for p in loaded.problems] == [("layers-inferred", "note")]


@pytest.mark.parametrize(
    "other",
    [{"mlp_layers": [1, 3]}, {"softmax_layers": [1, 2]}, {"kinds": "MAMM"}, {"softmax_interval": 3}],
    ids=str,
)
def test_other_fields_explain_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, scales({1: 4, 3: 4}), fields(4, **other))
    assert kinds(tmp_path) == [("layer-missing", 0), ("layer-missing", 2)]


@pytest.mark.parametrize("types", [["jet", "jet", "attn", "swa"], ["mlstm", "slstm", "full_attention", "hybrid"]], ids=str)
@pytest.mark.parametrize("kind", ["without weights", "with weights"])
def test_types_that_are_not_known_need_no_scales_if_all_others_have_some(tmp_path: Path, types: list[str], kind: str) -> None:
    """Linear attention may have projections to keys."""
    shapes = weights({n: {"q_proj": 128, "k_proj": 64} for n in range(4)}) if kind == "with weights" else {}
    given = fields(4, layer_types=types)
    loaded = load_kv_scales(write_checkpoint(tmp_path / "a", shapes | scales({2: 4, 3: 4}), given))
    assert list(loaded) == [2, 3]
    assert [(p.kind, p.severity, p.value) for p in loaded.problems] == [("layers-inferred", "note", "2")]
    write_checkpoint(tmp_path / "b", shapes | scales({2: 4}), given)  # 3 is of a known type
    assert kinds(tmp_path / "b") == [("layer-missing", 0), ("layer-missing", 1), ("layer-missing", 3)]


def test_a_layer_of_a_type_that_is_not_known_needs_scales_if_another_of_its_type_has_some(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scales({0: 4, 2: 4}), fields(3, layer_types=["a", "a", "full_attention"]))
    assert kinds(tmp_path) == [("layer-missing", 1)]


@pytest.mark.parametrize(
    "field",
    [
        {"attn_layer_indices": []},
        {"full_attention_interval": 4},
        {"layer_types": [None, None]},
        {"hybrid_override_pattern": "MM"},
    ],
    ids=str,
)
def test_a_field_that_selects_no_layer_says_nothing(tmp_path: Path, field: dict[str, Any]) -> None:
    loaded = load_kv_scales(write_checkpoint(tmp_path / "a", scales({0: 4, 1: 4}), fields(2, **field)))
    assert (list(loaded), loaded.problems) == ([0, 1], [])
    write_checkpoint(tmp_path / "b", scales({0: 4}), fields(2, **field))
    assert kinds(tmp_path / "b") == [("layer-missing", 1)]


def test_a_field_that_selects_other_layers_than_the_tensors_do(tmp_path: Path) -> None:
    """Counted from one, it selects 1 and 3."""
    field = {"attn_layer_indices": [2, 4]}
    tensors = weights({1: {"k_proj": 64}, 3: {"k_proj": 64}}) | weights({n: {"in_proj": 8} for n in (0, 2, 4)}, "linear_attn")
    loaded = load_kv_scales(write_checkpoint(tmp_path / "a", tensors | scales({1: 4, 3: 4}), fields(5, **field)))
    assert (list(loaded), loaded.problems) == ([1, 3], [])
    # Without weights, or with keys where the field says, the scales may be those of other layers.
    tensors = weights({2: {"k_proj": 64}, 4: {"k_proj": 64}})
    for n, others in enumerate(({}, tensors)):
        write_checkpoint(tmp_path / str(n), others | scales({1: 4, 3: 4}), fields(5, **field))
        assert ("layer-missing", None) in kinds(tmp_path / str(n))


def zamba(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Layers 1 and 3 share the weights of their attention, which are stored with layer 1."""
    name = "model.layers.1.shared_transformer.self_attn"
    tensors = {f"{name}.{x}_proj.weight": torch.ones(rows, 4) for x, rows in (("q", 128), ("k", 64), ("v", 64))}
    tensors |= {f"model.layers.{n}.mamba.in_proj.weight": torch.ones(2, 2) for n in range(4)}
    return tensors, fields(4, layers_block_type=["mamba", "hybrid"] * 2, **changes)


def test_layers_whose_weights_are_stored_with_another_need_scales(tmp_path: Path) -> None:
    tensors, given = zamba()
    loaded = load_kv_scales(write_checkpoint(tmp_path / "a", tensors | scales({1: 4, 3: 4}), given))
    assert (list(loaded), loaded.problems) == ([1, 3], [])
    write_checkpoint(tmp_path / "b", tensors | scales({1: 4}), given)
    assert kinds(tmp_path / "b") == [("layer-missing", 3)]


def test_layers_without_attention_need_none_if_the_config_tells_no_layers_apart(tmp_path: Path) -> None:
    """Their attention was removed after training."""
    tensors = weights({n: {"k_proj": 64} for n in (0, 2)}) | {"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)}
    given = fields(3, layer_types=["full_attention"] * 3)
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors | scales({0: 4, 2: 4}), given))
    assert (list(loaded), loaded.problems) == ([0, 2], [])


# Heads, from tensors


def test_shapes_of_projections_outweigh_the_config(tmp_path: Path) -> None:
    shapes = {0: {"q_proj": 128, "k_proj": 64}, 1: {"q_proj": 128, "k_proj": 32}}
    tensors = weights(shapes) | scales({0: 4, 1: 2})
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, fields(2)))
    assert (heads(loaded), loaded.problems) == ({0: 4, 1: 2}, [])


def test_shapes_of_projections_of_larger_heads(tmp_path: Path) -> None:
    """With the size of keys as that of queries: 1 head of 32, not 2 of 16."""
    shapes = {0: {"q_proj": 128, "k_proj": 64}, 1: {"q_proj": 256, "k_proj": 32}}
    given = fields(2, big_head_dim=32)
    loaded = load_kv_scales(write_checkpoint(tmp_path / "a", weights(shapes) | scales({0: 4, 1: 1}), given))
    assert heads(loaded) == {0: 4, 1: 1}
    write_checkpoint(tmp_path / "b", weights(shapes) | scales({0: 4, 1: 2}), given)
    assert kinds(tmp_path / "b") == [("head-count", 1)] * 2


@pytest.mark.parametrize("v", [None, {1: 2}], ids=["both", "one of them"])
def test_neither_the_config_nor_shapes_confirm_a_number(tmp_path: Path, v: dict[int, int] | None) -> None:
    shapes = {0: {"q_proj": 128, "k_proj": 64}, 1: {"q_proj": 128, "k_proj": 32}}
    write_checkpoint(tmp_path, weights(shapes) | scales({0: 4, 1: 8}, v), fields(2))
    assert kinds(tmp_path) == [("head-count", 1)] * 2


def test_a_field_of_an_unknown_convention_confirms_a_number(tmp_path: Path) -> None:
    given = fields(2, local_num_kv_heads=8)
    loaded = load_kv_scales(write_checkpoint(tmp_path / "a", scales({0: 4, 1: 8}), given))
    assert (heads(loaded), loaded.problems) == ({0: 4, 1: 8}, [])
    write_checkpoint(tmp_path / "b", scales({0: 4, 1: 8}, {1: 4}), given)
    assert kinds(tmp_path / "b") == [("head-count", 1)]


def test_scales_per_head_where_the_config_does_not_name_a_strategy(tmp_path: Path) -> None:
    modelopt = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
    write_checkpoint(tmp_path, scales({0: 4, 1: 4}), fields(2, quantization_config=modelopt))
    loaded = load_kv_scales(tmp_path)
    assert (loaded.scheme.strategy, heads(loaded), loaded.problems) == ("attn_head", {0: 4, 1: 4}, [])


# Saving


@pytest.mark.parametrize(
    "changes",
    [{"per_layer_config": {"1": {"num_key_value_heads": 2}}}, {}],
    ids=["by the config", "by the shapes of projections"],
)
def test_numbers_of_heads_by_layer_are_saved_and_loaded(tmp_path: Path, changes: dict[str, Any]) -> None:
    shapes = {0: {"q_proj": 128, "k_proj": 64}, 1: {"q_proj": 128, "k_proj": 32}}
    plain = {key: value for key, value in fields(2, **changes).items() if key != "quantization_config"}
    write_checkpoint(tmp_path / "model", weights(shapes), plain)
    layers = {n: LayerScales(q=None, k=torch.full((h,), 0.5), v=torch.full((h,), 2.0)) for n, h in ((0, 4), (1, 2))}
    KVScales(layers, KVCacheScheme("attn_head", observer="static_minmax")).save(tmp_path / "out", tmp_path / "model")
    loaded = load_kv_scales(tmp_path / "out")
    assert (heads(loaded), loaded.problems) == ({0: 4, 1: 2}, [])


def test_scales_of_layers_whose_weights_are_stored_with_another_are_saved(tmp_path: Path) -> None:
    tensors, given = zamba(quantization_config=None)
    write_checkpoint(tmp_path / "model", tensors, given)
    layers = {n: LayerScales(q=None, k=torch.full((4,), 2.0**-n), v=torch.ones(4)) for n in (1, 3)}
    KVScales(layers, KVCacheScheme("attn_head", observer="static_minmax")).save(tmp_path / "out", tmp_path / "model")
    stored = load_file(tmp_path / "out/model.safetensors")
    found = {name: x.flatten().tolist() for name, x in stored.items() if name.endswith("k_scale")}
    stem = "model.layers.{}.shared_transformer.self_attn.k_scale"
    assert found == {stem.format(1): [0.5] * 4, stem.format(3): [0.125] * 4}
    loaded = load_kv_scales(tmp_path / "out")
    assert (heads(loaded), loaded.problems) == ({1: 4, 3: 4}, [])
    loaded.save(tmp_path / "again", tmp_path / "out")
    assert heads(load_kv_scales(tmp_path / "again")) == {1: 4, 3: 4}
    del layers[3]
    with pytest.raises(ValueError, match=r"must have all 2 attention layers of .* got none for layer 3"):
        KVScales(layers, KVCacheScheme("attn_head")).save(tmp_path / "out", tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "layers"),
    [({"layer_types": ["jet", "attn", "jet"]}, [1]), ({"attn_layer_indices": []}, [0, 1, 2])],
    ids=["unknown types", "a field that selects no layer"],
)
def test_layers_are_saved_by_the_rules_of_loading(tmp_path: Path, field: dict[str, Any], layers: list[int]) -> None:
    given = fields(3, quantization_config=None, **field)
    write_checkpoint(tmp_path / "model", weights({n: {"q_proj": 128, "k_proj": 64} for n in range(3)}), given)
    layer = LayerScales(q=None, k=torch.ones(4), v=torch.ones(4))
    found = KVScales(dict.fromkeys(layers, layer), KVCacheScheme("attn_head", observer="static_minmax"))
    found.save(tmp_path / "out", tmp_path / "model")
    assert heads(load_kv_scales(tmp_path / "out")) == dict.fromkeys(layers, 4)


@pytest.mark.parametrize("size", [1, 24])
def test_scales_of_latent_attention_are_those_of_one_head(tmp_path: Path, size: int) -> None:
    """Of its row of 16 + 8 channels; layer 1 is of another kind, with 4 KV heads."""
    shapes = {0: {"q_proj": 192, "kv_a_proj_with_mqa": 24}, 1: {"q_proj": 128, "k_proj": 64}}
    given = fields(2, kv_lora_rank=16, qk_rope_head_dim=8, quantization_config=None)
    write_checkpoint(tmp_path / "model", weights(shapes), given)
    strategy = "attn_head" if size == 1 else "channel"
    sizes = {0: (1,), 1: (4,)} if size == 1 else {0: (1, 24), 1: (4, 16)}
    layers = {n: LayerScales(q=None, k=torch.full(shape, 0.5), v=torch.full(shape, 0.5)) for n, shape in sizes.items()}
    KVScales(layers, KVCacheScheme(strategy, observer="static_minmax")).save(tmp_path / "out", tmp_path / "model")
    loaded = load_kv_scales(tmp_path / "out")
    assert loaded.problems == []
    assert {n: tuple(layer.k.shape) for n, layer in loaded.items() if layer.k is not None} == sizes
    assert all(torch.equal(layer.k, layers[n].k) for n, layer in loaded.items() if layer.k is not None)


def test_the_share_of_a_rank_is_not_taken_for_other_heads(tmp_path: Path) -> None:
    shapes = {n: {"q_proj": 128, "k_proj": 64} for n in range(2)}
    plain = {key: value for key, value in fields(2).items() if key != "quantization_config"}
    write_checkpoint(tmp_path / "model", weights(shapes), plain | {"big_head_dim": 32})
    layers = {n: LayerScales(q=None, k=torch.ones(2), v=torch.ones(2)) for n in range(2)}
    with pytest.raises(ValueError, match=r"each of the 4 KV heads of .* got 2 \(of one tensor-parallel rank\?\)"):
        KVScales(layers, KVCacheScheme("attn_head")).save(tmp_path / "out", tmp_path / "model")


def test_scales_of_cross_attention_layers_are_replaced(tmp_path: Path) -> None:
    stem = "language_model.model.layers"
    modules = [f"{stem}.0.self_attn", f"{stem}.1.cross_attn"]
    old = {f"{module}.{x}_scale": torch.tensor([9.0]) for module in modules for x in "kv"}
    keys = {f"{module}.k_proj.weight": torch.ones(2, 2) for module in modules}
    text = {"num_hidden_layers": 2, "cross_attention_layers": [1]}
    write_checkpoint(tmp_path, old | keys, {"text_config": text})
    layer = LayerScales(q=None, k=torch.ones(1), v=torch.ones(1))
    KVScales({0: layer, 1: layer}, KVCacheScheme("tensor", observer="mse")).save(tmp_path)
    loaded = load_kv_scales(tmp_path)
    assert [layer.k.item() for layer in loaded.values() if layer.k is not None] == [1.0, 1.0]


def test_a_layer_number_beyond_all_models_is_no_layer(tmp_path: Path) -> None:
    far = {f"model.layers.{'9' * 30}.self_attn.k_scale": torch.ones(1)}
    write_checkpoint(tmp_path, scales({0: 4, 1: 4}) | far, fields(2))
    assert kinds(tmp_path) == [("unused-scale", None)]


def test_a_config_with_too_many_layers_counts_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scales({0: 4, 1: 4}), fields(10**9, kv_cache_scheme=scheme()))
    assert kinds(tmp_path) == []


def test_an_error_names_the_layer_of_a_hybrid_model(tmp_path: Path) -> None:
    given = fields(4, linear_attn_config={"full_attn_layers": [2, 4]})
    write_checkpoint(tmp_path, scales({1: 4}), given)
    with pytest.raises(CheckpointError, match="Layer 3: There are no scales of K and V"):
        load_kv_scales(tmp_path)
