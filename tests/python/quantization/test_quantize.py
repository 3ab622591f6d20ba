"""static_scaled_fp8_quant against the reference, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fp8kv import reference, static_scaled_fp8_quant
from helpers import (
    LAYOUTS,
    REAL,
    SHAPES,
    TRAP_SCALES,
    all_patterns,
    assert_same_bytes,
    each_fp8,
    each_layout,
    each_real,
    empty_view,
    fp8_boundaries,
    neighbours,
    placed,
    random_scales,
    values,
)

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def check(
    device: torch.device,
    x: Tensor,
    scale: Tensor,
    group: Sequence[int] | None,
    fp8: torch.dtype = E4M3,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
) -> None:
    """Compares on `device`, with all three in the given layouts; nothing around the result may change."""
    actual, buffer = empty_view(x.shape, fp8, layouts[2], device)
    static_scaled_fp8_quant(actual, placed(x, layouts[0], device), placed(scale, layouts[1], device), group)
    expected, expected_buffer = empty_view(x.shape, fp8, layouts[2], CPU)
    reference.static_scaled_fp8_quant(expected, x, scale, group)
    assert_same_bytes(actual, expected)
    assert_same_bytes(buffer, expected_buffer)


#: name, group shape, shape of the scale for an input [M, N]
GRANULARITIES = {
    "tensor": (None, lambda m, n: (1,)),
    "tensor 0-D": (None, lambda m, n: ()),
    "tensor group": ((-1, -1), lambda m, n: (1, 1)),
    "token": ((1, -1), lambda m, n: (m, 1)),
    "token 1-D": ((1, -1), lambda m, n: (m,)),
    "channel": ((-1, 1), lambda m, n: (1, n)),
    "channel 1-D": ((-1, 1), lambda m, n: (n,)),
    "head 4": ((-1, 4), lambda m, n: (1, -(-n // 4))),
    "head 16": ((-1, 16), lambda m, n: (-(-n // 16),)),
    "block 3x5": ((3, 5), lambda m, n: (-(-m // 3), -(-n // 5))),
    "block 1x8": ((1, 8), lambda m, n: (m, -(-n // 8))),
    "block 2xN": ((2, -1), lambda m, n: (-(-m // 2),)),
    "block 16x16": ((16, 16), lambda m, n: (-(-m // 16), -(-n // 16))),
    "element": ((1, 1), lambda m, n: (m, n)),
}


@each_fp8
@each_real
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity(
    device: torch.device, granularity: str, real: torch.dtype, fp8: torch.dtype
) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for shape in SHAPES:
        x = values(shape, real, seed=sum(shape))
        check(device, x, random_scales(scale_shape(*shape)), group, fp8)


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 16", "block 3x5"])
@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (300, 4096), (4097, 515), (2000, 128)], ids=str)
def test_shapes_of_models(device: torch.device, shape: tuple[int, int], granularity: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    check(device, values(shape, torch.bfloat16), random_scales(scale_shape(*shape)), group)


# Values and scales that trap shortcuts


@each_fp8
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_with_trap_scales_per_tensor(
    device: torch.device, real: torch.dtype, fp8: torch.dtype
) -> None:
    x = all_patterns(real)
    on_device, scales = x.to(device), TRAP_SCALES.to(device)
    result = torch.empty((len(scales), len(x)), dtype=fp8, device=device)
    for i in range(len(scales)):
        static_scaled_fp8_quant(result[i], on_device, scales[i])
    expected, _ = reference.quantize(
        x.expand(len(scales), -1), TRAP_SCALES[:, None], group_shape=(1, -1), dtype=fp8
    )
    assert_same_bytes(result, expected)


@each_fp8
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_with_trap_scales_per_token(
    device: torch.device, real: torch.dtype, fp8: torch.dtype
) -> None:
    x = all_patterns(real).expand(len(TRAP_SCALES), -1)
    check(device, x, TRAP_SCALES, (1, -1), fp8)


@each_fp8
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_with_trap_scales_per_channel(
    device: torch.device, real: torch.dtype, fp8: torch.dtype
) -> None:
    x = all_patterns(real).unsqueeze(1).expand(-1, len(TRAP_SCALES)).contiguous()
    check(device, x, TRAP_SCALES, (-1, 1), fp8)


def boundary_inputs(scales: Tensor, fp8: torch.dtype) -> Tensor:
    """For each scale a row of fp32 inputs whose quotients lie on the rounding boundaries or just beside."""
    boundaries = fp8_boundaries(fp8)[1:]
    near = neighbours(scales[:, None] * boundaries, 2).reshape(len(scales), -1)
    return torch.cat([near, -near], dim=1)


@each_fp8
@pytest.mark.parametrize("granularity", ["token", "channel", "element"])
def test_quotients_beside_every_rounding_boundary(
    device: torch.device, granularity: str, fp8: torch.dtype
) -> None:
    finite = TRAP_SCALES[TRAP_SCALES.isfinite() & (TRAP_SCALES > 0)]
    x = boundary_inputs(finite, fp8)
    if granularity == "token":
        check(device, x, finite, (1, -1), fp8)
    elif granularity == "channel":
        check(device, x.T.contiguous(), finite, (-1, 1), fp8)
    else:
        check(device, x, finite[:, None].expand(x.shape), (1, 1), fp8)


@each_fp8
def test_quotients_beside_every_rounding_boundary_for_random_scales(
    device: torch.device, fp8: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    exponents = torch.randint(60, 180, (1500,), generator=generator, dtype=torch.int32)
    significands = torch.randint(0, 1 << 23, (1500,), generator=generator, dtype=torch.int32)
    scales = ((exponents << 23) + significands).view(torch.float32)
    check(device, boundary_inputs(scales, fp8), scales, (1, -1), fp8)


@each_fp8
@each_real
def test_trap_scales_and_hostile_values_for_each_instruction_set(
    isa: str, real: torch.dtype, fp8: torch.dtype
) -> None:
    x = values((len(TRAP_SCALES), 300), real) if real == torch.float32 else all_patterns(real)[::7]
    x = x if x.dim() == 2 else x.expand(len(TRAP_SCALES), -1)
    check(CPU, x, TRAP_SCALES, (1, -1), fp8)
    check(CPU, x.T.contiguous(), TRAP_SCALES, (-1, 1), fp8)


@each_fp8
@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 4", "block 3x5"])
def test_every_granularity_for_each_instruction_set(isa: str, granularity: str, fp8: torch.dtype) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for shape in SHAPES:
        for real in REAL.values():
            check(CPU, values(shape, real), random_scales(scale_shape(*shape)), group, fp8)


@pytest.mark.parametrize("size", [1, 3, 8, 17, 64, 100])
def test_special_values_at_every_position_of_a_row(device: torch.device, size: int) -> None:
    for real in REAL.values():
        for special in (float("nan"), float("inf"), -float("inf"), -0.0):
            x = torch.ones(size, size)
            x.fill_diagonal_(special)
            check(device, x.to(real), torch.tensor(0.5), None)


# Memory


@each_layout
@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 4", "block 3x5"])
@pytest.mark.parametrize("side", ["input", "result", "scale", "input and result"])
def test_layouts(device: torch.device, side: str, granularity: str, layout: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    layouts = (
        layout if "input" in side else "contiguous",
        layout if side == "scale" else "contiguous",
        layout if "result" in side else "contiguous",
    )
    for shape, real in (((5, 48), torch.bfloat16), ((18, 37), torch.float32), ((3, 257), torch.float16)):
        check(device, values(shape, real), random_scales(scale_shape(*shape)), group, layouts=layouts)


@pytest.mark.parametrize("result_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
def test_pairs_of_layouts(device: torch.device, input_layout: str, result_layout: str) -> None:
    for group, scale_shape in (((-1, -1), ()), ((1, -1), (6,)), ((-1, 1), (40,)), ((2, 8), (3, 5))):
        layouts = (input_layout, "contiguous", result_layout)
        check(device, values((6, 40), torch.bfloat16), random_scales(scale_shape), group, layouts=layouts)


@pytest.mark.parametrize("offset_out", range(8))
@pytest.mark.parametrize("offset_in", range(8))
@each_real
def test_misaligned_by_every_number_of_elements(
    device: torch.device, real: torch.dtype, offset_in: int, offset_out: int
) -> None:
    layouts = [f"offset {k}" if k else "contiguous" for k in (offset_in, offset_out)]
    for shape in ((4, 64), (1, 100), (7, 129)):
        for group, scale_shape in ((None, ()), ((1, -1), shape[:1]), ((-1, 1), shape[1:])):
            check(
                device, values(shape, real), random_scales(scale_shape), group,
                layouts=(layouts[0], "contiguous", layouts[1]),
            )  # fmt: skip


@pytest.mark.parametrize("expanded", [(0,), (1,), (0, 1)], ids=["rows", "columns", "all"])
def test_expanded_input(device: torch.device, expanded: tuple[int, ...]) -> None:
    shape = (12, 40)
    source = values([1 if dim in expanded else n for dim, n in enumerate(shape)], torch.bfloat16)
    for group, scale_shape in ((None, ()), ((1, -1), (12,)), ((-1, 1), (40,)), ((5, 7), (3, 6))):
        scale = random_scales(scale_shape)
        result = torch.empty(shape, dtype=E4M3, device=device)
        static_scaled_fp8_quant(result, source.to(device).expand(shape), scale.to(device), group)
        expected, _ = reference.quantize(source.expand(shape), scale, group_shape=group)
        assert_same_bytes(result, expected)


@pytest.mark.parametrize(
    ("group", "scale_shape"),
    [((1, -1), (12, 1)), ((-1, 1), (1, 40)), ((3, 8), (4, 5))],
    ids=["token", "channel", "block"],
)  # fmt: skip
def test_expanded_scale(device: torch.device, group: tuple[int, int], scale_shape: tuple[int, int]) -> None:
    x = values((12, 40), torch.bfloat16)
    scale = torch.tensor([[0.3]])
    result = torch.empty(x.shape, dtype=E4M3, device=device)
    static_scaled_fp8_quant(result, x.to(device), scale.to(device).expand(scale_shape), group)
    assert_same_bytes(result, reference.quantize(x, scale)[0])


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], ids=str)
def test_permuted_dimensions(device: torch.device, order: tuple[int, int, int]) -> None:
    x = values((6, 10, 16), torch.float16).permute(order)
    tokens, cols = x.shape[0] * x.shape[1], x.shape[2]
    for group, scale_shape in (
        ((1, -1), (tokens,)),
        ((-1, 1), (cols,)),
        ((4, 3), (-(-tokens // 4), -(-cols // 3))),
    ):
        scale = random_scales(scale_shape)
        result = torch.empty_like(x, dtype=E4M3, device=device)  # keeps the strides
        static_scaled_fp8_quant(result, x.to(device), scale.to(device), group)
        assert_same_bytes(result, reference.quantize(x, scale, group_shape=group)[0])


# Shapes


@pytest.mark.parametrize(
    ("shape", "group", "scale_shape"),
    [
        ((2, 3, 64), None, (1, 3, 1)),
        ((5, 8, 64), None, (1, 8, 1)),
        ((5, 8, 64), None, (5, 8, 1)),
        ((5, 8, 64), None, (1, 1, 64)),
        ((4, 6, 8), None, (2, 3, 4)),
        ((4, 6, 8), None, (4, 6, 8)),
        ((2, 3, 4, 5), None, (2, 1, 4, 1)),
        ((2, 2, 3, 2, 3, 2), None, (1, 2, 1, 2, 1, 2)),
        ((2, 3, 64), (1, -1), (2, 3, 1)),
        ((2, 3, 64), (1, -1), (6,)),
        ((2, 3, 64), (1, 16), (2, 3, 4)),
        ((2, 3, 64), (1, 16), (6, 4)),
        ((2, 3, 64), (-1, 16), (4,)),
        ((2, 3, 64), (-1, 1), (1, 1, 64)),
        ((2, 6, 10), (4, 3), (3, 4)),
        ((3, 5, 10), (4, 3), (4, 4)),
        ((3, 5, 7, 9), (2, -1), (53,)),
        ((3, 5, 7, 9), (35, 4), (3, 3)),
        ((3, 5, 7, 9), (10, 4), (11, 3)),
        ((64,), (-1, 16), (4,)),
        ((64,), (1, 16), (4,)),
        ((1,), (-1, -1), (1,)),
    ],
    ids=str,
)
def test_more_and_fewer_dimensions(
    device: torch.device, shape: tuple[int, ...], group: tuple[int, int] | None, scale_shape: tuple[int, ...]
) -> None:
    for real in REAL.values():
        check(device, values(shape, real), random_scales(scale_shape), group)
    for layout in ("transposed", "columns", "rows", "inside"):
        x = values(shape, torch.bfloat16)
        check(device, x, random_scales(scale_shape), group, layouts=(layout, "contiguous", "contiguous"))
        check(device, x, random_scales(scale_shape), group, layouts=("contiguous", layout, layout))


@pytest.mark.parametrize("layout", ["contiguous", "inside", "rows", "transposed"])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 11, 100])
def test_groups_of_rows_across_leading_dimensions(device: torch.device, rows: int, layout: str) -> None:
    """Groups of flat rows that begin and end inside the leading dimensions of a strided input."""
    shape = (3, 4, 5, 24)
    for cols in (-1, 7):
        scale_shape = (-(-60 // rows), 1 if cols == -1 else 4)
        check(
            device, values(shape, torch.bfloat16), random_scales(scale_shape), (rows, cols),
            layouts=(layout, "contiguous", "inside"),
        )  # fmt: skip


@pytest.mark.parametrize("group", [(7, 9), (4, 8), (100, 100), (1, 100), (100, 1), (10, 32)], ids=str)
def test_ragged_blocks(device: torch.device, group: tuple[int, int]) -> None:
    for shape in ((10, 33), (1, 100), (25, 64), (11, 129)):
        scale_shape = (-(-shape[0] // group[0]), -(-shape[1] // group[1]))
        check(device, values(shape, torch.bfloat16), random_scales(scale_shape), group)


@pytest.mark.parametrize(
    ("shape", "group", "scale_shape"),
    [
        ((0,), None, ()), ((0, 5), None, (1,)), ((5, 0), None, ()), ((0, 5), (1, -1), (0,)),
        ((0, 5), (1, -1), (0, 1)),
        ((5, 0), (1, -1), (5,)), ((5, 0), (-1, 1), (0,)), ((0, 5), (-1, 1), (5,)), ((0, 5), (2, 2), (0, 3)),
        ((2, 0, 4), None, (1, 0, 1)), ((0, 4, 4), None, (1, 4, 1)), ((0, 0), (1, 1), (0, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_empty(
    device: torch.device, shape: tuple[int, ...], group: tuple[int, int] | None, scale_shape: tuple[int, ...]
) -> None:
    check(device, torch.ones(shape), torch.ones(scale_shape), group)


@each_fp8
@each_real
def test_a_single_number(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    for group, scale_shape in ((None, ()), (None, (1,)), ((-1, -1), ()), ((1, 1), (1,)), ((1, -1), (1, 1))):
        check(device, torch.tensor(-3.25).to(real), torch.full(scale_shape, 0.25), group, fp8)


def test_the_most_dimensions(device: torch.device) -> None:
    shape = (2, 1, 3, 1, 2, 2, 1, 5)
    check(device, values(shape, torch.float32), random_scales((1, 1, 3, 1, 1, 2, 1, 1)), None)
    check(device, values(shape, torch.float32), random_scales((24,)), (1, -1), layouts=("inside",) * 3)


def test_the_scale_is_only_read(device: torch.device) -> None:
    scale = random_scales((16, 1)).to(device)
    before = scale.clone()
    x = values((16, 64), torch.bfloat16).to(device)
    copy = x.clone()
    static_scaled_fp8_quant(torch.empty(16, 64, dtype=E4M3, device=device), x, scale, (1, -1))
    assert_same_bytes(scale, before)
    assert_same_bytes(x, copy)


@pytest.mark.large
@pytest.mark.parametrize("group", [None, (1, -1), (-1, 1), (-1, 128), (128, 128)], ids=str)
def test_more_than_2_to_the_31_elements(cuda: torch.device, group: tuple[int, int] | None) -> None:
    """The last rows, which only 64-bit offsets reach, and a few before."""
    if torch.cuda.get_device_properties(cuda).total_memory < 24 * 10**9:
        pytest.skip("needs 24 GB of GPU memory")
    rows, cols = (1 << 19) + 300, 4096
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device=cuda)
    for piece in x.split(1 << 15):
        piece.normal_()
    height = {None: rows, 1: 1, -1: rows, 128: 128}[None if group is None else group[0]]
    width = {None: cols, 1: 1, -1: cols, 128: 128}[None if group is None else group[1]]
    scale = random_scales((-(-rows // height), -(-cols // width))).to(cuda)
    result = torch.empty(x.shape, dtype=E4M3, device=cuda)
    static_scaled_fp8_quant(result, x, scale, group)
    for start in (0, (1 << 19) - 128, (1 << 19) + 256):
        part = x[start : start + 128]
        part_scale = scale if height == rows else scale[start // height : -(-(start + 128) // height)]
        expected, _ = reference.quantize(part, part_scale, group_shape=group)
        assert_same_bytes(result[start : start + 128], expected)


def test_more_than_2_to_the_31_elements_between_rows(device: torch.device) -> None:
    """Strides beyond 32 bits. What lies between the rows is never touched and takes no memory on the CPU."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 24 * 10**9:
        pytest.skip("needs 24 GB of GPU memory")
    stride = (1 << 31) + 24
    x = torch.empty(stride + 64, dtype=torch.bfloat16, device=device).as_strided((2, 64), (stride, 1))
    result = torch.empty(stride + 64, dtype=E4M3, device=device).as_strided((2, 64), (stride, 1))
    source = values((2, 64), torch.bfloat16)
    x.copy_(source)
    for group, scale in (
        (None, torch.tensor(0.5)),
        ((1, -1), torch.tensor([0.5, 2.0])),
        ((-1, 1), torch.ones(64)),
    ):
        static_scaled_fp8_quant(result, x, scale.to(device), group)
        assert_same_bytes(result, reference.quantize(source, scale, group_shape=group)[0])
