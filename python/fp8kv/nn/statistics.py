"""Observations of an attention layer: largest magnitudes, and the elements that its scales would clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp8kv._checks import listed
from fp8kv.group_shape import GroupShape
from fp8kv.quantization import group_amax, raise_head_amax

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Elements that `observe_groups` processes at a time, which bounds its temporary memory.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Observed:
    """Observations of one of Q, K and V, per tensor or per KV head, also where each channel has a scale.

    Attributes:
        amax: the largest finite magnitude, after offsets are subtracted; 0 if there was none.
        clipped: number of elements beyond the range of the current scale, infinite ones included.
        observed: number of elements.
    """

    amax: tuple[float, ...]
    clipped: tuple[int, ...]
    observed: tuple[int, ...]

    @property
    def clipped_fraction(self) -> float:
        """The share of clipped elements; 0 if there are none."""
        return sum(self.clipped) / max(1, sum(self.observed))


@dataclass(frozen=True)
class Observations:
    """Observations of Q, K and V in an attention layer: the report of `fp8kv.AttentionScales`.

    As text, it is one or two sentences, the second of which reports clipping.

    Attributes:
        q: nothing observed if queries are not.
        k: keys.
        v: values.

    Example:
        >>> from fp8kv.nn.statistics import Observations, Observed
        >>> seen = Observations(
        ...     q=Observed((0.0,), (0,), (0,)),
        ...     k=Observed((500.0,), (3,), (4000,)),
        ...     v=Observed((2.5,), (0,), (4000,)))
        >>> seen.clipped_fraction
        0.000375
        >>> print(seen)
        Observed 4,000 elements of K (amax 500) and 4,000 elements of V (amax 2.5). Warning: the scales in
        force clip 3 elements of K (0.075%).
    """

    q: Observed
    k: Observed
    v: Observed

    @property
    def clipped_fraction(self) -> float:
        """The share of clipped elements of Q, K and V; 0 if there are none."""
        seen = (self.q, self.k, self.v)
        return sum(sum(x.clipped) for x in seen) / max(1, sum(sum(x.observed) for x in seen))

    def __str__(self) -> str:
        seen = {name: x for name, x in (("Q", self.q), ("K", self.k), ("V", self.v)) if sum(x.observed)}
        if not seen:
            return "Nothing was observed."
        parts = [f"{sum(x.observed):,} elements of {name} (amax {max(x.amax):g})" for name, x in seen.items()]
        clipped = [
            f"{sum(x.clipped):,} elements of {name} ({100 * x.clipped_fraction:.3g}%{_heads(x.clipped)})"
            for name, x in seen.items()
            if sum(x.clipped)
        ]
        verdict = (
            f"Warning: the scales in force clip {listed(clipped, 'and')}." if clipped else "The scales in force clip none."
        )
        return f"Observed {listed(parts, 'and')}. {verdict}"


def _heads(clipped: tuple[int, ...]) -> str:
    """Which of them were clipped, if there are several."""
    heads = [str(head) for head, count in enumerate(clipped) if count]
    if len(clipped) == 1:
        return ""
    return f", head {heads[0]}" if len(heads) == 1 else f", heads {listed(heads, 'and')}"


def _observe_groups(
    x: Tensor,
    scale: Tensor,
    amax: Tensor,
    clipped: Tensor,
    observed: Tensor,
    limit: float,
    slots: Tensor | None,
    offset: Tensor | None,
) -> None:
    """Adds the elements of `x` to the statistics, in place on the device, without synchronization.

    Args:
        x: float32, float16 or bfloat16 ``[num_tokens, num_scales, heads of a scale, head_size]``, any
            strides.
        scale: float32 ``[num_scales]``, the current ones, or ``[num_scales, head_size]``.
        amax: likewise; raised to the largest finite magnitude of each group or channel.
        clipped: int64 ``[num_scales]``; grows by the elements with ``|x / scale| > limit``.
        observed: int64 ``[num_scales]``; grows by the elements seen.
        limit: the largest quotient that is not clipped.
        slots: as many as tokens; those with a negative slot are not observed. None: all are.
        offset: float32 ``[num_kv_heads, head_size]``, subtracted first. None: 0.
    """
    num_tokens, num_scales, *rest = x.shape
    if x.numel() == 0:
        return
    size = math.prod(rest)
    divisor = scale.view(num_scales, 1, -1)
    shift = None if offset is None else offset.view(x.shape[1:])
    rows = max(1, _CHUNK // (num_scales * size))
    for start in range(0, num_tokens, rows):
        part = x[start : start + rows]
        seen: int | Tensor = part.shape[0]
        if slots is not None:
            padding = slots[start : start + rows] < 0
            seen = padding.logical_not().sum()
            part = part.masked_fill(padding.view(-1, 1, 1, 1), math.nan)  # which neither amax nor > sees
        if shift is not None:
            part = part.float() - shift
        _raise_amax(amax, part)
        clipped += ((part / divisor).abs_() > limit).sum((0, 2, 3))
        observed += seen * size


def _raise_amax(amax: Tensor, x: Tensor) -> None:
    if amax.dim() == 1:
        raise_head_amax(amax, x)
    else:
        group_amax(amax.view(-1), x.reshape(len(x), -1), GroupShape.PER_CHANNEL)


# An operator, so that compiled code takes any number of chunks, and divides exactly.
_ops: Any = torch.library.Library("fp8kv", "FRAGMENT")  # type: ignore[no-untyped-call]
_ops.define(
    "_observe_groups(Tensor x, Tensor scale, Tensor(a!) amax, Tensor(b!) clipped, Tensor(c!) observed, "
    "float limit, Tensor? slots, Tensor? offset) -> ()"
)
_ops.impl("_observe_groups", _observe_groups, "CompositeExplicitAutograd")
torch.library.register_fake("fp8kv::_observe_groups", lambda *args: None, lib=_ops)
observe_groups = torch.ops.fp8kv._observe_groups.default


def reduced(amax: Tensor, counts: Tensor, group: ProcessGroup | None, first_head: int | None) -> tuple[Tensor, Tensor]:
    """The largest `amax` and the sum of the `counts` over the ranks that have a head, on the host.

    Args:
        amax: float32 ``[n, num_scales, ...]`` of this rank.
        counts: int64 ``[m, num_scales]``.
        group: None: this rank alone.
        first_head: the index of its first head in the layer; None: all ranks have the same heads.

    Raises:
        ValueError: `group` is not a process group of this rank, or its ranks don't fit together; raised on
            all ranks.
    """
    if group is None:
        return amax.cpu(), counts.cpu()
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"AttentionScales: group must be a process group that this rank belongs to, got {group!r}")
    num_heads = amax.shape[1]
    own = torch.tensor([num_heads, -1 if first_head is None else first_head], device=amax.device)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, own, group=group)
    places = [(heads, first) for heads, first in torch.stack(ranks).tolist()]
    if any(first < 0 for _, first in places) and len(set(places)) > 1:
        raise ValueError(
            "AttentionScales: the ranks of group must have the same heads or each its first_kv_head, got "
            f"{listed((_place(*place) for place in places), 'and')}"
        )
    # All heads of the layer, those of other ranks empty.
    first, total = first_head or 0, max(heads + max(first, 0) for heads, first in places)
    mine = slice(first, first + num_heads)
    all_amax, all_counts = (x.new_zeros(len(x), total, *x.shape[2:]) for x in (amax, counts))
    all_amax[:, mine], all_counts[:, mine] = amax, counts
    dist.all_reduce(all_amax, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(all_counts, dist.ReduceOp.SUM, group=group)
    return all_amax[:, mine].cpu(), all_counts[:, mine].cpu()


def _place(num_heads: int, first_head: int) -> str:
    scales = f"{num_heads} scale{'s' if num_heads > 1 else ''}"
    return scales if first_head < 0 else f"{scales} from head {first_head} on"
