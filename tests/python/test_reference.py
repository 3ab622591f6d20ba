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


# What the specification refuses


@pytest.mark.parametrize(
    ("group", "scale_shape"),
    [(None, (3,)), (None, (2, 4)), (None, (3, 1, 1)), ((1, -1), (4,)), ((1, -1), (1,)), ((-1, 1), (4, 1)),
    ((2, 2), (4,)),
     ((0, 1), (4,)), ((-2, 1), (4,)), ((-1, -1), (2,))],
)  # fmt: skip
def test_a_scale_that_does_not_fit_is_refused(
    group: tuple[int, int] | None, scale_shape: tuple[int, ...]
) -> None:
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
