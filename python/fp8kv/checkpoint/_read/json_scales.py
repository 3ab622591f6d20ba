"""Scales in a JSON file: from vLLM and SGLang, from onnxruntime-genai, or numbers by tensor name."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8kv.checkpoint._read.config import read_object
from fp8kv.checkpoint._read.inventory import Entry, Key, Models, ModelTensors, sort_tensors
from fp8kv.checkpoint._read.layers import Layers
from fp8kv.checkpoint._read.safetensors import StoredTensor
from fp8kv.checkpoint.names import find_scale_name

#: The largest number of float8_e4m3fn, the divisor of amax in scales.
_QMAX = 448
_DTYPES = ("float8_e4m3fn", "float8_e4m3", "fp8_e4m3", "fp8")


@dataclass(frozen=True)
class WrittenNumbers(StoredTensor):
    """Numbers in a JSON file, with the bytes of an equivalent tensor."""

    values: tuple[float, ...] = ()

    def chunks(self) -> Iterator[bytes]:
        yield struct.pack(f"<{len(self.values)}d", *self.values)


def read_json_scales(path: Path, layers: Layers | None) -> tuple[Models, str | None]:
    """The scales in a JSON file, and the type of model that it names.

    Args:
        path: the file.
        layers: of the model, for scales per tensor-parallel rank.

    Raises:
        OSError: it cannot be read.
        ValueError: it has another form, or another format of numbers; one sentence.
    """
    content = read_object(path)
    model_type = content.get("model_type")
    cache, scales = content.get("kv_cache"), content.get("scales")
    if isinstance(cache, dict):
        tensors = _of_ranks(path, cache, layers)
    elif isinstance(scales, dict) and scales.keys() & {"k_scales", "v_scales"}:
        tensors = _of_lists(path, content, scales)
    else:
        models = sort_tensors({name: [stored] for name, stored in _named(path, content)})
        if not any(tensors.entries or tensors.unknown for tensors in models.values()):
            raise ValueError(
                f"{path} must have scales: kv_cache.scaling_factor, scales.k_scales and scales.v_scales, or "
                "names of tensors such as model.layers.0.self_attn.k_scale, got none of them"
            )
        return models, model_type if isinstance(model_type, str) else None
    return {"": tensors}, model_type if isinstance(model_type, str) else None


# vLLM and SGLang: one number for K and V of a layer, or two, for each tensor-parallel rank


def _of_ranks(path: Path, cache: Mapping[str, Any], layers: Layers | None) -> ModelTensors:
    where = f"{path}: kv_cache"
    dtype, ranks = cache.get("dtype"), cache.get("scaling_factor")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f'{where}.dtype must be "float8_e4m3fn", got {dtype!r}')
    if not isinstance(ranks, dict) or not ranks:
        raise ValueError(f"{where}.scaling_factor must map ranks to layers, got {_kind(ranks)}")
    by_rank = [_of_rank(f"{where}.scaling_factor.{rank}", ranks[rank]) for rank in _in_order(where, ranks)]
    tensors = ModelTensors("model.layers.")
    same = all(repr(numbers) == repr(by_rank[0]) for numbers in by_rank)
    for layer in sorted({layer for numbers in by_rank for layer in numbers}):
        if not all(layer in numbers for numbers in by_rank):
            raise ValueError(f"{where}.scaling_factor must have layer {layer} for all ranks, got some")
        for number, letter in enumerate("kv"):
            values = [numbers[layer][number] for numbers in by_rank]
            values = values[:1] if same else _by_head(where, layer, values, layers)
            name = f"kv_cache.scaling_factor.{layer}.{letter}"
            tensors.entries[Key(layer, letter, "scale")] = [Entry(name, _written(path, values))]
    return tensors


def _of_rank(where: str, layers: Any) -> dict[int, tuple[float, float]]:
    if not isinstance(layers, dict):
        raise ValueError(f"{where} must map layers to scales, got {_kind(layers)}")
    return {int(layer): _pair(f"{where}.{layer}", layers[layer]) for layer in _in_order(where, layers)}


def _pair(where: str, value: Any) -> tuple[float, float]:
    """The scales of K and V: one for both, or a list or an object of two."""
    if isinstance(value, dict):
        sides = {str(name).lower()[:1]: number for name, number in value.items()}
        value = [sides.get("k"), sides.get("v")]
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"{where} must be a number, or one for K and one for V, got {len(pair)}")
    return _number(where, pair[0]), _number(where, pair[1])


def _by_head(where: str, layer: int, values: list[float], layers: Layers | None) -> list[float]:
    """The scale of each KV head, from the rank that owns it."""
    heads = layers.heads[layer].kv if layers is not None and layer in layers.heads else None
    ranks = len(values)
    if heads is not None and heads % ranks == 0:
        return [value for value in values for _ in range(heads // ranks)]
    if heads is not None and ranks % heads == 0:
        parts = [set(values[n : n + ranks // heads]) for n in range(0, ranks, ranks // heads)]
        if all(len(part) == 1 for part in parts):
            return [part.pop() for part in parts]
    raise ValueError(
        f"{where}.scaling_factor must have the same scales for all {ranks} ranks, or a config.json next to it "
        f"whose KV heads they divide, got other ones for layer {layer} and {heads} KV heads"
    )


def _in_order(where: str, numbered: Mapping[str, Any]) -> list[str]:
    for number in numbered:
        if not (number.isdecimal() and len(number) < 5):
            raise ValueError(f"{where} must have numbers of ranks and layers, got {number!r}")
    return sorted(numbered, key=int)


# onnxruntime-genai: a list for K, one for V, and their layers


def _of_lists(path: Path, content: Mapping[str, Any], scales: Mapping[str, Any]) -> ModelTensors:
    qmax = content.get("qmax")
    if qmax not in (None, _QMAX):
        raise ValueError(f"{path}: qmax must be {_QMAX}, that of float8_e4m3fn, got {qmax!r}")
    lists = {letter: scales.get(f"{letter}_scales") for letter in "kv"}
    tensors = ModelTensors("model.layers.")
    for letter, values in lists.items():
        where = f"{path}: scales.{letter}_scales"
        layers = content.get("layer_ids")
        if layers is None and isinstance(values, list):
            layers = list(range(len(values)))
        if not isinstance(values, list) or not isinstance(layers, list) or len(values) != len(layers):
            raise ValueError(f"{where} must be a list, as long as layer_ids if there is one, got {_kind(values)}")
        for layer, value in zip(layers, values, strict=True):
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < 10_000:
                raise ValueError(f"{path}: layer_ids must be numbers of layers, got {layer!r}")
            numbers = [_number(where, x) for x in (value if isinstance(value, list) else [value])]
            name = f"scales.{letter}_scales.{layer}"
            tensors.entries[Key(layer, letter, "scale")] = [Entry(name, _written(path, numbers))]
    return tensors


# Names of tensors


def _named(path: Path, content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """All numbers by name; nested objects are parts of names."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _named(path, value, f"{above}{name}.")
        elif isinstance(value, (int, float, list)) and not isinstance(value, bool):
            full = _full(f"{above}{name}")
            yield full, _written(path, list(_flat(f"{path}: {above}{name}", value)))


def _full(name: str) -> str:
    """A name that may start at the layer, and lack the attention module."""
    stem, _, last = name.rpartition(".")
    given = f"{stem}.self_attn.{last}"
    return given if find_scale_name(name) is None and find_scale_name(given) is not None else name


def _flat(where: str, value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(where, item)
    else:
        yield _number(where, value)


# Numbers


def _number(where: str, value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"{where} must be a number, got {_kind(value) if value is not None else 'none'}")


def _written(path: Path, values: list[float]) -> WrittenNumbers:
    return WrittenNumbers("F64", (len(values),), path, 0, 8 * len(values), tuple(values))


def _kind(value: Any) -> str:
    return type(value).__name__
