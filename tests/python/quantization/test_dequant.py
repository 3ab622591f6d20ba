"""scaled_fp8_dequant against the reference, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fp8kv import reference, scaled_fp8_dequant
from helpers import (
    LAYOUTS,
    REAL,
    SHAPES,
    TRAP_SCALES,
    all_fp8,
    assert_same_bytes,
    each_fp8,
    each_layout,
    each_real,
    empty_view,
    from_bits,
    layouts_of,
    placed,
    random_scales,
)

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def check(
    device: torch.device,
    q: Tensor,
    scale: Tensor,
    group: Sequence[int] | None,
    real: torch.dtype = torch.bfloat16,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
) -> None:
    """Compares on `device`, with all three in the given layouts; nothing around the result may change."""
    actual, buffer = empty_view(q.shape, real, layouts[2], device)
    scaled_fp8_dequant(actual, placed(q, layouts[0], device), placed(scale, layouts[1], device), group)
    expected, expected_buffer = empty_view(q.shape, real, layouts[2], CPU)
    reference.scaled_fp8_dequant(expected, q, scale, group)
    assert_same_bytes(actual, expected)
    assert_same_bytes(buffer, expected_buffer)


def random_bytes(shape: Sequence[int], fp8: torch.dtype = E4M3, seed: int = 0) -> Tensor:
    """Every byte there is, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 256, tuple(shape), generator=generator, dtype=torch.int32).to(torch.uint8).view(fp8)
    )


#: Products that overflow, that become subnormal in each output type, and that lie on ties of its rounding.
SCALES = torch.cat(
    [
        TRAP_SCALES,
        torch.exp2(torch.arange(-149.0, 128.0)),
        from_bits([0x3F808000, 0x3F808001, 0x3F818000, 0x3F801000, 0x3F803000, 0x3F801001, 0x42DA0000]),
        torch.tensor(
            [65520.0 / 448, 65519.99 / 448, 3.4e38 / 448, 1.17e-38, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8]
        ),
    ]
)


@each_fp8
@each_real
@pytest.mark.parametrize("granularity", ["token", "channel", "element"])
def test_every_byte_with_trap_scales(
    device: torch.device, granularity: str, real: torch.dtype, fp8: torch.dtype
) -> None:
    q = all_fp8(fp8).expand(len(SCALES), -1)
    if granularity == "token":
        check(device, q, SCALES, (1, -1), real)
    elif granularity == "channel":
        check(device, q.T, SCALES, (-1, 1), real)
    else:
        check(device, q, SCALES[:, None].expand(q.shape), (1, 1), real)


@each_fp8
@each_real
def test_every_byte_with_trap_scales_per_tensor(
    device: torch.device, real: torch.dtype, fp8: torch.dtype
) -> None:
    q, scales = all_fp8(fp8).to(device), SCALES.to(device)
    result = torch.empty(len(scales), 256, dtype=real, device=device)
    for i in range(len(scales)):
        scaled_fp8_dequant(result[i], q, scales[i])
    expected = reference.dequantize(
        all_fp8(fp8).expand(len(SCALES), -1), SCALES, group_shape=(1, -1), dtype=real
    )
    assert_same_bytes(result, expected)


@each_fp8
@each_real
def test_every_byte_with_trap_scales_for_each_instruction_set(
    isa: str, real: torch.dtype, fp8: torch.dtype
) -> None:
    check(CPU, all_fp8(fp8).expand(len(SCALES), -1), SCALES, (1, -1), real)
    check(CPU, all_fp8(fp8).expand(len(SCALES), -1).T.contiguous(), SCALES, (-1, 1), real)


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_random_products_round_to_nearest_even(device: torch.device, real: torch.dtype) -> None:
    bits = torch.randint(0, 1 << 31, (3000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    scales = torch.cat([bits.to(torch.int32).view(torch.float32), 0.1 + torch.rand(3000)])
    check(device, all_fp8(E4M3).expand(len(scales), -1), scales, (1, -1), real)


#: name, group shape, shape of the scale for an input [M, N]
GRANULARITIES = {
    "tensor": (None, lambda m, n: (1,)),
    "token": ((1, -1), lambda m, n: (m, 1)),
    "token 1-D": ((1, -1), lambda m, n: (m,)),
    "channel": ((-1, 1), lambda m, n: (1, n)),
    "head 4": ((-1, 4), lambda m, n: (1, -(-n // 4))),
    "head 16": ((-1, 16), lambda m, n: (-(-n // 16),)),
    "block 3x5": ((3, 5), lambda m, n: (-(-m // 3), -(-n // 5))),
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
        check(device, random_bytes(shape, fp8), random_scales(scale_shape(*shape)), group, real)


@each_fp8
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_for_each_instruction_set(isa: str, granularity: str, fp8: torch.dtype) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for shape in SHAPES:
        for real in REAL.values():
            check(CPU, random_bytes(shape, fp8), random_scales(scale_shape(*shape)), group, real)


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 16", "block 3x5"])
@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (300, 4096), (4097, 515), (2000, 128)], ids=str)
def test_shapes_of_models(device: torch.device, shape: tuple[int, int], granularity: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    check(device, random_bytes(shape), random_scales(scale_shape(*shape)), group)


@each_layout
@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 4", "block 3x5"])
@pytest.mark.parametrize("side", ["input", "result", "scale", "all"])
def test_layouts(device: torch.device, side: str, granularity: str, layout: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    layouts = layouts_of(side, layout)
    for shape, real in (((5, 48), torch.bfloat16), ((18, 37), torch.float32), ((3, 257), torch.float16)):
        check(device, random_bytes(shape), random_scales(scale_shape(*shape)), group, real, layouts)


@pytest.mark.parametrize("result_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
def test_pairs_of_layouts(device: torch.device, input_layout: str, result_layout: str) -> None:
    for group, scale_shape in (((-1, -1), ()), ((1, -1), (6,)), ((-1, 1), (40,)), ((2, 8), (3, 5))):
        layouts = (input_layout, "contiguous", result_layout)
        check(device, random_bytes((6, 40)), random_scales(scale_shape), group, layouts=layouts)


@pytest.mark.parametrize(
    ("shape", "group", "scale_shape"),
    [
        ((5, 8, 64), None, (1, 8, 1)),
        ((5, 8, 64), None, (5, 8, 1)),
        ((4, 6, 8), None, (2, 3, 4)),
        ((2, 3, 64), (1, -1), (2, 3, 1)),
        ((2, 3, 64), (1, 16), (6, 4)),
        ((3, 5, 10), (4, 3), (4, 4)),
        ((64,), (-1, 16), (4,)),
        ((), None, ()),
        ((0,), None, (1,)),
        ((5, 0), (1, -1), (5,)),
        ((0, 5), (-1, 1), (5,)),
    ],
    ids=str,
)
def test_more_and_fewer_dimensions(
    device: torch.device, shape: tuple[int, ...], group: tuple[int, int] | None, scale_shape: tuple[int, ...]
) -> None:
    for real in REAL.values():
        check(device, random_bytes(shape), random_scales(scale_shape), group, real)
    for layout in ("transposed", "columns", "rows", "inside") if 0 not in shape else ():
        layouts = (layout, "contiguous", layout)
        check(device, random_bytes(shape), random_scales(scale_shape), group, layouts=layouts)


@pytest.mark.parametrize("layout", ["contiguous", "inside", "rows", "transposed"])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 11, 100])
def test_groups_of_rows_across_leading_dimensions(device: torch.device, rows: int, layout: str) -> None:
    for cols in (-1, 7):
        scale = random_scales((-(-60 // rows), 1 if cols == -1 else 4))
        layouts = (layout, "contiguous", "inside")
        check(device, random_bytes((3, 4, 5, 24)), scale, (rows, cols), layouts=layouts)


@pytest.mark.large
@pytest.mark.parametrize("group", [None, (1, -1), (-1, 1)], ids=str)
def test_more_than_2_to_the_31_elements(cuda: torch.device, group: tuple[int, int] | None) -> None:
    if torch.cuda.get_device_properties(cuda).total_memory < 24 * 10**9:
        pytest.skip("needs 24 GB of GPU memory")
    rows, cols = (1 << 19) + 300, 4096
    q = torch.empty(rows, cols, dtype=torch.uint8, device=cuda).random_(0, 256).view(E4M3)
    scale = random_scales({None: (1,), (1, -1): (rows,), (-1, 1): (cols,)}[group]).to(cuda)
    result = torch.empty(q.shape, dtype=torch.bfloat16, device=cuda)
    scaled_fp8_dequant(result, q, scale, group)
    for start in (0, (1 << 19) - 100, rows - 100):
        part_scale = scale[start : start + 100] if group == (1, -1) else scale
        expected = reference.dequantize(
            q[start : start + 100].cpu(), part_scale.cpu(), group_shape=group or (-1, -1)
        )
        assert_same_bytes(result[start : start + 100], expected)
