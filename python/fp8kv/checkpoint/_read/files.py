"""The files of a checkpoint that hold its tensors."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8kv.checkpoint._read.safetensors import INDEX_FILE, read_header
from fp8kv.checkpoint.names import parse_scale_name
from fp8kv.checkpoint.problems import Problem, make_problem

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def find_files(checkpoint: Path) -> tuple[dict[Path, list[str]], list[Problem]]:
    """The files, including missing ones, each with its tensors according to the index.

    Args:
        checkpoint: a directory or a .safetensors file.
    """
    if not checkpoint.is_dir():
        return {checkpoint: []}, []
    problems = []
    index = checkpoint / INDEX_FILE
    if index.exists():
        try:
            return dict(sorted(_read_index(index).items())), []
        except (OSError, ValueError, RecursionError) as error:
            message = f"{index} must be an index of shards, got: {error}"
            problems.append(make_problem("file-corrupt", message))
    files = sorted(checkpoint.glob("*.safetensors"))
    files = [file for file in files if not _is_mistral(file)] or files
    if not files:
        message = f"{checkpoint} must have .safetensors files, but has none"
        problems.append(make_problem("file-missing", message))
    return {file: [] for file in sorted({*files, *_siblings(files)})}, problems


def files_beside(checkpoint: Path) -> list[str]:
    """The files of a directory that are not read but have scales, or may have some; none for a single file."""
    if not checkpoint.is_dir():
        return []
    read = find_files(checkpoint)[0]
    others = [file for file in checkpoint.glob("*.safetensors") if file not in read and _has_scales(file)]
    return sorted(file.name for file in (*others, *checkpoint.glob("*scale*.json")))


def _has_scales(file: Path) -> bool:
    try:
        tensors, _ = read_header(file)
    except (OSError, ValueError):
        return False
    return any(map(parse_scale_name, tensors))


def _is_mistral(file: Path) -> bool:
    """Mistral's own form of the same weights, under other names."""
    return file.name.startswith("consolidated")


def _read_index(index: Path) -> dict[Path, list[str]]:
    contents = json.loads(index.read_text(encoding="utf-8"))
    weight_map: Any = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError("no weight_map from tensors to files")
    listed = defaultdict(list)
    for name, file in weight_map.items():
        listed[index.parent / file].append(name)
    return listed


def _siblings(files: list[Path]) -> Iterator[Path]:
    """All shards that must exist if there is one such as "...-00001-of-00003.safetensors"."""
    for file in files:
        shard = _SHARD.fullmatch(file.name)
        if shard is not None:
            for number in range(1, int(shard["count"]) + 1):
                yield file.with_name(f"{shard['stem']}-{number:05d}-of-{shard['count']}.safetensors")
