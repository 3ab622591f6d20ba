"""Observers: their scales equal those of brute force over all elements."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fp8kv.calibration.observers import MinMaxObserver, MSEObserver, PercentileObserver, make_observer
from helpers import assert_same_bytes, each_layout, each_real, placed, values

NAMES = ["static_minmax", "percentile", "mse"]
MIN_SCALE = torch.tensor(1 / (448 * 512)).item()
each_name = pytest.mark.parametrize("name", NAMES)


def finite(x: Tensor) -> Tensor:
    """The magnitudes of the finite elements."""
    return x.float().abs()[x.isfinite()]


def over_448(magnitudes: list[Tensor]) -> Tensor:
    return torch.maximum(torch.stack(magnitudes) / torch.full((len(magnitudes),), 448.0), torch.tensor(MIN_SCALE))


def percentile_of(x: Tensor, percentile: str) -> Tensor:
    """The smallest magnitude that at least the given percentage does not exceed."""
    magnitudes = finite(x).sort().values
    return magnitudes[max(1, math.ceil(Fraction(percentile) * len(magnitudes) / 100)) - 1]


def best_scale(x: Tensor) -> Tensor:
    """The one of 81 scales with the smallest squared error over the exact elements."""
    base = finite(x).max() / torch.tensor(448.0)
    x = x.float()[x.isfinite()]
    errors = {}
    for percent in range(20, 101):
        scale = torch.maximum(base * (percent / 100), torch.tensor(MIN_SCALE))
        restored = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        errors[scale.item()] = (restored.double() - x.double()).square().sum().item()
    return torch.tensor(max(scale for scale, error in errors.items() if error == min(errors.values())))


def heads(tokens: int = 500, head_size: int = 16, seed: int = 0) -> Tensor:
    """bf16 ``[tokens, 5, head_size]``: each head has another distribution."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(tokens, 5, head_size, generator=generator)
    uniform = torch.rand(tokens, head_size, generator=generator)
    heavy = normal[:, 2] / uniform.clamp_min(1e-3)
    two = torch.where(uniform < 0.999, 0.97, 1.0)
    return torch.stack([normal[:, 0], normal[:, 1] * 300, heavy, uniform * 1e-2, two], 1).bfloat16()


# Every observer


@each_name
def test_several_batches_count_as_one(device: torch.device, name: str) -> None:
    x = heads().to(device)
    whole, parts = (make_observer(name, 5, device=device) for _ in range(2))
    whole.update(x)
    for part in x.split([1, 99, 0, 400]):
        parts.update(part)
    assert_same_bytes(parts.scales(), whole.scales())
    assert_same_bytes(parts.counts, whole.counts)


@each_name
def test_the_last_batch_is_not_all_that_counts(name: str) -> None:
    observer = make_observer(name, 1, percentile=100)
    for magnitude in (7.0, 448.0, 1.0):
        observer.update(torch.full((2, 1, 3), magnitude))
    assert observer.scales().item() == 1.0


@each_name
def test_elements_that_are_not_finite_are_left_out_and_counted(device: torch.device, name: str) -> None:
    x = heads()
    spoiled = x.repeat(2, 1, 1)
    spoiled[1::2] = torch.tensor([math.nan, math.inf, -math.inf, -math.nan]).repeat(4)
    spoiled[::2] = x
    clean, observer = make_observer(name, 5), make_observer(name, 5, device=device)
    clean.update(x)
    observer.update(spoiled.to(device))
    assert_same_bytes(observer.scales(), clean.scales())
    assert observer.counts.tolist() == [2 * x.numel(), x.numel()]
    assert clean.counts.tolist() == [x.numel(), 0]


@each_name
@pytest.mark.parametrize(
    "element", [0.0, -0.0, math.nan, math.inf, 1e-40, 1e-6], ids=["0", "-0", "nan", "inf", "1e-40", "1e-6"]
)
def test_a_head_without_magnitude_gets_the_smallest_scale(name: str, element: float) -> None:
    observer = make_observer(name, 2)
    observer.update(torch.tensor([[[element] * 4, [448.0] * 4]]))
    assert observer.scales().tolist() == [MIN_SCALE, 1.0]


@each_name
def test_without_any_element_the_scale_is_the_smallest(name: str) -> None:
    observer = make_observer(name, 3)
    observer.update(torch.zeros(0, 3, 8))
    assert observer.scales().tolist() == [MIN_SCALE] * 3


@each_name
@each_layout
def test_any_strides(name: str, layout: str) -> None:
    x = heads(tokens=20)
    contiguous, strided = make_observer(name, 5), make_observer(name, 5)
    contiguous.update(x)
    strided.update(placed(x, layout, torch.device("cpu")))
    assert_same_bytes(strided.scales(), contiguous.scales())


@each_name
def test_the_same_on_a_gpu(cuda: torch.device, name: str) -> None:
    x = values((300, 5, 16), torch.bfloat16)
    observers = [make_observer(name, 5, device=device) for device in ("cpu", cuda)]
    for observer in observers:
        observer.update(x.to(observer.counts.device))
    assert_same_bytes(observers[1].scales(), observers[0].scales())


@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_a_large_batch_goes_in_pieces(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    x = heads()
    at_once, in_pieces = make_observer(name, 5), make_observer(name, 5)
    at_once.update(x)
    monkeypatch.setattr(type(in_pieces), "_CHUNK", 7 * 5 * 16)
    in_pieces.update(x)
    assert_same_bytes(in_pieces.scales(), at_once.scales())


def test_unknown_observer() -> None:
    with pytest.raises(ValueError, match=r'^make_observer: name must be one of "static_minmax", .*, got \'max\''):
        make_observer("max", 1)


# Min-max


@each_real
def test_minmax_is_the_largest_finite_magnitude_over_448(device: torch.device, real: torch.dtype) -> None:
    x = values((300, 5, 16), real)
    observer = MinMaxObserver(5, device)
    observer.update(x.to(device))
    assert_same_bytes(observer.scales(), over_448([finite(x[:, head]).max() for head in range(5)]))


# Percentile


@pytest.mark.parametrize("percentile", ["0.001", "50", "99", "99.9", "99.99", "100"])
def test_percentile_of_bf16_is_exact(device: torch.device, percentile: str) -> None:
    x = heads()
    observer = PercentileObserver(5, float(percentile), device)
    observer.update(x.to(device))
    assert_same_bytes(observer.scales(), over_448([percentile_of(x[:, head], percentile) for head in range(5)]))


@pytest.mark.parametrize(
    ("count", "percentile", "expected"),
    [(10_000, 99.99, 1.0), (9999, 99.99, 448.0), (1000, 99.9, 1.0), (999, 99.9, 448.0), (1, 0.1, 448.0)],
)
def test_a_percentile_is_counted_in_whole_elements(count: int, percentile: float, expected: float) -> None:
    """Only one element is 448, the others are 1."""
    x = torch.ones(count, 1, 1)
    x[0] = 448
    observer = PercentileObserver(1, percentile)
    observer.update(x)
    assert_same_bytes(observer.scales(), over_448([torch.tensor(expected)]))


@pytest.mark.parametrize("real", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_percentile_of_other_types_is_rounded_up_to_bf16(real: torch.dtype) -> None:
    x = torch.randn(1000, 3, 8, generator=torch.Generator().manual_seed(0)).to(real)
    observer = PercentileObserver(3, 90)
    observer.update(x)
    for head in range(3):
        exact = percentile_of(x[:, head], "90").item()
        found = observer.scales()[head].item() * 448
        assert exact <= found * (1 + 1e-6)
        assert found <= exact * (1 + 2**-7)


@each_real
def test_the_hundredth_percentile_is_amax(real: torch.dtype) -> None:
    x = values((300, 5, 16), real)
    minmax, percentile = MinMaxObserver(5), PercentileObserver(5, 100)
    minmax.update(x)
    percentile.update(x)
    assert_same_bytes(percentile.scales(), minmax.scales())


@pytest.mark.parametrize("largest", [65535.0, 65536.0, 3e38])
def test_beyond_the_bins_a_percentile_is_amax(largest: float) -> None:
    observer = PercentileObserver(1, 90)
    observer.update(torch.tensor([largest, largest / 2, 1.0]).repeat(100, 1).view(-1, 1, 1))
    assert observer.scales().item() == torch.tensor(largest).div(448).item()


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan, math.inf])
def test_a_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"^PercentileObserver: percentile must be above 0 and at most 100, got"):
        PercentileObserver(1, percentile)


# Squared error


def test_the_scale_with_the_least_squared_error(device: torch.device) -> None:
    x = heads()
    observer = MSEObserver(5, device)
    observer.update(x.to(device))
    expected = torch.stack([best_scale(x[:, head]) for head in range(5)])
    assert_same_bytes(observer.scales(), expected)
    # The test would be meaningless if clipping never paid off.
    assert (expected < over_448([finite(x[:, head]).max() for head in range(5)])).sum() >= 2


def test_elements_without_error_at_the_scale_of_amax_keep_it() -> None:
    observer = MSEObserver(1)
    observer.update(torch.tensor([1.75, 0.875, -0.4375]).repeat(10).view(-1, 1, 1))
    assert observer.scales().item() == 1.75 / 448


@pytest.mark.parametrize("real", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_the_squared_error_of_other_types_is_near_the_least(real: torch.dtype) -> None:
    x = torch.randn(2000, 1, 8, generator=torch.Generator().manual_seed(0)).to(real)
    observer = MSEObserver(1)
    observer.update(x)

    def error(scale: Tensor) -> float:
        restored = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (restored - x.float()).square().sum().item()

    assert error(observer.scales()) <= 1.05 * error(best_scale(x))
