"""The tensors of a checkpoint, found by the headers of its files; no weight is ever read."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8kv.checkpoint.findings import finding
from fp8kv.checkpoint.problems import Problem
from fp8kv.checkpoint.tensor_file import StoredTensor, read_tensor_file

INDEX_FILE = "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Zero points come in more types than scales.
_NUMBERS = _FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def find_tensors(checkpoint: Path) -> tuple[dict[str, list[StoredTensor]], list[Problem]]:
    """All tensors by name, from the headers of a .safetensors file or of all those of a directory.

    Returns:
        The tensors, several where several files have one of that name; and what is wrong with the files.
    """
    problems: list[Problem] = []
    files, listed = _files(checkpoint, problems)
    tensors = defaultdict(list)
    for file in files:
        found = _read_header(file, problems)
        for name, stored in (found or {}).items():
            tensors[name].append(stored)
        missing = [name for name in listed.get(file, ()) if found is not None and name not in found]
        if missing:
            some = f"{missing[0]} and {len(missing) - 1} more tensors" if missing[1:] else missing[0]
            problems.append(
                finding("tensor-missing", f"{file} must have {some} that the index names, but has not",
                        tensor=missing[0], value=len(missing))
            )  # fmt: skip
    return tensors, problems


def read_numbers(stored: StoredTensor, *, scale: bool) -> Tensor | None:
    """The elements in fp32 and one dimension; None if the dtype is none of scales, or of zero points.

    Raises:
        ValueError: the number of bytes is not that of the shape.
        OSError: the file cannot be read.
    """
    dtype = (_FLOATS if scale else _NUMBERS).get(stored.dtype)
    if dtype is None:
        return None
    if stored.size != math.prod(stored.shape) * dtype.itemsize:
        raise ValueError(f"{stored.size} bytes for {stored.dtype} of shape {list(stored.shape)}")
    data = bytearray().join(stored.chunks())
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0)
    return values.to(torch.float32)


def _files(checkpoint: Path, problems: list[Problem]) -> tuple[list[Path], dict[Path, list[str]]]:
    """The files that hold tensors, and which tensors the index names in each of them."""
    if not checkpoint.is_dir():
        return [checkpoint], {}
    index = checkpoint / INDEX_FILE
    if index.exists():
        try:
            listed = _read_index(index)
            return sorted(listed), listed
        except (OSError, ValueError, RecursionError) as error:
            problems.append(finding("file-corrupt", f"{index} must be an index of shards, got: {error}"))
    files = sorted(checkpoint.glob("*.safetensors"))
    # Mistral's own form of the same weights, under other names.
    files = [file for file in files if not file.name.startswith("consolidated")] or files
    if not files:
        problems.append(finding("file-missing", f"{checkpoint} must have .safetensors files, but has none"))
    return sorted({*files, *_siblings(files)}), {}


def _read_index(index: Path) -> dict[Path, list[str]]:
    contents = json.loads(index.read_text(encoding="utf-8"))
    weight_map: Any = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError("no weight_map from tensors to files")
    listed = defaultdict(list)
    for name, file in weight_map.items():
        listed[index.parent / file].append(name)
    return dict(listed)


def _siblings(files: list[Path]) -> Iterator[Path]:
    """All shards that there must be when one of "...-00001-of-00003.safetensors" is there."""
    for file in files:
        shard = _SHARD.fullmatch(file.name)
        if shard is not None:
            for number in range(1, int(shard["count"]) + 1):
                yield file.with_name(f"{shard['stem']}-{number:05d}-of-{shard['count']}.safetensors")


def _read_header(file: Path, problems: list[Problem]) -> dict[str, StoredTensor] | None:
    if not file.is_file():
        problems.append(finding("file-missing", f"{file} must be there, but is not"))
        return None
    try:
        tensors, _ = read_tensor_file(file)
        numbers = [n for tensor in tensors.values() for n in (*tensor.shape, tensor.offset, tensor.size)]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a shape or an offset in its header is no number of elements or bytes")
        return tensors
    except (OSError, ValueError, TypeError, RecursionError) as error:
        problems.append(finding("file-corrupt", f"{file} cannot be read: {error}"))
        return None
