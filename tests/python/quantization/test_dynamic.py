"""dynamic_scaled_fp8_quant against the reference, scales and results byte for byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fp8kv import dynamic_scaled_fp8_quant, reference
from helpers import (
    LAYOUTS,
    REAL,
    SHAPES,
    all_patterns,
    assert_same_bytes,
    each_fp8,
    each_layout,
    each_real,
    empty_view,
    from_bits,
    layouts_of,
    placed,
    values,
)

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")
PER_TOKEN = (1, -1)


def check(
    device: torch.device,
    x: Tensor,
    scale_shape: Sequence[int],
    group: Sequence[int] | None,
    fp8: torch.dtype = E4M3,
    scale_ub: Tensor | None = None,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
) -> None:
    """Compares on `device`, with all three in the given layouts; nothing around results may change."""
    actual, buffer = empty_view(x.shape, fp8, layouts[2], device)
    scale, scale_buffer = empty_view(scale_shape, torch.float32, layouts[1], device)
    bound = None if scale_ub is None else scale_ub.to(device)
    dynamic_scaled_fp8_quant(actual, placed(x, layouts[0], device), scale, bound, group)
    expected, expected_buffer = empty_view(x.shape, fp8, layouts[2], CPU)
    expected_scale, expected_scale_buffer = empty_view(scale_shape, torch.float32, layouts[1], CPU)
    reference.dynamic_scaled_fp8_quant(expected, x, expected_scale, scale_ub, group)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(actual, expected)
    assert_same_bytes(buffer, expected_buffer)
    assert_same_bytes(scale_buffer, expected_scale_buffer)


#: name, group shape, shape of the scale for an input [M, N]
GRANULARITIES = {
    "tensor": (None, lambda m, n: (1,)),
    "tensor 0-D": ((-1, -1), lambda m, n: ()),
    "token": ((1, -1), lambda m, n: (m, 1)),
    "token 1-D": ((1, -1), lambda m, n: (m,)),
    "channel": ((-1, 1), lambda m, n: (1, n)),
    "channel 1-D": ((-1, 1), lambda m, n: (n,)),
    "head 4": ((-1, 4), lambda m, n: (1, -(-n // 4))),
    "head 16": ((-1, 16), lambda m, n: (-(-n // 16),)),
    "block 3x5": ((3, 5), lambda m, n: (-(-m // 3), -(-n // 5))),
    "block 1x8": ((1, 8), lambda m, n: (m, -(-n // 8))),
    "block 1x128": ((1, 128), lambda m, n: (m, -(-n // 128))),
    "block 2xN": ((2, -1), lambda m, n: (-(-m // 2),)),
    "block 16x16": ((16, 16), lambda m, n: (-(-m // 16), -(-n // 16))),
    "element": ((1, 1), lambda m, n: (m, n)),
}
ROWS = [*range(1, 71), 128, 4096, 5137, 8192, 20000, 70000]


@each_fp8
@each_real
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity(
    device: torch.device, granularity: str, real: torch.dtype, fp8: torch.dtype
) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for shape in SHAPES:
        x = values(shape, real, seed=sum(shape))
        check(device, x, scale_shape(*shape), group, fp8)


@each_fp8
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_for_each_instruction_set(isa: str, granularity: str, fp8: torch.dtype) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for real in REAL.values():
        for shape in SHAPES:
            check(CPU, values(shape, real, seed=sum(shape)), scale_shape(*shape), group, fp8)


@each_real
@pytest.mark.parametrize("length", ROWS)
def test_rows_of_every_length(device: torch.device, length: int, real: torch.dtype) -> None:
    for rows in (1, 3) if length > 8192 else (1, 5, 33):
        x = values((rows, length), real, seed=length, specials=False)
        check(device, x, (rows, 1), PER_TOKEN)
        check(device, x, (1,), None)


@pytest.mark.parametrize("length", [64, 100, 128, 4096, 5137, 8192, 20000, 70000])
@pytest.mark.parametrize("offset", range(1, 8))
def test_misaligned_rows(device: torch.device, offset: int, length: int) -> None:
    layouts = (f"offset {offset}", "contiguous", f"offset {8 - offset}")
    for real in REAL.values():
        x = values((2, length), real, specials=False)
        check(device, x, (2, 1), PER_TOKEN, layouts=layouts)
        check(device, x, (1,), None, layouts=layouts)


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "block 1x128", "block 16x16"])
@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (300, 4096), (4097, 515), (2000, 128)], ids=str)
def test_shapes_of_models(device: torch.device, shape: tuple[int, int], granularity: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    check(device, values(shape, torch.bfloat16), scale_shape(*shape), group)


# Elements that must not count


@each_real
@pytest.mark.parametrize(
    "special", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"]
)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 64, 1000, 8192, 9001])
def test_one_element_that_is_not_finite(
    device: torch.device, length: int, special: float, real: torch.dtype
) -> None:
    """At the first, last and middle place of a row; the other rows have none."""
    for place in {0, length // 2, length - 1}:
        x = values((3, length), real, specials=False)
        x[1, place] = special
        check(device, x, (3,), PER_TOKEN)
        check(device, x, (1,), None)


@each_fp8
@each_real
def test_every_granularity_with_nothing_finite(
    device: torch.device, real: torch.dtype, fp8: torch.dtype
) -> None:
    specials = torch.tensor([math.nan, math.inf, -math.inf])
    x = specials[torch.arange(40 * 48) % 3].view(40, 48).to(real)
    for group, scale_shape in GRANULARITIES.values():
        check(device, x, scale_shape(40, 48), group, fp8)


@each_fp8
@each_real
def test_zeros(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = torch.zeros(8, 64)
    x[:, 1::2] = -0.0
    x[3, 5] = 2.0
    for group, scale_shape in GRANULARITIES.values():
        check(device, x.to(real), scale_shape(8, 64), group, fp8)


@each_real
@each_fp8
def test_amax_around_the_smallest_scale(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    """Rows whose amax is a power of two from the smallest subnormal to the largest number."""
    exponents = range(-149, 128) if real != torch.float16 else range(-24, 16)
    x = torch.stack([torch.tensor([1.0, -0.7, 0.01]).double() * 2.0**e for e in exponents]).to(real)
    check(device, x, (len(x),), PER_TOKEN, fp8)


@each_fp8
def test_subnormal_fp32_elements_count(device: torch.device, fp8: torch.dtype) -> None:
    x = from_bits([0x00000001, 0x007FFFFF, 0x80400000, 0x00000000]).view(2, 2)
    check(device, x, (2,), PER_TOKEN, fp8)


@each_fp8
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_alone_and_as_the_largest(
    device: torch.device, real: torch.dtype, fp8: torch.dtype
) -> None:
    x = all_patterns(real)
    check(device, x.view(-1, 1), (len(x),), PER_TOKEN, fp8)
    scaled = torch.stack([x, (x.float() * -0.4).to(real), (x.float() * 0.001).to(real)], dim=1)
    check(device, scaled, (len(x), 1), PER_TOKEN, fp8)
    check(device, scaled.T.contiguous(), (1, len(x)), (-1, 1), fp8)


@each_real
def test_the_largest_at_every_position(device: torch.device, real: torch.dtype) -> None:
    for size in (5, 8, 31, 64, 200):
        x = torch.full((size, size), 0.25)
        x.fill_diagonal_(-3.0)
        check(device, x.to(real), (size,), PER_TOKEN)
        check(device, x.to(real), (size,), (-1, 1))
        for i in range(0, size, 7):
            check(device, x[i].to(real), (), None)


# The upper bound


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 16", "block 3x5", "element"])
@pytest.mark.parametrize(
    "bound",
    [1.0, 0.37, 100.0, 3e38, 1e-3, 1e-45, 0.0, -0.0, -1.0, math.inf, -math.inf, math.nan],
    ids=repr,
)
def test_scale_ub(device: torch.device, bound: float, granularity: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for real in REAL.values():
        x = values((12, 100), real)
        for shape in ((), (1,), (1, 1)):
            check(device, x, scale_shape(12, 100), group, scale_ub=torch.full(shape, bound))


@pytest.mark.parametrize("length", [64, 4096, 5137, 20000])
def test_scale_ub_for_long_rows(device: torch.device, length: int) -> None:
    x = values((4, length), torch.bfloat16, specials=False)
    check(device, x, (4, 1), PER_TOKEN, scale_ub=torch.tensor(2.5))
    check(device, x, (1,), None, scale_ub=torch.tensor(2.5))


# Memory and shapes


@each_layout
@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 4", "block 3x5"])
@pytest.mark.parametrize("side", ["input", "result", "scale", "all"])
def test_layouts(device: torch.device, side: str, granularity: str, layout: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    layouts = layouts_of(side, layout)
    for shape, real in (((5, 48), torch.bfloat16), ((18, 37), torch.float32), ((3, 257), torch.float16)):
        check(device, values(shape, real), scale_shape(*shape), group, layouts=layouts)


@pytest.mark.parametrize("result_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
def test_pairs_of_layouts(device: torch.device, input_layout: str, result_layout: str) -> None:
    for group, scale_shape in (((-1, -1), ()), ((1, -1), (6,)), ((-1, 1), (40,)), ((2, 8), (3, 5))):
        layouts = (input_layout, "contiguous", result_layout)
        check(device, values((6, 40), torch.bfloat16), scale_shape, group, layouts=layouts)


@pytest.mark.parametrize("expanded", [(0,), (1,), (0, 1)], ids=["rows", "columns", "all"])
def test_expanded_input(device: torch.device, expanded: tuple[int, ...]) -> None:
    shape = (12, 40)
    source = values(
        [1 if dim in expanded else n for dim, n in enumerate(shape)], torch.bfloat16, specials=False
    )
    for group, scale_shape in ((None, ()), ((1, -1), (12,)), ((-1, 1), (40,)), ((5, 7), (3, 6))):
        scale = torch.empty(scale_shape, device=device)
        result = torch.empty(shape, dtype=E4M3, device=device)
        dynamic_scaled_fp8_quant(result, source.to(device).expand(shape), scale, None, group)
        expected_scale = torch.empty(scale_shape)
        expected = torch.empty(shape, dtype=E4M3)
        reference.dynamic_scaled_fp8_quant(expected, source.expand(shape), expected_scale, None, group)
        assert_same_bytes(scale, expected_scale)
        assert_same_bytes(result, expected)


@pytest.mark.parametrize(
    ("shape", "group", "scale_shape"),
    [
        ((2, 3, 64), None, (1, 3, 1)),
        ((5, 8, 64), None, (5, 8, 1)),
        ((5, 8, 64), None, (1, 1, 64)),
        ((4, 6, 8), None, (2, 3, 4)),
        ((2, 3, 4, 5), None, (2, 1, 4, 1)),
        ((2, 2, 3, 2, 3, 2), None, (1, 2, 1, 2, 1, 2)),
        ((2, 3, 64), (1, -1), (2, 3, 1)),
        ((2, 3, 64), (1, -1), (6,)),
        ((2, 3, 64), (1, 16), (2, 3, 4)),
        ((2, 3, 64), (-1, 16), (4,)),
        ((2, 6, 10), (4, 3), (3, 4)),
        ((3, 5, 10), (4, 3), (4, 4)),
        ((3, 5, 7, 9), (2, -1), (53,)),
        ((3, 5, 7, 9), (35, 4), (3, 3)),
        ((64,), (-1, 16), (4,)),
        ((64,), (1, -1), (1,)),
        ((), None, ()),
        ((), (1, 1), (1,)),
    ],
    ids=str,
)
def test_more_and_fewer_dimensions(
    device: torch.device, shape: tuple[int, ...], group: tuple[int, int] | None, scale_shape: tuple[int, ...]
) -> None:
    for real in REAL.values():
        check(device, values(shape, real), scale_shape, group)
    for layout in ("transposed", "columns", "rows", "inside") if shape else ():
        x = values(shape, torch.bfloat16)
        check(device, x, scale_shape, group, layouts=(layout, "contiguous", "contiguous"))
        check(device, x, scale_shape, group, layouts=("contiguous", layout, layout))


@pytest.mark.parametrize("layout", ["contiguous", "inside", "rows", "transposed"])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 11, 100])
def test_groups_of_rows_across_leading_dimensions(device: torch.device, rows: int, layout: str) -> None:
    for cols in (-1, 7):
        scale_shape = (-(-60 // rows), 1 if cols == -1 else 4)
        x = values((3, 4, 5, 24), torch.bfloat16)
        check(device, x, scale_shape, (rows, cols), layouts=(layout, "contiguous", "inside"))


@pytest.mark.parametrize(
    ("shape", "group", "scale_shape"),
    [
        ((0,), None, ()),
        ((0, 5), None, (1,)),
        ((5, 0), (1, -1), (5,)),
        ((0, 5), (1, -1), (0, 1)),
        ((5, 0), (-1, 1), (1, 0)),
        ((0, 5), (-1, 1), (5,)),
        ((0, 5), (-1, 2), (1, 3)),
        ((2, 0, 4), None, (1, 0, 1)),
        ((0, 4, 4), None, (1, 4, 1)),
    ],
    ids=str,
)
def test_a_group_without_elements_gets_the_smallest_scale(
    device: torch.device, shape: tuple[int, ...], group: tuple[int, int] | None, scale_shape: tuple[int, ...]
) -> None:
    check(device, torch.ones(shape), scale_shape, group)


@pytest.mark.large
@pytest.mark.parametrize("group", [None, (1, -1), (-1, 1), (1, 128)], ids=str)
def test_more_than_2_to_the_31_elements(cuda: torch.device, group: tuple[int, int] | None) -> None:
    if torch.cuda.get_device_properties(cuda).total_memory < 24 * 10**9:
        pytest.skip("needs 24 GB of GPU memory")
    rows, cols = (1 << 19) + 300, 4096
    x = torch.ones(rows, cols, dtype=torch.bfloat16, device=cuda)
    x[:, 17] = 3.0
    x[rows - 1, 100] = -448.0
    width = 128 if group == (1, 128) else 1 if group == (-1, 1) else cols
    height = 1 if group and group[0] == 1 else rows
    scale = torch.empty(-(-rows // height), cols // width, device=cuda)
    result = torch.empty(x.shape, dtype=E4M3, device=cuda)
    dynamic_scaled_fp8_quant(result, x, scale, None, group)
    tail = x[-300:].cpu()
    if height == 1:
        expected, expected_scale = reference.quantize(tail, group_shape=group)
        assert_same_bytes(scale[-300:], expected_scale)
    else:
        column_amax = torch.ones(1, cols)
        column_amax[0, 17], column_amax[0, 100] = 3.0, 448.0
        amax = column_amax if width == 1 else column_amax.amax().view(1, 1)
        expected_scale = amax / torch.full_like(amax, 448.0)
        assert_same_bytes(scale, expected_scale)
        expected, _ = reference.quantize(tail, expected_scale, group_shape=group or (-1, -1))
    assert_same_bytes(result[-300:], expected)


def test_what_was_in_the_scale_does_not_matter(device: torch.device) -> None:
    x = values((16, 300), torch.bfloat16).to(device)
    for group, scale_shape in (((-1, -1), (1,)), ((1, -1), (16,)), ((-1, 1), (300,)), ((5, 7), (4, 43))):
        results = []
        for before in (0.0, math.nan, math.inf, -1.0, 3e38):
            scale = torch.full(scale_shape, before, device=device)
            result = torch.empty(x.shape, dtype=E4M3, device=device)
            dynamic_scaled_fp8_quant(result, x, scale, None, group)
            results.append((scale, result))
        for scale, result in results[1:]:
            assert_same_bytes(scale, results[0][0])
            assert_same_bytes(result, results[0][1])


def test_repeated_calls_give_the_same_bytes(device: torch.device) -> None:
    """An order of threads must not show."""
    x = values((513, 1031), torch.bfloat16).to(device)
    for group, scale_shape in (((-1, -1), (1,)), ((-1, 1), (1031,)), ((100, 100), (6, 11))):
        scales = [torch.empty(scale_shape, device=device) for _ in range(20)]
        for scale in scales:
            dynamic_scaled_fp8_quant(torch.empty(x.shape, dtype=E4M3, device=device), x, scale, None, group)
        for scale in scales[1:]:
            assert_same_bytes(scale, scales[0])
