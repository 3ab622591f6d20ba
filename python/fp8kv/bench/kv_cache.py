"""The operators of the paged KV cache, on the geometries of known models.

All caches of a run are in the same two allocations, one for K and one for V, which exceed all hardware caches
unless the run is warm. Every call has its own keys, values and slots; the slots are random and distinct. A
gather reads sequences of at most 1024 tokens in random blocks.

FlashInfer is not a peer: its append_paged_kv_cache copies without quantizing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fp8kv
from fp8kv._dtypes import CACHE_NAMES
from fp8kv.bench.measure import FP8, INPUT, Call, Case, small, torch_peer, vllm_ops

APPEND = "reshape_and_cache_flash"
APPEND_DYNAMIC = "reshape_and_cache_flash_dynamic"
GATHER = "gather_and_dequant_cache"

# The operator, the layout of the caches, and whether each head has a scale.
WORKS = {
    "append tensor NHD": (APPEND, "NHD", False),
    "append tensor HND": (APPEND, "HND", False),
    "append head NHD": (APPEND, "NHD", True),
    "append head HND": (APPEND, "HND", True),
    "append token-head NHD": (APPEND_DYNAMIC, "NHD", True),
    "gather head NHD": (GATHER, "NHD", True),
}
# (num_kv_heads, head_size), and the models that have them.
GEOMETRIES: dict[tuple[int, ...], tuple[str, ...]] = {
    (8, 128): ("Llama-3.1-8B", "Qwen3-8B"),
    (32, 128): ("Llama-2-7B",),
    (4, 128): ("Qwen3-30B-A3B",),
    (8, 64): (),
    (1, 128): (),
}
TOKENS = {"cuda": (1, 16, 128, 1024, 8192, 65536), "cpu": (1, 128, 1024, 8192)}
QUICK_GEOMETRIES = ((8, 128),)
QUICK_TOKENS = {"cuda": (16, 1024), "cpu": (16,)}
CACHE_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}  # of K, and of V
WARM_CACHE_BYTES = 8 << 20
BLOCK_SIZE = 16
MAX_SEQ_LEN = 1024
KV_CACHE_DTYPE = CACHE_NAMES[FP8]


def cases(device: torch.device, quick: bool, warm: bool) -> Iterator[CacheCase]:
    caches = Caches(device, warm)
    for work, (op, layout, per_head) in WORKS.items():
        for geometry in QUICK_GEOMETRIES if quick else GEOMETRIES:
            for tokens in (QUICK_TOKENS if quick else TOKENS)[device.type]:
                yield CacheCase(work, (tokens, *geometry), device, op, layout, per_head, caches)


@dataclass(frozen=True)
class Caches:
    """The memory of K and of V, allocated at first use."""

    device: torch.device
    warm: bool

    @cached_property
    def memory(self) -> list[Tensor]:
        """Random finite values."""
        patterns = torch.randint(127, (2, 1 << 20), dtype=torch.uint8, device=self.device)
        size = WARM_CACHE_BYTES if self.warm else CACHE_BYTES[self.device.type]
        return [pattern.repeat(size >> 20) for pattern in patterns]

    def views(self, heads: int, head_size: int, layout: str) -> list[Tensor]:
        """[num_blocks, block_size, num_kv_heads, head_size]"""
        block = BLOCK_SIZE * heads * head_size
        whole = [memory[: len(memory) // block * block] for memory in self.memory]
        if layout == "NHD":
            return [memory.view(-1, BLOCK_SIZE, heads, head_size) for memory in whole]
        return [memory.view(-1, heads, BLOCK_SIZE, head_size).transpose(1, 2) for memory in whole]


@dataclass(frozen=True)
class CacheCase(Case[tuple[Any, ...]]):
    """`shape` is [num_tokens, num_kv_heads, head_size]; the buffers of a call are the arguments of `op`."""

    op: str
    layout: str
    per_head: bool
    caches: Caches

    geometries = GEOMETRIES

    @property
    def size(self) -> int:
        tokens, heads, head_size = self.shape
        scale = torch.float32.itemsize if self.op == APPEND_DYNAMIC else 0
        return 2 * tokens * heads * (head_size * (INPUT.itemsize + FP8.itemsize) + scale)

    def buffers(self, count: int) -> list[tuple[Any, ...]]:
        """Keys and values distributed like activations."""
        tokens, heads, head_size = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        random: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": torch.float32}
        caches = self.caches.views(heads, head_size, self.layout)
        scales = [0.02 * (1 + torch.rand(heads if self.per_head else 1, **random)) for _ in range(2)]
        rows = [[torch.randn(self.shape, **random).to(INPUT) for _ in range(2)] for _ in range(count)]
        if self.op == GATHER:
            length = min(tokens, MAX_SEQ_LEN)
            cu_seq_lens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=self.device)
            num_seqs, max_blocks = tokens // length, -(-length // BLOCK_SIZE)
            blocks = draws(len(caches[0]), num_seqs * max_blocks, count, generator)
            tables = [drawn.int().view(num_seqs, max_blocks) for drawn in blocks]
            return [
                (*caches, *pair, table, cu_seq_lens, KV_CACHE_DTYPE, *scales) for pair, table in zip(rows, tables, strict=True)
            ]
        slots = draws(len(caches[0]) * BLOCK_SIZE, tokens, count, generator)
        if self.op == APPEND_DYNAMIC:
            scale_caches = [torch.zeros(cache.shape[:3], device=self.device) for cache in caches]
            return [(*pair, *caches, *scale_caches, drawn, KV_CACHE_DTYPE) for pair, drawn in zip(rows, slots, strict=True)]
        return [(*pair, *caches, drawn, KV_CACHE_DTYPE, *scales) for pair, drawn in zip(rows, slots, strict=True)]

    def ours(self, b: tuple[Any, ...]) -> Call:
        op = getattr(fp8kv, self.op)
        return lambda: op(*b)

    def peer(self, name: str) -> Callable[[tuple[Any, ...]], Call] | None:
        function: Callable[..., object]
        if name != "vllm":
            function = torch_peer(name, EXPRESSIONS[self.op])
        elif self.op == APPEND and not self.per_head and (ops := vllm_ops()) is not None:
            function = ops.reshape_and_cache_flash
        else:
            return None
        return lambda b: lambda: function(*b)


def draws(limit: int, size: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` times `size` distinct random numbers below `limit`; all are distinct if there are enough."""
    order = torch.randperm(limit, generator=generator, device=generator.device)
    starts = [i * size % (limit - size + 1) for i in range(count)]
    return [order[start : start + size].clone() for start in starts]


# The operators in plain PyTorch


def append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    place = (slot_mapping // BLOCK_SIZE, slot_mapping % BLOCK_SIZE)
    for rows, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache[place] = quantized(rows.float() / scale.view(-1, 1))


def append_dynamic(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
) -> None:
    place = (slot_mapping // BLOCK_SIZE, slot_mapping % BLOCK_SIZE)
    limit = torch.finfo(FP8).max
    for rows, cache, scale_cache in ((key, key_cache, k_scale_cache), (value, value_cache, v_scale_cache)):
        x = rows.float()
        scale = (x.abs().amax(-1) / limit).clamp_min(1.0 / (limit * 512))
        cache[place] = quantized(x / scale.unsqueeze(-1))
        scale_cache[place] = scale


def gather(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """For sequences that all have the same length."""
    num_seqs = block_table.shape[0]
    position = torch.arange(key.shape[0] // num_seqs, device=key.device)
    place = (block_table[:, position // BLOCK_SIZE].flatten(), (position % BLOCK_SIZE).repeat(num_seqs))
    for rows, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows.copy_(cache[place].view(FP8).float() * scale.view(-1, 1))


def quantized(quotient: Tensor) -> Tensor:
    limit = torch.finfo(FP8).max
    return quotient.clamp(-limit, limit).to(FP8).view(torch.uint8)


EXPRESSIONS: dict[str, Callable[..., None]] = {
    APPEND: append,
    APPEND_DYNAMIC: append_dynamic,
    GATHER: gather,
}


def host_calls(device: torch.device) -> dict[str, Call]:
    """Calls for `host_cost`."""
    key, value = small(2, device), small(2, device)
    tokens, heads, head_size = key.shape
    k_cache, v_cache = torch.zeros(2, 1, BLOCK_SIZE, heads, head_size, dtype=FP8, device=device)
    k_scale_cache, v_scale_cache = torch.zeros(2, 1, BLOCK_SIZE, heads, device=device)
    slots = torch.arange(tokens, device=device)
    scale, scales = torch.ones(1, device=device), torch.ones(heads, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    cu_seq_lens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    return {
        APPEND: lambda: fp8kv.reshape_and_cache_flash(key, value, k_cache, v_cache, slots, KV_CACHE_DTYPE, scale, scale),
        f"{APPEND}, per head": lambda: fp8kv.reshape_and_cache_flash(
            key, value, k_cache, v_cache, slots, KV_CACHE_DTYPE, scales, scales
        ),
        APPEND_DYNAMIC: lambda: fp8kv.reshape_and_cache_flash_dynamic(
            key, value, k_cache, v_cache, k_scale_cache, v_scale_cache, slots, KV_CACHE_DTYPE
        ),
        GATHER: lambda: fp8kv.gather_and_dequant_cache(
            k_cache, v_cache, key, value, table, cu_seq_lens, KV_CACHE_DTYPE, scale, scale
        ),
    }
