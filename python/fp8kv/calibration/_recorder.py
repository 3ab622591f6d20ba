"""The statistics of calibration: observers of all layers, in one process or in all ranks of a group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, distributed

from fp8kv.calibration.observers import ChannelObserver, Observer
from fp8kv.checkpoint.scales import LayerScales

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The number of scales of each tensor and the elements that each is for in a token, by layer and name.
Sizes = dict[tuple[int, str], tuple[int, int]]
#: The end of the names of observers of tokens that are held out.
_HELD_OUT = " held out"


class Recorder:
    """Observers by layer and by "k", "v" or "q"; created when the number of heads of a layer is known.

    Args:
        make: an observer of "k", "v" or "q" for a number of heads, of a size, on a device.
        per_head: the letters of which each head has its own scale, or own ones.
        holds_out: whether whole batches, with at least a quarter of all tokens, have observers of their own
            for K and V, named "k held out" and "v held out".

    Attributes:
        observers: by layer and name.
        sizes: of these; for `all_ranks`.
        num_tokens: that were observed.
        is_held_out: whether the last batch was held out.
    """

    def __init__(
        self,
        make: Callable[[str, int, int, torch.device], Observer],
        *,
        per_head: Collection[str],
        holds_out: bool = False,
    ) -> None:
        self.make = make
        self.per_head = per_head
        self.holds_out = holds_out
        self.is_held_out = False
        self._num_held_out = 0
        self.observers: dict[int, dict[str, Observer]] = {}
        self.sizes: Sizes = {}
        self.num_tokens = 0
        self._mask = torch.ones(0, 0, dtype=torch.bool)
        # The positions of tokens among the padding, per device; None without padding.
        self._places: dict[torch.device, Tensor] | None = None
        # The layer whose attention comes next, and its number of KV heads.
        self._attending: tuple[int, int] | None = None

    def expect(self, mask: Tensor) -> None:
        """Starts a batch with this mask, bool ``[B, N]``; False is padding."""
        self._mask = mask
        self._places = None if mask.all() else {mask.device: mask.flatten().nonzero().squeeze(1)}
        self._attending = None
        count = int(mask.sum())
        self.num_tokens += count
        self.is_held_out = self.holds_out and 4 * self._num_held_out < self.num_tokens
        self._num_held_out += count * self.is_held_out

    def forget_batch(self) -> None:
        """Discards this batch, the first one, because it will be repeated."""
        if self.num_tokens > int(self._mask.sum()):
            raise RuntimeError(
                "calibrate: the model must read the layers of its cache in every batch or in none, but does "
                "in this one and did not in those before"
            )
        self.observers.clear()
        self.sizes.clear()
        self.num_tokens = self._num_held_out = 0

    def keys_and_values(self, layer: int, key: Tensor, value: Tensor) -> None:
        """``[B, num_kv_heads, N, head_size]``."""
        self._update(layer, "k", key, key.shape[1])
        self._update(layer, "v", value, value.shape[1])
        self._attending = layer, key.shape[1]

    def queries(self, query: Tensor) -> None:
        """``[B, num_heads, N, head_size]``, of the layer whose keys and values came last."""
        if self._attending is None:  # attention without a cache, in an image encoder for example
            return
        (layer, num_kv_heads), self._attending = self._attending, None
        if query.shape[1] % num_kv_heads:
            raise RuntimeError(
                f"calibrate: the query heads of layer {layer} must be a multiple of its {num_kv_heads} "
                f"KV heads, got {query.shape[1]}"
            )
        self._update(layer, "q", query, num_kv_heads)

    def _update(self, layer: int, name: str, states: Tensor, num_groups: int) -> None:
        batch_size, length = self._mask.shape
        if states.dim() != 4 or (states.shape[0], states.shape[2]) != (batch_size, length):
            raise RuntimeError(
                f"calibrate: {name} of layer {layer} must have the shape [{batch_size}, heads, {length}, "
                f"head_size], got {list(states.shape)}"
            )
        tokens = states.transpose(1, 2).flatten(0, 1)
        if self._places is not None:
            if tokens.device not in self._places:
                self._places[tokens.device] = next(iter(self._places.values())).to(tokens.device)
            tokens = tokens[self._places[tokens.device]]
        # The query heads of a KV head are neighbors; to the observer, heads that share a scale are one head.
        letter, name = name, f"{name}{_HELD_OUT}" if self.is_held_out and name != "q" else name
        num_scales = num_groups if letter in self.per_head else 1
        size = states.shape[1] * states.shape[3] // num_scales
        tokens = tokens.reshape(tokens.shape[0], num_scales, size)
        observers = self.observers.setdefault(layer, {})
        if name not in observers:
            observers[name] = self.make(letter, num_scales, size, tokens.device)
            # The same in all ranks, whatever they hold out.
            names = {name, letter, f"{letter}{_HELD_OUT}"} if self.holds_out and letter != "q" else {name}
            self.sizes |= dict.fromkeys(((layer, x) for x in names), (num_scales, size))
        observers[name].update(tokens)

    def scales(self) -> dict[int, LayerScales]:
        """On the CPU."""

        def scales(observer: Observer | None) -> Tensor | None:
            return None if observer is None else observer.scales().cpu()

        return {
            layer: LayerScales(scales(x.get("q")), scales(x.get("k")), scales(x.get("v")))
            for layer, x in self.observers.items()
        }

    def channels(self, layer: int, letter: str, *, held_out: bool) -> ChannelObserver:
        """The observer of K or V, if these have observers of channels: of all tokens, or without those held out.

        If all tokens of a layer are held out, these are all.
        """
        found = [self.observers[layer].get(f"{letter}{end}") for end in ("", _HELD_OUT)]
        parts = [x for x in found if isinstance(x, ChannelObserver) and x.counts[0] > 0]
        return parts[0].merged(parts[1]) if held_out and len(parts) > 1 else parts[0]

    def warn_non_finite(self) -> None:
        """The warning points at the caller of `calibrate`."""
        places = []
        for (layer, name), observer in sorted(self._all().items()):
            num_elements, num_bad = observer.counts.tolist()
            if num_bad:
                places.append(f"{num_bad} of {num_elements} of {name[0]} in layer {layer}")
        if places:
            more = f" and in {len(places) - 5} other places" if len(places) > 5 else ""
            warnings.warn(
                f"calibrate: elements were NaN or infinite and were left out: {', '.join(places[:5])}{more}",
                stacklevel=3,
            )

    def reduce(self, sizes: Sizes, group: ProcessGroup | None) -> None:
        """Merges the statistics of all ranks; this one may have no observations."""
        for (layer, name), size in sorted(sizes.items()):
            observers = self.observers.setdefault(layer, {})
            if name not in observers:
                observers[name] = self.make(name[0], *size, torch.device("cpu"))
            observers[name].reduce(group)

    def _all(self) -> dict[tuple[int, str], Observer]:
        return {(layer, name): observer for layer, observers in self.observers.items() for name, observer in observers.items()}


class Statistics(Protocol):
    """What `all_ranks` merges: a `Recorder`, for example."""

    num_tokens: int

    @property
    def sizes(self) -> Sizes:
        """The sizes of the layers; those of a rank without batches may be empty."""

    def reduce(self, sizes: Sizes, group: ProcessGroup | None) -> None:
        """Merges the observations of all ranks; `sizes` come from a rank that has any."""


def is_first_rank(group: ProcessGroup | None) -> bool:
    """Whether this is the first rank of the group, None: of all; True without `torch.distributed`.

    Raises:
        ValueError: this rank is not in the group.
    """
    rank = distributed.get_rank(group) if is_distributed() else 0
    if rank < 0:
        raise ValueError("calibrate: group must contain the rank that calls, got one without it")
    return rank == 0


@contextmanager
def all_ranks(recorder: Statistics, group: ProcessGroup | None) -> Iterator[None]:
    """Merges the statistics of all ranks at the end; if one of them fails, all raise, and none hangs.

    Raises:
        RuntimeError: another rank failed, or has another model.
    """
    if not is_distributed():
        yield
        return
    try:
        yield
    except Exception as error:
        _exchange(f"{type(error).__name__}: {error}", recorder, group)
        raise
    told = _exchange(None, recorder, group)
    for rank, (failure, _, _) in enumerate(told):
        if failure is not None:
            raise RuntimeError(f"calibrate: rank {rank} failed with {failure}")
    known = [sizes for _, sizes, _ in told if sizes]  # a rank without batches does not know it
    if any(sizes != known[0] for sizes in known):
        raise RuntimeError("calibrate: all ranks must have the same model, got models of different layers")
    if known:
        recorder.reduce(known[0], group)
    recorder.num_tokens = sum(num_tokens for _, _, num_tokens in told)


def _exchange(failure: str | None, recorder: Statistics, group: ProcessGroup | None) -> list[tuple[str | None, Sizes, int]]:
    """How each rank failed, its sizes, and its number of tokens."""
    told: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(told, (failure, recorder.sizes, recorder.num_tokens), group=group)
    return told


def is_distributed() -> bool:
    """Whether there may be other ranks."""
    return distributed.is_available() and distributed.is_initialized()
