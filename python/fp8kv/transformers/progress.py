"""`Progress`: the state shared by the layers of a static cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from fp8kv.transformers.step import Step


class Progress:
    """The number of tokens in the layers of a static cache, and the indices of the current step.

    A step lasts from the first layer that gets its tokens to the last one, or until a layer gets tokens
    again. The length changes at its end, on the device, so that compiled code keeps nothing of the step.

    Args:
        layers: the indices of all layers.

    Attributes:
        length: tokens per sequence at the end of the last step, if `counts_on_host`.
        counts_on_host: whether `length` is kept; code that reads it is recompiled when it changes.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = list(layers)
        self.length = 0
        self.counts_on_host = False
        self._lengths: dict[str, Tensor] = {}
        self._num_tokens = 0  # of the current step
        self._done: list[int] = []  # layers that have got them
        self._behind: list[int] = []  # layers that missed a step
        self._steps: dict[Hashable, Step] = {}

    def length_on(self, device: torch.device) -> Tensor:
        """The length at the end of the last step, an int64 that changes in place."""
        if str(device) not in self._lengths:
            length = torch.zeros((), dtype=torch.int64, device=device)
            torch._dynamo.mark_static_address(length)
            self._lengths[str(device)] = length
        return self._lengths[str(device)]

    def begin(self, layer: int, num_tokens: int) -> None:
        """Called before a layer gets tokens.

        Raises:
            ValueError: they differ from the tokens of other layers.
        """
        if layer in self._done:
            self._finish()
        if layer in self._behind or (self._done and num_tokens != self._num_tokens):
            raise ValueError(
                f"Fp8Cache: all layers of a static cache must get the tokens of every step, but layer {layer} has missed some"
            )
        self._num_tokens = num_tokens

    def step(self, kind: Hashable, make: Callable[[], Step]) -> Step:
        """The indices of the current step, for one kind of layers."""
        if kind not in self._steps:
            self._steps[kind] = make()
        return self._steps[kind]

    def end(self, layer: int) -> None:
        """Called after a layer has stored its tokens."""
        self._done.append(layer)
        if len(self._done) == len(self.layers):
            self._finish()

    def ahead(self, layer: int) -> int:
        """The number of tokens that a layer has beyond the length."""
        return self._num_tokens if layer in self._done else 0

    def _finish(self) -> None:
        if len(self._done) < len(self.layers):
            self._behind += [layer for layer in self.layers if layer not in self._done + self._behind]
        self._add(self._num_tokens)
        self._done, self._steps = [], {}

    def _add(self, num_tokens: int) -> None:
        for length in self._lengths.values():
            length.add_(num_tokens)
        if self.counts_on_host:
            self.length += num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens: ``crop(-3)`` removes three."""
        if self._done:
            self._finish()
        self._add(tokens_to_remove)

    def reset(self) -> None:
        """Resets all layers to no tokens."""
        for length in self._lengths.values():
            length.zero_()
        self.length = 0
        self._done, self._behind, self._steps = [], [], {}
