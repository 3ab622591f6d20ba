"""The benchmarks. The command line is tested in test_cli.py."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import fp8kv
from fp8kv import bench, reference
from fp8kv.bench import attention, attention_peers, decode, kv_cache, measure, quantize
from fp8kv.bench.cards import specified_gbps

CPU = torch.device("cpu")


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MiB of K and of V."""
    monkeypatch.setitem(kv_cache.CACHE_BYTES, "cpu", 1 << 20)


def cache_case(work: str) -> kv_cache.CacheCase:
    """The case with 16 tokens of 8 heads of 128."""
    (case,) = [case for case in kv_cache.cases(CPU, quick=True, warm=False) if case.work == work]
    return case


def step_case(work: str) -> decode.StepCase:
    """The case with 16 tokens of 32 query and 8 KV heads of 128."""
    (case,) = [case for case in decode.cases(CPU, quick=True, warm=False) if case.work == work]
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


@pytest.mark.parametrize("threads", [1, 2])
def test_what_one_thread_waits_for_does_not_count(threads: int) -> None:
    def call() -> None:
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
        time.sleep(0.03)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        us = measure.cpu_time([call], 3)
    finally:
        torch.set_num_threads(before)
    assert us < 20_000 if threads == 1 else us > 30_000


def test_a_regular_expression_chooses_the_works() -> None:
    report = bench.run("cpu", quick=True, only="^static (tensor|token) 16x", host=False)
    assert {row.work for row in report.rows} == {"static tensor", "static token"}
    with pytest.raises(ValueError, match=r"only must be a regular expression, got '\(': "):
        bench.run("cpu", quick=True, only="(")


def test_a_regular_expression_chooses_the_peers() -> None:
    report = bench.run("cpu", quick=True, only="^static tensor 16x", peers="eager$", host=False)
    assert {name for row in report.rows for name in row.peers} == {"torch eager"}
    with pytest.raises(ValueError, match=r"peers must be a regular expression, got '\(': "):
        bench.run("cpu", peers="(")


def test_the_caches_of_the_cpu_can_not_be_kept_warm() -> None:
    with pytest.raises(ValueError, match="warm buffers are measured on cuda only"):
        bench.run("cpu", quick=True, warm=True)


def test_warm_buffers_fit_a_quarter_of_the_cache(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    buffers = quantize.QuantizeCase.buffers
    monkeypatch.setattr(quantize.QuantizeCase, "buffers", lambda case, count: taken.append(count) or buffers(case, count))
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


def test_a_peer_that_raises_is_left_out_with_a_note(small_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise NotImplementedError("no such kernel\nand more")

    monkeypatch.setitem(kv_cache.EXPRESSIONS, kv_cache.APPEND, broken)
    report = bench.run("cpu", "cache", quick=True, only="append tensor", host=False)
    assert {row.work for row in report.rows} == {"append tensor NHD", "append tensor HND"}
    assert all(row.peers == {} for row in report.rows)
    ((note, cases),) = report.notes.items()
    assert note == "torch eager left out: NotImplementedError: no such kernel"
    assert set(cases) == {f"append tensor {layout} 16x8x128 Llama-3.1-8B Qwen3-8B" for layout in ("NHD", "HND")}


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
    """Peers must do the same work."""
    case = quantize.QuantizeCase(work, (256, 256), CPU, *quantize.WORKS[work])
    (b,) = case.buffers(1)
    expression = case.expression()
    assert expression is not None
    case.ours(b)()
    assert torch.equal(tensor_bytes(expression(b.input, b.scale)), tensor_bytes(b.result))


# Caches


def check_against_reference(op: str, call: Callable[..., object], arguments: tuple[Any, ...], count: int) -> None:
    """The call writes `count` of its arguments, the same bytes as the reference."""
    actual, expected = clones(arguments), clones(arguments)
    call(*actual)
    getattr(reference, op)(*expected)
    written = 0
    for x, y, before in zip(actual, expected, arguments, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(tensor_bytes(x), tensor_bytes(y))
            written += not torch.equal(tensor_bytes(x), tensor_bytes(before))
    assert written == count


def check_cache(case: kv_cache.CacheCase) -> None:
    """The operator and the expression of peers."""
    (arguments,) = case.buffers(1)
    count = 4 if case.how.op == kv_cache.APPEND_DYNAMIC else 2
    for call in (lambda *given: case.ours(given)(), kv_cache.EXPRESSIONS[case.how.op]):
        check_against_reference(case.how.op, call, arguments, count)


@pytest.mark.parametrize("work", kv_cache.WORKS)
def test_what_is_done_to_a_cache_is_what_the_reference_does(small_caches: None, work: str) -> None:
    check_cache(cache_case(work))


@pytest.mark.parametrize("work", [work for work in kv_cache.WORKS if work.startswith("gather")])
def test_the_gather_of_several_sequences(small_caches: None, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    monkeypatch.setattr(kv_cache, "MAX_SEQ_LEN", 40)
    check_cache(replace(cache_case(work), shape=(80, 8, 128)))


@pytest.mark.parametrize(
    ("work", "parameters"),
    [
        ("append int8 channel NHD", 2),
        ("append int8 channel offset NHD", 4),
        ("gather int8 channel NHD", 2),
        ("gather int8 channel offset NHD", 4),
    ],
)
def test_the_scales_and_offsets_of_an_int8_cache(small_caches: None, work: str, parameters: int) -> None:
    (arguments,) = cache_case(work).buffers(1)
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert "int8" in arguments
    assert [x.shape[1:] for x in tensors if x.dtype == torch.int8] == [(16, 8, 128)] * 2
    of_channels = [x for x in tensors if x.dtype == torch.float32]
    assert [x.shape for x in of_channels] == [(8, 128)] * parameters
    assert all(len(x.unique()) > 1000 for x in of_channels)


@pytest.mark.parametrize(
    ("work", "size"),
    [
        ("append tensor NHD", 16 * 8 * 128 * 2 * 3),
        ("append head HND", 16 * 8 * 128 * 2 * 3),
        ("append token-head NHD", 16 * 8 * (128 * 3 + 4) * 2),
        ("append int8 channel NHD", 16 * 8 * 128 * 2 * 3),
        ("append int8 channel offset NHD", 16 * 8 * 128 * 2 * 3),
        ("gather head NHD", 16 * 8 * 128 * 2 * 3),
        ("gather int8 channel offset NHD", 16 * 8 * 128 * 2 * 3),
    ],
)
def test_the_bytes_a_cache_operator_moves(work: str, size: int) -> None:
    assert cache_case(work).size == size


@pytest.mark.parametrize(
    ("module", "kind", "count"),
    [
        (kv_cache, "cpu", (6 * 5 + 4) * 4),
        (kv_cache, "cuda", (6 * 5 + 4) * 6),
        (decode, "cpu", (4 * 5 + 1) * 3),
        (decode, "cuda", (4 * 5 + 1) * 6),
    ],
    ids=["cache-cpu", "cache-cuda", "decode-cpu", "decode-cuda"],
)
def test_no_geometry_is_measured_twice(module: ModuleType, kind: str, count: int) -> None:
    cases = [(case.work, case.shape) for case in module.cases(torch.device(kind), quick=False, warm=False)]
    assert len(cases) == len(set(cases)) == count


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("module", "geometry", "like"),
    [
        (kv_cache, (8, 128), "append head NHD"),
        (decode, (32, 8, 128), "step rope NHD"),
        (attention, (32, 8, 128), "decode token-head NHD"),
    ],
    ids=["cache", "decode", "attention"],
)
def test_int8_is_measured_on_one_geometry(kind: str, module: ModuleType, geometry: tuple[int, ...], like: str) -> None:
    cases = list(module.cases(torch.device(kind), quick=False, warm=False))
    shapes = [case.shape for case in cases if case.work == like and case.shape[-len(geometry) :] == geometry]
    works = [work for work in module.WORKS if "int8" in work]
    assert shapes
    assert works
    for work in works:
        assert [case.shape for case in cases if case.work == work] == shapes


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


# Steps


@pytest.mark.parametrize("work", decode.WORKS)
def test_a_step_does_what_the_reference_does(small_caches: None, work: str) -> None:
    case = step_case(work)
    (arguments,) = case.buffers(1)
    for call in (lambda *given: case.ours(given)(), decode.step):
        if "norm" not in work:
            check_against_reference(decode.OP, call, arguments, 3)
            continue
        actual, expected = clones(arguments), clones(arguments)
        call(*actual)
        reference.rope_quant_and_cache(*expected)
        # The order of the norm's sum is not fixed: within one step of E4M3.
        for x, y in zip(actual[3:6], expected[3:6], strict=True):
            x, y = (tensor.view(torch.float8_e4m3fn).float() for tensor in (x, y))
            assert torch.allclose(x, y, rtol=0.125, atol=2.0**-9)


def test_queries_are_not_quantized_with_an_int8_cache(small_caches: None) -> None:
    (arguments,) = step_case("step rope int8 channel NHD").buffers(1)
    _, _, _, out, k_cache, v_cache, _, name, q_scale, k_scale, v_scale, *_ = arguments
    assert (out.dtype, k_cache.dtype, v_cache.dtype, name) == (torch.bfloat16, torch.int8, torch.int8, "int8")
    assert k_scale.shape == v_scale.shape == (8, 128)
    assert q_scale.shape == (8,)


@pytest.mark.parametrize(
    ("work", "size"),
    [
        ("step NHD", 16 * (32 + 8 + 8) * 128 * 3),
        ("step norm rope NHD", 16 * (32 + 8 + 8) * 128 * 3),
        ("step rope int8 channel NHD", 16 * (32 * 4 + (8 + 8) * 3) * 128),
    ],
)
def test_the_bytes_a_step_moves(work: str, size: int) -> None:
    assert step_case(work).size == size


def test_other_libraries_are_no_peers_of_a_step_to_an_int8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "flashinfer_rope", lambda: print)
    monkeypatch.setattr(decode, "torch_peer", lambda name, expression: expression)
    case = replace(step_case("step rope int8 channel NHD"), device=torch.device("cuda"))
    assert [name for name in decode.PEERS if case.peer(name) is not None] == ["torch eager", "torch.compile"]
    fp8 = replace(step_case("step rope NHD"), device=torch.device("cuda"))
    assert all(fp8.peer(name) is not None for name in decode.PEERS)


# Attention


def attention_case(work: str, **shape: int) -> attention.AttentionCase:
    """The case with 2 sequences of 64 tokens, 4 query and 2 KV heads of 64."""
    sizes = {"batch": 2, "context": 64, "heads": 4, "kv_heads": 2, "head_size": 64} | shape
    return attention.AttentionCase(work, tuple(sizes.values()), CPU, attention.WORKS[work])


def reference_result(case: attention.AttentionCase, b: attention.Buffers) -> torch.Tensor:
    """fp64 [tokens, num_heads, head_size]"""
    return reference.paged_attention(
        b.query, b.key_cache, b.value_cache, b.table, b.lengths, k_scale=b.k_scale, v_scale=b.v_scale,
        kv_cache_dtype="int8" if "int8" in case.work else "fp8", k_offset=b.k_offset, v_offset=b.v_offset,
        cu_query_lens=b.cu_query_lens, sliding_window=case.how.window, softcap=case.how.softcap,
        sinks=b.sinks, out=torch.empty(b.query.shape, dtype=torch.float64),
    )  # fmt: skip


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 positions."""
    monkeypatch.setitem(attention.WORKS, attention.WINDOW, attention.Work(window=20))


@pytest.mark.parametrize("work", attention.WORKS)
def test_errors_of_attention_are_against_what_the_reference_says(short_window: None, work: str) -> None:
    case = attention_case(work)
    _, b = case.buffers(2)
    expected = reference_result(case, b)
    assert case.error(b, expected) < 1e-12
    ours = case.ours(b)()
    assert case.error(b, ours) == pytest.approx(case.error(b, b.out))
    assert 0 < case.error(b, ours) <= 2.5e-3
    for sequence in (0, 1):
        wrong = expected.clone()
        wrong[sequence * case.how.queries] += 0.1
        assert case.error(b, wrong) > 0.01


@pytest.mark.parametrize(
    ("work", "size"),
    [
        ("decode head NHD", 2 * 2 * 64 * 2 * 64),
        ("decode head side by side", 2 * 2 * 64 * 2 * 64),
        ("decode token-head NHD", 2 * 2 * 64 * 2 * (64 + 4)),
        ("decode int8 channel NHD", 2 * 2 * 64 * 2 * 64),
        ("decode int8 channel offset NHD", 2 * 2 * 64 * 2 * 64),
        ("8 queries head NHD", 2 * 2 * 64 * 2 * 64),
        (attention.WINDOW, 2 * 2 * 20 * 2 * 64),
    ],
)
def test_the_bytes_attention_reads(short_window: None, work: str, size: int) -> None:
    assert attention_case(work).size == size


@pytest.mark.parametrize("work", ["decode int8 channel NHD", "decode int8 channel offset NHD"])
def test_what_attention_reads_of_an_int8_cache(work: str) -> None:
    (b,) = attention_case(work).buffers(1)
    for cache, scale, offset in ((b.key_cache, b.k_scale, b.k_offset), (b.value_cache, b.v_scale, b.v_offset)):
        assert cache.dtype == torch.int8
        assert cache.min() >= -127
        assert cache.float().std() == pytest.approx(attention.SPREAD, rel=0.1)
        assert scale.shape == (2, 64)
        assert len(scale.unique()) > 100
        assert (offset is not None) == ("offset" in work)
        assert offset is None or (offset.shape == (2, 64) and len(offset.unique()) > 100)


def test_the_bytes_of_ragged_sequences() -> None:
    case = attention_case("ragged head NHD", batch=8)
    (b,) = case.buffers(1)
    lengths = b.lengths.tolist()
    assert max(lengths) == 64
    assert min(lengths) >= 1
    assert len(set(lengths)) > 2
    assert case.size == 2 * sum(lengths) * 2 * 64


@pytest.mark.parametrize(
    ("work", "strides", "apart"),
    [
        ("decode head NHD", (2048, 128, 64, 1), 16 * 2048),
        ("decode head HND", (2048, 64, 1024, 1), 16 * 2048),
        ("decode head side by side", (4096, 256, 128, 1), 64),
    ],
)
def test_the_layouts_of_attention(work: str, strides: tuple[int, ...], apart: int) -> None:
    first, second = attention_case(work).buffers(2)
    assert first.key_cache.shape == first.value_cache.shape == (16, 16, 2, 64)
    assert first.key_cache.stride() == first.value_cache.stride() == strides
    assert first.value_cache.data_ptr() - first.key_cache.data_ptr() == apart
    assert first.key_cache is second.key_cache
    blocks = torch.cat([first.table, second.table]).flatten()
    assert sorted(blocks.tolist()) == list(range(16))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_case_of_attention_is_measured_twice(kind: str) -> None:
    cases = list(attention.cases(torch.device(kind), quick=False, warm=False))
    assert len({(case.work, case.shape) for case in cases}) == len(cases)
    assert {case.work for case in cases} == set(attention.WORKS)
    assert {case.shape[2:] for case in cases} == set(attention.GEOMETRIES)
    assert all(case.context % attention.BLOCK_SIZE == 0 for case in cases)


def works_of(peer: attention_peers.Adapter) -> set[str]:
    return {work for work in attention.WORKS if peer(attention_case(work)) is not None}


def check_attention_peer(adapter: attention_peers.Adapter, work: str, limit: float) -> None:
    """Its calls do the work, each on its own buffers."""
    case = attention_case(work)
    peer = adapter(case)
    assert peer is not None
    buffers = case.buffers(2)
    results = [call() for call in [peer(b) for b in buffers]]
    for b, result in zip(buffers, results, strict=True):
        assert result.shape == b.query.shape
        expected = reference_result(case, b)
        assert (result.double() - expected).norm() <= limit * expected.norm()


SDPA_WORKS = {
    "decode head NHD", "decode tensor NHD", "decode token-head NHD", attention.WINDOW, "decode head HND",
    "decode head side by side", "2 queries head NHD", "4 queries head NHD", "8 queries head NHD",
}  # fmt: skip


@pytest.mark.parametrize("work", sorted(SDPA_WORKS))
@pytest.mark.parametrize("name", attention_peers.CPU_PEERS)
def test_the_attention_of_pytorch_that_is_a_peer_is_the_same(short_window: None, name: str, work: str) -> None:
    adapter = attention_peers.CPU_PEERS[name]
    queries = attention.WORKS[work].queries
    if name.endswith("grouped") and queries > 1:
        assert adapter(attention_case(work)) is None
    else:
        check_attention_peer(adapter, work, 1e-5 if "fp32" in name else 1e-2)


def test_what_pytorch_does_not_do_is_no_peer() -> None:
    for name in ("SDPA bf16", "gather + SDPA"):
        assert works_of(attention_peers.CPU_PEERS[name]) == SDPA_WORKS


@pytest.mark.parametrize("name", ["SDPA flash", "SDPA math"])  # the backends that the CPU has
def test_a_backend_of_pytorch_is_chosen(name: str) -> None:
    check_attention_peer(attention_peers.CUDA_PEERS[name], attention.PLAIN, 1e-2)


def test_peers_are_measured_in_one_layout_only() -> None:
    for work, how in attention.WORKS.items():
        has = attention_case(work).peer("SDPA bf16") is not None
        assert has == (work in SDPA_WORKS and how.layout == "NHD")


@pytest.fixture
def flash_attention_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function with the parameters and the semantics of vLLM's."""

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, max_seqlen_q: int, cu_seqlens_q: Any, max_seqlen_k: int, *, seqused_k: Any,
        causal: bool, window_size: list[int], softcap: float, block_table: Any, out: Any, fa_version: int,
        s_aux: Any, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        assert fa_version == 3
        assert causal
        assert window_size[1] == (-1 if window_size[0] < 0 else 0)
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k >= seqused_k.max()
        if q_descale is not None:
            assert q_descale.shape == k_descale.shape == v_descale.shape == (len(seqused_k), k.shape[2])
        one = torch.ones(1)
        return reference.paged_attention(
            q, k, v, block_table, seqused_k,
            kv_cache_dtype="auto" if q_descale is None else "fp8",
            k_scale=one if q_descale is None else k_descale[0].contiguous(),
            v_scale=one if q_descale is None else v_descale[0].contiguous(),
            q_scale=None if q_descale is None else q_descale[0].contiguous(),
            cu_query_lens=cu_seqlens_q, softcap=softcap, sinks=s_aux, out=out,
            sliding_window=window_size[0] + 1,
        )  # fmt: skip

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)


@pytest.mark.parametrize("work", attention.WORKS)
@pytest.mark.parametrize("name", ["FA3 bf16", "FA3 fp8"])
def test_what_flash_attention_3_is_asked_for(short_window: None, flash_attention_3: None, name: str, work: str) -> None:
    adapter = attention_peers.CUDA_PEERS[name]
    if "int8" in work or (name == "FA3 fp8" and "token-head" in work):
        assert adapter(attention_case(work)) is None
    else:
        check_attention_peer(adapter, work, 1e-2 if name == "FA3 bf16" else 5e-2)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with the interface and the semantics of FlashInfer's."""

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(
            self, workspace: torch.Tensor, layout: str, *, use_cuda_graph: bool, use_tensor_cores: bool,
            paged_kv_indptr_buffer: torch.Tensor, paged_kv_indices_buffer: torch.Tensor,
            paged_kv_last_page_len_buffer: torch.Tensor,
        ) -> None:  # fmt: skip
            assert layout == "NHD"
            assert not workspace.any()
            self.shapes = [x.shape for x in (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)]

        def plan(
            self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
            num_kv_heads: int, head_dim: int, page_size: int, *, window_left: int, logits_soft_cap: float,
            q_data_type: torch.dtype, kv_data_type: torch.dtype, q_len_per_req: int = 1,
            use_token_head_sf: bool = False,
        ) -> None:  # fmt: skip
            assert [x.shape for x in (indptr, indices, last_page_len)] == self.shapes
            assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
            counts = indptr.diff()
            self.table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
            for row, pages in zip(self.table, indices.split(counts.tolist()), strict=True):
                row[: len(pages)] = pages
            self.lengths = (counts - 1) * page_size + last_page_len
            self.queries = torch.arange(len(counts) + 1, dtype=torch.int32) * q_len_per_req
            self.window, self.softcap, self.dtype = window_left + 1, logits_soft_cap, kv_data_type
            self.cache_shape = (page_size, num_kv_heads, head_dim)
            self.token_head = use_token_head_sf
            assert q_data_type == torch.bfloat16

        def run(
            self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor,
            k_scale: float = 1.0, v_scale: float = 1.0, sinks: torch.Tensor | None = None,
            kv_cache_sf: tuple[torch.Tensor, torch.Tensor] | None = None,
        ) -> torch.Tensor:  # fmt: skip
            assert {(x.dtype, x.shape[1:]) for x in caches} == {(self.dtype, self.cache_shape)}
            assert (kv_cache_sf is not None) == self.token_head
            scales = kv_cache_sf or (torch.tensor([k_scale]), torch.tensor([v_scale]))
            return reference.paged_attention(
                q, *caches, self.table, self.lengths, k_scale=scales[0], v_scale=scales[1],
                kv_cache_dtype="fp8" if self.dtype == torch.float8_e4m3fn else "auto", sinks=sinks,
                cu_query_lens=self.queries, sliding_window=self.window, softcap=self.softcap, out=out,
            )  # fmt: skip

    module = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    monkeypatch.setattr(attention_peers, "FLASHINFER_WORKSPACE", 16)


@pytest.mark.parametrize("work", attention.WORKS)
@pytest.mark.parametrize("name", ["FlashInfer bf16", "FlashInfer fp8"])
def test_what_flashinfer_is_asked_for(short_window: None, flashinfer: None, name: str, work: str) -> None:
    adapter = attention_peers.CUDA_PEERS[name]
    if "int8" in work:
        assert adapter(attention_case(work)) is None
    else:
        check_attention_peer(adapter, work, 1e-2)


def test_a_peer_of_attention_that_is_not_installed_is_left_out_with_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(attention_peers.CPU_PEERS, "SDPA bf16", partial(attention_peers.flash_attention_3, fp8=True))
    report = bench.run("cpu", "attention", quick=True, only="decode tensor", host=False)
    ((note, cases),) = report.notes.items()
    assert note.startswith("SDPA bf16 left out: ModuleNotFoundError: ")
    assert set(cases) == {"decode tensor NHD 2x256x32x8x128 Llama-3.1-8B Qwen3-8B"}
    for row in report.rows:
        assert "gather + SDPA" in row.peers
        assert "SDPA bf16" not in row.peers
        assert row.errors.keys() == {"fp8kv", *row.peers}
        assert 0 < row.errors["fp8kv"] <= 2.5e-3


def test_the_tables_of_attention() -> None:
    """Of a card whose specified bandwidth is known, with a peer."""
    row = bench.Row(
        "decode head NHD", [1, 1024, 32, 8, 128], 10.0, 1200.0, 5.0, 0.5, {"SDPA flash": 20.0}, ["Llama"],
        errors={"fp8kv": 1.7e-3, "SDPA flash": 2.7e-3},
    )  # fmt: skip
    report = replace(bench.Report.begin("attention", "a card", "a kernel"), against="read", rows=[row])
    assert "of specified" not in text_of(bench.table(report))
    text = text_of(bench.table(replace(report, specified_gbps=4800.0)))
    for words in ("of specified", "25%", "read us", "share of read", "50%", "1.7e-03"):
        assert words in text
    assert "SDPA flash" not in text
    peers = text_of(bench.peer_table(report))
    for words in ("SDPA flash 20.00 (2.7e-03)", "fp8kv us", "10.00", "2.00 x"):
        assert words in peers
    assert bench.peer_table(replace(report, rows=[replace(row, errors={})])) is None


def text_of(table: object) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize(
    ("name", "gbps"),
    [
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H100 NVL", 3900),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA L40S", 864),
        ("NVIDIA L4", 300),
        ("NVIDIA A10", 600),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_specified_bandwidth_of_a_card(name: str, gbps: float | None) -> None:
    assert specified_gbps(name) == gbps


def test_a_read_on_cuda_is_about_as_fast_as_its_memory(cuda: torch.device) -> None:
    name = torch.cuda.get_device_name(cuda)
    specified = specified_gbps(name)
    if specified is None:
        pytest.skip(f"needs a GPU with a known bandwidth, not {name}")
    floor = measure._CudaFloor(cuda, 5, "read")
    assert "kernels that read" in floor.description
    size = 256 << 20
    assert 0.5 < size / floor.time(size, 3) / 1e3 / specified < 1.05
