"""reshape_and_cache_flash_dynamic against the reference, caches and scales byte for byte."""

from __future__ import annotations

import math
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import reference, reshape_and_cache_flash_dynamic
from helpers import (
    OFFSETS,
    QUANTIZED_CACHES,
    REAL,
    all_patterns,
    assert_same_bytes,
    bad_slots,
    compare_caches,
    each_cache_layout,
    each_geometry,
    each_kind_of_layout,
    each_large_cache,
    each_layout,
    each_offset,
    each_quantized_cache,
    each_real,
    empty_caches,
    empty_view,
    from_bits,
    key_and_value,
    placed,
    random_bits,
    random_scales,
    random_slots,
    require_gpu_memory,
    sentinels,
    torch_threads,
    values,
)

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def check(
    device: torch.device,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    blocks: tuple[int, int],
    cache: str = "e4m3",
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    cache_layout: str = "NHD",
    scale_layouts: tuple[str, str] = ("contiguous", "contiguous"),
) -> None:
    """Compares on `device`: caches and scale caches, and every byte of what they lie in."""
    name, dtype, _ = QUANTIZED_CACHES[cache]
    shape = (*blocks, *key.shape[1:])
    buffers: list[Tensor] = []

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        (k, k_buffer), (v, v_buffer) = (empty_view(shape[:3], torch.float32, layout, at) for layout in scale_layouts)
        buffers.extend((k_buffer, v_buffer))
        ops.reshape_and_cache_flash_dynamic(
            placed(key, layouts[0], at), placed(value, layouts[1], at), key_cache, value_cache, k, v,
            slots.to(at), name,
        )  # fmt: skip

    compare_caches(device, shape, dtype, cache_layout, store)
    for actual, expected in zip(buffers[:2], buffers[2:], strict=False):  # none where the call is refused
        assert_same_bytes(actual, expected)


# Geometries and types


@each_real
@each_geometry
def test_every_geometry(device: torch.device, geometry: tuple[int, int, int], real: torch.dtype) -> None:
    blocks = (-(-60 // geometry[0]), geometry[0])
    key, value = key_and_value(37, *geometry[1:], real)
    slots = random_slots(37, blocks[0] * blocks[1])
    for cache in QUANTIZED_CACHES:
        check(device, key, value, slots, blocks, cache)


@each_geometry
def test_every_geometry_for_each_instruction_set(isa: str, geometry: tuple[int, int, int]) -> None:
    blocks = (-(-20 // geometry[0]), geometry[0])
    for real in REAL.values():
        key, value = key_and_value(11, *geometry[1:], real)
        for cache in ("e4m3", "e5m2", "int8"):
            check(
                CPU, key, value, random_slots(11, blocks[0] * blocks[1]), blocks, cache,
                cache_layout="[nb, 2] HND",
            )  # fmt: skip


@pytest.mark.parametrize("cache_layout", ["[nb, 2] NHD", "[nb, 2] HND"])
@pytest.mark.parametrize("tokens", [1, 16, 300, 4096])
def test_sizes_of_models(device: torch.device, tokens: int, cache_layout: str) -> None:
    key, value = key_and_value(tokens, 8, 128, torch.bfloat16)
    check(device, key, value, random_slots(tokens, 300 * 16), (300, 16), cache_layout=cache_layout)


# Elements that must not count, and those that must


@each_real
@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf], ids=repr)
def test_one_element_that_is_not_finite(device: torch.device, special: float, real: torch.dtype) -> None:
    """At the first, last and middle place of one head of one token."""
    for head_size in (1, 3, 20, 64, 128, 576):
        key, value = values((3, 2, head_size), real, specials=False), torch.ones(3, 2, head_size, dtype=real)
        for place in {0, head_size // 2, head_size - 1}:
            x = key.clone()
            x[1, 1, place] = special
            check(device, x, value, torch.arange(3), (1, 4))
            check(device, value, x, torch.arange(3), (1, 4), "e5m2")


@each_quantized_cache
@each_real
def test_heads_without_a_finite_element_and_heads_of_zeros(device: torch.device, real: torch.dtype, cache: str) -> None:
    specials = torch.tensor([math.nan, math.inf, -math.inf])
    nothing_finite = specials[torch.arange(5 * 2 * 40) % 3].view(5, 2, 40).to(real)
    zeros = torch.zeros(5, 2, 40, dtype=real)
    zeros[:, :, ::2] = -0.0
    check(device, nothing_finite, zeros, torch.arange(5), (2, 4), cache)


@each_quantized_cache
@each_real
def test_amax_of_every_binary_order(device: torch.device, real: torch.dtype, cache: str) -> None:
    """From the smallest subnormal to the largest number."""
    exponents = range(-149, 128) if real != torch.float16 else range(-24, 16)
    x = torch.stack([torch.tensor([1.0, -0.7, 0.01]).double() * 2.0**e for e in exponents]).to(real)
    x = x.unsqueeze(1)
    check(device, x, -x, torch.arange(len(x)), (len(x), 1), cache)


@each_quantized_cache
def test_subnormal_fp32_elements_count(device: torch.device, cache: str) -> None:
    x = from_bits([0x00000001, 0x007FFFFF, 0x80400000, 0x00000000]).view(2, 1, 2)
    check(device, x, x.flip(0), torch.arange(2), (1, 2), cache)


@each_quantized_cache
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_alone_and_as_the_largest(device: torch.device, real: torch.dtype, cache: str) -> None:
    x = all_patterns(real)
    alone = x.view(-1, 8, 1)
    check(device, alone, alone.flip(0), torch.arange(len(alone)), (len(alone), 1), cache)
    largest = torch.stack([x, (x.float() * -0.4).to(real), (x.float() * 0.001).to(real)], 1).view(-1, 8, 3)
    check(device, largest, largest.flip(0), torch.arange(len(largest)), (len(largest), 1), cache)


@each_real
def test_the_largest_at_every_position(device: torch.device, real: torch.dtype) -> None:
    for head_size in (5, 8, 31, 64, 80, 200):
        x = torch.full((head_size, 1, head_size), 0.25)
        x[:, 0].fill_diagonal_(-3.0)
        check(device, x.to(real), x.flip(0).to(real), torch.arange(head_size), (head_size, 1))


@each_real
def test_any_bits(device: torch.device, real: torch.dtype) -> None:
    for cache in QUANTIZED_CACHES:
        key = random_bits((60, 4, 33), real)
        check(device, key, key.flip(0), torch.arange(60), (4, 16), cache)


# Memory


@each_kind_of_layout
@pytest.mark.parametrize("sides", ["key", "value", "both"])
def test_layouts_of_key_and_value(device: torch.device, sides: str, layout: str) -> None:
    layouts = tuple(layout if sides in (side, "both") else "contiguous" for side in ("key", "value"))
    for geometry, real in (((16, 2, 64), torch.bfloat16), ((8, 3, 37), torch.float32)):
        key, value = key_and_value(13, *geometry[1:], real)
        check(device, key, value, random_slots(13, 4 * geometry[0]), (4, geometry[0]), layouts=layouts)


@each_cache_layout
def test_layouts_of_caches(device: torch.device, cache_layout: str) -> None:
    for geometry, real in (
        ((16, 2, 64), torch.bfloat16),
        ((8, 3, 37), torch.float32),
        ((4, 8, 1), torch.float16),
    ):
        key, value = key_and_value(13, *geometry[1:], real)
        slots = random_slots(13, 4 * geometry[0])
        for cache in ("e4m3", "e5m2 in uint8"):
            check(device, key, value, slots, (4, geometry[0]), cache, cache_layout=cache_layout)


@each_kind_of_layout
@pytest.mark.parametrize("sides", ["K", "V", "both"])
def test_layouts_of_scale_caches(device: torch.device, sides: str, layout: str) -> None:
    layouts = tuple(layout if sides in (side, "both") else "contiguous" for side in "KV")
    key, value = key_and_value(13, 3, 37, torch.bfloat16)
    check(device, key, value, random_slots(13, 32), (4, 8), scale_layouts=layouts)


@each_offset
def test_misaligned_by_every_number_of_elements(device: torch.device, offset: str) -> None:
    """Key and value, and the caches, each by any number."""
    for real, cache_offset in product(REAL.values(), OFFSETS):
        for head_size in (40, 300):  # of few and of many vectors
            key, value = key_and_value(5, 2, head_size, real)
            layouts = (offset, offset)
            check(device, key, value, random_slots(5, 8), (2, 4), layouts=layouts, cache_layout=cache_offset)


@each_layout
def test_all_layouts_at_once(device: torch.device, layout: str) -> None:
    key, value = key_and_value(13, 3, 40, torch.float16)
    check(
        device, key, value, random_slots(13, 32), (4, 8), layouts=(layout, "columns"),
        cache_layout="halves HND", scale_layouts=("transposed", layout),
    )  # fmt: skip


def test_slices_of_a_fused_qkv_tensor(device: torch.device) -> None:
    """With scales that lie in the storage of the cache, behind the elements of each token."""
    kv_heads, head_size = 8, 128
    qkv, slots = values((21, 48 * head_size), torch.bfloat16), random_slots(21, 64)

    def run(ops: ModuleType, at: torch.device) -> Tensor:
        _, key, value = qkv.to(at).view(21, 48, head_size).split([32, kv_heads, kv_heads], dim=1)
        storage = sentinels((2, 4, 16, kv_heads * (head_size + 4)), torch.uint8, at)
        caches = storage[..., : kv_heads * head_size].view(E4M3).unflatten(-1, (kv_heads, head_size))
        scales = storage[..., kv_heads * head_size :].view(torch.float32)
        ops.reshape_and_cache_flash_dynamic(key, value, *caches, *scales, slots.to(at), "fp8")
        return storage

    assert_same_bytes(run(fp8kv, device), run(reference, CPU))


# Slots


@pytest.mark.parametrize("tokens", [0, 1, 5, 9])
def test_rows_beyond_the_slots_are_left_out(device: torch.device, tokens: int) -> None:
    key, value = key_and_value(9, 2, 24, torch.bfloat16)
    check(device, key, value[: max(tokens, 7)], torch.arange(tokens).flip(0), (3, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_negative_slots_are_skipped(device: torch.device, dtype: torch.dtype) -> None:
    far = [-(1 << 31), -1] if dtype == torch.int32 else [-(1 << 63), -(1 << 32) + 3, -(1 << 31) - 5, -1]
    key, value = key_and_value(len(far) + 1, 2, 24, torch.bfloat16)
    check(device, key, value, torch.tensor([*far, 6], dtype=dtype), (3, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_a_slot_beyond_the_cache(device: torch.device, dtype: torch.dtype) -> None:
    """On the CPU the op raises and writes nothing; on CUDA the token is skipped."""
    key, value = key_and_value(3, 2, 24, torch.bfloat16)
    for slot in bad_slots(dtype, 12):
        key_cache, value_cache, written = empty_caches((3, 4, 2, 24), E4M3, "NHD", device)
        scales = [sentinels((3, 4, 2), torch.float32, device) for _ in "kv"]

        def store(
            slots: list[int],
            caches: tuple[Tensor, ...] = (key_cache, value_cache, *scales),
        ) -> None:
            reshape_and_cache_flash_dynamic(
                key.to(device), value.to(device), *caches, torch.tensor(slots, dtype=dtype).to(device), "fp8"
            )

        expected = [sentinels(x.shape, x.dtype, CPU) for x in (*written, *scales)]
        if device.type == "cuda":
            store([1, slot, 7])
            reference.reshape_and_cache_flash_dynamic(key, value, *expected, torch.tensor([1, -1, 7]), "fp8")
        else:
            with pytest.raises(RuntimeError) as error:
                store([1, slot, 7])
            assert str(error.value) == (
                "fp8kv::reshape_and_cache_flash_dynamic: slot_mapping must have slots below "
                f"num_blocks * block_size = 12, got {slot} for token 1"
            )
        for a, e in zip((*written, *scales), expected, strict=True):
            assert_same_bytes(a, e)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(("num_heads", "head_size"), [(8, 16), (1, 576), (1, 1), (3, 37)])
def test_of_several_tokens_for_a_slot_the_last_stays_on_the_cpu(num_heads: int, head_size: int, threads: int) -> None:
    key, value = key_and_value(20_000 if head_size < 100 else 3000, num_heads, head_size, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch_threads(threads):
        check(CPU, key, value, torch.randint(0, 48, (len(key),), generator=generator), (3, 16))


def test_of_several_tokens_for_a_slot_each_byte_is_of_one_of_them_on_cuda(cuda: torch.device) -> None:
    key, value = key_and_value(1000, 8, 128, torch.bfloat16)
    slots = torch.arange(1000) % 7
    key_cache, value_cache, buffers = empty_caches((2, 4, 8, 128), E4M3, "NHD", cuda)
    scales = [sentinels((2, 4, 8), torch.float32, cuda) for _ in "kv"]
    reshape_and_cache_flash_dynamic(key.to(cuda), value.to(cuda), key_cache, value_cache, *scales, slots.to(cuda), "fp8")
    for buffer, scale_cache, x in zip(buffers, scales, (key, value), strict=True):
        q, scale = reference.quantize(x, group_shape=(1, -1))
        for expected, stored in (
            (q.view(torch.uint8), buffer.view(torch.uint8)),
            (scale.squeeze(-1).view(torch.int32), scale_cache.view(torch.int32)),
        ):
            of_slots = stored.cpu().flatten(0, 1)
            for slot in range(7):
                assert (expected[slots == slot] == of_slots[slot]).any(0).all()
        assert (buffer.view(torch.uint8).cpu().flatten(0, 1)[7] == 0xA5).all()


# Sizes


@pytest.mark.parametrize(
    ("tokens", "blocks", "num_heads", "head_size"),
    [
        (0, (3, 4), 2, 24), (5, (3, 4), 0, 24), (5, (3, 4), 2, 0), (0, (0, 4), 2, 24), (0, (3, 0), 2, 24),
        (0, (0, 0), 0, 0),
    ],
)  # fmt: skip
def test_empty(device: torch.device, tokens: int, blocks: tuple[int, int], num_heads: int, head_size: int) -> None:
    """A head without elements has no scale: its place in the scale cache stays."""
    key = torch.ones(tokens, num_heads, head_size)
    check(device, key, key, torch.arange(tokens), blocks)


@each_real
def test_a_long_head(device: torch.device, real: torch.dtype) -> None:
    for num_heads, head_size in ((1, 20_000), (2, 5137), (1, 70_000)):
        key, value = key_and_value(3, num_heads, head_size, real)
        check(device, key, value, torch.tensor([3, 0, 1]), (2, 2))


@pytest.mark.large
@each_large_cache
def test_the_far_end_of_a_large_cache(cuda: torch.device, blocks: tuple[int, int], num_heads: int, head_size: int) -> None:
    require_gpu_memory(cuda, 30)
    caches = torch.zeros(2, *blocks, num_heads, head_size, dtype=torch.uint8, device=cuda)
    scales = torch.zeros(2, *blocks, num_heads, device=cuda)
    first = (blocks[0] - 2) * blocks[1]
    key, value = key_and_value(20, num_heads, head_size, torch.bfloat16)
    slots = random_slots(20, 2 * blocks[1])
    reshape_and_cache_flash_dynamic(
        key.to(cuda), value.to(cuda), *caches, *scales,
        torch.where(slots < 0, slots, slots + first).to(cuda), "fp8",
    )  # fmt: skip
    expected = torch.zeros(2, 2, blocks[1], num_heads, head_size, dtype=torch.uint8)
    expected_scales = torch.zeros(2, 2, blocks[1], num_heads)
    reference.reshape_and_cache_flash_dynamic(key, value, *expected, *expected_scales, slots, "fp8")
    assert_same_bytes(caches[:, -2:], expected)
    assert_same_bytes(scales[:, -2:], expected_scales)
    assert not any(piece.any() for piece in caches[0, :-2].split(1 << 20))


def test_what_was_in_the_scale_cache_does_not_matter(device: torch.device) -> None:
    key, value = (x.to(device) for x in key_and_value(12, 2, 24, torch.bfloat16))
    results = []
    for before in (0.0, math.nan, math.inf, -1.0, 3e38):
        scales = torch.full((2, 3, 4, 2), before, device=device)
        caches = torch.zeros(2, 3, 4, 2, 24, dtype=torch.uint8, device=device)
        reshape_and_cache_flash_dynamic(key, value, *caches, *scales, torch.arange(12, device=device), "fp8")
        results.append((caches, scales))
    for caches, scales in results[1:]:
        assert_same_bytes(caches, results[0][0])
        assert_same_bytes(scales, results[0][1])


def test_what_is_read_stays(device: torch.device) -> None:
    key, value = (x.to(device) for x in key_and_value(5, 2, 40, torch.bfloat16))
    slots = random_slots(5, 12).to(device)
    before = [x.clone() for x in (key, value, slots)]
    scales = random_scales((2, 3, 4, 2)).to(device)
    key_cache, value_cache, _ = empty_caches((3, 4, 2, 40), E4M3, "NHD", device)
    reshape_and_cache_flash_dynamic(key, value, key_cache, value_cache, *scales, slots, "fp8")
    for x, copy in zip((key, value, slots), before, strict=True):
        assert_same_bytes(x, copy)
