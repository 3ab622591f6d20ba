"""The statistics of calibration: observers of all layers, in one process or in all ranks of a group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from fp8kv.calibration.observers import Observer
from fp8kv.checkpoint.scales import LayerScales

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The number of scales of each tensor, by layer and name.
ScaleCounts = dict[tuple[int, str], int]


class Recorder:
    """Observers by layer and by "k", "v" or "q"; created when the number of heads of a layer is known.

    Args:
        make: an observer for a number of heads on a device.
        per_head: whether each head has its own scale.
    """

    def __init__(self, make: Callable[[int, torch.device], Observer], *, per_head: bool) -> None:
        self.make = make
        self.per_head = per_head
        self.observers: dict[int, dict[str, Observer]] = {}
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
        self.num_tokens += int(mask.sum())

    def forget_batch(self) -> None:
        """Discards this batch, the first one, because it will be repeated."""
        if self.num_tokens > int(self._mask.sum()):
            raise RuntimeError(
                "calibrate: the model must read the layers of its cache in every batch or in none, but does "
                "in this one and did not in those before"
            )
        self.observers.clear()
        self.num_tokens = 0

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
        tokens = tokens.reshape(tokens.shape[0], num_groups if self.per_head else 1, -1)
        observers = self.observers.setdefault(layer, {})
        if name not in observers:
            observers[name] = self.make(tokens.shape[1], tokens.device)
        observers[name].update(tokens)

    def scales(self) -> dict[int, LayerScales]:
        """On the CPU."""

        def scales(observer: Observer | None) -> Tensor | None:
            return None if observer is None else observer.scales().cpu()

        return {
            layer: LayerScales(scales(x.get("q")), scales(x.get("k")), scales(x.get("v")))
            for layer, x in self.observers.items()
        }

    def warn_non_finite(self) -> None:
        """The warning points at the caller of `calibrate`."""
        places = []
        for (layer, name), observer in sorted(self._all().items()):
            num_elements, num_bad = observer.counts.tolist()
            if num_bad:
                places.append(f"{num_bad} of {num_elements} of {name} in layer {layer}")
        if places:
            more = f" and in {len(places) - 5} other places" if len(places) > 5 else ""
            warnings.warn(
                f"calibrate: elements were NaN or infinite and were left out: {', '.join(places[:5])}{more}",
                stacklevel=3,
            )

    def scale_counts(self) -> ScaleCounts:
        return {key: observer.num_heads for key, observer in self._all().items()}

    def reduce(self, counts: ScaleCounts, group: ProcessGroup | None) -> None:
        """Merges the statistics of all ranks; this one may have no observations."""
        for (layer, name), num_heads in sorted(counts.items()):
            observers = self.observers.setdefault(layer, {})
            if name not in observers:
                observers[name] = self.make(num_heads, torch.device("cpu"))
            observers[name].reduce(group)

    def _all(self) -> dict[tuple[int, str], Observer]:
        return {
            (layer, name): observer
            for layer, observers in self.observers.items()
            for name, observer in observers.items()
        }


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
def all_ranks(recorder: Recorder, group: ProcessGroup | None) -> Iterator[None]:
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
    known = [counts for _, counts, _ in told if counts]  # a rank without batches does not know it
    if any(counts != known[0] for counts in known):
        raise RuntimeError("calibrate: all ranks must have the same model, got models of different layers")
    if known:
        recorder.reduce(known[0], group)
    recorder.num_tokens = sum(num_tokens for _, _, num_tokens in told)


def _exchange(
    failure: str | None, recorder: Recorder, group: ProcessGroup | None
) -> list[tuple[str | None, ScaleCounts, int]]:
    """How each rank failed, its counts, and its number of tokens."""
    told: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(told, (failure, recorder.scale_counts(), recorder.num_tokens), group=group)
    return told


def is_distributed() -> bool:
    """Whether there may be other ranks."""
    return distributed.is_available() and distributed.is_initialized()
