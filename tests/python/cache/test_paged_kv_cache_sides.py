"""`PagedKVCache` with K and V of two head sizes or dtypes, and without V."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kv import PagedKVCache, reference
from fp8kv.kv_cache.clipping import Clipped
from fp8kv.kv_cache.paged import as_stored, gather_rows
from helpers import QUANTIZED, assert_same_bytes, random_bits, random_scales, random_slots, values

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS, BLOCK_SIZE, HEADS, TOKENS = 6, 5, 3, 21
#: Head sizes, and the other options of a cache.
CACHES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "24 and 16": ((24, 16), {}),
    "16 and 24 e5m2": ((16, 24), {"dtype": "fp8_e5m2"}),
    "odd": ((7, 3), {"dtype": "int8"}),
    "bf16 and fp8": ((24, 24), {"dtype": "bfloat16", "v_dtype": "fp8"}),
    "fp8 and fp32, odd": ((5, 9), {"dtype": E4M3, "v_dtype": torch.float32}),
    "e4m3 and e5m2": ((16, 16), {"v_dtype": "fp8_e5m2"}),
    "int8 and fp8 of two sizes": ((24, 8), {"dtype": "int8", "v_dtype": "fp8"}),
    "fp16 of two sizes": ((6, 4), {"dtype": "float16"}),
    "without V": ((40, 0), {}),
}
each_cache = pytest.mark.parametrize("kind", CACHES)
each_layout = pytest.mark.parametrize("layout", ["NHD", "HND"])
DYNAMIC = [kind for kind in CACHES if not {"bf16", "fp32,", "fp16"} & set(kind.split())]


def make(device: torch.device, kind: str, **options: Any) -> PagedKVCache:
    (k_size, v_size), given = CACHES[kind]
    return PagedKVCache(BLOCKS, BLOCK_SIZE, HEADS, k_size, v_head_size=v_size, device=device, **given | options)


def rows_of(cache: PagedKVCache, tokens: int = TOKENS, real: torch.dtype = torch.bfloat16) -> list[Tensor]:
    sizes = (cache.head_size, cache.v_head_size)
    return [values((tokens, HEADS, size), real, seed).to(cache.device) for seed, size in enumerate(sizes)]


def reference_append(
    cache: PagedKVCache, rows: list[Tensor], slots: Tensor, scales: list[Tensor], *offsets: Tensor | None
) -> list[Tensor]:
    """K and V caches on the CPU, of zeros before."""
    shapes = [(*cache.key_cache.shape[:3], x.shape[2]) for x in rows]
    caches = [torch.zeros(s, dtype=d) for s, d in zip(shapes, (cache.dtype, cache.v_dtype), strict=True)]
    key, value = (x.cpu() for x in rows)
    names = cache.kv_cache_dtype, cache.v_cache_dtype
    if cache.dynamic:
        reference.reshape_and_cache_flash_dynamic(key, value, *caches, *scales, slots, names[0], v_cache_dtype=names[1])
    else:
        reference.reshape_and_cache_flash(key, value, *caches, slots, names[0], *scales, *offsets, v_cache_dtype=names[1])
    return caches


def assert_holds(cache: PagedKVCache, caches: list[Tensor]) -> None:
    assert_same_bytes(cache.key_cache, caches[0])
    assert_same_bytes(cache.value_cache, caches[1])


# Append and gather


@each_cache
@each_layout
def test_append_and_gather(device: torch.device, kind: str, layout: str) -> None:
    cache = make(device, kind, layout=layout, scales=None)
    slots, rows = random_slots(TOKENS, BLOCKS * BLOCK_SIZE), rows_of(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is clipped has a test below
        cache.append(rows[0], rows[1] if cache.v_head_size else None, slots.to(device))
    caches = reference_append(cache, rows, slots, [torch.ones(1)] * 2)
    assert_holds(cache, caches)

    table = torch.tensor([[3, 1], [5, 0]], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        actual = cache.gather(table, [7, 4], dtype, seq_starts=[1, 5])
        expected = [torch.empty(11, HEADS, x.shape[2], dtype=dtype) for x in rows]
        sums, starts = (torch.tensor(x, dtype=torch.int32) for x in ([0, 7, 11], [1, 5]))
        reference.gather_and_dequant_cache(
            *caches, *expected, table, sums, cache.kv_cache_dtype, torch.ones(1), torch.ones(1), starts,
            v_cache_dtype=cache.v_cache_dtype,
        )  # fmt: skip
        for a, e in zip(actual, expected, strict=True):
            assert_same_bytes(a, e)


@pytest.mark.parametrize("kind", DYNAMIC)
@each_layout
def test_dynamic_scales(device: torch.device, kind: str, layout: str) -> None:
    cache = make(device, kind, layout=layout, scales="dynamic")
    slots, rows = random_slots(TOKENS, BLOCKS * BLOCK_SIZE), rows_of(cache)
    cache.append(rows[0], rows[1] if cache.v_head_size else None, slots.to(device))
    scales = [torch.zeros(BLOCKS, BLOCK_SIZE, HEADS) for _ in range(2)]
    assert_holds(cache, reference_append(cache, rows, slots, scales))
    assert_same_bytes(cache.k_scale, scales[0])
    if cache.v_head_size:
        assert_same_bytes(cache.v_scale, scales[1])
    else:
        assert cache.v_scale is cache.k_scale
    assert cache.nbytes == cache.storage.nbytes + 4 * BLOCKS * BLOCK_SIZE * HEADS * (2 if cache.v_head_size else 1)


@each_cache
def test_scales_and_offsets_per_channel(device: torch.device, kind: str) -> None:
    (k_size, v_size), _ = CACHES[kind]
    empty = make(device, kind)
    k_shape = (HEADS, k_size) if empty.dtype in QUANTIZED.values() else None
    v_shape = (HEADS, v_size) if empty.v_dtype in QUANTIZED.values() and v_size else None
    if k_shape is None and v_shape is None:
        return
    scales = SimpleNamespace(
        k=k_shape and random_scales(k_shape), v=v_shape and random_scales(v_shape),
        k_offset=k_shape and torch.ones(k_shape) / 3, v_offset=v_shape and torch.ones(v_shape) / 7,
    )  # fmt: skip
    cache = make(device, kind, scales=scales)
    slots, rows = random_slots(TOKENS, BLOCKS * BLOCK_SIZE), rows_of(cache)
    cache.append(rows[0], rows[1] if v_size else None, slots.to(device))
    one = torch.ones(1)
    given = [one if x is None else x for x in (scales.k, scales.v)]
    caches = reference_append(cache, rows, slots, given, scales.k_offset, scales.v_offset)
    assert_holds(cache, caches)
    key, value = cache.gather(torch.zeros(1, 1).int(), [BLOCK_SIZE])
    assert (key.shape, value.shape) == ((BLOCK_SIZE, HEADS, k_size), (BLOCK_SIZE, HEADS, v_size))


def test_quantized_rows_are_stored_and_not_counted(device: torch.device) -> None:
    cache = make(device, "24 and 16")
    rows = [random_bits((2, HEADS, size), E4M3).to(device) for size in (24, 16)]
    cache.append(*rows, torch.tensor([7, 0], device=device))
    assert_same_bytes(cache.key_cache[1, 2], rows[0][0])
    assert_same_bytes(cache.value_cache[0, 0], rows[1][1])
    assert cache.clipped() == Clipped(0, 0)


@each_cache
def test_what_would_be_stored(device: torch.device, kind: str) -> None:
    cache = make(device, kind)
    key, value = (x.view(3, 7, HEADS, x.shape[2]).transpose(1, 2) for x in rows_of(cache, real=torch.float32))
    if cache.v_head_size == 0:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.append(*(x[0].transpose(0, 1) for x in (key, value)), torch.arange(7, device=device))
    stored = as_stored(cache, key, value)
    gathered = cache.gather(torch.tensor([[0, 1]]), [7], torch.float32)
    for a, e, x in zip(stored, gathered, (key, value), strict=True):
        assert a.shape == x.shape
        assert_same_bytes(a[0].transpose(0, 1), e)


# Memory


@each_cache
@each_layout
def test_a_block_is_contiguous(device: torch.device, kind: str, layout: str) -> None:
    """K, then V, in one tensor; both, and the next block, from a multiple of 16 bytes on."""
    cache = make(device, kind, layout=layout)
    sides = [cache.key_cache] if cache.v_head_size == 0 else [cache.key_cache, cache.value_cache]
    end = 0
    for side in sides:
        block = side[0] if layout == "NHD" else side[0].transpose(0, 1)
        assert block.is_contiguous()
        begin = side.data_ptr() - cache.storage.data_ptr()
        assert begin == math.ceil(end / 16) * 16
        end = begin + block.nbytes
    if cache.v_head_size:
        pitch = cache.value_cache.stride(0) * cache.v_dtype.itemsize
        assert pitch == math.ceil(end / 16) * 16 == cache.storage[0].nbytes
    assert cache.nbytes == cache.storage.nbytes == BLOCKS * cache.storage[0].nbytes


def test_a_cache_without_v_is_one_tensor_of_rows(device: torch.device) -> None:
    """As engines keep latent rows: [num_blocks, block_size, elements]."""
    cache = PagedKVCache(4, 16, 1, 576, v_head_size=0, device=device)
    assert cache.storage.shape == (4, 16, 1, 576)
    assert cache.value_cache.shape == (4, 16, 1, 0)
    assert cache.nbytes == 4 * 16 * 576


@each_cache
def test_copied_blocks(device: torch.device, kind: str) -> None:
    """Within a cache, to another layout and to the CPU."""
    scales = {"scales": "dynamic"} if kind in DYNAMIC else {}
    cache = make(device, kind, **scales)
    cache.storage.view(torch.uint8).copy_(random_bits(cache.storage.view(torch.uint8).shape, torch.uint8))
    if cache.dynamic:
        for seed, scale in enumerate((cache.k_scale, cache.v_scale)):
            scale.copy_(random_scales(scale.shape, seed))
    for other in (make(device, kind, **scales), make(torch.device("cpu"), kind, layout="HND", **scales)):
        other.copy_blocks([(4, 0), (1, 5)], source=cache)
        names = ["key_cache", "value_cache", *(["k_scale", "v_scale"] if cache.dynamic else [])]
        for name in names:
            ours, theirs = getattr(other, name), getattr(cache, name)
            assert_same_bytes(ours[0], theirs[4])
            assert_same_bytes(ours[5], theirs[1])
            assert not ours[1:5].float().any()


@pytest.mark.parametrize("change", [{"v_head_size": 8}, {"v_dtype": "fp8_e5m2"}], ids=["head size", "dtype"])
def test_blocks_of_another_v_are_not_copied(change: dict[str, Any]) -> None:
    ours, theirs = PagedKVCache(4, 4, 1, 16), PagedKVCache(4, 4, 1, 16, **change)
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"copy_blocks: source must have {name}=.* as this cache, got"):
        ours.copy_blocks([(0, 1)], source=theirs)


@pytest.mark.parametrize("kind", ["24 and 16", "bf16 and fp8", "int8 and fp8 of two sizes", "without V"])
@each_layout
def test_compiled_code(device: torch.device, kind: str, layout: str) -> None:
    torch._dynamo.reset()
    eager, compiled = make(device, kind, layout=layout), make(device, kind, layout=layout)
    slots, rows = random_slots(TOKENS, BLOCKS * BLOCK_SIZE).to(device), [x / 64 for x in rows_of(eager)]

    table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
    sums = torch.tensor([0, 9], dtype=torch.int32, device=device)

    def step(cache: PagedKVCache, key: Tensor, value: Tensor | None) -> list[Tensor]:
        cache.append(key, value, slots)
        out = [torch.empty(9, HEADS, size, device=device) for size in (cache.head_size, cache.v_head_size)]
        gather_rows(cache, *out, table, sums)
        return out

    value = rows[1] if eager.v_head_size else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = step(eager, rows[0], value)
        actual = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, rows[0], value)
    assert_same_bytes(compiled.storage, eager.storage)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bytes(a, e)


# Scales of a cache without V


def test_without_v_there_is_one_scale(device: torch.device) -> None:
    for scales in (SimpleNamespace(k=0.5, v=None), SimpleNamespace(k=0.5, v=0.5)):
        cache = make(device, "without V", scales=scales)
        assert cache.v_scale is cache.k_scale
        assert cache.k_scale.tolist() == [0.5]
    with pytest.raises(ValueError) as error:
        make(device, "without V", scales=SimpleNamespace(k=0.5, v=0.25))
    assert str(error.value) == "PagedKVCache: scales.v must be None or the same as scales.k, as there is no V, got another"

    own = torch.full((HEADS, 40), 2.0, device=device)
    cache.use_scales(own, own)
    assert cache.k_scale is cache.v_scale is own
    with pytest.raises(ValueError) as error:
        cache.use_scales(own, own.clone())
    assert str(error.value) == "PagedKVCache.use_scales: v_scale must be k_scale, and v_offset None, as there is no V"
    cache.append(torch.ones(1, HEADS, 40, device=device), None, torch.tensor([3], device=device))
    assert cache.key_cache[0, 3].float().unique().tolist() == [0.5]


def test_what_is_clipped_is_counted_by_side(device: torch.device) -> None:
    cache = make(device, "e4m3 and e5m2")
    key = torch.full((1, HEADS, 16), 500.0, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.append(key, 200 * key, torch.tensor([0], device=device))
        cache.append(key, key, torch.tensor([1], device=device))
    assert cache.clipped() == Clipped(2 * HEADS * 16, HEADS * 16)
    plain = make(device, "bf16 and fp8")
    key = torch.full((1, HEADS, 24), 500.0, device=device)
    slots = torch.tensor([0], device=device)
    if device.type == "cpu":
        with pytest.warns(UserWarning, match=r"0 elements of K and 72 of V were clipped.*\(448 with the scale 1\.0\)"):
            plain.append(key, key, slots)
    else:
        plain.append(key, key, slots)
    assert plain.clip_counter is not None
    assert plain.clip_counter.read() == Clipped(0, HEADS * 24)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"v_head_size": -1}, "v_head_size must be at least 0, got -1"),
        ({"v_dtype": "auto"},
         'v_dtype must say what the elements are, such as "bfloat16" or the dtype of the model, got "auto"'),
        ({"v_dtype": torch.float64}, 'v_dtype must be "fp8", "fp8_e4m3", "fp8_e5m2", "int8", "float16", "bfloat16", '
         '"float32" or the torch dtype, got torch.float64'),
        ({"v_head_size": 0, "v_dtype": "int8"}, "v_dtype must be None without V, as v_head_size is 0, got 'int8'"),
        ({"v_dtype": "bfloat16", "scales": "dynamic"}, 'scales must not be "dynamic" if only K or only V is FP8 or '
         "int8, got dtype 'fp8' and v_dtype 'bfloat16'"),
        ({"v_head_size": 8, "scales": SimpleNamespace(k=torch.ones(2, 16), v=torch.ones(2, 16))},
         "scales.v must have 1 or num_kv_heads=2 elements, or the shape [num_kv_heads, head_size]=[2, 8], "
         "got shape [2, 16]"),
        ({"v_head_size": 8, "v_offset": torch.ones(2, 16)},
         "v_offset must have the shape [num_kv_heads, head_size]=[2, 8], got [2, 16]"),
        ({"v_dtype": "bfloat16", "v_offset": torch.ones(2, 16)},
         "v_offset must be None with dtype 'bfloat16', as only FP8 and int8 use offsets"),
        ({"v_head_size": 0, "v_offset": torch.ones(2, 16)}, "v_offset must be None, as there is no V, got shape [2, 16]"),
        ({"dtype": "fp8", "v_dtype": "int8", "scales": SimpleNamespace(k=1.0, v=1.0, dtype="fp8")},
         'scales must be for values up to 127, the largest of "int8", got scales for "fp8", whose largest is 448'),
    ],
)  # fmt: skip
def test_what_can_not_be_made(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        PagedKVCache(4, 4, 2, 16, **arguments)
    assert str(error.value) == f"PagedKVCache: {sentence}"


def test_what_needs_v(device: torch.device) -> None:
    cache = make(device, "without V")
    with pytest.raises(ValueError) as error:
        cache.attend(torch.ones(1, HEADS, 40), torch.zeros(1, 1), [1])
    assert str(error.value) == (
        "PagedKVCache.attend: the cache must have V, got v_head_size=0; paged_attention takes a part of key_cache as V"
    )
    with pytest.raises(ValueError, match=r"descales: the cache must have K and V of one dtype"):
        cache.descales(1)
    with pytest.raises(ValueError) as error:
        make(device, "24 and 16").append(torch.ones(1, HEADS, 24), None, torch.tensor([0]))
    assert str(error.value) == "PagedKVCache.append: value must be a tensor, as the cache has V, got None"


def test_how_it_prints() -> None:
    cache = PagedKVCache(4, 16, 1, 576, v_head_size=0, device="cpu")
    assert "head_size=576, v_head_size=0, dtype='fp8'" in repr(cache)
    assert "v_head_size" not in repr(PagedKVCache(4, 16, 1, 64, device="cpu"))
    assert "dtype='bfloat16', v_dtype='fp8'" in repr(PagedKVCache(4, 16, 1, 64, dtype="bfloat16", v_dtype="fp8", device="cpu"))
