"""`Clipping`: counts what the layers of a cache without explicit scales clip, and warns about it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fp8kv.kv_cache import PagedKVCache
from fp8kv.kv_cache.clipping import ClipCounter, Clipped, clipped_sentence


class Clipping:
    """One `ClipCounter` per device, and one warning for all layers."""

    def __init__(self) -> None:
        self.counters: dict[str, ClipCounter] = {}
        self.warned = False
        self._on_its_way: tuple[Any, list[Tensor]] | None = None  # GPU counts, and the event after them

    def __getstate__(self) -> dict[str, Any]:
        """Without counts on their way, as events can't be copied; they are asked for again."""
        return vars(self) | {"_on_its_way": None}

    def watch(self, storage: PagedKVCache) -> None:
        """Makes a new storage use the counter of its device, if it counts at all."""
        if storage.clip_counter is not None:
            counter = self.counters.setdefault(str(storage.device), storage.clip_counter)
            counter.warned = True  # so that `PagedKVCache` does not warn
            storage.clip_counter = counter

    def read(self) -> Clipped:
        """The counts so far; synchronizes."""
        counts = [counter.read() for counter in self.counters.values()]
        clipped = Clipped(sum(count.k for count in counts), sum(count.v for count in counts))
        self._warn(clipped)
        return clipped

    def look(self) -> None:
        """Warns about clipping as soon as it is known without synchronization."""
        if self.warned or not self.counters or torch.compiler.is_compiling():
            return
        counts = [counter.counts for counter in self.counters.values()]
        if all(count.device.type == "cpu" for count in counts):
            self.read()
        elif not torch.cuda.is_current_stream_capturing():
            self._look_at_gpu(counts)

    def _look_at_gpu(self, counts: list[Tensor]) -> None:
        if self._on_its_way is None:
            copies = [count.to("cpu", non_blocking=True) for count in counts]
            self._on_its_way = torch.cuda.current_stream().record_event(), copies
        elif self._on_its_way[0].query():
            self._warn(Clipped(*torch.stack(self._on_its_way[1]).sum(0).tolist()))
            self._on_its_way = None

    def _warn(self, clipped: Clipped) -> None:
        if any(clipped) and not self.warned:
            self.warned = True
            limit = next(iter(self.counters.values())).limit
            warnings.warn(clipped_sentence("Fp8Cache", clipped, limit), stacklevel=2)
