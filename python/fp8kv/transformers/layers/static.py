"""The layer of fixed size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8kv.transformers.layers.base import Fp8Layer, Geometry, LayerOptions
from fp8kv.transformers.progress import Progress
from fp8kv.transformers.step import Step, slots_of


class StaticFp8Layer(Fp8Layer):  # type: ignore[no-untyped-call]
    """A layer of fixed size: its tensors keep their addresses, and no shape depends on its length.

    Args:
        options: options of the layer.
        progress: shared by all layers of the cache.
        max_cache_len: tokens per sequence.
        max_batch_size: number of sequences; None: as in the first key.

    Attributes:
        cumulative_length: tokens per sequence before the current step: a tensor, because a compiled forward
            pass can't read a number. All layers on a device have the same.
    """

    is_compileable = True
    is_croppable = True
    cumulative_length: Any

    def __init__(
        self,
        options: LayerOptions,
        progress: Progress,
        max_cache_len: int,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__(options)
        self.progress = progress
        self.max_cache_len = max_cache_len
        self.max_batch_size = max_batch_size
        self.is_sliding = self.window is not None
        self.blocks_of_sequence = -(-max_cache_len // self.block_size)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check(key_states, value_states)
        self.allocate(self.max_batch_size or len(key_states), Geometry.of(key_states, value_states), key_states.device)

    def allocate(self, num_rows: int, geometry: Geometry, device: torch.device) -> None:
        """Allocates storage for `num_rows` sequences."""
        num_blocks = num_rows * self.blocks_of_sequence
        self.storage = storage = self._new_storage(num_blocks, geometry, device)
        self.num_rows = num_rows
        self.cumulative_length = self.progress.length_on(storage.device)
        blocks = torch.arange(num_blocks, dtype=torch.int32, device=storage.device)
        self.table = blocks.view(-1, num_rows).T.contiguous()
        counts = [] if storage.clip_counter is None else [storage.clip_counter.counts]
        offsets = [x for x in (storage.k_offset, storage.v_offset) if x is not None]
        for tensor in (storage.storage, storage.k_scale, storage.v_scale, self.table, *offsets, *counts):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores new tokens and returns what their queries attend to: all `max_cache_len` dequantized, of
        which masks hide those not there yet, or where to read them."""
        self._prepare(key_states, value_states)
        readable = self._is_readable(key_states)
        step = self._step(len(key_states), key_states.shape[2])
        self._append(key_states, value_states, step.slots)
        given = self._given(key_states, value_states, step, readable)
        self.progress.end(self.index)
        return given

    def _step(self, batch: int, num_tokens: int) -> Step:
        length = self.cumulative_length

        def make() -> Step:
            positions = torch.arange(num_tokens, device=length.device) + length
            slots = slots_of(positions, batch, self.num_rows, self.block_size)
            end = length + num_tokens
            return Step(slots, self.table[:batch], num_tokens, 0, end, 0, self.max_cache_len)

        return self.progress.step(("full", str(length.device)), make)

    def _prepare(self, key: Tensor, value: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self._check(key, value)
        self._check_batch(len(key))
        self.progress.begin(self.index, key.shape[2])
        self._check_room(key.shape[2])
        self.batch_size = len(key)

    def _check_batch(self, batch: int) -> None:
        if batch > self.num_rows:
            raise ValueError(
                f"Fp8Cache: key must have at most max_batch_size={self.num_rows} sequences, got {batch} in layer {self.index}"
            )

    def _check_room(self, num_tokens: int) -> None:
        # The length is on the device: reading it would synchronize in every step on a GPU.
        eager_on_cpu = self.cumulative_length.device.type == "cpu" and not torch.compiler.is_compiling()
        length = int(self.cumulative_length) if eager_on_cpu else 0
        if length + num_tokens > self.max_cache_len:
            raise ValueError(
                f"Fp8Cache: max_cache_len must be at least the {length + num_tokens} tokens of a sequence, "
                f"got {self.max_cache_len}"
            )

    def _select(self, sequences: Tensor) -> None:
        assert self.storage is not None
        self._check_batch(len(sequences))
        targets = self._blocks_of(torch.arange(len(sequences), device=sequences.device))
        sources = self._blocks_of(sequences)
        self.storage.copy_blocks(torch.stack([sources.flatten(), targets.flatten()], 1))
        self.batch_size = len(sequences)

    def get_seq_length(self) -> Any:
        """Tokens of a sequence: a tensor, or 0 before the first key."""
        if not self.is_initialized:
            return 0
        ahead = self.progress.ahead(self.index)
        return self.cumulative_length + ahead if ahead else self.cumulative_length

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of tokens that the next `update` returns, and the position of the first."""
        return self.max_cache_len, 0

    def _num_tokens_kept(self) -> int:
        return self.num_rows * self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Does nothing, because `Fp8Cache.crop` updates `Progress`."""

    def reset(self) -> None:
        """Removes all tokens and keeps the storage; the next batch may have another size."""
        self.batch_size = None
        self._gave_whole = True
        self.progress.reset()
        if self.storage is not None:
            self.storage.storage.view(torch.uint8).zero_()
            if self.storage.dynamic:
                self.storage.k_scale.zero_()
                self.storage.v_scale.zero_()
