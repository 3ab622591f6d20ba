"""The checkpoint to add scales to: its config, its tensors without scales, its attention layers."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8kv._dtypes import REAL_DTYPES, dtype_name
from fp8kv.checkpoint._read.config import CONFIG_FILE, MODELOPT_FILE, NESTED, check_depth, section_of_model
from fp8kv.checkpoint._read.inventory import Models, ModelTensors, sort_tensors
from fp8kv.checkpoint._read.layers import (
    Heads,
    kv_heads_by_tensors,
    layers_of_config,
    with_counts,
    with_tensors,
    with_tied_weights,
)
from fp8kv.checkpoint._read.own_scales import FOLDER, JSON_FILE, TENSOR_FILE
from fp8kv.checkpoint._read.safetensors import DTYPES, INDEX_FILE, StoredTensor, read_header
from fp8kv.checkpoint.names import parse_scale_name
from fp8kv.checkpoint.problems import CheckpointError

_SINGLE_FILE = "model.safetensors"
_SCALES_FILE = "model-kv-scales.safetensors"

_REAL_NAMES = {dtype_name(dtype): dtype for dtype in REAL_DTYPES}


@dataclass(frozen=True)
class Source:
    """A checkpoint without its scales of attention.

    Attributes:
        folder: its path.
        config: its config.json.
        index: its index of shards; None if there is a single file.
        tensors: per file, the tensors that are not scales or zero points of Q, K and V, by name.
        models: the attention modules of all tensors, by model.
        metadata: the ``__metadata__`` of each of these files.
        with_scales: the files that contain scales.
    """

    folder: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    tensors: dict[str, dict[str, StoredTensor]]
    models: Models
    metadata: dict[str, dict[str, str] | None]
    with_scales: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Reads config, index and headers, no tensors.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: a file is invalid.
            ValueError: it is quantized by ModelOpt.
        """
        if (folder / MODELOPT_FILE).exists():
            raise ValueError(
                "KVScales.save: source must be a checkpoint without quantization, or one quantized with "
                f"compressed-tensors, got {folder} with {MODELOPT_FILE}"
            )
        config = _read_json(folder, CONFIG_FILE)
        index = _read_json(folder, INDEX_FILE) if (folder / INDEX_FILE).exists() else None
        files, metadata = {}, {}
        for name in [_SINGLE_FILE] if index is None else _shards(folder, index):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"KVScales.save: source must have a file {name!r}, got {folder}")
            files[name], metadata[name] = read_header(folder / name)
            _check_index(folder, index, name, files[name])
        models = sort_tensors({key: [value] for stored in files.values() for key, value in stored.items()})
        scales = {entry.name for model in _language_models(models).values() for entry in model.scales()}
        tensors = {
            name: {key: value for key, value in stored.items() if not (key in scales or parse_scale_name(key))}
            for name, stored in files.items()
        }
        with_scales = frozenset(name for name, stored in files.items() if len(tensors[name]) < len(stored))
        return cls(folder, config, index, tensors, models, metadata, with_scales)

    @property
    def file_for_scales(self) -> str:
        """The tensor file for new scales: a separate shard unless there is a single file."""
        return _SINGLE_FILE if self.index is None else _SCALES_FILE

    def other_files(self) -> list[Path]:
        """Relative paths of the files that do not change when scales are replaced, tensor files included."""
        own = {f"{FOLDER}/{name}" for name in (JSON_FILE, TENSOR_FILE)}
        replaced = {CONFIG_FILE, INDEX_FILE, self.file_for_scales, *self.with_scales, *own}
        paths = (path.relative_to(self.folder) for path in _files(self.folder))
        return [path for path in paths if str(path) not in replaced]

    def attention_modules(self, with_scales: Collection[int] = ()) -> dict[int, str]:
        """The names of the attention modules by layer, such as "model.layers.0.self_attn".

        Args:
            with_scales: the layers with scales to add.

        Raises:
            ValueError: there are none, or several models have some.
        """
        model, section = self._model(), self._section()
        of_config = layers_of_config(section)
        layers = with_tensors(of_config, section, model.attention, model.present, with_scales)
        names = {n: x.name for n, x in model.attention.items() if x.makes_keys}
        if of_config is not None and names:
            below = next(name.removeprefix(f"{model.stack}{n}") for n, name in names.items())
            tied = with_tied_weights(of_config, model.attention, model.present)
            names |= {n: f"{model.stack}{n}{below}" for n in tied}
        modules = {n: names[n] for n in sorted(names) if layers is not None and n in layers.heads}
        if not modules:
            raise self._no_model("none")
        return modules

    def _model(self) -> ModelTensors:
        """The attention of the language model."""
        found = _language_models(self.models)
        if "" in found:
            return found[""]
        if len(found) != 1:
            raise self._no_model(", ".join(repr(x.stack.removesuffix(".")) for x in found.values()) or "none")
        return next(iter(found.values()))

    def _no_model(self, found: str) -> ValueError:
        return ValueError(
            "KVScales.save: source must have the attention layers of one language model, with tensors "
            f"like 'model.layers.0.self_attn.k_proj.weight', got {found} in {self.folder}"
        )

    def _section(self) -> Mapping[str, Any]:
        """The part of the config about the language model."""
        return section_of_model(self.config, next((n for n, x in self.models.items() if x is self._model()), ""))

    def dtype(self) -> torch.dtype:
        """The dtype of the model, from the config, or else of the first tensor that isn't quantized."""
        nested = (self.config[name] for name in NESTED if isinstance(self.config.get(name), dict))
        for section in (self.config, *nested):
            for key in ("dtype", "torch_dtype"):
                dtype = _REAL_NAMES.get(str(section.get(key)).removeprefix("torch."))
                if dtype is not None:
                    return dtype
        dtypes = (DTYPES.get(tensor.dtype) for file in self.tensors.values() for tensor in file.values())
        return next((dtype for dtype in dtypes if dtype in REAL_DTYPES), torch.float32)

    def num_heads(self, layer: int, num_scales: int) -> tuple[int, int]:
        """The number of query heads and of KV heads of a layer.

        Args:
            layer: its index.
            num_scales: the number of scales of K and V; shapes of projections may confirm it against the
                config.

        Raises:
            ValueError: neither specifies it.
        """
        section, attention = self._section(), self._model().attention
        layers = layers_of_config(section, listed=False)
        given = layers.heads.get(layer, Heads()) if layers else Heads()
        query, kv = given
        if layers is not None and kv is not None:
            kv = with_counts(layers, section, attention, {layer: num_scales})[layer].kv
        elif section.get("kv_lora_rank") is not None:
            # Latent attention caches one row; other layers of such a model have projections to keys.
            kv = kv_heads_by_tensors(section, given, attention.get(layer)) or 1
        if query is None or kv is None or query % kv:
            raise ValueError(
                "KVScales.save: source must have num_attention_heads, a multiple of num_key_value_heads, in "
                f"its config, got {query} and {kv} for layer {layer} "
                f"in {self.folder / CONFIG_FILE}"
            )
        return query, kv


def _language_models(models: Models) -> Models:
    """The models whose cache holds the generated text."""
    return {
        name: model
        for name, model in models.items()
        if not model.is_side and any(x.makes_keys and not x.is_cross for x in model.attention.values())
    }


def _shards(folder: Path, index: dict[str, Any]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX_FILE} must have a weight_map, got {weight_map!r}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX_FILE} must map to files next to it, got {name!r}")
    return sorted(set(weight_map.values()))


def _check_index(folder: Path, index: dict[str, Any] | None, name: str, stored: Collection[str]) -> None:
    for tensor, file in index["weight_map"].items() if index else ():
        if file == name and tensor not in stored:
            raise CheckpointError(f"{folder / name} must have the tensor {tensor!r} that {INDEX_FILE} names")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"KVScales.save: source must be a folder with a {name}, got {folder}")
    try:
        content = json.loads((folder / name).read_bytes())
        check_depth(content, "it")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} must hold a JSON object, got {type(content).__name__}")
    return content


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files below a folder; links are followed."""
    above = (*above, os.path.realpath(folder))
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) in above:
            raise OSError(f"KVScales.save: {path} is a link to a folder that it lies in")
        else:
            yield from _files(path, above)
