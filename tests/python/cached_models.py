"""Tiny Transformers models and their caches: `Fp8Cache`, and a cache of reference values for comparison."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

from fp8kv import KVCacheScheme, KVScales, LayerScales, reference
from fp8kv.transformers import Fp8Cache
from helpers import assert_same_bytes

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LENGTH = 24  # tokens of the sequences
STEPS = (7, 5, 1, 1, 1, 4, 1, 1, 3)  # processed in these chunks
LAYERS, KV_HEADS, HEAD_SIZE = 2, 2, 16

FIELDS: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
    "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
#: Models with full attention, with windows, with both, with chunks that don't look back, softcap and sinks.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama-2": ("Llama", {"num_key_value_heads": 4}),
    "Qwen3": ("Qwen3", {"head_dim": 24}),
    "Mistral": ("Mistral", {"sliding_window": 9}),
    "Gemma3": ("Gemma3", {"sliding_window": 9, "head_dim": 16,
                          "layer_types": ["sliding_attention", "full_attention"]}),
    "Llama4": ("Llama4", {"attention_chunk_size": 9, "head_dim": 16, "num_local_experts": 2,
                          "intermediate_size_mlp": 96,
                          "layer_types": ["chunked_attention", "full_attention"]}),
    "Gemma2": ("Gemma2", {"sliding_window": 9, "head_dim": 16}),  # with softcap
    "GptOss": ("GptOss", {"sliding_window": 9, "head_dim": 16, "num_local_experts": 2,
                          "num_experts_per_tok": 2}),  # with sinks
}  # fmt: skip
#: The name of the cache argument of models: `cache` in newer releases.
CACHE = next(x for x in inspect.signature(transformers.LlamaForCausalLM.forward).parameters if "cache" in x or "past" in x)
each_model = pytest.mark.parametrize("name", MODELS)
each_mode = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
full_and_sliding = pytest.mark.parametrize("name", ["Llama", "Mistral"])


def config_of(name: str) -> Any:
    kind, changes = MODELS[name]
    suffix = "TextConfig" if kind in ("Gemma3", "Llama4") else "Config"
    return getattr(transformers, kind + suffix)(**FIELDS | changes)


@functools.cache
def model_of(kind: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[kind][0] + "ForCausalLM")(config_of(kind))
    for name, parameter in model.named_parameters():
        if "sinks" in name:  # they are not initialized
            torch.nn.init.normal_(parameter)
    return model.eval().to(device, dtype)


def scales_of(kind: str, config: Any) -> Any:
    """With these, some heads saturate, and others use little of the range."""
    if kind in ("1.0", "dynamic"):
        return None if kind == "1.0" else "dynamic"
    heads = config.num_key_value_heads
    shapes = {"tensor": (1,), "head": (heads,), "channel": (heads, head_size_of(config))}
    generator = torch.Generator().manual_seed(1)

    def some() -> Tensor:
        return torch.exp2(torch.rand(shapes[kind], generator=generator) * 8 - 12)

    layers = {index: LayerScales(None, some(), some()) for index in range(LAYERS)}
    strategies: dict[str, Any] = {"tensor": "tensor", "head": "attn_head", "channel": "channel"}
    return KVScales(layers, KVCacheScheme(strategies[kind]))


def head_size_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def offsets_of(config: Any, seed: int = 0) -> dict[int, Tensor]:
    """By layer; as large as the keys and values of these models."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_key_value_heads, head_size_of(config))
    return {index: torch.randn(shape, generator=generator) for index in range(LAYERS)}


def there_and_back(x: Tensor, scale: Tensor | None, dtype: torch.dtype, offset: Tensor | None = None) -> Tensor:
    """[batch, heads, tokens, head_size] quantized and dequantized by the reference, in the layout of memory
    that is natural for a cache; None computes a scale for each token and head."""
    if offset is not None:
        shift = offset.to(x.device).unsqueeze(1)
        return (there_and_back(x.float() - shift, scale, dtype) + shift).to(x.dtype)
    if scale is None:
        q, computed = reference.quantize(x, group_shape=(1, -1), dtype=dtype)
        back = reference.dequantize(q, computed, group_shape=(1, -1), dtype=x.dtype)
    else:
        scale = scale.to(x.device).view(1, -1, 1, scale.shape[1] if scale.dim() == 2 else 1)
        back = reference.dequantize(reference.quantize(x, scale, dtype=dtype)[0], scale, dtype=x.dtype)
    return back


def by_tokens(x: Tensor) -> Tensor:
    """The same values; all heads of a token lie together."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class _ThereAndBack:
    """Makes a Transformers cache store FP8 or INT8 values in the model's dtype."""

    def rounds(self, scales: Any, dtype: torch.dtype = E4M3, offsets: Sequence[dict[int, Tensor]] = ({}, {})) -> Any:
        """`offsets` of K and V, beside those of the scales; `dtype` is not for layers of INT8."""
        self.scales, self.dtype, self.offsets = scales, dtype, offsets
        return self

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        one = LayerScales(None, torch.ones(1), torch.ones(1))
        own = LayerScales(None, None, None) if self.scales == "dynamic" else (self.scales or {}).get(layer, one)
        dtype = torch.int8 if own.dtype == "int8" else self.dtype
        k_offset, v_offset = (x.get(layer) for x in self.offsets)
        key = there_and_back(key, own.k, dtype, own.k_offset if k_offset is None else k_offset)
        value = there_and_back(value, own.v, dtype, own.v_offset if v_offset is None else v_offset)
        key, value = super().update(key, value, layer, *args, **kwargs)  # type: ignore[misc]
        return by_tokens(key), by_tokens(value)


class Expected(_ThereAndBack, DynamicCache):  # type: ignore[misc]
    pass


class ExpectedStatic(_ThereAndBack, StaticCache):  # type: ignore[misc]
    pass


def caches(
    name: str,
    scales: Any = None,
    static: bool = False,
    dtype: torch.dtype = E4M3,
    config: Any = None,
    **options: Any,
) -> tuple[Fp8Cache, Any]:
    """A cache, and the reference cache.

    The cache dequantizes, so that both give the model the same numbers; with `direct` and the config of the
    model it does not.
    """
    config = config_of(name) if config is None else config
    fixed = {"max_cache_len": 40} if static else {}
    expected = (ExpectedStatic if static else Expected)(config=config, **fixed)
    options = {"block_size": 4, "direct": False} | fixed | options
    return Fp8Cache(config, scales, dtype=dtype, **options), expected.rounds(scales, dtype)


def tokens(batch: int = 3, length: int = LENGTH, seed: int = 2) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, *padding: int) -> tuple[Tensor, Tensor]:
    """Ids and mask."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return ids * mask, mask


def with_cache(cache: Any) -> dict[str, Any]:
    return {CACHE: cache}


@torch.no_grad()
def logits(model: Any, cache: Any, ids: Tensor, mask: Tensor, steps: Sequence[int] = STEPS) -> Tensor:
    """For all tokens, processed in chunks; the cache may hold earlier tokens, which the mask includes."""
    past, pieces = mask.shape[1] - ids.shape[1], []
    for piece in ids.split(list(steps), 1):
        past += piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :past], **with_cache(cache)).logits)
    return torch.cat(pieces, 1)


def generate(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True} | options
    return model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **with_cache(cache),
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def assert_same_generation(actual: Any, expected: Any) -> None:
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for a, e in zip(actual.logits, expected.logits, strict=True):
        assert_same_bytes(a, e)


class Recorder:
    """`backend` of `torch.compile` runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            self.graphs.append(graph)
            return graph.forward

        self.backend = backend  # a function: `generate` copies its configuration, methods and all

    def config(self) -> transformers.CompileConfig:
        """For `generate`, which then compiles by the criteria of a GPU."""
        config = transformers.CompileConfig(backend=self.backend, mode=None, fullgraph=True)
        config._compile_all_devices = True
        return config
