"""static_scaled_fp8_quant against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8kv import reference, static_scaled_fp8_quant
from helpers import (
    REAL,
    TRAP_SCALES,
    all_patterns,
    assert_same_bytes,
    each_quantized,
    each_real,
    fp8_boundaries,
    neighbors,
    random_scales,
    require_gpu_memory,
    values,
)
from quantization_family import CPU, E4M3, STATIC, check

# Values and scales that trap shortcuts


@each_quantized
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_with_trap_scales_per_tensor(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = all_patterns(real)
    on_device, scales = x.to(device), TRAP_SCALES.to(device)
    result = torch.empty((len(scales), len(x)), dtype=fp8, device=device)
    for i in range(len(scales)):
        static_scaled_fp8_quant(result[i], on_device, scales[i])
    expected, _ = reference.quantize(x.expand(len(scales), -1), TRAP_SCALES[:, None], group_shape=(1, -1), dtype=fp8)
    assert_same_bytes(result, expected)


@each_quantized
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_with_trap_scales_per_token(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = all_patterns(real).expand(len(TRAP_SCALES), -1)
    check(STATIC, device, x, TRAP_SCALES, (1, -1), fp8)


@each_quantized
@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value_with_trap_scales_per_channel(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = all_patterns(real).unsqueeze(1).expand(-1, len(TRAP_SCALES)).contiguous()
    check(STATIC, device, x, TRAP_SCALES, (-1, 1), fp8)


def boundary_inputs(scales: Tensor, fp8: torch.dtype) -> Tensor:
    """For each scale a row of fp32 inputs whose quotients lie on the rounding boundaries or just beside."""
    boundaries = fp8_boundaries(fp8)[1:]
    near = neighbors(scales[:, None] * boundaries, 2).reshape(len(scales), -1)
    return torch.cat([near, -near], dim=1)


@each_quantized
@pytest.mark.parametrize("granularity", ["token", "channel", "element"])
def test_quotients_beside_every_rounding_boundary(device: torch.device, granularity: str, fp8: torch.dtype) -> None:
    finite = TRAP_SCALES[TRAP_SCALES.isfinite() & (TRAP_SCALES > 0)]
    x = boundary_inputs(finite, fp8)
    if granularity == "token":
        check(STATIC, device, x, finite, (1, -1), fp8)
    elif granularity == "channel":
        check(STATIC, device, x.T.contiguous(), finite, (-1, 1), fp8)
    else:
        check(STATIC, device, x, finite[:, None].expand(x.shape), (1, 1), fp8)


@each_quantized
def test_quotients_beside_every_rounding_boundary_for_random_scales(device: torch.device, fp8: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    exponents = torch.randint(60, 180, (1500,), generator=generator, dtype=torch.int32)
    significands = torch.randint(0, 1 << 23, (1500,), generator=generator, dtype=torch.int32)
    scales = ((exponents << 23) + significands).view(torch.float32)
    check(STATIC, device, boundary_inputs(scales, fp8), scales, (1, -1), fp8)


@each_quantized
@each_real
def test_trap_scales_and_hostile_values_for_each_instruction_set(isa: str, real: torch.dtype, fp8: torch.dtype) -> None:
    x = values((len(TRAP_SCALES), 300), real) if real == torch.float32 else all_patterns(real)[::7]
    x = x if x.dim() == 2 else x.expand(len(TRAP_SCALES), -1)
    check(STATIC, CPU, x, TRAP_SCALES, (1, -1), fp8)
    check(STATIC, CPU, x.T.contiguous(), TRAP_SCALES, (-1, 1), fp8)


@pytest.mark.parametrize("size", [1, 3, 8, 17, 64, 100])
def test_special_values_at_every_position_of_a_row(device: torch.device, size: int) -> None:
    for real in REAL.values():
        for special in (float("nan"), float("inf"), -float("inf"), -0.0):
            x = torch.ones(size, size)
            x.fill_diagonal_(special)
            check(STATIC, device, x.to(real), torch.tensor(0.5), None)


# Memory


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


@pytest.mark.large
@pytest.mark.parametrize("group", [None, (1, -1), (-1, 1), (-1, 128), (128, 128)], ids=str)
def test_more_than_2_to_the_31_elements(cuda: torch.device, group: tuple[int, int] | None) -> None:
    """The last rows, which only 64-bit offsets reach, and a few before."""
    require_gpu_memory(cuda, 24)
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
    if device.type == "cuda":
        require_gpu_memory(device, 24)
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
