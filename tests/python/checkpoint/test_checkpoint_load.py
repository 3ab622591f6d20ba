"""load_kv_scales: which scales of which heads come out of checkpoints of every form, and what is read."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint_files import (
    ATTENTION,
    SIZES,
    config,
    make_checkpoint,
    scales,
    scheme,
    write_checkpoint,
)
from fp8kv import CheckpointError, KVCacheScheme, KVScales, LayerScales, Problem, load_kv_scales
from fp8kv.checkpoint import reduce_query_scale
from helpers import each_strategy

K, V, Q = (f"{ATTENTION.format(layer=1)}.{letter}_scale" for letter in "kvq")


def flat(tensors: dict[str, Tensor], layer: int, letter: str) -> Tensor:
    return tensors[f"{ATTENTION.format(layer=layer)}.{letter}_scale"].float().flatten()


def groups_of_query(tensors: dict[str, Tensor], layer: int) -> Tensor:
    """Heads 2g and 2g + 1 share KV head g."""
    q = flat(tensors, layer, "q").tolist()
    return torch.tensor([max(q[i : i + 2]) for i in range(0, len(q), 2)])


def same(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return actual.dtype == torch.float32 and torch.equal(actual, expected)


# Forms


@each_strategy
@pytest.mark.parametrize("query", [False, True], ids=["kv", "qkv"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_forms_of_llm_compressor(tmp_path: Path, strategy: str, query: bool, shards: int) -> None:
    make_checkpoint(tmp_path, strategy, query=query, shards=shards)
    tensors = scales(strategy, query=query)
    loaded = load_kv_scales(tmp_path)
    assert list(loaded) == [0, 1, 2]
    assert loaded.scheme == KVCacheScheme(strategy, query, "static_minmax")  # type: ignore[arg-type]
    assert loaded.problems == []
    for layer, found in loaded.items():
        assert same(found.k, flat(tensors, layer, "k"))
        assert same(found.v, flat(tensors, layer, "v"))
        expected = None if not query else flat(tensors, layer, "q")
        if query and strategy == "attn_head":
            expected = groups_of_query(tensors, layer)
        assert same(found.q, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = scales(dtype=dtype)
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, config()))
    assert same(loaded[1].k, flat(tensors, 1, "k"))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_shapes_per_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {name: x.reshape(shape) for name, x in scales("tensor").items()}
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, config("tensor")))
    assert same(loaded[2].v, flat(tensors, 2, "v"))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4, 1), (4, 1, 1)], ids=str)
def test_shapes_per_head(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {name: x.reshape(shape) for name, x in scales().items()}
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, config()))
    assert same(loaded[2].v, flat(tensors, 2, "v"))


def renamed(tensors: dict[str, Tensor], k: str, v: str) -> dict[str, Tensor]:
    return {name.replace(".k_scale", f".{k}").replace(".v_scale", f".{v}"): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("prefix", "k", "v"),
    [
        ("model.", "k_proj.k_scale", "v_proj.v_scale"),
        ("model.", "qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("model.", "qkqkv_proj.k_scale", "qkqkv_proj.v_scale"),
        ("model.", "k_cache.scale", "v_cache.scale"),
        ("language_model.model.", "k_proj.output_scale", "v_proj.output_scale"),
        ("", "attn.k_scale", "attn.v_scale"),
    ],
)
def test_foreign_names(tmp_path: Path, prefix: str, k: str, v: str) -> None:
    tensors = scales("tensor")
    foreign = {name.replace("model.", prefix, 1): x for name, x in renamed(tensors, k, v).items()}
    loaded = load_kv_scales(write_checkpoint(tmp_path, foreign, config("tensor")))
    for layer in range(3):
        assert same(loaded[layer].k, flat(tensors, layer, "k"))
        assert same(loaded[layer].v, flat(tensors, layer, "v"))


def test_wrapped_modules_are_those_that_they_wrap(tmp_path: Path) -> None:
    """A layer that has other tensors, but no attention, is still known as such."""
    stem = "_orig_mod.model.layers.{}._fsdp_wrapped_module._checkpoint_wrapped_module."
    tensors = {f"{stem.format(1)}mlp.weight": torch.ones(1)}
    for layer in (0, 2):
        module = f"{stem.format(layer)}self_attn._fsdp_wrapped_module."
        tensors[f"{module}k_proj.weight"] = torch.ones(4, 4)
        tensors |= {f"{module}{x}_proj.{x}_scale": torch.tensor(0.25) for x in "kv"}
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, config("tensor")))
    assert (list(loaded), loaded.problems) == ([0, 2], [])


def test_one_scale_for_keys_and_values(tmp_path: Path) -> None:
    tensors = {f"{ATTENTION.format(layer=n)}.kv_scale": torch.tensor([0.25 + n]) for n in range(3)}
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, config("tensor")))
    for n in range(3):
        assert same(loaded[n].k, torch.tensor([0.25 + n]))
        assert same(loaded[n].v, torch.tensor([0.25 + n]))


@pytest.mark.parametrize(
    ("quantization", "q"),
    [
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "q_proj.q_scale"),
        ({"quant_method": "fp8", "kv_cache_scheme": "static"}, "q.scale"),
    ],
    ids=["modelopt", "autofp8"],
)
def test_query_scales_of_producers_whose_configs_do_not_mention_them(
    tmp_path: Path, quantization: dict[str, Any], q: str
) -> None:
    tensors = scales("tensor", query=True)
    foreign = {name.replace("q_scale", q): x for name, x in tensors.items()}
    loaded = load_kv_scales(write_checkpoint(tmp_path, foreign, SIZES | {"quantization_config": quantization}))
    assert loaded.scheme.quantizes_query
    assert same(loaded[1].q, flat(tensors, 1, "q"))


def test_a_scheme_in_the_file_of_modelopt(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scales("tensor"), dict(SIZES))
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(modelopt))
    assert load_kv_scales(tmp_path).scheme.producer == "modelopt"


def test_a_file_beside_its_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    assert same(load_kv_scales(str(tmp_path / "model.safetensors"))[0].k, flat(scales(), 0, "k"))


def test_shards_without_an_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert same(load_kv_scales(tmp_path)[2].v, flat(scales(), 2, "v"))


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / "adapter.safetensors").write_bytes(b"something else")
    assert same(load_kv_scales(tmp_path)[2].v, flat(scales(), 2, "v"))


def test_a_consolidated_copy_of_the_weights_is_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"something else")
    assert load_kv_scales(tmp_path).problems == []


def test_no_query_scales_on_request(tmp_path: Path) -> None:
    tensors = scales(query=True)
    tensors[Q] = torch.full((8, 1, 1), float("nan"))
    tensors[Q.replace("scale", "zero_point")] = torch.ones(8)
    loaded = load_kv_scales(write_checkpoint(tmp_path, tensors, config(query=True)), query=False)
    assert [layer.q for layer in loaded.values()] == [None] * 3
    assert not loaded.scheme.quantizes_query
    assert loaded.problems == []
    assert same(loaded[1].k, flat(tensors, 1, "k"))


@each_strategy
def test_fnuz_doubles_every_scale(tmp_path: Path, strategy: str) -> None:
    make_checkpoint(tmp_path, strategy, query=True)
    plain, doubled = load_kv_scales(tmp_path), load_kv_scales(tmp_path, fnuz=True)
    for layer in range(3):
        for letter in "qkv":
            once, twice = getattr(plain[layer], letter), getattr(doubled[layer], letter)
            assert twice.tolist() == [2 * x for x in once.tolist()]


def test_the_device(tmp_path: Path, device: torch.device) -> None:
    loaded = load_kv_scales(make_checkpoint(tmp_path, query=True), device=device)
    assert {x.device.type for layer in loaded.values() for x in (layer.q, layer.k, layer.v) if x is not None} == {device.type}


# Heads


def sized(**changes: Any) -> dict[str, Any]:
    """A config with other sizes; None removes one."""
    merged = config() | changes
    return {key: value for key, value in merged.items() if value is not None}


def kv(counts: dict[int, int], stem: str = ATTENTION) -> dict[str, Tensor]:
    """Scales of K and V per head: as many as given for each layer."""
    return {
        f"{stem.format(layer=layer)}.{letter}_scale": torch.linspace(0.02, 0.04, count).reshape(count, 1, 1)
        for layer, count in counts.items()
        for letter in "kv"
    }


def blocks(*attention: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [{"attention": given, "ffn": {}} for given in attention]


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, {0: 4, 1: 4, 2: 4}),
        ({"num_key_value_heads": None}, {0: 8, 1: 8, 2: 8}),
        ({"num_key_value_heads": 1}, {0: 1, 1: 1, 2: 1}),
        ({"num_key_value_heads": [4, 2, 1]}, {0: 4, 1: 2, 2: 1}),
        ({"multi_query": True, "num_kv_heads": 8, "num_key_value_heads": None}, {0: 1, 1: 1, 2: 1}),
        (
            {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2,
             "num_key_value_heads": None},
            {0: 2, 1: 2, 2: 2},
        ),
        (
            {"multi_query_attention": True, "multi_query_group_num": 2, "num_key_value_heads": None},
            {0: 2, 1: 2, 2: 2},
        ),
        (
            {"multi_query_attention": False, "multi_query_group_num": 2, "num_key_value_heads": None},
            {0: 8, 1: 8, 2: 8},
        ),
        (
            {"block_configs": blocks({"n_heads_in_group": 2}, {"no_op": True}, {"n_heads_in_group": 8}),
             "num_key_value_heads": None},
            {0: 4, 2: 1},
        ),
        (
            {"block_configs": blocks({"num_key_value_heads": 2}, {"replace_with_linear": True}, None)},
            {0: 2, 2: 4},
        ),
        ({"layer_types": ["linear_attention", "full_attention", "sliding_attention"]}, {1: 4, 2: 4}),
        ({"layers_block_type": ["mamba", "attention", "mlp"]}, {1: 4}),
        ({"hybrid_override_pattern": "M*-", "num_hidden_layers": None}, {1: 4}),
        ({"attn_layer_indices": [2]}, {2: 4}),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, {1: 4}),
        ({"full_attention_interval": 3}, {2: 4}),
        ({"attn_type_list": [0, 1, 0]}, {1: 4}),
        ({"block_types": ["recurrent", "attention"]}, {1: 4}),
        ({"num_kv_shared_layers": 1}, {0: 4, 1: 4}),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"],
             "attention_k_eq_v": True, "num_global_key_value_heads": 2},
            {0: 2, 1: 4, 2: 2},
        ),
        ({"kv_lora_rank": 512}, {0: 1, 1: 1, 2: 1}),
        (
            {"num_hidden_layers": None, "num_attention_heads": None, "num_key_value_heads": None},
            {0: 3, 1: 5, 2: 7},
        ),
        (
            {"num_hidden_layers": None, "num_attention_heads": None, "num_key_value_heads": None,
             "n_layer": 2, "n_head": 6},
            {0: 6, 1: 6},
        ),
        (
            {"num_hidden_layers": None, "num_attention_heads": None, "num_key_value_heads": None,
             "text_config": {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3}},
            {0: 3, 1: 3},
        ),
    ],
    ids=["GQA", "MHA", "MQA", "a list", "Falcon 7B", "Falcon 40B", "ChatGLM", "ChatGLM with all heads",
         "DeciLM", "DeciLM 2", "layer_types", "layers_block_type", "NemotronH", "Bamba", "Jamba",
         "Qwen3-Next", "MiniMax", "RecurrentGemma", "shared layers", "Gemma 4", "latent", "unknown", "GPT",
         "text_config"],
)  # fmt: skip
def test_heads_of_models(tmp_path: Path, changes: dict[str, Any], counts: dict[int, int]) -> None:
    loaded = load_kv_scales(write_checkpoint(tmp_path, kv(counts), sized(**changes)))
    assert loaded.problems == []
    found = {n: (scales.k.numel(), scales.v.numel()) for n, scales in loaded.items() if scales.k is not None
             and scales.v is not None}  # fmt: skip
    assert found == {n: (count, count) for n, count in counts.items()}


# Tensor parallelism


@pytest.mark.parametrize(
    ("tp_size", "heads"),
    [
        (1, [[0, 1, 2, 3]]),
        (2, [[0, 1], [2, 3]]),
        (4, [[0], [1], [2], [3]]),
        (8, [[0], [0], [1], [1], [2], [2], [3], [3]]),
    ],
    ids=str,
)
def test_heads_of_a_rank(tmp_path: Path, tp_size: int, heads: list[list[int]]) -> None:
    make_checkpoint(tmp_path, query=True)
    tensors = scales(query=True)
    for rank, owned in enumerate(heads):
        found = load_kv_scales(tmp_path, tp_rank=rank, tp_size=tp_size)[2]
        assert same(found.k, flat(tensors, 2, "k")[owned])
        assert same(found.v, flat(tensors, 2, "v")[owned])
        assert same(found.q, groups_of_query(tensors, 2)[owned])


@pytest.mark.parametrize(("rank", "size"), [(0, 3), (2, 3), (6, 7)])
def test_scales_per_tensor_are_those_of_every_rank(tmp_path: Path, rank: int, size: int) -> None:
    make_checkpoint(tmp_path, "tensor", query=True)
    found = load_kv_scales(tmp_path, tp_rank=rank, tp_size=size)[0]
    for letter in "qkv":
        assert same(getattr(found, letter), flat(scales("tensor", query=True), 0, letter))


@pytest.mark.parametrize("size", [3, 6, 7])
def test_a_size_that_does_not_fit(tmp_path: Path, size: int) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError) as error:
        load_kv_scales(tmp_path, tp_size=size)
    assert str(error.value) == (
        f"load_kv_scales: layer 0: tp_size must divide the 4 KV heads or be a multiple of their number, got {size}"
    )


@pytest.mark.parametrize(("rank", "size"), [(-1, 1), (1, 1), (4, 4), (0, 0), (0, -2)])
def test_a_rank_that_is_none(tmp_path: Path, rank: int, size: int) -> None:
    with pytest.raises(ValueError) as error:
        load_kv_scales(tmp_path, tp_rank=rank, tp_size=size)
    assert str(error.value) == (f"load_kv_scales: tp_rank must be from 0 to tp_size - 1, got {rank} with tp_size={size}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tp_rank": "0"}, "tp_rank must be an int, got str"),
        ({"tp_rank": None}, "tp_rank must be an int, got NoneType"),
        ({"tp_size": 1.0}, "tp_size must be an int, got float"),
        ({"model": ["talker"]}, "model must be None or a str, got list"),
    ],
    ids=str,
)
def test_arguments_of_another_type(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError) as error:
        load_kv_scales(tmp_path, **arguments)
    assert str(error.value) == f"load_kv_scales: {sentence}"


def test_a_rank_of_another_type_has_no_shard() -> None:
    layer = LayerScales(None, torch.ones(2), torch.ones(2))
    for rank, size, sentence in (("0", 2, "tp_rank must be an int, got str"), (0, 2.0, "tp_size must be an int, got float")):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            layer.shard(rank, size)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """KV heads of each layer, query heads of each layer, and a number of ranks that fits all layers."""
    size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    fitting = [count for count in range(1, 25) if count % size == 0 or size % count == 0]
    kv_heads = draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=4))
    query_heads = [count * draw(st.integers(1, 5)) for count in kv_heads]
    return kv_heads, query_heads, size


@given(model=models(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_slices_of_all_ranks_together_are_the_scales(
    tmp_path_factory: pytest.TempPathFactory, model: tuple[list[int], list[int], int], seed: int
) -> None:
    kv_heads, query_heads, size = model
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer, (of_kv, of_query) in enumerate(zip(kv_heads, query_heads, strict=True)):
        for letter, count in (("k", of_kv), ("v", of_kv), ("q", of_query)):
            name = f"{ATTENTION.format(layer=layer)}.{letter}_scale"
            tensors[name] = 0.02 + 0.06 * torch.rand(count, 1, 1, generator=generator)
    given_config = config(query=True) | {
        "num_hidden_layers": len(kv_heads),
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
    }
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), tensors, given_config)
    ranks = [load_kv_scales(folder, tp_rank=rank, tp_size=size) for rank in range(size)]
    for layer, (of_kv, of_query) in enumerate(zip(kv_heads, query_heads, strict=True)):
        group = of_query // of_kv
        q = flat(tensors, layer, "q").tolist()
        whole = {
            "k": flat(tensors, layer, "k").tolist(),
            "v": flat(tensors, layer, "v").tolist(),
            "q": [max(q[g * group : (g + 1) * group]) for g in range(of_kv)],
        }
        copies = max(1, size // of_kv)  # of each head, on neighboring ranks
        for letter, expected in whole.items():
            parts = [getattr(scales[layer], letter).tolist() for scales in ranks]
            assert [x for part in parts[::copies] for x in part] == expected
            assert all(parts[rank] == parts[rank - rank % copies] for rank in range(size))


# What is read


def huge_checkpoint(folder: Path, gigabytes: int) -> Path:
    """One whose weight is a hole in the file, between scales."""
    size = gigabytes << 30
    by_name = scales(dtype=torch.float32)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in by_name.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
        if name == K:
            header["w"] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in by_name.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config()))
    return folder


@pytest.mark.parametrize("gigabytes", [5, 140, 4000])
def test_nothing_but_headers_and_scales_is_read(tmp_path: Path, gigabytes: int) -> None:
    try:
        huge_checkpoint(tmp_path, gigabytes)
    except OSError as error:
        pytest.skip(f"the file system has no files of this size: {error}")
    load_kv_scales(tmp_path)  # whatever is imported by the first call is
    seconds, read = time.perf_counter(), bytes_read()
    loaded = load_kv_scales(tmp_path)
    assert time.perf_counter() - seconds < 1
    assert bytes_read() - read < 1_000_000
    assert same(loaded[2].v, flat(scales(dtype=torch.float32), 2, "v"))


def bytes_read() -> int:
    """By this process, from the page cache too; 0 where the system does not count them."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split()[1]) if counts.exists() else 0


# Problems


def broken(folder: Path, changes: dict[str, Tensor | None], **kwargs: Any) -> Path:
    tensors = scales(**kwargs) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return write_checkpoint(folder, kept, config(query=kwargs.get("query", False)))


NAN = torch.full((4, 1, 1), float("nan"))


def test_an_error_names_layer_tensor_value_and_remedy(tmp_path: Path) -> None:
    broken(tmp_path, {K: NAN})
    with pytest.raises(CheckpointError) as error:
        load_kv_scales(tmp_path)
    assert str(error.value) == (
        f"load_kv_scales: {tmp_path} has 1 problem: Layer 1: {K} must be finite, got nan for head 0 "
        "(4 of 4 heads). Calibrate the model again, for example with fp8kv calibrate."
    )
    assert [(p.kind, p.layer, p.tensor, p.value) for p in error.value.problems] == [("not-finite", 1, K, "nan")]


def test_many_errors_are_listed_up_to_a_handful(tmp_path: Path) -> None:
    names = [f"{ATTENTION.format(layer=layer)}.{letter}_scale" for layer in range(12) for letter in "kv"]
    write_checkpoint(tmp_path, {name: torch.zeros(4, 1, 1) for name in names}, config() | {"num_hidden_layers": 12})
    with pytest.raises(CheckpointError) as error:
        load_kv_scales(tmp_path)
    first, *others, last = str(error.value).split("\n")
    assert first.startswith(f"load_kv_scales: {tmp_path} has 24 problems: Layer 0: ")
    assert [line[:9] for line in others] == ["Layer 0: ", "Layer 1: ", "Layer 1: ", "Layer 2: "]
    assert last == "And 19 more; fp8kv.audit_checkpoint lists all."
    assert len(error.value.problems) == 24


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_raises_the_same_error(tmp_path: Path, rank: int) -> None:
    only_last_head = torch.tensor([0.05, 0.05, 0.05, -1.0]).reshape(4, 1, 1)
    broken(tmp_path, {V: only_last_head})
    with pytest.raises(CheckpointError, match=r"v_scale must be above 0, got -1 for head 3 \(1 of 4 heads\)"):
        load_kv_scales(tmp_path, tp_rank=rank, tp_size=2)


def test_with_warnings_bad_scales_are_none(tmp_path: Path) -> None:
    broken(tmp_path, {K: NAN})
    with pytest.warns(UserWarning, match=rf"^load_kv_scales: Layer 1: {K} must be finite, got nan") as caught:
        loaded = load_kv_scales(tmp_path, on_problem="warn")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert loaded[1].k is None
    assert same(loaded[1].v, flat(scales(), 1, "v"))
    assert [problem.kind for problem in loaded.problems] == ["not-finite"]


def test_with_warnings_a_bad_query_scale_is_none(tmp_path: Path) -> None:
    broken(tmp_path, {Q: -torch.ones(8)}, query=True)
    with pytest.warns(UserWarning, match="q_scale must be finite, above 0"):
        loaded = load_kv_scales(tmp_path, on_problem="warn")
    assert loaded[1].q is None
    assert same(loaded[0].q, groups_of_query(scales(query=True), 0))


def test_with_warnings_a_layer_without_usable_scales_is_missing(tmp_path: Path) -> None:
    broken(tmp_path, {K: NAN, V: NAN.clone()})
    with pytest.warns(UserWarning, match="must be finite"):
        loaded = load_kv_scales(tmp_path, on_problem="warn")
    assert list(loaded) == [0, 2]


def test_with_warnings_an_absent_layer_is_missing(tmp_path: Path) -> None:
    broken(tmp_path, {K: None, V: None})
    with pytest.warns(UserWarning, match="Layer 1: There are no scales of K and V"):
        loaded = load_kv_scales(tmp_path, on_problem="warn")
    assert list(loaded) == [0, 2]


def test_with_warnings_an_absent_scale_is_none(tmp_path: Path) -> None:
    broken(tmp_path, {V: None}, query=True)
    with pytest.warns(UserWarning, match=f"{V} must be there, as {K} is"):
        loaded = load_kv_scales(tmp_path, on_problem="warn", tp_rank=1, tp_size=2)
    assert loaded[1].v is None
    assert same(loaded[1].k, flat(scales(query=True), 1, "k")[2:])
    assert same(loaded[1].q, groups_of_query(scales(query=True), 1)[2:])


def test_warnings_of_one_kind_are_put_together(tmp_path: Path) -> None:
    broken(tmp_path, {name: NAN.clone() for name in scales()})
    with pytest.warns(UserWarning, match="not-finite") as caught:
        load_kv_scales(tmp_path, on_problem="warn")
    assert len(caught) == 1
    assert str(caught[0].message).startswith("load_kv_scales: 6 findings of kind not-finite, the first of them: ")


def test_without_a_scheme_warnings_take_that_of_the_tensors(tmp_path: Path) -> None:
    for strategy in ("tensor", "attn_head"):
        write_checkpoint(tmp_path / strategy, scales(strategy), dict(SIZES))
        with pytest.warns(UserWarning, match="must have a kv_cache_scheme"):
            loaded = load_kv_scales(tmp_path / strategy, on_problem="warn")
        assert loaded.scheme.strategy == strategy
        assert same(loaded[1].k, flat(scales(strategy), 1, "k"))


@pytest.mark.parametrize("on_problem", ["raise", "warn"])
def test_an_unsupported_scheme_is_always_an_error(tmp_path: Path, on_problem: str) -> None:
    write_checkpoint(tmp_path, scales(), config(kv_cache_scheme=scheme(num_bits=4)))
    with pytest.raises(CheckpointError, match=r"kv_cache_scheme\.num_bits must be 8, got 4"):
        load_kv_scales(tmp_path, on_problem=on_problem)


@pytest.mark.parametrize("on_problem", ["raise", "warn"])
def test_a_missing_config_is_always_an_error(tmp_path: Path, on_problem: str) -> None:
    write_checkpoint(tmp_path, scales())
    with pytest.raises(CheckpointError, match=r"config\.json must be a file, but does not exist"):
        load_kv_scales(tmp_path, on_problem=on_problem)


def test_what_is_below_an_error_is_silent_but_listed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scales(), config(kv_cache_scheme=scheme(observer=None)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_kv_scales(tmp_path)
    assert [(problem.kind, problem.severity) for problem in loaded.problems] == [("observer", "warning")]


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_kv_scales(tmp_path / "nowhere")
    assert str(error.value) == (
        f"load_kv_scales: checkpoint must be a directory or a .safetensors file, but {tmp_path / 'nowhere'} does not exist"
    )


def test_another_on_problem(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_kv_scales(tmp_path, on_problem="ignore")
    assert str(error.value) == 'load_kv_scales: on_problem must be "raise" or "warn", got \'ignore\''


# The classes by themselves


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"v": torch.ones(2, dtype=torch.bfloat16)},
         "v must be float32 of one or two dimensions, got bfloat16 of shape [2]"),
        ({"k": 1.0}, "k must be None or a tensor, got float"),
        ({"v_offset": [1.0]}, "v_offset must be None or a tensor, got list"),
        ({"v": torch.ones(2, 1, 1)},
         "v must be float32 of one or two dimensions, got float32 of shape [2, 1, 1]"),
        ({"k": torch.tensor(1.0)}, "k must be float32 of one or two dimensions, got float32 of shape []"),
        ({"q": torch.ones(2, 1)}, "q must be float32 of one dimension, got float32 of shape [2, 1]"),
        ({"v_offset": torch.ones(2)}, "v_offset must be float32 of two dimensions, got float32 of shape [2]"),
        ({"k_offset": torch.ones(3, 8)}, "k_offset must be for the heads of k, got shapes [3, 8] and [2]"),
        ({"v": torch.ones(2, 4), "v_offset": torch.ones(2, 8)},
         "v_offset must be for the heads of v, got shapes [2, 8] and [2, 4]"),
        ({"dtype": "fp4"}, 'dtype must be "fp8", "fp8_e4m3", "fp8_e5m2" or "int8", got \'fp4\''),
    ],
    ids=["dtype", "number", "list", "three dimensions", "no dimension", "query", "offset", "heads", "channels", "format"],
)  # fmt: skip
def test_scales_of_a_layer_that_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        LayerScales(**{"q": None, "k": torch.ones(2), "v": torch.ones(2)} | changes)
    assert str(error.value) == f"LayerScales: {sentence}"


def test_scales_of_a_model_that_are_refused() -> None:
    for layers, kind, sentence in (
        ([], KVCacheScheme("tensor"), "layers must be a mapping from numbers to LayerScales, got list"),
        ({}, "tensor", "scheme must be a KVCacheScheme, got str"),
    ):
        with pytest.raises(ValueError, match=f"^KVScales: {sentence}$"):
            KVScales(layers, kind)


def test_query_heads_that_are_no_multiple_of_the_kv_heads() -> None:
    with pytest.raises(ValueError) as error:
        reduce_query_scale(torch.ones(7), num_kv_heads=2)
    assert str(error.value) == "query scales must be a multiple of the 2 KV heads, got 7"


# The summary


def test_summary(tmp_path: Path) -> None:
    problems = [Problem("a", "warning", "", ""), Problem("b", "note", "", ""), Problem("c", "note", "", "")]
    layers = {
        0: LayerScales(q=None, k=torch.tensor([0.5, 0.25]), v=torch.tensor([2.0])),
        3: LayerScales(q=torch.tensor([8.0]), k=torch.tensor([0.125]), v=None),
    }
    assert KVScales(layers, KVCacheScheme("attn_head", True, "mse"), problems).summary().split("\n") == [
        "strategy attn_head, observer mse, by compressed-tensors",
        "2 layers, 1 or 2 KV heads",
        "q: 8 to 8, median 8",
        "k: 0.125 to 0.5, median 0.25",
        "v: 2 to 2, median 2",
        "1 warning, 2 notes",
    ]


def test_summary_of_nothing() -> None:
    assert KVScales({}, KVCacheScheme("tensor")).summary().split("\n") == [
        "strategy tensor, observer unknown, by compressed-tensors",
        "0 layers",
        "no problems",
    ]
