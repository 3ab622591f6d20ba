"""What the tests share: comparison of bytes, hostile values, scales that trap shortcuts, memory layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import reference

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
#: All quantized formats.
QUANTIZED = FP8 | {"int8": torch.int8}
REAL = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

each_fp8 = pytest.mark.parametrize("fp8", FP8.values(), ids=FP8.keys())
each_quantized = pytest.mark.parametrize("fp8", QUANTIZED.values(), ids=QUANTIZED.keys())
each_strategy = pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
each_real = pytest.mark.parametrize("real", REAL.values(), ids=REAL.keys())


# Comparison


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, contiguous, on the CPU, with the bytes of an element as the last dimension."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    whole.copy_(tensor.detach())
    return whole.view(*whole.shape, 1).view(torch.uint8)


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit: no tolerance, NaN equal to the same NaN only, -0.0 not equal to 0.0."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    a, e = raw(actual), raw(expected)
    if torch.equal(a, e):
        return
    wrong = (a != e).any(-1)
    index = tuple(wrong.nonzero()[0].tolist())
    pytest.fail(
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first at {list(index)}: "
        f"got bytes {a[index].tolist()}, expected {e[index].tolist()}"
    )


# Values


def from_bits(bits: int | Sequence[int]) -> Tensor:
    """fp32 with these bit patterns."""
    unsigned = torch.tensor(bits, dtype=torch.int64)
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32).view(torch.float32)


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type, NaNs of all kinds included."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def all_fp8(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)


def random_bits(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Any bit patterns whatever."""
    generator = generator or torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1)


def values(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, specials: bool = True) -> Tensor:
    """Random over many binary orders; with `specials` one in 16 is a zero, a subnormal, infinite or NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator)
    x = x * torch.exp2(torch.randint(-12, 8, x.shape, generator=generator).float())
    if specials:
        kinds = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3e38])
        chosen = kinds[torch.randint(0, len(kinds), x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < 1 / 16, chosen, x)
    return x.to(dtype)


def random_scales(shape: Sequence[int], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.rand(tuple(shape), generator=generator) * 12 - 8)


def _trap_scale_bits() -> list[int]:
    extremes = [
        0x00000000, 0x80000000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000,  # 0, -1, inf, NaN
        0x00000001, 0x80000001, 0x000FFFFF, 0x007FFFFF,  # subnormal
        0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000,  # 2^-126 and 2^-125
        0x6F7FFFFF, 0x6F800000, 0x6F800001, 0x7F000000, 0x7F7FFFFF,  # 2^96, 2^127, the largest
        0x3FFFFFFF, 0x3F800001, 0x3EAAAAAB, 0x3B124925,
    ]  # fmt: skip
    # A product with the reciprocal goes wrong where the significand is just below a multiple of 2^20.
    below = [
        (exponent << 23) + multiple * (1 << 20) - k for exponent in (118, 127) for multiple in range(1, 9) for k in range(6)
    ]
    # The split reciprocal gives a wrong byte of INT8 for these.
    split = [
        0x3F91FFFF, 0x3FA3FFFE, 0x3FC3FFFE, 0x3FC7FFFE, 0x3FDFFFFD, 0x3FEBFFFD, 0x3FEC0002, 0x3FF7FFFD,
    ]  # fmt: skip
    return extremes + below + split


#: Scales for which shortcuts of the division give wrong bytes, and scales nobody should have.
TRAP_SCALES = from_bits(_trap_scale_bits())


def fp8_boundaries(dtype: torch.dtype) -> Tensor:
    """Where the rounding to a format changes, and every value of it: fp32, positive, increasing."""
    exact = all_fp8(dtype).float()
    exact = exact[exact.isfinite() & (exact >= 0) & ~torch.signbit(exact)].sort().values
    largest = exact[-1:]
    beyond = largest + (largest - exact[-2:-1]) / 2
    return torch.cat([exact, (exact[:-1] + exact[1:]) / 2, beyond]).sort().values


def neighbors(x: Tensor, reach: int) -> Tensor:
    """Each finite fp32 value with the `reach` values on either side of it: one more dimension."""
    bits = x.view(torch.int32).unsqueeze(-1) + torch.arange(-reach, reach + 1, dtype=torch.int32)
    return bits.view(torch.float32)


# Memory

#: Misaligned by every number of elements, 0 first.
OFFSETS = ("contiguous", *(f"offset {k}" for k in range(1, 8)))
LAYOUTS = (
    *OFFSETS,
    "transposed",
    "columns",  # of a wider buffer
    "rows",  # every second one
    "steps",  # every third column
    "inside",  # of a buffer wider in every dimension
)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_offset = pytest.mark.parametrize("offset", OFFSETS)
#: One of each kind that kernels tell apart: aligned rows without and with gaps, rows aligned to half a vector
#: and to nothing, misaligned steps from row to row, another order of dimensions, elements apart.
KINDS_OF_LAYOUTS = ("contiguous", "rows", "offset 4", "offset 1", "columns", "transposed", "steps")
#: The same, for one tensor whose contiguous form has other tests.
each_kind_of_layout = pytest.mark.parametrize("layout", [*KINDS_OF_LAYOUTS[1:], "inside"])


def sentinels(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Filled with a pattern of bytes that shows where something was written."""
    pattern = torch.full((*shape, dtype.itemsize), 0xA5, dtype=torch.uint8, device=device)
    return pattern.view(dtype).squeeze(-1)


def empty_view(shape: Sequence[int], dtype: torch.dtype, layout: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """A view of this shape and layout, and the buffer it lies in, filled with a pattern of bytes."""
    shape = tuple(shape)

    def buffer(*sizes: int) -> Tensor:
        return sentinels(sizes, dtype, device)

    if layout.startswith("offset"):
        offset = int(layout.split()[1])
        flat = buffer(math.prod(shape) + offset + 9)
        return flat[offset : offset + math.prod(shape)].view(shape), flat
    if layout == "contiguous" or not shape:
        whole = buffer(*shape)
        return whole, whole
    if layout == "transposed":
        whole = buffer(*reversed(shape))
        return whole.permute(*reversed(range(len(shape)))), whole
    if layout == "columns":
        whole = buffer(*shape[:-1], shape[-1] + 13)
        return whole[..., 5 : 5 + shape[-1]], whole
    if layout == "rows":
        whole = buffer(2 * shape[0], *shape[1:])
        return whole[::2], whole
    if layout == "steps":
        whole = buffer(*shape[:-1], 3 * shape[-1])
        return whole[..., ::3], whole
    if layout == "inside":
        whole = buffer(*(n + 3 for n in shape))
        return whole[tuple(slice(1, 1 + n) for n in shape)], whole
    raise ValueError(layout)


def placed(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """`x` on `device` in the given memory layout; "as given": permuted and expanded as `x` is."""
    if layout == "as given":
        source = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
        return source.to(device).expand(x.shape)
    view, _ = empty_view(x.shape, x.dtype, layout, device)
    copy_bits(view, x)
    return view


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Between tensors of one dtype; no conversion touches a NaN."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.dtype.itemsize]
    target.view(integer).copy_(source.view(integer))


# Paged caches

#: What elements of a cache are: kv_cache_dtype, dtype of the tensors, dtype of the elements.
FP8_CACHES = {
    "e4m3": ("fp8", torch.float8_e4m3fn, torch.float8_e4m3fn),
    "e4m3 in uint8": ("fp8_e4m3", torch.uint8, torch.float8_e4m3fn),
    "e5m2": ("fp8_e5m2", torch.float8_e5m2, torch.float8_e5m2),
    "e5m2 in uint8": ("fp8_e5m2", torch.uint8, torch.float8_e5m2),
}
QUANTIZED_CACHES = FP8_CACHES | {"int8": ("int8", torch.int8, torch.int8)}
PLAIN_CACHES = {
    "fp32": ("float32", torch.float32, torch.float32),
    "fp16": ("float16", torch.float16, torch.float16),
    "bf16": ("bfloat16", torch.bfloat16, torch.bfloat16),
    "auto fp32": ("auto", torch.float32, torch.float32),
    "auto fp16": ("auto", torch.float16, torch.float16),
    "auto bf16": ("auto", torch.bfloat16, torch.bfloat16),
}
#: Block size, heads, head size: every one that models use, heads of few bytes, and rows around a vector.
GEOMETRIES = [
    (16, 8, 128), (16, 2, 64), (1, 1, 1), (1, 8, 20), (32, 2, 80), (64, 1, 576), (256, 1, 96), (16, 32, 112),
    (32, 8, 120), (16, 2, 256), (64, 32, 1), (1, 32, 64), (256, 2, 1), (16, 1, 20), (32, 2, 5), (16, 8, 3),
    (64, 8, 96), (3, 2, 33), (16, 1, 128),
]  # fmt: skip
CACHE_LAYOUTS = (
    "NHD",
    "HND",
    "[2, nb] NHD",
    "[2, nb] HND",
    "[nb, 2] NHD",
    "[nb, 2] HND",
    "halves NHD",  # of the last dimension
    "halves HND",
    "NHD and wide HND",  # other strides for K than for V
    "steps",
    "transposed",
    *(f"offset {k}" for k in range(1, 8)),
)
#: One of each kind that kernels tell apart, as `KINDS_OF_LAYOUTS`; the wide one has rows apart.
KINDS_OF_CACHE_LAYOUTS = (
    "NHD",
    "[nb, 2] HND",
    "halves NHD",
    "NHD and wide HND",
    "offset 1",
    "transposed",
    "steps",
)
each_quantized_cache = pytest.mark.parametrize("cache", QUANTIZED.keys())
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
each_pair_of_kinds_of_layouts = pytest.mark.parametrize(
    ("layout", "cache_layout"),
    [(a, b) for a in KINDS_OF_LAYOUTS if a != "offset 4" for b in KINDS_OF_CACHE_LAYOUTS],
)
each_cache_layout = pytest.mark.parametrize("cache_layout", CACHE_LAYOUTS)
each_large_cache = pytest.mark.parametrize(
    ("blocks", "num_heads", "head_size"),
    [((131_072 + 100, 16), 8, 128), (((1 << 23) + 4, 256), 1, 1)],
    ids=["2^31 elements", "2^31 slots"],
)


def empty_caches(
    shape: Sequence[int], dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """K and V caches [num_blocks, block_size, heads, head_size], and the buffers they lie in: sentinels."""
    blocks, block_size, heads, size = shape
    inner = (heads, block_size) if layout.endswith("HND") else (block_size, heads)

    def logical(cache: Tensor) -> Tensor:
        return cache.transpose(1, 2) if layout.endswith("HND") else cache

    if layout in ("NHD", "HND"):
        buffers = [sentinels((blocks, *inner, size), dtype, device) for _ in "kv"]
        return logical(buffers[0]), logical(buffers[1]), buffers
    if layout == "NHD and wide HND":
        key = sentinels((blocks, block_size, heads, size), dtype, device)
        value = sentinels((blocks, *inner, size + 3), dtype, device)
        return key, logical(value[..., :size]), [key, value]
    if layout.startswith("halves"):
        buffer = sentinels((blocks, *inner, 2 * size), dtype, device)
        return logical(buffer[..., :size]), logical(buffer[..., size:]), [buffer]
    if layout.startswith("["):
        of_pair = 0 if layout.startswith("[2") else 1
        outer = (blocks, 2) if of_pair else (2, blocks)
        buffer = sentinels((*outer, *inner, size), dtype, device)
        key, value = buffer.unbind(of_pair)
        return logical(key), logical(value), [buffer]
    (key, key_buffer), (value, value_buffer) = (empty_view(shape, dtype, layout, device) for _ in "kv")
    return key, value, [key_buffer, value_buffer]


def compare_caches(
    device: torch.device,
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str,
    store: Callable[[ModuleType, Tensor, Tensor, torch.device], None],
) -> None:
    """`store(ops, key_cache, value_cache, device)`, once with the ops on `device`, once with the reference.

    Every byte of the caches and of what they lie in must be the same.
    """
    key_cache, value_cache, actual = empty_caches(shape, dtype, layout, device)
    store(fp8kv, key_cache, value_cache, device)
    key_cache, value_cache, expected = empty_caches(shape, dtype, layout, torch.device("cpu"))
    store(reference, key_cache, value_cache, torch.device("cpu"))
    for a, e in zip(actual, expected, strict=True):
        assert_same_bytes(a, e)


def key_and_value(
    tokens: int, num_heads: int, head_size: int, real: torch.dtype, specials: bool = True
) -> tuple[Tensor, Tensor]:
    shape = (tokens, num_heads, head_size)
    return values(shape, real, sum(shape), specials), values(shape, real, sum(shape) + 1, specials)


def random_slots(num_tokens: int, num_slots: int, seed: int = 0) -> Tensor:
    """int64, each slot once at most; one token in five, and those for which there is no slot, are skipped."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.full((num_tokens,), -1)
    count = min(num_tokens, num_slots)
    slots[:count] = torch.randperm(num_slots, generator=generator)[:count]
    slots[torch.randperm(num_tokens, generator=generator)[: num_tokens // 5]] = -7
    return slots[torch.randperm(num_tokens, generator=generator)]


def bad_slots(dtype: torch.dtype, num_slots: int) -> list[int]:
    """Slots beyond the cache, some of which become slots of it when they lose their upper bits."""
    large = [num_slots, num_slots + 5, (1 << 31) - 1]
    return large if dtype == torch.int32 else [*large, 1 << 31, (1 << 32) + 3, 5 << 40, (1 << 63) - 1]


# Surroundings


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_gpu_memory(device: torch.device, gigabytes: int) -> None:
    if torch.cuda.get_device_properties(device).total_memory < gigabytes * 10**9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")
