"""The layer of fixed size that keeps a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8kv.kv_cache.paged import as_stored
from fp8kv.transformers import attention
from fp8kv.transformers.layers.base import LayerOptions, window_is_gone
from fp8kv.transformers.layers.static import StaticFp8Layer
from fp8kv.transformers.progress import Progress
from fp8kv.transformers.step import Step, slots_of


class StaticWindowFp8Layer(StaticFp8Layer):  # type: ignore[no-untyped-call]
    """A layer of fixed size that keeps a window: the storage is a ring, in which new tokens replace old ones.

    Args:
        options: options of the layer; its window is less than `max_cache_len`.
        progress, max_cache_len, max_batch_size: as for `StaticFp8Layer`.
    """

    is_croppable = False
    window: int

    def __init__(self, options: LayerOptions, progress: Progress, max_cache_len: int, max_batch_size: int | None) -> None:
        super().__init__(options, progress, max_cache_len, max_batch_size)
        progress.counts_on_host = True
        self.num_lost = 0  # tokens at the front that newer ones had replaced when `crop` removed those
        # Space for everything that the queries of a short step see, which may start anywhere in a block.
        seen = self.window - 1 + attention.MAX_NEW_TOKENS
        self.blocks_of_sequence = -(-(self.block_size - 1 + seen) // self.block_size)
        self.ring_size = self.blocks_of_sequence * self.block_size

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores new tokens and returns what their queries attend to: dequantized, or where to read it."""
        self._prepare(key_states, value_states)
        readable = self._is_readable(key_states)
        batch, num_tokens = len(key_states), key_states.shape[2]
        if num_tokens <= attention.MAX_NEW_TOKENS or self.length + num_tokens <= self.window:
            step = self._ring_step(batch, num_tokens)
            self._append(key_states, value_states, step.slots)
            given = self._given(key_states, value_states, step, readable)
        else:
            given = self._marked(*self._replace(key_states, value_states))
        self.progress.end(self.index)
        return given

    def _replace(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores as many new tokens as fit the ring, and returns them after the tokens of the window."""
        assert self.storage is not None
        old = self.read(self._past(len(key)), key.dtype)
        new = as_stored(self.storage, key, value.to(key.dtype))
        count = min(key.shape[2], self.ring_size)
        positions = torch.arange(key.shape[2] - count, key.shape[2], device=key.device)
        slots = self._slots(positions + self.cumulative_length, len(key))
        self._append(key[:, :, -count:], value[:, :, -count:], slots)
        return torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)

    def _slots(self, positions: Tensor, batch: int) -> Tensor:
        return slots_of(positions % self.ring_size, batch, self.num_rows, self.block_size)

    def _ring_step(self, batch: int, num_tokens: int) -> Step:
        past = min(self.length, self.window - 1)
        length = self.cumulative_length

        def make() -> Step:
            slots = self._slots(torch.arange(num_tokens, device=length.device) + length, batch)
            # `past` may be a symbol in compiled code.
            num_read = self.window if num_tokens == 1 else max(self.window, past + num_tokens)
            return self._turned(slots, batch, num_tokens, length + num_tokens, num_read)

        return self.progress.step((self.window, str(length.device)), make)

    def _past(self, batch: int) -> Step:
        """The tokens that the next query sees, except itself."""
        nothing = torch.empty(0, dtype=torch.int64, device=self.cumulative_length.device)
        return self._turned(nothing, batch, 0, self.cumulative_length, min(self.length, self.window - 1))

    def _turned(self, slots: Tensor, batch: int, num_tokens: int, end: Tensor, num_read: int) -> Step:
        """The step whose table starts with the oldest token that is read."""
        first = (end - num_read).clamp(min=0)
        turns = first // self.block_size
        order = (torch.arange(self.blocks_of_sequence, device=end.device) + turns) % self.blocks_of_sequence
        table = self.table[:batch].index_select(1, order)
        return Step(slots, table, num_tokens, turns * self.block_size, end, first, num_read)

    @property
    def length(self) -> int:
        """Tokens per sequence before the current step, for decisions on the host."""
        return self.progress.length

    def get_seq_length(self) -> int:
        """Tokens of a sequence."""
        return self.length + self.progress.ahead(self.index)

    def get_max_length(self) -> int:
        """The window."""
        return self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of tokens that the next `update` returns, and the position of the first."""
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
        """The first position still stored."""
        return max(self.num_lost, self.length - self.ring_size)

    def crop(self, tokens_to_remove: int) -> None:
        """Records which tokens are gone; `Fp8Cache.crop` updates `Progress`."""
        self.num_lost = self._oldest()

    def reset(self) -> None:
        super().reset()
        self.num_lost = 0
