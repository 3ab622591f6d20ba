"""Scales as tensors of a checkpoint: names, shapes, and rounding to the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp8kv._checks import Strategy, is_scale
from fp8kv._dtypes import DEFAULT_FORMAT, dtype_name
from fp8kv.checkpoint._write.safetensors import NewTensor
from fp8kv.checkpoint._write.source import Source

#: By layer, then by letter.
Scales = Mapping[int, Mapping[str, Tensor | None]]


def scale_tensors(
    scales: Scales, strategy: Strategy, source: Source, *, spread: bool = False
) -> tuple[dict[str, NewTensor], list[str], dict[int, dict[str, Tensor]]]:
    """The tensors to write, after all checks.

    Args:
        scales: of all layers.
        strategy: of the scales.
        source: the model.
        spread: whether a scale per tensor may serve each head.

    Returns:
        The tensors by name, the names of the attention modules, and the scales as stored.
    """
    modules = _modules_of_layers(scales, source)
    without_query = [index for index, layer in scales.items() if layer["q"] is None]
    query = len(without_query) < len(scales)
    if query and without_query:
        raise ValueError(
            f"KVScales.save: scales must have query scales for all layers or for none, got none for layer {without_query[0]}"
        )
    dtype = source.dtype()
    tensors, zero_points = {}, {}
    written: dict[int, dict[str, Tensor]] = {}
    for index, module in modules.items():
        for letter in "kqv" if query else "kv":
            scale = _checked_scale(scales[index][letter], letter, index, strategy, source, spread)
            stored = _checked_round_up(scale, dtype, f"scales[{index}].{letter}")
            written.setdefault(index, {})[letter] = stored
            tensors[f"{module}.{letter}_scale"] = NewTensor.of(stored)
            if query:
                zero_point = torch.zeros(stored.shape).to(DEFAULT_FORMAT.dtype)
                zero_points[f"{module}.{letter}_zero_point"] = NewTensor.of(zero_point)
    return {**tensors, **zero_points}, list(modules.values()), written


def _modules_of_layers(scales: Scales, source: Source) -> dict[int, str]:
    modules = source.attention_modules(scales)
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


def _checked_scale(scale: Tensor | None, letter: str, layer: int, strategy: Strategy, source: Source, spread: bool) -> Tensor:
    """On the CPU, shaped as it is stored: ``[1]``, or ``[number of heads, 1, 1]``."""
    what = f"KVScales.save: scales[{layer}].{letter}"
    if scale is None:
        raise ValueError(f"{what} must be a tensor, got None")
    host = scale.detach().cpu()
    for x in host.tolist():
        if not is_scale(x):
            raise ValueError(f"{what} must be finite and above 0, got {x}")
    if strategy == "tensor":
        if host.numel() != 1:
            raise ValueError(f'{what} must have 1 element with strategy "tensor", got {host.numel()}')
        return host
    num_heads, num_kv_heads = source.num_heads(layer, host.numel())
    if spread and host.numel() == 1:
        host = host.expand(num_kv_heads)
    if host.numel() != num_kv_heads:
        hint = " (of one tensor-parallel rank?)" if 0 < host.numel() < num_kv_heads else ""
        raise ValueError(
            f"{what} must have an element for each of the {num_kv_heads} KV heads of {source.folder}, got {host.numel()}{hint}"
        )
    if letter == "q":
        host = host.repeat_interleave(num_heads // num_kv_heads)
    return host.view(-1, 1, 1)


def _checked_round_up(scale: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    stored = round_up(scale, dtype)
    smallest = round_up(torch.tensor(1e-45), dtype).float()
    for x, y in zip(scale.flatten().tolist(), stored.flatten().tolist(), strict=True):
        if x < smallest or y == float("inf"):
            raise ValueError(
                f"KVScales.save: {what} must be from {smallest.item():.3g} to {torch.finfo(dtype).max:.5g}, "
                f"which {dtype_name(dtype)}, the dtype of the model, can hold, got {x}"
            )
    return stored


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds scales up to a dtype, so that an amax is never clipped.

    Args:
        scale: float32, positive.
        dtype: bfloat16, float16, or float32, which leaves the scales unchanged.

    Example:
        >>> import torch
        >>> from fp8kv.checkpoint._write.scales import round_up
        >>> round_up(torch.tensor([1.0, 1.001]), torch.bfloat16)
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if dtype == torch.float32:
        return scale
    rounded = scale.to(dtype)
    # Bit patterns of positive numbers are in the order of the numbers; infinity follows the largest.
    bits = rounded.view(torch.int16)
    return torch.where(rounded.float() < scale, bits + 1, bits).view(dtype)
