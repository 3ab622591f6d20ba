"""Scales per channel and offsets of the cache operations, and what attention on the CPU reads of them.

What is refused, and how, is in test_errors.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import reference
from helpers import (
    LAYOUTS,
    QUANTIZED_CACHES,
    REAL,
    TRAP_SCALES,
    assert_same_bytes,
    compare_caches,
    copy_bits,
    each_cache_layout,
    each_geometry,
    each_quantized_cache,
    each_real,
    empty_caches,
    empty_view,
    fp8_boundaries,
    key_and_value,
    neighbors,
    placed,
    random_bits,
    random_scales,
    random_slots,
    torch_threads,
    values,
)

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")
ONE = torch.ones(1)
each_ops = pytest.mark.parametrize("ops", [fp8kv, reference], ids=["fp8kv", "reference"])
Parameters = dict[str, Tensor]


def forms(num_heads: int, head_size: int) -> list[Parameters]:
    """Scales per channel, for K alone, for both, with offsets and without; and offsets with other scales."""
    shape = (num_heads, head_size)
    k, v, per_head = random_scales(shape), random_scales(shape, seed=2), random_scales((num_heads,), seed=3)
    offsets = {"k_offset": values(shape, torch.float32, 4), "v_offset": values(shape, torch.float32, 5)}
    return [
        {"k_scale": k, "v_scale": per_head},
        {"k_scale": k, "v_scale": v} | offsets,
        {"k_scale": per_head, "v_scale": ONE} | offsets,
        {"k_scale": k, "v_scale": v},
    ]


def laid_out(parameters: Parameters, layout: str, device: torch.device) -> Parameters:
    if layout == "contiguous":
        return {name: x.to(device) for name, x in parameters.items()}
    return {name: placed(x, layout, device) for name, x in parameters.items()}


def check_append(
    device: torch.device,
    key: Tensor,
    value: Tensor,
    parameters: Parameters,
    cache: str = "e4m3",
    blocks: tuple[int, int] = (5, 8),
    cache_layout: str = "NHD",
    layout: str = "contiguous",
) -> None:
    """`layout` is that of scales and offsets; contiguous: as they are."""
    name, dtype, _ = QUANTIZED_CACHES[cache]
    slots = random_slots(len(key), blocks[0] * blocks[1])

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        ops.reshape_and_cache_flash(
            key.to(at), value.to(at), key_cache, value_cache, slots.to(at), name,
            **laid_out(parameters, layout, at),
        )  # fmt: skip

    compare_caches(device, (*blocks, *key.shape[1:]), dtype, cache_layout, store)


def check_append_dynamic(
    device: torch.device,
    key: Tensor,
    value: Tensor,
    offsets: Parameters,
    cache: str = "e4m3",
    layout: str = "contiguous",
) -> None:
    """`layout` is that of offsets."""
    name, dtype, _ = QUANTIZED_CACHES[cache]
    shape = (5, 8, *key.shape[1:])
    slots = random_slots(len(key), 40)
    buffers: list[Tensor] = []

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        scales, buffer = empty_view((2, *shape[:3]), torch.float32, "columns", at)
        buffers.append(buffer)
        ops.reshape_and_cache_flash_dynamic(
            key.to(at), value.to(at), key_cache, value_cache, *scales, slots.to(at), name,
            **laid_out(offsets, layout, at),
        )  # fmt: skip

    compare_caches(device, shape, dtype, "NHD", store)
    assert_same_bytes(*buffers)


def check_gather(
    device: torch.device,
    shape: tuple[int, int, int, int],
    parameters: Parameters,
    cache: str = "e4m3",
    real: torch.dtype = torch.bfloat16,
    cache_layout: str = "NHD",
    layout: str = "contiguous",
    contents: Tensor | None = None,
) -> None:
    """Of caches with any bits in them. `layout` is that of key and value, scales and offsets."""
    name, dtype, _ = QUANTIZED_CACHES[cache]
    contents = random_bits((2, *shape), dtype) if contents is None else contents
    count = shape[0] * shape[1] - 3
    table = torch.randperm(shape[0]).view(1, -1).to(torch.int32)
    buffers = []
    for ops, at in ((fp8kv, device), (reference, CPU)):
        key_cache, value_cache, _ = empty_caches(shape, dtype, cache_layout, at)
        copy_bits(key_cache, contents[0])
        copy_bits(value_cache, contents[1])
        (key, around_key), (value, around_value) = (empty_view((count + 2, *shape[2:]), real, layout, at) for _ in "kv")
        ops.gather_and_dequant_cache(
            key_cache, value_cache, key, value, table.to(at),
            torch.tensor([0, count], dtype=torch.int32, device=at), name,
            seq_starts=torch.tensor([2], dtype=torch.int32, device=at), **laid_out(parameters, layout, at),
        )  # fmt: skip
        buffers.append((around_key, around_value))
    for actual, expected in zip(*buffers, strict=True):
        assert_same_bytes(actual, expected)


# By hand


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """Tensors are made on the device."""
    with device:
        yield


@pytest.mark.usefixtures("on_device")
@each_ops
def test_what_is_stored_and_read(ops: ModuleType) -> None:
    key = torch.tensor([[[3.0, 1.0], [-6.0, math.nan]]])
    scale, offset = torch.tensor([[0.5, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    cache, one = torch.zeros(2, 1, 1, 2, 2, dtype=E4M3), torch.ones(1)
    slot = torch.tensor([0])
    ops.reshape_and_cache_flash(key, key, *cache, slot, "fp8", scale, one, k_offset=offset)
    assert cache[0, 0, 0, 0].tolist() == [4.0, 2.0]  # (3 - 1) / 0.5, (1 + 3) / 2
    assert cache[0, 0, 0, 1, 0].item() == -8.0  # -6 - 2
    assert cache.view(torch.uint8)[0, 0, 0, 1, 1].item() == 0x7F
    assert cache[1, 0, 0, 0].tolist() == [3.0, 1.0]

    out = torch.empty(2, 1, 2, 2)
    table, sums = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    ops.gather_and_dequant_cache(*cache, *out, table, sums, "fp8", scale, one, k_offset=offset)
    assert out[0, 0, 0].tolist() == [3.0, 1.0]
    assert out[0, 0, 1, 0].item() == -6.0
    assert out.view(torch.int32)[0, 0, 1, 1].item() == 0x7FC00000


@pytest.mark.usefixtures("on_device")
@each_ops
def test_the_difference_is_rounded_to_fp32_once(ops: ModuleType) -> None:
    """17 + 2^-21 becomes 17, a tie of E4M3 that goes to 16; the exact difference would go to 18."""
    x, offset = torch.tensor([[[17.0]]]), torch.tensor([[-(2.0**-21)]])
    cache, one = torch.zeros(2, 1, 1, 1, 1, dtype=E4M3), torch.ones(1)
    ops.reshape_and_cache_flash(x, x, *cache, torch.tensor([0]), "fp8", one, one, k_offset=offset)
    assert cache[0].item() == 16.0


@pytest.mark.usefixtures("on_device")
@each_ops
def test_product_and_sum_are_each_rounded_to_fp32(ops: ModuleType) -> None:
    """Fused, the result would differ: the product has 25 bits, of which the last is lost before the sum."""
    scale, offset = torch.tensor([[1 + 2.0**-23]]), torch.tensor([[-3.0]])
    cache = torch.full((2, 1, 1, 1, 1), 3.0).to(E4M3)
    out, one = torch.empty(2, 1, 1, 1), torch.ones(1)
    table, sums = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    ops.gather_and_dequant_cache(*cache, *out, table, sums, "fp8", scale, one, k_offset=offset)
    assert out[0].item() == 2.0**-21  # 3 + 3 * 2^-23 is a tie, and becomes 3 + 2^-21
    assert 3 * scale.double().item() - 3 == 1.5 * 2.0**-22


@pytest.mark.usefixtures("on_device")
@each_ops
def test_a_dynamic_scale_is_that_of_the_difference(ops: ModuleType) -> None:
    """Over its finite elements: a difference that overflows counts as infinite."""
    largest = torch.finfo(torch.float32).max
    key = torch.tensor([[[10.0, 3.0, largest, math.nan]]])
    offset = torch.tensor([[3.0, 10.0, -largest, 0.0]])
    cache, scales = torch.zeros(2, 1, 1, 1, 4, dtype=E4M3), torch.zeros(2, 1, 1, 1)
    ops.reshape_and_cache_flash_dynamic(key, key, *cache, *scales, torch.tensor([0]), "fp8", offset, None)
    assert scales[0].item() == 7 / 448
    assert cache.view(torch.uint8)[0].flatten().tolist() == [0x7E, 0xFE, 0x7E, 0x7F]
    assert scales[1].item() == torch.tensor(largest).div(torch.tensor(448.0)).item()


@each_ops
def test_an_offset_of_zero_gives_the_bytes_of_none(device: torch.device, ops: ModuleType) -> None:
    key, value = (x.to(device) for x in key_and_value(20, 3, 40, torch.bfloat16))
    zero = torch.zeros(3, 40, device=device)
    caches = torch.zeros(2, 2, 5, 4, 3, 40, dtype=E4M3, device=device)
    slots, scale = random_slots(20, 20).to(device), random_scales((3, 40)).to(device)
    for pair, offsets in zip(caches, ({}, {"k_offset": zero, "v_offset": zero}), strict=True):
        ops.reshape_and_cache_flash(key, value, *pair, slots, "fp8", scale, scale, **offsets)
    assert_same_bytes(*caches)
    out = torch.zeros(2, 2, 20, 3, 40, dtype=torch.bfloat16, device=device)
    table = torch.arange(5, dtype=torch.int32, device=device).view(1, 5)
    sums = torch.tensor([0, 20], dtype=torch.int32, device=device)
    for pair, offsets in zip(out, ({}, {"k_offset": zero, "v_offset": zero}), strict=True):
        ops.gather_and_dequant_cache(*caches[0], *pair, table, sums, "fp8", scale, scale, **offsets)
    assert_same_bytes(out[0].add(0.0).nan_to_num(), out[1].nan_to_num())  # the sum makes -0 a 0


# Against the reference


@each_real
@each_geometry
def test_append(kernels: torch.device, geometry: tuple[int, int, int], real: torch.dtype) -> None:
    block_size, *heads = geometry
    key, value = key_and_value(11, *heads, real)
    for cache, parameters in product(("e4m3", "e5m2 in uint8", "int8"), forms(*heads)):
        check_append(kernels, key, value, parameters, cache, (-(-20 // block_size), block_size))
    check_append(kernels, key, value, forms(*heads)[1], "e5m2", (20, 1), "HND")


@each_real
@each_geometry
def test_append_dynamic(kernels: torch.device, geometry: tuple[int, int, int], real: torch.dtype) -> None:
    key, value = key_and_value(11, *geometry[1:], real)
    offsets = {name: x for name, x in forms(*geometry[1:])[1].items() if name.endswith("offset")}
    for cache in ("e4m3", "e5m2", "int8"):
        check_append_dynamic(kernels, key, value, offsets, cache)


@each_real
@each_geometry
def test_gather(kernels: torch.device, geometry: tuple[int, int, int], real: torch.dtype) -> None:
    shape = (3, min(geometry[0], 8), *geometry[1:])
    for cache, parameters in product(("e4m3", "e5m2 in uint8", "int8"), forms(*geometry[1:])):
        check_gather(kernels, shape, parameters, cache, real)
    per_token = {"k_scale": random_scales(shape[:3]), "v_scale": random_scales(shape[:3], seed=2)}
    check_gather(kernels, shape, forms(*geometry[1:])[1] | per_token, real=real, cache_layout="HND")


@each_cache_layout
def test_layouts_of_caches(device: torch.device, cache_layout: str) -> None:
    for heads, real in (((2, 64), torch.bfloat16), ((3, 37), torch.float32), ((8, 1), torch.float16)):
        key, value = key_and_value(13, *heads, real)
        for parameters in forms(*heads):
            check_append(device, key, value, parameters, cache_layout=cache_layout)
            check_gather(device, (5, 4, *heads), parameters, real=real, cache_layout=cache_layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_scales_and_offsets(device: torch.device, layout: str) -> None:
    key, value = key_and_value(13, 3, 40, torch.bfloat16)
    for parameters in forms(3, 40):
        check_append(device, key, value, parameters, layout=layout)
        check_gather(device, (5, 4, 3, 40), parameters, layout=layout)
        offsets = {name: x for name, x in parameters.items() if name.endswith("offset")}
        check_append_dynamic(device, key, value, offsets, layout=layout)


@each_real
def test_many_tokens(device: torch.device, real: torch.dtype) -> None:
    """So many that on CUDA a thread takes several, and a number that leaves one over."""
    key, value = key_and_value(517, 8, 128, real)
    for cache, parameters in product(("e4m3", "int8"), forms(8, 128)):
        check_append(device, key, value, parameters, cache, (40, 16))
        check_gather(device, (40, 16, 8, 128), parameters, cache, real)


@pytest.mark.parametrize("shape", [(1, 40), (3, 1), (1, 1)], ids=str)
def test_expanded_scales_and_offsets(device: torch.device, shape: tuple[int, int]) -> None:
    key, value = key_and_value(13, 3, 40, torch.float16)
    names = ("k_scale", "v_scale", "k_offset")
    one = {name: random_scales(shape).to(device).expand(3, 40) for name in names}
    check_append(device, key, value, one)
    check_gather(device, (5, 4, 3, 40), one)


@each_quantized_cache
def test_quotients_beside_every_rounding_boundary(kernels: torch.device, cache: str) -> None:
    """Each scale in a channel of its own, with its neighbors: ordinary ones, and such that divide."""
    scales = TRAP_SCALES[TRAP_SCALES.isfinite() & (TRAP_SCALES > 0)]
    scales = torch.cat((scales, scales[: -len(scales) % 8]))  # whole vectors
    dtype = QUANTIZED_CACHES[cache][2]
    x = neighbors(scales[:, None] * fp8_boundaries(dtype)[1:], 2).view(len(scales), -1).t()
    x = x.contiguous().view(len(x), 1, len(scales))
    parameters = {"k_scale": scales.view(1, -1), "v_scale": scales.view(1, -1)}
    check_append(kernels, x, -x, parameters, cache, (len(x), 1))


def test_hostile_scales_and_offsets(kernels: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    key, value = random_bits((13, 4, 64), torch.float32), random_bits((13, 4, 64), torch.float32, generator)
    for _ in range(8):
        names = ("k_scale", "v_scale", "k_offset", "v_offset")
        parameters = {name: random_bits((4, 64), torch.float32, generator) for name in names}
        parameters["k_scale"][0] = TRAP_SCALES[:64]
        for cache in ("e4m3", "e5m2", "int8"):
            check_append(kernels, key, value, parameters, cache)
            for real in REAL.values():
                check_gather(kernels, (5, 4, 4, 64), parameters, cache, real)


@pytest.mark.parametrize("heads", [(70, 80), (2, 5000), (1, 9000)], ids=str)
def test_more_channels_than_are_made_ready_at_a_time(device: torch.device, heads: tuple[int, int]) -> None:
    key, value = key_and_value(3, *heads, torch.bfloat16)
    for cache_layout, parameters in product(("HND", "steps"), forms(*heads)):
        check_append(device, key, value, parameters, blocks=(2, 2), cache_layout=cache_layout)
        check_gather(device, (2, 2, *heads), parameters, cache_layout=cache_layout)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_of_several_tokens_for_a_slot_the_last_stays(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for heads in ((8, 16), (1, 576), (3, 37)):
        key, value = key_and_value(4000, *heads, torch.bfloat16)
        slots = torch.randint(0, 48, (4000,), generator=generator)
        parameters = forms(*heads)[1]

        def store(
            ops: ModuleType,
            key_cache: Tensor,
            value_cache: Tensor,
            at: torch.device,
            arguments: tuple[Any, ...] = (key, value, slots, parameters),
        ) -> None:
            key, value, slots, parameters = arguments
            ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, "fp8", **parameters)

        with torch_threads(threads):
            compare_caches(CPU, (3, 16, *heads), E4M3, "NHD", store)


def test_a_plain_copy_checks_scales_per_channel_and_does_not_use_them(device: torch.device) -> None:
    key, value = (x.to(device) for x in key_and_value(5, 2, 24, torch.bfloat16))
    cache = torch.zeros(2, 2, 4, 2, 24, dtype=torch.bfloat16, device=device)
    nan = torch.full((2, 24), math.nan, device=device)
    fp8kv.reshape_and_cache_flash(key, value, *cache, torch.arange(5, device=device), "auto", nan, nan)
    assert_same_bytes(cache[0].flatten(0, 1)[:5], key)
    out = torch.zeros(2, 5, 2, 24, dtype=torch.bfloat16, device=device)
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    sums = torch.tensor([0, 5], dtype=torch.int32, device=device)
    fp8kv.gather_and_dequant_cache(*cache, *out, table, sums, "bfloat16", nan, nan)
    assert_same_bytes(out[1], value)


# The fused step


@pytest.mark.parametrize("rope", [None, True, False], ids=["none", "neox", "interleaved"])
@each_real
def test_the_fused_step(kernels: torch.device, real: torch.dtype, rope: bool | None) -> None:
    for heads, query_heads, cache_layout in (
        ((2, 64), 8, "NHD"),
        ((3, 20), 3, "HND"),
        ((70, 80), 70, "steps"),
    ):
        for cache, parameters in product(("e4m3", "int8"), forms(*heads)):
            check_step(kernels, heads, query_heads, real, rope, cache, cache_layout, parameters)


def check_step(
    device: torch.device,
    heads: tuple[int, int],
    query_heads: int,
    real: torch.dtype,
    rope: bool | None,
    cache: str,
    cache_layout: str,
    parameters: Parameters,
) -> None:
    name, dtype, _ = QUANTIZED_CACHES[cache]
    tokens = 7
    query = values((tokens, query_heads, heads[1]), real, 6)
    key, value = key_and_value(tokens, *heads, real)
    q_scale = random_scales((heads[0],), seed=7)
    arguments: dict[str, Any] = {"q_scale": q_scale} | parameters
    if rope is not None:
        angles = torch.arange(10.0).view(-1, 1) * torch.linspace(0.1, 1, heads[1] // 2)
        table = torch.cat((angles.cos(), angles.sin()), 1)
        arguments |= {
            "positions": torch.arange(tokens) + 2, "cos_sin_cache": table, "is_neox": rope
        }  # fmt: skip
    outputs: list[Tensor] = []

    def store(ops: ModuleType, key_cache: Tensor, value_cache: Tensor, at: torch.device) -> None:
        out = torch.zeros(query.shape, dtype=real if cache == "int8" else dtype, device=at)
        outputs.append(out)
        given = {name: x.to(at) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        ops.rope_quant_and_cache(
            query.to(at), key.to(at), value.to(at), out, key_cache, value_cache,
            random_slots(tokens, 20).to(at), name, **given,
        )  # fmt: skip

    compare_caches(device, (5, 4, *heads), dtype, cache_layout, store)
    assert_same_bytes(*outputs)


# What attention reads


@pytest.mark.parametrize("form", range(4))
def test_attention_reads_what_was_stored(form: int) -> None:
    """As from the gathered values: offsets and scales mean the same in both."""
    heads, length = (2, 32), 21
    generator = torch.Generator().manual_seed(8)
    bias = 30 * torch.randn(2, *heads, generator=generator)
    key, value = torch.randn(2, length, *heads, generator=generator) + bias.unsqueeze(1)
    parameters = forms(*heads)[form]
    if "k_offset" in parameters:
        parameters |= {"k_offset": bias[0], "v_offset": bias[1]}
    cache = torch.zeros(2, 4, 8, *heads, dtype=E4M3)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    slots = table[0, torch.arange(length) // 8] * 8 + torch.arange(length) % 8
    fp8kv.reshape_and_cache_flash(key, value, *cache, slots, "fp8", **parameters)
    k, v = torch.empty(2, length, *heads)
    sums = torch.tensor([0, length], dtype=torch.int32)
    fp8kv.gather_and_dequant_cache(*cache, k, v, table, sums, "fp8", **parameters)

    query = torch.randn(1, 4, 32, generator=generator)
    lengths = torch.tensor([length], dtype=torch.int32)
    out = fp8kv.paged_attention(query, *cache, table, lengths, kv_cache_dtype="fp8", **parameters)
    q = query.double().view(2, 2, 32)
    logits = torch.einsum("hgd,thd->hgt", q, k.double()) / math.sqrt(32)
    expected = torch.einsum("hgt,thd->hgd", logits.softmax(-1), v.double()).reshape(1, 4, 32)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
