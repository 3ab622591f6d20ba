"""scaled_fp8_dequant against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

from fp8kv import reference, scaled_fp8_dequant
from helpers import (
    TRAP_SCALES,
    all_fp8,
    assert_same_bytes,
    each_quantized,
    each_real,
    from_bits,
    random_scales,
    require_gpu_memory,
)
from quantization_family import CPU, DEQUANTIZE, E4M3, check

#: Products that overflow, that become subnormal in each output type, and that lie on ties of its rounding.
SCALES = torch.cat(
    [
        TRAP_SCALES,
        torch.exp2(torch.arange(-149.0, 128.0)),
        from_bits([0x3F808000, 0x3F808001, 0x3F818000, 0x3F801000, 0x3F803000, 0x3F801001, 0x42DA0000]),
        torch.tensor([65520.0 / 448, 65519.99 / 448, 3.4e38 / 448, 1.17e-38, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8]),
    ]
)


@each_quantized
@each_real
@pytest.mark.parametrize("granularity", ["token", "channel", "element"])
def test_every_byte_with_trap_scales(device: torch.device, granularity: str, real: torch.dtype, fp8: torch.dtype) -> None:
    q = all_fp8(fp8).expand(len(SCALES), -1)
    if granularity == "token":
        check(DEQUANTIZE, device, q, SCALES, (1, -1), real)
    elif granularity == "channel":
        check(DEQUANTIZE, device, q.T, SCALES, (-1, 1), real)
    else:
        check(DEQUANTIZE, device, q, SCALES[:, None].expand(q.shape), (1, 1), real)


@each_quantized
@each_real
def test_every_byte_with_trap_scales_per_tensor(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    q, scales = all_fp8(fp8).to(device), SCALES.to(device)
    result = torch.empty(len(scales), 256, dtype=real, device=device)
    for i in range(len(scales)):
        scaled_fp8_dequant(result[i], q, scales[i])
    expected = reference.dequantize(all_fp8(fp8).expand(len(SCALES), -1), SCALES, group_shape=(1, -1), dtype=real)
    assert_same_bytes(result, expected)


@each_quantized
@each_real
def test_every_byte_with_trap_scales_for_each_instruction_set(isa: str, real: torch.dtype, fp8: torch.dtype) -> None:
    check(DEQUANTIZE, CPU, all_fp8(fp8).expand(len(SCALES), -1), SCALES, (1, -1), real)
    check(DEQUANTIZE, CPU, all_fp8(fp8).expand(len(SCALES), -1).T.contiguous(), SCALES, (-1, 1), real)


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_random_products_round_to_nearest_even(device: torch.device, real: torch.dtype) -> None:
    bits = torch.randint(0, 1 << 31, (3000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    scales = torch.cat([bits.to(torch.int32).view(torch.float32), 0.1 + torch.rand(3000)])
    check(DEQUANTIZE, device, all_fp8(E4M3).expand(len(scales), -1), scales, (1, -1), real)


@pytest.mark.large
@pytest.mark.parametrize("group", [None, (1, -1), (-1, 1)], ids=str)
def test_more_than_2_to_the_31_elements(cuda: torch.device, group: tuple[int, int] | None) -> None:
    require_gpu_memory(cuda, 24)
    rows, cols = (1 << 19) + 300, 4096
    q = torch.empty(rows, cols, dtype=torch.uint8, device=cuda).random_(0, 256).view(E4M3)
    scale = random_scales({None: (1,), (1, -1): (rows,), (-1, 1): (cols,)}[group]).to(cuda)
    result = torch.empty(q.shape, dtype=torch.bfloat16, device=cuda)
    scaled_fp8_dequant(result, q, scale, group)
    for start in (0, (1 << 19) - 100, rows - 100):
        part_scale = scale[start : start + 100] if group == (1, -1) else scale
        expected = reference.dequantize(q[start : start + 100].cpu(), part_scale.cpu(), group_shape=group or (-1, -1))
        assert_same_bytes(result[start : start + 100], expected)
