"""The checkpoint that scales are added to: its config, its tensors without scales, its attention layers."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8kv._dtypes import REAL_DTYPES, dtype_name
from fp8kv.checkpoint._read.config import CONFIG_FILE, MODELOPT_FILE, NESTED, Heads, heads_of_layers
from fp8kv.checkpoint._read.safetensors import DTYPES, INDEX_FILE, StoredTensor, read_header
from fp8kv.checkpoint.names import parse_scale_name
from fp8kv.checkpoint.problems import CheckpointError

_SINGLE_FILE = "model.safetensors"
_SCALES_FILE = "model-kv-scales.safetensors"

_REAL_NAMES = {dtype_name(dtype): dtype for dtype in REAL_DTYPES}
#: A parameter that makes keys: its module, and what is before the number of the layer.
_KEYS = re.compile(
    r"(?P<module>(?P<layers>(?:.+\.)?[^.]+)\.\d+\.[^.]+)\.(?:k_proj|qkv_proj|query_key_value|c_attn|Wqkv)\..+"
)


@dataclass(frozen=True)
class Source:
    """A checkpoint without its scales of attention.

    Attributes:
        folder: where it is.
        config: its config.json.
        index: its index of shards; None if there is a single file.
        tensors: of each file of tensors, those that are no scales or zero points of Q, K and V, by name.
        metadata: the ``__metadata__`` of each of these files.
        with_scales: those of the files that hold scales.
    """

    folder: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    tensors: dict[str, dict[str, StoredTensor]]
    metadata: dict[str, dict[str, str] | None]
    with_scales: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Reads config, index and headers, no tensors.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: a file is not what it should be.
            ValueError: it is quantized by ModelOpt.
        """
        if (folder / MODELOPT_FILE).exists():
            raise ValueError(
                "KVScales.save: source must be a checkpoint without quantization, or one quantized with "
                f"compressed-tensors, got {folder} with {MODELOPT_FILE}"
            )
        config = _read_json(folder, CONFIG_FILE)
        index = _read_json(folder, INDEX_FILE) if (folder / INDEX_FILE).exists() else None
        tensors, metadata, with_scales = {}, {}, set()
        for name in [_SINGLE_FILE] if index is None else _shards(folder, index):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"KVScales.save: source must have a file {name!r}, got {folder}")
            stored, metadata[name] = read_header(folder / name)
            _check_index(folder, index, name, stored)
            tensors[name] = {key: value for key, value in stored.items() if parse_scale_name(key) is None}
            if len(tensors[name]) < len(stored):
                with_scales.add(name)
        return cls(folder, config, index, tensors, metadata, frozenset(with_scales))

    @property
    def file_for_scales(self) -> str:
        """The file of tensors that gets new scales: a shard of their own unless there is a single file."""
        return _SINGLE_FILE if self.index is None else _SCALES_FILE

    def other_files(self) -> list[Path]:
        """Relative paths of what stays as it is when scales are replaced, files of tensors among them."""
        replaced = {CONFIG_FILE, INDEX_FILE, self.file_for_scales, *self.with_scales}
        paths = (path.relative_to(self.folder) for path in _files(self.folder))
        return [path for path in paths if str(path) not in replaced]

    def attention_modules(self) -> dict[int, str]:
        """The names of the attention modules by layer, such as "model.layers.0.self_attn".

        Raises:
            ValueError: there are none, or those of several models.
        """
        layers = heads_of_layers(self.config)
        found: dict[str, dict[int, str]] = defaultdict(dict)
        for file in self.tensors.values():
            for name in file:
                match = _KEYS.fullmatch(name)
                # Scales go where readers look for them.
                place = match and parse_scale_name(f"{match['module']}.k_scale")
                if match and place and (layers is None or place[0] in layers):
                    found[match["layers"]][place[0]] = match["module"]
        if len(found) != 1:
            models = ", ".join(map(repr, sorted(found))) or "none"
            raise ValueError(
                "KVScales.save: source must have the attention layers of one language model, with tensors "
                f"like 'model.layers.0.self_attn.k_proj.weight', got {models} in {self.folder}"
            )
        (modules,) = found.values()
        return dict(sorted(modules.items()))

    def dtype(self) -> torch.dtype:
        """The dtype of the model: what the config says, or that of the first tensor that isn't quantized."""
        nested = (self.config[name] for name in NESTED if isinstance(self.config.get(name), dict))
        for section in (self.config, *nested):
            for key in ("dtype", "torch_dtype"):
                dtype = _REAL_NAMES.get(str(section.get(key)).removeprefix("torch."))
                if dtype is not None:
                    return dtype
        dtypes = (DTYPES.get(tensor.dtype) for file in self.tensors.values() for tensor in file.values())
        return next((dtype for dtype in dtypes if dtype in REAL_DTYPES), torch.float32)

    def num_heads(self, layer: int) -> tuple[int, int]:
        """The number of query heads and of KV heads of a layer.

        Raises:
            ValueError: the config does not say it.
        """
        heads = (heads_of_layers(self.config) or {}).get(layer, Heads())
        if heads.query is None or heads.kv is None or heads.query % heads.kv:
            raise ValueError(
                "KVScales.save: source must have num_attention_heads, a multiple of num_key_value_heads, in "
                f"its config, got {heads.query} and {heads.kv} for layer {layer} "
                f"in {self.folder / CONFIG_FILE}"
            )
        return heads.query, heads.kv


def _shards(folder: Path, index: dict[str, Any]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX_FILE} must have a weight_map, got {weight_map!r}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX_FILE} must map to files beside it, got {name!r}")
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
