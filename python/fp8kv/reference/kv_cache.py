"""The operators of the paged KV cache in plain PyTorch: slots are numbered, and K and V are treated alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8kv._dtypes import CACHE_DTYPES, FORMATS, FP8_DTYPES, REAL_DTYPES
from fp8kv.reference.rules import bits, dynamic_scale, encode, fail, finite_magnitude, round_to


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
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    v_cache_dtype: str | None = None,
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
    caches = _caches(op, key_cache, value_cache, kv_cache_dtype, v_cache_dtype)
    rows = [_stored(x, cache) for x, cache in zip((key, value), caches, strict=True)]
    _check_rows(op, rows, caches, or_stored=True)
    scales = [_scale_of_channels(op, *pair) for pair in zip((k_scale, v_scale), caches, strict=True)]
    offsets = [_offset_of_channels(op, *pair) for pair in zip((k_offset, v_offset), caches, strict=True)]
    tokens, place = _appended(op, key, value, caches[0], slot_mapping)
    for heads, cache, scale, offset in zip(rows, caches, scales, offsets, strict=True):
        x = bits(heads)[tokens].view(heads.dtype)
        quantizes = cache.dtype in FORMATS and heads.dtype != cache.dtype
        q = encode(_less(x, offset) / scale, cache.dtype) if quantizes else _converted(x, cache.dtype)
        bits(cache)[place] = bits(q)


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
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    v_cache_dtype: str | None = None,
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
    caches = _caches(op, key_cache, value_cache, kv_cache_dtype, v_cache_dtype)
    _check_rows(op, (key, value), caches)
    if any(cache.dtype not in FORMATS for cache in caches):
        fail(op, f"caches must be of quantized formats, got {kv_cache_dtype!r} and {v_cache_dtype!r}")
    scale_caches = (k_scale_cache, v_scale_cache)
    for scale_cache in scale_caches:
        if scale_cache.dtype != torch.float32 or scale_cache.shape != key_cache.shape[:3]:
            fail(op, f"scale caches must be float32 of shape {list(key_cache.shape[:3])}")
    offsets = [_offset_of_channels(op, *pair) for pair in zip((k_offset, v_offset), caches, strict=True)]
    tokens, place = _appended(op, key, value, caches[0], slot_mapping)
    for heads, cache, scale_cache, offset in zip((key, value), caches, scale_caches, offsets, strict=True):
        x = _less(heads[tokens], offset)
        if x.numel() == 0:
            continue
        scale = dynamic_scale(finite_magnitude(x).amax(-1), cache.dtype)
        scale_cache[place] = scale
        bits(cache)[place] = bits(encode(x / scale.unsqueeze(-1), cache.dtype))


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
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    v_cache_dtype: str | None = None,
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
    caches = _caches(op, key_cache, value_cache, kv_cache_dtype, v_cache_dtype)
    _check_rows(op, (key, value), caches)
    scales = [
        scale.unsqueeze(-1)
        if scale.numel() != 1 and scale.shape == cache.shape[:3] and scale.dtype == torch.float32
        else _scale_of_channels(op, scale, cache).expand(cache.shape)
        for scale, cache in zip((k_scale, v_scale), caches, strict=True)
    ]
    offsets = [_offset_of_channels(op, *pair) for pair in zip((k_offset, v_offset), caches, strict=True)]
    rows, place = _gathered(op, caches[0], key, value, block_table, cu_seq_lens, seq_starts)
    for cache, heads, scale, offset in zip(caches, (key, value), scales, offsets, strict=True):
        q = bits(cache)[place].view(cache.dtype)
        if cache.dtype in FORMATS:
            x = q.float() * scale[place]
            x = round_to(x if offset is None else x + offset, heads.dtype)
        else:
            x = _converted(q, heads.dtype)
        bits(heads)[rows] = bits(x)


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
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    norm_after_rope: bool = False,
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
        fail(op, f"query and query_out must be [{num_tokens} or more, {num_heads}, {head_size}]")
    if query.dtype != key.dtype or query.shape[2] != key.shape[2] or num_heads % max(1, key.shape[1]):
        fail(op, f"query can't be {query.dtype} of shape {list(query.shape)}")
    if q_scale.dtype != torch.float32 or q_scale.numel() not in (1, key.shape[1], num_heads):
        fail(op, f"q_scale can't be {q_scale.dtype} of shape {list(q_scale.shape)}")
    for weight in (q_norm_weight, k_norm_weight):
        if weight is not None and weight.shape != (head_size,):
            fail(op, f"norm weights must be [{head_size}], got {list(weight.shape)}")
    format = CACHE_DTYPES.get(kv_cache_dtype)
    out = query_out.view(format) if query_out.dtype == torch.uint8 and format in FP8_DTYPES else query_out
    if out.dtype not in REAL_DTYPES and (out.dtype != format or format not in FP8_DTYPES):
        fail(op, f"query_out can't be {query_out.dtype} with kv_cache_dtype {kv_cache_dtype!r}")

    cos_sin, slots, rows = None, slot_mapping, torch.arange(num_tokens, device=query.device)
    if positions is not None or cos_sin_cache is not None:
        if positions is None or cos_sin_cache is None or positions.shape[-1] < num_tokens:
            fail(op, f"positions must have {num_tokens} elements and come with cos_sin_cache")
        if cos_sin_cache.shape[1] % 2 or not 2 <= cos_sin_cache.shape[1] <= head_size:
            fail(op, f"rotary_dim must be even and at most {head_size}, got {cos_sin_cache.shape[1]}")
        axes = _axes_of_frequencies(op, positions, cos_sin_cache.shape[1] // 2, mrope_section, mrope_interleaved)
        where = (positions if positions.dim() == 2 else positions.unsqueeze(0))[:, :num_tokens].long()
        inside = ((where >= 0) & (where < len(cos_sin_cache))).all(0)
        if query.device.type == "cpu" and not inside.all():
            fail(op, f"positions must be from 0 to {len(cos_sin_cache) - 1}")
        rows, slots = rows[inside], torch.where(inside, slot_mapping, -1)
        cos_sin = torch.zeros(num_tokens, cos_sin_cache.shape[1], device=query.device)
        for axis, positions_of_axis in enumerate(where):
            columns = torch.tensor(axes * 2, device=query.device) == axis  # cosines, then sines
            found = cos_sin_cache[positions_of_axis[inside]].float()
            cos_sin[inside] = torch.where(columns, found, cos_sin[inside])
    elif mrope_section is not None:
        fail(op, "mrope_section must come with positions")

    rope = (cos_sin, is_neox, norm_after_rope)
    key = _transformed(key[:num_tokens], k_norm_weight, norm_eps, *rope)
    query = _transformed(query[:num_tokens], q_norm_weight, norm_eps, *rope)[rows]
    reshape_and_cache_flash(key, value, key_cache, value_cache, slots, kv_cache_dtype, k_scale, v_scale, k_offset, v_offset)
    if out.dtype in FORMATS:
        scale = q_scale.reshape(-1, 1).repeat_interleave(num_heads // max(1, q_scale.numel()), 0)
        bits(out)[rows] = bits(encode(query.float() / scale, out.dtype))
    else:
        bits(out)[rows] = bits(_converted(query, out.dtype))


def _axes_of_frequencies(op: str, positions: Tensor, count: int, section: Sequence[int] | None, interleaved: bool) -> list[int]:
    """For each frequency, the row of positions that it takes: 0, or time, height and width as 0, 1 and 2."""
    if section is None:
        if positions.dim() != 1:
            fail(op, f"positions must be [num_tokens] without mrope_section, got {list(positions.shape)}")
        return [0] * count
    if len(section) != 3 or min(section) < 0 or sum(section) != count:
        fail(op, f"mrope_section must be three lengths with the sum {count}, got {list(section)}")
    if positions.dim() != 2 or len(positions) != 3:
        fail(op, f"positions must be [3, num_tokens] with mrope_section, got {list(positions.shape)}")
    if interleaved:
        return [i % 3 if i < 3 * section[i % 3] else 0 for i in range(count)]
    return [axis for axis in range(3) for _ in range(section[axis])]


def _transformed(
    x: Tensor, weight: Tensor | None, norm_eps: float, cos_sin: Tensor | None, is_neox: bool, norm_after_rope: bool
) -> Tensor:
    """RMSNorm of each head and RoPE, in fp32 with one rounding."""
    if weight is None and cos_sin is None:
        return x
    y = x.float()
    if not norm_after_rope:
        y = _normalized(y, weight, norm_eps)
    if cos_sin is not None:
        y = y.clone()
        cos, sin = cos_sin.unsqueeze(1).chunk(2, -1)
        pairs = y[..., : cos_sin.shape[1]]
        a, b = pairs.chunk(2, -1) if is_neox else (pairs[..., ::2], pairs[..., 1::2])
        first, second = a * cos - b * sin, b * cos + a * sin
        a.copy_(first)
        b.copy_(second)
    if norm_after_rope:
        y = _normalized(y, weight, norm_eps)
    return round_to(y, x.dtype)


def _normalized(x: Tensor, weight: Tensor | None, norm_eps: float) -> Tensor:
    """RMSNorm of each head in fp32; None: as it is."""
    if weight is None:
        return x
    count = torch.tensor(float(x.shape[-1]), device=x.device)
    mean = (x * x).sum(-1, keepdim=True) / count
    return x * (torch.ones_like(mean) / (mean + norm_eps).sqrt()) * weight.float()


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain copy: the bits as they are, or one rounding."""
    return x if x.dtype == dtype else round_to(x.float(), dtype)


def _less(x: Tensor, offset: Tensor | None) -> Tensor:
    """In fp32."""
    return x.float() if offset is None else x.float() - offset


def _scale_of_channels(op: str, scale: Tensor, cache: Tensor) -> Tensor:
    """[1, 1], [num_heads, 1] or [num_heads, head_size]."""
    num_heads, head_size = cache.shape[2:]
    if scale.dtype == torch.float32 and scale.shape == (num_heads, head_size):
        return scale
    if scale.dtype != torch.float32 or scale.numel() not in (1, num_heads):
        fail(op, f"scales can't be {scale.dtype} of shape {list(scale.shape)}")
    return scale.reshape(-1, 1)


def _offset_of_channels(op: str, offset: Tensor | None, cache: Tensor) -> Tensor | None:
    if offset is not None and (offset.dtype != torch.float32 or offset.shape != cache.shape[2:] or cache.dtype not in FORMATS):
        fail(op, f"offsets can't be {offset.dtype} of shape {list(offset.shape)} with {cache.dtype} caches")
    return offset


def _appended(op: str, key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The tokens that stay in the cache, and their places."""
    slots = slot_mapping.tolist()
    num_slots = cache.shape[0] * cache.shape[1]
    if min(len(key), len(value)) < len(slots):
        fail(op, f"key and value must have a row for each of {len(slots)} slots")
    if cache.device.type == "cpu" and any(slot >= num_slots for slot in slots):
        fail(op, f"slots must be below {num_slots}")
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
        fail(op, "value must have the rows of key, cu_seq_lens an element more than block_table has rows")
    sums, table = cu_seq_lens.tolist(), block_table.tolist()
    starts = [0] * num_seqs if seq_starts is None else seq_starts.tolist()
    raises = cache.device.type == "cpu"
    if raises and (sums[0] != 0 or sums != sorted(sums) or sums[-1] > num_rows):
        fail(op, f"cu_seq_lens must rise from 0 to at most {num_rows}, the rows of key, got {sums}")
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
                fail(op, f"block_table has no block of the cache for position {position} of sequence {s}")
    return torch.tensor(rows, dtype=torch.int64, device=cache.device), _place(slots, cache)


def _place(slots: list[int], cache: Tensor) -> tuple[Tensor, Tensor]:
    """Block and offset of each slot."""
    index = torch.tensor(slots, dtype=torch.int64, device=cache.device)
    block_size = max(1, cache.shape[1])
    return index // block_size, index % block_size


# Checks: the least that keeps a wrong call from giving a result


def _caches(
    op: str, key_cache: Tensor, value_cache: Tensor, kv_cache_dtype: str, v_cache_dtype: str | None
) -> tuple[Tensor, Tensor]:
    """The caches as tensors of the dtypes that these names say."""
    shapes = key_cache.shape, value_cache.shape
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:3] != shapes[1][:3]:
        fail(op, f"caches can't have the shapes {list(shapes[0])} and {list(shapes[1])}")
    if v_cache_dtype is None and value_cache.dtype != key_cache.dtype:
        fail(op, f"caches must have one dtype without v_cache_dtype, got {key_cache.dtype} and {value_cache.dtype}")
    return (
        _as_named(op, key_cache, kv_cache_dtype),
        _as_named(op, value_cache, kv_cache_dtype if v_cache_dtype is None else v_cache_dtype),
    )


def _as_named(op: str, cache: Tensor, name: str) -> Tensor:
    actual = cache.dtype
    dtype = actual if name == "auto" and actual in REAL_DTYPES else CACHE_DTYPES.get(name)
    if dtype is None or (actual != dtype and not (actual == torch.uint8 and dtype in FP8_DTYPES)):
        fail(op, f"caches can't be {actual} with kv_cache_dtype {name!r}")
    return cache.view(dtype)


def _stored(rows: Tensor, cache: Tensor) -> Tensor:
    """Rows that may be uint8 for FP8."""
    return rows.view(cache.dtype) if rows.dtype == torch.uint8 and cache.dtype in FP8_DTYPES else rows


def _check_rows(op: str, rows: Sequence[Tensor], caches: Sequence[Tensor], or_stored: bool = False) -> None:
    """`or_stored`: rows may be quantized as their cache is."""
    for x, cache in zip(rows, caches, strict=True):
        if x.dtype not in REAL_DTYPES and not (or_stored and x.dtype in FORMATS and x.dtype == cache.dtype):
            fail(op, f"key and value can't be {rows[0].dtype} and {rows[1].dtype}")
        if x.shape[1:] != cache.shape[2:]:
            fail(op, f"key and value must be [num_tokens, {cache.shape[2]}, {cache.shape[3]}], got {list(x.shape)}")
    if len({x.dtype for x in rows if x.dtype in REAL_DTYPES}) > 1:
        fail(op, f"key and value can't be {rows[0].dtype} and {rows[1].dtype}")
