"""The scalar codec and the kernels with scale 1, on every fp32 value, against PyTorch's own conversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8kv import _introspect, static_scaled_fp8_quant
from helpers import (
    QUANTIZED,
    all_fp8,
    assert_same_bytes,
    each_fp8,
    each_quantized,
    fp8_boundaries,
    from_bits,
    neighbors,
)

NAMES = {dtype: name for name, dtype in QUANTIZED.items()}


def by_torch(x: Tensor, fp8: torch.dtype) -> Tensor:
    """PyTorch's conversion of values within the range, with the one NaN byte of the rule."""
    if fp8 == torch.int8:
        return x.nan_to_num(0.0).clamp(-127, 127).round().to(fp8).view(torch.uint8)
    limit = torch.finfo(fp8).max
    bytes_ = x.clamp(-limit, limit).to(fp8).view(torch.uint8)
    if x.isnan().any():
        bytes_ = torch.where(x.isnan(), torch.full_like(bytes_, 0x7F), bytes_)
    return bytes_


@each_fp8
def test_all_fp32_values(device: torch.device, fp8: torch.dtype) -> None:
    """2^32 of them, in order of their bit patterns."""
    chunk = 1 << (21 if device.type == "cpu" else 28)
    steps = torch.arange(chunk, dtype=torch.int32, device=device)
    scale = torch.ones((), device=device)
    result = torch.empty(chunk, dtype=fp8, device=device)
    patterns = torch.empty_like(steps)
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    for start in range(-(1 << 31), 1 << 31, chunk):
        torch.add(steps, start, out=patterns)
        x = patterns.view(torch.float32)
        static_scaled_fp8_quant(result, x, scale)
        wrong |= (result.view(torch.uint8) != by_torch(x, fp8)).any()
    assert not wrong.item()


def boundary_values(fp8: torch.dtype) -> Tensor:
    """Every value at which the byte changes, four neighbors on either side, both signs, and the specials."""
    near = neighbors(fp8_boundaries(fp8)[1:], 4).flatten()
    specials = from_bits(
        [
            0,
            1,
            2,
            0x007FFFFF,
            0x00800000,
            0x00800001,
            0x7F7FFFFF,
            0x7F800000,
            0x7F800001,
            0x7FC00000,
            0x7FFFFFFF,
        ]
    )
    positive = torch.cat([near, specials])
    return torch.cat([positive, -positive])


@each_quantized
def test_the_scalar_codec_at_every_boundary(fp8: torch.dtype) -> None:
    x = boundary_values(fp8)
    encoded = _introspect.encode_array(x.numpy(), NAMES[fp8])
    assert_same_bytes(torch.from_numpy(encoded), by_torch(x, fp8))


@each_quantized
def test_the_scalar_codec_on_random_bit_patterns(fp8: torch.dtype) -> None:
    patterns = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 1_000_000, dtype=np.int64).astype(np.int32)
    x = torch.from_numpy(patterns).view(torch.float32)
    encoded = _introspect.encode_array(x.numpy(), NAMES[fp8])
    assert_same_bytes(torch.from_numpy(encoded), by_torch(x, fp8))


@each_quantized
def test_the_vector_codec_of_each_instruction_set_at_every_boundary(isa: str, fp8: torch.dtype) -> None:
    x = boundary_values(fp8)
    result = torch.empty(x.shape, dtype=fp8)
    static_scaled_fp8_quant(result, x, torch.ones(()))
    assert_same_bytes(result.view(torch.uint8), by_torch(x, fp8))


@each_quantized
def test_the_vector_codec_of_each_instruction_set_on_random_bit_patterns(isa: str, fp8: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(1 << 31), 1 << 31, (4_000_000,), generator=generator, dtype=torch.int64)
    x = patterns.to(torch.int32).view(torch.float32)
    result = torch.empty(x.shape, dtype=fp8)
    static_scaled_fp8_quant(result, x, torch.ones(()))
    assert_same_bytes(result.view(torch.uint8), by_torch(x, fp8))


@each_quantized
def test_the_scalar_codec_decodes_every_byte_as_torch_does(fp8: torch.dtype) -> None:
    decoded = torch.tensor([_introspect.decode(byte, NAMES[fp8]) for byte in range(256)])
    expected = all_fp8(fp8).float()
    assert torch.equal(decoded.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert_same_bytes(decoded[finite], expected[finite])


@each_quantized
def test_encode_takes_one_value(fp8: torch.dtype) -> None:
    assert _introspect.encode(1.0, NAMES[fp8]) == {"e4m3": 0x38, "e5m2": 0x3C, "int8": 1}[NAMES[fp8]]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format must be 'e4m3', 'e5m2' or 'int8', got 'e3m4'"):
        _introspect.encode(1.0, "e3m4")
