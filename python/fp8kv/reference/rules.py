"""The rules of docs/numerics.md, element by element, and how a wrong call ends."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fp8kv._dtypes import FORMATS

_QUIET_NAN = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}
_INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def encode(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of a format to fp32 `values`, ties to even, saturating; NaN becomes its byte."""
    format = FORMATS[dtype]
    limited = values.clamp(-format.max, format.max)
    if not dtype.is_floating_point:  # PyTorch cuts off
        limited = limited.round()
    nearest = limited.to(dtype).view(torch.uint8)
    return torch.where(values.isnan(), torch.full_like(nearest, format.nan_byte), nearest).view(dtype)


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `values` rounded to `dtype`; NaN becomes the positive quiet NaN without payload."""
    rounded = values.to(dtype).view(_INTEGER[dtype])
    return torch.where(values.isnan(), torch.full_like(rounded, _QUIET_NAN[dtype]), rounded).view(dtype)


def finite_magnitude(values: Tensor) -> Tensor:
    """``|values|`` in fp32, 0 for NaN and infinities."""
    magnitude = values.float().abs()
    return torch.where(magnitude.isfinite(), magnitude, torch.zeros_like(magnitude))


def min_scale(dtype: torch.dtype) -> float:
    """The smallest scale that is ever computed: 1 / (max * 512), rounded to fp32."""
    return torch.tensor(1.0 / (FORMATS[dtype].max * 512.0), dtype=torch.float32).item()


def dynamic_scale(amax: Tensor, dtype: torch.dtype, scale_ub: Tensor | None = None) -> Tensor:
    """The scales of groups whose largest finite magnitudes are `amax`. A NaN bound is no bound."""
    if scale_ub is not None:
        bound = scale_ub.reshape(())
        amax = torch.where(amax > bound, bound, amax)
    # By a tensor on the same device: PyTorch on CUDA replaces the division by a Python number with a product.
    scale = amax / torch.full_like(amax, FORMATS[dtype].max)
    smallest = torch.full_like(scale, min_scale(dtype))
    return torch.where(scale > smallest, scale, smallest)


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, so that no conversion can touch a NaN."""
    return x.view(torch.uint8 if x.dtype in FORMATS else _INTEGER[x.dtype])


def fail(op: str, sentence: str) -> NoReturn:
    raise RuntimeError(f"fp8kv.reference.{op}: {sentence}")
