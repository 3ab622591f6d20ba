"""The table of formats against the numbers of PyTorch and the rules of the reference; shared checks."""

from __future__ import annotations

import pytest
import torch

from fp8kv import _checks, _dtypes, reference
from fp8kv.nn import attention_scales
from fp8kv.quantization import scale_of_amax
from helpers import assert_same_bytes, each_quantized


def fp32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def largest_of(fp8: torch.dtype) -> float:
    return 127.0 if fp8 == torch.int8 else torch.finfo(fp8).max


@each_quantized
def test_the_row_of_a_format(fp8: torch.dtype) -> None:
    row = _dtypes.FORMATS[fp8]
    assert row.dtype == fp8
    assert row.max == largest_of(fp8)
    assert fp32(row.min_scale) == reference.min_scale(fp8)
    nan = 0 if fp8 == torch.int8 else torch.tensor(torch.nan).to(fp8).view(torch.uint8).item()
    assert row.nan_byte == nan


def test_what_is_meant_where_no_format_is_named() -> None:
    assert _dtypes.DEFAULT_FORMAT is _dtypes.FORMATS[torch.float8_e4m3fn]


def test_names_of_caches() -> None:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    real = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    quantized = {"fp8": e4m3, "fp8_e4m3": e4m3, "fp8_e5m2": e5m2, "int8": torch.int8}
    assert quantized | real == _dtypes.CACHE_DTYPES
    assert {t: n for n, t in (quantized | real).items()} == _dtypes.CACHE_NAMES
    assert _dtypes.CACHE_NAMES[e4m3] == "fp8_e4m3"
    assert tuple(quantized) == _dtypes.QUANTIZED_CACHE_NAMES
    assert (e4m3, e5m2) == _dtypes.FP8_DTYPES
    assert _dtypes.dtype_name(e4m3) == "float8_e4m3fn"


@each_quantized
def test_what_is_clipped_lies_above_the_next_number(fp8: torch.dtype) -> None:
    largest = torch.tensor(largest_of(fp8), dtype=torch.float32)
    assert attention_scales._LIMITS[fp8] == largest.nextafter(torch.tensor(torch.inf)).item()


@each_quantized
def test_the_scale_of_amax_is_that_of_the_reference(device: torch.device, fp8: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-149, 128, (2000,), generator=generator)
    amax = torch.rand(2000, generator=generator).add(1).double().mul(exponents.double().exp2()).float()
    amax = torch.cat([amax[amax.isfinite()], torch.tensor([0.0, 448.0, torch.finfo(torch.float32).max])])
    assert_same_bytes(scale_of_amax(amax.to(device), fp8), reference.dynamic_scale(amax, fp8))


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (("NHD", "HND"), 'layout must be "NHD" or "HND", got \'DHN\''),
        (("a", "b", "c"), 'layout must be "a", "b" or "c", got \'DHN\''),
        (("a",), "layout must be \"a\", got 'DHN'"),
    ],
    ids=len,
)
def test_the_sentence_of_a_choice(choices: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        _checks.check_choice("layout", "DHN", choices)
    assert str(caught.value) == sentence
    _checks.check_choice("layout", choices[0], choices)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan], ids=str)
def test_the_sentence_of_a_scale(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^k must be finite and above 0 in fp32, got {bad}$"):
        _checks.check_scale_values("k", torch.tensor([bad]))
    with pytest.raises(ValueError, match=rf"^k must be finite and above 0 in fp32, got {bad} for head 1$"):
        _checks.check_scale_values("k", torch.tensor([1.0, bad]))
