"""FLASH_ATTN of vLLM with our writes and query quantization: the bytes are the reference's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_standins
from torch import Tensor
from vllm_layer import BLOCK_SIZE, HEAD_SIZE, HEADS, KV_HEADS, PADDING, allocate, config

from fp8kv import reference
from helpers import assert_same_bytes

PER_HEAD = torch.tensor([0.03, 0.04])


@pytest.fixture
def writes(vllm: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plug-in, asked for by the environment; afterwards vLLM is as it was."""
    vllm_standins.forget_the_plugin()
    monkeypatch.setenv("FP8KV_VLLM_WRITES", "1")
    registry: Any = importlib.import_module("vllm.v1.attention.backends.registry")
    custom_op: Any = importlib.import_module("vllm.model_executor.custom_op")
    flash = registry.AttentionBackendEnum["FLASH_ATTN"]
    importlib.import_module("fp8kv.vllm").register()
    importlib.import_module("fp8kv.vllm").register()
    yield importlib.import_module("fp8kv.vllm.writes")
    registry.register_backend(flash, "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend")
    custom_op.op_registry_oot.pop("QuantFP8", None)
    vllm_standins.forget_the_plugin()


def queries() -> Any:
    return importlib.import_module("fp8kv.vllm.queries")


def bare(cls: type, **attributes: Any) -> Any:
    """An object as far as its methods need it."""
    result = object.__new__(cls)
    for name, value in attributes.items():
        setattr(result, name, value)
    return result


def test_flash_attn_is_replaced(writes: Any) -> None:
    registry: Any = importlib.import_module("vllm.v1.attention.backends.registry")
    flash_attn: Any = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    path = registry.AttentionBackendEnum["FLASH_ATTN"].get_path()
    assert path == "fp8kv.vllm.writes.WritesBackend"
    assert writes.WritesBackend.get_name() == "FLASH_ATTN"
    assert issubclass(writes.WritesBackend, flash_attn.FlashAttentionBackend)
    assert issubclass(writes.WritesBackend.get_impl_cls(), flash_attn.FlashAttentionImpl)
    assert issubclass(writes.WritesBackend.get_builder_cls(), flash_attn.FlashAttentionMetadataBuilder)


def test_quantization_of_another_plug_in_is_not_replaced(writes: Any) -> None:
    custom_op: Any = importlib.import_module("vllm.model_executor.custom_op")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(custom_op.op_registry_oot, "QuantFP8", SimpleNamespace)
        with pytest.raises(ValueError) as caught:
            queries().replace_quantization()
    assert str(caught.value) == (
        "fp8kv.vllm: QuantFP8 must be vLLM's own with FP8KV_VLLM_WRITES=1, got SimpleNamespace of another plug-in"
    )


def test_another_plug_in_is_not_replaced(writes: Any) -> None:
    versions: Any = importlib.import_module("fp8kv.vllm.versions")
    with pytest.raises(ValueError) as caught:
        versions.replace_backend("FLASH_ATTN", "third.Backend")
    assert str(caught.value) == (
        "fp8kv.vllm: FLASH_ATTN must be vLLM's own with FP8KV_VLLM_WRITES=1, got "
        "fp8kv.vllm.writes.WritesBackend of another plug-in"
    )


@pytest.mark.parametrize("layout", ["NHD", "HND", "BLHNC"])
@pytest.mark.parametrize("scale", [torch.tensor(0.03), PER_HEAD], ids=["tensor", "head"])
@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2", "auto"])
def test_writes(writes: Any, name: str, scale: Tensor, layout: str) -> None:
    impl = bare(writes.WritesImpl, head_size=HEAD_SIZE, kv_cache_dtype=name, attn_type="decoder")
    layer = SimpleNamespace(_k_scale=scale, _v_scale=2 * scale)
    key, value = torch.randn(2, 7 + PADDING, KV_HEADS, HEAD_SIZE).bfloat16()
    slots = torch.tensor([5, 17, -1, 63, 0, 1, 40])
    dtype = torch.bfloat16 if name == "auto" else torch.uint8
    kv_cache = allocate(4, 2 * HEAD_SIZE, dtype, layout)
    impl.do_kv_cache_update(layer, key, value, kv_cache, slots)
    expected = torch.zeros(2, 4, BLOCK_SIZE, KV_HEADS, HEAD_SIZE, dtype=dtype)
    reference.reshape_and_cache_flash(key, value, *expected, slots, name, scale, 2 * scale)
    for stored, other in zip(kv_cache.transpose(1, 2).chunk(2, dim=-1), expected, strict=True):
        assert_same_bytes(stored.contiguous(), other)


@pytest.mark.parametrize(
    "attributes",
    [
        {"kv_cache_dtype": "fp8", "attn_type": "encoder_only"},
        {"kv_cache_dtype": "nvfp4", "attn_type": "decoder"},
    ],
    ids=["encoder", "dtype"],
)
def test_what_is_left_to_vllm(writes: Any, attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = []
    flash_attn: Any = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    monkeypatch.setattr(flash_attn.FlashAttentionImpl, "do_kv_cache_update", lambda self, *args: stored.append(args))
    bare(writes.WritesImpl, head_size=HEAD_SIZE, **attributes).do_kv_cache_update(1, 2, 3, 4, 5)
    assert stored == [(1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("group_shape", "scale"),
    [
        ((-1, -1), torch.tensor(0.03)),
        ((-1, -1), torch.tensor([0.03])),
        ((-1, HEADS * HEAD_SIZE // 2), PER_HEAD),
    ],
    ids=["no dimension", "tensor", "head"],
)
def test_queries(writes: Any, group_shape: tuple[int, int], scale: Tensor) -> None:
    quant = bare(queries().Fp8KVQuantFP8, group_shape=group_shape, num_token_padding=None)
    query = 10 * torch.randn(5, HEADS * HEAD_SIZE).bfloat16()
    result, given = quant.forward_cuda(query, scale)
    grouped = query.view(5, scale.numel(), -1)
    expected, _ = reference.quantize(grouped, scale.view(1, -1, 1))
    assert given is scale
    assert result.dtype == torch.float8_e4m3fn
    assert_same_bytes(result, expected.view(5, -1))


def test_other_quantization_is_left_to_vllm(writes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are to be computed, and results with more rows."""
    quant_fp8: Any = importlib.import_module("vllm.model_executor.layers.quantization.input_quant_fp8")
    seen = []
    monkeypatch.setattr(quant_fp8.QuantFP8, "forward_cuda", lambda self, *args: seen.append(args) or args[:2])
    x, one = torch.ones(3, 64), torch.ones(1)
    padded = bare(queries().Fp8KVQuantFP8, group_shape=(-1, -1), num_token_padding=17)
    assert padded.forward_cuda(x, one) == (x, one)
    assert bare(queries().Fp8KVQuantFP8, group_shape=(1, -1), num_token_padding=None).forward_cuda(x) == (
        x,
        None,
    )
    assert len(seen) == 2


def test_the_name_by_which_vllm_turns_it_on_stays(writes: Any) -> None:
    custom_op: Any = importlib.import_module("vllm.model_executor.custom_op")
    assert custom_op.op_registry_oot["QuantFP8"] is queries().Fp8KVQuantFP8
    assert queries().Fp8KVQuantFP8.name == "quant_fp8"


def test_scales_of_queries_are_checked_too(writes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn: Any = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    monkeypatch.setattr(flash_attn.FlashAttentionMetadataBuilder, "__init__", lambda self, *args: None)
    vllm_config = config()
    vllm_config.compilation_config.static_forward_context["a.0"] = SimpleNamespace(
        num_kv_heads=2, kv_cache_dtype="fp8", _k_scale=PER_HEAD, _v_scale=PER_HEAD, _q_scale=0 * PER_HEAD
    )
    with pytest.raises(ValueError, match=r"^fp8kv.vllm: q_scale of a.0 must be finite and above 0"):
        writes.WritesBuilder(None, ["a.0"], vllm_config, torch.device("cpu"))
