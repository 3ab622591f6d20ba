"""FP8 and INT8 quantization: `quantize`, `dequantize`, and one documented function per operator.

Formulas are in docs/numerics.md, and as plain PyTorch in `fp8kv.reference`, which gives the same bytes.
Everything works on CPU and CUDA tensors with any strides and any alignment, launches on the current stream
and never synchronizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fp8kv._ops import operator
from fp8kv.group_shape import GroupShape

_static = operator("static_scaled_fp8_quant")
_dynamic = operator("dynamic_scaled_fp8_quant")
_dequant = operator("scaled_fp8_dequant")
_group_amax = operator("group_amax")


def quantize(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    group_shape: GroupShape | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_ub: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantizes `x` to FP8 or INT8: with a given scale (static), or with scales computed from `x` (dynamic).

    ``q = round_to_nearest_even(clamp(x.float() / scale, -max, max))``. NaN becomes the byte 0x7F, in int8 0;
    infinities and everything beyond the range become the largest finite value.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        scale: float32; None computes the scales, ``max(amax / max, 1 / (max * 512))`` with the largest finite
            magnitude of each group.
        group_shape: which elements share a scale; see `GroupShape`. None: a scale of one element is per
            tensor, and one with the dimensions of `x` defines its blocks itself, such as ``[1, H, 1]`` for
            ``x`` of shape ``[T, H, D]``. A computed scale is per tensor then.
        dtype: float8_e4m3fn, float8_e5m2 or int8. `out`, where given, decides.
        scale_ub: float32, one element; bounds amax before it becomes a scale. Dynamic only.
        out: of such a dtype, the shape of `x`, any strides; receives the result. None allocates a contiguous
            tensor.

    Returns:
        ``(q, scale)``. A computed scale has the shape ``group_shape.scale_shape(x.shape)``: ``[1]`` per
        tensor, ``x.shape[:-1] + [C]`` for groups of one row (``x.shape[:-1] + [1]`` per token), and otherwise
        ``[R, C]`` (``[1, N]`` per channel). Neither tensor is part of an autograd graph.

    Raises:
        RuntimeError: dtype, device, shape or group_shape don't fit; the sentence names the argument. Nothing
            is written then.
        ValueError: `scale_ub` came with a `scale`.

    Example:
        >>> import torch, fp8kv
        >>> x = torch.tensor([[1.0, -2.0, 448.0], [0.5, 0.25, 7.0]])
        >>> q, scale = fp8kv.quantize(x, group_shape=fp8kv.GroupShape.PER_TOKEN)
        >>> q.float().tolist()
        [[1.0, -2.0, 448.0], [32.0, 16.0, 448.0]]
        >>> scale.tolist()
        [[1.0], [0.015625]]

    See also: `dequantize`, `QuantFP8`, `static_scaled_fp8_quant`, `dynamic_scaled_fp8_quant`.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    extents = None if group_shape is None else list(group_shape)
    if scale is not None:
        if scale_ub is not None:
            raise ValueError("fp8kv.quantize: scale_ub must be None when a scale is given, as it bounds computed scales")
        _static(out, x, scale, extents)
        return out, scale
    scale = torch.empty(_scale_shape(x, extents), dtype=torch.float32, device=x.device)
    _dynamic(out, x, scale, scale_ub, extents)
    return out, scale


def _scale_shape(x: Tensor, extents: list[int] | None) -> tuple[int, ...]:
    if extents is None or len(extents) != 2:  # the op refuses the latter
        return (1,)
    return GroupShape(*extents).scale_shape(x.shape)


def scale_of_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that is computed for a group whose largest finite magnitude is this, for each element.

    Example:
        >>> import torch
        >>> from fp8kv.quantization import scale_of_amax
        >>> scale_of_amax(torch.tensor([448.0, 7.0]), torch.float8_e4m3fn).tolist()
        [1.0, 0.015625]
    """
    _, scale = quantize(amax, group_shape=(1, 1), dtype=dtype)
    return scale


def dequantize(
    q: Tensor,
    scale: Tensor,
    *,
    group_shape: GroupShape | Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The values of a quantized tensor: ``q.float() * scale``, rounded once to `dtype`.

    Args:
        q: float8_e4m3fn, float8_e5m2 or int8, any shape and strides.
        scale: float32, shaped as for `quantize`.
        group_shape: which elements share a scale, as for `quantize`.
        dtype: float32, float16 or bfloat16. `out`, where given, decides.
        out: the shape of `q`, any strides; receives the result. None allocates a contiguous tensor.

    Returns:
        The values. NaN is the positive quiet NaN without payload.

    Raises:
        RuntimeError: dtype, device, shape or group_shape don't fit; the sentence names the argument. Nothing
            is written then.

    Example:
        >>> import torch, fp8kv
        >>> q, scale = fp8kv.quantize(torch.tensor([3.0, -1.5]), torch.tensor([0.5]))
        >>> fp8kv.dequantize(q, scale, dtype=torch.float32).tolist()
        [3.0, -1.5]
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _dequant(out, q, scale, None if group_shape is None else list(group_shape))
    return out


def static_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, group_shape: Sequence[int] | None = None) -> None:
    """Writes ``input / scale``, quantized, into `result`: the operator behind ``quantize(x, scale)``.

    Args:
        result: float8_e4m3fn, float8_e5m2 or int8, the shape of `input`, any strides; written.
        input: float32, float16 or bfloat16, any strides.
        scale: float32; it has the forms of `quantize`.
        group_shape: two extents, -1 for the whole; None: see `quantize`.

    Raises:
        RuntimeError: an argument doesn't fit. Nothing is written then.

    Example:
        >>> import torch, fp8kv
        >>> result = torch.empty(3, dtype=torch.float8_e4m3fn)
        >>> fp8kv.static_scaled_fp8_quant(result, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5]))
        >>> result.float().tolist()
        [2.0, 4.0, 6.0]
    """
    _static(result, input, scale, group_shape)


def dynamic_scaled_fp8_quant(
    result: Tensor,
    input: Tensor,
    scale: Tensor,
    scale_ub: Tensor | None = None,
    group_shape: Sequence[int] | None = None,
) -> None:
    """Writes the scale of each group of `input` into `scale`, and `input` over it, quantized, into `result`.

    Args:
        result: float8_e4m3fn, float8_e5m2 or int8, the shape of `input`, any strides; written.
        input: float32, float16 or bfloat16, any strides.
        scale: float32; it has the forms of `quantize`; written.
        scale_ub: float32, one element; the largest magnitude of a group is clipped to it.
        group_shape: two extents, -1 for the whole; None: see `quantize`.

    Raises:
        RuntimeError: an argument doesn't fit. Nothing is written then.

    Example:
        >>> import torch, fp8kv
        >>> x = torch.tensor([[7.0, 14.0], [-28.0, 1.0]])
        >>> result, scale = torch.empty(2, 2, dtype=torch.float8_e4m3fn), torch.empty(2)
        >>> fp8kv.dynamic_scaled_fp8_quant(result, x, scale, group_shape=fp8kv.GroupShape.PER_TOKEN)
        >>> result.float().tolist(), scale.tolist()
        ([[224.0, 448.0], [-448.0, 16.0]], [0.03125, 0.0625])
    """
    _dynamic(result, input, scale, scale_ub, group_shape)


def scaled_fp8_dequant(result: Tensor, input: Tensor, scale: Tensor, group_shape: Sequence[int] | None = None) -> None:
    """Writes ``input * scale`` into `result`: the operator behind `dequantize`.

    Args:
        result: float32, float16 or bfloat16, the shape of `input`, any strides; written.
        input: float8_e4m3fn, float8_e5m2 or int8, any strides.
        scale: float32; it has the forms of `quantize`.
        group_shape: two extents, -1 for the whole; None: see `quantize`.

    Raises:
        RuntimeError: an argument doesn't fit. Nothing is written then.

    Example:
        >>> import torch, fp8kv
        >>> q = torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn)
        >>> result = torch.empty(3, dtype=torch.bfloat16)
        >>> fp8kv.scaled_fp8_dequant(result, q, torch.tensor([0.5]))
        >>> result.tolist()
        [0.5, 1.0, 1.5]
    """
    _dequant(result, input, scale, group_shape)


def group_amax(amax: Tensor, input: Tensor, group_shape: Sequence[int]) -> None:
    """Raises `amax` to the largest finite magnitude of each group of `input`: the calibration primitive.

    Args:
        amax: float32, shaped like a scale; read and written. Fill it with 0 at first. A NaN in it stays,
            unless its sign bit is set.
        input: float32, float16 or bfloat16, any strides. NaN and infinite elements are left out.
        group_shape: two extents, -1 for the whole.

    Raises:
        RuntimeError: an argument doesn't fit. Nothing is written then.

    Example:
        >>> import torch, fp8kv
        >>> amax = torch.zeros(2)
        >>> for batch in torch.tensor([[[1.0, -5.0]], [[-3.0, 2.0]]]):
        ...     fp8kv.group_amax(amax, batch, fp8kv.GroupShape.PER_CHANNEL)
        >>> amax.tolist()
        [3.0, 5.0]
    """
    _group_amax(amax, input, group_shape)


def raise_head_amax(amax: Tensor, x: Tensor) -> None:
    """Raises ``amax[h]`` to the largest finite magnitude of ``x[:, h]``.

    Args:
        amax: float32 ``[num_heads]``; read and written.
        x: float32, float16 or bfloat16 ``[num_tokens, num_heads, ...]`` of at least 3 dimensions, not empty,
            any strides.

    Example:
        >>> import torch
        >>> from fp8kv.quantization import raise_head_amax
        >>> amax = torch.tensor([4.0, 0.0])
        >>> raise_head_amax(amax, torch.tensor([[[1.0, -5.0], [-3.0, 2.0]]]))
        >>> amax.tolist()
        [5.0, 3.0]
    """
    # With the head as the outermost dimension, the rows of a head are one group, whatever the strides.
    group_amax(amax.unsqueeze(1), x.movedim(1, 0), (x.shape[0] * math.prod(x.shape[2:-1]), -1))
