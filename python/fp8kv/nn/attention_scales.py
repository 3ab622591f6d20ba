"""`AttentionScales`: the scales of an attention layer, as an engine loads, uses and calibrates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fp8kv._checks import STRATEGIES, check_choice, check_size, is_number, listed
from fp8kv._dtypes import CACHE_NAMES, FORMATS, FP8_DTYPES, REAL_DTYPES, dtype_name
from fp8kv.checkpoint.scales import LayerScales
from fp8kv.kv_cache import PagedKVCache, paged_attention, reshape_and_cache_flash, rope_quant_and_cache
from fp8kv.kv_cache.paged import check_format
from fp8kv.nn._loading import LayerShape, LayerState, name_below_owner, parse_relative_name
from fp8kv.nn.statistics import Observations, Observed, observe_groups, reduced
from fp8kv.quantization import scale_of_amax, static_scaled_fp8_quant

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Offsets = tuple[Tensor | None, Tensor | None]

#: The next fp32 value above the largest of each format. The quotient of amax and the scale from it can be
#: this value by rounding alone, so only quotients above it count as clipped.
_LIMITS = {dtype: row.max + 2.0 ** (math.frexp(row.max)[1] - 24) for dtype, row in FORMATS.items()}


class AttentionScales(nn.Module):
    """The scales of Q, K and V of one attention layer: loaded, used, and calibrated on real traffic.

    Under tensor parallelism, heads are this rank's. Buffers are updated in place only, so captured CUDA
    graphs and `descales` see new scales. They stay float32, and keep their values, under ``.half()`` and
    ``.to(dtype)``; moving to another device makes new buffers, as for any module.

    `load_state_dict` takes the tensors of a checkpoint, under every name that `fp8kv.remap_scale_name` knows,
    whole or from the layer or the attention on, in any floating-point dtype and in the shapes ``[]``,
    ``[1]``, ``[H]`` and ``[H, 1, 1]``. One element applies to all heads, a `kv_scale` to K and V; query
    scales per head are reduced to the largest of each KV group. Without a `q_scale` the current one stays;
    other missing scales are missing keys. Rejects scales that are not finite, not above 0 or not of the right
    number, names for the same scale that disagree, and zero points other than 0; then nothing of this layer
    changes. ``assign=True`` copies in place too, except that it materializes a module on the meta device.
    Names at the level of the parent, such as ``layers.3.self_attn.k_scale`` for a module
    ``layers.3.self_attn.attn``, need `accept_foreign_names`.

    Changed scales invalidate cached values: calibrate before the cache holds tokens that must stay.

    Args:
        num_heads: heads of Q.
        num_kv_heads: heads of K, and of V.
        head_size: elements of a head.
        strategy: "tensor", "attn_head" or "channel": one scale for all heads, one per KV head, or one for
            each channel of K and V. The query heads of a KV head share a scale, as FlashAttention-3 requires.
        calculate_kv_scales: `quantize_query`, `update_cache` and `append_step` observe their inputs, until
            `freeze`.
        dtype: float8_e4m3fn or float8_e5m2, of queries and cache; or int8, of the cache alone.
        offsets: whether K and V have offsets, `k_offset` and `v_offset`, which are subtracted before they are
            quantized or observed.
        first_kv_head: the index in the layer of this rank's first KV head, under tensor parallelism. With it,
            statistics of several ranks are merged head by head. None: ranks whose statistics are merged must
            have the same heads.
        device: None: PyTorch's default device.

    Attributes:
        q_scale: float32 ``[1]`` or ``[num_kv_heads]``, 1.0 at first.
        k_scale: likewise; with "channel" ``[num_kv_heads, head_size]``.
        v_scale: likewise.
        k_offset: float32 ``[num_kv_heads, head_size]``, 0 at first; None without offsets.
        v_offset: likewise.
        q_amax, k_amax, v_amax: float32, the largest finite magnitudes observed; not in the state dict, as are
            the counts `q_clipped`, `k_clipped`, `v_clipped`, `q_observed`, `k_observed`, `v_observed`, int64.
        calculate_kv_scales: as above; `freeze` makes it False. It is a constant in compiled and captured
            code: when it changes, compiled code is recompiled, while captured code keeps observing.
        num_heads, num_kv_heads, head_size, strategy, dtype, first_kv_head: as above.

    Raises:
        ValueError: an argument can't be used.

    Example:
        >>> import torch, fp8kv
        >>> scales = fp8kv.AttentionScales(num_heads=8, num_kv_heads=2, head_size=64, strategy="attn_head")
        >>> checkpoint = {
        ...     "model.layers.3.self_attn.k_scale": torch.tensor([0.5, 0.25]).view(2, 1, 1).bfloat16(),
        ...     "model.layers.3.self_attn.v_scale": torch.tensor([0.125]).bfloat16()}
        >>> scales.load_state_dict(checkpoint)
        <All keys matched successfully>
        >>> scales.k_scale, scales.v_scale
        (tensor([0.5000, 0.2500]), tensor([0.1250, 0.1250]))

    See also: `fp8kv.load_kv_scales`, `fp8kv.calibrate`.
    """

    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    k_offset: Tensor | None
    v_offset: Tensor | None

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        strategy: str = "tensor",
        calculate_kv_scales: bool = False,
        dtype: torch.dtype = torch.float8_e4m3fn,
        offsets: bool = False,
        first_kv_head: int | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_size": head_size}
        for name, size in sizes.items():
            check_size(f"AttentionScales: {name}", size, 1)
        if num_heads % num_kv_heads:
            raise ValueError(f"AttentionScales: num_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_heads}")
        if first_kv_head is not None:
            check_size("AttentionScales: first_kv_head", first_kv_head, 0)
        check_choice("AttentionScales: strategy", strategy, STRATEGIES)
        if dtype not in FORMATS:
            names = listed(map(dtype_name, FORMATS))
            raise ValueError(f"AttentionScales: dtype must be {names}, got {dtype_name(dtype)}")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.strategy = strategy
        self.calculate_kv_scales = calculate_kv_scales
        self.dtype = dtype
        self.first_kv_head = first_kv_head
        self._shape = shape = LayerShape(num_heads, num_kv_heads, head_size, strategy)
        count = shape.num_scales
        shapes = {"q": (count,), "k": shape.of_scales, "v": shape.of_scales}
        with torch.inference_mode(False):  # a module that is made in it can be used outside of it too
            for letter in "qkv":
                ones = torch.ones(shapes[letter], dtype=torch.float32, device=device)
                self.register_buffer(f"{letter}_scale", ones)
            for letter in "kv":
                zeros = torch.zeros(shape.channels, dtype=torch.float32, device=device)
                self.register_buffer(f"{letter}_offset", zeros if offsets else None)
            for letter in "qkv":
                amax = torch.zeros(shapes[letter], dtype=torch.float32, device=device)
                self.register_buffer(f"{letter}_amax", amax, persistent=False)
                for kind in ("clipped", "observed"):
                    zeros = torch.zeros(count, dtype=torch.int64, device=device)
                    self.register_buffer(f"{letter}_{kind}", zeros, persistent=False)

    # Use

    def quantize_query(self, query: Tensor, out: Tensor | None = None) -> Tensor:
        """Quantizes queries with `q_scale`.

        With `calculate_kv_scales`, all rows are observed too.

        Args:
            query: float32, float16 or bfloat16 ``[num_tokens, num_heads, head_size]`` or
                ``[num_tokens, num_heads * head_size]``, any strides.
            out: FP8 of this shape, any strides; receives the result. None allocates a contiguous tensor.

        Returns:
            FP8, the shape of `query`.

        Raises:
            ValueError: `query` or `out` has another shape, `out` has another dtype than this module, or that
                is int8, with which queries are not quantized.
            RuntimeError: as `fp8kv.quantize`.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64)
            >>> _ = scales.q_scale.fill_(0.5)
            >>> scales.quantize_query(torch.full((3, 4 * 64), 2.0)).float().unique()
            tensor([4.])
        """
        groups = self._grouped("quantize_query", "query", query, self.num_heads)
        if self.dtype not in FP8_DTYPES:
            raise ValueError(
                f"AttentionScales.quantize_query: the module must be FP8, as queries of {self._name} "
                f"caches are not quantized, got dtype {dtype_name(self.dtype)}"
            )
        if out is None:
            out = torch.empty(query.shape, dtype=self.dtype, device=query.device)
        elif out.shape != query.shape or out.dtype != self.dtype:
            raise ValueError(
                f"AttentionScales.quantize_query: out must be {dtype_name(self.dtype)} of shape "
                f"{list(query.shape)}, got {dtype_name(out.dtype)} of shape {list(out.shape)}"
            )
        result = self._grouped("quantize_query", "out", out, self.num_heads)
        static_scaled_fp8_quant(result, groups, self.q_scale.view(1, -1, 1, 1))
        if self.calculate_kv_scales:
            self._observe("q", groups, None)
        return out

    def update_cache(
        self, key: Tensor, value: Tensor, cache: PagedKVCache | tuple[Tensor, Tensor], slot_mapping: Tensor
    ) -> None:
        """Stores tokens in a paged cache, quantized with the scales and offsets of K and V.

        With `calculate_kv_scales`, tokens with a non-negative slot are observed too.

        Args:
            key: float32, float16 or bfloat16 ``[num_tokens, num_kv_heads, head_size]`` or
                ``[num_tokens, num_kv_heads * head_size]``, any strides. It may have more rows than there are
                slots; the others are ignored.
            value: likewise, of the dtype of `key`.
            cache: a `PagedKVCache`, whose `k_scale` and `v_scale` become the buffers of this module if it is
                quantized, so that `gather` and `descales` use them, as do its offsets if this module has
                offsets; else its own are used. Or K and V caches
                ``[num_blocks, block_size, num_kv_heads, head_size]`` of this module's dtype, or uint8 if that
                is FP8. A cache of a 16-bit type or float32 stores values directly, without scales.
            slot_mapping: int32 or int64 ``[num_tokens]``; tokens with a negative slot are skipped.

        Raises:
            ValueError: the cache is dynamic, or heads don't fit this module.
            RuntimeError: as `fp8kv.reshape_and_cache_flash`, such as for a cache of another FP8 type.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64)
            >>> _ = scales.k_scale.fill_(0.5)
            >>> cache = fp8kv.PagedKVCache(8, 16, 2, 64)
            >>> scales.update_cache(torch.ones(1, 2, 64), torch.ones(1, 2, 64), cache, torch.tensor([48]))
            >>> cache.key_cache[3, 0].float().unique(), cache.k_scale is scales.k_scale
            (tensor([2.]), True)
        """
        keys = self._grouped("update_cache", "key", key, self.num_kv_heads)
        values = self._grouped("update_cache", "value", value, self.num_kv_heads)
        key_cache, value_cache, name = self._storage_of("update_cache", cache)
        offsets = self._offsets(cache, name)
        reshape_and_cache_flash(
            keys.flatten(1, 2), values.flatten(1, 2), key_cache, value_cache, slot_mapping, name,
            self.k_scale, self.v_scale, *offsets,
        )  # fmt: skip
        self._take_over(cache, name)
        if self.calculate_kv_scales:
            for letter, x, offset in zip("kv", (keys, values), offsets, strict=True):
                self._observe(letter, x, slot_mapping, offset)

    def append_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: PagedKVCache | tuple[Tensor, Tensor],
        slot_mapping: Tensor,
        positions: Tensor | None = None,
        cos_sin_cache: Tensor | None = None,
        *,
        is_neox: bool = True,
        q_norm_weight: Tensor | None = None,
        k_norm_weight: Tensor | None = None,
        norm_eps: float = 1e-6,
        mrope_section: Sequence[int] | None = None,
        mrope_interleaved: bool = False,
        norm_after_rope: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Norm and RoPE of queries and keys, quantization of all three, and the append, in one launch.

        With `calculate_kv_scales`, several launches do the same, and observe the values to quantize.

        Args:
            query: float32, float16 or bfloat16 ``[num_tokens, num_heads, head_size]`` or
                ``[num_tokens, num_heads * head_size]``, any strides, such as a slice of a fused QKV tensor.
            key: likewise, with num_kv_heads.
            value: likewise.
            cache: as for `update_cache`.
            slot_mapping: int32 or int64 ``[num_tokens]``. Tokens with a negative slot are not stored; their
                queries are quantized.
            positions: int32 or int64 ``[num_tokens]``, or ``[3, num_tokens]`` with `mrope_section`; None: no
                RoPE.
            cos_sin_cache: as for `fp8kv.rope_quant_and_cache`, like the following arguments.
            is_neox: likewise.
            q_norm_weight: likewise.
            k_norm_weight: likewise.
            norm_eps: likewise.
            mrope_section: likewise.
            mrope_interleaved: likewise.
            norm_after_rope: likewise.
            out: receives the queries, ``[num_tokens, num_heads, head_size]`` or flat: of this module's dtype
                if that is FP8, or, not quantized, of the dtype of `query`. None allocates the former, with
                int8 and unquantized caches the latter.

        Returns:
            The queries: `out`, or a tensor with the shape of `query` and a row for each slot.

        Raises:
            ValueError: as `update_cache`, or `query` or `out` has another shape.
            RuntimeError: as `fp8kv.rope_quant_and_cache`.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(num_heads=4, num_kv_heads=2, head_size=64)
            >>> cache = fp8kv.PagedKVCache(8, 16, 2, 64)
            >>> qkv = torch.randn(3, (4 + 2 * 2) * 64)
            >>> query, key, value = qkv.split((4 * 64, 2 * 64, 2 * 64), dim=-1)
            >>> angles = torch.arange(100.0).view(-1, 1) * 10000.0 ** (-torch.arange(32.0) / 32)
            >>> cos_sin_cache = torch.cat((angles.cos(), angles.sin()), 1)
            >>> q = scales.append_step(
            ...     query, key, value, cache, torch.tensor([48, 49, 50]), torch.arange(3), cos_sin_cache)
            >>> q.shape, q.dtype
            (torch.Size([3, 256]), torch.float8_e4m3fn)

        See also: `attend_step`.
        """
        keys = self._heads("append_step", "key", key, self.num_kv_heads)
        values = self._heads("append_step", "value", value, self.num_kv_heads)
        queries = self._heads("append_step", "query", query, self.num_heads)
        key_cache, value_cache, name = self._storage_of("append_step", cache)
        if out is None:
            rows = slot_mapping.shape[:1]
            dtype = self.dtype if self.dtype in FP8_DTYPES and name != "auto" else query.dtype
            out = torch.empty((*rows, *query.shape[1:]), dtype=dtype, device=query.device)
        result = self._heads("append_step", "out", out, self.num_heads)
        rope = (positions, cos_sin_cache, is_neox)
        options: dict[str, Any] = {
            "mrope_section": mrope_section,
            "mrope_interleaved": mrope_interleaved,
            "norm_after_rope": norm_after_rope,
        }
        offsets = self._offsets(cache, name)
        if not self.calculate_kv_scales:
            rope_quant_and_cache(
                queries, keys, values, result, key_cache, value_cache, slot_mapping, name, self.q_scale,
                self.k_scale, self.v_scale, *rope, q_norm_weight, k_norm_weight, norm_eps, *offsets, **options,
            )  # fmt: skip
            self._take_over(cache, name)
            return out

        def transformed(heads: Tensor, weight: Tensor | None) -> Tensor:
            """Queries as the operator returns them without quantization; nothing is stored."""
            rows = slot_mapping.shape[0]
            result = torch.empty((rows, *heads.shape[1:]), dtype=heads.dtype, device=heads.device)
            nowhere = torch.full_like(slot_mapping, -1)
            rope_quant_and_cache(
                heads, keys, values, result, key_cache, value_cache, nowhere, name, self.q_scale,
                self.k_scale, self.v_scale, *rope, weight, None, norm_eps, **options,
            )  # fmt: skip
            return result

        queries, keys = transformed(queries, q_norm_weight), transformed(keys, k_norm_weight)
        if out.dtype in REAL_DTYPES:
            result[: len(queries)] = queries
            self._observe("q", self._grouped("append_step", "query", queries, self.num_heads), None)
        else:
            self.quantize_query(queries, result[: len(queries)])
        self.update_cache(keys, values, cache, slot_mapping)
        return out

    def attend_step(
        self,
        query: Tensor,
        cache: PagedKVCache | tuple[Tensor, Tensor],
        block_table: Tensor,
        seq_lens: Tensor,
        *,
        softmax_scale: float | None = None,
        cu_query_lens: Tensor | None = None,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
        seq_starts: Tensor | None = None,
        sliding_window: int | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        lse: Tensor | None = None,
        num_splits: int = 0,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Attention of the queries of `append_step` to the cache, in one launch.

        It is `fp8kv.paged_attention` with the scales and offsets of this module and the format of the cache.
        It reads nothing on the host and allocates only the result and, on CUDA, the workspace if it is given
        neither.

        Args:
            query: the result of `append_step`, or queries of a real type, of shape
                ``[num_tokens, num_heads, head_size]`` or ``[num_tokens, num_heads * head_size]``.
            cache: as for `append_step`. A `PagedKVCache` is read with its own scales and offsets, which are
                those of this module once it has appended to the cache.
            block_table: int32 ``[num_seqs, max_blocks]``, the blocks of each sequence.
            seq_lens: int32 ``[num_seqs]``, tokens of each sequence, including this step.
            softmax_scale: as for `fp8kv.paged_attention`, like the following arguments.
            cu_query_lens: likewise.
            max_query_len: likewise.
            max_seq_len: likewise.
            seq_starts: likewise.
            sliding_window: likewise.
            softcap: likewise.
            sinks: likewise.
            lse: likewise.
            num_splits: likewise.
            out: receives the result, of a real type, in one of the shapes of `query`, with the head size of V
                in place of that of K where they differ. None: a new tensor of the dtype of `query`, bfloat16
                for FP8, in the form that `query` has.
            workspace: as for `fp8kv.paged_attention`.

        Returns:
            `out`, or the new tensor.

        Raises:
            ValueError: the cache is dynamic, or `query` or `out` has another shape.
            RuntimeError: as `fp8kv.paged_attention`.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(num_heads=4, num_kv_heads=2, head_size=64)
            >>> cache = fp8kv.PagedKVCache(8, 16, 2, 64)
            >>> query, key, value = torch.randn(1, 4 * 64), torch.randn(1, 2 * 64), torch.ones(1, 2 * 64)
            >>> q = scales.append_step(query, key, value, cache, torch.tensor([48]))  # block 3
            >>> out = scales.attend_step(q, cache, torch.tensor([[3]]).int(), torch.tensor([1]).int())
            >>> out.shape, out.dtype, out.unique().tolist()
            (torch.Size([1, 256]), torch.bfloat16, [1.0])

        See also: `PagedKVCache.attend`, `fp8kv.merge_attention`.
        """
        queries = self._heads("attend_step", "query", query, self.num_heads)
        key_cache, value_cache, name = self._storage_of("attend_step", cache)
        v_head_size = value_cache.shape[-1]
        if out is None:
            dtype = query.dtype if query.dtype in REAL_DTYPES else torch.bfloat16
            heads = (self.num_heads, v_head_size) if query.dim() == 3 else (self.num_heads * v_head_size,)
            out = torch.empty((query.shape[0], *heads), dtype=dtype, device=query.device)
        scales = cache if isinstance(cache, PagedKVCache) else self
        k_offset, v_offset = (None, None) if name == "auto" else (scales.k_offset, scales.v_offset)
        paged_attention(
            queries, key_cache, value_cache, block_table, seq_lens, kv_cache_dtype=name,
            k_scale=scales.k_scale, v_scale=scales.v_scale, softmax_scale=softmax_scale,
            cu_query_lens=cu_query_lens, max_query_len=max_query_len, max_seq_len=max_seq_len,
            q_scale=None if query.dtype in REAL_DTYPES else self.q_scale, seq_starts=seq_starts,
            sliding_window=sliding_window, softcap=softcap, sinks=sinks, k_offset=k_offset, v_offset=v_offset,
            lse=lse, num_splits=num_splits, workspace=workspace,
            out=self._heads("attend_step", "out", out, self.num_heads, v_head_size),
        )  # fmt: skip
        return out

    def descales(self, num_seqs: int) -> tuple[Tensor, Tensor, Tensor]:
        """The scales in FlashAttention-3's form: q_descale, k_descale and v_descale.

        Args:
            num_seqs: sequences of the batch.

        Returns:
            float32 ``[num_seqs, num_kv_heads]`` for Q, K and V, as views, without a copy. Offsets are left to
            the caller.

        Raises:
            ValueError: FlashAttention-3 can't read the cache: the scales are per channel, or it is
                int8.

        Example:
            >>> import fp8kv
            >>> q_descale, k_descale, v_descale = fp8kv.AttentionScales(4, 2, 64).descales(3)
            >>> k_descale.shape, k_descale.stride()
            (torch.Size([3, 2]), (0, 0))
        """
        if self.strategy == "channel" or self.dtype not in FP8_DTYPES:
            kind = 'strategy "channel"' if self.strategy == "channel" else f"dtype {dtype_name(self.dtype)}"
            raise ValueError(
                "AttentionScales.descales: the module must be FP8 with scales per tensor or per head, as "
                f"FlashAttention-3 reads no others, got {kind}; `attend_step` reads such a cache"
            )
        shape = (num_seqs, self.num_kv_heads)
        return self.q_scale.expand(shape), self.k_scale.expand(shape), self.v_scale.expand(shape)

    # Calibration

    def observe(self, query: Tensor | None, key: Tensor, value: Tensor, slot_mapping: Tensor | None = None) -> None:
        """Observes tokens: the largest magnitudes, and the elements that the current scales would clip.

        An element is clipped if it is beyond the range by more than rounding, so a scale computed from the
        largest magnitude clips nothing. NaN is never clipped, infinite elements always are.

        It runs on the device without synchronization and updates buffers in place, so it can be compiled, and
        captured in a CUDA graph, every replay of which observes. Temporary memory stays below 40 MB for any
        number of tokens, unless a single token has millions of elements.

        Args:
            query: float32, float16 or bfloat16 ``[num_tokens, num_heads, head_size]`` or
                ``[num_tokens, num_heads * head_size]``, any strides; None: keys and values only.
            key: likewise, with num_kv_heads.
            value: likewise.
            slot_mapping: int32 or int64. Tokens with a negative slot, and rows beyond the slots, are padding
                and not observed. None: all rows are observed.

        Raises:
            ValueError: a shape, dtype or device doesn't fit, or there are fewer rows than slots. Nothing is
                changed then.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64)
            >>> key, value = torch.full((3, 2, 64), -700.0), torch.full((3, 2, 64), 2.0)
            >>> scales.observe(None, key, value)
            >>> print(scales.observations())
            Observed 384 elements of K (amax 700) and 384 elements of V (amax 2). Warning: the scales in force
            clip 384 elements of K (100%).
        """
        groups = {
            "k": self._grouped("observe", "key", key, self.num_kv_heads),
            "v": self._grouped("observe", "value", value, self.num_kv_heads),
        }
        if query is not None:
            groups["q"] = self._grouped("observe", "query", query, self.num_heads)
        self._check_observed(groups, slot_mapping)
        for letter, x in groups.items():
            self._observe(letter, x, slot_mapping, getattr(self, f"{letter}_offset", None))

    def discard_observations(self) -> None:
        """Discards all observations, for example after a warm-up. In place, without synchronization.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64)
            >>> scales.observe(None, torch.ones(3, 2, 64), torch.ones(3, 2, 64))
            >>> scales.discard_observations()
            >>> print(scales.observations())
            Nothing was observed.
        """
        for letter in "qkv":
            for kind in ("amax", "clipped", "observed"):
                self._buffer(letter, kind).zero_()

    def observations(self, group: ProcessGroup | None = None) -> Observations:
        """Observations since the beginning, or since the last `discard_observations` or `freeze`.

        It synchronizes.

        Args:
            group: all its ranks must call; they get the largest magnitudes and the sums of the counts, for
                each head over the ranks that have it; see `freeze`. None: this process alone.

        Raises:
            ValueError: `group` is not a process group that this rank belongs to, or its ranks don't have the
                same heads, which `first_kv_head` tells apart.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64, strategy="attn_head")
            >>> key = torch.tensor([3.0, -5.0]).view(1, 2, 1).expand(1, 2, 64)
            >>> scales.observe(None, key, torch.ones(1, 2, 64))
            >>> scales.observations().k
            Observed(amax=(3.0, 5.0), clipped=(0, 0), observed=(64, 64))
        """
        return self._merged(group)[1]

    def _merged(self, group: ProcessGroup | None) -> tuple[dict[str, Tensor], Observations]:
        """The largest magnitudes of all ranks, in the shapes of the scales, on the host; and the report."""
        buffers = {letter: self._buffer(letter, "amax") for letter in "qkv"}
        width = self.head_size if self._shape.per_channel else 1
        rows = [x.view(len(x), -1).expand(-1, width) for x in buffers.values()]
        counts = torch.stack([self._buffer(letter, kind) for kind in ("clipped", "observed") for letter in "qkv"])
        first = self.first_kv_head if self._shape.per_head else None
        amax, counts = reduced(torch.stack(rows), counts, group, first)
        clipped, observed = counts.chunk(2)
        seen = zip(amax.amax(-1).tolist(), clipped.tolist(), observed.tolist(), strict=True)
        by_letter = {
            letter: x[:, : own[0].numel()].view(own.shape) for (letter, own), x in zip(buffers.items(), amax, strict=True)
        }
        return by_letter, Observations(*(Observed(*map(tuple, row)) for row in seen))

    def freeze(self, group: ProcessGroup | None = None, margin: float = 1.0) -> Observations:
        """Sets the scales to ``max(amax * margin / max, 1 / (max * 512))`` and discards the observations.

        amax is that of K and V less their offsets, which stay as they are. From then on, `observe` counts
        what the new scales clip. `q_scale` is unchanged if no query was observed. `calculate_kv_scales`
        becomes False. It synchronizes.

        Args:
            group: all its ranks must call; the largest magnitudes of all become the same scales everywhere.
                With strategy "tensor" these are all ranks that run this layer: tensor-parallel ranks, which
                must have the same scale, and data-parallel replicas. With "attn_head" and `first_kv_head`
                they may be all of these too: the scale of a head comes from the ranks that have it. Without
                `first_kv_head`, the heads of a rank are unknown, so the group may only contain ranks with the
                same heads: data-parallel replicas, not tensor-parallel ranks. None: this process alone.
            margin: headroom for larger values; 1.0 puts the largest magnitude at the end of the range.

        Returns:
            The observations of all ranks of the group. Clipped elements are counted with the previous scales.

        Raises:
            RuntimeError: no rank has observed keys and values. Nothing is changed then.
            ValueError: `margin` is not finite or not above 0, or `group` doesn't fit, as for `observations`.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64)
            >>> scales.observe(None, torch.full((3, 2, 64), -700.0), torch.full((3, 2, 64), 7.0))
            >>> report = scales.freeze()
            >>> scales.k_scale.item(), scales.v_scale.item(), sum(report.k.clipped)
            (1.5625, 0.015625, 384)
        """
        if not is_number(margin) or not 0 < margin < float("inf"):
            raise ValueError(f"AttentionScales.freeze: margin must be finite and above 0, got {margin!r}")
        largest, seen = self._merged(group)
        if not (sum(seen.k.observed) and sum(seen.v.observed)):
            raise RuntimeError(
                "AttentionScales.freeze: keys and values must have been observed, got none; call observe, or "
                "update_cache with calculate_kv_scales=True, on real traffic first"
            )
        for letter, observed in (("q", seen.q), ("k", seen.k), ("v", seen.v)):
            if sum(observed.observed):
                amax = (largest[letter] * margin).clamp(max=torch.finfo(torch.float32).max)
                self._buffer(letter, "scale").copy_(scale_of_amax(amax, self.dtype))
        self.discard_observations()
        self.calculate_kv_scales = False
        return seen

    # Loading

    def load_scales(self, scales: LayerScales) -> None:
        """Loads the scales of a layer, such as ``fp8kv.load_kv_scales(checkpoint)[layer]``.

        Args:
            scales: of this rank, on any device. Without `q`, `q_scale` is unchanged, and `quantize_query`
                still quantizes; don't call it if queries should stay unquantized. A missing offset is 0.

        Raises:
            ValueError: `k` or `v` is missing; a scale is not finite, not above 0 or not of the right number;
                an offset is not finite, or this module has no offsets; or the scales are for a format of
                larger values than this module's. Nothing is changed then.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64, strategy="attn_head")
            >>> k, v = torch.tensor([0.5, 0.25]), torch.tensor([0.125])
            >>> scales.load_scales(fp8kv.LayerScales(q=None, k=k, v=v))
            >>> scales.k_scale, scales.v_scale
            (tensor([0.5000, 0.2500]), tensor([0.1250, 0.1250]))
        """
        if not isinstance(scales, LayerScales):
            raise ValueError(
                "AttentionScales.load_scales: scales must be the LayerScales of one layer, such as "
                f"load_kv_scales(checkpoint)[0], got {type(scales).__name__}"
            )
        given = {"q": scales.q, "k": scales.k, "v": scales.v}
        fitting = {
            letter: self._shape.fit(f"AttentionScales.load_scales: scales.{letter}", scale, query=letter == "q")
            for letter, scale in given.items()
            if letter != "q" or scale is not None
        }
        check_format("AttentionScales.load_scales", self._name, scales.dtype)
        offsets = {}
        for letter, offset in (("k", scales.k_offset), ("v", scales.v_offset)):
            if offset is not None:
                name = f"AttentionScales.load_scales: scales.{letter}_offset"
                if self.k_offset is None:
                    raise ValueError(f"{name} must be None without offsets=True, got an offset")
                offsets[letter] = self._shape.fit_offset(name, offset)
        if self.k_scale.is_meta:
            raise ValueError("AttentionScales.load_scales: the module must be on a real device, got the meta device")
        self._copy(fitting, offsets)

    @staticmethod
    def accept_foreign_names(model: nn.Module) -> RemovableHandle:
        """Lets ``model.load_state_dict`` find scales with names at the level of a parent module.

        A scale goes to the only `AttentionScales` below the closest module in its name, inside its layer:
        ``layers.3.self_attn.k_scale`` and ``layers.3.self_attn.k_proj.k_scale`` go to
        ``layers.3.self_attn.attn``. If there is none or more than one, or if a tensor already has that name,
        the key is unchanged.

        Args:
            model: the module whose `load_state_dict` is called, or any that contains the layers.

        Returns:
            A handle; its ``remove()`` undoes it.

        Example:
            >>> import torch, fp8kv
            >>> scales = fp8kv.AttentionScales(4, 2, 64)
            >>> attention = torch.nn.ModuleDict({"k_proj": torch.nn.Linear(256, 128), "attn": scales})
            >>> _ = fp8kv.AttentionScales.accept_foreign_names(attention)
            >>> checkpoint = {"kv_scale": torch.tensor(0.5), **attention.k_proj.state_dict(prefix="k_proj.")}
            >>> attention.load_state_dict(checkpoint)
            <All keys matched successfully>
            >>> scales.v_scale
            tensor([0.5000])
        """
        handle: RemovableHandle = model.register_load_state_dict_pre_hook(_rename_scales)  # type: ignore[no-untyped-call]
        return handle

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Replaces PyTorch's, which requires exact names and shapes and may replace the buffers."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        state = LayerState(state_dict, prefix, self._shape, self.k_offset is not None)
        if strict:
            unexpected_keys.extend(state.unknown)
        if state.errors:
            error_msgs.extend(state.errors)
            return
        if strict:
            missing_keys.extend(f"{prefix}{letter}_scale" for letter in "kv" if letter not in state.scales)
        if self.k_scale.is_meta and state.scales:
            if not local_metadata.get("assign_to_params_buffers", False):
                error_msgs.append(
                    f"AttentionScales: {prefix}k_scale must be on a real device, got the meta device; pass "
                    "assign=True to load_state_dict, or call to_empty before"
                )
                return
            device = next(x.device for key, x in state_dict.items() if key.startswith(prefix))
            self._apply(lambda buffer: torch.empty_like(buffer, device=device))
        self._copy(state.scales, state.offsets)

    def _copy(self, scales: Mapping[str, Tensor], offsets: Mapping[str, Tensor]) -> None:
        for letter, scale in scales.items():
            self._buffer(letter, "scale").copy_(scale)
        if self.k_offset is not None:
            for letter in scales.keys() & {"k", "v"} | offsets.keys():
                offset = self._buffer(letter, "offset")
                offset.copy_(offsets[letter]) if letter in offsets else offset.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttentionScales:
        """Moves the buffers, but keeps their dtypes: ``model.half()`` must not round scales."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        had_values = not self.k_scale.is_meta
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        if not had_values and not self.k_scale.is_meta:
            for letter in "qkv":
                self._buffer(letter, "scale").fill_(1.0)
            for offset in (self.k_offset, self.v_offset):
                if offset is not None:
                    offset.zero_()
            self.discard_observations()
        return self

    # Helpers

    def _buffer(self, letter: str, kind: str) -> Tensor:
        buffer = getattr(self, f"{letter}_{kind}")
        assert isinstance(buffer, Tensor)
        return buffer

    def _observe(self, letter: str, groups: Tensor, slot_mapping: Tensor | None, offset: Tensor | None = None) -> None:
        observe_groups(
            groups if slot_mapping is None else groups[: slot_mapping.shape[0]],
            *(self._buffer(letter, kind) for kind in ("scale", "amax", "clipped", "observed")),
            _LIMITS[self.dtype],
            slot_mapping,
            offset,
        )

    @property
    def _name(self) -> str:
        """The operators' name of the format."""
        return CACHE_NAMES[self.dtype]

    def _offsets(self, cache: PagedKVCache | tuple[Tensor, Tensor], name: str) -> Offsets:
        """The offsets of K and V in this step: of this module, or else of the cache."""
        if name == "auto":
            return None, None
        if isinstance(cache, PagedKVCache) and self.k_offset is None:
            return cache.k_offset, cache.v_offset
        return self.k_offset, self.v_offset

    def _storage_of(self, method: str, cache: PagedKVCache | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, str]:
        """K cache, V cache, and the operators' name of their format."""
        if isinstance(cache, PagedKVCache):
            if cache.dynamic:
                raise ValueError(
                    f"AttentionScales.{method}: cache must take the scales of this module, got a dynamic "
                    "PagedKVCache, which computes its own"
                )
            cache = cache._caches()
        elif not isinstance(cache, (tuple, list)) or len(cache) != 2:
            raise ValueError(
                f"AttentionScales.{method}: cache must be a PagedKVCache or two tensors, got {type(cache).__name__}"
            )
        return *cache, "auto" if cache[0].dtype in REAL_DTYPES else self._name

    def _take_over(self, cache: PagedKVCache | tuple[Tensor, Tensor], name: str) -> None:
        if not isinstance(cache, PagedKVCache) or name == "auto":
            return
        ours = (self.k_scale, self.v_scale, self.k_offset, self.v_offset)
        theirs = (cache.k_scale, cache.v_scale, cache.k_offset, cache.v_offset)
        if any(own is not None and own is not x for own, x in zip(ours, theirs, strict=True)):
            cache.use_scales(*ours)

    def _heads(self, method: str, name: str, x: Tensor, num_heads: int, head_size: int | None = None) -> Tensor:
        """The view ``[num_tokens, num_heads, head_size]``."""
        self._check_heads(method, name, x, num_heads, head_size)
        return x.view(x.shape[0], num_heads, head_size or self.head_size)

    def _grouped(self, method: str, name: str, x: Tensor, num_heads: int) -> Tensor:
        """The view ``[num_tokens, num_scales, heads of a scale, head_size]``."""
        self._check_heads(method, name, x, num_heads)
        count = self._shape.num_scales
        return x.view(x.shape[0], count, num_heads // count, self.head_size)

    def _check_heads(self, method: str, name: str, x: Tensor, num_heads: int, head_size: int | None = None) -> None:
        size = head_size or self.head_size
        width = num_heads * size
        if not isinstance(x, Tensor):
            raise ValueError(f"AttentionScales.{method}: {name} must be a tensor, got {type(x).__name__}")
        if x.dim() < 2 or x.shape[1:] not in ((num_heads, size), (width,)):
            raise ValueError(
                f"AttentionScales.{method}: {name} must have the shape [num_tokens, {num_heads}, "
                f"{size}] or [num_tokens, {width}], got {list(x.shape)}"
            )

    def _check_observed(self, groups: dict[str, Tensor], slot_mapping: Tensor | None) -> None:
        device = self.k_scale.device
        if slot_mapping is not None and (
            slot_mapping.dtype not in (torch.int32, torch.int64) or slot_mapping.dim() != 1 or slot_mapping.device != device
        ):
            raise ValueError(
                f"AttentionScales.observe: slot_mapping must be int32 or int64 of one dimension on {device}, "
                f"got {dtype_name(slot_mapping.dtype)} of shape {list(slot_mapping.shape)} on "
                f"{slot_mapping.device}"
            )
        rows = 0 if slot_mapping is None else slot_mapping.shape[0]
        for letter, x in groups.items():
            name = {"q": "query", "k": "key", "v": "value"}[letter]
            if x.dtype not in REAL_DTYPES or x.device != device:
                raise ValueError(
                    f"AttentionScales.observe: {name} must be float32, float16 or bfloat16 on {device}, "
                    f"got {dtype_name(x.dtype)} on {x.device}"
                )
            if x.shape[0] < rows:
                raise ValueError(
                    f"AttentionScales.observe: {name} must have at least {rows} rows, one for each element "
                    f"of slot_mapping, got {x.shape[0]}"
                )

    def extra_repr(self) -> str:
        first = "" if self.first_kv_head is None else f", first_kv_head={self.first_kv_head}"
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_size={self.head_size}, "
            f"strategy={self.strategy!r}, dtype={dtype_name(self.dtype)}, "
            f"calculate_kv_scales={self.calculate_kv_scales}{', offsets=True' * (self.k_offset is not None)}"
            f"{first}"
        )


def _rename_scales(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts scales below the prefix of the AttentionScales that they belong to."""
    paths = [path for path, x in model.named_modules() if path and isinstance(x, AttentionScales)]
    for key in list(state_dict):
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and parse_relative_name(name) is not None:
            moved = prefix + name_below_owner(name, paths)
            if moved not in state_dict:
                state_dict[moved] = state_dict.pop(key)
