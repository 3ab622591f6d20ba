"""The backend for vLLM: what it stores is the reference's, byte for byte, and its attention is near it."""

from __future__ import annotations

import dataclasses
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_layer import HEAD_SIZE, HEADS, KV_HEADS, Layer, dense_attention

from attention_problems import int32

pytestmark = pytest.mark.usefixtures("vllm", "one_thread")

MIXED = {"contexts": (40, 7, 100, 0, 33), "queries": (1, 1, 1, 21, 50)}
PER_HEAD = (torch.tensor([0.03, 0.04]), torch.tensor([0.02, 0.03]))
CACHES: dict[str, tuple[str, tuple[Tensor, Tensor] | None]] = {
    "no dimension": ("fp8", None),
    "per tensor": ("fp8_e4m3", (torch.tensor([0.03]), torch.tensor([0.02]))),
    "per head": ("fp8", PER_HEAD),
    "parameters": ("fp8", tuple(torch.nn.Parameter(x.clone()) for x in PER_HEAD)),  # type: ignore[dict-item]
    "e5m2": ("fp8_e5m2", PER_HEAD),
    "per token": ("fp8_per_token_head", None),
    "16 bits": ("auto", None),
    "bfloat16": ("bfloat16", None),
}


@pytest.mark.parametrize("layout", ["NHD", "HND", "BLHNC"])
@pytest.mark.parametrize("cache", CACHES)
def test_mixed_batches(cache: str, layout: str) -> None:
    """Short queries first, as vLLM orders them; the cache is written and read as it lies."""
    name, scales = CACHES[cache]
    layer = Layer(name, scales, layout)
    batch = layer.batch(**MIXED)
    layer.fill(batch, MIXED["contexts"])
    layer.assert_same_cache()
    layer.attend(batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_of_a_model(dtype: torch.dtype) -> None:
    layer = Layer(scales=PER_HEAD, dtype=dtype)
    batch = layer.batch(**MIXED)
    layer.fill(batch, MIXED["contexts"])
    layer.attend(batch)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 20},
        {"logits_soft_cap": 3.0},
        {"sinks": torch.linspace(-1, 2, HEADS)},
        {"sliding_window": 20, "logits_soft_cap": 3.0, "sinks": torch.linspace(-1, 2, HEADS).bfloat16()},
    ],
    ids=["window", "softcap", "sinks", "all"],
)
def test_options_of_attention(options: dict[str, Any]) -> None:
    layer = Layer(scales=PER_HEAD, **options)
    batch = layer.batch(**MIXED)
    layer.fill(batch, MIXED["contexts"])
    layer.attend(batch)


# Batches


def test_decodes_are_one_call_without_sums() -> None:
    layer = Layer()
    batch = layer.batch((40, 7, 100), (1, 1, 1))
    layer.fill(batch, (40, 7, 100))
    (part,) = layer.builder.build(0, batch).parts
    assert part.cu_query_lens is None
    layer.attend(batch)


def test_a_padded_batch_of_decodes() -> None:
    """As in a CUDA graph: empty sequences get zeros, and rows of their own."""
    layer = Layer()
    batch = layer.batch((40, 7), (1, 1), padded=2)
    batch.num_actual_tokens = 4
    layer.fill(batch, (40, 7))
    (part,) = layer.builder.build(0, batch).parts
    assert part.cu_query_lens is None
    batch.query_start_loc = int32(0, 1, 2, 3, 4)  # so that the reference attends to the empty ones
    assert layer.attend(batch)[2:].eq(0).all()


def test_empty_sequences_without_rows() -> None:
    """As in a step that is padded in its sequences alone."""
    layer = Layer()
    batch = layer.batch((40, 7), (1, 1), padded=2)
    layer.fill(batch, (40, 7))
    (part,) = layer.builder.build(0, batch).parts
    assert (part.sequences, part.rows) == (slice(0, 4), slice(0, 2))
    layer.attend(batch)


def test_a_cache_that_is_allocated_anew() -> None:
    """vLLM does so after it has measured memory."""
    layer = Layer()
    batch = layer.batch((0,), (5,))
    layer.store(batch.slot_mapping)
    layer.kv_cache, layer.caches = torch.zeros_like(layer.kv_cache), torch.zeros_like(layer.caches)
    layer.store(batch.slot_mapping)
    layer.assert_same_cache()
    assert layer.caches.any()


def test_drafts_are_short_queries() -> None:
    """1 + 3 tokens of each sequence, the last of them padding."""
    layer = Layer(drafts=3)
    batch = layer.batch((40, 7, 100), (4, 4, 4), padded=1)
    layer.fill(batch, (40, 7, 100))
    (part,) = layer.builder.build(0, batch).parts
    assert (part.max_query_len, part.copy) == (4, None)
    layer.attend(batch)


def test_drafts_beside_prefills() -> None:
    layer = Layer(drafts=3)
    batch = layer.batch((40, 7, 10, 0), (4, 1, 30, 5))
    layer.fill(batch, (40, 7, 10, 0))
    short, long = layer.builder.build(0, batch).parts
    assert (short.rows, short.max_query_len) == (slice(0, 5), 4)
    assert (long.rows, long.max_query_len) == (slice(5, 40), 30)
    layer.attend(batch)


def test_another_block_table() -> None:
    """Layers of another kind of cache share all else of the metadata."""
    layer = Layer()
    batch = layer.batch((40, 7), (1, 9))
    other = dataclasses.replace(batch, block_table_tensor=batch.block_table_tensor.flip(0))
    layer.fill(batch, (40, 7))
    metadata = layer.builder.build(0, other)
    assert layer.builder.supports_update_block_table
    updated = layer.builder.update_block_table(metadata, batch.block_table_tensor, batch.slot_mapping)
    layer.attend(batch, updated)


def test_while_memory_is_measured_the_result_is_zero() -> None:
    layer = Layer()
    out = torch.ones(3, HEADS, HEAD_SIZE)
    assert layer.impl.forward(layer.layer, out, out, out, layer.kv_cache, None, out) is out
    assert out.eq(0).all()


# Long queries


def test_long_queries_are_copied_and_left_to_flash_attention() -> None:
    """Sequences beyond the longest copy, and those with few queries, read the cache as it is."""
    layer = Layer("fp8", PER_HEAD)
    calls: list[dict[str, Any]] = []
    layer.impl._flash = layer.backend.FlashAttention(dense_attention(calls), 3)
    layer.builder._copy_tokens = 512
    contexts, queries = (40, 100, 0, 20, 9, 400), (1, 130, 150, 60, 200, 128)
    batch = layer.batch(contexts, queries)
    layer.fill(batch, contexts)
    layer.attend(batch, copied=[slice(1, 281), slice(341, 541)])
    assert calls == [
        {"rows": 280, "tokens": 380, "bounds": (150, 230)},
        {"rows": 200, "tokens": 209, "bounds": (200, 209)},
    ]


def test_copies_of_a_cache_with_scales_of_single_tokens() -> None:
    layer = Layer("fp8_per_token_head")
    calls: list[dict[str, Any]] = []
    layer.impl._flash = layer.backend.FlashAttention(dense_attention(calls), 3)
    layer.builder._copy_tokens = 512
    batch = layer.batch((40, 100), (1, 130))
    layer.fill(batch, (40, 100))
    layer.attend(batch, copied=[slice(1, 131)])
    assert len(calls) == 1


def test_lengths_that_the_host_does_not_know_are_not_copied() -> None:
    layer = Layer()
    batch = layer.batch((0,), (200,))
    batch.seq_lens_cpu_upper_bound = None
    (part,) = layer.builder.build(0, batch).parts
    assert part.copy is None


def test_layers_with_a_window_read_the_cache() -> None:
    assert Layer(sliding_window=20).impl._flash is None


def test_the_longest_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    settings, copy_tokens = layer.backend.settings, layer.backend.copy_tokens
    assert settings().prefill == "gather"
    assert copy_tokens(layer.config) == 512  # max_model_len
    layer.config.scheduler_config.max_num_batched_tokens = 4096
    assert copy_tokens(layer.config) == 4096
    layer.config.model_config.max_model_len = 1 << 20
    assert copy_tokens(layer.config) == 1 << 17
    assert copy_tokens(None) == 0
    monkeypatch.setenv("FP8KV_VLLM_PREFILL", "paged")
    settings.cache_clear()
    assert copy_tokens(layer.config) == 0
    settings.cache_clear()


# What is refused


def test_what_the_backend_says_it_can_serve() -> None:
    backend = Layer().backend.Fp8KVBackend
    assert not backend.forward_includes_kv_cache_update
    assert backend.supports_per_head_quant_scales()
    assert backend.supports_sink()
    assert backend.supports_sliding_window()
    assert backend.supports_attn_type("decoder")
    assert not backend.supports_attn_type("encoder_only")
    capabilities = [SimpleNamespace(major=major, minor=0) for major in (7, 8, 9, 10, 12)]
    assert [backend.supports_compute_capability(c) for c in capabilities] == [False, True, True, True, True]
    assert set(backend.supported_kv_cache_dtypes) == {
        "auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head",
    }  # fmt: skip


def test_combinations_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Layer().backend

    def reason(head_size: int, dtype: str) -> str | None:
        others = (16, False, False, False, False, SimpleNamespace(major=9, minor=0))
        result = module.Fp8KVBackend.supports_combination(head_size, torch.bfloat16, dtype, *others)
        assert result is None or isinstance(result, str)
        return result

    monkeypatch.setattr(module._ops, "cuda_missing", None)
    assert reason(128, "fp8_per_token_head") is None
    assert reason(66, "fp8") is None
    assert reason(66, "fp8_per_token_head") == ("head_size must be a multiple of 4 with fp8_per_token_head, got 66")
    monkeypatch.setattr(module._ops, "cuda_missing", "it was made without nvcc")
    assert reason(128, "fp8") == "it was made without nvcc"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi slopes"),
        ({"attn_type": "encoder_only"}, "attention of the type encoder_only"),
    ],
    ids=["alibi", "encoder"],
)
def test_layers_that_are_refused(options: dict[str, Any], what: str) -> None:
    name = Layer().backend.BACKEND_NAME
    with pytest.raises(NotImplementedError) as caught:
        Layer(**options)
    assert str(caught.value) == f"fp8kv.vllm: {what} can't be served; use another backend than {name}"


def test_batches_that_are_not_causal_are_refused() -> None:
    layer = Layer()
    for changes in ({"causal": False}, {"rswa_prefix_lens": int32(3)}):
        batch = dataclasses.replace(layer.batch((0,), (3,)), **changes)
        with pytest.raises(NotImplementedError, match=r"^fp8kv.vllm: attention must be causal, with a "):
            layer.builder.build(0, batch)


def test_quantization_of_the_output_is_refused() -> None:
    layer = Layer()
    out = torch.ones(3, HEADS, HEAD_SIZE)
    with pytest.raises(NotImplementedError, match="doesn't quantize its output"):
        layer.impl.forward(layer.layer, out, out, out, layer.kv_cache, None, out, torch.ones(1))


def test_a_cache_of_another_size_is_refused() -> None:
    layer = Layer()
    with pytest.raises(ValueError) as caught:
        layer.impl._layer_cache(torch.zeros(4, KV_HEADS, 16, 100, dtype=torch.uint8))
    assert str(caught.value) == (
        "fp8kv.vllm: the cache must have 128 elements for K and V of a token and head with head_size=64 "
        "and fp8, got shape [4, 2, 16, 100]"
    )


# The layout of the cache, where the backend says what it is


@pytest.mark.parametrize(
    ("layout", "strides", "of_layers"),
    [
        # 8 heads of 128 in blocks of 16, [block, head, token, element]; with 4 layers, [layer, ...].
        ("NHD", (32768, 256, 2048, 1), (32768, 131072, 256, 2048, 1)),
        ("HND", (32768, 4096, 256, 1), (4096, 131072, 16384, 256, 1)),
    ],
)
def test_the_layout_that_0_26_asks_for(
    layout: str, strides: tuple[int, ...], of_layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Layer().backend.Fp8KVBackend
    utils: Any = importlib.import_module("vllm.v1.attention.backends.utils")
    monkeypatch.setattr(utils, "get_kv_cache_layout", lambda: layout, raising=False)
    shape = backend.get_kv_cache_shape(10, 16, 8, 128, "fp8")
    assert shape == (10, 8, 16, 256)
    assert backend.get_kv_cache_shape(10, 16, 8, 128, "fp8_per_token_head") == (10, 8, 16, 264)
    for layers, expected in ((False, strides), (True, of_layers)):
        whole = (4, *shape) if layers else shape
        order = backend.get_kv_cache_stride_order(include_num_layers_dimension=layers)
        assert sorted(order) == list(range(len(whole)))
        in_memory = torch.empty([whole[i] for i in order], dtype=torch.uint8)
        assert in_memory.permute([order.index(i) for i in range(len(whole))]).stride() == expected


def test_the_bytes_of_a_token_that_0_33_asks_for() -> None:
    @dataclasses.dataclass(frozen=True)
    class Spec:
        kv_quant_mode: Any
        head_size: int = 128
        head_size_v: int = 128
        state_content_bytes: int | None = None

    customize = Layer().backend.Fp8KVBackend.customize_spec
    per_token = Spec(SimpleNamespace(is_per_token_head=True))
    assert customize(per_token).state_content_bytes == 2 * (128 + 4)
    for spec in (Spec(SimpleNamespace(is_per_token_head=False)), customize(per_token)):
        assert customize(spec) is spec
