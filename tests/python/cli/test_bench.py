"""What the benchmarks measure. The command line is tested in test_cli.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fp8kv
from fp8kv import bench, reference
from fp8kv.bench import kv_cache, quantize

CPU = torch.device("cpu")


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MiB of K and of V."""
    monkeypatch.setitem(kv_cache.CACHE_BYTES, "cpu", 1 << 20)


def cache_case(work: str) -> kv_cache.CacheCase:
    """The work with 16 tokens of 8 heads of 128."""
    (case,) = [case for case in kv_cache.cases(CPU, quick=True, warm=False) if case.work == work]
    return case


def clones(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


def tensor_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


# Runs


def test_every_instruction_set_is_measured_and_the_one_in_use_stays() -> None:
    before = (fp8kv.build_info()["cpu_isa"], torch.get_num_threads())
    report = bench.run("cpu", quick=True, only="dequant tensor", host=False)
    assert {row.isa for row in report.rows} == set(fp8kv.build_info()["cpu_isas"])
    assert (fp8kv.build_info()["cpu_isa"], torch.get_num_threads()) == before


def test_a_regular_expression_chooses_the_works() -> None:
    report = bench.run("cpu", quick=True, only="^static (tensor|token) 16x", host=False)
    assert {row.work for row in report.rows} == {"static tensor", "static token"}
    with pytest.raises(ValueError, match=r"only must be a regular expression, got '\(': "):
        bench.run("cpu", quick=True, only="(")


def test_the_caches_of_the_cpu_can_not_be_kept_warm() -> None:
    with pytest.raises(ValueError, match="warm buffers are measured on cuda only"):
        bench.run("cpu", quick=True, warm=True)


def test_warm_buffers_fit_a_quarter_of_the_cache(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    buffers = quantize.QuantizeCase.buffers
    monkeypatch.setattr(
        quantize.QuantizeCase, "buffers", lambda case, count: taken.append(count) or buffers(case, count)
    )
    monkeypatch.setattr(quantize, "QUICK_SHAPES", {"cuda": ((16, 4096), (65536, 8192))})
    report = bench.run(cuda, quick=True, only="static tensor", warm=True, host=False)
    assert report.warm
    assert [row.shape for row in report.rows] == [[16, 4096]]
    ((note, cases),) = report.notes.items()
    assert note == "left out: too large for a quarter of the L2 cache of this device"
    assert cases == ["static tensor 65536x8192"]
    cache = torch.cuda.get_device_properties(cuda).L2_cache_size
    assert len(taken) == 1
    assert taken[0] >= 2
    assert taken[0] * report.rows[0].gbps * report.rows[0].us * 1e3 <= cache / 4 * 1.01


def test_a_row_of_a_cache_names_the_models_of_its_geometry(small_caches: None) -> None:
    report = bench.run("cpu", "cache", quick=True, only="append head HND 16x8x128 Llama-3.1-8B", host=False)
    for row in report.rows:
        assert row.work == "append head HND"
        assert row.shape == [16, 8, 128]
        assert row.models == ["Llama-3.1-8B", "Qwen3-8B"]
    assert report.rows


def test_a_peer_that_raises_is_left_out_with_a_note(
    small_caches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise NotImplementedError("no such kernel\nand more")

    monkeypatch.setitem(kv_cache.EXPRESSIONS, kv_cache.APPEND, broken)
    report = bench.run("cpu", "cache", quick=True, only="append tensor", host=False)
    assert {row.work for row in report.rows} == {"append tensor NHD", "append tensor HND"}
    assert all(row.peers == {} for row in report.rows)
    ((note, cases),) = report.notes.items()
    assert note == "torch eager left out: NotImplementedError: no such kernel"
    assert set(cases) == {
        f"append tensor {layout} 16x8x128 Llama-3.1-8B Qwen3-8B" for layout in ("NHD", "HND")
    }


def test_the_host_cost_of_every_cache_operator_is_measured(small_caches: None) -> None:
    report = bench.run("cpu", "cache", quick=True, only="gather")
    assert list(report.host) == [
        "torch.zero_",
        "reshape_and_cache_flash",
        "reshape_and_cache_flash, per head",
        "reshape_and_cache_flash_dynamic",
        "gather_and_dequant_cache",
    ]
    assert all(us > 0 for us in report.host.values())


# Quantization


@pytest.mark.parametrize("work", quantize.WORKS)
def test_the_quantization_that_peers_do_is_the_same(work: str) -> None:
    """Peers that do something else would be no peers."""
    case = quantize.QuantizeCase(work, (256, 256), CPU, *quantize.WORKS[work])
    (b,) = case.buffers(1)
    expression = case.expression()
    assert expression is not None
    case.ours(b)()
    assert torch.equal(tensor_bytes(expression(b.input, b.scale)), tensor_bytes(b.result))


# Caches


def check_peers(case: kv_cache.CacheCase) -> None:
    (arguments,) = case.buffers(1)
    actual, expected = clones(arguments), clones(arguments)
    kv_cache.EXPRESSIONS[case.op](*actual)
    getattr(reference, case.op)(*expected)
    written = 0
    for x, y, before in zip(actual, expected, arguments, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(tensor_bytes(x), tensor_bytes(y))
            written += not torch.equal(tensor_bytes(x), tensor_bytes(before))
    assert written == (4 if case.op == kv_cache.APPEND_DYNAMIC else 2)


@pytest.mark.parametrize("work", kv_cache.WORKS)
def test_what_peers_do_to_a_cache_is_the_same(small_caches: None, work: str) -> None:
    check_peers(cache_case(work))


def test_the_gather_of_several_sequences_that_peers_do_is_the_same(
    small_caches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "MAX_SEQ_LEN", 40)
    check_peers(replace(cache_case("gather head NHD"), shape=(80, 8, 128)))


@pytest.mark.parametrize(
    ("work", "size"),
    [
        ("append tensor NHD", 16 * 8 * 128 * 2 * 3),
        ("append head HND", 16 * 8 * 128 * 2 * 3),
        ("append token-head NHD", 16 * 8 * (128 * 3 + 4) * 2),
        ("gather head NHD", 16 * 8 * 128 * 2 * 3),
    ],
)
def test_the_bytes_a_cache_operator_moves(work: str, size: int) -> None:
    assert cache_case(work).size == size


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_geometry_is_measured_twice(kind: str) -> None:
    cases = [(case.work, case.shape) for case in kv_cache.cases(torch.device(kind), quick=False, warm=False)]
    assert len(cases) == len(set(cases)) == 6 * 5 * {"cpu": 4, "cuda": 6}[kind]


def test_the_caches_of_all_geometries_lie_in_the_same_memory(small_caches: None) -> None:
    caches = kv_cache.Caches(CPU, warm=False)
    for heads, head_size in kv_cache.GEOMETRIES:
        for layout in ("NHD", "HND"):
            k, v = caches.views(heads, head_size, layout)
            assert k.shape == v.shape == ((1 << 20) // (16 * heads * head_size), 16, heads, head_size)
            offset, head = (heads * head_size, head_size) if layout == "NHD" else (head_size, 16 * head_size)
            assert k.stride() == v.stride() == (16 * heads * head_size, offset, head, 1)
            assert [k.data_ptr(), v.data_ptr()] == [memory.data_ptr() for memory in caches.memory]


def test_slots_are_distinct_in_a_call_and_fresh_in_the_next_ones() -> None:
    drawn = kv_cache.draws(100, 30, 5, torch.Generator().manual_seed(0))
    assert len(drawn) == 5
    for slots in drawn:
        assert len(set(slots.tolist())) == 30
        assert set(slots.tolist()) <= set(range(100))
    assert len(set(torch.cat(drawn[:3]).tolist())) == 90


def test_vllm_is_a_peer_of_appends_per_tensor(monkeypatch: pytest.MonkeyPatch, small_caches: None) -> None:
    seen: list[tuple[object, ...]] = []
    ops = SimpleNamespace(reshape_and_cache_flash=lambda *arguments: seen.append(arguments))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", ops)
    has_peer = {work: cache_case(work).peer("vllm") is not None for work in kv_cache.WORKS}
    assert {work for work, has in has_peer.items() if has} == {"append tensor NHD", "append tensor HND"}

    case = cache_case("append tensor HND")
    (arguments,) = case.buffers(1)
    peer = case.peer("vllm")
    assert peer is not None
    peer(arguments)()
    assert seen == [arguments]
