"""Checkpoints other than a folder: a JSON file of scales, a file in a folder, an id on the Hub."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoint_files import SIZES, make_checkpoint, scales, write_checkpoint
from fp8kv import CheckpointError, KVScales, audit_checkpoint, load_kv_scales

K, V = [0.25, 0.5, 0.75], [1.0, 2.0, 4.0]


def write(folder: Path, content: Any, config: dict[str, Any] | None = None) -> Path:
    """A file of scales next to the config of a model with 3 layers and 4 KV heads."""
    (folder / "config.json").write_text(json.dumps(SIZES if config is None else config))
    file = folder / "kv_cache_scales.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def of_ranks(*ranks: dict[str, Any], **fields: Any) -> dict[str, Any]:
    by_rank = {str(n): layers for n, layers in enumerate(ranks)}
    return {"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": by_rank} | fields}


def numbers(loaded: KVScales) -> list[tuple[list[float], list[float]]]:
    return [(layer.k.tolist(), layer.v.tolist()) for layer in loaded.values() if layer.k is not None and layer.v is not None]


PAIRS = [([k], [v]) for k, v in zip(K, V, strict=True)]
NAMED = {f"model.layers.{n}.self_attn.{x}_scale": y[n] for n in range(3) for x, y in (("k", K), ("v", V))}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (of_ranks({str(n): k for n, k in enumerate(K)}), [([k], [k]) for k in K]),
        (of_ranks({str(n): [K[n], V[n]] for n in range(3)}), PAIRS),
        (of_ranks({str(n): {"k_scale": K[n], "v_scale": V[n]} for n in range(3)}), PAIRS),
        (of_ranks(*[{str(n): k for n, k in enumerate(K)}] * 3), [([k], [k]) for k in K]),
        ({"scales": {"k_scales": K, "v_scales": V}}, PAIRS),
        ({"scales": {"k_scales": K[::-1], "v_scales": V[::-1]}, "layer_ids": [2, 1, 0], "qmax": 448.0},
         PAIRS),
        ({"scales": {"k_scales": K, "v_scales": V}, "layer_ids": None, "qmax": None}, PAIRS),
        (NAMED, PAIRS),
        ({name: [x] for name, x in NAMED.items()}, PAIRS),
        ({f"model.layers.{n}.self_attn": {"k_scale": K[n], "v_scale": V[n]} for n in range(3)}, PAIRS),
        ({str(n): {"k_scale": K[n], "v_scale": V[n]} for n in range(3)}, PAIRS),
    ],
    ids=["vLLM", "two numbers", "two names", "equal ranks", "onnxruntime-genai", "layer_ids", "null", "names",
         "lists",
         "modules", "layers"],
)  # fmt: skip
def test_forms(tmp_path: Path, content: Any, expected: list[tuple[list[float], list[float]]]) -> None:
    loaded = load_kv_scales(write(tmp_path, content))
    assert numbers(loaded) == expected
    assert (loaded.scheme.strategy, loaded.problems) == ("tensor", [])


def test_scales_of_ranks_are_those_of_their_heads(tmp_path: Path) -> None:
    ranks = [{"0": 0.5, "1": 0.25, "2": 1.0}, {"0": 0.5, "1": 0.75, "2": 2.0}]
    file = write(tmp_path, of_ranks(*ranks))
    whole = load_kv_scales(file)
    assert [k for k, _ in numbers(whole)] == [[0.5] * 4, [0.25] * 2 + [0.75] * 2, [1.0] * 2 + [2.0] * 2]
    for rank, layers in enumerate(ranks):
        share = load_kv_scales(file, tp_rank=rank, tp_size=2)
        assert [k for k, _ in numbers(share)] == [[x] * 2 for x in layers.values()]


def test_more_ranks_than_heads_must_agree_on_those_they_share(tmp_path: Path) -> None:
    config = SIZES | {"num_key_value_heads": 2}
    layers = [dict.fromkeys("012", x) for x in (0.5, 0.5, 1.0, 1.0)]
    assert numbers(load_kv_scales(write(tmp_path, of_ranks(*layers), config)))[0] == ([0.5, 1.0], [0.5, 1.0])
    with pytest.raises(CheckpointError, match="must have the same scales for all 4 ranks"):
        load_kv_scales(write(tmp_path, of_ranks(layers[0], layers[2], layers[2], layers[0]), config))


def test_no_config_is_needed(tmp_path: Path) -> None:
    file = write(tmp_path, of_ranks(dict.fromkeys("012", 0.5)))
    (tmp_path / "config.json").unlink()
    assert numbers(load_kv_scales(file)) == [([0.5], [0.5])] * 3


def test_the_config_counts_layers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Layer 2: There are no scales of K and V"):
        load_kv_scales(write(tmp_path, of_ranks({"0": 0.5, "1": 0.5})))


def test_a_value_that_is_no_scale(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"kv_cache\.scaling_factor\.1\.k must be above 0, got -1"):
        load_kv_scales(write(tmp_path, of_ranks({"0": 0.5, "1": [-1, 0.5], "2": 0.5})))


def test_a_file_for_another_type_of_model(tmp_path: Path) -> None:
    content = of_ranks(dict.fromkeys("012", 0.5))
    (problem,) = audit_checkpoint(write(tmp_path, content, SIZES | {"model_type": "qwen3"}))
    assert (problem.kind, problem.severity) == ("sources-differ", "warning")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "must be JSON, got: "),
        ([1], "must hold an object, got list"),
        ({"hello": 1}, "must have scales: kv_cache.scaling_factor, scales.k_scales and"),
        (of_ranks(), "kv_cache.scaling_factor must map ranks to layers, got dict"),
        (of_ranks({"0": 1.0}, dtype="int8"), 'kv_cache.dtype must be "float8_e4m3fn", got \'int8\''),
        (of_ranks({"0": "x"}), "kv_cache.scaling_factor.0.0 must be a number, got str"),
        (of_ranks({"0": True}), "kv_cache.scaling_factor.0.0 must be a number, got bool"),
        (of_ranks({"0": 10**400}), "kv_cache.scaling_factor.0.0 must be a number, got int"),
        (of_ranks({"0": [1, 2, 3]}), "must be a number, or one for K and one for V, got 3"),
        (of_ranks({"0": {"k": 1}}), "kv_cache.scaling_factor.0.0 must be a number, got none"),
        (of_ranks({"x": 1}), "must have numbers of ranks and layers, got 'x'"),
        (of_ranks({"0": 1}, {"1": 1}), "must have layer 0 for all ranks, got some"),
        ({"scales": {"k_scales": K, "v_scales": V}, "qmax": 128.0},
         "qmax must be 448, that of float8_e4m3fn, got 128.0"),
        ({"scales": {"k_scales": K, "v_scales": V}, "layer_ids": [0]},
         "must be a list, as long as layer_ids"),
        ({"scales": {"k_scales": K}}, "scales.v_scales must be a list"),
        ({"scales": {"k_scales": K, "v_scales": V}, "layer_ids": ["a", 1, 2]},
         "layer_ids must be numbers of layers"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_file_of_scales(tmp_path: Path, content: Any, sentence: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(CheckpointError) as error:
        load_kv_scales(file)
    assert sentence in str(error.value)
    assert {problem.kind for problem in audit_checkpoint(file)} == {"json-unreadable"}


def test_a_file_of_scales_beside_a_checkpoint_without_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tensor")
    write_checkpoint(tmp_path, {"model.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)})
    (tmp_path / "kv_cache_scales.json").write_text(json.dumps(of_ranks(dict.fromkeys("012", 0.5))))
    with pytest.raises(CheckpointError, match=r"kv_cache_scales\.json may have some: give that file instead"):
        load_kv_scales(tmp_path)


def test_scales_in_a_file_that_is_not_read_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tensor")
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    write_checkpoint(tmp_path, {"model.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors may have some: give that file"):
        load_kv_scales(tmp_path)
    assert len(load_kv_scales(tmp_path / "consolidated.safetensors")) == 3


@pytest.mark.parametrize("quantized", [True, False])
def test_scales_in_a_file_outside_of_the_index_are_named(tmp_path: Path, quantized: bool) -> None:
    make_checkpoint(tmp_path, "tensor")
    (tmp_path / "model.safetensors").rename(tmp_path / "more.safetensors")
    write_checkpoint(tmp_path, {"lm_head.weight": torch.ones(2, 2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    write_checkpoint(tmp_path, {"model.layers.0.self_attn.k_proj.weight": torch.ones(2, 2), "x": torch.ones(1)}, shards=2)
    if not quantized:
        (tmp_path / "config.json").write_text(json.dumps(SIZES))
    (problem,) = audit_checkpoint(tmp_path)
    assert problem.kind == ("layer-missing" if quantized else "not-quantized")
    assert problem.message.endswith(", but more.safetensors may have some: give that file instead of the directory.")


def test_scales_of_a_file_that_is_not_read_without_a_scheme(tmp_path: Path) -> None:
    names = {f"layers.{n}.attention.{x}_fake_quantizer.qscale_act": torch.tensor(0.25) for n in range(3) for x in "kv"}
    write_checkpoint(tmp_path, names, SIZES)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    write_checkpoint(tmp_path, {"model.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)})
    (problem,) = audit_checkpoint(tmp_path)
    assert problem.message == (
        "config.json must have a kv_cache_scheme and there must be scales, got none, "
        "but consolidated.safetensors may have some: give that file instead of the directory."
    )


# Other files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "hf_quant_config.json"])
def test_a_file_that_describes_a_folder_stands_for_it(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, shards=2)
    if name.startswith("hf"):
        (tmp_path / name).write_text("{}")
    loaded = load_kv_scales(tmp_path / name)
    expected = scales()["model.layers.2.self_attn.v_scale"].float().flatten()
    assert loaded[2].v is not None
    assert torch.equal(loaded[2].v, expected)


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "scales.npz"])
def test_files_of_other_kinds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"...")
    with pytest.raises(ValueError) as error:
        load_kv_scales(tmp_path / name)
    assert str(error.value) == (
        f"load_kv_scales: checkpoint must be a directory, a .safetensors file or a .json file of scales, got {tmp_path / name}"
    )


@pytest.mark.parametrize("value", [None, 3, ["a"]], ids=str)
def test_what_is_no_path(value: Any) -> None:
    with pytest.raises(ValueError) as error:
        audit_checkpoint(value)
    assert str(error.value) == f"audit_checkpoint: checkpoint must be a path, got {type(value).__name__}"


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000], ids=["nul", "long"])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^load_kv_scales: checkpoint must be a directory or a"):
        load_kv_scales(path)


def test_scales_in_mistrals_own_format(tmp_path: Path) -> None:
    tensors = {
        f"layers.{n}.attention.{x}_fake_quantizer.qscale_act": torch.tensor(y[n])
        for n in range(3)
        for x, y in (("k", K), ("v", V))
    }
    tower = {"vision_encoder.transformer.layers.0.attention.k_fake_quantizer.qscale_act": torch.tensor(9.0)}
    write_checkpoint(tmp_path, tensors | tower)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps({"n_layers": 3, "n_heads": 8, "n_kv_heads": 4}))
    loaded = load_kv_scales(tmp_path)
    assert numbers(loaded) == PAIRS
    assert [problem.kind for problem in loaded.problems] == ["other-model"]


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """An offline `huggingface_hub`; records its calls."""
    asked: list[tuple[str, Any]] = []

    def snapshot_download(model: str, *, allow_patterns: list[str]) -> str:
        asked.append((model, allow_patterns))
        raise OSError("no connection\nand more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_an_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "tensor")
    module = SimpleNamespace(snapshot_download=lambda model, allow_patterns: str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    assert len(load_kv_scales("amd/Llama-3.1-8B-Instruct-FP8-KV")) == 3


def test_an_id_that_cannot_be_downloaded(hub: list[tuple[str, Any]]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_kv_scales("amd/Llama-3.1-8B-Instruct-FP8-KV")
    assert str(error.value) == (
        "load_kv_scales: checkpoint must be a directory or a .safetensors file, but "
        "amd/Llama-3.1-8B-Instruct-FP8-KV does not exist, and it cannot be downloaded from the Hugging Face "
        "Hub as a model of that id: no connection"
    )
    assert hub == [("amd/Llama-3.1-8B-Instruct-FP8-KV", ["*.json", "*.safetensors"])]


@pytest.mark.parametrize("path", ["/no/such", "./a/b", "../b", "a/b/c", "model", "a/b.json", "~/b"])
def test_paths_that_are_no_ids_are_not_looked_for(
    hub: list[tuple[str, Any]], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError, match=r"does not exist$"):
        audit_checkpoint(path)
    assert hub == []


def test_without_huggingface_hub_a_sentence_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FileNotFoundError, match=r"download it first, or install huggingface_hub"):
        load_kv_scales("amd/Llama-3.1-8B-Instruct-FP8-KV")
