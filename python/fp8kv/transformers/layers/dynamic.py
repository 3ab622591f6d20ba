"""The layer that grows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8kv.transformers.layers.base import Fp8Layer, Geometry, LayerOptions, window_is_gone
from fp8kv.transformers.step import Step, Steps, slots_of


class DynamicFp8Layer(Fp8Layer):  # type: ignore[no-untyped-call]
    """A layer that grows with its tokens; with a window, it drops tokens that no query will see again.

    Args:
        options: options of the layer.
        steps: shared by all layers of the cache.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, options: LayerOptions, steps: Steps) -> None:
        super().__init__(options)
        self.steps = steps
        self.is_sliding = self.window is not None
        self.length = 0
        self.num_dropped = 0  # tokens at the front that the storage no longer has: whole blocks
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check(key_states, value_states)
        self.storage = self._new_storage(0, Geometry.of(key_states, value_states), key_states.device)
        self.num_rows = self.batch_size = len(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores new tokens and returns what their queries attend to: dequantized, or where to read it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        readable = self._is_readable(key_states)
        if readable and not self.record_past:
            self._forget()  # must come first, because tokens to be read later must not move
        num_tokens = key_states.shape[2]
        self._reserve(self.length + num_tokens)
        step = self._step(num_tokens)
        self._append(key_states, value_states, step.slots)
        self.length += num_tokens
        given = self._given(key_states, value_states, step, readable)
        if not readable and not self.record_past:
            self._forget()
        return given

    def _step(self, num_tokens: int) -> Step:
        storage = self.storage
        assert storage is not None
        start, end, dropped = self.length, self.length + num_tokens, self.num_dropped
        rows, device = self.num_rows, storage.device

        def make() -> Step:
            positions = torch.arange(start - dropped, end - dropped, device=device)
            blocks = torch.arange(storage.num_blocks, dtype=torch.int32, device=device)
            slots = slots_of(positions, rows, rows, self.block_size)
            first = self._first_seen(start)
            return Step(slots, blocks.view(-1, rows).T, num_tokens, dropped, end, first, end - first)

        state = (start, num_tokens, dropped, rows, storage.num_blocks)
        return self.steps.get((self.window, device), state, make)

    def _first_seen(self, position: int) -> int:
        """The first position that a query at `position` sees."""
        return 0 if self.window is None else max(position - self.window + 1, 0)

    def _blocks_needed(self, length: int) -> int:
        return -(-(length - self.num_dropped) // self.block_size)

    def _blocks_unseen(self) -> int:
        """Blocks at the front that no further query sees."""
        return (self._first_seen(self.length) - self.num_dropped) // self.block_size

    def _reserve(self, length: int) -> None:
        assert self.storage is not None
        needed = self._blocks_needed(length)
        if needed * self.num_rows > self.storage.num_blocks:
            unseen = 0 if self.record_past else self._blocks_unseen()
            self._resize(unseen, _with_slack(needed - unseen))

    def _forget(self) -> None:
        """Frees the blocks of tokens outside the window, once they exceed the slack."""
        unseen = self._blocks_unseen()
        seen = self._blocks_needed(self.length) - unseen
        if unseen > seen // 8 + 1:
            self._resize(unseen, _with_slack(seen))

    def _resize(self, drop: int, num_blocks: int) -> None:
        """Drops the first `drop` blocks of every sequence, and allocates `num_blocks`."""
        assert self.storage is not None
        kept = torch.arange(
            drop * self.num_rows,
            min(drop + num_blocks, self._blocks_needed(self.length)) * self.num_rows,
            device=self.storage.device,
        )
        self._replace(kept, num_blocks * self.num_rows)
        self.num_dropped += drop * self.block_size

    def _replace(self, blocks: Tensor, num_blocks: int) -> None:
        """A new storage that starts with these blocks of the old one."""
        old = self.storage
        assert old is not None
        self.storage = self._new_storage(num_blocks, Geometry.of_storage(old), old.device)
        if not old.dynamic:
            counter = self.storage.clip_counter
            self.storage.use_scales(old.k_scale, old.v_scale)
            self.storage.clip_counter = counter
        self.storage.k_offset, self.storage.v_offset = old.k_offset, old.v_offset
        self.storage.copy_blocks(torch.stack([blocks, torch.arange(len(blocks), device=old.device)], 1), old)

    def _select(self, sequences: Tensor) -> None:
        blocks = self._blocks_of(sequences)
        self._replace(blocks.flatten(), blocks.numel())
        self.num_rows = self.batch_size = len(sequences)

    def get_seq_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def get_max_length(self) -> int:
        """-1, or the window."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of tokens that the next `update` returns, and the position of the first."""
        start = self._first_seen(self.length)
        return self.length - start + query_length, start

    def _num_tokens_kept(self) -> int:
        return self.num_rows * (self.length - self._first_seen(self.length))

    def activate_past_recording(self) -> None:
        """Keeps tokens outside the window until `crop`, so that any number can be removed."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> int:
        kept = super().check_crop(tokens_to_remove)
        if self._first_seen(kept) < self.num_dropped:
            raise ValueError(window_is_gone(self.index, tokens_to_remove))
        return kept

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens: ``crop(-3)`` removes three."""
        self.length = self.check_crop(tokens_to_remove)
        if self.is_initialized:
            self._forget()

    def reset(self) -> None:
        """Removes all tokens and frees the storage; the next batch may have another size."""
        self.storage = None
        self.batch_size = None
        self.num_rows = self.length = self.num_dropped = 0
        self._gave_whole = True
        self.is_initialized = False


def _with_slack(num_blocks: int) -> int:
    return num_blocks + num_blocks // 8
