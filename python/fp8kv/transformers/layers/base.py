"""`Fp8Layer`: what the layers of `Fp8Cache` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fp8kv.kv_cache import PagedKVCache
from fp8kv.kv_cache.paged import gather_rows


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
        gather_rows(storage, key.flatten(0, 1), value.flatten(0, 1), table, sums, seq_starts)
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


def _packed(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head_size] as rows of tokens; no part of an autograd graph."""
    return x.detach().transpose(1, 2).flatten(0, 1)


def window_is_gone(index: int, tokens_to_remove: int) -> str:
    return (
        f"Fp8Cache.crop: tokens_to_remove must leave the window of layer {index} in the cache, "
        f"got {tokens_to_remove}; call activate_past_recording before the tokens are added"
    )
