"""What a cache clips whose scales are 1.0 because it was given none: counted on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Elements that `ClipCounter.add` looks at in one go, which bounds its temporary memory.
_CHUNK = 1 << 21


class Clipped(NamedTuple):
    """How many elements of K and of V were clipped, infinite ones included.

    Example:
        >>> from fp8kv.kv_cache.clipping import Clipped
        >>> sum(Clipped(k=3, v=1))
        4
    """

    k: int
    v: int


class ClipCounter:
    """Counts the elements stored with the scale 1.0 that lie beyond the range of their format.

    `add` runs on the device, waits for nothing and changes `counts` in place, so it can be compiled, and
    captured in a CUDA graph, each replay of which counts. `read` waits for the device.

    Args:
        limit: the largest magnitude that is not clipped: the largest value of the format.
        device: of the cache.

    Attributes:
        counts: int64 ``[2]``: of K and of V.
        warned: whether the user was told.

    Example:
        >>> import torch
        >>> from fp8kv.kv_cache.clipping import ClipCounter
        >>> counter = ClipCounter(448.0, torch.device("cpu"))
        >>> key = torch.tensor([500.0, -500.0, 448.0]).view(3, 1, 1)
        >>> counter.add(key, key / 2, torch.tensor([7, 8, -1]))
        >>> counter.read()
        Clipped(k=2, v=0)
    """

    def __init__(self, limit: float, device: torch.device) -> None:
        self.limit = limit
        # A tensor made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.warned = False

    def add(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Counts tokens that are stored; the arguments are those of `reshape_and_cache_flash`.

        Args:
            key: ``[num_tokens, num_kv_heads, head_size]``; rows beyond the slots are not counted.
            value: likewise.
            slot_mapping: ``[num_tokens]``; tokens with a negative slot are not counted.
        """
        num_tokens = slot_mapping.shape[0]
        stored = (slot_mapping >= 0).view(-1, 1, 1)
        for count, x in zip(self.counts.unbind(), (key, value), strict=True):
            x = x.detach()[:num_tokens]
            # Compiled code needs no temporary memory, and its sizes should stay symbols.
            rows = num_tokens if torch.compiler.is_compiling() else _CHUNK // max(1, x[:1].numel())
            rows = max(1, rows)
            for part, kept in zip(torch.split(x, rows), torch.split(stored, rows), strict=True):
                count.add_(((part.abs() > self.limit) & kept).sum())

    def read(self) -> Clipped:
        """What was clipped since the counter was made, or since ``counts.zero_()``."""
        return Clipped(*self.counts.tolist())


def clipped_sentence(where: str, clipped: Clipped, limit: float) -> str:
    """The warning of a cache that clipped something.

    Example:
        >>> from fp8kv.kv_cache.clipping import Clipped, clipped_sentence
        >>> print(clipped_sentence("PagedKVCache", Clipped(k=1200, v=0), 448.0))
        PagedKVCache: 1,200 elements of K and 0 of V were clipped to 448, the end of the range with the scale
        1.0 of a cache that was given no scales; give it those of fp8kv.calibrate or of a checkpoint, or
        scales="dynamic"
    """
    return (
        f"{where}: {clipped.k:,} elements of K and {clipped.v:,} of V were clipped to {limit:g}, the end of "
        "the range with the scale 1.0 of a cache that was given no scales; give it those of fp8kv.calibrate "
        'or of a checkpoint, or scales="dynamic"'
    )
