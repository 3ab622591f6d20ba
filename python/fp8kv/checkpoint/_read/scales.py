"""Values of scales and zero points; weights are never read."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.checkpoint._read.inventory import Entry, Key
from fp8kv.checkpoint._read.safetensors import DTYPES, StoredTensor
from fp8kv.checkpoint.problems import Problem, make_problem

#: More bytes than the scales of any layer; an invalid header must not exhaust memory.
_MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredScale:
    """A scale as stored: its name and its values, fp32 ``[n]``; None if they are unusable."""

    name: str
    values: Tensor | None


#: By layer, then by letter.
StoredScales = dict[int, dict[str, StoredScale]]


def read_scales(entries: dict[Key, list[Entry]]) -> tuple[StoredScales, list[Problem]]:
    """The values of all scales, and problems with types, duplicates and zero points."""
    problems: list[Problem] = []
    scales: StoredScales = defaultdict(dict)
    for key, copies in entries.items():
        read = [_read(key, entry, problems) for entry in copies]
        if key.kind == "scale":
            values = None if any(x is None for x in read) else _agreed(key, copies, read, problems)
            scales[key.layer][key.letter] = StoredScale(copies[0].name, values)
        elif not all(_is_zero(key, *pair, problems) for pair in zip(copies, read, strict=True)):
            # Scales come before zero points.
            scale = scales[key.layer].get(key.letter)
            if scale is not None:
                scales[key.layer][key.letter] = StoredScale(scale.name, None)
    return {layer: by_letter for layer, by_letter in scales.items() if by_letter}, problems


def _read(key: Key, entry: Entry, problems: list[Problem]) -> Tensor | None:
    name, stored = entry
    try:
        values = read_numbers(stored, scale=key.kind == "scale")
    except (OSError, ValueError) as error:
        message = f"{name} cannot be read from {stored.path}: {error}"
        problems.append(make_problem("file-corrupt", message, layer=key.layer, tensor=name))
        return None
    if values is None:
        expected = "float32, float16 or bfloat16" if key.kind == "scale" else "a number"
        message = f"{name} must be {expected}, got {stored.dtype}"
        problems.append(make_problem("wrong-dtype", message, layer=key.layer, tensor=name, value=stored.dtype))
    return values


def read_numbers(stored: StoredTensor, *, scale: bool) -> Tensor | None:
    """The elements in fp32 and one dimension; None if the dtype is not valid for scales, or zero points.

    Raises:
        ValueError: the number of bytes does not match the shape, or is too large for scales.
        OSError: the file cannot be read.
    """
    dtype = DTYPES.get(stored.dtype)
    # Zero points come in more types than scales.
    if dtype is None or (scale and not (dtype.is_floating_point and dtype.itemsize > 1)):
        return None
    if stored.size != math.prod(stored.shape) * dtype.itemsize:
        raise ValueError(f"{stored.size} bytes for {stored.dtype} of shape {list(stored.shape)}")
    if stored.size > _MOST_BYTES:
        raise ValueError(f"{stored.size} bytes are too many for scales")
    data = bytearray().join(stored.chunks())
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0)
    return values.to(torch.float32)


def _agreed(key: Key, copies: list[Entry], read: list[Tensor | None], problems: list[Problem]) -> Tensor | None:
    """The common values of all duplicates; None if they differ."""
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
        problems.append(make_problem(kind, message, layer=key.layer, tensor=two, value=_some(other)))
    return agreed


def _is_zero(key: Key, entry: Entry, values: Tensor | None, problems: list[Problem]) -> bool:
    if values is None:
        return False
    wrong = values[values != 0].tolist()
    if wrong:
        message = f"{entry.name} must be 0, got {wrong[0]:.6g}"
        problems.append(make_problem("zero-point", message, layer=key.layer, tensor=entry.name, value=f"{wrong[0]:.6g}"))
    return not wrong


def _some(values: Tensor) -> str:
    listed = [f"{x:.6g}" for x in values.tolist()]
    return ", ".join(listed[:3]) + (", ..." if listed[3:] else "")
