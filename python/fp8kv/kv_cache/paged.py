"""`PagedKVCache`: the paged KV cache of one layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from fp8kv._checks import (
    LAYOUTS,
    check_choice,
    check_integer,
    check_offset_values,
    check_scale_values,
    check_size,
    placed,
    quoted,
)
from fp8kv._dtypes import CACHE_DTYPES, CACHE_NAMES, FORMATS, FP8_DTYPES, QUANTIZED_CACHE_NAMES, dtype_name
from fp8kv.kv_cache import ops
from fp8kv.kv_cache.attention import paged_attention
from fp8kv.kv_cache.clipping import ClipCounter, Clipped, clipped_sentence

_INT32 = torch.iinfo(torch.int32)
#: Bytes that V, and the next block, begin at a multiple of where K and V have two sizes or dtypes.
_ALIGNMENT = 16


class PagedKVCache:
    """The paged KV cache of one layer: owns the storage and the scales, stores tokens and reads them back.

    Its sizes, `layout` and `device` are attributes of the same names. It can be copied and pickled.

    Args:
        num_blocks: number of blocks.
        block_size: tokens of a block.
        num_kv_heads: heads of K, and of V.
        head_size: elements of a head.
        v_head_size: elements of a head of V; None: `head_size`. 0: there is no V, as in a cache of latent
            vectors, whose one head is both K and V.
        dtype: "fp8" or "fp8_e4m3", "fp8_e5m2", "int8", "float16", "bfloat16", "float32", or the torch dtype.
        v_dtype: likewise, of V; None: `dtype`.
        layout: "NHD" or "HND": whether the heads of a token, or the tokens of a head, lie together.
        device: None is PyTorch's default device.
        scales: None: 1.0, and what that clips is counted; see `clipped`. An object with ``.k`` and ``.v``:
            floats, or tensors of any floating-point dtype, of 1 or num_kv_heads elements, or one for each
            channel, ``[num_kv_heads, head_size]``; they are copied, as are its ``.k_offset`` and
            ``.v_offset`` if it has them. Without V, ``.v`` may be None or must be the same as ``.k``.
            "dynamic": one scale for each token and head, which `append` computes. FP8 and int8 only; of two
            dtypes, the other uses none.
        k_offset: floating-point ``[num_kv_heads, head_size]``, which is subtracted from K before it is
            quantized, and added again when it is read; None: the offset of `scales`, or 0.
        v_offset: likewise, of V.

    Attributes:
        storage: the one tensor of K and V, 0 at first: NHD
            ``[num_blocks, 2, block_size, num_kv_heads, head_size]``, HND
            ``[num_blocks, 2, num_kv_heads, block_size, head_size]``. A block is contiguous in memory. With two
            head sizes or dtypes, ``[num_blocks, elements of a block]``: its K, then its V, each in this order
            and from a multiple of 16 bytes on; of two dtypes as uint8.
        key_cache: the view ``[num_blocks, block_size, num_kv_heads, head_size]`` of it.
        value_cache: likewise, with `v_head_size`.
        k_scale: float32 ``[1]``, ``[num_kv_heads]`` or ``[num_kv_heads, head_size]``; of a dynamic cache
            ``[num_blocks, block_size, num_kv_heads]``.
        v_scale: likewise.
        k_offset: float32 ``[num_kv_heads, head_size]``; None: 0.
        v_offset: likewise.
        kv_cache_dtype: the string for the operators.
        v_cache_dtype: likewise, of V.
        dtype: the dtype of `key_cache`.
        v_dtype: the dtype of `value_cache`.
        dynamic: whether there is a scale for each token and head.
        clip_counter: the `fp8kv.kv_cache.clipping.ClipCounter` of a cache without given scales; else
            None. One cache may go on with the counter of another.

    Raises:
        ValueError: an argument can't be used, a scale is not finite or not above 0, an offset is not finite,
            or the scales were made for a format of larger values than `dtype`.

    Example:
        >>> import torch, fp8kv
        >>> cache = fp8kv.PagedKVCache(num_blocks=8, block_size=16, num_kv_heads=2, head_size=64)
        >>> key, value = torch.ones(3, 2, 64), torch.full((3, 2, 64), 2.0)
        >>> cache.append(key, value, torch.tensor([48, 49, 50]))  # into block 3
        >>> k, v = cache.gather(torch.tensor([[3]]), seq_lens=[3])
        >>> k.shape, k.dtype, v.unique().tolist()
        (torch.Size([3, 2, 64]), torch.bfloat16, [2.0])
        >>> cache
        PagedKVCache(num_blocks=8, block_size=16, num_kv_heads=2, head_size=64, dtype='fp8', layout='NHD',
                     scales='per tensor', device='cpu', 0.03125 MiB)

    See also: `reshape_and_cache_flash`, `gather_and_dequant_cache`, `paged_attention`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        *,
        v_head_size: int | None = None,
        dtype: str | torch.dtype = "fp8",
        v_dtype: str | torch.dtype | None = None,
        layout: str = "NHD",
        device: torch.device | str | int | None = None,
        scales: Any = None,
        k_offset: Tensor | None = None,
        v_offset: Tensor | None = None,
    ) -> None:
        v_head_size = head_size if v_head_size is None else v_head_size
        sizes = {"block_size": block_size, "num_kv_heads": num_kv_heads, "head_size": head_size}
        at_least = [("num_blocks", num_blocks, 0), *((*item, 1) for item in sizes.items()), ("v_head_size", v_head_size, 0)]
        for name, size, least in at_least:
            check_size(f"PagedKVCache: {name}", size, least)
        check_choice("PagedKVCache: layout", layout, LAYOUTS)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_kv_heads, self.head_size, self.v_head_size = num_kv_heads, head_size, v_head_size
        self.layout = layout
        self.kv_cache_dtype, self.dtype = _cache_dtype("dtype", dtype)
        self.v_cache_dtype, self.v_dtype = _cache_dtype("v_dtype", dtype if v_dtype is None else v_dtype)
        if v_head_size == 0 and self.v_dtype != self.dtype:
            raise ValueError(f"PagedKVCache: v_dtype must be None without V, as v_head_size is 0, got {v_dtype!r}")
        self.dynamic = isinstance(scales, str) and scales == "dynamic"
        given = self._checked_scales(scales)
        offsets = [
            self._checked_offset(name, offset, getattr(scales, name, None))
            for name, offset in (("k_offset", k_offset), ("v_offset", v_offset))
        ]

        device = torch.get_default_device() if device is None else device
        shape, storage_dtype = self._storage_form()
        self.storage = torch.zeros(shape, dtype=storage_dtype, device=device)
        self.device = self.storage.device
        self.key_cache, self.value_cache = self._views()
        self.k_scale, self.v_scale = (
            torch.zeros((num_blocks, block_size, num_kv_heads), device=self.device, dtype=torch.float32)
            if scale is None
            else scale.to(self.device, copy=True)
            for scale in given
        )
        self.k_offset, self.v_offset = (None if offset is None else offset.to(self.device, copy=True) for offset in offsets)
        if v_head_size == 0:
            self.v_scale, self.v_offset = self.k_scale, self.k_offset
        limits = [FORMATS[one].max if one in FORMATS else math.inf for one in (self.dtype, self.v_dtype)]
        counts = scales is None and self._is_quantized
        self.clip_counter = ClipCounter(limits[0], self.device, limits[1]) if counts else None

    @property
    def _is_quantized(self) -> bool:
        """Whether K or V is."""
        return self.dtype in FORMATS or self.v_dtype in FORMATS

    def _formats(self) -> dict[str, torch.dtype]:
        """By the letter of K and of V."""
        return {"k": self.dtype, "v": self.v_dtype}

    def _channels(self, name: str) -> tuple[int, int]:
        """Heads and their elements, for scales and offsets of K or V; without V, those of V are those of K."""
        size = self.v_head_size if name.startswith("v") and self.v_head_size > 0 else self.head_size
        return self.num_kv_heads, size

    def _checked_scales(self, scales: Any) -> tuple[Tensor | None, Tensor | None]:
        """The scales of K and V, on the host; None where they are computed."""
        one = torch.ones(1, device="cpu")
        if scales is None:
            return one, one
        if not self._is_quantized:
            raise ValueError(
                f"PagedKVCache: scales must be None with dtype {self.kv_cache_dtype!r}, as only FP8 and int8 use them"
            )
        if self.dynamic:
            if any(dtype not in FORMATS for dtype in self._formats().values()):
                raise ValueError(
                    'PagedKVCache: scales must not be "dynamic" if only K or only V is FP8 or int8, got dtype '
                    f"{self.kv_cache_dtype!r} and v_dtype {self.v_cache_dtype!r}"
                )
            return None, None
        if not (hasattr(scales, "k") and hasattr(scales, "v")):
            raise ValueError(f'PagedKVCache: scales must be None, "dynamic" or have .k and .v, got {scales!r}')
        found = []
        for side, name in (("k", self.kv_cache_dtype), ("v", self.v_cache_dtype)):
            scale = getattr(scales, side)
            if scale is None and side == "v" and self.v_head_size == 0:
                scale = scales.k
            if self._formats()[side] in FORMATS:
                check_format("PagedKVCache", name, getattr(scales, "dtype", None))
            elif scale is None:
                scale = one
            found.append(self._checked_scale(side, scale))
        if self.v_head_size == 0 and not torch.equal(*found):
            raise ValueError("PagedKVCache: scales.v must be None or the same as scales.k, as there is no V, got another")
        return found[0], found[1]

    def _checked_scale(self, side: str, scale: Any) -> Tensor:
        name = f"scales.{side}"
        if isinstance(scale, (int, float)):
            scale = torch.tensor(scale, dtype=torch.float64, device="cpu")
        if not (isinstance(scale, Tensor) and scale.is_floating_point()):
            raise ValueError(f"PagedKVCache: {name} must be a float or a floating-point tensor, got {_kind(scale)}")
        if not self._is_scale_shape(side, scale):
            raise ValueError(f"PagedKVCache: {name} must have {self._shapes(side)}, got shape {list(scale.shape)}")
        _check_real(f"PagedKVCache: {name}", scale)
        host = scale.detach().to("cpu", torch.float32, copy=True)
        host = host.reshape(-1) if host.numel() in (1, self.num_kv_heads) else host
        check_scale_values(f"PagedKVCache: {name}", host)
        return host

    def _is_scale_shape(self, name: str, scale: Tensor) -> bool:
        return scale.numel() in (1, self.num_kv_heads) or scale.shape == self._channels(name)

    def _shapes(self, name: str) -> str:
        heads, channels = f"num_kv_heads={self.num_kv_heads}", list(self._channels(name))
        return f"1 or {heads} elements, or the shape [num_kv_heads, head_size]={channels}"

    def _checked_offset(self, name: str, given: Any, of_scales: Any) -> Tensor | None:
        """On the host."""
        if given is not None and of_scales is not None:
            raise ValueError(f"PagedKVCache: {name} must be None, as scales have one, got both")
        name, offset = (name, given) if of_scales is None else (f"scales.{name}", of_scales)
        if offset is None:
            return None
        if not (isinstance(offset, Tensor) and offset.is_floating_point()):
            raise ValueError(f"PagedKVCache: {name} must be a floating-point tensor, got {_kind(offset)}")
        if self.v_head_size == 0 and "v_offset" in name:
            raise ValueError(f"PagedKVCache: {name} must be None, as there is no V, got shape {list(offset.shape)}")
        if self._formats()[name.removeprefix("scales.")[0]] not in FORMATS:
            of_side = self.v_cache_dtype if "v_offset" in name else self.kv_cache_dtype
            raise ValueError(f"PagedKVCache: {name} must be None with dtype {of_side!r}, as only FP8 and int8 use offsets")
        channels = self._channels(name.removeprefix("scales."))
        if offset.shape != channels:
            raise ValueError(
                f"PagedKVCache: {name} must have the shape [num_kv_heads, head_size]={list(channels)}, got {list(offset.shape)}"
            )
        _check_real(f"PagedKVCache: {name}", offset)
        host = offset.detach().to("cpu", torch.float32, copy=True)
        check_offset_values(f"PagedKVCache: {name}", host)
        return host

    def use_scales(
        self,
        k_scale: Tensor,
        v_scale: Tensor,
        k_offset: Tensor | None = None,
        v_offset: Tensor | None = None,
    ) -> None:
        """Uses these tensors as scales without a copy: later changes in place apply.

        What is in the cache is not touched; it means something else if the values differ. A cache that was
        given no scales counts no longer what it clips.

        Args:
            k_scale: float32 of 1 or num_kv_heads elements, or ``[num_kv_heads, head_size]``, on the device of
                the cache.
            v_scale: likewise; `k_scale` itself, if there is no V.
            k_offset: float32 ``[num_kv_heads, head_size]``, on this device; None: the cache keeps its own.
            v_offset: likewise; None, if there is no V.

        Raises:
            ValueError: the cache is dynamic or not quantized, or a tensor doesn't fit.

        Example:
            >>> import torch, fp8kv
            >>> cache = fp8kv.PagedKVCache(8, 16, 2, 64)
            >>> k_scale, v_scale = torch.ones(2), torch.ones(2)
            >>> cache.use_scales(k_scale, v_scale)
            >>> _ = k_scale.fill_(0.5)
            >>> cache.k_scale
            tensor([0.5000, 0.5000])
        """
        if self.dynamic or not self._is_quantized:
            what = "scales of its own" if self.dynamic else f"dtype {self.kv_cache_dtype!r} and no scales"
            raise ValueError(f"PagedKVCache.use_scales: the cache must take given scales, but has {what}")
        if self.v_head_size == 0 and (v_scale is not k_scale or v_offset is not None):
            raise ValueError("PagedKVCache.use_scales: v_scale must be k_scale, and v_offset None, as there is no V")
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if not isinstance(scale, Tensor):
                raise ValueError(f"PagedKVCache.use_scales: {name} must be a tensor, got {type(scale).__name__}")
            self._check_in_use(name, scale, self._is_scale_shape(name, scale), f"with {self._shapes(name)}")
        for name, offset in (("k_offset", k_offset), ("v_offset", v_offset)):
            if offset is not None:
                channels = self._channels(name)
                self._check_in_use(name, offset, offset.shape == channels, f"of shape {list(channels)}")
        self.k_scale, self.v_scale = k_scale, v_scale
        self.k_offset = self.k_offset if k_offset is None else k_offset
        self.v_offset = self.v_offset if v_offset is None else v_offset
        if self.v_head_size == 0:
            self.v_offset = self.k_offset
        self.clip_counter = None

    def _check_in_use(self, name: str, x: Tensor, fits: bool, expected: str) -> None:
        if not fits or x.dtype != torch.float32 or x.device != self.device:
            raise ValueError(
                f"PagedKVCache.use_scales: {name} must be float32 {expected} on {self.device}, "
                f"got {dtype_name(x.dtype)} of shape {list(x.shape)} on {x.device}"
            )

    def append(self, key: Tensor, value: Tensor | None, slot_mapping: Tensor) -> None:
        """Stores tokens at their slots.

        Args:
            key: float32, float16 or bfloat16 ``[num_tokens, num_kv_heads, head_size]``, any strides; or
                quantized already, as for `reshape_and_cache_flash`, if the cache is not dynamic.
            value: likewise, ``[num_tokens, num_kv_heads, v_head_size]``; None in a cache without V.
            slot_mapping: int32 or int64 ``[num_tokens]``; tokens with a negative slot are skipped.

        Raises:
            RuntimeError: as `reshape_and_cache_flash`.

        Example:
            >>> import torch, fp8kv
            >>> cache = fp8kv.PagedKVCache(4, 16, 1, 2, scales="dynamic")
            >>> x = torch.tensor([[[7.0, -3.5]], [[1.0, 1.0]]])
            >>> cache.append(x, x, torch.tensor([20, -1]))
            >>> cache.key_cache[1, 4].tolist(), cache.k_scale[1, 4].tolist()
            ([[448.0, -224.0]], [0.015625])
        """
        if key is None or slot_mapping is None:
            name = "key" if key is None else "slot_mapping"
            raise ValueError(f"PagedKVCache.append: {name} must be a tensor, got None")
        if value is None:
            if self.v_head_size > 0:
                raise ValueError("PagedKVCache.append: value must be a tensor, as the cache has V, got None")
            value = key[..., :0]
        key_cache, value_cache = self._caches()
        v_scale, v_offset = self._of_values()
        if self.dynamic:
            ops.append_dynamic(
                key, value, key_cache, value_cache, self.k_scale, v_scale, slot_mapping,
                self.kv_cache_dtype, self.k_offset, v_offset, self.v_cache_dtype,
            )  # fmt: skip
        else:
            ops.append(
                key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, self.k_scale,
                v_scale, self.k_offset, v_offset, self.v_cache_dtype,
            )  # fmt: skip
        if self.clip_counter is not None:
            self.clip_counter.add(key, value, slot_mapping, self.k_scale, v_scale, self.k_offset, v_offset)
            # Looking at the count of a GPU would make every step wait, and traced tensors have no values.
            on_host = self.device.type == "cpu" and type(self.clip_counter.counts) is Tensor
            if on_host and not torch.compiler.is_compiling():
                self._clipped_with_warning(self.clip_counter)

    def clipped(self) -> Clipped | None:
        """How many elements `append` has clipped in a cache without given scales.

        Such a cache has the scale 1.0, which clips what is beyond 448, 57344 in E5M2 or 127 in int8:
        silently, and at the cost of the model's answers. It counts on the device, in CUDA graphs and compiled
        code too. A warning tells once that something was clipped: on the CPU when it happens, else when this
        method is called, which waits for the device.

        Returns:
            The numbers for K and V; None if the cache was given scales, computes them or is not quantized, as
            nothing is counted then.

        Example:
            >>> import torch, fp8kv
            >>> cache = fp8kv.PagedKVCache(4, 16, 1, 2)
            >>> cache.append(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([20]))
            >>> cache.clipped()
            Clipped(k=0, v=0)
        """
        return None if self.clip_counter is None else self._clipped_with_warning(self.clip_counter)

    def _clipped_with_warning(self, counter: ClipCounter) -> Clipped:
        """The warning points at the caller of `append` or `clipped`."""
        clipped = counter.read()
        if any(clipped) and not counter.warned:
            counter.warned = True
            warnings.warn(clipped_sentence("PagedKVCache", clipped, min(counter.limit, counter.v_limit)), stacklevel=3)
        return clipped

    def gather(
        self,
        block_table: Tensor,
        seq_lens: Sequence[int] | Tensor,
        dtype: torch.dtype = torch.bfloat16,
        *,
        seq_starts: Sequence[int] | Tensor | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Reads sequences back, one after the other in the rows of the result.

        Index tensors may be on any device and of any integer dtype; int32 on the device of the cache needs no
        conversion. `seq_lens` on a GPU costs a synchronization, unless `out` is given.

        Args:
            block_table: ``[num_seqs, max_blocks]``, the blocks of each sequence; entries that are not needed
                may be anything.
            seq_lens: ``[num_seqs]``, how many tokens to read of each.
            dtype: float32, float16 or bfloat16. `out`, where given, decides.
            seq_starts: ``[num_seqs]``, the first position to read of each; None: 0.
            out: key and value to write into, ``[num_rows, num_kv_heads, head_size]`` with at least
                ``sum(seq_lens)`` rows, any strides; further rows stay as they are.

        Returns:
            ``(key, value)``: `out`, or ``[sum(seq_lens), num_kv_heads, head_size]``; value with
            `v_head_size`, so of no element without V.

        Raises:
            ValueError: index tensors are not integers, or lengths are negative or too many.
            RuntimeError: as `gather_and_dequant_cache`.

        Example:
            >>> import torch, fp8kv
            >>> cache = fp8kv.PagedKVCache(4, 2, 1, 1)
            >>> x = torch.arange(1.0, 6.0).view(5, 1, 1)
            >>> cache.append(x, -x, torch.tensor([6, 7, 0, 2, 3]))  # 2 tokens in block 3 and 1 in 0; 2 in 1
            >>> key, value = cache.gather(torch.tensor([[3, 0], [1, -1]]), [3, 2], dtype=torch.float32)
            >>> key.flatten().tolist(), value.flatten().tolist()
            ([1.0, 2.0, 3.0, 4.0, 5.0], [-1.0, -2.0, -3.0, -4.0, -5.0])
            >>> key, _ = cache.gather(torch.tensor([[3, 0]]), [1], seq_starts=[2])
            >>> key.flatten().tolist()
            [3.0]
        """
        _check_out(dtype, out)
        lengths = _integers("seq_lens", seq_lens)
        if lengths.dim() != 1:
            raise ValueError(f"PagedKVCache.gather: seq_lens must be [num_seqs], got shape {list(lengths.shape)}")
        sums = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        if _is_known(lengths) and (lengths.lt(0).any() or sums[-1] > _INT32.max):
            raise ValueError(
                f"PagedKVCache.gather: seq_lens must be at least 0 and sum to at most {_INT32.max}, "
                f"got {lengths.min().item()} to {lengths.max().item()}"
            )
        if out is None:
            rows, heads = int(sums[-1]), self.num_kv_heads
            out = (
                torch.empty((rows, heads, self.head_size), dtype=dtype, device=self.device),
                torch.empty((rows, heads, self.v_head_size), dtype=dtype, device=self.device),
            )
        table, cu_seq_lens = self._int32("block_table", block_table), self._int32("seq_lens", sums)
        starts = None if seq_starts is None else self._int32("seq_starts", seq_starts)
        gather_rows(self, *out, table, cu_seq_lens, starts)
        return out

    def attend(
        self,
        query: Tensor,
        block_table: Tensor,
        seq_lens: Sequence[int] | Tensor,
        *,
        softmax_scale: float | None = None,
        cu_query_lens: Sequence[int] | Tensor | None = None,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
        q_scale: Tensor | None = None,
        seq_starts: Sequence[int] | Tensor | None = None,
        sliding_window: int | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        k_offset: Tensor | None = None,
        v_offset: Tensor | None = None,
        lse: Tensor | None = None,
        num_splits: int = 0,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Attention of queries to sequences of this cache.

        It is `paged_attention`, which says more of each argument. The tokens of the queries are appended
        before. Index tensors may be on any device and of any integer dtype; int32 on the device of the cache
        needs no conversion.

        Args:
            query: ``[num_tokens, num_heads, head_size]``: float32, float16, bfloat16, or of the FP8 dtype of
                the cache, with `q_scale`.
            block_table: ``[num_seqs, max_blocks]``, the blocks of each sequence.
            seq_lens: ``[num_seqs]``, tokens of each sequence, those of its queries included.
            softmax_scale: None: ``head_size ** -0.5``.
            cu_query_lens: ``[num_seqs + 1]``: queries of each sequence; None: one query for each.
            max_query_len: upper bound of the queries of a sequence.
            max_seq_len: upper bound of `seq_lens`.
            q_scale: of an FP8 query.
            seq_starts: ``[num_seqs]``, the first position that is seen; None: 0.
            sliding_window: how many positions a query sees, its own included; None: all.
            softcap: bound of the logits; 0: none.
            sinks: ``[num_heads]``, a logit without a value for each head.
            k_offset: ``[num_kv_heads, head_size]``, added to K; None: the cache's own.
            v_offset: likewise, to V.
            lse: ``[num_tokens, num_heads]``, written.
            num_splits: parts of the keys; 0: as many as are best.
            out: ``[num_tokens, num_heads, v_head_size]`` to write into.
            workspace: on CUDA, of `attention_workspace_size` bytes; None: a new one.

        Returns:
            `out`, or a new tensor of its shape.

        Raises:
            ValueError: index tensors are not integers.
            RuntimeError: as `paged_attention`.

        Example:
            >>> import torch, fp8kv
            >>> cache = fp8kv.PagedKVCache(4, 2, 1, 2)
            >>> value = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]])
            >>> cache.append(torch.zeros(3, 1, 2), value, torch.tensor([6, 7, 0]))  # in blocks 3 and 0
            >>> query = torch.ones(1, 4, 2)  # one token of 4 heads; the keys are 0, so it takes the mean
            >>> cache.attend(query, torch.tensor([[3, 0]]), [3])[0, 0].tolist()
            [3.0, 4.0]
        """

        if query is None:
            raise ValueError("PagedKVCache.attend: query must be a tensor, got None")
        if self.v_head_size == 0:
            raise ValueError(
                "PagedKVCache.attend: the cache must have V, got v_head_size=0; paged_attention takes a part of key_cache as V"
            )

        def indices(name: str, values: Sequence[int] | Tensor | None) -> Tensor | None:
            return None if values is None else self._int32(name, values, "attend")

        key_cache, value_cache = self._caches()
        return paged_attention(
            query, key_cache, value_cache, self._int32("block_table", block_table, "attend"),
            self._int32("seq_lens", seq_lens, "attend"), kv_cache_dtype=self.kv_cache_dtype,
            k_scale=self.k_scale, v_scale=self.v_scale, softmax_scale=softmax_scale,
            cu_query_lens=indices("cu_query_lens", cu_query_lens), max_query_len=max_query_len,
            max_seq_len=max_seq_len, q_scale=q_scale, seq_starts=indices("seq_starts", seq_starts),
            sliding_window=sliding_window, softcap=softcap, sinks=sinks,
            k_offset=self.k_offset if k_offset is None else k_offset,
            v_offset=self.v_offset if v_offset is None else v_offset,
            lse=lse, num_splits=num_splits, out=out, workspace=workspace,
            v_cache_dtype=None if self.v_dtype == self.dtype else self.v_cache_dtype,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """The storage as bytes, without its views, as pickle has no FP8."""
        state = {name: x for name, x in vars(self).items() if name not in ("key_cache", "value_cache")}
        state["storage"] = _viewed(self.storage, torch.uint8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.storage = _viewed(self.storage, self._storage_form()[1])
        self.key_cache, self.value_cache = self._views()

    def _caches(self) -> tuple[Tensor, Tensor]:
        """`key_cache` and `value_cache`; in compiled code made again from the tensor that both are views of.

        That one must be the input of compiled code: PyTorch captures no CUDA graph that writes to inputs that
        overlap.
        """
        return self._views() if torch.compiler.is_compiling() else (self.key_cache, self.value_cache)

    def _storage_form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `storage`."""
        heads, size = self.num_kv_heads, self.head_size
        inner = (self.block_size, heads, size) if self.layout == "NHD" else (heads, self.block_size, size)
        if self.v_head_size == 0:
            return (self.num_blocks, *inner), self.dtype
        if (self.v_head_size, self.v_dtype) == (size, self.dtype):
            return (self.num_blocks, 2, *inner), self.dtype
        dtype = self.dtype if self.v_dtype == self.dtype else torch.uint8
        return (self.num_blocks, self._parts(dtype)[-1]), dtype

    def _parts(self, dtype: torch.dtype) -> list[int]:
        """Where, in elements of `dtype`, the K and the V of a block end, and what begins next begins."""
        bounds, end = [], 0
        for size, element in ((self.head_size, self.dtype), (self.v_head_size, self.v_dtype)):
            bytes_end = end * dtype.itemsize + self.block_size * self.num_kv_heads * size * element.itemsize
            end = -(-bytes_end // _ALIGNMENT) * _ALIGNMENT // dtype.itemsize
            bounds += [bytes_end // dtype.itemsize, end]
        return bounds

    def _views(self) -> tuple[Tensor, Tensor]:
        if self.v_head_size == 0:
            key, value = self.storage, self.storage[..., :0]
        elif self.storage.dim() > 2:
            key, value = self.storage.unbind(1)
        else:
            k_end, v_begin, v_end, _ = self._parts(self.storage.dtype)
            key = self._view(self.storage[:, :k_end], self.head_size, self.dtype)
            value = self._view(self.storage[:, v_begin:v_end], self.v_head_size, self.v_dtype)
        return (key, value) if self.layout == "NHD" else (key.transpose(1, 2), value.transpose(1, 2))

    def _view(self, part: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
        inner = (self.block_size, self.num_kv_heads) if self.layout == "NHD" else (self.num_kv_heads, self.block_size)
        return part.view(dtype).view(self.num_blocks, *inner, head_size)

    def _of_values(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of V for the operators; of no channel, if there is no V."""
        scale, offset = self.v_scale, self.v_offset
        if self.v_head_size > 0:
            return scale, offset
        per_channel = scale.shape == (self.num_kv_heads, self.head_size)
        return scale[:, :0] if per_channel else scale, None if offset is None else offset[:, :0]

    def _int32(self, name: str, values: Sequence[int] | Tensor, method: str = "gather") -> Tensor:
        """On the device of the cache. What int32 can't hold becomes its largest or smallest value."""
        if isinstance(values, Tensor) and values.dtype == torch.int32:
            return values.to(self.device)
        return _integers(name, values, method).clamp(_INT32.min, _INT32.max).to(self.device, torch.int32)

    def copy_blocks(self, block_mapping: Sequence[tuple[int, int]] | Tensor, source: PagedKVCache | None = None) -> None:
        """Copies blocks of this cache, or of another one, byte by byte and with the scales of dynamic caches.

        All source blocks are read before any block is written. They are copied once in between, on their
        device. Scales of another cache are compared as they are at this moment, which waits for the device,
        unless both caches use the same tensors (`use_scales`).

        Args:
            block_mapping: pairs of source block and destination block: a list, or integers ``[n, 2]`` on any
                device. No destination may appear twice.
            source: a cache with the block_size, num_kv_heads, head sizes, dtypes and scales of this one. Its
                layout, device and num_blocks may differ: so blocks are swapped to the CPU and back. None:
                this cache.

        Raises:
            ValueError: the caches don't fit, or a block does not exist. Pairs on a GPU are not checked: PyTorch
                stops the program there.

        Example:
            >>> import torch, fp8kv
            >>> cache = fp8kv.PagedKVCache(4, 2, 1, 1)
            >>> x = torch.tensor([[[1.0]], [[2.0]]])
            >>> cache.append(x, x, torch.tensor([0, 2]))  # blocks 0 and 1
            >>> cache.copy_blocks([(0, 1), (1, 0)])
            >>> cache.key_cache[:2, 0].flatten().tolist()
            [2.0, 1.0]
            >>> swapped = fp8kv.PagedKVCache(2, 2, 1, 1, layout="HND", device="cpu")
            >>> swapped.copy_blocks(torch.tensor([[1, 0]]), source=cache)
            >>> swapped.value_cache[0, 0].item()
            1.0
        """
        source = self if source is None else source
        if source is not self:
            self._check_source(source)
        mapping = self._checked_mapping(block_mapping, source)
        origin, target = mapping[:, 0].to(source.device), mapping[:, 1].to(self.device)
        whole = source.layout == self.layout
        copies = [part.index_select(0, origin) for part in source._words(whole)]
        for part, copied in zip(self._words(whole), copies, strict=True):
            part.index_copy_(0, target, copied.to(self.device))

    def _check_source(self, source: PagedKVCache) -> None:
        if not isinstance(source, PagedKVCache):
            raise ValueError(f"PagedKVCache.copy_blocks: source must be a PagedKVCache, got {type(source).__name__}")
        for name in ("block_size", "num_kv_heads", "head_size", "v_head_size", "dtype", "v_dtype", "dynamic"):
            ours, theirs = getattr(self, name), getattr(source, name)
            if ours != theirs:
                raise ValueError(f"PagedKVCache.copy_blocks: source must have {name}={ours} as this cache, got {theirs}")
        for name in ("k_offset", "v_offset", *(() if self.dynamic else ("k_scale", "v_scale"))):
            if self._formats()[name[0]] not in FORMATS:
                continue
            ours, theirs = getattr(self, name), getattr(source, name)
            # As they are now on their devices: a copy on the host would not see changes in place.
            if ours is theirs:
                continue
            differ = self._of_channels(name, ours) != self._of_channels(name, theirs)
            if differ.any():
                raise ValueError(
                    f"PagedKVCache.copy_blocks: source must have the {name} of this cache, "
                    f"{self._compared(name, differ, ours)}, got {self._compared(name, differ, theirs)}"
                )

    def _of_channels(self, name: str, x: Tensor | None) -> Tensor:
        """A scale or an offset for each channel."""
        channels = self._channels(name)
        if x is None:
            return torch.zeros(channels, dtype=torch.float32, device=self.device)
        x = x if x.shape == channels else x.reshape(-1, 1)
        return x.expand(channels).to(self.device)

    def _compared(self, name: str, differ: Tensor, x: Tensor | None) -> str:
        """A scale or an offset in an error message: all of few elements, else the first that differs."""
        if x is not None and x.numel() <= self.num_kv_heads:
            return str(x.flatten().tolist())
        place = tuple(differ.nonzero()[0].tolist())
        return f"{self._of_channels(name, x)[place].item()} for {placed(place)}"

    def _checked_mapping(self, block_mapping: Sequence[tuple[int, int]] | Tensor, source: PagedKVCache) -> Tensor:
        mapping = _integers("block_mapping", block_mapping, "copy_blocks")
        mapping = mapping.reshape(0, 2) if mapping.numel() == 0 else mapping
        if mapping.dim() != 2 or mapping.shape[1] != 2:
            raise ValueError(
                f"PagedKVCache.copy_blocks: block_mapping must have rows of two blocks, got shape {list(mapping.shape)}"
            )
        if _is_known(mapping):
            for column, cache, name in ((0, source, "source"), (1, self, "destination")):
                wrong = [b for b in mapping[:, column].tolist() if not 0 <= b < cache.num_blocks]
                if wrong:
                    raise ValueError(
                        f"PagedKVCache.copy_blocks: block_mapping must have {name} blocks from 0 to "
                        f"{cache.num_blocks - 1}, got {wrong[0]}"
                    )
        return mapping

    def _words(self, whole: bool) -> list[Tensor]:
        """All that belongs to blocks, as the widest integers that divide a row.

        Args:
            whole: the storage as it lies in memory; else K and V in the order of their views.
        """
        has_v = self.v_head_size > 0
        parts = [self.storage] if whole else [self.key_cache, *([self.value_cache] if has_v else [])]
        if self.dynamic:
            parts += [self.k_scale, *([self.v_scale] if has_v else [])]
        types = (torch.int64, torch.int32, torch.int16, torch.uint8)
        return [part.view(next(t for t in types if part.shape[-1] * part.itemsize % t.itemsize == 0)) for part in parts]

    def descales(self, num_seqs: int) -> tuple[Tensor, Tensor]:
        """The scales of K and V in the form FlashAttention-3 takes: k_descale and v_descale.

        Args:
            num_seqs: sequences of the batch.

        Returns:
            float32 ``[num_seqs, num_kv_heads]`` for K and V: views, nothing is copied.

        Raises:
            ValueError: FlashAttention-3 can't read the cache: it is dynamic, has scales for each channel, or
                is int8. Offsets are left to the caller.

        Example:
            >>> import fp8kv
            >>> k_descale, v_descale = fp8kv.PagedKVCache(4, 16, 2, 64).descales(3)
            >>> k_descale.shape, k_descale.stride()
            (torch.Size([3, 2]), (0, 0))
        """
        if self.dynamic or self._per_channel:
            kind = "dynamic=True" if self.dynamic else "one for each channel"
            raise ValueError(
                f"PagedKVCache.descales: the cache must have scales per tensor or per head, got {kind}; "
                "`attend` reads such a cache"
            )
        if self.v_dtype != self.dtype or self.v_head_size == 0:
            raise ValueError(
                "PagedKVCache.descales: the cache must have K and V of one dtype, got "
                f"{self.kv_cache_dtype!r} and {self.v_cache_dtype!r} with v_head_size={self.v_head_size}"
            )
        if self.dtype in FORMATS and self.dtype not in FP8_DTYPES:
            raise ValueError(
                f"PagedKVCache.descales: the cache must be FP8, as FlashAttention-3 reads no "
                f"{self.kv_cache_dtype}; `attend` does"
            )
        check_integer("PagedKVCache.descales: num_seqs", num_seqs)
        shape = (num_seqs, self.num_kv_heads)
        return self.k_scale.expand(shape), self.v_scale.expand(shape)

    @property
    def _per_channel(self) -> bool:
        return max(self.k_scale.numel(), self.v_scale.numel()) > self.num_kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, and of the scales of a dynamic cache.

        Example:
            >>> import fp8kv
            >>> fp8kv.PagedKVCache(4, 16, 2, 64).nbytes  # 4 * 16 tokens, 2 * 2 heads, 64 bytes
            16384
        """
        scales = [self.k_scale, *([self.v_scale] if self.v_head_size > 0 else [])] if self.dynamic else []
        return self.storage.nbytes + sum(scale.nbytes for scale in scales)

    def __repr__(self) -> str:
        scales = self._kind_of_scales()
        if self.k_offset is not None or self.v_offset is not None:
            scales = f"{scales} with offsets"
        v_head_size = "" if self.v_head_size == self.head_size else f"v_head_size={self.v_head_size}, "
        v_dtype = "" if self.v_dtype == self.dtype else f"v_dtype={self.v_cache_dtype!r}, "
        return (
            f"PagedKVCache(num_blocks={self.num_blocks}, block_size={self.block_size}, "
            f"num_kv_heads={self.num_kv_heads}, head_size={self.head_size}, {v_head_size}"
            f"dtype={self.kv_cache_dtype!r}, {v_dtype}"
            f"layout={self.layout!r}, scales={scales!r}, device='{self.device}', "
            f"{self.nbytes / 2**20:.4g} MiB)"
        )

    def _kind_of_scales(self) -> str | None:
        if not self._is_quantized:
            return None
        if self.dynamic:
            return "dynamic"
        if self._per_channel:
            return "per channel"
        return "per head" if max(self.k_scale.numel(), self.v_scale.numel()) > 1 else "per tensor"


def gather_rows(
    cache: PagedKVCache,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    seq_starts: Tensor | None = None,
) -> None:
    """`PagedKVCache.gather` with the arguments of `gather_and_dequant_cache`, which are not converted."""
    v_scale, v_offset = cache._of_values()
    ops.gather(
        *cache._caches(), key, value, block_table, cu_seq_lens, cache.kv_cache_dtype, cache.k_scale,
        v_scale, seq_starts, cache.k_offset, v_offset, cache.v_cache_dtype,
    )  # fmt: skip


def as_stored(cache: PagedKVCache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What a quantized cache would give back of tokens, of those too that it has no room for.

    Args:
        cache: whose scales, offsets and dtype count.
        key: float32, float16 or bfloat16 ``[num_seqs, num_kv_heads, num_tokens, head_size]``.
        value: likewise, with the `v_head_size` of the cache.

    Example:
        >>> import torch, fp8kv
        >>> from fp8kv.kv_cache.paged import as_stored
        >>> x = torch.full((1, 2, 3, 64), 0.3)
        >>> key, value = as_stored(fp8kv.PagedKVCache(4, 16, 2, 64), x, x)
        >>> key.unique().tolist()
        [0.3125]
    """
    num_seqs, heads, num_tokens, _ = key.shape
    count = num_seqs * num_tokens
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (key, value)]
    caches = [
        torch.empty((1, *x.shape), dtype=dtype, device=key.device)
        for x, dtype in zip(rows, (cache.dtype, cache.v_dtype), strict=True)
    ]
    slots, name = torch.arange(count, device=key.device), cache.kv_cache_dtype
    offsets = cache.k_offset, cache.v_offset, cache.v_cache_dtype
    scales = cache.k_scale, cache.v_scale
    if cache.dynamic:
        computed = torch.empty((2, 1, count, heads), dtype=torch.float32, device=key.device)
        scales = computed[0], computed[1]
        ops.append_dynamic(*rows, *caches, *scales, slots, name, *offsets)
    else:
        ops.append(*rows, *caches, slots, name, *scales, *offsets)
    back = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in rows]
    table = torch.zeros((1, 1), dtype=torch.int32, device=key.device)
    sums = torch.arange(2, dtype=torch.int32, device=key.device) * count
    ops.gather(*caches, *back, table, sums, name, *scales, None, *offsets)
    k, v = (x.view(num_seqs, num_tokens, heads, -1).transpose(1, 2) for x in back)
    return k, v


def check_format(caller: str, dtype: str, made_for: Any) -> None:
    """A `ValueError` if a cache of this format clips what scales for another format keep.

    Args:
        caller: begins the sentence.
        dtype: the format of the cache, a name of it.
        made_for: that of the scales; anything else is not known.
    """
    if made_for not in QUANTIZED_CACHE_NAMES:
        return
    ours, theirs = FORMATS[CACHE_DTYPES[dtype]].max, FORMATS[CACHE_DTYPES[made_for]].max
    if ours < theirs:
        raise ValueError(
            f"{caller}: scales must be for values up to {ours:g}, the largest of {quoted(dtype)}, "
            f"got scales for {quoted(made_for)}, whose largest is {theirs:g}"
        )


def _viewed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As another dtype, with its attributes, which tell compilers that its address stays."""
    view = x.view(dtype)
    vars(view).update(vars(x))
    return view


def _on_host(name: str, values: Any, method: str) -> Tensor:
    """A sequence as a tensor, of integers if it is empty."""
    try:
        host = torch.tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"PagedKVCache.{method}: {name} must be integers, a tensor or lists of one length, got {type(values).__name__}"
        ) from error
    return host if host.numel() > 0 else host.long()


def _is_known(x: Tensor) -> bool:
    """Whether values can be looked at: on the CPU, but not while a call is compiled or traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def _check_real(name: str, x: Tensor) -> None:
    if x.is_meta:
        raise ValueError(f"{name} must be on a real device, got the meta device")


def _check_out(dtype: torch.dtype, out: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"PagedKVCache.gather: dtype must be a torch dtype, got {dtype!r}")
    if out is not None and len(out) != 2:
        raise ValueError(f"PagedKVCache.gather: out must be two tensors, key and value, got {type(out).__name__}")


def _kind(value: Any) -> str:
    return dtype_name(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _cache_dtype(argument: str, dtype: str | torch.dtype) -> tuple[str, torch.dtype]:
    """The string for the operators, and the dtype of the cache."""
    name = CACHE_NAMES.get(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name == "auto":
        raise ValueError(
            f'PagedKVCache: {argument} must say what the elements are, such as "bfloat16" or the dtype of the model, got "auto"'
        )
    if not isinstance(name, str) or name not in CACHE_DTYPES:
        names = ", ".join(map(quoted, CACHE_DTYPES))
        raise ValueError(f"PagedKVCache: {argument} must be {names} or the torch dtype, got {dtype!r}")
    return name, CACHE_DTYPES[name]


def _integers(name: str, values: Sequence[Any] | Tensor, method: str = "gather") -> Tensor:
    """int64, on the device where they are; a sequence is on the host."""
    if not isinstance(values, Tensor):
        values = _on_host(name, values, method)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"PagedKVCache.{method}: {name} must be integers, got {dtype_name(values.dtype)}")
    return values.long()
