"""Scales that the plug-in for vLLM calculates while it serves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from vllm_layer import HEAD_SIZE, KV_HEADS, Layer

from fp8kv import reference
from fp8kv.vllm.scales import requantize
from helpers import assert_same_bytes

pytestmark = pytest.mark.usefixtures("vllm", "one_thread")

E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _observe(vllm: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FP8KV_VLLM_OBSERVE", "50")
    settings = Layer().backend.settings
    settings.cache_clear()
    yield
    settings.cache_clear()


def tokens(layer: Layer, count: int, sizes: Tensor) -> Tensor:
    """[count, KV_HEADS, HEAD_SIZE] with these largest magnitudes of the heads."""
    x = layer.normal(count, KV_HEADS, HEAD_SIZE).float()
    return (x / x.abs().amax((0, 2), keepdim=True) * sizes.view(-1, 1)).to(layer.dtype)


@pytest.mark.parametrize("per_head", [False, True], ids=["tensor", "head"])
def test_scales_are_those_of_the_first_tokens(per_head: bool) -> None:
    """Twice the largest magnitude; the tensors of the layer stay where they are, as graphs read them."""
    ones = [torch.ones(KV_HEADS) if per_head else torch.tensor(1.0) for _ in "kv"]
    layer = Layer("fp8", (ones[0], ones[1]))
    k_sizes, v_sizes = torch.tensor([20.0, 7.0]), torch.tensor([0.5, 3.5])
    for first in (0, 40):
        key, value = tokens(layer, 23, k_sizes), tokens(layer, 23, v_sizes)
        layer.store(torch.arange(first, first + 20), key, value)
        assert [x.unique().tolist() for x in ones] == [[1.0], [1.0]]
    key, value = tokens(layer, 23, 4 * k_sizes), tokens(layer, 23, 4 * v_sizes)
    layer.store(torch.arange(80, 100), key, value)
    for scale, x in zip(ones, (key, value), strict=True):
        largest = 2 * x[:20].float().abs().amax((0, 2))
        largest = largest if per_head else largest.max()
        torch.testing.assert_close(scale, largest / 448, rtol=0, atol=0)
    assert layer.layer._k_scale is ones[0]
    assert layer.layer._k_scale_float == ones[0].max().item()
    assert layer.impl._serving_scales.frozen


def test_what_was_stored_before_means_the_same_after() -> None:
    layer = Layer("fp8", (torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0])))
    key, value = (tokens(layer, 43, torch.tensor([20.0, 7.0])) for _ in "kv")
    slots = torch.arange(40)
    layer.store(slots, key, value)
    old = [x.clone() for x in (layer.layer._k_scale, layer.layer._v_scale)]
    stored = layer.caches.clone()
    layer.store(slots + 40, key, value)
    new = layer.layer._k_scale, layer.layer._v_scale
    halves = layer.kv_cache.transpose(1, 2).chunk(2, dim=-1)
    for cache, before, a, b in zip(halves, stored, old, new, strict=True):
        values = reference.dequantize(before.view(E4M3), a.view(1, 1, -1, 1), dtype=torch.float32)
        expected, _ = reference.quantize(values, b.view(1, 1, -1, 1))
        first_40 = (x.reshape(-1, KV_HEADS, HEAD_SIZE)[:40] for x in (cache, expected.view(torch.uint8)))
        assert_same_bytes(*first_40)


def test_padding_is_not_observed() -> None:
    """Steps of nothing but padding, as vLLM makes them before it serves, bring no scales."""
    layer = Layer("fp8", (torch.tensor(1.0), torch.tensor(1.0)))
    for _ in range(4):
        layer.store(torch.full((60,), -1))
    assert not layer.impl._serving_scales.frozen
    layer.store(torch.cat([torch.arange(49), torch.full((60,), -1)]))
    assert not layer.impl._serving_scales.frozen
    layer.store(torch.arange(49, 50))
    assert layer.impl._serving_scales.frozen


def test_caches_without_scales_of_a_layer_observe_nothing() -> None:
    for name in ("auto", "fp8_per_token_head"):
        assert Layer(name).impl._serving_scales is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_requantize(heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every byte, in a view with gaps, in several chunks."""
    from fp8kv.vllm import scales

    monkeypatch.setattr(scales, "_CHUNK", 2 * 8 * 3 * 16)
    whole = torch.arange(4 * 8 * 3 * 32).to(torch.uint8).view(4, 8, 3, 32)
    cache, others = whole[..., :16], whole[..., 16:].clone()
    old, new = (torch.tensor(x[:heads]) for x in ([0.5, 0.03, 2.0], [0.25, 0.1, 7.0]))
    values = reference.dequantize(cache.clone().view(dtype), old.view(1, 1, -1, 1), dtype=torch.float32)
    expected, _ = reference.quantize(values, new.view(1, 1, -1, 1), dtype=dtype)
    requantize(cache.view(dtype), old, new)
    assert_same_bytes(cache.contiguous(), expected.view(torch.uint8))
    assert torch.equal(whole[..., 16:], others)
