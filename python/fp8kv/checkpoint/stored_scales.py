"""The scales and zero points among the tensors of a checkpoint, whatever they are called there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fp8kv.checkpoint.files import read_numbers
from fp8kv.checkpoint.findings import finding
from fp8kv.checkpoint.names import parse_scale_name
from fp8kv.checkpoint.problems import Problem
from fp8kv.checkpoint.tensor_file import StoredTensor


class Key(NamedTuple):
    """What a tensor is of a layer: `side` is "q", "k" or "v", `kind` "scale" or "zero_point"."""

    layer: int
    side: str
    kind: str


class Entry(NamedTuple):
    """A tensor in a file, with the name it has there."""

    name: str
    stored: StoredTensor


@dataclass(frozen=True)
class StoredScale:
    """A scale as it is in the file: its name and its values, fp32 ``[n]``; None if they cannot be used."""

    name: str
    values: Tensor | None


#: By layer, then by "q", "k" and "v".
StoredScales = dict[int, dict[str, StoredScale]]


def find_entries(tensors: dict[str, list[StoredTensor]]) -> dict[Key, list[Entry]]:
    """All scales and zero points; `kv_scale` is listed for K and for V."""
    entries: dict[Key, list[Entry]] = defaultdict(list)
    for name, copies in sorted(tensors.items()):
        layer, sides, kind = parse_scale_name(name) or (0, "", "")
        for side in sides:
            entries[Key(layer, side, kind)] += [Entry(name, stored) for stored in copies]
    return dict(sorted(entries.items()))


def read_scales(entries: dict[Key, list[Entry]]) -> tuple[StoredScales, list[Problem]]:
    """The values of all scales, and what is wrong with types, copies and zero points."""
    problems: list[Problem] = []
    scales: StoredScales = defaultdict(dict)
    for key, copies in entries.items():
        read = [_read(key, entry, problems) for entry in copies]
        if key.kind == "scale":
            values = None if any(x is None for x in read) else _agreed(key, copies, read, problems)
            scales[key.layer][key.side] = StoredScale(copies[0].name, values)
        elif not all(_is_zero(key, *pair, problems) for pair in zip(copies, read, strict=True)):
            # Scales come before zero points.
            scale = scales[key.layer].get(key.side)
            if scale is not None:
                scales[key.layer][key.side] = StoredScale(scale.name, None)
    return {layer: sides for layer, sides in scales.items() if sides}, problems


def _read(key: Key, entry: Entry, problems: list[Problem]) -> Tensor | None:
    name, stored = entry
    try:
        values = read_numbers(stored, scale=key.kind == "scale")
    except (OSError, ValueError, TypeError) as error:
        message = f"{name} cannot be read from {stored.path}: {error}"
        problems.append(finding("file-corrupt", message, layer=key.layer, tensor=name))
        return None
    if values is None:
        expected = "float32, float16 or bfloat16" if key.kind == "scale" else "a number"
        message = f"{name} must be {expected}, got {stored.dtype}"
        problems.append(finding("wrong-dtype", message, layer=key.layer, tensor=name, value=stored.dtype))
    return values


def _agreed(
    key: Key, copies: list[Entry], read: list[Tensor | None], problems: list[Problem]
) -> Tensor | None:
    """The values that all copies have; None if they differ."""
    first = read[0]
    agreed = first
    for entry, other in zip(copies[1:], read[1:], strict=True):
        assert first is not None
        assert other is not None
        same = first.shape == other.shape and torch.allclose(first, other, rtol=0, atol=0, equal_nan=True)
        one, two = copies[0].name, entry.name
        where = f" in {copies[0].stored.path.name} and {entry.stored.path.name}" if one == two else ""
        if same:
            message = f"{one} and {two}{where} are the same scale"
        else:
            message = f"{one} and {two}{where} must be equal, got {_some(first)} and {_some(other)}"
            agreed = None
        kind = "duplicate-scale" if same else "conflicting-scales"
        problems.append(finding(kind, message, layer=key.layer, tensor=two, value=_some(other)))
    return agreed


def _is_zero(key: Key, entry: Entry, values: Tensor | None, problems: list[Problem]) -> bool:
    if values is None:
        return False
    wrong = values[values != 0].tolist()
    if wrong:
        message = f"{entry.name} must be 0, got {wrong[0]:.6g}"
        problems.append(
            finding("zero-point", message, layer=key.layer, tensor=entry.name, value=f"{wrong[0]:.6g}")
        )
    return not wrong


def _some(values: Tensor) -> str:
    listed = [f"{x:.6g}" for x in values.tolist()]
    return ", ".join(listed[:3]) + (", ..." if listed[3:] else "")
