"""One step of an attention layer: norm, RoPE and quantization of Q and K, quantization of V, and the append.

Bytes are Q, K and V, read and written, without the RoPE table, the scales and the indices. With an INT8 cache
Q is not quantized and written in bf16. The caches are the same as in the cache benchmark, the slots random
and distinct, the inputs slices of one QKV tensor.

The peer "separate ops" is `quantize` of Q and `reshape_and_cache_flash`; RoPE and norm come before them as
one compiled PyTorch expression.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fp8kv
from fp8kv._dtypes import CACHE_NAMES, FP8_DTYPES
from fp8kv.bench.kv_cache import BLOCK_SIZE, KV_CACHE_DTYPE, Caches, append, draws, quantized
from fp8kv.bench.measure import FP8, INPUT, Call, Case, small, torch_peer

OP = "rope_quant_and_cache"
PEERS = ("separate ops", "torch eager", "torch.compile", "flashinfer", "flashinfer with PDL")


class Work(NamedTuple):
    """The kind of a case.

    `layout` is "NHD" or "HND". `rope`: positions are given; `norm`: norm weights are. `scales` of K and V are
    "head" or "channel", `dtype` is the format of the caches.
    """

    layout: str = "NHD"
    rope: bool = False
    norm: bool = False
    scales: str = "head"
    dtype: torch.dtype = FP8

    @property
    def query_dtype(self) -> torch.dtype:
        """What queries become: they are quantized to FP8 only."""
        return self.dtype if self.dtype in FP8_DTYPES else INPUT


WORKS = {
    "step NHD": Work(),
    "step rope NHD": Work(rope=True),
    "step rope HND": Work("HND", rope=True),
    "step norm rope NHD": Work(rope=True, norm=True),
    "step rope int8 channel NHD": Work(rope=True, scales="channel", dtype=torch.int8),
}
# (num_heads, num_kv_heads, head_size), and the models that have them.
GEOMETRIES: dict[tuple[int, ...], tuple[str, ...]] = {
    (32, 8, 128): ("Llama-3.1-8B", "Qwen3-8B"),
    (64, 8, 128): ("Llama-3.1-70B",),
    (32, 4, 128): ("Qwen3-30B-A3B",),
    (32, 32, 128): ("Llama-2-7B",),
    (9, 3, 64): ("SmolLM2-135M",),
}
FIRST = (32, 8, 128)  # the only one in quick runs, and for formats other than FP8
TOKENS = {"cuda": (1, 16, 64, 256, 2048, 16384), "cpu": (1, 64, 1024)}
QUICK_TOKENS = {"cuda": (16, 256), "cpu": (16,)}
MAX_POSITION = 8192
NORM_EPS = 1e-6


def cases(device: torch.device, quick: bool, warm: bool) -> Iterator[StepCase]:
    caches = Caches(device, warm)
    for name, work in WORKS.items():
        for geometry in (FIRST,) if quick or work.dtype != FP8 else GEOMETRIES:
            for tokens in (QUICK_TOKENS if quick else TOKENS)[device.type]:
                yield StepCase(name, (tokens, *geometry), device, work, caches)


@dataclass(frozen=True)
class StepCase(Case[tuple[Any, ...]]):
    """`shape` is [num_tokens, num_heads, num_kv_heads, head_size]; buffers are the operator's arguments."""

    how: Work
    caches: Caches

    geometries = GEOMETRIES

    @property
    def size(self) -> int:
        tokens, heads, kv_heads, head_size = self.shape
        query = INPUT.itemsize + self.how.query_dtype.itemsize
        key = INPUT.itemsize + self.how.dtype.itemsize
        return tokens * head_size * (heads * query + 2 * kv_heads * key)

    def buffers(self, count: int) -> list[tuple[Any, ...]]:
        tokens, heads, kv_heads, head_size = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        random: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": torch.float32}
        how, name = self.how, CACHE_NAMES[self.how.dtype]
        caches = self.caches.views(kv_heads, head_size, how.layout, how.dtype)
        shape = {"head": (kv_heads,), "channel": (kv_heads, head_size)}[how.scales]
        scales = [0.02 * (1 + torch.rand(of, **random)) for of in ((kv_heads,), shape, shape)]
        table = rope_table(MAX_POSITION, head_size, self.device)
        weights = [(1 + 0.1 * torch.randn(head_size, **random)).to(INPUT) for _ in range(2)]
        slots = draws(len(caches[0]) * BLOCK_SIZE, tokens, count, generator)
        calls = []
        for slot in slots:
            qkv = torch.randn(tokens, heads + 2 * kv_heads, head_size, **random).to(INPUT)
            out = torch.empty(tokens, heads, head_size, dtype=how.query_dtype, device=self.device)
            positions = torch.randint(MAX_POSITION, (tokens,), generator=generator, device=self.device)
            rope = (positions, table) if how.rope else (None, None)
            norm = weights if how.norm else (None, None)
            q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
            calls.append((q, k, v, out, *caches, slot, name, *scales, *rope, True, *norm, NORM_EPS))
        return calls

    def ours(self, b: tuple[Any, ...]) -> Call:
        return lambda: fp8kv.rope_quant_and_cache(*b)

    def peer(self, name: str) -> Callable[[tuple[Any, ...]], Call] | None:
        how = self.how
        if name.startswith("torch"):
            function: Callable[..., object] = torch_peer(name, step)
        elif how.dtype != FP8:
            return None
        elif name == "separate ops":
            function = separate(torch_peer("torch.compile", transformed))
        elif how.rope and not how.norm and self.device.type == "cuda" and (rope := flashinfer_rope()) is not None:
            return lambda b: flashinfer_call(rope, b, how.layout, name.endswith("PDL"))
        else:
            return None
        return lambda b: lambda: function(*b)


def rope_table(max_position: int, rotary_dim: int, device: torch.device) -> Tensor:
    """fp32 [max_position, rotary_dim]: cosines, then sines."""
    frequencies = 10000.0 ** (-torch.arange(rotary_dim // 2, device=device) / (rotary_dim // 2))
    angles = torch.arange(max_position, device=device).unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1)


# The operator in plain PyTorch


def transformed(x: Tensor, positions: Tensor | None, table: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """Norm and RoPE, as neox pairs."""
    y = x.float()
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    if positions is not None and table is not None:
        cos, sin = table[positions].unsqueeze(1).chunk(2, -1)
        a, b = y.chunk(2, -1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return y.to(x.dtype)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_out: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    is_neox: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    group = query.shape[1] // key.shape[1]
    q = transformed(query, positions, table, q_weight, eps)
    k = transformed(key, positions, table, k_weight, eps)
    if query_out.dtype == FP8:
        query_out.view(torch.uint8).copy_(quantized(q.float() / q_scale.repeat_interleave(group).view(-1, 1), FP8))
    else:
        query_out.copy_(q)
    append(k, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale)


# Peers


def separate(transform: Callable[..., object]) -> Callable[..., None]:
    """Separate operators of this library; `transform` does norm and RoPE."""

    def call(
        q: Any, k: Any, v: Any, out: Any, k_cache: Any, v_cache: Any, slots: Any, format: str,
        q_scale: Any, k_scale: Any, v_scale: Any, positions: Any, table: Any, is_neox: bool,
        q_weight: Any, k_weight: Any, eps: float,
    ) -> None:  # fmt: skip
        if positions is not None or q_weight is not None:
            q = transform(q, positions, table, q_weight, eps)
            k = transform(k, positions, table, k_weight, eps)
        kv_heads = k.shape[1]
        grouped = (kv_heads, q.shape[1] // kv_heads)
        fp8kv.static_scaled_fp8_quant(out.unflatten(1, grouped), q.unflatten(1, grouped), q_scale.view(1, kv_heads, 1, 1))
        fp8kv.reshape_and_cache_flash(k, v, k_cache, v_cache, slots, format, k_scale, v_scale)

    return call


def flashinfer_rope() -> Any:
    """None if FlashInfer is not installed."""
    try:
        return importlib.import_module("flashinfer.rope").rope_quantize_fp8_append_paged_kv_cache
    except ImportError:
        return None


def flashinfer_call(rope: Any, b: tuple[Any, ...], layout: str, pdl: bool) -> Call:
    """Each token is a request of one page. One scale for Q and one for K and V, the only ones it supports."""
    q, k, v, out, k_cache, v_cache, slots, *_ = b
    positions, table = b[11].int(), b[12]
    tokens = len(slots)
    caches = tuple((cache if layout == "NHD" else cache.transpose(1, 2)).view(FP8) for cache in (k_cache, v_cache))
    numbers = torch.arange(tokens + 1, dtype=torch.int32, device=slots.device)
    pages, offsets = (slots // BLOCK_SIZE).int(), (slots % BLOCK_SIZE).int()
    nothing = [torch.empty(*x.shape[:2], 0, dtype=x.dtype, device=x.device) for x in (q, k, out)]
    return lambda: rope(
        q, k, nothing[0], nothing[1], v, table, positions, caches, pages, numbers, numbers[:-1], offsets,
        is_neox=True, quantize_dtype=FP8, page_size=BLOCK_SIZE, kv_layout=layout, q_rope_out=out,
        q_nope_out=nothing[2], enable_pdl=pdl,
    )  # fmt: skip


def host_calls(device: torch.device) -> dict[str, Call]:
    """Calls for `host_cost`."""
    query, key, value = small(4, device), small(2, device)[..., :16], small(2, device)[..., :16]
    tokens, heads, head_size = query.shape
    out = torch.empty(tokens, heads, head_size, dtype=FP8, device=device)
    k_cache, v_cache = torch.zeros(2, 1, BLOCK_SIZE, 2, head_size, dtype=FP8, device=device)
    slots, scale = torch.arange(tokens, device=device), torch.ones(1, device=device)
    table = rope_table(tokens, head_size, device)
    without = (query, key, value, out, k_cache, v_cache, slots, KV_CACHE_DTYPE, scale, scale, scale)
    return {
        OP: lambda: fp8kv.rope_quant_and_cache(*without),
        f"{OP}, with RoPE": lambda: fp8kv.rope_quant_and_cache(*without, slots, table),
    }
