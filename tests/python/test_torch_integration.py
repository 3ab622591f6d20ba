"""The ops as PyTorch sees them: opcheck, torch.compile, CUDA graphs, streams, threads, autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fp8kv
from devices import require_gpus
from fp8kv import GroupShape, reference
from helpers import assert_same_bytes, key_and_value, random_scales, raw, values

E4M3 = torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("fresh_compiler")
ops = torch.ops.fp8kv


def arguments(device: torch.device) -> dict[str, tuple[object, ...]]:
    """Arguments of each op, in the order of its schema."""
    x = values((8, 48), torch.bfloat16).to(device)
    q = torch.zeros(8, 48, dtype=E4M3, device=device)
    scale = random_scales((8, 1)).to(device)
    bound = torch.tensor(2.0, device=device)
    key, value = x.view(8, 2, 24), x.view(8, 2, 24).flip(0)
    caches = [torch.zeros(3, 4, 2, 24, dtype=E4M3, device=device) for _ in "kv"]
    scale_caches = [torch.zeros(3, 4, 2, device=device) for _ in "kv"]
    slots = torch.tensor([3, 7, -1, 11, 0, 5, 4, 8], device=device)
    table = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32, device=device)
    sums = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    k_scale, v_scale = scale[:2, 0], scale[2]
    return {
        "static_scaled_fp8_quant": (q, x, scale, [1, -1]),
        "dynamic_scaled_fp8_quant": (q, x, torch.zeros_like(scale), bound, [1, -1]),
        "scaled_fp8_dequant": (torch.zeros_like(x), x.to(E4M3), scale, [1, -1]),
        "group_amax": (torch.zeros_like(scale), x, [1, -1]),
        "reshape_and_cache_flash": (key, value, *caches, slots, "fp8", k_scale, v_scale),
        "reshape_and_cache_flash_dynamic": (key, value, *caches, *scale_caches, slots, "fp8"),
        "rope_quant_and_cache": (
            x.view(8, 4, 12)[..., :8], x.view(8, 2, 24)[..., :8], x.view(8, 2, 24)[..., 8:16],
            torch.zeros(8, 4, 8, dtype=E4M3, device=device), *(cache[..., :8] for cache in caches), slots,
            "fp8", scale[:4], k_scale, v_scale, slots.abs(), torch.ones(12, 8, device=device), False,
            x[0, :8], x[1, :8], 1e-5,
        ),
        "gather_and_dequant_cache": (
            key.to(E4M3).view(2, 4, 2, 24), value.to(E4M3).view(2, 4, 2, 24), torch.zeros_like(key),
            torch.zeros_like(value), table, sums, "fp8", k_scale, v_scale, sums[:2],
        ),
        "paged_attention": (
            x.view(8, 2, 24).to(E4M3), *caches, torch.zeros(8, 2, 24, device=device), table, sums[1:], "fp8",
            k_scale, scale_caches[1], 0.2, sums, 5, 8, v_scale, sums[:2], 3, 2.0,
            torch.ones(2, device=device),
            torch.ones(2, 24, device=device), torch.ones(2, 24, device=device),
            torch.zeros(8, 2, device=device), torch.zeros(1024, dtype=torch.uint8, device=device), 1,
        ),
    }  # fmt: skip


OPS = [
    "static_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "scaled_fp8_dequant",
    "group_amax",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_dynamic",
    "rope_quant_and_cache",
    "gather_and_dequant_cache",
    "paged_attention",
]
each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture
def _allclose_knows_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck looks for mutations with torch.allclose, which PyTorch does not have for FP8."""
    of_torch = torch.allclose

    def allclose(a: Tensor, b: Tensor, **kwargs: bool) -> bool:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dtype == E4M3 else of_torch(a, b, **kwargs)

    monkeypatch.setattr(torch, "allclose", allclose)


@pytest.mark.usefixtures("_allclose_knows_fp8")
@each_op
def test_opcheck(device: torch.device, op: str) -> None:
    torch.library.opcheck(getattr(ops, op).default, arguments(device)[op])


@pytest.mark.usefixtures("_allclose_knows_fp8")
@pytest.mark.parametrize("op", [op for op in OPS if "cache" in op])
def test_opcheck_with_scales_per_channel_and_offsets(device: torch.device, op: str) -> None:
    positional = arguments(device)[op]
    head_size = 8 if op == "rope_quant_and_cache" else 24
    channels = torch.ones(2, head_size, device=device)
    at = positional.index("fp8") + (2 if op == "rope_quant_and_cache" else 1)
    if op != "reshape_and_cache_flash_dynamic":
        positional = (*positional[:at], channels, channels, *positional[at + 2 :])
    torch.library.opcheck(getattr(ops, op).default, positional, {"k_offset": channels, "v_offset": channels})


@pytest.mark.usefixtures("_allclose_knows_fp8")
def test_opcheck_with_three_positions(device: torch.device) -> None:
    positional = list(arguments(device)["rope_quant_and_cache"])
    positional[11] = positional[11].expand(3, -1)
    options = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "norm_after_rope": True}
    torch.library.opcheck(ops.rope_quant_and_cache.default, tuple(positional), options)


@pytest.mark.usefixtures("_allclose_knows_fp8")
@pytest.mark.parametrize("op", ["reshape_and_cache_flash", "reshape_and_cache_flash_dynamic", "gather_and_dequant_cache"])
def test_opcheck_with_values_of_another_head_size_and_dtype(device: torch.device, op: str) -> None:
    positional = list(arguments(device)[op])
    value_cache = 1 if op == "gather_and_dequant_cache" else 3
    positional[value_cache] = positional[value_cache][..., :16].to(torch.int8)
    value = 3 if op == "gather_and_dequant_cache" else 1
    positional[value] = positional[value][..., :16]
    torch.library.opcheck(getattr(ops, op).default, tuple(positional), {"v_cache_dtype": "int8"})


@pytest.mark.usefixtures("_allclose_knows_fp8")
def test_opcheck_of_attention_with_defaults(device: torch.device) -> None:
    all_arguments = arguments(device)["paged_attention"]
    query = torch.ones(2, 4, 24, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(ops.paged_attention.default, (query, *all_arguments[1:3], query.clone(), *all_arguments[4:10]))


@pytest.mark.usefixtures("_allclose_knows_fp8")
def test_opcheck_of_attention_with_k_and_v_of_two_kinds(device: torch.device) -> None:
    _, key_cache, _, _, *others = arguments(device)["paged_attention"][:10]
    query = torch.ones(2, 4, 24, dtype=torch.bfloat16, device=device)
    value_cache = torch.ones(*key_cache.shape[:3], 16, dtype=torch.float16, device=device)
    out = torch.zeros(2, 4, 16, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(
        ops.paged_attention.default, (query, key_cache, value_cache, out, *others), {"v_cache_dtype": "float16"}
    )


@pytest.mark.usefixtures("_allclose_knows_fp8")
@pytest.mark.parametrize("op", ["static_scaled_fp8_quant", "scaled_fp8_dequant"])
def test_opcheck_with_defaults(device: torch.device, op: str) -> None:
    scale = torch.ones((), device=device)
    torch.library.opcheck(getattr(ops, op).default, (*arguments(device)[op][:2], scale))


MAP = "(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()"
SCHEMAS = {
    "static_scaled_fp8_quant": MAP,
    "dynamic_scaled_fp8_quant": "(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub=None, "
    "int[]? group_shape=None) -> ()",
    "scaled_fp8_dequant": MAP,
    "group_amax": "(Tensor(a!) amax, Tensor input, int[] group_shape) -> ()",
    "reshape_and_cache_flash": "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale, "
    "Tensor? k_offset=None, Tensor? v_offset=None, str? v_cache_dtype=None) -> ()",
    "reshape_and_cache_flash_dynamic": "(Tensor key, Tensor value, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor(c!) k_scale_cache, Tensor(d!) v_scale_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor? k_offset=None, Tensor? v_offset=None, str? v_cache_dtype=None) -> ()",
    "rope_quant_and_cache": "(Tensor query, Tensor key, Tensor value, Tensor(a!) query_out, "
    "Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor q_scale, "
    "Tensor k_scale, Tensor v_scale, Tensor? positions=None, Tensor? cos_sin_cache=None, bool is_neox=True, "
    "Tensor? q_norm_weight=None, Tensor? k_norm_weight=None, float norm_eps=9.9999999999999995e-07, "
    "Tensor? k_offset=None, Tensor? v_offset=None, int[]? mrope_section=None, bool mrope_interleaved=False, "
    "bool norm_after_rope=False) -> ()",
    "gather_and_dequant_cache": "(Tensor key_cache, Tensor value_cache, Tensor(a!) key, Tensor(b!) value, "
    "Tensor block_table, Tensor cu_seq_lens, str kv_cache_dtype, Tensor k_scale, Tensor v_scale, "
    "Tensor? seq_starts=None, Tensor? k_offset=None, Tensor? v_offset=None, str? v_cache_dtype=None) -> ()",
    "paged_attention": "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a!) out, "
    "Tensor block_table, Tensor seq_lens, str kv_cache_dtype, Tensor k_scale, Tensor v_scale, "
    "float softmax_scale, Tensor? cu_query_lens=None, int max_query_len=1, int max_seq_len=0, "
    "Tensor? q_scale=None, Tensor? seq_starts=None, int sliding_window=0, float softcap=0., "
    "Tensor? sinks=None, Tensor? k_offset=None, Tensor? v_offset=None, Tensor(b!)? lse=None, "
    "Tensor(c!)? workspace=None, int num_splits=0, str? v_cache_dtype=None) -> ()",
}


@each_op
def test_schema(op: str) -> None:
    assert str(getattr(ops, op).default._schema) == f"fp8kv::{op}{SCHEMAS[op]}"


def test_these_are_all_operators_that_write() -> None:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    public = [name for space, name in names if space == "fp8kv" and not name.startswith("_")]
    assert sorted(name for name in public if not getattr(ops, name).default._schema.returns) == sorted(OPS)


# torch.compile


def round_trip(x: Tensor) -> Tensor:
    q, scale = fp8kv.quantize(x * 2, group_shape=GroupShape.PER_TOKEN)
    return fp8kv.dequantize(q, scale, group_shape=GroupShape.PER_TOKEN, dtype=torch.float32) + 1


def calibrate_then_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    amax = torch.zeros(1, x.shape[1], device=x.device)
    fp8kv.group_amax(amax, x, GroupShape.PER_CHANNEL)
    scale = amax.clamp_min(1e-6) * 2.0**-8  # exact, however it is compiled
    return fp8kv.quantize(x, scale, group_shape=GroupShape.PER_CHANNEL)


def into_slices(x: Tensor) -> Tensor:
    """Results written into a slice of a larger tensor: a mutation that functionalization must keep."""
    out = torch.zeros(2 * x.shape[0], x.shape[1], dtype=E4M3, device=x.device)
    scale = torch.ones((), device=x.device)
    fp8kv.static_scaled_fp8_quant(out[x.shape[0] :], x, scale)
    return out.view(torch.uint8)


def through_a_cache(x: Tensor) -> tuple[Tensor, ...]:
    """K and V caches are views of one tensor that the function makes and returns."""
    key = (x + 1).view(x.shape[0], -1, 4)
    storage = torch.zeros(2, x.shape[0], 3, *key.shape[1:], dtype=E4M3, device=x.device)
    scales = torch.zeros(2, *storage.shape[1:4], device=x.device)
    slots = torch.arange(x.shape[0], device=x.device) * 2
    fp8kv.reshape_and_cache_flash_dynamic(key, -key, *storage.unbind(), *scales.unbind(), slots, "fp8")
    out = torch.zeros(2, x.shape[0], *key.shape[1:], dtype=x.dtype, device=x.device)
    table = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).view(1, -1)
    sums = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device)
    fp8kv.gather_and_dequant_cache(*storage.unbind(), *out.unbind(), table, sums, "fp8", *scales.unbind(), seq_starts=sums[:1])
    one = torch.ones(1, device=x.device)
    fp8kv.reshape_and_cache_flash(key, key, *storage.unbind(), slots + 1, "fp8", one, one)
    return storage.view(torch.uint8), scales, out * 2


FUNCTIONS: list[Callable[[Tensor], object]] = [
    round_trip,
    calibrate_then_quantize,
    into_slices,
    through_a_cache,
]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compile(device: torch.device, function: Callable[[Tensor], object], backend: str) -> None:
    x = values((8, 48), torch.bfloat16, specials=False).to(device)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, actual = function(x), compiled(x)
    for a, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected)), strict=True):
        assert_same_bytes(a, e)


def test_compile_with_dynamic_shapes(device: torch.device) -> None:
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, cols in ((8, 48), (3, 100), (17, 5)):
        x = values((rows, cols), torch.bfloat16, specials=False).to(device)
        assert_same_bytes(compiled(x), round_trip(x))


def test_compile_of_the_module(device: torch.device) -> None:
    layer = fp8kv.QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
    x = values((8, 48), torch.bfloat16, specials=False).to(device)
    q, scale = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    expected, expected_scale = layer(x)
    assert_same_bytes(q, expected)
    assert_same_bytes(scale, expected_scale)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", [{}, {"scales": "dynamic"}, {"dtype": "bfloat16"}], ids=str)
def test_compile_of_append_to_a_cache(device: torch.device, kind: dict[str, str], layout: str, backend: str) -> None:
    """The cache belongs to the caller: what the graph writes into its views must be in its storage."""
    cache, expected = (fp8kv.PagedKVCache(3, 4, 2, 24, layout=layout, device=device, **kind) for _ in range(2))

    def step(x: Tensor, slots: Tensor) -> Tensor:
        key = x.view(-1, 2, 24)
        cache.append(key * 2, -key, slots)
        return key + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed, slots in enumerate(([3, 7, -1, 11], [0, 3, 8, 2])):
        x = values((4, 48), torch.bfloat16, seed=seed, specials=False).to(device)
        where = torch.tensor(slots, device=device)
        assert_same_bytes(compiled(x, where), x.view(-1, 2, 24) + 1)
        expected.append(x.view(-1, 2, 24) * 2, -x.view(-1, 2, 24), where)
        assert_same_bytes(cache.storage, expected.storage)
        assert_same_bytes(cache.k_scale, expected.k_scale)
        assert_same_bytes(cache.v_scale, expected.v_scale)
    assert raw(cache.storage).any()


def test_fake_tensors_have_the_right_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, scale = fp8kv.quantize(torch.empty(5, 7, 64, device="cuda:0"), group_shape=(1, 16))
        back = fp8kv.dequantize(q, scale, group_shape=(1, 16))
    assert (q.shape, q.dtype, q.device.type) == ((5, 7, 64), E4M3, "cuda")
    assert (scale.shape, back.shape, back.dtype) == ((5, 7, 4), (5, 7, 64), torch.bfloat16)


def test_export(device: torch.device) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return round_trip(x)

    x = values((8, 48), torch.bfloat16, specials=False).to(device)
    program = torch.export.export(Model(), (x,))
    assert_same_bytes(program.module()(x), round_trip(x))


# Autograd


def test_results_are_outside_autograd(device: torch.device) -> None:
    x = torch.ones(4, 6, device=device, requires_grad=True)
    q, scale = fp8kv.quantize(x)
    back = fp8kv.dequantize(q, scale)
    assert not q.requires_grad
    assert not scale.requires_grad
    assert not back.requires_grad


def test_backward_through_quantization_says_that_there_is_none(device: torch.device) -> None:
    x = torch.ones(4, 6, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        fp8kv.dequantize(*fp8kv.quantize(x)).sum().backward()


def test_inference_mode(device: torch.device) -> None:
    x = values((4, 6), torch.float32).to(device)
    with torch.inference_mode():
        q, scale = fp8kv.quantize(x)
        back = fp8kv.dequantize(q, scale)
    assert_same_bytes(back, fp8kv.dequantize(*fp8kv.quantize(x)))


# Views that PyTorch resolves before the kernel


def test_a_view_with_the_negative_bit(device: torch.device) -> None:
    pairs = values((4, 6, 2), torch.float32, specials=False).to(device)
    x = torch.view_as_complex(pairs).conj().imag
    assert x.is_neg()
    assert_same_bytes(fp8kv.quantize(x)[0], fp8kv.quantize(x.resolve_neg())[0])


# The CPU's state


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_does_not_show(threads: int) -> None:
    x = values((301, 1021), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for group in ((-1, -1), (1, -1), (-1, 1), (7, 33)):
            q, scale = fp8kv.quantize(x, group_shape=group)
            expected, expected_scale = reference.quantize(x, group_shape=group)
            assert_same_bytes(scale, expected_scale)
            assert_same_bytes(q, expected)
            back = fp8kv.dequantize(q, scale, group_shape=group)
            assert_same_bytes(back, reference.dequantize(q, scale, group_shape=group))
    finally:
        torch.set_num_threads(before)


def test_flushing_denormals_for_pytorch_does_not_change_bytes() -> None:
    """FP8 of a quotient is exact arithmetic here, whatever mode of the processor another library set."""
    x = torch.cat([torch.arange(1, 2000, dtype=torch.int32).view(torch.float32), torch.tensor([1e-39, -3e-40])])
    tiny = torch.tensor(1e-42)
    expected, _ = reference.quantize(x, tiny)
    expected_dynamic, expected_scale = reference.quantize(x)
    back = reference.dequantize(expected, tiny, dtype=torch.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormals")
    try:
        q, _ = fp8kv.quantize(x, tiny)
        dynamic, scale = fp8kv.quantize(x)
        values_ = fp8kv.dequantize(expected, tiny, dtype=torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bytes(q, expected)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(dynamic, expected_dynamic)
    assert_same_bytes(values_, back)


def test_calls_from_several_python_threads(device: torch.device) -> None:
    from concurrent.futures import ThreadPoolExecutor

    inputs = [values((64, 300), torch.bfloat16, seed=i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: fp8kv.quantize(x.to(device), group_shape=(1, -1)), inputs))
    for x, (q, scale) in zip(inputs, results, strict=True):
        expected, expected_scale = reference.quantize(x, group_shape=(1, -1))
        assert_same_bytes(q, expected)
        assert_same_bytes(scale, expected_scale)


# CUDA


SHAPES = [(4, 64), (16, 4096), (300, 5137)]


@pytest.mark.parametrize("group", [(-1, -1), (1, -1), (-1, 1), (-1, 128), (3, 100)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_capture_in_a_cuda_graph_and_replay_with_new_data(
    cuda: torch.device, shape: tuple[int, int], group: tuple[int, int]
) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16, device=cuda)
    q, scale = fp8kv.quantize(x, group_shape=group)
    q2, back = torch.empty_like(q), torch.empty_like(x)
    amax = torch.zeros_like(scale)

    def step() -> None:
        amax.zero_()
        fp8kv.dynamic_scaled_fp8_quant(q, x, scale, None, group)
        fp8kv.static_scaled_fp8_quant(q2, x, scale, group)
        fp8kv.scaled_fp8_dequant(back, q, scale, group)
        fp8kv.group_amax(amax, x, group)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        data = values(shape, torch.bfloat16, seed=seed)
        x.copy_(data)
        graph.replay()
        expected, expected_scale = reference.quantize(data, group_shape=group)
        expected_amax = torch.zeros_like(expected_scale)
        reference.group_amax(expected_amax, data, group)
        assert_same_bytes(scale, expected_scale)
        assert_same_bytes(q, expected)
        assert_same_bytes(q2, expected)
        assert_same_bytes(back, reference.dequantize(expected, expected_scale, group_shape=group))
        assert_same_bytes(amax, expected_amax)


@pytest.mark.parametrize("scales", [None, "dynamic"], ids=["static", "dynamic"])
@pytest.mark.parametrize("tokens", [1, 16, 700])
def test_capture_of_a_cache_in_a_cuda_graph_and_replay_with_new_slots(
    cuda: torch.device, tokens: int, scales: str | None
) -> None:
    cache, expected = (fp8kv.PagedKVCache(60, 16, 2, 64, layout="HND", device=at, scales=scales) for at in (cuda, "cpu"))
    key, value = (torch.zeros(tokens, 2, 64, dtype=torch.bfloat16, device=cuda) for _ in "kv")
    slots = torch.full((tokens,), -1, device=cuda)
    table = torch.zeros(2, 50, dtype=torch.int32, device=cuda)
    lengths = torch.zeros(2, dtype=torch.int32, device=cuda)
    out = (torch.zeros_like(key), torch.zeros_like(value))

    def step() -> None:
        cache.append(key, value, slots)
        cache.gather(table, lengths, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        inputs = [values((tokens, 2, 64), torch.bfloat16, seed=seed + i) for i in range(2)]
        blocks = torch.randperm(60, generator=generator)[:50].to(torch.int32)
        places = torch.arange(tokens) + 16 * (seed % 2)
        where = blocks[places // 16].long() * 16 + places % 16
        wanted = torch.tensor([tokens - tokens // 3, tokens // 3])
        tables = torch.stack([blocks, blocks.flip(0)])
        for x, y in zip((key, value, slots, table, lengths), (*inputs, where, tables, wanted), strict=True):
            x.copy_(y)
        graph.replay()
        expected.append(*inputs, where)
        assert_same_bytes(cache.storage, expected.storage)
        assert_same_bytes(cache.k_scale, expected.k_scale)
        for actual, x in zip(out, expected.gather(tables, wanted), strict=True):
            assert_same_bytes(actual, x)


@pytest.mark.parametrize("group", [(-1, -1), (1, -1), (-1, 1)], ids=str)
def test_work_runs_on_the_current_stream(cuda: torch.device, group: tuple[int, int]) -> None:
    """The input is written late on a side stream: a launch elsewhere would read what was there before."""
    data = values((512, 4096), torch.bfloat16)
    source = data.to(cuda)
    x = torch.zeros_like(source)
    expected, expected_scale = reference.quantize(data, group_shape=group)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        q, scale = fp8kv.quantize(x, group_shape=group)
        back = fp8kv.dequantize(q, scale, group_shape=group)
    stream.synchronize()
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(q, expected)
    assert_same_bytes(back, reference.dequantize(expected, expected_scale, group_shape=group))


def test_cache_work_runs_on_the_current_stream(cuda: torch.device) -> None:
    """Key and slots are written late on a side stream: a launch elsewhere would read what was before."""
    cache, expected = (fp8kv.PagedKVCache(70, 16, 8, 128, device=at, scales="dynamic") for at in (cuda, "cpu"))
    data = key_and_value(1024, 8, 128, torch.bfloat16)
    places = torch.arange(1024).flip(0)
    sources = [x.to(cuda) for x in (*data, places)]
    key, value, slots = (torch.zeros_like(x) for x in sources)
    slots.fill_(-1)
    table = torch.arange(70, dtype=torch.int32, device=cuda)[None]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, source in zip((key, value, slots), sources, strict=True):
            x.copy_(source)
        cache.append(key, value, slots)
        rows = cache.gather(table, [1024])
    stream.synchronize()
    expected.append(*data, places)
    assert_same_bytes(cache.storage, expected.storage)
    for actual, x in zip(rows, expected.gather(table.cpu(), [1024]), strict=True):
        assert_same_bytes(actual, x)


@each_op
def test_no_op_waits_for_the_gpu(cuda: torch.device, op: str) -> None:
    call = arguments(cuda)[op]
    getattr(ops, op)(*call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        done = torch.cuda.Event()
        getattr(ops, op)(*call)
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@each_op
def test_no_op_allocates(cuda: torch.device, op: str) -> None:
    call = arguments(cuda)[op]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    free = torch.cuda.mem_get_info()[0]
    for _ in range(10):
        getattr(ops, op)(*call)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20)  # kernels are loaded at their first launch


@each_op
def test_tensors_of_a_device_that_is_not_current(cuda: torch.device, op: str) -> None:
    require_gpus(2)
    there, here = (arguments(torch.device(d))[op] for d in ("cuda:1", "cpu"))
    with torch.cuda.device(0):
        getattr(ops, op)(*there)
        assert torch.cuda.current_device() == 0
    getattr(ops, op)(*here)
    for a, e in zip(there, here, strict=True):
        if isinstance(a, Tensor) and isinstance(e, Tensor):
            assert_same_bytes(a, e)


def test_tensors_of_two_gpus_are_refused(cuda: torch.device) -> None:
    require_gpus(2)
    x, q = torch.ones(4, 6, device="cuda:1"), torch.empty(4, 6, dtype=E4M3, device="cuda:1")
    with pytest.raises(RuntimeError) as error:
        fp8kv.static_scaled_fp8_quant(q, x, torch.ones((), device="cuda:0"))
    sentence = "fp8kv::static_scaled_fp8_quant: scale must be on the device of input, cuda:1, got cuda:0"
    assert str(error.value) == sentence
