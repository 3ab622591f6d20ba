"""Scales that only this package reads: formats, scales per channel and offsets, in the subfolder `fp8kv`.

The files of the model have scales that every engine reads. A digest of those ties the subfolder to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8kv._checks import STRATEGIES, Strategy, check_choice, check_offset_values, check_scale_values
from fp8kv._dtypes import QUANTIZED_CACHE_NAMES
from fp8kv.checkpoint._read.config import read_object
from fp8kv.checkpoint._read.safetensors import StoredTensor, read_header
from fp8kv.checkpoint._read.scales import read_numbers

FOLDER = "fp8kv"
JSON_FILE = "scales.json"
TENSOR_FILE = "scales.safetensors"
#: Of the form of these files.
VERSION = 1
#: What a layer may have; the scales are always there.
NAMES = ("k_scale", "v_scale", "k_offset", "v_offset")


@dataclass(frozen=True)
class OwnLayer:
    """What the subfolder has of one layer.

    Attributes:
        dtype: the format, a name of it.
        strategy: of the scales.
        tensors: by `NAMES`: fp32 scales ``[1]``, ``[num_kv_heads]`` or ``[num_kv_heads, head_size]``, and
            offsets of the last shape.
        error: of the attention output in calibration, relative; None if it was not measured.
    """

    dtype: str
    strategy: str
    tensors: dict[str, Tensor]
    error: float | None = None

    @property
    def format(self) -> str:
        """As in "int8 per channel, offset of K"."""
        words = {"tensor": "per tensor", "attn_head": "per head", "channel": "per channel"}
        letters = [letter.upper() for letter in "kv" if f"{letter}_offset" in self.tensors]
        offset = f", offset of {' and '.join(letters)}" if letters else ""
        return f"{self.dtype} {words[self.strategy]}{offset}"


@dataclass(frozen=True)
class OwnScales:
    """The contents of the subfolder.

    Attributes:
        strategy: of all layers; "auto" if it was chosen for each.
        layers: by index.
        digest: of the scales in the model's files.
    """

    strategy: Strategy
    layers: dict[int, OwnLayer]
    digest: str = ""

    @property
    def errors(self) -> dict[int, float]:
        """The errors of the layers, as far as they were measured."""
        return {n: layer.error for n, layer in self.layers.items() if layer.error is not None}


def tensor_name(layer: int, name: str) -> str:
    """As in "model.layers.0.self_attn.k_offset"."""
    return f"model.layers.{layer}.self_attn.{name}"


def digest_of(scales: Mapping[int, Mapping[str, Tensor | None]]) -> str:
    """A digest of the scales of K and V, by layer and letter, as the model's files hold them."""
    digest = hashlib.sha256()
    for layer, by_letter in sorted(scales.items()):
        for letter in "kv":
            scale = by_letter.get(letter)
            values = torch.empty(0) if scale is None else scale.detach().to("cpu", torch.float32).flatten()
            digest.update(f"{layer}.{letter}:{len(values)}:".encode())
            digest.update(bytes(values.contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()


def has_own_scales(checkpoint: Path) -> bool:
    """Whether a folder has one of the files; one without the other is an error of `read_own_scales`."""
    return any((checkpoint / FOLDER / name).exists() for name in (JSON_FILE, TENSOR_FILE))


def read_own_scales(checkpoint: Path) -> OwnScales:
    """Reads and checks both files of the subfolder.

    Raises:
        OSError: a file is missing or can't be read.
        ValueError: one is damaged, or of a version that is not known; a sentence.
    """
    folder = checkpoint / FOLDER
    for name in (JSON_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} must be a file, but does not exist")
    content = read_object(folder / JSON_FILE)
    where = str(folder / JSON_FILE)
    if content.get("version") != VERSION:
        raise ValueError(f"{where}: version must be {VERSION}, got {content.get('version')!r}")
    strategy, layers = content.get("strategy"), content.get("layers")
    check_choice(f"{where}: strategy", strategy, (*STRATEGIES, "auto"))
    if not isinstance(layers, dict) or not all(x.isdecimal() and isinstance(layers[x], dict) for x in layers):
        raise ValueError(f"{where}: layers must be objects by number, got {str(layers)[:40]}")
    stored, _ = read_header(folder / TENSOR_FILE)
    read = {int(n): _read_layer(f"{where}: layer {n}", int(n), layer, stored) for n, layer in layers.items()}
    named = {tensor_name(n, name) for n, layer in read.items() for name in layer.tensors}
    if stored.keys() - named:
        some = sorted(stored.keys() - named)[0]
        raise ValueError(f"{folder / TENSOR_FILE} must have the tensors that {JSON_FILE} names, got {some}")
    return OwnScales(strategy, read, str(content.get("standard_scales_sha256")))  # type: ignore[arg-type]


def _read_layer(where: str, layer: int, content: dict[str, Any], stored: dict[str, StoredTensor]) -> OwnLayer:
    check_choice(f"{where}: dtype", content.get("dtype"), QUANTIZED_CACHE_NAMES)
    check_choice(f"{where}: strategy", content.get("strategy"), STRATEGIES)
    error = content.get("error")
    if error is not None and not (isinstance(error, (int, float)) and error >= 0):
        raise ValueError(f"{where}: error must be a number that is not negative, got {error!r}")
    full = {tensor_name(layer, name): name for name in NAMES}
    scales = {tensor_name(layer, name) for name in ("k_scale", "v_scale")}
    names = content.get("tensors")
    if not isinstance(names, list) or not all(name in full for name in names) or not scales <= set(names):
        raise ValueError(f"{where}: tensors must have the names of scales and offsets, got {names!r}")
    tensors = {full[name]: _read_tensor(name, stored) for name in names}
    heads = {len(x) for x in tensors.values() if x.dim() == 2 or len(x) > 1}
    sizes = [{x.shape[1] for n, x in tensors.items() if n[0] == letter and x.dim() == 2} for letter in "kv"]
    if len(heads) > 1 or max(map(len, sizes)) > 1:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{where}: tensors must have heads of one number and size, got {shapes}")
    return OwnLayer(content["dtype"], content["strategy"], tensors, error)


def _read_tensor(name: str, stored: dict[str, StoredTensor]) -> Tensor:
    """fp32, checked."""
    tensor = stored.get(name)
    if tensor is None:
        raise ValueError(f"{name} must be in {TENSOR_FILE}, but does not exist")
    is_offset = name.endswith("offset")
    dims = (2,) if is_offset else (1, 2)
    if tensor.dtype != "F32" or len(tensor.shape) not in dims or 0 in tensor.shape:
        kind = "[num_kv_heads, head_size]" if is_offset else "[1], [num_kv_heads] or [num_kv_heads, head_size]"
        raise ValueError(f"{name} must be float32 {kind}, got {tensor.dtype} of shape {list(tensor.shape)}")
    values = read_numbers(tensor, scale=True)
    assert values is not None
    values = values.view(tensor.shape)
    (check_offset_values if is_offset else check_scale_values)(name, values)
    return values
