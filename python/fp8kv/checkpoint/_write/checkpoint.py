"""Writes a complete compressed-tensors checkpoint with new scales, from the model's checkpoint."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8kv.checkpoint._read.config import CONFIG_FILE
from fp8kv.checkpoint._read.own_scales import OwnScales, digest_of
from fp8kv.checkpoint._read.safetensors import INDEX_FILE, StoredTensor
from fp8kv.checkpoint._write.config import config_with_scales, without_quantization
from fp8kv.checkpoint._write.own_scales import check_own_scales, write_own_scales
from fp8kv.checkpoint._write.replace import replacing
from fp8kv.checkpoint._write.safetensors import NewTensor, write_tensors
from fp8kv.checkpoint._write.scales import Scales, scale_tensors
from fp8kv.checkpoint._write.source import Source
from fp8kv.checkpoint.scheme import KVCacheScheme


def write_checkpoint(
    scales: Scales,
    own: OwnScales | None,
    scheme: KVCacheScheme,
    destination: Path,
    source: Path | None,
    *,
    overwrite: bool,
) -> None:
    """The implementation of `KVScales.save`.

    Args:
        scales: those that every engine reads.
        own: those of the subfolder `fp8kv`; None: there is none.
        scheme: of `scales`.
        destination, source, overwrite: as there.
    """
    destination = Path(os.path.realpath(destination))
    checkpoint = Source.read(destination if source is None else source)
    in_place = destination.is_dir() and destination.samefile(checkpoint.folder)
    tensors, modules, stored = scale_tensors(scales, scheme.strategy, checkpoint, spread=own is not None)
    if own is not None:
        check_own_scales(own, checkpoint)
    config = config_with_scales(
        checkpoint.config,
        scheme,
        query=any(layer["q"] is not None for layer in scales.values()),
        attention_modules=modules,
    )
    others = checkpoint.other_files()
    if not in_place:
        _check_destination(destination, checkpoint, overwrite)
    with replacing(destination) as folder:
        for path in others:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            # The old folder is removed when this one replaces it, so the two may share files.
            _copy(checkpoint.folder / path, folder / path, link=in_place)
        _write_files(tensors, checkpoint, folder)
        _write_json(config, folder / CONFIG_FILE)
        if own is not None:
            write_own_scales(own, digest_of(stored), folder)


# Files


def _write_files(scales: Mapping[str, NewTensor], source: Source, folder: Path) -> None:
    """Writes the tensor files that contain, or contained, scales, and the index if there is one."""
    files: dict[str, dict[str, StoredTensor | NewTensor]] = {name: dict(tensors) for name, tensors in source.tensors.items()}
    files.setdefault(source.file_for_scales, {}).update(scales)
    for name in {source.file_for_scales, *source.with_scales}:
        if files[name]:
            write_tensors(folder / name, files[name], source.metadata.get(name, {"format": "pt"}))
    if source.index is not None:
        everything = itertools.chain.from_iterable(tensors.values() for tensors in files.values())
        index = {
            **source.index,
            "metadata": {
                **(source.index.get("metadata") or {}),
                "total_size": sum(tensor.size for tensor in everything),
            },
            "weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors},
        }
        _write_json(index, folder / INDEX_FILE)


def _copy(source: Path, target: Path, *, link: bool) -> None:
    if link and not source.is_symlink():
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # a file system without links, or too many of them
    shutil.copy2(source, target)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Existing contents


def _check_destination(destination: Path, source: Source, overwrite: bool) -> None:
    """Raises if anything would be lost that is not in the source."""
    folder = Path(os.path.realpath(source.folder))
    if folder in destination.parents or destination in folder.parents:
        raise ValueError(
            f"KVScales.save: checkpoint_dir must be a sibling of the source {folder}, neither in it nor around it, "
            f"got {destination}"
        )
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"KVScales.save: checkpoint_dir must be a folder, got the file {destination}")
    if not overwrite and destination.exists() and any(destination.iterdir()):
        difference = _difference(destination, source)
        if difference is not None:
            raise FileExistsError(
                "KVScales.save: checkpoint_dir must be new, empty or a copy of the source, unless "
                f"overwrite=True, got {destination}, {difference}"
            )


def _difference(folder: Path, source: Source) -> str | None:
    """A difference between a folder and the source, scales and quantization aside; None if it is a copy."""
    try:
        other = Source.read(folder)
    except (OSError, ValueError):
        return "which is no checkpoint"
    if without_quantization(other.config) != without_quantization(source.config):
        return f"whose {CONFIG_FILE} differs"
    ours, theirs = (
        {path for path in checkpoint.other_files() if str(path) not in checkpoint.tensors} for checkpoint in (source, other)
    )
    for path in sorted(ours ^ theirs):
        return f"which lacks {path}" if path in ours else f"which has {path} besides"
    for path in sorted(ours):
        if not filecmp.cmp(source.folder / path, folder / path, shallow=False):
            return f"whose {path} differs"
    for name in sorted(source.tensors.keys() | other.tensors.keys()):
        if not _same_tensors(source.tensors.get(name, {}), other.tensors.get(name, {})):
            return f"whose {name} has other tensors"
    return None


def _same_tensors(ours: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        (mine.dtype, mine.shape, mine.size) == (yours.dtype, yours.shape, yours.size)
        and all(a == b for a, b in zip(mine.chunks(), yours.chunks(), strict=True))
        for mine, yours in ((ours[name], theirs[name]) for name in ours)
    )
