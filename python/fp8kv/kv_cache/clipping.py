"""Counts, on the device, what a cache without given scales (so with 1.0) clips."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fp8kv._dtypes import REAL_DTYPES

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
    """Counts the elements of K and V that lie beyond the range of their scales when they are stored.

    `add` runs on the device, waits for nothing and changes `counts` in place, so it can be compiled, and
    captured in a CUDA graph, each replay of which counts. `read` waits for the device.

    Args:
        limit: the largest value of the format.
        device: of the cache.
        v_limit: the limit of V, if it has another format; infinite for a side that is not quantized.

    Attributes:
        counts: int64 ``[2]``: of K and of V.
        warned: whether the user was told.

    Example:
        >>> import torch
        >>> from fp8kv.kv_cache.clipping import ClipCounter
        >>> counter, one = ClipCounter(448.0, torch.device("cpu")), torch.tensor([1.0])
        >>> key = torch.tensor([500.0, -500.0, 448.0]).view(3, 1, 1)
        >>> counter.add(key, key / 2, torch.tensor([7, 8, -1]), one, one)
        >>> counter.read()
        Clipped(k=2, v=0)
    """

    def __init__(self, limit: float, device: torch.device, v_limit: float | None = None) -> None:
        self.limit = limit
        self.v_limit = limit if v_limit is None else v_limit
        # A tensor made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.warned = False

    def add(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        k_offset: Tensor | None = None,
        v_offset: Tensor | None = None,
    ) -> None:
        """Counts tokens that are stored: elements with ``|x - offset| > scale * limit``, infinite ones too.

        Args:
            key: ``[num_tokens, num_kv_heads, head_size]``; rows beyond the slots are not counted, nor rows
                that are quantized already.
            value: likewise.
            slot_mapping: ``[num_tokens]``; tokens with a negative slot are not counted.
            k_scale: float32 of 1 or num_kv_heads elements, or ``[num_kv_heads, head_size]``.
            v_scale: likewise.
            k_offset: float32 ``[num_kv_heads, head_size]``; None: 0.
            v_offset: likewise.
        """
        num_tokens = slot_mapping.shape[0]
        given = ((key, k_scale, k_offset, self.limit), (value, v_scale, v_offset, self.v_limit))
        for index, (x, scale, offset, limit) in enumerate(given):
            if limit == math.inf or x.dtype not in REAL_DTYPES:
                continue
            x = x.detach()[:num_tokens]
            if offset is not None or not self._is_within(x, scale, limit):
                self.counts[index].add_(_num_beyond(x, scale * limit, offset, slot_mapping))

    def _is_within(self, x: Tensor, scale: Tensor, limit: float) -> bool:
        """Whether nothing is beyond the range, as one operation tells on the CPU; False: unknown."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) is not Tensor:
            return False
        # A NaN makes the norm NaN. Rounding of `scale * limit` to float32 can't pass a float32 norm below it.
        lowest = min(scale.flatten().tolist(), default=math.inf) * limit
        return x.numel() == 0 or float(torch.linalg.vector_norm(x, math.inf)) <= lowest

    def read(self) -> Clipped:
        """What was clipped since the counter was made, or since ``counts.zero_()``."""
        return Clipped(*self.counts.tolist())


def _num_beyond(x: Tensor, bound: Tensor, offset: Tensor | None, slot_mapping: Tensor) -> Tensor:
    """How many elements of stored tokens are beyond the bound of their head or channel."""
    bound = bound if bound.shape == x.shape[1:] else bound.reshape(-1, 1)
    stored = (slot_mapping >= 0).view(-1, 1, 1)
    # Not in compiled code: it is fused, so that it needs no such memory, and its sizes are symbols.
    rows = len(x) if torch.compiler.is_compiling() else _CHUNK // max(1, x[:1].numel())
    parts = zip(torch.split(x, max(1, rows)), torch.split(stored, max(1, rows)), strict=True)
    counts = [(((part if offset is None else part.float() - offset).abs() > bound) & kept).sum() for part, kept in parts]
    return torch.stack(counts).sum()


def clipped_sentence(where: str, clipped: Clipped, limit: float) -> str:
    """The warning of a cache without given scales that clipped something.

    Example:
        >>> from fp8kv.kv_cache.clipping import Clipped, clipped_sentence
        >>> print(clipped_sentence("PagedKVCache", Clipped(k=1200, v=0), 448.0))
        PagedKVCache: 1,200 elements of K and 0 of V were clipped, as they were beyond the range of a cache
        that was given no scales (448 with the scale 1.0); give it those of fp8kv.calibrate or of a
        checkpoint, or scales="dynamic"
    """
    return (
        f"{where}: {clipped.k:,} elements of K and {clipped.v:,} of V were clipped, as they were beyond the "
        f"range of a cache that was given no scales ({limit:g} with the scale 1.0); give it those of "
        'fp8kv.calibrate or of a checkpoint, or scales="dynamic"'
    )
