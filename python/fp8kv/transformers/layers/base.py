"""`Fp8Layer`: the base class of the layers of `Fp8Cache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

from fp8kv.kv_cache import PagedKVCache
from fp8kv.kv_cache.paged import gather_rows
from fp8kv.transformers import attention
from fp8kv.transformers.clipping import Clipping
from fp8kv.transformers.step import Step


@dataclass
class LayerOptions:
    """Options of a layer.

    Args:
        index: of the layer.
        storage: dtype, layout, block_size, scales and offsets of the `PagedKVCache`.
        config: of the language model, with its attention function.
        clipping: shared by all layers of the cache.
        direct: whether that function may read the storage.
        is_shared: whether other layers of the model use the keys and values that `update` returns.
        window: number of tokens that a query sees, including itself; None: all.
    """

    index: int
    storage: dict[str, Any]
    config: PreTrainedConfig
    clipping: Clipping
    direct: bool = True
    is_shared: bool = False
    window: int | None = None


class Geometry(NamedTuple):
    """Heads of keys and values, as `PagedKVCache` names them."""

    num_kv_heads: int
    head_size: int
    v_head_size: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Geometry:
        """The geometry of ``[batch, num_kv_heads, tokens, head_size]``."""
        return cls(key.shape[1], key.shape[3], value.shape[3])

    @classmethod
    def of_storage(cls, storage: PagedKVCache) -> Geometry:
        return cls(storage.num_kv_heads, storage.head_size, storage.v_head_size)


class Fp8Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Base class: the storage, its checks, and how tokens are stored and read.

    Attributes:
        storage: the `PagedKVCache`; None before the first key.
        batch_size: sequences; None before the first key.
        is_sliding: whether the layer has a window.
        is_reached: whether the result of the last `update` reached the attention function "fp8kv".
    """

    is_sliding = False

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.options = options
        self.index = options.index
        self.window = options.window
        self.block_size: int = options.storage["block_size"]
        self.storage: PagedKVCache | None = None
        self.num_rows = 0
        self.batch_size: int | None = None
        self.is_reached = False
        self._gave_whole = True

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, including scales per token."""
        return 0 if self.storage is None else self.storage.nbytes

    @property
    def nbytes_16bit(self) -> int:
        """Bytes of the keys and values that Transformers' own 16-bit cache holds at the same point."""
        if self.storage is None:
            return 0
        elements = self.storage.head_size + self.storage.v_head_size
        return 2 * self._num_tokens_kept() * self.storage.num_kv_heads * elements

    def _num_tokens_kept(self) -> int:
        raise NotImplementedError

    def _new_storage(self, num_blocks: int, geometry: Geometry, device: Any) -> PagedKVCache:
        self._check_scales(geometry)
        storage = PagedKVCache(num_blocks, **geometry._asdict(), device=device, **self.options.storage)
        self.options.clipping.watch(storage)
        return storage

    def _check_scales(self, geometry: Geometry) -> None:
        storage, num_kv_heads = self.options.storage, geometry.num_kv_heads
        for name, whose, head_size in (("k", "keys", geometry.head_size), ("v", "values", geometry.v_head_size)):
            scale = getattr(storage["scales"], name, None)
            if isinstance(scale, Tensor) and scale.dim() < 2 and scale.numel() not in (1, num_kv_heads):
                raise ValueError(
                    f"Fp8Cache: scales of layer {self.index} must have 1 or {num_kv_heads} elements "
                    f"for {name}, as its {whose} have {num_kv_heads} heads, got {scale.numel()}"
                )
            offset = f"{name}_offset"
            own = storage.get(offset, getattr(storage["scales"], offset, None))
            for what, x in ((f"scales of {name}", scale), (offset, own)):
                if isinstance(x, Tensor) and x.dim() == 2 and x.shape != (num_kv_heads, head_size):
                    raise ValueError(
                        f"Fp8Cache: {what} in layer {self.index} must have the shape "
                        f"{[num_kv_heads, head_size]}, as its {whose} have {num_kv_heads} heads of {head_size}, "
                        f"got {list(x.shape)}"
                    )

    def _check(self, key: Tensor, value: Tensor) -> None:
        """Checks that the new tokens are consistent with each other and with the stored ones."""
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "Fp8Cache: key and value must be [batch, num_kv_heads, tokens, head_size], alike but for head_size, "
                f"got {list(key.shape)} and {list(value.shape)} in layer {self.index}"
            )
        batch = len(key)
        if self.batch_size is not None and batch != self.batch_size:
            raise ValueError(
                f"Fp8Cache: key must have the {self.batch_size} sequences that the cache has, got {batch} in layer {self.index}"
            )
        if self.storage is None:
            return
        ours = Geometry.of_storage(self.storage)
        for name, x, size in (("key", key, ours.head_size), ("value", value, ours.v_head_size)):
            if (x.shape[1], x.shape[3]) != (ours.num_kv_heads, size):
                raise ValueError(
                    f"Fp8Cache: {name} must have num_kv_heads={ours.num_kv_heads} and head_size={size} as before, "
                    f"got {x.shape[1]} and {x.shape[3]} in layer {self.index}"
                )

    def _is_readable(self, key: Tensor) -> bool:
        """Whether the attention function may read the tokens of this step from the storage.

        The tensors of the previous step must have reached it unchanged.
        """
        if not self.is_reached and not self._gave_whole:  # this order avoids guards on both
            raise attention.unreached(self.index)
        options = self.options
        return (
            options.direct
            and self.is_reached
            and key.shape[2] <= attention.MAX_NEW_TOKENS
            and attention.runs_on(key.device)
            and options.config._attn_implementation == attention.NAME
            and not (torch.is_grad_enabled() and key.requires_grad)
        )

    def _append(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        assert self.storage is not None
        # Under autocast keys are float32 after RoPE, and values are not.
        self.storage.append(_packed(key), _packed(value.to(key.dtype)), slots)

    def _given(self, key: Tensor, value: Tensor, step: Step, readable: bool) -> tuple[Tensor, Tensor]:
        """What `update` returns after the new tokens are stored.

        Only the new tokens if the attention function reads the storage, otherwise all of them, dequantized.
        """
        whole = not readable or self.options.is_shared
        # Aliases, because the marks are for this step, not for the caller's tensors.
        result = self.read(step, key.dtype) if whole else (key.view(key.shape), value.view(value.shape))
        return self._marked(*result, step if readable else None, whole)

    def _marked(self, key: Tensor, value: Tensor, step: Step | None = None, whole: bool = True) -> tuple[Tensor, Tensor]:
        self.is_reached, self._gave_whole = False, whole
        return attention.Stored(self, step, whole).mark(key, value)

    def read(self, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The tokens that queries of a step may see, dequantized: ``[batch, heads, tokens, head_size]``."""
        storage = self.storage
        assert storage is not None
        shape = (len(step.table), step.num_read, storage.num_kv_heads)
        key, value = (
            torch.empty((*shape, size), dtype=dtype, device=storage.device) for size in (storage.head_size, storage.v_head_size)
        )
        gather_rows(storage, key.flatten(0, 1), value.flatten(0, 1), step.table, *step.to_gather())
        return key.transpose(1, 2), value.transpose(1, 2)

    def attend(
        self,
        query: Tensor,
        step: Step,
        starts: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens of a step to the stored ones.

        Args:
            query: ``[batch, num_heads, new tokens, head_size]``.
            step: of these tokens.
            starts: int32 ``[batch]``, the first position that each sequence sees; None: all.
            softmax_scale, softcap, sinks: as for `fp8kv.paged_attention`; None for none.

        Returns:
            ``[batch, new tokens, num_heads, head_size of V]``.
        """
        assert self.storage is not None
        seq_lens, cu_query_lens = step.to_attend()
        rows = query.transpose(1, 2)
        out = self.storage.attend(
            rows.flatten(0, 1), step.table, seq_lens, softmax_scale=softmax_scale,
            cu_query_lens=cu_query_lens, max_query_len=step.num_tokens,
            seq_starts=None if starts is None else step.seq_starts(starts), sliding_window=self.window,
            softcap=softcap or 0.0, sinks=sinks,
        )  # fmt: skip
        return out.view(*rows.shape[:3], -1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces sequence ``s`` by sequence ``beam_idx[s]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, adjacently."""
        if self.batch_size is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences, in this order; or those where a mask is true."""
        if self.storage is None or self.batch_size is None:
            return
        indices = torch.as_tensor(indices, device=self.storage.device)
        count = self.batch_size
        if indices.dtype == torch.bool:
            if indices.shape != (count,):
                raise ValueError(f"Fp8Cache: a mask of sequences must have the shape [{count}], got {list(indices.shape)}")
            indices = indices.nonzero().flatten()
        elif indices.device.type == "cpu":
            wrong = [i for i in indices.tolist() if not -count <= i < count]
            if wrong:
                raise ValueError(f"Fp8Cache: sequences must be from {-count} to {count - 1}, got {wrong[0]}")
        self._select(torch.where(indices < 0, indices + count, indices))

    def _select(self, sequences: Tensor) -> None:
        raise NotImplementedError

    def _blocks_of(self, sequences: Tensor) -> Tensor:
        """Blocks of the storage that hold these sequences: ``[blocks of a sequence, sequences]``."""
        assert self.storage is not None
        first = torch.arange(0, self.storage.num_blocks, self.num_rows, device=self.storage.device)
        return first[:, None] + sequences

    def check_crop(self, tokens_to_remove: int) -> int:
        """The length after `crop`.

        Raises:
            ValueError: there are fewer tokens, or tokens in the window before them are gone.
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
