"""ModelOpt's affine KV cache: biases that are subtracted from K and V before they are quantized."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fp8kv.checkpoint._read.inventory import Entry
from fp8kv.checkpoint._read.layers import Heads
from fp8kv.checkpoint._read.scales import read_numbers
from fp8kv.checkpoint.problems import Problem, make_problem

#: By layer, then by letter: fp32 ``[num_kv_heads, head_size]``; None if it can't be used.
Biases = dict[int, dict[str, Tensor | None]]


def read_biases(entries: Mapping[tuple[int, str], Entry], heads: Mapping[int, Heads]) -> tuple[Biases, list[Problem]]:
    """The biases of all layers, and their problems.

    Args:
        entries: by layer and letter.
        heads: of the layers.
    """
    biases: Biases = {}
    problems: list[Problem] = []
    for (layer, letter), entry in sorted(entries.items()):
        found = _read(layer, entry, heads.get(layer, Heads()).kv)
        if isinstance(found, Problem):
            problems.append(found)
        biases.setdefault(layer, {})[letter] = None if isinstance(found, Problem) else found
    if biases:
        names = [entry.name for _, entry in sorted(entries.items())]
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        message = (
            f"{names[0]}{more} are subtracted from K and V before these are quantized (ModelOpt's affine "
            "cache), and an engine that ignores them clips"
        )
        problems.append(make_problem("affine", message, value=len(names)))
    return biases, problems


def _read(layer: int, entry: Entry, num_kv_heads: int | None) -> Tensor | Problem:
    name, stored = entry
    try:
        values = read_numbers(stored, scale=True)
    except (OSError, ValueError) as error:
        message = f"{name} cannot be read from {stored.path}: {error}"
        return make_problem("file-corrupt", message, layer=layer, tensor=name)
    if values is None:
        message = f"{name} must be float32, float16 or bfloat16, got {stored.dtype}"
        return make_problem("wrong-dtype", message, layer=layer, tensor=name, value=stored.dtype)
    shape = stored.shape
    fits = len(shape) == 4 and (shape[0], shape[2]) == (1, 1) and shape[1] == (num_kv_heads or shape[1])
    if not fits or 0 in shape:
        expected = f"[1, {num_kv_heads or 'num_kv_heads'}, 1, head_size]"
        message = f"{name} must have the shape {expected}, got {list(shape)}"
        return make_problem("head-count", message, layer=layer, tensor=name, value=list(shape))
    wrong = values[~values.isfinite()]
    if len(wrong):
        message = f"{name} must be finite, got {wrong[0].item()}"
        return make_problem("not-finite", message, layer=layer, tensor=name, value=wrong[0].item())
    return values.view(shape[1], shape[3])
