"""What a cache clips that was given no scales: the count, and the one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kv import PagedKVCache
from fp8kv.kv_cache import clipping
from fp8kv.kv_cache.clipping import ClipCounter
from helpers import each_fp8, each_real

MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def tokens(*heads: list[float], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """One token for each list, with one head of these elements."""
    return torch.tensor(heads, device=device).unsqueeze(1).to(dtype)


def quiet_append(cache: PagedKVCache, key: Tensor, value: Tensor, slots: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.append(key, value, torch.tensor(slots, device=key.device))


@each_fp8
@each_real
def test_the_elements_beyond_the_range_are_counted(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    top, inf, nan = MAX[fp8], float("inf"), float("nan")
    cache = PagedKVCache(2, 4, 1, 4, dtype=fp8, device=device)
    key = tokens([top, -top, 1.125 * top, 0.0], [inf, -inf, nan, -1.125 * top], dtype=real, device=device)
    value = tokens([1.0, 2.0, 3.0, 4.0], [0.0, inf, nan, -top], dtype=real, device=device)
    quiet_append(cache, key, value, [0, 1])
    assert cache.clipped() == (4, 1)
    quiet_append(cache, key, value, [2, 3])
    assert cache.clipped() == (8, 2)


def test_what_int8_clips(device: torch.device) -> None:
    cache = PagedKVCache(2, 4, 1, 3, dtype="int8", device=device)
    x = tokens([127.0, -127.5, 128.0], device=device)
    quiet_append(cache, x, x / 2, [0])
    assert cache.clipped() == (2, 0)


def test_what_counts_is_the_difference_to_the_offset(device: torch.device) -> None:
    k_offset = torch.tensor([[600.0, -600.0]])
    cache = PagedKVCache(2, 4, 1, 2, device=device, k_offset=k_offset)
    x = tokens([900.0, -900.0], [100.0, 100.0], [float("inf"), float("nan")], device=device)
    quiet_append(cache, x, x, [0, 1, 2])
    assert cache.clipped() == (3, 3)  # -600 of 100 - 600, 700, inf; 900, -900, inf


def test_scales_of_channels_clip_each_its_own(device: torch.device) -> None:
    counter = ClipCounter(448.0, device)
    x = torch.tensor([[[900.0, 900.0], [900.0, 900.0]]], device=device)
    scale = torch.tensor([[1.0, 3.0], [2.0, 3.0]], device=device)
    counter.add(x, x, torch.tensor([0], device=device), scale, scale[:, :1])
    assert counter.read() == (2, 4)


def test_padding_is_not_counted(device: torch.device) -> None:
    cache = PagedKVCache(2, 4, 1, 2, device=device)
    x = tokens([900.0, 1.0], [900.0, 900.0], [900.0, 900.0], device=device)
    quiet_append(cache, x, x, [3, -1])  # and a row beyond the slots
    assert cache.clipped() == (1, 1)


def test_tokens_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_CHUNK", 5)  # two tokens of two elements
    counter = ClipCounter(448.0, torch.device("cpu"))
    x = tokens(*[[900.0, 1.0]] * 7)
    one = torch.ones(1)
    counter.add(x, -x, torch.arange(7), one, one)
    counter.add(x[:0], x[:0], torch.arange(0), one, one)
    assert counter.read() == (7, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"scales": type("Scales", (), {"k": 1.0, "v": 1.0})},  # on purpose
        {"scales": "dynamic"},
        {"dtype": "bfloat16"},
    ],
    ids=["given", "dynamic", "16 bits"],
)
def test_other_caches_do_not_count(options: dict[str, Any]) -> None:
    cache = PagedKVCache(2, 4, 1, 1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.append(tokens([900.0]), tokens([900.0]), torch.tensor([0]))
    assert cache.clip_counter is None
    assert cache.clipped() is None


def test_scales_that_come_later_end_the_count() -> None:
    cache = PagedKVCache(2, 4, 1, 1)
    cache.use_scales(torch.tensor([2.0]), torch.tensor([2.0]))
    assert cache.clipped() is None


def test_a_scale_that_was_changed_in_place_is_the_one_that_clips(device: torch.device) -> None:
    cache = PagedKVCache(2, 4, 2, 1, device=device)
    cache.k_scale.fill_(2.0)
    x = torch.tensor([[[896.0], [900.0]]], device=device)
    quiet_append(cache, x, x, [0])
    assert cache.clipped() == (1, 2)


SENTENCE = (
    "PagedKVCache: 1 elements of K and 0 of V were clipped, as they were beyond the range of a cache that "
    "was given no scales (448 with the scale 1.0); give it those of fp8kv.calibrate or of a checkpoint, or "
    'scales="dynamic"'
)


def test_the_cpu_warns_once_and_at_once() -> None:
    cache = PagedKVCache(2, 4, 1, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache.append(tokens([900.0]), tokens([1.0]), torch.tensor([0]))
        cache.append(tokens([900.0]), tokens([1.0]), torch.tensor([1]))
        cache.clipped()
    assert [(str(w.message), w.filename) for w in caught] == [(SENTENCE, __file__)]
    assert cache.clipped() == (2, 0)


def test_a_gpu_warns_once_and_when_asked(cuda: torch.device) -> None:
    cache = PagedKVCache(2, 4, 1, 1, device=cuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache.append(tokens([900.0], device=cuda), tokens([1.0], device=cuda), torch.tensor([0], device=cuda))
        assert not caught
        cache.clipped()
        cache.clipped()
    assert [(str(w.message), w.filename) for w in caught] == [(SENTENCE, __file__)]


def test_a_count_goes_on_in_another_cache() -> None:
    old, new = PagedKVCache(2, 4, 1, 1), PagedKVCache(4, 4, 1, 1)
    quiet_append(old, tokens([900.0]), tokens([900.0]), [0])
    new.clip_counter = old.clip_counter
    quiet_append(new, tokens([900.0]), tokens([0.0]), [9])
    assert new.clipped() == (2, 1)


def test_refused_tokens_are_not_counted() -> None:
    cache = PagedKVCache(2, 4, 1, 1)
    with pytest.raises(RuntimeError):
        cache.append(tokens([900.0]), tokens([900.0]), torch.tensor([8]))
    assert cache.clipped() == (0, 0)


def test_inference_mode_inside_and_outside() -> None:
    with torch.inference_mode():
        cache = PagedKVCache(2, 4, 1, 1)
        quiet_append(cache, tokens([900.0]), tokens([0.0]), [0])
    quiet_append(cache, tokens([900.0]).requires_grad_(), tokens([0.0]), [0])
    assert cache.clipped() == (2, 0)


def test_tensors_without_values_are_not_looked_at() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cache = PagedKVCache(2, 4, 1, 1)
        cache.append(torch.ones(3, 1, 1), torch.ones(3, 1, 1), torch.arange(3))
    assert cache.clip_counter is not None
    assert cache.clip_counter.counts.shape == (2,)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_counts_any_number_of_tokens(device: torch.device) -> None:
    cache = PagedKVCache(4, 4, 1, 2, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def store(x: Tensor, slots: Tensor) -> None:
        cache.append(x, -x, slots)

    for count in (3, 5):
        store(tokens(*[[900.0, 1.0]] * count, device=device), torch.arange(-1, count - 1, device=device))
    with pytest.warns(UserWarning, match="6 elements of K and 6 of V"):
        assert cache.clipped() == (6, 6)


def test_every_replay_of_a_graph_counts(cuda: torch.device) -> None:
    cache = PagedKVCache(2, 4, 1, 1, device=cuda)
    x, slots = tokens([900.0], device=cuda), torch.tensor([0], device=cuda)
    cache.append(x, x, slots)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(x, x, slots)
    assert cache.clip_counter is not None
    cache.clip_counter.counts.zero_()
    graph.replay()
    graph.replay()
    with pytest.warns(UserWarning, match="2 elements of K and 2 of V"):
        assert cache.clipped() == (2, 2)
