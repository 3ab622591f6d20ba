"""The layers of `Fp8Cache`: one that grows, one of fixed size, and one of fixed size that keeps a window.

Sequence ``s`` of ``num_rows`` has its tokens of block ``j`` in block ``j * num_rows + s`` of the storage, so
that a storage grows at its end. All sequences of a batch are of one length, padding included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fp8kv.kv_cache import PagedKVCache
from fp8kv.quantization import dequantize, quantize


class Fp8Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What the layers share: the storage, its checks, and the way of tokens in and out.

    Args:
        index: of the layer, for messages.
        options: dtype, layout, block_size and scales of the `PagedKVCache`.

    Attributes:
        storage: the `PagedKVCache`; None before the first key.
        batch_size: sequences; None before the first key.
        is_sliding: whether the layer looks back over a window only.
    """

    is_sliding = False

    def __init__(self, index: int, options: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.options = options
        self.block_size: int = options["block_size"]
        self.storage: PagedKVCache | None = None
        self.num_rows = 0
        self.batch_size: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, with the scales of single tokens."""
        return 0 if self.storage is None else self.storage.nbytes

    @property
    def nbytes_16bit(self) -> int:
        """Bytes of the keys and values that Transformers' own 16-bit cache holds at the same point."""
        if self.storage is None:
            return 0
        return 2 * 2 * self._num_tokens_kept() * self.storage.num_kv_heads * self.storage.head_size

    def _num_tokens_kept(self) -> int:
        raise NotImplementedError

    def _new_storage(self, num_blocks: int, num_kv_heads: int, head_size: int, device: Any) -> PagedKVCache:
        for name in ("k", "v"):
            scale = getattr(self.options["scales"], name, None)
            if isinstance(scale, Tensor) and scale.numel() not in (1, num_kv_heads):
                raise ValueError(
                    f"Fp8Cache: scales of layer {self.index} must have 1 or {num_kv_heads} elements "
                    f"for {name}, as its keys have {num_kv_heads} heads, got {scale.numel()}"
                )
        return PagedKVCache(
            num_blocks, num_kv_heads=num_kv_heads, head_size=head_size, device=device, **self.options
        )

    def _check(self, key: Tensor, value: Tensor) -> None:
        """That the new tokens fit together and fit the tokens before them."""
        if key.dim() != 4 or key.shape != value.shape:
            raise ValueError(
                "Fp8Cache: key and value must be of one shape [batch, num_kv_heads, tokens, head_size], "
                f"got {list(key.shape)} and {list(value.shape)} in layer {self.index}"
            )
        batch, heads, _, head_size = key.shape
        if self.batch_size is not None and batch != self.batch_size:
            raise ValueError(
                f"Fp8Cache: key must have the {self.batch_size} sequences that the cache has, "
                f"got {batch} in layer {self.index}"
            )
        storage = self.storage
        if storage is not None and (heads, head_size) != (storage.num_kv_heads, storage.head_size):
            raise ValueError(
                f"Fp8Cache: key must have num_kv_heads={storage.num_kv_heads} and "
                f"head_size={storage.head_size} as before, "
                f"got {heads} and {head_size} in layer {self.index}"
            )

    def _append(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Stores tokens at their positions within the storage, the same for all sequences."""
        storage = self.storage
        assert storage is not None
        step = self.block_size
        places = positions + positions // step * ((self.num_rows - 1) * step)
        slots = places + torch.arange(0, len(key) * step, step, device=places.device)[:, None]
        storage.append(_packed(key), _packed(value), slots.flatten())

    def _read(
        self, table: Tensor, num_tokens: int, dtype: torch.dtype, seq_starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all sequences, dequantized: ``[batch, heads, num_tokens, head_size]``."""
        storage = self.storage
        assert storage is not None
        shape = (len(table), num_tokens, storage.num_kv_heads, storage.head_size)
        key, value = (torch.empty(shape, dtype=dtype, device=storage.device) for _ in range(2))
        sums = torch.arange(len(table) + 1, dtype=torch.int32, device=storage.device) * num_tokens
        storage.gather_rows(key.flatten(0, 1), value.flatten(0, 1), table, sums, seq_starts)
        return key.transpose(1, 2), value.transpose(1, 2)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``s`` becomes what sequence ``beam_idx[s]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes `repeats` neighbors."""
        if self.batch_size is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences, in this order; a mask keeps those where it is true."""
        if self.storage is None or self.batch_size is None:
            return
        indices = torch.as_tensor(indices, device=self.storage.device)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def _select(self, sequences: Tensor) -> None:
        raise NotImplementedError

    def _blocks_of(self, sequences: Tensor) -> Tensor:
        """Blocks of the storage that hold these sequences: ``[blocks of a sequence, sequences]``."""
        assert self.storage is not None
        first = torch.arange(0, self.storage.num_blocks, self.num_rows, device=self.storage.device)
        return first[:, None] + sequences

    def check_crop(self, tokens_to_remove: int) -> int:
        """The length that `crop` leaves.

        Raises:
            ValueError: there are not so many tokens, or those in the window before them are gone.
        """
        length = int(self.get_seq_length())
        if not -length <= tokens_to_remove <= 0:
            raise ValueError(
                f"Fp8Cache.crop: tokens_to_remove must be from {-length} to 0, as there are {length} tokens, "
                f"got {tokens_to_remove}"
            )
        return length + tokens_to_remove


class DynamicFp8Layer(Fp8Layer):  # type: ignore[no-untyped-call]
    """A layer that grows with its tokens; with a window it forgets tokens that no query will see again.

    Args:
        index, options: as for `Fp8Layer`.
        window: tokens that a query sees, itself included; None: all.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, index: int, options: dict[str, Any], window: int | None = None) -> None:
        super().__init__(index, options)
        self.window = window
        self.is_sliding = window is not None
        self.length = 0
        self.num_dropped = 0  # tokens at the front that the storage no longer has: whole blocks
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check(key_states, value_states)
        self.storage = self._new_storage(0, key_states.shape[1], key_states.shape[3], key_states.device)
        self.num_rows = self.batch_size = len(key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens and returns all that their queries may see, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        start, end = self._first_seen(self.length), self.length + key_states.shape[2]
        self._reserve(end)
        device, dropped = key_states.device, self.num_dropped
        positions = torch.arange(self.length - dropped, end - dropped, device=device)
        self._append(key_states, value_states, positions)
        starts = torch.full((self.num_rows,), start - dropped, dtype=torch.int32, device=device)
        tokens = self._read(self._table(), end - start, key_states.dtype, starts)
        self.length = end
        if not self.record_past:
            self._forget()
        return tokens

    def _first_seen(self, position: int) -> int:
        """The first position that a query at `position` sees."""
        return 0 if self.window is None else max(position - self.window + 1, 0)

    def _table(self) -> Tensor:
        assert self.storage is not None
        blocks = torch.arange(self.storage.num_blocks, dtype=torch.int32, device=self.storage.device)
        return blocks.view(-1, self.num_rows).T

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
        """Gives back what tokens out of the window take, once it is more than the slack."""
        unseen = self._blocks_unseen()
        seen = self._blocks_needed(self.length) - unseen
        if unseen > seen // 8 + 1:
            self._resize(unseen, _with_slack(seen))

    def _resize(self, drop: int, num_blocks: int) -> None:
        """Leaves out `drop` blocks of every sequence at the front, and makes room for `num_blocks`."""
        assert self.storage is not None
        kept = torch.arange(
            drop * self.num_rows,
            min(drop + num_blocks, self._blocks_needed(self.length)) * self.num_rows,
            device=self.storage.device,
        )
        self._replace(kept, num_blocks * self.num_rows)
        self.num_dropped += drop * self.block_size

    def _replace(self, blocks: Tensor, num_blocks: int) -> None:
        """A new storage that begins with these blocks of the old one."""
        old = self.storage
        assert old is not None
        self.storage = self._new_storage(num_blocks, old.num_kv_heads, old.head_size, old.device)
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
        """How many tokens the next `update` returns, and the position of the first one."""
        start = self._first_seen(self.length)
        return self.length - start + query_length, start

    def _num_tokens_kept(self) -> int:
        return self.num_rows * (self.length - self._first_seen(self.length))

    def activate_past_recording(self) -> None:
        """Keeps tokens out of the window until `crop`, so that any number can be removed."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> int:
        kept = super().check_crop(tokens_to_remove)
        if self._first_seen(kept) < self.num_dropped:
            raise ValueError(_window_is_gone(self.index, tokens_to_remove))
        return kept

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens: ``crop(-3)`` removes three."""
        self.length = self.check_crop(tokens_to_remove)
        if self.is_initialized:
            self._forget()

    def reset(self) -> None:
        """Forgets everything and gives the storage back; the next batch may be of another size."""
        self.storage = None
        self.batch_size = None
        self.num_rows = self.length = self.num_dropped = 0
        self.is_initialized = False


class StaticFp8Layer(Fp8Layer):  # type: ignore[no-untyped-call]
    """A layer of fixed size: its tensors keep their addresses, and no shape depends on its length.

    Args:
        index, options: as for `Fp8Layer`.
        max_cache_len: tokens of a sequence.
        max_batch_size: sequences; None: those of the first key.
        is_sliding: whether the model's masks are those of a window.

    Attributes:
        cumulative_length: tokens of a sequence: a tensor, as a compiled forward pass can't read a number.
    """

    is_compileable = True
    is_croppable = True
    cumulative_length: Any

    def __init__(
        self,
        index: int,
        options: dict[str, Any],
        max_cache_len: int,
        max_batch_size: int | None = None,
        is_sliding: bool = False,
    ) -> None:
        super().__init__(index, options)
        self.max_cache_len = max_cache_len
        self.max_batch_size = max_batch_size
        self.is_sliding = is_sliding
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device="cpu")
        self.blocks_of_sequence = -(-max_cache_len // self.block_size)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check(key_states, value_states)
        batch, heads, _, head_size = key_states.shape
        self.allocate(self.max_batch_size or batch, heads, head_size, key_states.device)

    def allocate(self, num_rows: int, num_kv_heads: int, head_size: int, device: torch.device) -> None:
        """Room for `num_rows` sequences."""
        num_blocks = num_rows * self.blocks_of_sequence
        self.storage = storage = self._new_storage(num_blocks, num_kv_heads, head_size, device)
        self.num_rows = num_rows
        self.cumulative_length = self.cumulative_length.to(storage.device)
        blocks = torch.arange(num_blocks, dtype=torch.int32, device=storage.device)
        self.table = blocks.view(-1, num_rows).T.contiguous()
        for tensor in (storage.storage, storage.k_scale, storage.v_scale, self.cumulative_length, self.table):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens and returns all `max_cache_len`, dequantized; masks hide those not there yet."""
        self._prepare(key_states, value_states)
        num_tokens = key_states.shape[2]
        positions = torch.arange(num_tokens, device=key_states.device) + self.cumulative_length
        self._append(key_states, value_states, positions)
        self.cumulative_length.add_(num_tokens)
        return self._read(self.table[: len(key_states)], self.max_cache_len, key_states.dtype)

    def _prepare(self, key: Tensor, value: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self._check(key, value)
        self._check_batch(len(key))
        self._check_room(key.shape[2])
        self.batch_size = len(key)

    def _check_batch(self, batch: int) -> None:
        if batch > self.num_rows:
            raise ValueError(
                f"Fp8Cache: key must have at most max_batch_size={self.num_rows} sequences, "
                f"got {batch} in layer {self.index}"
            )

    def _check_room(self, num_tokens: int) -> None:
        # The length is on the device: on a GPU looking at it would make every step wait.
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
        """Tokens of a sequence: the tensor `cumulative_length`, or 0 before the first key."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the next `update` returns, and the position of the first one."""
        return self.max_cache_len, 0

    def _num_tokens_kept(self) -> int:
        return self.num_rows * self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens: ``crop(-3)`` removes three."""
        self.cumulative_length.fill_(self.check_crop(tokens_to_remove))

    def reset(self) -> None:
        """Forgets everything and keeps the storage; the next batch may be of another size."""
        self.batch_size = None
        self.cumulative_length.zero_()
        if self.storage is not None:
            self.storage.storage.view(torch.uint8).zero_()
            if self.storage.dynamic:
                self.storage.k_scale.zero_()
                self.storage.v_scale.zero_()


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
            new = self._as_stored(key_states, 0), self._as_stored(value_states, 1)
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

    def _as_stored(self, x: Tensor, side: int) -> Tensor:
        """The values that the storage would give back for tokens that it may have no room for."""
        storage = self.storage
        assert storage is not None
        if storage.dynamic:
            q, scale = quantize(x, group_shape=(1, -1), dtype=storage.dtype)
            return dequantize(q, scale, group_shape=(1, -1), dtype=x.dtype)
        scale = (storage.k_scale, storage.v_scale)[side].view(1, -1, 1, 1)
        q, _ = quantize(x, scale, dtype=storage.dtype)
        return dequantize(q, scale, dtype=x.dtype)

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
            raise ValueError(_window_is_gone(self.index, tokens_to_remove))
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


def _packed(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head_size] as rows of tokens; no part of an autograd graph."""
    return x.detach().transpose(1, 2).flatten(0, 1)


def _with_slack(num_blocks: int) -> int:
    return num_blocks + num_blocks // 8


def _window_is_gone(index: int, tokens_to_remove: int) -> str:
    return (
        f"Fp8Cache.crop: tokens_to_remove must leave the window of layer {index} in the cache, "
        f"got {tokens_to_remove}; call activate_past_recording before the tokens are added"
    )
