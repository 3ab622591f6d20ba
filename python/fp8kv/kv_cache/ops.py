"""One documented function per operator of the paged KV cache.

A cache is ``[num_blocks, block_size, num_kv_heads, head_size]`` with any strides: the layouts NHD and HND
differ in those only. K and V may have heads of two sizes, and elements of two dtypes. Slot ``s`` is the place
``s % block_size`` of block ``s // block_size``. Formulas are in docs/numerics.md, and as plain PyTorch in
`fp8kv.reference`, which gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fp8kv._ops import operator

append = operator("reshape_and_cache_flash")
append_dynamic = operator("reshape_and_cache_flash_dynamic")
rope_append = operator("rope_quant_and_cache")
gather = operator("gather_and_dequant_cache")


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    v_cache_dtype: str | None = None,
) -> None:
    """Stores tokens in a paged cache: ``cache[slot of token t, h] = quantize(key[t, h] - offset, scale)``.

    Args:
        key: float32, float16 or bfloat16 ``[num_tokens, num_kv_heads, head_size]``, any strides, such as a
            slice of a fused QKV tensor. It may have more rows than there are slots; those are left out. Of
            the quantized dtype of its cache (or uint8, of an FP8 cache): bytes that were made with these
            scales and offsets, stored as they are.
        value: likewise; of the dtype of `key`, unless one of them is quantized. Its head_size may be another.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_size]``, any strides; written.
        value_cache: likewise, with the head_size of `value`; both may be slices of one tensor.
        slot_mapping: int32 or int64 ``[num_tokens]``. Tokens with a negative slot are skipped. If a slot
            occurs twice, the last token wins on the CPU; on CUDA each element comes from any of them.
        kv_cache_dtype: "fp8" or "fp8_e4m3", "fp8_e5m2" (caches of that dtype or uint8), "int8"; "float32",
            "float16", "bfloat16" (caches of that dtype), "auto" (whichever of these three the caches are):
            not quantized, rounded where the dtypes differ.
        k_scale: float32, 1 or num_kv_heads elements, evenly strided, in any shape; or one for each channel,
            ``[num_kv_heads, head_size]``, any strides. Not used where nothing is quantized.
        v_scale: likewise.
        k_offset: float32 ``[num_kv_heads, head_size]``, any strides, for quantized caches: what is quantized
            is the difference, in float32. None: 0.
        v_offset: likewise.
        v_cache_dtype: of `value_cache`, in the words of `kv_cache_dtype`, which then is of `key_cache` alone.
            None: both are the same.

    Raises:
        RuntimeError: an argument doesn't fit, or, on the CPU, a slot lies beyond the cache. Nothing is
            written then. On CUDA such tokens are skipped; they raise with the environment variable
            FP8KV_DEBUG=1.

    Example:
        >>> import torch, fp8kv
        >>> key_cache, value_cache = torch.zeros(2, 4, 16, 8, 64, dtype=torch.float8_e4m3fn)
        >>> key, value = torch.full((3, 8, 64), 2.0), torch.full((3, 8, 64), 3.0)
        >>> slots = torch.tensor([17, -1, 63])  # block 1, offset 1; nowhere; block 3, offset 15
        >>> scale = torch.tensor([0.5])
        >>> fp8kv.reshape_and_cache_flash(
        ...     key, value, key_cache, value_cache, slots, "fp8", scale, scale)
        >>> key_cache[1, 1, 0, 0].item(), value_cache[3, 15, 7, 63].item()
        (4.0, 6.0)
    """
    append(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale, k_offset, v_offset,
        v_cache_dtype,
    )  # fmt: skip


def reshape_and_cache_flash_dynamic(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    v_cache_dtype: str | None = None,
) -> None:
    """Stores tokens with a scale for each token and head, which is computed and stored at the token's slot.

    The scale is ``max(amax / max, 1 / (max * 512))`` with the largest finite magnitude of the head, after its
    offsets are subtracted.

    Args:
        key: as for `reshape_and_cache_flash`, as are `value`, `key_cache`, `value_cache`, `slot_mapping`;
            not quantized.
        value: likewise.
        key_cache: likewise; written.
        value_cache: likewise; written.
        k_scale_cache: float32 ``[num_blocks, block_size, num_kv_heads]``, any strides; written.
        v_scale_cache: likewise.
        slot_mapping: likewise.
        kv_cache_dtype: "fp8" or "fp8_e4m3", "fp8_e5m2", "int8".
        k_offset: as for `reshape_and_cache_flash`.
        v_offset: likewise.
        v_cache_dtype: likewise.

    Raises:
        RuntimeError: as `reshape_and_cache_flash`.

    Example:
        >>> import torch, fp8kv
        >>> key_cache, value_cache = torch.zeros(2, 1, 16, 1, 2, dtype=torch.float8_e4m3fn)
        >>> k_scales, v_scales = torch.zeros(2, 1, 16, 1)
        >>> key = torch.tensor([[[7.0, -3.5]]])
        >>> fp8kv.reshape_and_cache_flash_dynamic(
        ...     key, 2 * key, key_cache, value_cache, k_scales, v_scales, torch.tensor([5]), "fp8")
        >>> key_cache[0, 5].tolist(), k_scales[0, 5].tolist(), v_scales[0, 5].tolist()
        ([[448.0, -224.0]], [0.015625], [0.03125])
    """
    append_dynamic(
        key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, kv_cache_dtype,
        k_offset, v_offset, v_cache_dtype,
    )  # fmt: skip


def rope_quant_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_out: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    is_neox: bool = True,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    norm_after_rope: bool = False,
) -> None:
    """Does in one launch what an attention layer does between its projection and attention.

    RMSNorm of every head of Q and K where weights are given, as in Qwen3; RoPE of Q and K where positions are
    given, one a token or, as in Qwen-VL models, three; both in fp32 with one rounding to the dtype of
    `query`. Then Q goes to `query_out`, quantized if
    that is FP8, and K and V are stored as by `reshape_and_cache_flash`. The bytes are the same as with the separate
    operations; after a norm they may differ by one step of FP8, as the order of its sum is not fixed.

    Args:
        query: float32, float16 or bfloat16 ``[num_tokens, num_heads, head_size]``, any strides, such as a
            slice of a fused QKV tensor; num_heads is a multiple of num_kv_heads. It may have more rows than
            there are slots; those are left out.
        key: of the same dtype ``[num_tokens, num_kv_heads, head_size]``.
        value: likewise.
        query_out: ``[num_tokens, num_heads, head_size]``, any strides; written, for every token whatever its
            slot. Of the FP8 dtype of the caches or uint8: quantized; float32, float16 or bfloat16: not. Rows
            beyond the slots stay as they are. With int8 caches it is not quantized.
        key_cache: as for `reshape_and_cache_flash`, as are `value_cache`, `slot_mapping` and
            `kv_cache_dtype`; written.
        value_cache: likewise; written.
        slot_mapping: likewise.
        kv_cache_dtype: likewise.
        q_scale: float32, 1, num_kv_heads or num_heads elements, evenly strided, in any shape; not used where
            `query_out` is not FP8.
        k_scale: as for `reshape_and_cache_flash`.
        v_scale: likewise.
        positions: int32 or int64 ``[num_tokens]``, or with `mrope_section` ``[3, num_tokens]``: time, height
            and width; any strides, with `cos_sin_cache`. None: no RoPE.
        cos_sin_cache: float32 or the dtype of `query`, ``[max_position, rotary_dim]``: rotary_dim / 2
            cosines, then as many sines. rotary_dim is even and at most head_size; elements of a head from
            there on are not rotated.
        is_neox: the pairs that are rotated are ``(i, i + rotary_dim / 2)``, else ``(2 * i, 2 * i + 1)``.
        q_norm_weight: float32 or the dtype of `query` ``[head_size]``; None: no norm of Q.
        k_norm_weight: likewise, of K.
        norm_eps: added to the mean of the squares.
        k_offset: as for `reshape_and_cache_flash`: of K after RoPE.
        v_offset: likewise.
        mrope_section: for multimodal RoPE, how many of the rotary_dim / 2 frequencies belong to time, height
            and width; they sum up to all. In this order, as in Qwen2-VL and GLM-4V: frequency i takes the
            position of its section. None: one position for all.
        mrope_interleaved: the frequencies take turns instead, as in Qwen3-VL and Qwen3.5: i takes height if
            ``i % 3 == 1 and i < 3 * mrope_section[1]``, width if
            ``i % 3 == 2 and i < 3 * mrope_section[2]``, else time. Without `mrope_section` it says nothing.
        norm_after_rope: the norm comes after RoPE, as in HunYuan; else before it.

    Raises:
        RuntimeError: an argument doesn't fit, or, on the CPU, a slot lies beyond the cache or a position
            beyond the table. Nothing is written then. On CUDA nothing is written for such a token; it raises
            with the environment variable FP8KV_DEBUG=1.

    Example:
        >>> import torch, fp8kv
        >>> key_cache, value_cache = torch.zeros(2, 4, 16, 2, 64, dtype=torch.float8_e4m3fn)
        >>> query, key, value = torch.randn(1, 12, 64).split((8, 2, 2), dim=1)
        >>> angles = torch.arange(100.0).view(-1, 1) * 10000.0 ** (-torch.arange(32.0) / 32)
        >>> cos_sin_cache = torch.cat((angles.cos(), angles.sin()), 1)
        >>> query_out = torch.empty(1, 8, 64, dtype=torch.float8_e4m3fn)
        >>> slot, position, scale = torch.tensor([17]), torch.tensor([42]), torch.tensor([0.02])
        >>> fp8kv.rope_quant_and_cache(
        ...     query, key, value, query_out, key_cache, value_cache, slot, "fp8", scale, scale, scale,
        ...     position, cos_sin_cache)
        >>> torch.equal(value_cache[1, 1].float(), fp8kv.quantize(value[0], scale)[0].float())
        True

        Multimodal RoPE: a patch of an image at time 42, in row 45 and column 43.

        >>> patch = torch.tensor([[42], [45], [43]])
        >>> fp8kv.rope_quant_and_cache(
        ...     query, key, value, query_out, key_cache, value_cache, slot, "fp8", scale, scale, scale,
        ...     patch, cos_sin_cache, mrope_section=[8, 12, 12])

    See also: `reshape_and_cache_flash`.
    """
    arguments = (
        query, key, value, query_out, key_cache, value_cache, slot_mapping, kv_cache_dtype, q_scale, k_scale,
        v_scale, positions, cos_sin_cache, is_neox,
    )  # fmt: skip
    has_norm = q_norm_weight is not None or k_norm_weight is not None
    # Arguments that say nothing are left to the operator, as each that is passed takes the host 0.07 microseconds.
    if has_norm or k_offset is not None or v_offset is not None or mrope_section is not None or norm_after_rope:
        rope_append(
            *arguments, q_norm_weight, k_norm_weight, norm_eps, k_offset, v_offset, mrope_section,
            mrope_interleaved, norm_after_rope,
        )  # fmt: skip
    else:
        rope_append(*arguments)


def gather_and_dequant_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    seq_starts: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    v_cache_dtype: str | None = None,
) -> None:
    """Reads sequences out of a paged cache into packed rows: the inverse of `reshape_and_cache_flash`.

    Row ``cu_seq_lens[s] + t`` becomes the position ``p = seq_starts[s] + t`` of sequence ``s``, which lies in
    block ``block_table[s, p // block_size]`` at ``p % block_size``. Rows from ``cu_seq_lens[-1]`` on stay as
    they are.

    Args:
        key_cache: as for `reshape_and_cache_flash`, as is `value_cache`; read.
        value_cache: likewise.
        key: float32, float16 or bfloat16 ``[num_rows, num_kv_heads, head_size]`` with at least
            ``cu_seq_lens[-1]`` rows, any strides; written.
        value: likewise, of the dtype and with the rows of `key`, and the head_size of `value_cache`.
        block_table: int32 ``[num_seqs, max_blocks]``; entries of positions that are not read may be anything.
        cu_seq_lens: int32 ``[num_seqs + 1]``, 0 and the running sums of the lengths.
        kv_cache_dtype: as for `reshape_and_cache_flash`.
        k_scale: as for `reshape_and_cache_flash`, or float32 ``[num_blocks, block_size, num_kv_heads]``: the
            scales of `reshape_and_cache_flash_dynamic`.
        v_scale: likewise.
        seq_starts: int32 ``[num_seqs]``, the first position of each sequence; None: 0.
        k_offset: as for `reshape_and_cache_flash`: added, in float32, to what is dequantized.
        v_offset: likewise.
        v_cache_dtype: as for `reshape_and_cache_flash`.

    Raises:
        RuntimeError: an argument doesn't fit, or, on the CPU, the sums decrease or exceed the rows, or a position
            has no block of the cache. Nothing is written then. On CUDA such rows are skipped; they raise with
            the environment variable FP8KV_DEBUG=1.

    Example:
        >>> import torch, fp8kv
        >>> cache = torch.arange(8.0).view(4, 2, 1, 1).to(torch.float8_e4m3fn)  # 4 blocks of 2 slots
        >>> key, value = torch.empty(4, 1, 1), torch.empty(4, 1, 1)
        >>> table = torch.tensor([[3, -1], [0, 2]], dtype=torch.int32)
        >>> sums = torch.tensor([0, 1, 4], dtype=torch.int32)  # sequences of 1 and 3 tokens
        >>> scale = torch.tensor([2.0])
        >>> fp8kv.gather_and_dequant_cache(cache, cache, key, value, table, sums, "fp8", scale, scale)
        >>> key.flatten().tolist()
        [12.0, 0.0, 2.0, 8.0]
    """
    gather(
        key_cache, value_cache, key, value, block_table, cu_seq_lens, kv_cache_dtype, k_scale, v_scale,
        seq_starts, k_offset, v_offset, v_cache_dtype,
    )  # fmt: skip
