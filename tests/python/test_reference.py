"""The executable specification against tables written by hand and against independent arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction

import pytest
import torch

from fp8kv import reference
from helpers import (
    FP8,
    REAL,
    TRAP_SCALES,
    all_fp8,
    all_patterns,
    assert_same_bytes,
    each_fp8,
    each_real,
    from_bits,
    raw,
    values,
)

NAN, INF = math.nan, math.inf

# value, byte; OCP 8-bit Floating Point Specification, tables 1 and 2
E4M3_TABLE = [
    (0.0, 0x00), (-0.0, 0x80), (1.0, 0x38), (-1.0, 0xB8), (1.125, 0x39), (2.0, 0x40), (448.0, 0x7E),
    (-448.0, 0xFE),
    (2.0**-6, 0x08), (0.875 * 2.0**-6, 0x07), (2.0**-9, 0x01), (-(2.0**-9), 0x81),
    (1.0625, 0x38), (1.1875, 0x3A),  # ties go to the even mantissa
    (2.0**-10, 0x00), (-(2.0**-10), 0x80), (3 * 2.0**-10, 0x02), (1.001 * 2.0**-10, 0x01),
    (449.0, 0x7E), (464.0, 0x7E), (1e30, 0x7E), (INF, 0x7E), (-INF, 0xFE), (NAN, 0x7F), (-NAN, 0x7F),
]  # fmt: skip
E5M2_TABLE = [
    (0.0, 0x00), (-0.0, 0x80), (1.0, 0x3C), (-1.0, 0xBC), (1.25, 0x3D), (2.0, 0x40), (57344.0, 0x7B),
    (-57344.0, 0xFB),
    (2.0**-14, 0x04), (0.75 * 2.0**-14, 0x03), (2.0**-16, 0x01), (-(2.0**-16), 0x81),
    (1.125, 0x3C), (1.375, 0x3E),
    (2.0**-17, 0x00), (-(2.0**-17), 0x80), (3 * 2.0**-17, 0x02), (1.001 * 2.0**-17, 0x01),
    (61440.0, 0x7B), (65536.0, 0x7B), (1e30, 0x7B), (INF, 0x7B), (-INF, 0xFB), (NAN, 0x7F), (-NAN, 0x7F),
]  # fmt: skip
TABLES = [
    pytest.param(dtype, value, byte, id=f"{name}-{value!r}")
    for name, dtype, table in (("e4m3", FP8["e4m3"], E4M3_TABLE), ("e5m2", FP8["e5m2"], E5M2_TABLE))
    for value, byte in table
]


@pytest.mark.parametrize(("dtype", "value", "byte"), TABLES)
def test_a_value_becomes_the_byte_of_the_format(dtype: torch.dtype, value: float, byte: int) -> None:
    q, _ = reference.quantize(torch.tensor([value]), torch.tensor(1.0), dtype=dtype)
    assert raw(q).item() == byte


def decoded(byte: int, mantissa_bits: int, bias: int) -> Fraction:
    """The finite value of a byte without its sign, by the definition of the formats."""
    exponent, mantissa = byte >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return Fraction(mantissa, 1 << mantissa_bits) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(mantissa, 1 << mantissa_bits)) * Fraction(2) ** (exponent - bias)


LADDERS = {
    torch.float8_e4m3fn: [decoded(byte, 3, 7) for byte in range(0x7F)],
    torch.float8_e5m2: [decoded(byte, 2, 15) for byte in range(0x7C)],
}


def nearest_byte(x: float, dtype: torch.dtype) -> int:
    """Round to nearest, ties to even, saturating: by search in the list of all values, exactly."""
    if math.isnan(x):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    ladder = LADDERS[dtype]
    if math.isinf(x) or Fraction(abs(x)) >= ladder[-1]:
        return sign | (len(ladder) - 1)
    magnitude = Fraction(abs(x))
    above = bisect_left(ladder, magnitude)
    if ladder[above] == magnitude:
        return sign | above
    down, up = magnitude - ladder[above - 1], ladder[above] - magnitude
    if down == up:
        return sign | (above if above % 2 == 0 else above - 1)
    return sign | (above if up < down else above - 1)


@each_fp8
def test_every_bf16_value_rounds_to_the_nearest(fp8: torch.dtype) -> None:
    x = all_patterns(torch.bfloat16)
    q, _ = reference.quantize(x, torch.tensor(1.0), dtype=fp8)
    expected = torch.tensor([nearest_byte(v, fp8) for v in x.float().tolist()], dtype=torch.uint8)
    assert_same_bytes(q, expected.view(fp8))


@each_fp8
def test_quotients_round_once_to_fp32_and_once_to_fp8(fp8: torch.dtype) -> None:
    """The fp32 quotient by way of exact rationals, where nothing is subnormal."""
    x = values((200,), torch.float32, seed=3, specials=False)
    for scale in (0.3, 1.9999998807907104, 7.0, 1e-3):
        s = torch.tensor(scale)
        exact = [Fraction(v) / Fraction(s.item()) for v in x.tolist()]
        quotient = torch.tensor([round_to_fp32(v) for v in exact], dtype=torch.float64).tolist()
        expected = torch.tensor([nearest_byte(v, fp8) for v in quotient], dtype=torch.uint8).view(fp8)
        assert_same_bytes(reference.quantize(x, s, dtype=fp8)[0], expected)


def round_to_fp32(x: Fraction) -> float:
    """Nearest fp32, ties to even; x is 0 or in the normal range."""
    if x == 0:
        return 0.0
    sign = -1 if x < 0 else 1
    x = abs(x)
    exponent = math.floor(math.log2(x))
    exponent += 1 if Fraction(2) ** (exponent + 1) <= x else 0
    exponent -= 1 if Fraction(2) ** exponent > x else 0
    unit = Fraction(2) ** (exponent - 23)
    return sign * float(round(x / unit) * unit)  # round() of a Fraction takes ties to even


def test_the_scale_divides_and_is_not_multiplied_by_its_reciprocal() -> None:
    scale = from_bits(0x3FCFFFFF)
    x = torch.tensor([13 * 2.0**-13])
    assert raw(reference.quantize(x, scale)[0]).item() == 0x01
    assert raw((x * (1 / scale)).to(torch.float8_e4m3fn)).item() == 0x00, "the trap does not spring"
    assert raw(reference.quantize(torch.tensor([2.0**-9]), from_bits(0x3FFFFFFF))[0]).item() == 0x01


@each_fp8
def test_torch_division_clamp_and_conversion_agree_but_for_the_sign_of_nan(fp8: torch.dtype) -> None:
    x = values((100, 333), torch.float32)
    limit = torch.finfo(fp8).max
    for scale in TRAP_SCALES:
        quotient = x / scale
        expected = quotient.clamp(-limit, limit).to(fp8)
        keep = ~quotient.isnan()
        q, _ = reference.quantize(x, scale, dtype=fp8)
        assert torch.equal(raw(q)[keep], raw(expected)[keep])
        assert (raw(q)[~keep] == 0x7F).all()


@pytest.mark.parametrize(
    ("x", "scale", "byte"),
    [(1.0, 0.0, 0x7E), (-1.0, 0.0, 0xFE), (0.0, 0.0, 0x7F), (1.0, INF, 0x00), (-1.0, INF, 0x80),
    (INF, INF, 0x7F),
     (1.0, NAN, 0x7F), (1.0, -1.0, 0xB8), (1e-45, 1e-45, 0x38)],
)  # fmt: skip
def test_a_scale_nobody_should_have_follows_the_rule(x: float, scale: float, byte: int) -> None:
    assert raw(reference.quantize(torch.tensor([x]), torch.tensor(scale))[0]).item() == byte


# Dynamic scales


@each_fp8
def test_a_dynamic_scale_is_amax_by_the_largest_value(fp8: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.0], [0.5, 0.25]])
    _, scale = reference.quantize(x, group_shape=(1, -1), dtype=fp8)
    largest = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}[fp8]
    expected = torch.tensor([[round_to_fp32(Fraction(3.0) / Fraction(largest))], [0.5 / largest]])
    assert_same_bytes(scale, expected)


@pytest.mark.parametrize(
    ("fp8", "bits"),
    [pytest.param(FP8["e4m3"], 0x36924925, id="e4m3"), pytest.param(FP8["e5m2"], 0x33124925, id="e5m2")],
)
def test_a_group_of_zeros_gets_the_smallest_scale(fp8: torch.dtype, bits: int) -> None:
    q, scale = reference.quantize(torch.tensor([[0.0, -0.0]]), dtype=fp8)
    assert_same_bytes(scale, from_bits([bits]))
    assert raw(q).flatten().tolist() == [0x00, 0x80]


def test_nan_and_infinity_do_not_change_the_scale_of_others() -> None:
    x = torch.tensor([[448.0, NAN, INF, -INF, 224.0]])
    q, scale = reference.quantize(x)
    assert scale.item() == 1.0
    assert raw(q).flatten().tolist() == [0x7E, 0x7F, 0x7E, 0xFE, 0x76]


@pytest.mark.parametrize(
    ("bound", "expected"),
    [(224.0, 0.5), (1000.0, 1.0), (INF, 1.0), (NAN, 1.0), (0.0, None), (-5.0, None), (-INF, None)],
)
def test_scale_ub_bounds_amax(bound: float, expected: float | None) -> None:
    _, scale = reference.quantize(torch.tensor([448.0]), scale_ub=torch.tensor(bound))
    assert scale.item() == (reference.min_scale(torch.float8_e4m3fn) if expected is None else expected)


# Groups: the scale of every element, counted out


@pytest.mark.parametrize(
    ("shape", "group", "scale_shape"),
    [
        ((3, 4), None, ()), ((3, 4), None, (1,)), ((3, 4), (-1, -1), (1, 1, 1)),
        ((3, 4), (1, -1), (3,)), ((3, 4), (1, -1), (3, 1)), ((2, 3, 4), (1, -1), (6,)), ((2, 3, 4),
        (1, -1), (2, 3, 1)),
        ((3, 4), (-1, 1), (4,)), ((3, 4), (-1, 1), (1, 4)), ((2, 3, 6), (-1, 2), (3,)), ((3, 7), (-1, 2),
        (4,)),
        ((5, 7), (2, 3), (3, 3)), ((5, 7), (2, -1), (3, 1)), ((5, 7), (2, -1), (3,)), ((2, 5, 7), (4, 3),
        (3, 3)),
        ((5, 7), (100, 3), (1, 3)), ((5, 7), (1, 3), (5, 3)), ((2, 3, 7), (1, 3), (2, 3, 3)), ((5, 7),
        (2, 3), (1, 3, 3)),
        ((7,), (-1, 3), (3,)), ((7,), (1, 3), (3,)), ((7,), (1, 1), (7,)),
        ((4, 6), None, (2, 3)), ((4, 6), None, (4, 1)), ((2, 3, 4), None, (1, 3, 1)), ((2, 3, 4), None,
        (2, 3, 4)),
    ],
)  # fmt: skip
def test_every_element_meets_the_scale_of_its_group(
    shape: tuple[int, ...], group: tuple[int, int] | None, scale_shape: tuple[int, ...]
) -> None:
    """Powers of two as scales: the exponent of the result says which scale an element met."""
    count = math.prod(scale_shape)
    scale = torch.exp2(torch.arange(count).float() - count // 2).reshape(scale_shape)
    q = torch.full(shape, 1.0).to(torch.float8_e4m3fn)
    met = reference.dequantize(q, scale, group_shape=group, dtype=torch.float32).log2().int() + count // 2

    rows, cols = math.prod(shape[:-1]), shape[-1]
    for flat in range(rows * cols):
        index = tuple(torch.unravel_index(torch.tensor(flat), shape))
        index = tuple(int(i) for i in index)
        if group is None and count > 1:
            blocks = [n // s for n, s in zip(shape, scale_shape, strict=True)]
            expected = 0
            for i, block, s in zip(index, blocks, scale_shape, strict=True):
                expected = expected * s + i // block
        elif group is None:
            expected = 0
        else:
            row, col = divmod(flat, cols)
            height = rows if group[0] == -1 else group[0]
            width = cols if group[1] == -1 else group[1]
            expected = (row // height) * math.ceil(cols / width) + col // width
        assert int(met[index]) == expected, index


@each_real
def test_group_amax_takes_the_largest_finite_magnitude_of_each_group(real: torch.dtype) -> None:
    x = torch.tensor([[1.0, -7.0, NAN], [INF, 2.0, 3.0], [-4.0, 0.5, -0.0]]).to(real)
    amax = torch.zeros(2, 2)
    reference.group_amax(amax, x, (2, 2))
    assert amax.tolist() == [[7.0, 3.0], [4.0, 0.0]]


def test_group_amax_keeps_what_is_larger_already() -> None:
    amax = torch.tensor([5.0, 1.0, NAN])
    reference.group_amax(amax, torch.tensor([[2.0, 3.0, 4.0]]), (-1, 1))
    assert amax[:2].tolist() == [5.0, 3.0]
    assert math.isnan(amax[2])


# Dequantize


@each_fp8
def test_every_byte_has_the_value_of_the_format(fp8: torch.dtype) -> None:
    x = reference.dequantize(all_fp8(fp8), torch.tensor(1.0), dtype=torch.float32)
    ladder = LADDERS[fp8]
    for byte, value in enumerate(x.tolist()):
        magnitude = byte & 0x7F
        if magnitude < len(ladder):
            assert abs(Fraction(value)) == ladder[magnitude]
            assert math.copysign(1.0, value) == (-1.0 if byte & 0x80 else 1.0)
        elif fp8 == torch.float8_e5m2 and magnitude == 0x7C:
            assert value == (-INF if byte & 0x80 else INF)
        else:
            assert math.isnan(value)


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        pytest.param(torch.float32, 0x7FC00000, id="fp32"),
        pytest.param(torch.float16, 0x7E00, id="fp16"),
        pytest.param(torch.bfloat16, 0x7FC0, id="bf16"),
    ],
)
@pytest.mark.parametrize(
    ("byte", "scale"),
    [(0x7F, 1.0), (0xFF, -2.0), (0x00, INF), (0x38, NAN)],
    ids=["nan", "-nan", "0*inf", "1*nan"],
)
def test_nan_is_the_positive_quiet_nan(dtype: torch.dtype, pattern: int, byte: int, scale: float) -> None:
    q = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = reference.dequantize(q, torch.tensor(scale), dtype=dtype)
    assert int.from_bytes(bytes(raw(x).flatten().tolist()), "little") == pattern


def test_a_product_is_rounded_once_more_to_the_output_type() -> None:
    q = torch.tensor([1.125, 448.0]).to(torch.float8_e4m3fn)
    scale = torch.tensor(1.0 + 2.0**-8)
    # 1.1294 and 449.75 in fp32; bf16 has eight bits
    assert reference.dequantize(q, scale).tolist() == [1.1328125, 450.0]
    assert reference.dequantize(q, torch.tensor(1000.0), dtype=torch.float16).tolist() == [1125.0, INF]


# The paged cache

ONE = torch.ones(1)


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_tokens_lie_at_their_slots() -> None:
    """2 blocks of 3 slots, 1 head of 2; K with the scale 0.5, V with 2.0."""
    caches = torch.full((2, 2, 3, 1, 2), 0x55, dtype=torch.uint8)
    key = torch.tensor([[[1.0, -0.25]], [[NAN, 1e9]], [[3.0, 3.0]]])
    slots = torch.tensor([4, 0, -1])
    reference.reshape_and_cache_flash(key, -key, *caches, slots, "fp8", ONE / 2, ONE * 2)
    assert caches[0, :, :, 0].tolist() == [
        [[0x7F, 0x7E], [0x55, 0x55], [0x55, 0x55]],
        [[0x55, 0x55], [0x40, 0xB0], [0x55, 0x55]],  # 2.0 and -0.5
    ]
    assert caches[1, :, :, 0].tolist() == [
        [[0x7F, 0xFE], [0x55, 0x55], [0x55, 0x55]],
        [[0x55, 0x55], [0xB0, 0x20], [0x55, 0x55]],  # -0.5 and 0.125
    ]


@pytest.mark.parametrize(("string", "byte"), [("fp8", 0x38), ("fp8_e4m3", 0x38), ("fp8_e5m2", 0x3C)])
def test_kv_cache_dtype_says_what_bytes_are(string: str, byte: int) -> None:
    for dtype in (torch.uint8, FP8["e5m2"] if string == "fp8_e5m2" else FP8["e4m3"]):
        caches = torch.zeros(2, 1, 1, 1, 1, dtype=torch.uint8).view(dtype)
        x = torch.ones(1, 1, 1)
        reference.reshape_and_cache_flash(x, x, *caches, torch.tensor([0]), string, ONE, ONE)
        assert raw(caches).flatten().tolist() == [byte, byte]
        key, value = torch.zeros(2, 1, 1, 1)
        reference.gather_and_dequant_cache(*caches, key, value, int32(0)[None], int32(0, 1), string, ONE, ONE)
        assert key.item() == value.item() == 1.0


def test_of_several_tokens_for_a_slot_the_last_stays() -> None:
    key = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(5, 1, 1)
    caches = torch.zeros(2, 1, 3, 1, 1)
    slots = torch.tensor([2, 0, 2, 0, 2])
    reference.reshape_and_cache_flash(key, -key, *caches, slots, "auto", ONE, ONE)
    assert caches.flatten().tolist() == [4.0, 0.0, 5.0, -4.0, 0.0, -5.0]


@each_fp8
@each_real
@pytest.mark.parametrize("per_head", [False, True], ids=["tensor", "head"])
def test_append_is_an_indexed_division(fp8: torch.dtype, real: torch.dtype, per_head: bool) -> None:
    """In HND, per tensor and per head; `caches[slots] = x / scale` with torch's own conversion."""
    key, value = values((7, 4, 10), real, specials=False), values((7, 4, 10), real, 1, specials=False)
    slots = torch.tensor([13, 2, 19, 0, 8, 5, 11])
    scales = [torch.tensor([0.3, 1.0, 7.0, 0.01][: 4 if per_head else 1]), torch.tensor([2.5])]
    caches = torch.zeros(2, 5, 4, 4, 10, dtype=torch.uint8).view(fp8).transpose(2, 3)
    reference.reshape_and_cache_flash(key, value, *caches, slots, "fp8_e5m2" if fp8 == FP8["e5m2"] else "fp8", *scales)
    limit = torch.finfo(fp8).max
    for x, cache, scale in zip((key, value), caches, scales, strict=True):
        expected = torch.zeros(20, 4, 10, dtype=torch.uint8)
        expected[slots] = (x.float() / scale[:, None]).clamp(-limit, limit).to(fp8).view(torch.uint8)
        assert_same_bytes(cache.reshape(20, 4, 10), expected.view(fp8))


def test_a_dynamic_scale_for_each_token_and_head() -> None:
    key = torch.tensor([[[448.0, -896.0], [INF, 7.0]], [[0.0, -0.0], [NAN, NAN]]])
    caches, scales = torch.zeros(2, 1, 4, 2, 2, dtype=torch.uint8), torch.full((2, 1, 4, 2), 77.0)
    reference.reshape_and_cache_flash_dynamic(key, 2 * key, *caches, *scales, torch.tensor([3, 1]), "fp8")
    least = reference.min_scale(torch.float8_e4m3fn)
    assert scales[0, 0].tolist() == [[77.0, 77.0], [least, least], [77.0, 77.0], [2.0, 0.015625]]
    assert scales[1, 0].tolist() == [[77.0, 77.0], [least, least], [77.0, 77.0], [4.0, 0.03125]]
    for side in caches[:, 0].tolist():
        assert side == [
            [[0, 0], [0, 0]], [[0x00, 0x80], [0x7F, 0x7F]], [[0, 0], [0, 0]], [[0x76, 0xFE], [0x7E, 0x7E]],
        ]  # fmt: skip


def test_positions_are_found_by_way_of_the_table() -> None:
    """3 blocks of 2 slots; two sequences, one of which begins at its second position."""
    cache = torch.arange(6.0).view(3, 2, 1, 1)
    key, value = torch.full((2, 7, 1, 1), 77.0)
    table, sums = torch.tensor([[2, 0, -9], [1, 2, 1]], dtype=torch.int32), int32(0, 3, 5)
    reference.gather_and_dequant_cache(
        cache.to(FP8["e4m3"]), cache.to(FP8["e4m3"]), key, value, table, sums, "fp8", ONE * 2, ONE * 3,
        int32(0, 1),
    )  # fmt: skip
    assert key.flatten().tolist() == [8.0, 10.0, 0.0, 6.0, 8.0, 77.0, 77.0]
    assert value.flatten().tolist() == [12.0, 15.0, 0.0, 9.0, 12.0, 77.0, 77.0]


@each_fp8
@each_real
@pytest.mark.parametrize("scale_shape", [(1,), (4, 1, 1), (6, 3, 4)], ids=["tensor", "head", "slot"])
def test_gather_is_an_indexed_product(fp8: torch.dtype, real: torch.dtype, scale_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 0x78, (2, 6, 3, 4, 10), generator=generator, dtype=torch.uint8).view(fp8)  # finite
    scales = torch.rand((2, *scale_shape), generator=generator) + 0.1
    table = torch.tensor([[4, 1, 5], [0, 3, 3], [2, 2, 2]], dtype=torch.int32)
    lengths, starts = [7, 0, 5], [1, 3, 4]
    key, value = torch.zeros(2, 12, 4, 10, dtype=real)
    reference.gather_and_dequant_cache(
        *q, key, value, table, int32(0, 7, 7, 12), "fp8_e5m2" if fp8 == FP8["e5m2"] else "fp8", *scales,
        int32(*starts),
    )  # fmt: skip
    for side, actual in enumerate((key, value)):
        scale = scales[side].reshape((6, 3, 4, 1) if scale_shape[0] == 6 else (-1, 1))
        product = q[side].float() * scale
        rows = [product[table[s].long()].flatten(0, 1)[starts[s] : starts[s] + lengths[s]] for s in range(3)]
        assert_same_bytes(actual, torch.cat(rows).to(real))


@pytest.mark.parametrize(
    ("real", "target", "bits", "expected"),
    [
        # the same type: all bits stay
        ("fp32", "fp32", 0xFF812345, 0xFF812345),
        ("fp16", "fp16", 0xFC01, 0xFC01),
        ("bf16", "bf16", 0xFF81, 0xFF81),
        # another one: a NaN has no sign and no payload, and there is one rounding
        ("fp32", "bf16", 0xFF812345, 0x7FC0),
        ("fp32", "fp16", 0xFFC00001, 0x7E00),
        ("fp16", "fp32", 0xFE01, 0x7FC00000),
        ("bf16", "fp16", 0xFF81, 0x7E00),
        ("fp16", "bf16", 0x7C01, 0x7FC0),
        ("fp32", "bf16", 0x3F808000, 0x3F80),
        ("fp32", "bf16", 0x3F818000, 0x3F82),
        ("fp32", "bf16", 0x3F808001, 0x3F81),
        ("fp32", "bf16", 0x7F7FFFFF, 0x7F80),
        ("fp32", "fp16", 0x3F801000, 0x3C00),
        ("fp32", "fp16", 0x3F803000, 0x3C02),
        ("fp32", "fp16", 0x477FF000, 0x7C00),
        ("fp32", "fp16", 0x33000000, 0x0000),
        ("fp32", "fp16", 0x33000001, 0x0001),
        ("bf16", "fp16", 0x7F7F, 0x7C00),
        ("bf16", "fp32", 0xBF81, 0xBF810000),
        ("fp16", "fp32", 0x8001, 0xB3800000),
    ],
)  # fmt: skip
def test_plain_copies(real: str, target: str, bits: int, expected: int) -> None:
    x = torch.tensor([list(bits.to_bytes(REAL[real].itemsize, "little"))], dtype=torch.uint8)
    x = x.view(REAL[real]).view(1, 1, 1)
    unused = torch.tensor([NAN])

    caches = torch.zeros(2, 1, 1, 1, 1, dtype=REAL[target])
    reference.reshape_and_cache_flash(x, x, *caches, torch.tensor([0]), "auto", unused, unused)
    rows = torch.zeros(2, 1, 1, 1, dtype=REAL[target])
    reference.gather_and_dequant_cache(
        x.unsqueeze(0), x.unsqueeze(0), *rows, int32(0)[None], int32(0, 1), "auto", unused, unused
    )
    for copy in (*caches, *rows):
        assert int.from_bytes(bytes(raw(copy).flatten().tolist()), "little") == expected


def test_slots_that_lead_nowhere(device: torch.device) -> None:
    """They raise on the CPU, before anything is written; on CUDA the tokens are left out."""
    key = torch.tensor([1.0, 2.0, 3.0], device=device).view(3, 1, 1)
    caches, scales = torch.zeros(2, 2, 3, 1, 1, device=device), torch.zeros(2, 2, 3, 1, device=device)
    one, slots = ONE.to(device), torch.tensor([1, 6, 2], device=device)
    fp8 = caches.to(FP8["e4m3"])
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"reference\.reshape_and_cache_flash: slots must be below 6"):
            reference.reshape_and_cache_flash(key, key, *caches, slots, "auto", one, one)
        with pytest.raises(RuntimeError, match=r"flash_dynamic: slots must be below 6"):
            reference.reshape_and_cache_flash_dynamic(key, key, *fp8, *scales, slots, "fp8")
        assert not caches.any()
        assert not scales.any()
        assert not fp8.view(torch.uint8).any()
    else:
        reference.reshape_and_cache_flash(key, key, *caches, slots, "auto", one, one)
        reference.reshape_and_cache_flash_dynamic(key, key, *fp8, *scales, slots, "fp8")
        assert caches[1].flatten().tolist() == [0.0, 1.0, 3.0, 0.0, 0.0, 0.0]
        assert fp8[1].float().flatten().tolist() == [0.0, 448.0, 448.0, 0.0, 0.0, 0.0]
        assert scales[1].flatten().count_nonzero() == 2


@pytest.mark.parametrize(
    ("table", "sums", "starts", "on_cuda"),
    [
        ([[0, 3], [1, 1]], [0, 3, 5], [0, 0], [1, 2, 0, 3, 4, 0]),
        ([[0, 1], [-1, 1]], [0, 3, 5], [0, 0], [1, 2, 3, 0, 0, 0]),
        ([[0], [1]], [0, 3, 5], [0, 0], [1, 2, 0, 3, 4, 0]),
        ([[0, 1], [1, 2]], [0, 3, 9], [0, 0], [1, 2, 3, 3, 4, 5]),
        ([[0, 1], [1, 2]], [1, 3, 5], [0, 0], [0, 1, 2, 3, 4, 0]),
        ([[0, 1], [1, 2]], [0, 3, 5], [0, -9], [1, 2, 3, 0, 0, 0]),
        ([[0, 1], [1, 2]], [0, 3, 5], [2, 0], [3, 4, 0, 3, 4, 0]),
        ([[0, 1], [1, 2]], [0, 4, 3], [0, 0], None),
    ],
    ids=["block 3", "block -1", "short table", "rows", "begin", "start", "start beyond", "fall"],
)
def test_sequences_that_lead_nowhere(
    device: torch.device,
    table: list[list[int]],
    sums: list[int],
    starts: list[int],
    on_cuda: list[float] | None,
) -> None:
    """3 blocks of 2 slots, 6 rows. They raise on the CPU, before anything is written."""
    cache = torch.arange(1.0, 7.0, device=device).view(3, 2, 1, 1)
    key, value = torch.zeros(2, 6, 1, 1, device=device)
    one = ONE.to(device)

    def gather() -> None:
        reference.gather_and_dequant_cache(
            cache, cache, key, value, torch.tensor(table, dtype=torch.int32, device=device),
            int32(*sums).to(device), "auto", one, one, int32(*starts).to(device),
        )  # fmt: skip

    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"fp8kv\.reference\.gather_and_dequant_cache: "):
            gather()
        assert not key.any()
        assert not value.any()
    elif on_cuda is not None:
        gather()
        assert key.flatten().tolist() == value.flatten().tolist() == on_cuda


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kv_cache_dtype": "int8"}, "caches can't be torch.float8_e4m3fn with kv_cache_dtype 'int8'"),
        ({"kv_cache_dtype": "auto"}, "caches can't be torch.float8_e4m3fn with kv_cache_dtype 'auto'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "caches can't be torch.float8_e4m3fn with kv_cache_dtype 'fp8_"),
        ({"k_scale": torch.ones(3)}, "scales can't be torch.float32 of shape [3]"),
        ({"v_scale": torch.ones(1).half()}, "scales can't be torch.float16 of shape [1]"),
        ({"k_scale": torch.ones(4, 2)}, "scales can't be torch.float32 of shape [4, 2]"),
        ({"k_offset": torch.ones(4, 2)}, "offsets can't be torch.float32 of shape [4, 2]"),
        ({"v_offset": torch.ones(2, 4).half()}, "offsets can't be torch.float16 of shape [2, 4]"),
        ({"key": torch.ones(3, 2, 4).double()}, "key and value can't be torch.float64 and torch.float32"),
        ({"value": torch.ones(3, 2, 4).half()}, "key and value can't be torch.float32 and torch.float16"),
        ({"value": torch.ones(2, 2, 4)}, "key and value must have a row for each of 3 slots"),
        ({"key": torch.ones(3, 2, 5)}, "key and value must be [num_tokens, 2, 4]"),
        ({"value_cache": torch.zeros(2, 3, 2, 4).to(FP8["e5m2"])}, "caches must have one dtype"),
        ({"value_cache": torch.zeros(1, 3, 2, 4).to(FP8["e4m3"])}, "caches can't have the shapes"),
    ],
    ids=["unknown", "auto", "e5m2", "3 scales", "fp16 scale", "channels", "offset", "fp16 offset", "fp64",
         "two types", "few rows", "head size", "two formats", "shapes"],
)  # fmt: skip
def test_an_append_that_does_not_fit_is_refused(arguments: dict[str, object], sentence: str) -> None:
    usual = {
        "key": torch.ones(3, 2, 4), "value": torch.ones(3, 2, 4),
        "key_cache": torch.zeros(2, 3, 2, 4).to(FP8["e4m3"]),
        "value_cache": torch.zeros(2, 3, 2, 4).to(FP8["e4m3"]),
        "slot_mapping": torch.tensor([0, 1, 2]), "kv_cache_dtype": "fp8", "k_scale": ONE, "v_scale": ONE,
    }  # fmt: skip
    with pytest.raises(RuntimeError) as error:
        reference.reshape_and_cache_flash(**(usual | arguments))
    assert str(error.value).startswith(f"fp8kv.reference.reshape_and_cache_flash: {sentence}")


# What the specification refuses


@pytest.mark.parametrize(
    ("group", "scale_shape"),
    [(None, (3,)), (None, (2, 4)), (None, (3, 1, 1)), ((1, -1), (4,)), ((1, -1), (1,)), ((-1, 1), (4, 1)),
    ((2, 2), (4,)),
     ((0, 1), (4,)), ((-2, 1), (4,)), ((-1, -1), (2,))],
)  # fmt: skip
def test_a_scale_that_does_not_fit_is_refused(group: tuple[int, int] | None, scale_shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"fp8kv\.reference\.static_scaled_fp8_quant"):
        reference.quantize(torch.ones(3, 4), torch.ones(scale_shape), group_shape=group)


def test_cpu_and_cuda_give_the_same_bytes(cuda: torch.device) -> None:
    x = values((67, 200), torch.float32)
    for scale in TRAP_SCALES:
        for fp8 in FP8.values():
            q, _ = reference.quantize(x, scale, dtype=fp8)
            on_cuda, _ = reference.quantize(x.to(cuda), scale.to(cuda), dtype=fp8)
            assert_same_bytes(on_cuda, q)
            back = reference.dequantize(q, scale)
            assert_same_bytes(reference.dequantize(q.to(cuda), scale.to(cuda)), back)
    q, scale = reference.quantize(x, group_shape=(4, 16))
    on_cuda, scale_on_cuda = reference.quantize(x.to(cuda), group_shape=(4, 16))
    assert_same_bytes(on_cuda, q)
    assert_same_bytes(scale_on_cuda, scale)


def test_cpu_and_cuda_give_the_same_bytes_in_a_cache(cuda: torch.device) -> None:
    key, value = values((20, 3, 40), torch.float32), values((20, 3, 40), torch.float32, 1)
    slots = torch.arange(20).flip(0)
    table, sums = int32(4, 0, 2, 1, 3)[None], int32(0, 19)
    results = []
    for at in (torch.device("cpu"), cuda):
        k, v, where = key.to(at), value.to(at), slots.to(at)
        caches, scales = (
            torch.zeros(2, 5, 4, 3, 40, device=at).to(FP8["e4m3"]),
            torch.zeros(2, 5, 4, 3, device=at),
        )
        reference.reshape_and_cache_flash_dynamic(k, v, *caches, *scales, where, "fp8")
        rows = torch.zeros(2, 20, 3, 40, dtype=torch.bfloat16, device=at)
        reference.gather_and_dequant_cache(*caches, *rows, table.to(at), sums.to(at), "fp8", *scales)
        static = torch.zeros_like(caches)
        trap = TRAP_SCALES[-3:].to(at)
        reference.reshape_and_cache_flash(k, v, *static, where, "fp8", trap, trap)
        results.append((caches, scales, rows, static))
    for on_cuda, expected in zip(results[1], results[0], strict=True):
        assert_same_bytes(on_cuda, expected)
