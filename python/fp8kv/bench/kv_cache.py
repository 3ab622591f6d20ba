"""The operators of the paged KV cache, on the geometries of known models.

All caches of a run are in the same two allocations, one for K and one for V, which exceed all hardware caches
unless the run is warm. Every call has its own keys, values and slots; the slots are random and distinct. A
gather reads sequences of at most 1024 tokens in random blocks. Bytes are keys and values, read and written,
and their scales if those are per token and head; not other scales, offsets and indices.

FlashInfer is not a peer: its append_paged_kv_cache copies without quantizing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fp8kv
from fp8kv._dtypes import CACHE_DTYPES, CACHE_NAMES, FORMATS, FP8_DTYPES
from fp8kv.bench.measure import FP8, INPUT, Call, Case, small, torch_peer, vllm_ops

APPEND = "reshape_and_cache_flash"
APPEND_DYNAMIC = "reshape_and_cache_flash_dynamic"
GATHER = "gather_and_dequant_cache"


class Work(NamedTuple):
    """The kind of a case.

    `layout` is "NHD" or "HND", `scales` are "tensor", "head", "token-head" or "channel", `dtype` is the format
    of the caches. `offsets`: each channel has one.
    """

    op: str
    layout: str
    scales: str
    dtype: torch.dtype = FP8
    offsets: bool = False


WORKS = {
    "append tensor NHD": Work(APPEND, "NHD", "tensor"),
    "append tensor HND": Work(APPEND, "HND", "tensor"),
    "append head NHD": Work(APPEND, "NHD", "head"),
    "append head HND": Work(APPEND, "HND", "head"),
    "append token-head NHD": Work(APPEND_DYNAMIC, "NHD", "token-head"),
    "append int8 channel NHD": Work(APPEND, "NHD", "channel", torch.int8),
    "append int8 channel offset NHD": Work(APPEND, "NHD", "channel", torch.int8, offsets=True),
    "gather head NHD": Work(GATHER, "NHD", "head"),
    "gather int8 channel NHD": Work(GATHER, "NHD", "channel", torch.int8),
    "gather int8 channel offset NHD": Work(GATHER, "NHD", "channel", torch.int8, offsets=True),
}
# (num_kv_heads, head_size), and the models that have them.
GEOMETRIES: dict[tuple[int, ...], tuple[str, ...]] = {
    (8, 128): ("Llama-3.1-8B", "Qwen3-8B"),
    (32, 128): ("Llama-2-7B",),
    (4, 128): ("Qwen3-30B-A3B",),
    (8, 64): (),
    (1, 128): (),
}
FIRST = (8, 128)  # the only one in quick runs, and for formats other than FP8
TOKENS = {"cuda": (1, 16, 128, 1024, 8192, 65536), "cpu": (1, 128, 1024, 8192)}
QUICK_TOKENS = {"cuda": (16, 1024), "cpu": (16,)}
CACHE_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}  # of K, and of V
WARM_CACHE_BYTES = 8 << 20
BLOCK_SIZE = 16
MAX_SEQ_LEN = 1024
KV_CACHE_DTYPE = CACHE_NAMES[FP8]


def cases(device: torch.device, quick: bool, warm: bool) -> Iterator[CacheCase]:
    caches = Caches(device, warm)
    for name, work in WORKS.items():
        for geometry in (FIRST,) if quick or work.dtype != FP8 else GEOMETRIES:
            for tokens in (QUICK_TOKENS if quick else TOKENS)[device.type]:
                yield CacheCase(name, (tokens, *geometry), device, work, caches)


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

    def views(self, heads: int, head_size: int, layout: str, dtype: torch.dtype = FP8) -> list[Tensor]:
        """[num_blocks, block_size, num_kv_heads, head_size] of the format `dtype`"""
        block = BLOCK_SIZE * heads * head_size
        whole = [memory[: len(memory) // block * block].view(tensor_dtype(dtype)) for memory in self.memory]
        if layout == "NHD":
            return [memory.view(-1, BLOCK_SIZE, heads, head_size) for memory in whole]
        return [memory.view(-1, heads, BLOCK_SIZE, head_size).transpose(1, 2) for memory in whole]


def tensor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of caches of this format: those of FP8 are bytes, as in vLLM."""
    return torch.uint8 if dtype in FP8_DTYPES else dtype


@dataclass(frozen=True)
class CacheCase(Case[tuple[Any, ...]]):
    """`shape` is [num_tokens, num_kv_heads, head_size]; the buffers of a call are the operator's arguments."""

    how: Work
    caches: Caches

    geometries = GEOMETRIES

    @property
    def size(self) -> int:
        tokens, heads, head_size = self.shape
        scale = torch.float32.itemsize if self.how.scales == "token-head" else 0
        return 2 * tokens * heads * (head_size * (INPUT.itemsize + self.how.dtype.itemsize) + scale)

    def buffers(self, count: int) -> list[tuple[Any, ...]]:
        """Keys and values distributed like activations."""
        tokens, heads, head_size = self.shape
        how, name = self.how, CACHE_NAMES[self.how.dtype]
        generator = torch.Generator(self.device).manual_seed(0)
        random: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": torch.float32}
        caches = self.caches.views(heads, head_size, how.layout, how.dtype)
        channels = (heads, head_size)
        shape = {"tensor": (1,), "channel": channels}.get(how.scales, (heads,))
        scales = [0.02 * (1 + torch.rand(shape, **random)) for _ in range(2)]
        offsets = [torch.randn(channels, **random) for _ in range(2)] if how.offsets else []
        rows = [[torch.randn(self.shape, **random).to(INPUT) for _ in range(2)] for _ in range(count)]
        if how.op == GATHER:
            length = min(tokens, MAX_SEQ_LEN)
            cu_seq_lens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=self.device)
            num_seqs, max_blocks = tokens // length, -(-length // BLOCK_SIZE)
            blocks = draws(len(caches[0]), num_seqs * max_blocks, count, generator)
            tables = [drawn.int().view(num_seqs, max_blocks) for drawn in blocks]
            seq_starts = (None,) if offsets else ()
            return [
                (*caches, *pair, table, cu_seq_lens, name, *scales, *seq_starts, *offsets)
                for pair, table in zip(rows, tables, strict=True)
            ]
        slots = draws(len(caches[0]) * BLOCK_SIZE, tokens, count, generator)
        if how.op == APPEND_DYNAMIC:
            scale_caches = [torch.zeros(cache.shape[:3], device=self.device) for cache in caches]
            return [(*pair, *caches, *scale_caches, drawn, name) for pair, drawn in zip(rows, slots, strict=True)]
        return [(*pair, *caches, drawn, name, *scales, *offsets) for pair, drawn in zip(rows, slots, strict=True)]

    def ours(self, b: tuple[Any, ...]) -> Call:
        op = getattr(fp8kv, self.how.op)
        return lambda: op(*b)

    def peer(self, name: str) -> Callable[[tuple[Any, ...]], Call] | None:
        function: Callable[..., object]
        if name != "vllm":
            function = torch_peer(name, EXPRESSIONS[self.how.op])
        elif self.how.op == APPEND and self.how.scales == "tensor" and (ops := vllm_ops()) is not None:
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
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
) -> None:
    place = (slot_mapping // BLOCK_SIZE, slot_mapping % BLOCK_SIZE)
    dtype = CACHE_DTYPES[kv_cache_dtype]
    sides = ((key, key_cache, k_scale, k_offset), (value, value_cache, v_scale, v_offset))
    for rows, cache, scale, offset in sides:
        x = rows.float() if offset is None else rows.float() - offset
        cache[place] = quantized(x / of_channels(scale), dtype).view(cache.dtype)


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
        cache[place] = quantized(x / scale.unsqueeze(-1), FP8)
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
    seq_starts: None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
) -> None:
    """For sequences that all have the same length, from their first positions on."""
    num_seqs = block_table.shape[0]
    position = torch.arange(key.shape[0] // num_seqs, device=key.device)
    place = (block_table[:, position // BLOCK_SIZE].flatten(), (position % BLOCK_SIZE).repeat(num_seqs))
    dtype = CACHE_DTYPES[kv_cache_dtype]
    sides = ((key, key_cache, k_scale, k_offset), (value, value_cache, v_scale, v_offset))
    for rows, cache, scale, offset in sides:
        x = cache[place].view(dtype).float() * of_channels(scale)
        rows.copy_(x if offset is None else x + offset)


def of_channels(scale: Tensor) -> Tensor:
    """A scale of the tensor, of each head or of each channel, as it fits rows of heads."""
    return scale if scale.dim() == 2 else scale.view(-1, 1)


def quantized(quotient: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamped and rounded; the bytes, as uint8."""
    limit = FORMATS[dtype].max
    clamped = quotient.clamp(-limit, limit)
    return (clamped if dtype.is_floating_point else clamped.round()).to(dtype).view(torch.uint8)


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
