"""The executable specification: every operator in plain PyTorch, with the same names, arguments and bytes.

Slow and simple on purpose; it works on CPU and CUDA tensors and is what the tests compare every kernel with.
The rules are those of docs/numerics.md.

Example:
    >>> import torch, fp8kv
    >>> x = torch.randn(8, 64)
    >>> q, scale = fp8kv.quantize(x, group_shape=(1, -1))
    >>> expected, expected_scale = fp8kv.reference.quantize(x, group_shape=(1, -1))
    >>> torch.equal(q.view(torch.uint8), expected.view(torch.uint8)), torch.equal(scale, expected_scale)
    (True, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional
from torch import Tensor

__all__ = [
    "dequantize",
    "dynamic_scaled_fp8_quant",
    "gather_and_dequant_cache",
    "group_amax",
    "min_scale",
    "quantize",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_dynamic",
    "scaled_fp8_dequant",
    "static_scaled_fp8_quant",
]

NAN_BYTE = 0x7F
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_REAL = (torch.float32, torch.float16, torch.bfloat16)
_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_QUIET_NAN = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}
_INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
#: What `kv_cache_dtype` can be but "auto", and the elements of such a cache.
CACHE_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


# The rules, element by element


def encode(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest FP8 values of fp32 `values`, ties to even, saturating; NaN becomes the byte 0x7F."""
    limit = _MAX[dtype]
    nearest = values.clamp(-limit, limit).to(dtype).view(torch.uint8)
    return torch.where(values.isnan(), torch.full_like(nearest, NAN_BYTE), nearest).view(dtype)


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `values` rounded to `dtype`; NaN becomes the positive quiet NaN without payload."""
    rounded = values.to(dtype).view(_INTEGER[dtype])
    return torch.where(values.isnan(), torch.full_like(rounded, _QUIET_NAN[dtype]), rounded).view(dtype)


def finite_magnitude(values: Tensor) -> Tensor:
    """|values| in fp32, 0 for NaN and infinities."""
    magnitude = values.float().abs()
    return torch.where(magnitude.isfinite(), magnitude, torch.zeros_like(magnitude))


def min_scale(dtype: torch.dtype) -> float:
    """The smallest scale that is ever computed: 1 / (max * 512), rounded to fp32."""
    return torch.tensor(1.0 / (_MAX[dtype] * 512.0), dtype=torch.float32).item()


def dynamic_scale(amax: Tensor, dtype: torch.dtype, scale_ub: Tensor | None = None) -> Tensor:
    """The scales of groups whose largest finite magnitudes are `amax`. A NaN bound is no bound."""
    if scale_ub is not None:
        bound = scale_ub.reshape(())
        amax = torch.where(amax > bound, bound, amax)
    # By a tensor on the same device: PyTorch on CUDA replaces the division by a Python number with a product.
    scale = amax / torch.full_like(amax, _MAX[dtype])
    smallest = torch.full_like(scale, min_scale(dtype))
    return torch.where(scale > smallest, scale, smallest)


# Which elements share a scale


@dataclass(frozen=True)
class _Grid:
    """An input seen as `view_shape`, each dimension cut into `counts` groups of `blocks` elements."""

    shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    blocks: tuple[int, ...]
    counts: tuple[int, ...]

    def spread(self, scale: Tensor) -> Tensor:
        """The scale of every element: broadcasts to the input."""
        values = scale.reshape(self.counts)
        if math.prod(self.counts) == 1:
            return values.reshape(())
        for dim, (size, block, count) in enumerate(
            zip(self.view_shape, self.blocks, self.counts, strict=True)
        ):
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
        if not divides or any(
            size % count if count else size for size, count in zip(shape, counts, strict=True)
        ):
            _fail(
                op, f"{name} of shape {list(counts)} needs a group_shape for an input of shape {list(shape)}"
            )
        blocks = tuple(max(1, size // max(1, count)) for size, count in zip(shape, counts, strict=True))
        return _Grid(shape, shape, blocks, counts)

    if len(group_shape) != 2 or any(extent != -1 and extent < 1 for extent in group_shape):
        _fail(op, f"group_shape must have two extents, each -1 or at least 1, got {tuple(group_shape)}")
    blocks = tuple(
        max(1, size if extent == -1 else min(extent, size))
        for size, extent in zip(matrix, group_shape, strict=True)
    )
    counts = tuple(
        1 if extent == -1 else -(-size // block)
        for size, extent, block in zip(matrix, group_shape, blocks, strict=True)
    )
    if not _fits(tuple(scale.shape), shape, counts, one_row=group_shape[0] == 1):
        _fail(op, f"{name} must have the shape {list(counts)} or an equivalent one, got {list(scale.shape)}")
    return _Grid(shape, matrix, blocks, counts)


def _fits(
    scale_shape: tuple[int, ...], shape: tuple[int, ...], counts: tuple[int, ...], one_row: bool
) -> bool:
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


# The operators


@torch.no_grad()
def static_scaled_fp8_quant(
    result: Tensor, input: Tensor, scale: Tensor, group_shape: Sequence[int] | None = None
) -> None:
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
        _fail(
            op, f"scale_ub must be float32 with 1 element, got {scale_ub.dtype}, shape {list(scale_ub.shape)}"
        )
    grid = _grid(op, "scale", scale, input, group_shape)
    scale.copy_(dynamic_scale(grid.amax(input), result.dtype, scale_ub).reshape(scale.shape))
    _write(result, encode(input.float() / grid.spread(scale), result.dtype))


@torch.no_grad()
def scaled_fp8_dequant(
    result: Tensor, input: Tensor, scale: Tensor, group_shape: Sequence[int] | None = None
) -> None:
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
    """See `fp8kv.group_amax`. The maximum is that of the fp32 bit patterns as signed integers.

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
            raise ValueError(
                "fp8kv.quantize: scale_ub must be None when a scale is given, as it bounds computed scales"
            )
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
    rows, cols = (
        1 if extent < 1 else math.ceil(size / extent) for size, extent in zip(sizes, group_shape, strict=True)
    )
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


# The paged KV cache: the slots of all blocks are numbered, and K and V are treated alike


@torch.no_grad()
def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """See `fp8kv.reshape_and_cache_flash`. The same slot twice: the last token stays, on CUDA as well.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> caches = torch.zeros(2, 3, 2, 1, 2, dtype=torch.float8_e4m3fn)  # K and V, 3 blocks of 2 slots
        >>> x, one = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.ones(1)
        >>> reference.reshape_and_cache_flash(x, -x, *caches, torch.tensor([5, -1]), "fp8", one, one)
        >>> caches[0, 2, 1].tolist(), caches[1, 2, 1].tolist()
        ([[1.0, 2.0]], [[-1.0, -2.0]])
    """
    op = "reshape_and_cache_flash"
    caches = _caches(op, key, value, key_cache, value_cache, kv_cache_dtype)
    num_heads = key_cache.shape[2]
    scales = [_scale_of_heads(op, scale, num_heads) for scale in (k_scale, v_scale)]
    tokens, place = _appended(op, key, value, caches[0], slot_mapping)
    for heads, cache, scale in zip((key, value), caches, scales, strict=True):
        x = heads[tokens]
        q = encode(x.float() / scale, cache.dtype) if cache.dtype in _FP8 else _converted(x, cache.dtype)
        _bits(cache)[place] = _bits(q)


@torch.no_grad()
def reshape_and_cache_flash_dynamic(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
) -> None:
    """See `fp8kv.reshape_and_cache_flash_dynamic`. The same slot twice: the last token stays.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> caches, scales = torch.zeros(2, 1, 4, 1, 2, dtype=torch.float8_e4m3fn), torch.zeros(2, 1, 4, 1)
        >>> x = torch.tensor([[[1.0, -7.0]]])
        >>> reference.reshape_and_cache_flash_dynamic(x, 2 * x, *caches, *scales, torch.tensor([3]), "fp8")
        >>> caches[0, 0, 3].tolist(), scales[:, 0, 3].tolist()
        ([[64.0, -448.0]], [[0.015625], [0.03125]])
    """
    op = "reshape_and_cache_flash_dynamic"
    caches = _caches(op, key, value, key_cache, value_cache, kv_cache_dtype)
    if caches[0].dtype not in _FP8:
        _fail(op, f"kv_cache_dtype must be one of FP8, got {kv_cache_dtype!r}")
    scale_caches = (k_scale_cache, v_scale_cache)
    for scale_cache in scale_caches:
        if scale_cache.dtype != torch.float32 or scale_cache.shape != key_cache.shape[:3]:
            _fail(op, f"scale caches must be float32 of shape {list(key_cache.shape[:3])}")
    tokens, place = _appended(op, key, value, caches[0], slot_mapping)
    for heads, cache, scale_cache in zip((key, value), caches, scale_caches, strict=True):
        x = heads[tokens]
        if x.numel() == 0:
            continue
        scale = dynamic_scale(finite_magnitude(x).amax(-1), cache.dtype)
        scale_cache[place] = scale
        _bits(cache)[place] = _bits(encode(x.float() / scale.unsqueeze(-1), cache.dtype))


@torch.no_grad()
def gather_and_dequant_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    seq_starts: Tensor | None = None,
) -> None:
    """See `fp8kv.gather_and_dequant_cache`.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> cache = torch.arange(6.0).view(3, 2, 1, 1)  # 3 blocks of 2 slots
        >>> key, value, scale = torch.empty(3, 1, 1), torch.empty(3, 1, 1), torch.ones(1)
        >>> table, sums = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
        >>> reference.gather_and_dequant_cache(cache, -cache, key, value, table, sums, "auto", scale, scale)
        >>> key.flatten().tolist(), value.flatten().tolist()
        ([4.0, 5.0, 0.0], [-4.0, -5.0, -0.0])
    """
    op = "gather_and_dequant_cache"
    caches = _caches(op, key, value, key_cache, value_cache, kv_cache_dtype)
    num_heads = key_cache.shape[2]
    scales = [
        scale.unsqueeze(-1)
        if scale.numel() != 1 and scale.shape == key_cache.shape[:3] and scale.dtype == torch.float32
        else _scale_of_heads(op, scale, num_heads).expand(*key_cache.shape[:3], 1)
        for scale in (k_scale, v_scale)
    ]
    rows, place = _gathered(op, caches[0], key, value, block_table, cu_seq_lens, seq_starts)
    for cache, heads, scale in zip(caches, (key, value), scales, strict=True):
        q = _bits(cache)[place].view(cache.dtype)
        fp8 = cache.dtype in _FP8
        x = round_to(q.float() * scale[place], heads.dtype) if fp8 else _converted(q, heads.dtype)
        _bits(heads)[rows] = _bits(x)


@torch.no_grad()
def rope_quant_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_out: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    is_neox: bool = True,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """See `fp8kv.rope_quant_and_cache`.

    Example:
        >>> import torch
        >>> from fp8kv import reference
        >>> caches, q = torch.zeros(2, 1, 4, 1, 2, dtype=torch.float8_e4m3fn), torch.empty(1, 1, 2)
        >>> x, one = torch.tensor([[[1.0, 2.0]]]), torch.ones(1)
        >>> quarter_turn = torch.tensor([[0.0, 1.0]])  # the cosine and the sine of position 0
        >>> reference.rope_quant_and_cache(
        ...     x, x, x, q, *caches, torch.tensor([3]), "fp8", one, one, one, torch.tensor([0]), quarter_turn)
        >>> q.tolist(), caches[0, 0, 3].tolist(), caches[1, 0, 3].tolist()
        ([[[-2.0, 1.0]]], [[-2.0, 1.0]], [[1.0, 2.0]])
    """
    op = "rope_quant_and_cache"
    num_tokens, num_heads, head_size = len(slot_mapping), query.shape[1], query.shape[2]
    if query_out.shape[1:] != query.shape[1:] or min(len(query), len(query_out)) < num_tokens:
        _fail(op, f"query and query_out must be [{num_tokens} or more, {num_heads}, {head_size}]")
    if query.dtype != key.dtype or query.shape[2] != key.shape[2] or num_heads % max(1, key.shape[1]):
        _fail(op, f"query can't be {query.dtype} of shape {list(query.shape)}")
    if q_scale.dtype != torch.float32 or q_scale.numel() not in (1, key.shape[1], num_heads):
        _fail(op, f"q_scale can't be {q_scale.dtype} of shape {list(q_scale.shape)}")
    for weight in (q_norm_weight, k_norm_weight):
        if weight is not None and weight.shape != (head_size,):
            _fail(op, f"norm weights must be [{head_size}], got {list(weight.shape)}")
    format = CACHE_DTYPES.get(kv_cache_dtype)
    out = query_out.view(format) if query_out.dtype == torch.uint8 and format in _FP8 else query_out
    if out.dtype not in _REAL and (out.dtype != format or format not in _FP8):
        _fail(op, f"query_out can't be {query_out.dtype} with kv_cache_dtype {kv_cache_dtype!r}")

    cos_sin, slots, rows = None, slot_mapping, torch.arange(num_tokens, device=query.device)
    if positions is not None or cos_sin_cache is not None:
        if positions is None or cos_sin_cache is None or len(positions) < num_tokens:
            _fail(op, f"positions must have {num_tokens} elements and come with cos_sin_cache")
        if cos_sin_cache.shape[1] % 2 or not 2 <= cos_sin_cache.shape[1] <= head_size:
            _fail(op, f"rotary_dim must be even and at most {head_size}, got {cos_sin_cache.shape[1]}")
        where = positions[:num_tokens].long()
        inside = (where >= 0) & (where < len(cos_sin_cache))
        if query.device.type == "cpu" and not inside.all():
            _fail(op, f"positions must be from 0 to {len(cos_sin_cache) - 1}")
        rows, slots = rows[inside], torch.where(inside, slot_mapping, -1)
        cos_sin = torch.zeros(num_tokens, cos_sin_cache.shape[1], device=query.device)
        cos_sin[inside] = cos_sin_cache[where[inside]].float()

    key = _transformed(key[:num_tokens], k_norm_weight, norm_eps, cos_sin, is_neox)
    query = _transformed(query[:num_tokens], q_norm_weight, norm_eps, cos_sin, is_neox)[rows]
    reshape_and_cache_flash(key, value, key_cache, value_cache, slots, kv_cache_dtype, k_scale, v_scale)
    if out.dtype in _FP8:
        scale = q_scale.reshape(-1, 1).repeat_interleave(num_heads // max(1, q_scale.numel()), 0)
        _bits(out)[rows] = _bits(encode(query.float() / scale, out.dtype))
    else:
        _bits(out)[rows] = _bits(_converted(query, out.dtype))


def _transformed(
    x: Tensor, weight: Tensor | None, norm_eps: float, cos_sin: Tensor | None, is_neox: bool
) -> Tensor:
    """RMSNorm of each head, then RoPE, in fp32 with one rounding."""
    if weight is None and cos_sin is None:
        return x
    y = x.float()
    if weight is not None:
        count = torch.tensor(float(x.shape[-1]), device=x.device)
        mean = (y * y).sum(-1, keepdim=True) / count
        y = y * (torch.ones_like(mean) / (mean + norm_eps).sqrt()) * weight.float()
    if cos_sin is not None:
        y = y.clone()
        cos, sin = cos_sin.unsqueeze(1).chunk(2, -1)
        pairs = y[..., : cos_sin.shape[1]]
        a, b = pairs.chunk(2, -1) if is_neox else (pairs[..., ::2], pairs[..., 1::2])
        first, second = a * cos - b * sin, b * cos + a * sin
        a.copy_(first)
        b.copy_(second)
    return round_to(y, x.dtype)


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain copy: the bits as they are, or one rounding."""
    return x if x.dtype == dtype else round_to(x.float(), dtype)


def _scale_of_heads(op: str, scale: Tensor, num_heads: int) -> Tensor:
    """[1, 1] or [num_heads, 1]."""
    if scale.dtype != torch.float32 or scale.numel() not in (1, num_heads):
        _fail(op, f"scales must be float32 with 1 or {num_heads} elements, got {scale.dtype}, {scale.shape}")
    return scale.reshape(-1, 1)


def _appended(
    op: str, key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The tokens that stay in the cache, and their places."""
    slots = slot_mapping.tolist()
    num_slots = cache.shape[0] * cache.shape[1]
    if min(len(key), len(value)) < len(slots):
        _fail(op, f"key and value must have a row for each of {len(slots)} slots")
    if cache.device.type == "cpu" and any(slot >= num_slots for slot in slots):
        _fail(op, f"slots must be below {num_slots}")
    token_of = {slot: token for token, slot in enumerate(slots) if 0 <= slot < num_slots}
    tokens = torch.tensor([*token_of.values()], dtype=torch.int64, device=cache.device)
    return tokens, _place([*token_of], cache)


def _gathered(
    op: str,
    cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    seq_starts: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The rows that are written, and the places they come from."""
    num_blocks, block_size = cache.shape[:2]
    num_seqs, max_blocks = block_table.shape
    num_rows = len(key)
    if len(value) != num_rows or len(cu_seq_lens) != num_seqs + 1:
        _fail(op, "value must have the rows of key, cu_seq_lens an element more than block_table has rows")
    sums, table = cu_seq_lens.tolist(), block_table.tolist()
    starts = [0] * num_seqs if seq_starts is None else seq_starts.tolist()
    raises = cache.device.type == "cpu"
    if raises and (sums[0] != 0 or sums != sorted(sums) or sums[-1] > num_rows):
        _fail(op, f"cu_seq_lens must rise from 0 to at most {num_rows}, the rows of key, got {sums}")
    rows, slots = [], []
    for s in range(num_seqs):
        for row in range(max(sums[s], 0), min(sums[s + 1], num_rows)):
            position = starts[s] + row - sums[s]
            in_table = starts[s] >= 0 and 0 <= position < max_blocks * block_size
            block = table[s][position // block_size] if in_table else -1
            if 0 <= block < num_blocks:
                rows.append(row)
                slots.append(block * block_size + position % block_size)
            elif raises:
                _fail(op, f"block_table has no block of the cache for position {position} of sequence {s}")
    return torch.tensor(rows, dtype=torch.int64, device=cache.device), _place(slots, cache)


def _place(slots: list[int], cache: Tensor) -> tuple[Tensor, Tensor]:
    """Block and offset of each slot."""
    index = torch.tensor(slots, dtype=torch.int64, device=cache.device)
    block_size = max(1, cache.shape[1])
    return index // block_size, index % block_size


# Checks: the least that keeps a wrong call from giving a result


def _check(op: str, *, input: Tensor, result: Tensor | None, scale: Tensor, quantizes: bool) -> None:
    if input.dtype not in (_REAL if quantizes else _FP8):
        _fail(op, f"input can't be {input.dtype}")
    if scale.dtype != torch.float32:
        _fail(op, f"scales must be float32, got {scale.dtype}")
    if scale.device != input.device:
        _fail(op, f"scales must be on the device of input, {input.device}, got {scale.device}")
    if result is None:
        return
    if result.dtype not in (_FP8 if quantizes else _REAL):
        _fail(op, f"result can't be {result.dtype}")
    if result.device != input.device or result.shape != input.shape:
        _fail(op, f"result must have the device and shape of input, {input.device} and {list(input.shape)}")


def _caches(
    op: str, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, kv_cache_dtype: str
) -> tuple[Tensor, Tensor]:
    """The caches as tensors of the dtype that kv_cache_dtype says."""
    if key.dtype not in _REAL or value.dtype != key.dtype:
        _fail(op, f"key and value can't be {key.dtype} and {value.dtype}")
    if key_cache.dim() != 4 or value_cache.shape != key_cache.shape:
        _fail(op, f"caches can't have the shapes {list(key_cache.shape)} and {list(value_cache.shape)}")
    if key.shape[1:] != key_cache.shape[2:] or value.shape[1:] != key_cache.shape[2:]:
        _fail(op, f"key and value must be [num_tokens, {key_cache.shape[2]}, {key_cache.shape[3]}]")
    actual = key_cache.dtype
    dtype = actual if kv_cache_dtype == "auto" and actual in _REAL else CACHE_DTYPES.get(kv_cache_dtype)
    if dtype is None or (actual != dtype and not (actual == torch.uint8 and dtype in _FP8)):
        _fail(op, f"caches can't be {actual} with kv_cache_dtype {kv_cache_dtype!r}")
    if value_cache.dtype != actual:
        _fail(op, f"caches must have one dtype, got {actual} and {value_cache.dtype}")
    return key_cache.view(dtype), value_cache.view(dtype)


def _fail(op: str, sentence: str) -> NoReturn:
    raise RuntimeError(f"fp8kv.reference.{op}: {sentence}")


def _write(result: Tensor, values: Tensor) -> None:
    _bits(result).copy_(_bits(values))


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers, so that no conversion can touch a NaN."""
    return x.view(torch.uint8 if x.dtype in _FP8 else _INTEGER[x.dtype])
