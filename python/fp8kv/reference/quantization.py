"""The quantization operators in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional
from torch import Tensor

from fp8kv._dtypes import FORMATS, REAL_DTYPES
from fp8kv.reference.rules import bits, dynamic_scale, encode, fail, finite_magnitude, round_to


@torch.no_grad()
def static_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, group_shape: Sequence[int] | None = None) -> None:
    """See `fp8kv.static_scaled_fp8_quant`.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> result = torch.empty(2, dtype=torch.float8_e5m2)
        >>> reference.static_scaled_fp8_quant(result, torch.tensor([1.0, float("nan")]), torch.tensor(0.5))
        >>> result.view(torch.uint8).tolist()
        [64, 127]
    """
    op = "static_scaled_fp8_quant"
    _check(op, input=input, result=result, scale=scale, quantizes=True)
    grid = _grid(op, "scale", scale, input, group_shape)
    _write(result, encode(input.float() / grid.spread(scale), result.dtype))


@torch.no_grad()
def dynamic_scaled_fp8_quant(
    result: Tensor,
    input: Tensor,
    scale: Tensor,
    scale_ub: Tensor | None = None,
    group_shape: Sequence[int] | None = None,
) -> None:
    """See `fp8kv.dynamic_scaled_fp8_quant`.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> result, scale = torch.empty(1, 2, dtype=torch.float8_e4m3fn), torch.empty(1)
        >>> x = torch.tensor([[1.0, -7.0]])
        >>> reference.dynamic_scaled_fp8_quant(result, x, scale, group_shape=(1, -1))
        >>> result.float().tolist(), scale.tolist()
        ([[64.0, -448.0]], [0.015625])
    """
    op = "dynamic_scaled_fp8_quant"
    _check(op, input=input, result=result, scale=scale, quantizes=True)
    if scale_ub is not None and (scale_ub.numel() != 1 or scale_ub.dtype != torch.float32):
        fail(op, f"scale_ub must be float32 with 1 element, got {scale_ub.dtype}, shape {list(scale_ub.shape)}")
    grid = _grid(op, "scale", scale, input, group_shape)
    scale.copy_(dynamic_scale(grid.amax(input), result.dtype, scale_ub).reshape(scale.shape))
    _write(result, encode(input.float() / grid.spread(scale), result.dtype))


@torch.no_grad()
def scaled_fp8_dequant(result: Tensor, input: Tensor, scale: Tensor, group_shape: Sequence[int] | None = None) -> None:
    """See `fp8kv.scaled_fp8_dequant`.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> result = torch.empty(2)
        >>> q = torch.tensor([1.0, 1.5]).to(torch.float8_e4m3fn)
        >>> reference.scaled_fp8_dequant(result, q, torch.tensor(2.0))
        >>> result.tolist()
        [2.0, 3.0]
    """
    op = "scaled_fp8_dequant"
    _check(op, input=input, result=result, scale=scale, quantizes=False)
    grid = _grid(op, "scale", scale, input, group_shape)
    _write(result, round_to(input.float() * grid.spread(scale), result.dtype))


@torch.no_grad()
def group_amax(amax: Tensor, input: Tensor, group_shape: Sequence[int]) -> None:
    """See `fp8kv.group_amax`. fp32 bit patterns are compared as signed integers.

    Nothing changes for an empty input.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> amax = torch.tensor([4.0])
        >>> reference.group_amax(amax, torch.tensor([-5.0, float("inf")]), (-1, -1))
        >>> amax.tolist()
        [5.0]
    """
    op = "group_amax"
    _check(op, input=input, result=None, scale=amax, quantizes=True)
    grid = _grid(op, "amax", amax, input, group_shape)
    if input.numel() == 0:
        return
    seen = grid.amax(input).reshape(amax.shape)
    bits = amax.view(torch.int32)
    bits.copy_(torch.maximum(bits, seen.view(torch.int32)))


def quantize(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    group_shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_ub: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fp8kv.quantize`.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> q, scale = reference.quantize(torch.tensor([448.0, 224.0, -0.0]))
        >>> q.float().tolist(), scale.tolist()
        ([448.0, 224.0, -0.0], [1.0])
    """
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if scale is not None:
        if scale_ub is not None:
            raise ValueError("fp8kv.quantize: scale_ub must be None when a scale is given, as it bounds computed scales")
        static_scaled_fp8_quant(out, x, scale, group_shape)
        return out, scale
    scale = torch.empty(_computed_scale_shape(x, group_shape), dtype=torch.float32, device=x.device)
    dynamic_scaled_fp8_quant(out, x, scale, scale_ub, group_shape)
    return out, scale


def _computed_scale_shape(x: Tensor, group_shape: Sequence[int] | None) -> tuple[int, ...]:
    if group_shape is None or tuple(group_shape) == (-1, -1):
        return (1,)
    leading = tuple(x.shape[:-1])
    sizes = (math.prod(leading), x.shape[-1] if x.dim() else 1)
    rows, cols = (1 if extent < 1 else math.ceil(size / extent) for size, extent in zip(sizes, group_shape, strict=True))
    return (*leading, cols) if group_shape[0] == 1 else (rows, cols)


def dequantize(
    q: Tensor,
    scale: Tensor,
    *,
    group_shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """See `fp8kv.dequantize`.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> q = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
        >>> reference.dequantize(q, torch.tensor(3.0)).tolist()
        [3.0, -6.0]
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    scaled_fp8_dequant(out, q, scale, group_shape)
    return out


# Which elements share a scale


@dataclass(frozen=True)
class _Grid:
    """An input seen as `view_shape`, each dimension split into `counts` groups of `blocks` elements."""

    shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    blocks: tuple[int, ...]
    counts: tuple[int, ...]

    def spread(self, scale: Tensor) -> Tensor:
        """The scale of every element: broadcasts to the input."""
        values = scale.reshape(self.counts)
        if math.prod(self.counts) == 1:
            return values.reshape(())
        for dim, (size, block, count) in enumerate(zip(self.view_shape, self.blocks, self.counts, strict=True)):
            if count != 1:
                values = values.repeat_interleave(block, dim).narrow(dim, 0, size)
        return values.expand(self.view_shape).reshape(self.shape)

    def amax(self, values: Tensor) -> Tensor:
        """The largest finite magnitude of every group, 0 for a group without one; of shape `counts`."""
        if values.numel() == 0:
            return torch.zeros(self.counts, dtype=torch.float32, device=values.device)
        magnitude = finite_magnitude(values).reshape(self.view_shape)
        padding: list[int] = []
        split: list[int] = []
        for size, block, count in zip(self.view_shape, self.blocks, self.counts, strict=True):
            padding = [0, block * count - size, *padding]  # innermost first
            split += [count, block]
        padded = torch.nn.functional.pad(magnitude, padding).reshape(split)
        return padded.amax(dim=tuple(range(1, len(split), 2)))


def _grid(op: str, name: str, scale: Tensor, input: Tensor, group_shape: Sequence[int] | None) -> _Grid:
    shape = tuple(input.shape)
    matrix = (math.prod(shape[:-1]), shape[-1] if shape else 1)
    if group_shape is None:
        if scale.numel() == 1:
            return _Grid(shape, matrix, tuple(max(1, size) for size in matrix), (1, 1))
        counts = tuple(scale.shape)
        divides = scale.dim() > 1 and len(counts) == len(shape)
        if not divides or any(size % count if count else size for size, count in zip(shape, counts, strict=True)):
            fail(op, f"{name} of shape {list(counts)} needs a group_shape for an input of shape {list(shape)}")
        blocks = tuple(max(1, size // max(1, count)) for size, count in zip(shape, counts, strict=True))
        return _Grid(shape, shape, blocks, counts)

    if len(group_shape) != 2 or any(extent != -1 and extent < 1 for extent in group_shape):
        fail(op, f"group_shape must have two extents, each -1 or at least 1, got {tuple(group_shape)}")
    blocks = tuple(
        max(1, size if extent == -1 else min(extent, size)) for size, extent in zip(matrix, group_shape, strict=True)
    )
    counts = tuple(
        1 if extent == -1 else -(-size // block) for size, extent, block in zip(matrix, group_shape, blocks, strict=True)
    )
    if not _fits(tuple(scale.shape), shape, counts, one_row=group_shape[0] == 1):
        fail(op, f"{name} must have the shape {list(counts)} or an equivalent one, got {list(scale.shape)}")
    return _Grid(shape, matrix, blocks, counts)


def _fits(scale_shape: tuple[int, ...], shape: tuple[int, ...], counts: tuple[int, ...], one_row: bool) -> bool:
    """Whether a scale of this shape is a form of the [rows, cols] = `counts` matrix of scales."""
    rows, cols = counts
    if rows == 1 and cols == 1:
        return math.prod(scale_shape) == 1
    if len(scale_shape) == 1:
        return (rows == 1 or cols == 1) and scale_shape[0] == rows * cols
    if not scale_shape or scale_shape[-1] != cols:
        return False
    leading = scale_shape[:-1]
    if [size for size in leading if size != 1] == [size for size in (rows,) if size != 1]:
        return True
    return one_row and len(scale_shape) == len(shape) and leading == shape[:-1]


# Checks: the least that keeps a wrong call from giving a result


def _check(op: str, *, input: Tensor, result: Tensor | None, scale: Tensor, quantizes: bool) -> None:
    if input.dtype not in (REAL_DTYPES if quantizes else FORMATS):
        fail(op, f"input can't be {input.dtype}")
    if scale.dtype != torch.float32:
        fail(op, f"scales must be float32, got {scale.dtype}")
    if scale.device != input.device:
        fail(op, f"scales must be on the device of input, {input.device}, got {scale.device}")
    if result is None:
        return
    if result.dtype not in (FORMATS if quantizes else REAL_DTYPES):
        fail(op, f"result can't be {result.dtype}")
    if result.device != input.device or result.shape != input.shape:
        fail(op, f"result must have the device and shape of input, {input.device} and {list(input.shape)}")


def _write(result: Tensor, values: Tensor) -> None:
    bits(result).copy_(bits(values))
