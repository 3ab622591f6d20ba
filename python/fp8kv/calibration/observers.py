"""Observers: find one scale per head from all elements of K, V or Q that calibration observes.

Every observer keeps running statistics on the device of its tensors and never synchronizes before `scales`.

Example:
    >>> import torch
    >>> from fp8kv.calibration.observers import make_observer
    >>> observer = make_observer("static_minmax", num_heads=2)
    >>> for batch in torch.tensor([[[[7.0], [-28.0]]], [[[-14.0], [1.0]]]]):  # each of 1 token, 2 heads of 1
    ...     observer.update(batch)
    >>> observer.scales().tolist()
    [0.03125, 0.0625]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fp8kv._checks import quoted
from fp8kv._dtypes import DEFAULT_FORMAT
from fp8kv.quantization import dequantize, quantize, raise_head_amax, scale_of_amax

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The names that `make_observer` accepts.
OBSERVERS = ("static_minmax", "percentile", "mse")
#: Factors of amax / 448 that `MSEObserver` compares; the first wins if errors are equal.
MSE_FACTORS = tuple(percent / 100 for percent in range(100, 19, -1))


class Observer(Protocol):
    """The interface of an observer of one tensor of one layer.

    Attributes:
        num_heads: the number of scales.
        counts: int64 ``[2]``: all elements observed, and the NaN and infinite ones among them.
    """

    num_heads: int
    counts: Tensor

    def update(self, x: Tensor) -> None:
        """Observes ``[num_tokens, num_heads, head_size]``."""

    def reduce(self, group: ProcessGroup | None) -> None:
        """Merges the statistics of all ranks of `group`, None: the default group. A collective call."""

    def scales(self) -> Tensor:
        """float32 ``[num_heads]``."""


def make_observer(name: str, num_heads: int, *, percentile: float = 99.99, device: torch.device | str = "cpu") -> Observer:
    """The observer of that name: "static_minmax", "percentile" or "mse".

    Raises:
        ValueError: there is no such observer, or a percentile that is not above 0 and at most 100.

    Example:
        >>> from fp8kv.calibration.observers import make_observer
        >>> type(make_observer("mse", num_heads=8)).__name__
        'MSEObserver'
    """
    makers: dict[str, Callable[[], Observer]] = {
        "static_minmax": lambda: MinMaxObserver(num_heads, device),
        "percentile": lambda: PercentileObserver(num_heads, percentile, device),
        "mse": lambda: MSEObserver(num_heads, device),
    }
    check_observer("make_observer: name", name)
    return makers[name]()


def check_observer(what: str, name: str) -> None:
    """A `ValueError` that begins with `what` unless there is an observer of this name."""
    if name not in OBSERVERS:
        raise ValueError(f"{what} must be one of {', '.join(map(quoted, OBSERVERS))}, got {name!r}")


class MinMaxObserver:
    """``amax / 448``, where amax is the largest finite magnitude of all elements observed.

    Args:
        num_heads: the number of scales.
        device: of the tensors that come.

    Example:
        >>> import torch
        >>> from fp8kv.calibration.observers import MinMaxObserver
        >>> observer = MinMaxObserver(num_heads=1)
        >>> observer.update(torch.tensor([[[7.0, -14.0, float("nan")]]]))
        >>> observer.scales().tolist(), observer.counts.tolist()
        ([0.03125], [3, 1])
    """

    def __init__(self, num_heads: int, device: torch.device | str = "cpu") -> None:
        self.num_heads = num_heads
        self.amax = torch.zeros(num_heads, dtype=torch.float32, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        raise_head_amax(self.amax, x)
        self.counts[0] += x.numel()
        self.counts[1] += x.isfinite().logical_not().sum()

    def reduce(self, group: ProcessGroup | None) -> None:
        from torch.distributed import ReduceOp

        _all_reduce(self.amax, ReduceOp.MAX, group)
        _all_reduce(self.counts, ReduceOp.SUM, group)

    def scales(self) -> Tensor:
        return scale_of_amax(self.amax, DEFAULT_FORMAT.dtype)


class ChannelObserver:
    """The least, the largest and the mean of all finite elements of each channel.

    From these come, after the last batch, offsets and the scales of any format and strategy.

    Args:
        num_heads: heads of K, or of V.
        head_size: elements of a head.
        device: of the tensors that come.

    Example:
        >>> import torch
        >>> from fp8kv.calibration.observers import ChannelObserver
        >>> observer = ChannelObserver(num_heads=1, head_size=2)
        >>> observer.update(torch.tensor([[[8.0, -1.0]], [[10.0, 1.0]], [[15.0, 0.0]]]))
        >>> mean = observer.offset("mean")
        >>> mean.tolist(), observer.offset("mid").tolist(), observer.amax(mean).tolist()
        ([[11.0, 0.0]], [[11.5, 0.0]], [[4.0, 1.0]])
    """

    def __init__(self, num_heads: int, head_size: int, device: torch.device | str = "cpu") -> None:
        self.num_heads = num_heads
        shape = (num_heads, head_size)
        self.low = torch.full(shape, math.inf, device=device)
        self.high = torch.full(shape, -math.inf, device=device)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self.number = torch.zeros(shape, dtype=torch.int64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        finite = x.isfinite()
        self.low = torch.minimum(self.low, torch.where(finite, x, math.inf).amin(0).float())
        self.high = torch.maximum(self.high, torch.where(finite, x, -math.inf).amax(0).float())
        self.sum += torch.where(finite, x, 0).sum(0, dtype=torch.float64)
        self.number += finite.sum(0)
        self.counts[0] += x.numel()
        self.counts[1] += x.numel() - finite.sum()

    def reduce(self, group: ProcessGroup | None) -> None:
        from torch.distributed import ReduceOp

        _all_reduce(self.low, ReduceOp.MIN, group)
        _all_reduce(self.high, ReduceOp.MAX, group)
        for total in (self.sum, self.number, self.counts):
            _all_reduce(total, ReduceOp.SUM, group)

    def merged(self, other: ChannelObserver) -> ChannelObserver:
        """One that has seen what both have seen."""
        result = ChannelObserver(self.num_heads, self.low.shape[1], self.low.device)
        theirs = {name: x.to(self.low.device) for name, x in vars(other).items() if isinstance(x, Tensor)}
        result.low = torch.minimum(self.low, theirs["low"])
        result.high = torch.maximum(self.high, theirs["high"])
        for name in ("sum", "number", "counts"):
            setattr(result, name, getattr(self, name) + theirs[name])
        return result

    def offset(self, kind: str) -> Tensor | None:
        """float32 ``[num_heads, head_size]``: 0 for a channel without a finite element; None for "none".

        Args:
            kind: "none", "mean", or "mid": the middle between the least and the largest element.
        """
        if kind == "none":
            return None
        middle = (self.low.double() + self.high.double()) / 2
        found = self.sum / self.number if kind == "mean" else middle
        return torch.where(self.number > 0, found, 0).float()

    def amax(self, offset: Tensor | None = None) -> Tensor:
        """float32 ``[num_heads, head_size]``: the largest finite magnitude of x - offset, rounded as a cache
        rounds it; 0 for a channel without a finite element."""
        shift = 0 if offset is None else offset
        largest = torch.maximum(self.high - shift, shift - self.low)
        return torch.where(self.number > 0, largest, 0).clamp(max=torch.finfo(torch.float32).max)

    def scales(self) -> Tensor:
        return scale_of_amax(self.amax().amax(1), DEFAULT_FORMAT.dtype)


class _HistogramObserver(MinMaxObserver):
    """Counts magnitudes in bins whose upper edges are the bf16 numbers from 2^-16 to 2^16.

    A bf16 element within that range is the upper edge of its bin, so it is counted exactly; elements of other
    types are rounded up. The first bin counts smaller elements, such as zeros, and the last larger ones.
    """

    LOWEST, HIGHEST = -16, 16  # exponents
    #: 7 mantissa bits per exponent, and the bins below and above.
    NUM_BINS = (HIGHEST - LOWEST) * 128 + 2
    # Elements at a time, which bounds the memory of a very large batch.
    _CHUNK = 1 << 22

    def __init__(self, num_heads: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_heads, device)
        self.histogram = torch.zeros(num_heads, self.NUM_BINS, dtype=torch.int64, device=device)
        self._first_bin = torch.arange(num_heads, device=device).view(1, num_heads, 1) * self.NUM_BINS

    def update(self, x: Tensor) -> None:
        super().update(x)
        if x.numel() == 0:
            return
        for part in torch.split(x, max(1, self._CHUNK // (x.shape[1] * x.shape[2]))):
            finite = part.isfinite()
            magnitude = torch.where(finite, part, 0).float().abs()
            # Positive floats are ordered like their bits, and the upper 16 bits are the bits in bf16.
            bf16 = (magnitude.view(torch.int32) + 0xFFFF) >> 16
            bins = (bf16 - (127 + self.LOWEST) * 128 + 1).clamp(0, self.NUM_BINS - 1)
            self.histogram.view(-1).scatter_add_(0, (bins + self._first_bin).flatten(), finite.to(torch.int64).flatten())

    def reduce(self, group: ProcessGroup | None) -> None:
        from torch.distributed import ReduceOp

        super().reduce(group)
        _all_reduce(self.histogram, ReduceOp.SUM, group)

    def _edges(self) -> Tensor:
        """The upper edges of all bins except the last, which has none: float32."""
        first = (127 + self.LOWEST) * 128
        bf16 = torch.arange(first - 1, first + self.NUM_BINS - 2, device=self.amax.device, dtype=torch.int32)
        return (bf16 << 16).view(torch.float32)


class PercentileObserver(_HistogramObserver):
    """A percentile of the magnitudes, divided by 448; larger elements will be clipped.

    The percentile is the smallest magnitude that `percentile` percent of all finite elements do not exceed;
    exact for bf16 elements between 2^-16 and 2^16, otherwise rounded up to the next bf16 number, but not
    beyond amax, which also represents all elements above 2^16.

    Args:
        num_heads: the number of scales.
        percentile: above 0, at most 100.
        device: of the tensors that come.

    Raises:
        ValueError: the percentile is out of range.

    Example:
        >>> import torch
        >>> from fp8kv.calibration.observers import PercentileObserver
        >>> observer = PercentileObserver(num_heads=1, percentile=99)
        >>> observer.update(torch.arange(1, 101).view(100, 1, 1).bfloat16())
        >>> (observer.scales() * 448).round().tolist()
        [99.0]
    """

    def __init__(self, num_heads: int, percentile: float = 99.99, device: torch.device | str = "cpu") -> None:
        if not 0 < percentile <= 100:
            raise ValueError(f"PercentileObserver: percentile must be above 0 and at most 100, got {percentile!r}")
        super().__init__(num_heads, device)
        self.percentile = percentile

    def scales(self) -> Tensor:
        # In integers: 99.99 percent of 10,000 elements are exactly 9,999.
        share = Fraction(str(self.percentile)) / 100
        wanted = [max(1, math.ceil(count * share)) for count in self.histogram.sum(1).tolist()]
        needed = torch.tensor(wanted, device=self.amax.device).unsqueeze(1)
        index = (self.histogram.cumsum(1) < needed).sum(1)
        edges = torch.cat([self._edges(), self.amax.new_full((2,), math.inf)])
        return scale_of_amax(torch.minimum(edges[index], self.amax), DEFAULT_FORMAT.dtype)


class MSEObserver(_HistogramObserver):
    """The scale with the smallest squared quantization error, of ``amax / 448 * f`` for f in `MSE_FACTORS`.

    The factors are 1.00, 0.99, ... 0.20; if errors are equal, the largest scale wins. Elements count as the
    upper edges of their bins: exact for bf16 elements between 2^-16 and 2^16, otherwise rounded up to the
    next bf16 number. Larger elements count as amax, smaller ones as 0.

    Args:
        num_heads: the number of scales.
        device: of the tensors that come.

    Example:
        >>> import torch
        >>> from fp8kv.calibration.observers import MSEObserver
        >>> observer = MSEObserver(num_heads=1)
        >>> observer.update(torch.full((100, 1, 1), 448.0))
        >>> observer.scales().tolist()
        [1.0]
    """

    def scales(self) -> Tensor:
        values = self._edges().expand(self.num_heads, -1)
        values = torch.cat([values, self.amax.unsqueeze(1)], 1)
        values[:, 0] = 0
        # A bin's edge may be above the largest element in it.
        values = torch.minimum(values, self.amax.unsqueeze(1))
        weights = self.histogram.double()
        base = self.amax / torch.full_like(self.amax, DEFAULT_FORMAT.max)
        smallest = torch.full_like(base, DEFAULT_FORMAT.min_scale)
        best = torch.maximum(base, smallest)
        least = torch.full_like(base, math.inf, dtype=torch.float64)
        for factor in MSE_FACTORS:
            scale = torch.maximum(base * factor, smallest)
            q, _ = quantize(values, scale.unsqueeze(1), dtype=DEFAULT_FORMAT.dtype)
            difference = dequantize(q, scale.unsqueeze(1), dtype=torch.float32).double() - values.double()
            error = (difference.square() * weights).sum(1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best


def sum_of_ranks(tensor: Tensor, group: ProcessGroup | None) -> None:
    """Adds a tensor over all ranks, in place."""
    from torch.distributed import ReduceOp

    _all_reduce(tensor, ReduceOp.SUM, group)


def _all_reduce(tensor: Tensor, operation: object, group: ProcessGroup | None) -> None:
    """In place, through a device that the group can reduce on: layers may be on any."""
    import torch.distributed as dist

    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    reduced = tensor.to(device)
    dist.all_reduce(reduced, operation, group=group)
    if reduced is not tensor:
        tensor.copy_(reduced)
