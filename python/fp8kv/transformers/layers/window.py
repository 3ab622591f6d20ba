"""The layer of fixed size that keeps a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8kv.kv_cache.paged import as_stored
from fp8kv.transformers.layers.base import window_is_gone
from fp8kv.transformers.layers.static import StaticFp8Layer


class StaticWindowFp8Layer(StaticFp8Layer):  # type: ignore[no-untyped-call]
    """A layer of fixed size that keeps a window: the storage is a ring, in which new tokens replace old ones.

    Args:
        index, options, max_cache_len, max_batch_size: as for `StaticFp8Layer`.
        window: tokens that a query sees, itself included; less than `max_cache_len`.

    Attributes:
        length: tokens of a sequence, for what the host decides.
    """

    is_croppable = False

    def __init__(
        self,
        index: int,
        options: dict[str, Any],
        max_cache_len: int,
        max_batch_size: int | None,
        window: int,
    ) -> None:
        super().__init__(index, options, max_cache_len, max_batch_size, is_sliding=True)
        self.window = window
        self.length = 0
        self.num_lost = 0  # tokens at the front that newer ones had replaced when `crop` removed those
        # One more than a window fills, as it may begin anywhere in a block.
        self.blocks_of_sequence = -(-window // self.block_size) + 1
        self.ring_size = self.blocks_of_sequence * self.block_size

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens and returns all that their queries may see, dequantized."""
        self._prepare(key_states, value_states)
        num_tokens, batch = key_states.shape[2], len(key_states)
        if num_tokens == 1 or self.length + num_tokens <= self.window:
            self._append_last(key_states, value_states)
            start = self.cumulative_length - self.window
            tokens = self._read_ring(start, self.window, batch, key_states.dtype)
        else:
            past = min(self.length, self.window - 1)
            start = self.cumulative_length - past
            old = self._read_ring(start, past, batch, key_states.dtype)
            assert self.storage is not None
            new = as_stored(self.storage, key_states, value_states)
            self._append_last(key_states, value_states)
            tokens = torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)
        self.length += num_tokens
        return tokens

    def _append_last(self, key: Tensor, value: Tensor) -> None:
        """Stores as many of the new tokens as the ring takes."""
        num_tokens = key.shape[2]
        count = min(num_tokens, self.ring_size)
        positions = torch.arange(num_tokens - count, num_tokens, device=key.device) + self.cumulative_length
        self._append(key[:, :, -count:], value[:, :, -count:], positions % self.ring_size)
        self.cumulative_length.add_(num_tokens)

    def _read_ring(
        self, start: Tensor, num_tokens: int, batch: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        start = start.clamp(min=0)
        turn = torch.arange(self.blocks_of_sequence, device=start.device) + start // self.block_size
        order = turn % self.blocks_of_sequence
        seq_starts = (start % self.block_size).to(torch.int32).expand(batch)
        return self._read(self.table[:batch].index_select(1, order), num_tokens, dtype, seq_starts)

    def get_seq_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def get_max_length(self) -> int:
        """The window."""
        return self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the next `update` returns, and the position of the first one."""
        past = min(self.length, self.window - 1)
        return max(self.window, past + query_length), self.length - past

    def _num_tokens_kept(self) -> int:
        return self.num_rows * self.window

    def check_crop(self, tokens_to_remove: int) -> int:
        kept = super().check_crop(tokens_to_remove)
        if max(kept - self.window + 1, 0) < self._oldest():
            raise ValueError(window_is_gone(self.index, tokens_to_remove))
        return kept

    def _oldest(self) -> int:
        """The first position that is still there."""
        return max(self.num_lost, self.length - self.ring_size)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.num_lost, self.length = self._oldest(), self.length + tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.length = self.num_lost = 0
