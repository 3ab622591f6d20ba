"""Writes the subfolder `fp8kv`: scales that only this package reads; see `_read.own_scales`."""

from __future__ import annotations

import json
from pathlib import Path

from fp8kv._checks import check_offset_values, check_scale_values
from fp8kv.checkpoint._read.own_scales import FOLDER, JSON_FILE, TENSOR_FILE, VERSION, OwnScales, tensor_name
from fp8kv.checkpoint._write.safetensors import NewTensor, write_tensors
from fp8kv.checkpoint._write.source import Source

_ABOUT = (
    "Formats, scales per channel and offsets of a KV cache, for fp8kv. Other engines read the scales in the "
    "files of the model, whose digest is below."
)


def check_own_scales(own: OwnScales, source: Source) -> None:
    """A `ValueError` if a tensor has values that can't be used, or another number of heads than the model."""
    for index, layer in own.layers.items():
        for name, x in layer.tensors.items():
            what = f"KVScales.save: scales[{index}].{name.removesuffix('_scale')}"
            if name.endswith("offset"):
                check_offset_values(what, x)
            else:
                check_scale_values(what, x)
            _, num_kv_heads = source.num_heads(index, len(x))
            if len(x) != num_kv_heads and not (x.dim() == 1 and len(x) == 1):
                hint = " (of one tensor-parallel rank?)" if len(x) < num_kv_heads else ""
                raise ValueError(
                    f"{what} must be for the {num_kv_heads} KV heads of {source.folder}, got shape {list(x.shape)}{hint}"
                )


def write_own_scales(own: OwnScales, digest: str, checkpoint: Path) -> None:
    """Writes both files into a checkpoint's folder.

    Args:
        own: checked.
        digest: of the scales in the files of the model.
        checkpoint: the folder of the model.
    """
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    tensors = {
        tensor_name(index, name): NewTensor.of(x.cpu())
        for index, layer in own.layers.items()
        for name, x in layer.tensors.items()
    }
    write_tensors(folder / TENSOR_FILE, tensors, {"format": "pt"})
    layers = {
        str(index): {
            "dtype": layer.dtype,
            "strategy": layer.strategy,
            "tensors": [tensor_name(index, name) for name in layer.tensors],
            **({} if layer.error is None else {"error": layer.error}),
        }
        for index, layer in own.layers.items()
    }
    content = {
        "version": VERSION,
        "about": _ABOUT,
        "strategy": own.strategy,
        "standard_scales_sha256": digest,
        "layers": layers,
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / JSON_FILE).write_text(text, encoding="utf-8")
