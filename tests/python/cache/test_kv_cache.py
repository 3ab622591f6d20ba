"""reshape_and_cache_flash against the reference, byte for byte, with all that lies around the slots."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kv import reference, reshape_and_cache_flash
from helpers import (
    OFFSETS,
    PLAIN_CACHES,
    QUANTIZED,
    QUANTIZED_CACHES,
    REAL,
    TRAP_SCALES,
    all_patterns,
    assert_same_bytes,
    bad_slots,
    compare_caches,
    each_cache_layout,
    each_geometry,
    each_large_cache,
    each_layout,
    each_offset,
    each_pair_of_kinds_of_layouts,
    each_quantized_cache,
    each_real,
    empty_caches,
    fp8_boundaries,
    key_and_value,
    neighbors,
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
CACHES = QUANTIZED_CACHES | PLAIN_CACHES
ONE = torch.ones(1)


def check(
    device: torch.device,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    blocks: tuple[int, int],
    cache: str = "e4m3",
    scales: tuple[Tensor, Tensor] = (ONE, ONE),
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    cache_layout: str = "NHD",
) -> None:
    """Compares on `device`: the caches, of `blocks` (number, size), and every byte of what they lie in."""
    name, dtype, _ = CACHES[cache]

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        ops.reshape_and_cache_flash(
            placed(key, layouts[0], at), placed(value, layouts[1], at), key_cache, value_cache, slots.to(at),
            name, scales[0].to(at), scales[1].to(at),
        )  # fmt: skip

    compare_caches(device, (*blocks, *key.shape[1:]), dtype, cache_layout, store)


def per_tensor_and_head(num_heads: int) -> list[tuple[Tensor, Tensor]]:
    """Scales of K and V."""
    return [(random_scales((n,)), random_scales((m,), seed=2)) for n, m in ((1, 1), (num_heads, num_heads))]


# Geometries and types


@each_real
@each_geometry
def test_every_geometry(device: torch.device, geometry: tuple[int, int, int], real: torch.dtype) -> None:
    blocks = (-(-60 // geometry[0]), geometry[0])
    key, value = key_and_value(37, *geometry[1:], real)
    slots = random_slots(37, blocks[0] * blocks[1])
    for cache in QUANTIZED_CACHES:
        for scales in per_tensor_and_head(geometry[1]):
            check(device, key, value, slots, blocks, cache, scales)


@each_geometry
def test_every_geometry_for_each_instruction_set(isa: str, geometry: tuple[int, int, int]) -> None:
    blocks = (-(-20 // geometry[0]), geometry[0])
    slots = random_slots(11, blocks[0] * blocks[1])
    for real in REAL.values():
        key, value = key_and_value(11, *geometry[1:], real)
        for cache in ("e4m3", "e5m2", "int8", "bf16"):
            for scales in per_tensor_and_head(geometry[1]):
                check(CPU, key, value, slots, blocks, cache, scales, cache_layout="[nb, 2] HND")


@pytest.mark.parametrize("cache_layout", ["[nb, 2] NHD", "[nb, 2] HND"])
@pytest.mark.parametrize("tokens", [1, 16, 300, 4096])
def test_sizes_of_models(device: torch.device, tokens: int, cache_layout: str) -> None:
    geometry = (16, 8, 128)
    key, value = key_and_value(tokens, *geometry[1:], torch.bfloat16)
    slots = random_slots(tokens, 300 * 16)
    for scales in per_tensor_and_head(8):
        check(device, key, value, slots, (300, 16), scales=scales, cache_layout=cache_layout)


@pytest.mark.parametrize("cache", PLAIN_CACHES)
@each_real
def test_plain_copies(device: torch.device, real: torch.dtype, cache: str) -> None:
    """Of any bits: NaN with payloads stay as they are where the type does, and scales do not matter."""
    for geometry in ((16, 2, 64), (16, 8, 3), (1, 1, 1), (32, 2, 5), (16, 1, 128), (4, 3, 40)):
        key = random_bits((37, *geometry[1:]), real)
        value = key.flip(0)
        blocks = (-(-60 // geometry[0]), geometry[0])
        slots = random_slots(37, blocks[0] * blocks[1])
        scales = (torch.tensor([0.0]), torch.full((geometry[1],), torch.nan))
        for cache_layout in ("NHD", "HND", "steps", "offset 3"):
            check(device, key, value, slots, blocks, cache, scales, cache_layout=cache_layout)


@pytest.mark.parametrize("target", REAL)
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_plain_copies_of_every_16_bit_value(device: torch.device, real: torch.dtype, target: str) -> None:
    x = all_patterns(real).view(512, 1, 128)
    check(device, x, x.flip(0), torch.arange(512), (32, 16), target)


@pytest.mark.parametrize("target", ["fp16", "bf16"])
def test_plain_copies_round_to_nearest_even(device: torch.device, target: str) -> None:
    """fp32 values at and beside all ties between values of the cache."""
    exact = all_patterns(REAL[target]).float()
    exact = exact[exact.isfinite() & (exact >= 0)].sort().values
    ties = (exact[1:].double() + exact[:-1].double()) / 2
    x = neighbors(ties.float(), 1).view(-1, 1, 3)
    x = torch.cat([x, torch.full((1, 1, 3), 3.4e38)])
    check(device, x, -x, torch.arange(len(x)), (len(x), 1), target)


# Values and scales that trap shortcuts


@each_real
@each_quantized_cache
def test_trap_scales_per_head(device: torch.device, cache: str, real: torch.dtype) -> None:
    x = values((8192,), real) if real == torch.float32 else all_patterns(real)
    x = x.view(-1, 1, 128).expand(-1, len(TRAP_SCALES), -1)
    check(device, x, x, torch.arange(len(x)), (len(x), 1), cache, (TRAP_SCALES, TRAP_SCALES.flip(0)))


@each_quantized_cache
def test_trap_scales_per_tensor(device: torch.device, cache: str) -> None:
    x = all_patterns(torch.bfloat16).view(256, 2, 128)
    for scale in TRAP_SCALES.split(1):
        check(device, x, -x, torch.arange(256), (256, 1), cache, (scale, torch.tensor([0.3])))


@each_quantized_cache
def test_quotients_beside_every_rounding_boundary(device: torch.device, cache: str) -> None:
    finite = TRAP_SCALES[TRAP_SCALES.isfinite() & (TRAP_SCALES > 0)]
    x = neighbors(finite[:, None] * fp8_boundaries(QUANTIZED[cache])[1:], 2).view(1, len(finite), -1)
    check(device, x, -x, torch.tensor([1]), (2, 1), cache, (finite, finite))


@each_real
def test_trap_scales_for_each_instruction_set(isa: str, real: torch.dtype) -> None:
    x = values((6, len(TRAP_SCALES), 45), real)
    for cache in ("e4m3", "e5m2", "int8"):
        check(CPU, x, -x, random_slots(6, 12), (3, 4), cache, (TRAP_SCALES, TRAP_SCALES))


# Forms of scales


def scale_forms(scales: Tensor) -> dict[str, Tensor]:
    """Tensors with the scales [num_heads] as elements."""
    count = len(scales)
    columns = torch.full((count, 3), 777.0, device=scales.device)
    columns[:, 1] = scales
    return {
        "[H]": scales,
        "[H, 1, 1]": scales.view(count, 1, 1),
        "[1, H]": scales.view(1, count),
        "[2, H / 2]": scales.view(2, -1),
        "strided": columns[:, 1],
        "strided [1, H, 1]": columns[:, 1].view(1, count, 1),
    }


@pytest.mark.parametrize("head_size", [1, 20, 64])
def test_forms_of_scales_per_head(device: torch.device, head_size: int) -> None:
    key, value = key_and_value(20, 8, head_size, torch.bfloat16)
    k, v = random_scales((8,)), random_scales((8,), seed=2)
    slots = random_slots(20, 32)
    for form in scale_forms(k):

        def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device, form: str = form) -> None:
            scales = (k, v) if ops is reference else (scale_forms(x.to(at))[form] for x in (k, v))
            ops.reshape_and_cache_flash(key.to(at), value.to(at), key_cache, value_cache, slots.to(at), "fp8", *scales)

        compare_caches(device, (2, 16, 8, head_size), E4M3, "NHD", store)


@pytest.mark.parametrize(
    ("k", "v"),
    [
        (torch.tensor(0.3), torch.tensor([[[0.7]]])),
        (torch.tensor([0.3]), random_scales((8,))),
        (random_scales((8, 1)), torch.tensor([0.3])),
        (torch.tensor([0.3]).expand(8), torch.tensor(0.7).expand(2, 4)),
    ],
    ids=["0-D and 3-D", "K per tensor", "V per tensor", "expanded"],
)
def test_scales_of_k_and_v_are_independent(device: torch.device, k: Tensor, v: Tensor) -> None:
    key, value = key_and_value(20, 8, 24, torch.float16)
    check(device, key, value, random_slots(20, 32), (2, 16), scales=(k, v))


# Memory


@each_layout
@pytest.mark.parametrize("sides", ["key", "value", "both"])
def test_layouts_of_key_and_value(device: torch.device, sides: str, layout: str) -> None:
    layouts = tuple(layout if sides in (side, "both") else "contiguous" for side in ("key", "value"))
    for geometry, real in (((16, 2, 64), torch.bfloat16), ((8, 3, 37), torch.float32)):
        key, value = key_and_value(13, *geometry[1:], real)
        slots = random_slots(13, 4 * geometry[0])
        for scales in per_tensor_and_head(geometry[1]):
            check(device, key, value, slots, (4, geometry[0]), scales=scales, layouts=layouts)
        check(device, key, value, slots, (4, geometry[0]), "bf16", layouts=layouts)


@each_cache_layout
def test_layouts_of_caches(device: torch.device, cache_layout: str) -> None:
    for geometry, real in (
        ((16, 2, 64), torch.bfloat16),
        ((8, 3, 37), torch.float32),
        ((4, 8, 1), torch.float16),
    ):
        key, value = key_and_value(13, *geometry[1:], real)
        slots = random_slots(13, 4 * geometry[0])
        for cache in ("e4m3", "e5m2 in uint8", "fp16"):
            for scales in per_tensor_and_head(geometry[1]):
                check(device, key, value, slots, (4, geometry[0]), cache, scales, cache_layout=cache_layout)


@each_pair_of_kinds_of_layouts
def test_pairs_of_layouts(device: torch.device, layout: str, cache_layout: str) -> None:
    key, value = key_and_value(6, 2, 40, torch.bfloat16)
    check(
        device, key, value, random_slots(6, 12), (3, 4), scales=(random_scales((2,)), ONE),
        layouts=(layout, "columns"), cache_layout=cache_layout,
    )  # fmt: skip


@each_offset
def test_misaligned_by_every_number_of_elements(device: torch.device, offset: str) -> None:
    """Key and value, and the caches, each by any number."""
    for real, cache_offset in product(REAL.values(), OFFSETS):
        key, value = key_and_value(5, 2, 40, real)
        for cache, scales in product(("e4m3", "fp16"), per_tensor_and_head(2)):
            check(
                device, key, value, random_slots(5, 8), (2, 4), cache, scales, layouts=(offset, offset),
                cache_layout=cache_offset,
            )  # fmt: skip


@pytest.mark.parametrize("cache_layout", ["NHD", "[nb, 2] HND"])
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_size"), [(32, 8, 128), (6, 2, 20), (3, 1, 7)])
def test_slices_of_a_fused_qkv_tensor(
    device: torch.device, num_heads: int, kv_heads: int, head_size: int, cache_layout: str
) -> None:
    widths = [num_heads * head_size, kv_heads * head_size, kv_heads * head_size]

    def slices(qkv: Tensor) -> tuple[Tensor, Tensor]:
        _, key, value = qkv.split(widths, dim=1)
        return key.view(-1, kv_heads, head_size), value.view(-1, kv_heads, head_size)

    qkv, slots = values((21, sum(widths)), torch.bfloat16), random_slots(21, 64)
    for scales in per_tensor_and_head(kv_heads):

        def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device, scales: Any = scales) -> None:
            ops.reshape_and_cache_flash(
                *slices(qkv.to(at)), key_cache, value_cache, slots.to(at), "fp8", *(s.to(at) for s in scales)
            )

        compare_caches(device, (4, 16, kv_heads, head_size), E4M3, cache_layout, store)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], ids=str)
def test_permuted_keys(device: torch.device, order: tuple[int, int, int]) -> None:
    x = values((6, 10, 16), torch.float16)
    tokens, num_heads, head_size = x.permute(order).shape
    slots, scale = random_slots(tokens, 20), random_scales((num_heads,))

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        key = x.to(at).permute(order)
        ops.reshape_and_cache_flash(key, key.neg(), key_cache, value_cache, slots.to(at), "fp8", scale.to(at), ONE.to(at))

    compare_caches(device, (5, 4, num_heads, head_size), E4M3, "HND", store)


@pytest.mark.parametrize("source", [(1, 3, 32), (9, 1, 32), (9, 3, 1), (1, 1, 1)], ids=str)
def test_expanded_keys(device: torch.device, source: tuple[int, int, int]) -> None:
    x, slots, scale = values(source, torch.bfloat16, specials=False), random_slots(9, 12), random_scales((3,))

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        key = x.to(at).expand(9, 3, 32)
        ops.reshape_and_cache_flash(key, key, key_cache, value_cache, slots.to(at), "fp8", scale.to(at), ONE.to(at))

    compare_caches(device, (3, 4, 3, 32), E4M3, "NHD", store)


def test_what_is_read_stays(device: torch.device) -> None:
    key, value = (x.to(device) for x in key_and_value(5, 2, 40, torch.bfloat16))
    read = [key, value, random_slots(5, 12).to(device), *(s.to(device) for s in per_tensor_and_head(2)[1])]
    before = [x.clone() for x in read]
    key_cache, value_cache, _ = empty_caches((3, 4, 2, 40), E4M3, "NHD", device)
    reshape_and_cache_flash(*read[:2], key_cache, value_cache, read[2], "fp8", *read[3:])
    for x, copy in zip(read, before, strict=True):
        assert_same_bytes(x, copy)


def test_blocks_more_than_2_to_the_31_elements_apart(device: torch.device) -> None:
    """What lies between is never touched and takes no memory on the CPU."""
    if device.type == "cuda":
        require_gpu_memory(device, 24)
    pitch = (1 << 31) + 24
    strides = (pitch, 64, 32, 1)
    caches = [torch.empty(pitch + 128, dtype=E4M3, device=device) for _ in "kv"]
    key_cache, value_cache = (cache.as_strided((2, 2, 2, 32), strides) for cache in caches)
    key, value = key_and_value(4, 2, 32, torch.bfloat16)
    scale = random_scales((2,))
    slots = torch.tensor([3, 0, 2, 1])
    reshape_and_cache_flash(
        key.to(device), value.to(device), key_cache, value_cache, slots.to(device), "fp8", scale.to(device),
        ONE.to(device),
    )  # fmt: skip
    expected_key, expected_value, _ = empty_caches((2, 2, 2, 32), E4M3, "NHD", CPU)
    reference.reshape_and_cache_flash(key, value, expected_key, expected_value, slots, "fp8", scale, ONE)
    assert_same_bytes(key_cache, expected_key)
    assert_same_bytes(value_cache, expected_value)


# Slots


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_types_and_strides_of_slots(device: torch.device, dtype: torch.dtype) -> None:
    key, value = key_and_value(23, 2, 24, torch.bfloat16)
    slots = random_slots(23, 64).to(dtype)
    check(device, key, value, slots, (4, 16))

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        columns = torch.full((23, 3), 5, dtype=dtype, device=at)
        columns[:, 1] = slots
        one = ONE.to(at)
        ops.reshape_and_cache_flash(key.to(at), value.to(at), key_cache, value_cache, columns[:, 1], "fp8", one, one)

    compare_caches(device, (4, 16, 2, 24), E4M3, "NHD", store)


@pytest.mark.parametrize("tokens", [0, 1, 5, 9])
def test_rows_beyond_the_slots_are_left_out(device: torch.device, tokens: int) -> None:
    key, value = key_and_value(9, 2, 24, torch.bfloat16)
    check(device, key, value[: max(tokens, 7)], torch.arange(tokens).flip(0), (3, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_negative_slots_are_skipped(device: torch.device, dtype: torch.dtype) -> None:
    far = [-(1 << 31), -1] if dtype == torch.int32 else [-(1 << 63), -(1 << 32) + 3, -(1 << 31) - 5, -1]
    key, value = key_and_value(len(far) + 1, 2, 24, torch.bfloat16)
    check(device, key, value, torch.tensor([*far, 6], dtype=dtype), (3, 4))
    key_cache, value_cache, buffers = empty_caches((3, 4, 2, 24), E4M3, "NHD", device)
    one = ONE.to(device)
    slots = torch.tensor(far, dtype=dtype, device=device)
    reshape_and_cache_flash(key.to(device), value.to(device), key_cache, value_cache, slots, "fp8", one, one)
    for buffer in buffers:
        assert_same_bytes(buffer, sentinels(buffer.shape, E4M3, CPU))


@pytest.mark.parametrize("cache", ["e4m3", "bf16"])
@pytest.mark.parametrize("cache_layout", ["NHD", "HND", "[nb, 2] HND"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_a_slot_beyond_the_cache(device: torch.device, dtype: torch.dtype, cache_layout: str, cache: str) -> None:
    """On the CPU the op raises and writes nothing; on CUDA the token is skipped."""
    name, stored, _ = CACHES[cache]
    key, value = key_and_value(3, 2, 24, torch.bfloat16)
    for slot in bad_slots(dtype, 12):
        slots = torch.tensor([1, slot, 7], dtype=dtype)
        if device.type == "cuda":

            def store(
                ops: ModuleType,
                key_cache: Tensor,
                value_cache: Tensor,
                at: torch.device,
                slots: Tensor = slots,
            ) -> None:
                skipped = torch.tensor([1, -1, 7]) if ops is reference else slots.to(at)
                one = ONE.to(at)
                ops.reshape_and_cache_flash(key.to(at), value.to(at), key_cache, value_cache, skipped, name, one, one)

            compare_caches(device, (3, 4, 2, 24), stored, cache_layout, store)
            continue
        key_cache, value_cache, buffers = empty_caches((3, 4, 2, 24), stored, cache_layout, CPU)
        with pytest.raises(RuntimeError) as error:
            reshape_and_cache_flash(key, value, key_cache, value_cache, slots, name, ONE, ONE)
        assert str(error.value) == (
            "fp8kv::reshape_and_cache_flash: slot_mapping must have slots below "
            f"num_blocks * block_size = 12, got {slot} for token 1"
        )
        for buffer in buffers:
            assert_same_bytes(buffer, sentinels(buffer.shape, stored, CPU))


def test_debug_mode_raises_on_cuda_before_anything_is_written(cuda: torch.device) -> None:
    code = """
import torch, fp8kv
key = torch.ones(3, 2, 8, device="cuda")
caches = torch.zeros(2, 3, 4, 2, 8, device="cuda").to(torch.float8_e4m3fn)
scales = torch.zeros(2, 3, 4, 2, device="cuda")
one = torch.ones(1, device="cuda")
slots = torch.tensor([1, 12, 7], device="cuda")
def attempt(op, *arguments):
    try:
        op(*arguments)
    except RuntimeError as error:
        print(error)
attempt(fp8kv.reshape_and_cache_flash, key, key, *caches, slots, "fp8", one, one)
attempt(fp8kv.reshape_and_cache_flash_dynamic, key, key, *caches, *scales, slots, "fp8")
assert not caches.view(torch.uint8).any() and not scales.any()
fp8kv.reshape_and_cache_flash(key, key, *caches, slots.clamp(max=11), "fp8", one, one)
assert caches.view(torch.uint8).any()
"""
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"FP8KV_DEBUG": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sentence = "slot_mapping must have slots below num_blocks * block_size = 12, got 12 for token 1"
    assert result.stdout.splitlines() == [
        f"fp8kv::reshape_and_cache_flash: {sentence}",
        f"fp8kv::reshape_and_cache_flash_dynamic: {sentence}",
    ]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(("num_heads", "head_size"), [(8, 16), (1, 576), (1, 1), (3, 37)])
def test_of_several_tokens_for_a_slot_the_last_stays_on_the_cpu(num_heads: int, head_size: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = key_and_value(20_000 if head_size < 100 else 3000, num_heads, head_size, torch.bfloat16)
    slots = torch.randint(0, 48, (len(key),), generator=generator)
    with torch_threads(threads):
        for scales in per_tensor_and_head(num_heads):
            check(CPU, key, value, slots, (3, 16), scales=scales)
        check(CPU, key, value, slots, (3, 16), "fp32")


@pytest.mark.parametrize(("num_heads", "head_size"), [(8, 128), (1, 576), (3, 37)])
def test_of_several_tokens_for_a_slot_each_byte_is_of_one_of_them_on_cuda(
    cuda: torch.device, num_heads: int, head_size: int
) -> None:
    key, value = key_and_value(1000, num_heads, head_size, torch.bfloat16)
    slots = torch.arange(1000) % 7
    one = ONE.to(cuda)
    key_cache, value_cache, buffers = empty_caches((2, 4, num_heads, head_size), E4M3, "NHD", cuda)
    reshape_and_cache_flash(key.to(cuda), value.to(cuda), key_cache, value_cache, slots.to(cuda), "fp8", one, one)
    for buffer, x in zip(buffers, (key, value), strict=True):
        stored = buffer.view(torch.uint8).cpu().flatten(0, 1)
        q = reference.quantize(x, ONE)[0].view(torch.uint8)
        for slot in range(7):
            assert (q[slots == slot] == stored[slot]).any(0).all()
        assert (stored[7] == 0xA5).all()


# Sizes


@pytest.mark.parametrize("cache", ["e4m3", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "blocks", "num_heads", "head_size"),
    [
        (0, (3, 4), 2, 24), (5, (3, 4), 0, 24), (5, (3, 4), 2, 0), (0, (0, 4), 2, 24), (0, (3, 0), 2, 24),
        (0, (0, 0), 0, 0),
    ],
)  # fmt: skip
def test_empty(device: torch.device, tokens: int, blocks: tuple[int, int], num_heads: int, head_size: int, cache: str) -> None:
    key = torch.ones(tokens, num_heads, head_size)
    for scale in (ONE, torch.ones(num_heads)):
        check(device, key, key, torch.arange(tokens), blocks, cache, (scale, scale))


def test_a_cache_without_slots_takes_tokens_that_are_skipped(device: torch.device) -> None:
    key = torch.ones(5, 2, 24)
    for blocks in ((0, 4), (3, 0)):
        check(device, key, key, torch.full((5,), -1), blocks)


@each_real
def test_a_long_head(device: torch.device, real: torch.dtype) -> None:
    for num_heads, head_size in ((1, 20_000), (2, 5137)):
        key, value = key_and_value(3, num_heads, head_size, real)
        for scales in per_tensor_and_head(num_heads):
            check(device, key, value, torch.tensor([3, 0, 1]), (2, 2), scales=scales)


@pytest.mark.large
@each_large_cache
def test_the_far_end_of_a_large_cache(cuda: torch.device, blocks: tuple[int, int], num_heads: int, head_size: int) -> None:
    require_gpu_memory(cuda, 24)
    caches = [torch.zeros(*blocks, num_heads, head_size, dtype=torch.uint8, device=cuda).view(E4M3) for _ in "kv"]
    first = (blocks[0] - 2) * blocks[1]
    key, value = key_and_value(20, num_heads, head_size, torch.bfloat16)
    slots = random_slots(20, 2 * blocks[1])
    scale = random_scales((num_heads,))
    reshape_and_cache_flash(
        key.to(cuda), value.to(cuda), *caches, torch.where(slots < 0, slots, slots + first).to(cuda), "fp8",
        scale.to(cuda), scale.to(cuda),
    )  # fmt: skip
    expected = [torch.zeros(2, blocks[1], num_heads, head_size).to(E4M3) for _ in "kv"]
    reference.reshape_and_cache_flash(key, value, *expected, slots, "fp8", scale, scale)
    for cache, tail in zip(caches, expected, strict=True):
        assert_same_bytes(cache[-2:], tail)
        assert not any(piece.any() for piece in cache[:-2].view(torch.uint8).split(1 << 20))


# Any bits


@each_real
def test_any_bits_as_keys_and_scales(device: torch.device, real: torch.dtype) -> None:
    key, value = random_bits((40, 8, 64), real), random_bits((40, 8, 64), real).flip(0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        k, v = (random_bits((8,), torch.float32, generator) for _ in "kv")
        for cache in ("e4m3", "e5m2", "int8"):
            check(device, key, value, torch.arange(40), (3, 16), cache, (k, v))
