"""Comparing formats: the error of a layer's attention output with keys and values as caches store them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp8kv.calibration._recorder import Sizes
from fp8kv.calibration.observers import sum_of_ranks
from fp8kv.checkpoint.scales import LayerScales
from fp8kv.kv_cache import PagedKVCache
from fp8kv.kv_cache.paged import as_stored

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Chooser:
    """Sums of the squared errors of the candidates of each layer, over all tokens that a model reads.

    Args:
        candidates: by layer, in the same order for all.

    Attributes:
        errors: by layer, float64 ``[number of candidates + 1]``: the squared errors, and last the square of
            the outputs themselves.
        sizes: by layer, their number; for `all_ranks`.
        num_tokens: that were read.
    """

    def __init__(self, candidates: Mapping[int, Sequence[LayerScales]]) -> None:
        self.candidates = candidates
        self.errors: dict[int, Tensor] = {}
        self.num_tokens = 0
        self._caches: dict[int, list[PagedKVCache]] = {}
        self._mask = torch.ones(0, 0, dtype=torch.bool)
        self._attending: tuple[int, torch.Size] | None = None
        self._not_compared = set(candidates)

    @property
    def sizes(self) -> Sizes:
        return {(layer, "kv"): (len(x), 1) for layer, x in self.candidates.items()}

    def expect(self, mask: Tensor) -> None:
        """Starts a batch with this mask, bool ``[B, N]``; False is padding."""
        self._mask, self._attending = mask, None
        self.num_tokens += int(mask.sum())

    def forget_batch(self) -> None:
        """Discards this batch, the first one, because it will be repeated."""
        self.errors.clear()
        self.num_tokens = 0

    def keys_and_values(self, layer: int, key: Tensor, value: Tensor) -> None:
        """``[B, num_kv_heads, N, head_size]``; attention to them comes next."""
        if key.shape != value.shape:
            raise RuntimeError(
                f'calibrate: keys and values must have heads of one size with dtype "auto", got '
                f"{key.shape[-1]} and {value.shape[-1]} in layer {layer}"
            )
        self._attending = layer, key.shape
        if layer not in self._caches:
            self._caches[layer] = [
                PagedKVCache(
                    0, 16, key.shape[1], key.shape[3], dtype=x.dtype, scales=x, device=key.device
                )
                for x in self.candidates[layer]
            ]  # fmt: skip
            self.errors[layer] = self._zeros(layer).to(key.device)

    def _zeros(self, layer: int) -> Tensor:
        return torch.zeros(len(self.candidates[layer]) + 1, dtype=torch.float64)

    def wrap(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function, which is called for each candidate as well."""

        def compared(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = attention(module, query, key, value, *args, **kwargs)
            if self._attending is None or key.shape != self._attending[1]:
                return result
            layer, self._attending = self._attending[0], None
            self._not_compared.discard(layer)
            squares = []
            for cache in self._caches[layer]:
                stored = as_stored(cache, key, value)
                squares.append(self._square(attention(module, query, *stored, *args, **kwargs)[0] - result[0]))
            squares.append(self._square(result[0]))
            self.errors[layer] += torch.stack(squares).to(self.errors[layer].device)
            return result

        return compared

    def _square(self, x: Tensor) -> Tensor:
        """The sum of squares of ``[B, N, num_heads, head_size]``, without padding."""
        mask = self._mask.to(x.device)
        return x.double().square().flatten(2).sum(2).masked_fill(~mask, 0).sum()

    def check(self, model: nn.Module) -> None:
        """A `RuntimeError` unless the attention of all layers was seen, if any token was."""
        if self.num_tokens and self._not_compared:
            raise RuntimeError(
                f"calibrate: {type(model).__name__} must take its attention function from transformers' "
                'AttentionInterface with dtype="auto", but not all layers do'
            )

    def reduce(self, sizes: Sizes, group: ProcessGroup | None) -> None:
        """Adds the errors of all ranks; this one may have read nothing."""
        for layer, _ in sorted(sizes):
            sum_of_ranks(self.errors.setdefault(layer, self._zeros(layer)), group)

    def best(self) -> dict[int, tuple[int, float]]:
        """By layer, the place of the candidate with the least error, and that error, relative."""
        found = {}
        for layer, sums in self.errors.items():
            *errors, whole = sums.tolist()
            place = min(range(len(errors)), key=errors.__getitem__)
            found[layer] = place, (errors[place] / whole) ** 0.5 if whole > 0 else 0.0
        return found
