"""Writing scales: a compressed-tensors checkpoint, whole, from that of the model and `KVScales`."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp8kv.checkpoint.files import INDEX_FILE
from fp8kv.checkpoint.replace import replacing
from fp8kv.checkpoint.source import CONFIG, Source
from fp8kv.checkpoint.tensor_file import NewTensor, StoredTensor, write_tensor_file
from fp8kv.checkpoint.write_config import config_with_scales, without_quantization

if TYPE_CHECKING:
    from fp8kv.checkpoint.scales import KVScales

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def write_checkpoint(scales: KVScales, destination: Path, source: Path | None, overwrite: bool) -> None:
    """What `KVScales.save` does."""
    destination = Path(os.path.realpath(destination))
    checkpoint = Source.read(destination if source is None else source)
    in_place = destination.is_dir() and destination.samefile(checkpoint.folder)
    tensors, modules = _scale_tensors(scales, checkpoint)
    config = config_with_scales(
        checkpoint.config,
        scales.scheme,
        query=any(layer.q is not None for layer in scales.values()),
        attention_modules=modules,
    )
    others = checkpoint.other_files()
    if not in_place:
        _check_destination(destination, checkpoint, overwrite)
    with replacing(destination) as folder:
        for path in others:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            # The old folder goes when this one takes its place, so that the two may share files.
            _copy(checkpoint.folder / path, folder / path, link=in_place)
        _write_tensors(tensors, checkpoint, folder)
        _write_json(config, folder / CONFIG)


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of a dtype that are not below the scales, so that an amax is never clipped.

    Args:
        scale: float32, positive.
        dtype: bfloat16 or float16; or float32, which leaves the scales as they are.

    Example:
        >>> import torch
        >>> from fp8kv.checkpoint.write import round_up
        >>> round_up(torch.tensor([1.0, 1.001]), torch.bfloat16)
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if dtype == torch.float32:
        return scale
    rounded = scale.to(dtype)
    # Bit patterns of positive numbers are in the order of the numbers; infinity follows the largest.
    bits = rounded.view(torch.int16)
    return torch.where(rounded.float() < scale, bits + 1, bits).view(dtype)


# Scales


def _scale_tensors(scales: KVScales, source: Source) -> tuple[dict[str, NewTensor], list[str]]:
    """The tensors to write by name, after all checks, and the names of the attention modules."""
    modules = _modules_of_layers(scales, source)
    without_query = [index for index, layer in scales.items() if layer.q is None]
    query = len(without_query) < len(scales)
    if query and without_query:
        raise ValueError(
            "KVScales.save: scales must have query scales for all layers or for none, "
            f"got none for layer {without_query[0]}"
        )
    dtype = _DTYPES[source.dtype()]
    tensors, zero_points = {}, {}
    for index, module in modules.items():
        for name in "kqv" if query else "kv":
            scale = _checked_scale(scales, index, name, source)
            stored = _checked_round_up(scale, dtype, f"scales[{index}].{name}")
            tensors[f"{module}.{name}_scale"] = NewTensor.of(stored)
            if query:
                zero_point = torch.zeros(stored.shape).to(torch.float8_e4m3fn)
                zero_points[f"{module}.{name}_zero_point"] = NewTensor.of(zero_point)
    return {**tensors, **zero_points}, list(modules.values())


def _modules_of_layers(scales: KVScales, source: Source) -> dict[int, str]:
    modules = source.attention_modules()
    for index in modules:
        if index not in scales:
            raise ValueError(
                f"KVScales.save: scales must have all {len(modules)} attention layers of {source.folder}, "
                f"got none for layer {index}"
            )
    for index in scales:
        if index not in modules:
            raise ValueError(
                f"KVScales.save: scales must have the {len(modules)} attention layers of {source.folder}, "
                f"got layer {index}, which is not one of them"
            )
    return modules


def _checked_scale(scales: KVScales, index: int, name: str, source: Source) -> Tensor:
    """On the CPU, shaped as it is stored: ``[1]``, or ``[number of heads, 1, 1]``."""
    what = f"KVScales.save: scales[{index}].{name}"
    scale: Tensor | None = getattr(scales[index], name)
    if scale is None:
        raise ValueError(f"{what} must be a tensor, got None")
    host = scale.detach().cpu()
    for x in host.tolist():
        if not 0 < x < float("inf"):
            raise ValueError(f"{what} must be finite and above 0, got {x}")
    if scales.scheme.strategy == "tensor":
        if host.numel() != 1:
            raise ValueError(f'{what} must have 1 element with strategy "tensor", got {host.numel()}')
        return host
    num_heads, num_kv_heads = source.num_heads(index)
    if host.numel() != num_kv_heads:
        hint = " (of one tensor-parallel rank?)" if 0 < host.numel() < num_kv_heads else ""
        raise ValueError(
            f"{what} must have an element for each of the {num_kv_heads} KV heads of {source.folder}, "
            f"got {host.numel()}{hint}"
        )
    if name == "q":
        host = host.repeat_interleave(num_heads // num_kv_heads)
    return host.view(-1, 1, 1)


def _checked_round_up(scale: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    stored = round_up(scale, dtype)
    smallest = round_up(torch.tensor(1e-45), dtype).float()
    for x, y in zip(scale.flatten().tolist(), stored.flatten().tolist(), strict=True):
        if x < smallest or y == float("inf"):
            raise ValueError(
                f"KVScales.save: {what} must be from {smallest.item():.3g} to {torch.finfo(dtype).max:.5g}, "
                f"which {str(dtype).removeprefix('torch.')}, the dtype of the model, can hold, got {x}"
            )
    return stored


# Files


def _write_tensors(scales: Mapping[str, NewTensor], source: Source, folder: Path) -> None:
    """Writes the files of tensors that hold, or have held, scales, and the index if there is one."""
    files: dict[str, dict[str, StoredTensor | NewTensor]] = {
        name: dict(tensors) for name, tensors in source.tensors.items()
    }
    files.setdefault(source.file_for_scales, {}).update(scales)
    for name in {source.file_for_scales, *source.with_scales}:
        if files[name]:
            write_tensor_file(folder / name, files[name], source.metadata.get(name, {"format": "pt"}))
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


def _copy(source: Path, target: Path, link: bool) -> None:
    if link and not source.is_symlink():
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # a file system without links, or too many of them
    shutil.copy2(source, target)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# What is there already


def _check_destination(destination: Path, source: Source, overwrite: bool) -> None:
    """Raises if something would be lost that the source does not have."""
    folder = Path(os.path.realpath(source.folder))
    if folder in destination.parents or destination in folder.parents:
        raise ValueError(
            f"KVScales.save: checkpoint_dir must lie beside the source {folder}, not around it or in it, "
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
    """What a folder has other than the source, scales and quantization aside; None if it is a copy."""
    try:
        other = Source.read(folder)
    except (OSError, ValueError):
        return "which is no checkpoint"
    if without_quantization(other.config) != without_quantization(source.config):
        return f"whose {CONFIG} differs"
    ours, theirs = (
        {path for path in checkpoint.other_files() if str(path) not in checkpoint.tensors}
        for checkpoint in (source, other)
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
