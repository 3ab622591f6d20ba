"""From the statistics of channels to the scales of a layer, in any format and strategy and with offsets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fp8kv._checks import STANDARD_STRATEGIES, STRATEGIES, Strategy, check_choice, is_number
from fp8kv._dtypes import CACHE_DTYPES, DEFAULT_FORMAT, QUANTIZED_CACHE_NAMES
from fp8kv.calibration.observers import ChannelObserver, MinMaxObserver, Observer
from fp8kv.checkpoint.scales import LayerScales
from fp8kv.quantization import scale_of_amax

#: What `calibrate` and the command line accept.
OFFSETS = ("none", "mean", "mid")
AUTO = "auto"
DTYPES = (*QUANTIZED_CACHE_NAMES, AUTO)
#: What engines understand by FP8.
_DEFAULT = DEFAULT_FORMAT.cache_names[0]


class Choice(NamedTuple):
    """How K and V of a layer are stored.

    Attributes:
        dtype: a name of the format.
        strategy: "tensor", "attn_head" or "channel".
        k_offset: "none", "mean" or "mid".
        v_offset: likewise.
    """

    dtype: str
    strategy: Strategy
    k_offset: str = "none"
    v_offset: str = "none"


class Wanted(NamedTuple):
    """Arguments of `calibrate`.

    Attributes:
        strategy: None with `dtype` "auto": that is chosen too.
        dtype: one of `DTYPES`.
        offset: "none", "mean" or "mid", for K and V.
        headroom: factor of the range.
    """

    strategy: Strategy | None
    dtype: str
    offset: str
    headroom: float

    @property
    def is_plain(self) -> bool:
        """Whether observers of heads are enough, which find FP8 scales without headroom."""
        plain = self.dtype in DEFAULT_FORMAT.cache_names and self.strategy in STANDARD_STRATEGIES
        return plain and (self.offset, self.headroom) == ("none", 1.0)

    @property
    def standard(self) -> Strategy:
        """The strategy of the scales for engines that know no others."""
        fp8 = self.dtype != AUTO and CACHE_DTYPES[self.dtype].is_floating_point
        return "tensor" if self.strategy == "tensor" and fp8 else "attn_head"

    def choices(self) -> list[Choice]:
        """One, or for "auto" those to compare; if some are equally good, the first is taken."""
        if self.dtype != AUTO:
            assert self.strategy is not None
            return [Choice(self.dtype, self.strategy, self.offset, self.offset)]
        offsets = [("none", "none")] + [(k, v) for k in ("mean", "mid") for v in ("none", k)]
        formats: tuple[tuple[str, Strategy], ...] = ((_DEFAULT, "attn_head"), ("int8", "channel"))
        return [Choice(dtype, self.strategy or strategy, *offset) for dtype, strategy in formats for offset in offsets]


def check_wanted(wanted: Wanted, observer: str) -> None:
    """Checks the arguments of `calibrate`.

    Raises:
        ValueError: one can't be used, or they don't fit together.
    """
    strategy, dtype, offset, headroom = wanted
    check_choice("calibrate: dtype", dtype, DTYPES)
    if strategy is None and dtype != AUTO:
        raise ValueError(f'calibrate: strategy must be given unless dtype is "{AUTO}", got None')
    if strategy is not None:
        check_choice("calibrate: strategy", strategy, STRATEGIES)
    check_choice("calibrate: offset", offset, OFFSETS)
    if dtype == AUTO and offset != "none":
        raise ValueError(f'calibrate: offset must be "none" with dtype "{AUTO}", which chooses it, got {offset!r}')
    if not is_number(headroom) or not 0 < headroom < math.inf:
        raise ValueError(f"calibrate: headroom must be finite and above 0, got {headroom!r}")
    if observer != "static_minmax" and not wanted.is_plain:
        raise ValueError(
            'calibrate: observer must be "static_minmax" with scales per channel, other formats than "fp8", '
            f"offsets or headroom, got {observer!r}"
        )


def scale_of(amax: Tensor, strategy: str, dtype: str, headroom: float) -> Tensor:
    """The scales of a strategy: ``headroom * amax / max``.

    Args:
        amax: float32 ``[num_heads, head_size]``.
        strategy: "tensor", "attn_head" or "channel".
        dtype: a name of the format.
        headroom: a factor of amax.
    """
    if strategy != "channel":
        amax = amax.amax().view(1) if strategy == "tensor" else amax.amax(1)
    widened = (amax.cpu() * headroom).clamp(max=torch.finfo(torch.float32).max)
    return scale_of_amax(widened, CACHE_DTYPES[dtype])


def scale_of_queries(observer: Observer, headroom: float) -> Tensor:
    """FP8 scales, one for each head of an observer of amax."""
    assert isinstance(observer, MinMaxObserver)
    return scale_of(observer.amax.unsqueeze(1), "attn_head", _DEFAULT, headroom)


def layer_scales(
    choice: Choice, k: ChannelObserver, v: ChannelObserver, headroom: float, q: Tensor | None = None
) -> LayerScales:
    """The scales of a layer, on the CPU, as `choice` has them."""
    offsets = [x.offset(kind) for x, kind in ((k, choice.k_offset), (v, choice.v_offset))]
    k_scale, v_scale = (
        scale_of(x.amax(offset), choice.strategy, choice.dtype, headroom) for x, offset in zip((k, v), offsets, strict=True)
    )
    k_offset, v_offset = (None if offset is None else offset.cpu() for offset in offsets)
    return LayerScales(q, k_scale, v_scale, k_offset, v_offset, choice.dtype)
