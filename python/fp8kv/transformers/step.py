"""`Step`: the indices of a step, computed once for all layers with the same indices."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Step:
    """The slots of the new tokens of a step, and the location of all tokens that their queries may see.

    Args:
        slots: ``[batch * tokens]``, of the new tokens that are stored.
        table: int32 ``[batch, blocks]``, in the order of positions.
        num_tokens: number of new tokens.
        base: the first position of the table.
        end: tokens per sequence, including the new ones.
        first: the first position that is read.
        num_read: number of positions that are read. They and `base` and `end` are numbers, or tensors that a
            compiled forward pass knows.
    """

    def __init__(
        self,
        slots: Tensor,
        table: Tensor,
        num_tokens: int,
        base: int | Tensor,
        end: int | Tensor,
        first: int | Tensor,
        num_read: int,
    ) -> None:
        self.slots, self.table, self.num_tokens = slots, table, num_tokens
        self.base, self.end, self.first, self.num_read = base, end, first, num_read
        self._to_attend: tuple[Tensor, Tensor | None] | None = None
        self._to_gather: tuple[Tensor, Tensor] | None = None
        self._starts: tuple[Tensor, Tensor] | None = None

    def to_attend(self) -> tuple[Tensor, Tensor | None]:
        """`seq_lens` and `cu_query_lens` of `fp8kv.paged_attention`."""
        if self._to_attend is None:
            one_each = self.num_tokens == 1
            self._to_attend = (
                self._filled(self.end - self.base),
                None if one_each else self._sums(self.num_tokens),
            )
        return self._to_attend

    def to_gather(self) -> tuple[Tensor, Tensor]:
        """`cu_seq_lens` and `seq_starts` of `fp8kv.gather_and_dequant_cache`."""
        if self._to_gather is None:
            self._to_gather = self._sums(self.num_read), self._filled(self.first - self.base)
        return self._to_gather

    def seq_starts(self, starts: Tensor) -> Tensor:
        """Positions of sequences, int32 ``[batch]``, as the table counts them."""
        if self._starts is None or self._starts[0] is not starts:
            self._starts = starts, (starts - self.base).clamp(min=0).to(torch.int32)
        return self._starts[1]

    def _filled(self, value: int | Tensor) -> Tensor:
        size = len(self.table)
        if isinstance(value, Tensor):
            return value.to(torch.int32).expand(size)
        return torch.full((size,), value, dtype=torch.int32, device=self.table.device)

    def _sums(self, length: int) -> Tensor:
        return torch.arange(len(self.table) + 1, dtype=torch.int32, device=self.table.device) * length


class Steps:
    """The last step of each kind of layers."""

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[Hashable, Step]] = {}

    def get(self, kind: Hashable, state: Hashable, make: Callable[[], Step]) -> Step:
        """The step of this state; another layer of the same kind may have computed it already."""
        if kind not in self._last or self._last[kind][0] != state:
            self._last[kind] = state, make()
        return self._last[kind][1]


def slots_of(positions: Tensor, batch: int, num_rows: int, block_size: int) -> Tensor:
    """Slots of tokens at these positions of the storage, the same for all sequences; see the package."""
    places = positions + positions // block_size * ((num_rows - 1) * block_size)
    firsts = torch.arange(0, batch * block_size, block_size, device=positions.device)
    return (places + firsts[:, None]).flatten()
