"""Attention that reads the paged KV cache, on the geometries of known models.

The bytes of a call are the keys and values that its queries see, with their scales if they are per token and
head. K and V of all calls are in two allocations; each call has its own blocks, in random order. Queries are
bf16. The error of a result is the norm of its difference from fp64 arithmetic on the dequantized cache,
relative to the norm of the latter, for the first KV head of the first and the last sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fp8kv
from fp8kv._dtypes import CACHE_NAMES
from fp8kv.bench import attention_peers
from fp8kv.bench.kv_cache import BLOCK_SIZE, quantized, tensor_dtype
from fp8kv.bench.measure import FP8, INPUT, Call, Case, small

OP = "paged_attention"


class Work(NamedTuple):
    """The kind of a case.

    `layout` is "NHD", "HND", or "side by side": K and V of a token and head are adjacent. `scales` are
    "tensor", "head", "token-head" or "channel". Each sequence has `queries` queries, for its last tokens.
    `ragged`: lengths are random, the longest is the context. `window` is the number of positions that a query
    sees, 0: all. `dtype` is the format of the caches. `offsets`: each channel has one.
    """

    layout: str = "NHD"
    scales: str = "head"
    queries: int = 1
    ragged: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = FP8
    offsets: bool = False


PLAIN = "decode head NHD"
WINDOW = "window 1024 head NHD"
WORKS = {
    PLAIN: Work(),
    "decode head HND": Work(layout="HND"),
    "decode head side by side": Work(layout="side by side"),
    "decode tensor NHD": Work(scales="tensor"),
    "decode token-head NHD": Work(scales="token-head"),
    "decode int8 channel NHD": Work(scales="channel", dtype=torch.int8),
    "decode int8 channel offset NHD": Work(scales="channel", dtype=torch.int8, offsets=True),
    "ragged head NHD": Work(ragged=True),
    WINDOW: Work(window=1024),
    "softcap head NHD": Work(softcap=50.0),
    "sinks head NHD": Work(sinks=True),
    "2 queries head NHD": Work(queries=2),
    "4 queries head NHD": Work(queries=4),
    "8 queries head NHD": Work(queries=8),
}
# (num_heads, num_kv_heads, head_size), and the models that have them.
GEOMETRIES: dict[tuple[int, ...], tuple[str, ...]] = {
    (32, 8, 128): ("Llama-3.1-8B", "Qwen3-8B"),
    (32, 32, 128): ("Llama-2-7B",),
    (64, 8, 128): ("Llama-3.1-70B",),
    (32, 4, 128): ("Qwen3-30B-A3B",),
    (32, 2, 256): ("Qwen3.5-397B-A17B",),
    (8, 4, 256): ("Gemma-3-4B",),
    (4, 1, 256): ("Gemma-3-1B",),
    (32, 8, 64): ("Llama-3.2-1B",),
}
FIRST = (32, 8, 128)
WINDOW_GEOMETRIES = (FIRST, (8, 4, 256), (4, 1, 256))
# (sequences, context), for the plain case and for the others; multiples of a block.
SIZES = {
    "cuda": ((1, 1024), (1, 8192), (1, 32768), (1, 131072), (16, 8192), (64, 8192), (256, 1024)),
    "cpu": ((1, 1024), (1, 4096), (1, 32768), (8, 4096)),
}
WORK_SIZES = {"cuda": ((16, 8192), (64, 8192)), "cpu": ((8, 4096),)}
QUICK_SIZES = {"cuda": ((16, 1024),), "cpu": ((2, 256),)}
#: Standard deviation of the elements of the caches, without their scale.
SPREAD = 32.0
#: The period of the elements; a prime number, so that neither K and V nor heads are equal.
PATTERN = 1_000_003
#: The order of the dimensions of the caches: K or V, block, offset, head, channel.
_IN_MEMORY = {"NHD": (0, 1, 2, 3, 4), "HND": (0, 1, 3, 2, 4), "side by side": (1, 2, 3, 0, 4)}


def cases(device: torch.device, quick: bool, warm: bool) -> Iterator[AttentionCase]:
    for name, work in WORKS.items():
        geometries = {PLAIN: tuple(GEOMETRIES), WINDOW: WINDOW_GEOMETRIES}.get(name, (FIRST,))
        sizes = QUICK_SIZES if quick else SIZES if name == PLAIN else WORK_SIZES
        for geometry in (FIRST,) if quick else geometries:
            for size in sizes[device.type]:
                yield AttentionCase(name, (*size, *geometry), device, work)


@dataclass(frozen=True)
class Buffers:
    """The tensors of one call. `table` is [batch, blocks of the context]; see `fp8kv.paged_attention`."""

    query: Tensor
    out: Tensor
    key_cache: Tensor
    value_cache: Tensor
    k_scale: Tensor
    v_scale: Tensor
    k_offset: Tensor | None
    v_offset: Tensor | None
    table: Tensor
    lengths: Tensor
    cu_query_lens: Tensor
    sinks: Tensor | None


@dataclass(frozen=True)
class AttentionCase(Case[Buffers]):
    """`shape` is [batch, context, num_heads, num_kv_heads, head_size]."""

    how: Work

    @property
    def models(self) -> tuple[str, ...]:
        return GEOMETRIES.get(self.shape[2:], ())

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def context(self) -> int:
        return self.shape[1]

    @property
    def num_heads(self) -> int:
        return self.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.shape[3]

    @property
    def head_size(self) -> int:
        return self.shape[4]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if not self.how.ragged:
            return [self.context] * self.batch
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(1, self.context + 1, (self.batch - 1,), generator=generator)
        return [self.context, *random.tolist()]

    @property
    def size(self) -> int:
        window = self.how.window or self.context
        seen = sum(min(length, window + self.how.queries - 1) for length in self.lengths)
        scale = torch.float32.itemsize if self.how.scales == "token-head" else 0
        return 2 * seen * self.num_kv_heads * (self.head_size * self.how.dtype.itemsize + scale)

    def buffers(self, count: int) -> list[Buffers]:
        """Keys, values and queries of mean 0 and standard deviation 1, to which offsets of channels are added."""
        batch, queries = self.batch, self.how.queries
        generator = torch.Generator(self.device).manual_seed(0)
        random: dict[str, Any] = {"generator": generator, "device": self.device}
        width = self.context // BLOCK_SIZE
        blocks = count * batch * width
        keys, values = self._caches(blocks, generator)
        channels = keys.shape[2:]
        shapes = {"tensor": (1,), "head": channels[:1], "token-head": keys.shape[:3], "channel": channels}
        k_scale, v_scale = ((0.75 + 0.5 * torch.rand(shapes[self.how.scales], **random)) / SPREAD for _ in range(2))
        k_offset, v_offset = (torch.randn(channels, **random) if self.how.offsets else None for _ in range(2))
        tables = torch.randperm(blocks, **random).int().view(count, batch, width)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        sums = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * queries
        sinks = torch.randn(self.num_heads, **random) if self.how.sinks else None
        made = []
        for table in tables:
            query = torch.randn(batch * queries, self.num_heads, self.head_size, **random).to(INPUT)
            out = torch.empty_like(query)
            made.append(Buffers(query, out, keys, values, k_scale, v_scale, k_offset, v_offset, table, lengths, sums, sinks))
        return made

    def _caches(self, blocks: int, generator: torch.Generator) -> list[Tensor]:
        """K and V, [blocks, block size, num_kv_heads, head_size]"""
        shape = (2, blocks, BLOCK_SIZE, self.num_kv_heads, self.head_size)
        in_memory = _IN_MEMORY[self.how.layout]
        pattern = SPREAD * torch.randn(PATTERN, generator=generator, device=self.device)
        size = math.prod(shape)
        memory = quantized(pattern, self.how.dtype).repeat(-(-size // len(pattern)))[:size]
        caches = memory.view(tensor_dtype(self.how.dtype)).view([shape[i] for i in in_memory])
        return list(caches.permute([in_memory.index(i) for i in range(5)]))

    def ours(self, b: Buffers) -> Call:
        options: dict[str, Any] = {
            "kv_cache_dtype": CACHE_NAMES[self.how.dtype],
            "k_scale": b.k_scale,
            "v_scale": b.v_scale,
            "k_offset": b.k_offset,
            "v_offset": b.v_offset,
            "max_seq_len": self.context,
            "sliding_window": self.how.window,
            "softcap": self.how.softcap,
            "sinks": b.sinks,
            "out": b.out,
        }
        if self.how.queries > 1:
            options |= {"cu_query_lens": b.cu_query_lens, "max_query_len": self.how.queries}
        return lambda: fp8kv.paged_attention(b.query, b.key_cache, b.value_cache, b.table, b.lengths, **options)

    def peer(self, name: str) -> Callable[[Buffers], Call] | None:
        """In one layout only."""
        adapters = attention_peers.CUDA_PEERS if self.device.type == "cuda" else attention_peers.CPU_PEERS
        return adapters[name](self) if self.how.layout == "NHD" else None

    def error(self, b: Buffers, result: Any) -> float | None:
        """The relative error of a result [tokens, num_heads, head_size]."""
        queries = self.how.queries
        sample = sorted({0, self.batch - 1})
        found = [result[s * queries : (s + 1) * queries, : self.group].double() for s in sample]
        exact = torch.cat([self.exact(b, s) for s in sample])
        return float((torch.cat(found) - exact).norm() / exact.norm())

    def exact(self, b: Buffers, sequence: int) -> Tensor:
        """The result for the first KV head of a sequence in fp64: [queries, heads of the group, head_size]"""
        queries, length = self.how.queries, self.lengths[sequence]
        position = torch.arange(length, device=self.device)
        place = (b.table[sequence][position // BLOCK_SIZE].long(), position % BLOCK_SIZE)
        keys = self._dequantized(b.key_cache, place, b.k_scale, b.k_offset)
        values = self._dequantized(b.value_cache, place, b.v_scale, b.v_offset)
        query = b.query[sequence * queries : (sequence + 1) * queries, : self.group].double()
        logits = query @ keys.T * self.head_size**-0.5
        if self.how.softcap:
            logits = self.how.softcap * torch.tanh(logits / self.how.softcap)
        own = torch.arange(length - queries, length, device=self.device).view(-1, 1, 1)
        unseen = position > own
        if self.how.window:
            unseen |= position <= own - self.how.window
        logits = logits.masked_fill(unseen, -math.inf)
        if b.sinks is not None:
            sinks = b.sinks[: self.group].double().view(1, -1, 1).expand(queries, -1, 1)
            logits = torch.cat((logits, sinks), -1)
        weights: Tensor = logits.softmax(-1)[..., :length]
        return weights @ values

    def _dequantized(self, cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor, offset: Tensor | None) -> Tensor:
        """The first head at these slots in fp64: [slots, head_size]"""
        x = cache[place][:, 0].view(self.how.dtype).double() * _scale(scale, place)
        return x if offset is None else x + offset[0].double()


def _scale(scale: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """The scales of the first head at each slot: [slots, 1]; or one element, or those of its channels."""
    if scale.dim() == 3:
        return scale[place][:, :1].double()
    return scale[:1].double()


def host_calls(device: torch.device) -> dict[str, Call]:
    """Calls for `host_cost`."""
    query = small(4, device)
    tokens, _, head_size = query.shape
    keys, values = torch.zeros(2, 1, BLOCK_SIZE, 2, head_size, dtype=FP8, device=device)
    table = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
    lengths, scale = torch.ones(tokens, dtype=torch.int32, device=device), torch.ones(1, device=device)
    options: dict[str, Any] = {"k_scale": scale, "v_scale": scale, "out": torch.empty_like(query)}
    return {OP: lambda: fp8kv.paged_attention(query, keys, values, table, lengths, **options)}
