"""`AttentionScales.append_step`: norm, RoPE, quantization and append, plain, observed and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kv import AttentionScales, PagedKVCache, reference
from helpers import assert_same_bytes, each_strategy, values

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, NUM_TOKENS = 8, 2, 64, 11
E4M3 = torch.float8_e4m3fn


def layer(device: torch.device, strategy: str, **options: Any) -> AttentionScales:
    scales = AttentionScales(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, strategy=strategy, device=device, **options)
    for name, start in (("q_scale", 0.5), ("k_scale", 0.25), ("v_scale", 3.0)):
        buffer = getattr(scales, name)
        buffer.copy_(start * torch.arange(1, buffer.numel() + 1))
    return scales


def step(device: torch.device, real: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    qkv = values((NUM_TOKENS, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_SIZE), real, specials=False)
    angles = torch.arange(50.0).view(-1, 1) * 10000.0 ** (-torch.arange(HEAD_SIZE / 2) / (HEAD_SIZE / 2))
    slots = torch.arange(NUM_TOKENS) * 3
    slots[4] = -1
    parts = {
        "query": qkv[:, :NUM_HEADS],
        "key": qkv[:, NUM_HEADS:-NUM_KV_HEADS],
        "value": qkv[:, -NUM_KV_HEADS:],
        "slot_mapping": slots,
        "positions": torch.arange(NUM_TOKENS) * 4,
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), 1),
    }
    return {name: x.to(device) for name, x in parts.items()}


def caches(device: torch.device) -> tuple[Tensor, Tensor]:
    key_cache = torch.zeros(3, 16, NUM_KV_HEADS, HEAD_SIZE, dtype=E4M3, device=device)
    return key_cache, torch.zeros_like(key_cache)


def expected(strategy: str, dtype: torch.dtype = E4M3, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and caches, from the reference."""
    cpu = torch.device("cpu")
    scales, arguments = layer(cpu, strategy), step(cpu)
    out, pair = torch.zeros(arguments["query"].shape, dtype=dtype), caches(cpu)
    reference.rope_quant_and_cache(
        **arguments, **more, query_out=out, key_cache=pair[0], value_cache=pair[1], kv_cache_dtype="fp8",
        q_scale=scales.q_scale, k_scale=scales.k_scale, v_scale=scales.v_scale,
    )  # fmt: skip
    return out, *pair


@each_strategy
def test_the_bytes_are_those_of_the_reference(device: torch.device, strategy: str) -> None:
    pair = caches(device)
    query = layer(device, strategy).append_step(cache=pair, **step(device))
    for actual, wanted in zip((query, *pair), expected(strategy), strict=True):
        assert_same_bytes(actual, wanted)


@each_strategy
def test_observing_gives_the_same_bytes(device: torch.device, strategy: str) -> None:
    pair = caches(device)
    query = layer(device, strategy, calculate_kv_scales=True).append_step(cache=pair, **step(device))
    for actual, wanted in zip((query, *pair), expected(strategy), strict=True):
        assert_same_bytes(actual, wanted)


@each_strategy
def test_what_is_observed_is_what_is_quantized(device: torch.device, strategy: str) -> None:
    """Keys and queries after RoPE; keys and values without the token that has no slot."""
    scales = layer(device, strategy, calculate_kv_scales=True)
    scales.append_step(cache=caches(device), **step(device))
    rotated, _, _ = expected(strategy, torch.bfloat16)
    arguments = step(torch.device("cpu"))
    key = torch.zeros(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    one, pair = torch.ones(1), caches(torch.device("cpu"))
    reference.rope_quant_and_cache(
        **(arguments | {"query": arguments["key"]}), query_out=key, key_cache=pair[0], value_cache=pair[1],
        kv_cache_dtype="fp8", q_scale=one, k_scale=one, v_scale=one,
    )  # fmt: skip
    stored = arguments["slot_mapping"] >= 0
    seen = scales.observations()
    for name, x in (("q", rotated), ("k", key[stored]), ("v", arguments["value"][stored])):
        groups = 1 if strategy == "tensor" else NUM_KV_HEADS
        amax = x.float().abs().unflatten(1, (groups, -1)).amax((0, 2, 3))
        assert getattr(seen, name).amax == tuple(amax.tolist())


def test_a_paged_cache_takes_over_the_scales(device: torch.device) -> None:
    scales, cache = layer(device, "attn_head"), PagedKVCache(3, 16, NUM_KV_HEADS, HEAD_SIZE, device=device)
    scales.append_step(cache=cache, **step(device))
    assert cache.k_scale is scales.k_scale
    assert_same_bytes(cache.key_cache, expected("attn_head")[1])


def test_flat_heads(device: torch.device) -> None:
    arguments = step(device)
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].flatten(1)
    query = layer(device, "tensor").append_step(cache=caches(device), **arguments)
    assert_same_bytes(query, expected("tensor")[0].flatten(1))


@pytest.mark.parametrize("observes", [False, True])
def test_queries_that_stay_in_16_bits(device: torch.device, observes: bool) -> None:
    arguments = step(device)
    out = torch.empty(NUM_TOKENS, NUM_HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=device)
    scales = layer(device, "tensor", calculate_kv_scales=observes)
    assert scales.append_step(cache=caches(device), out=out, **arguments) is out
    assert_same_bytes(out, expected("tensor", torch.bfloat16)[0])


def test_norms(device: torch.device) -> None:
    weights = {f"{side}_norm_weight": torch.linspace(0.5, 2, HEAD_SIZE, device=device).bfloat16() for side in "qk"}
    query = layer(device, "tensor").append_step(cache=caches(device), **step(device), **weights, norm_eps=1e-5)
    wanted = expected("tensor", **{name: x.cpu() for name, x in weights.items()}, norm_eps=1e-5)[0]
    torch.testing.assert_close(query.float().cpu(), wanted.float(), rtol=0.13, atol=2.0**-9)


@pytest.mark.parametrize("observes", [False, True])
def test_three_positions_and_a_norm_after_rope(device: torch.device, observes: bool) -> None:
    positions = torch.stack((torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS) * 3, torch.full((NUM_TOKENS,), 7)))
    options: dict[str, Any] = {"mrope_section": (12, 10, 10), "mrope_interleaved": True, "norm_after_rope": True}
    weights = {f"{side}_norm_weight": torch.linspace(0.5, 2, HEAD_SIZE) for side in "qk"}
    arguments = step(device) | {"positions": positions.to(device)} | {name: x.to(device) for name, x in weights.items()}
    pair = caches(device)
    query = layer(device, "tensor", calculate_kv_scales=observes).append_step(cache=pair, **arguments, **options)

    cpu = torch.device("cpu")
    scales, others, wanted = layer(cpu, "tensor"), caches(cpu), torch.zeros(NUM_TOKENS, NUM_HEADS, HEAD_SIZE, dtype=E4M3)
    reference.rope_quant_and_cache(
        **(step(cpu) | {"positions": positions} | weights), **options, query_out=wanted, key_cache=others[0],
        value_cache=others[1], kv_cache_dtype="fp8", q_scale=scales.q_scale, k_scale=scales.k_scale,
        v_scale=scales.v_scale,
    )  # fmt: skip
    assert_same_bytes(pair[1], others[1])
    for actual, right in ((query, wanted), (pair[0], others[0])):  # a norm: one step of FP8
        torch.testing.assert_close(actual.float().cpu(), right.float(), rtol=0.13, atol=2.0**-9)


@pytest.mark.parametrize("fused", [False, True], ids=["observing", "fused"])
def test_compiled(device: torch.device, fused: bool) -> None:
    """Inductor takes half a minute for the C++ of the observing step on the CPU."""
    backend = "inductor" if fused or device.type == "cuda" else "aot_eager"
    scales, pair = layer(device, "attn_head", calculate_kv_scales=not fused), caches(device)

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(**arguments: Tensor) -> Tensor:
        return scales.append_step(cache=pair, **arguments).view(torch.uint8)

    query = compiled(**step(device)).view(E4M3)
    for actual, wanted in zip((query, *pair), expected("attn_head"), strict=True):
        assert_same_bytes(actual, wanted)


def test_a_captured_step_sees_new_scales(cuda: torch.device) -> None:
    scales, pair, arguments = layer(cuda, "attn_head"), caches(cuda), step(cuda)
    right = scales.state_dict()
    right = {name: x.clone() for name, x in right.items()}
    for name in ("q_scale", "k_scale", "v_scale"):
        getattr(scales, name).fill_(1)
    scales.append_step(cache=pair, **arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = scales.append_step(cache=pair, **arguments)
    scales.load_state_dict(right)
    graph.replay()
    for actual, wanted in zip((query, *pair), expected("attn_head"), strict=True):
        assert_same_bytes(actual, wanted)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    scales, arguments = layer(device, "tensor"), step(device)
    dynamic = PagedKVCache(3, 16, NUM_KV_HEADS, HEAD_SIZE, scales="dynamic", device=device)
    with pytest.raises(ValueError, match=r"AttentionScales.append_step: cache must take the scales"):
        scales.append_step(cache=dynamic, **arguments)
    pair = caches(device)
    with pytest.raises(ValueError, match=r"append_step: key must have the shape \[num_tokens, 2, 64\] or"):
        scales.append_step(cache=pair, **(arguments | {"key": arguments["query"]}))
    with pytest.raises(RuntimeError, match=r"rope_quant_and_cache: positions must have at least 11 elements"):
        scales.append_step(cache=pair, **(arguments | {"positions": arguments["positions"][:3]}))
    assert not pair[0].view(torch.uint8).any()


@pytest.mark.parametrize("observes", [False, True])
def test_a_cache_that_is_not_quantized(device: torch.device, observes: bool) -> None:
    scales = layer(device, "attn_head", calculate_kv_scales=observes)
    arguments = step(device)
    cache = PagedKVCache(3, 16, NUM_KV_HEADS, HEAD_SIZE, dtype="bfloat16", device=device)
    query = scales.append_step(cache=cache, **arguments)
    assert (query.dtype, query.shape) == (torch.bfloat16, arguments["query"].shape)
    table, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0, 1, 2]] * NUM_TOKENS, [9] * NUM_TOKENS))
    assert scales.attend_step(query, cache, table, lengths).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["query", "key", "value", "cache"])
def test_none(name: str) -> None:
    cpu = torch.device("cpu")
    arguments = {"cache": caches(cpu), **step(cpu)} | {name: None}
    expected = "a PagedKVCache or two tensors" if name == "cache" else "a tensor"
    with pytest.raises(ValueError, match=f"^AttentionScales.append_step: {name} must be {expected}, got NoneType$"):
        layer(cpu, "tensor").append_step(**arguments)


def test_a_module_that_was_made_for_inference_can_observe(device: torch.device) -> None:
    with torch.inference_mode():
        scales = layer(device, "tensor", calculate_kv_scales=True)
    scales.append_step(cache=caches(device), **step(device))
    assert scales.k_amax.item() > 0
