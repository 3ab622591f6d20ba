"""The attention backend: what vLLM asks of one, in terms of the operators. It needs vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fp8kv import _ops
from fp8kv._dtypes import QUANTIZED_CACHE_NAMES
from fp8kv.kv_cache import paged_attention
from fp8kv.vllm.batch import MAX_TOKENS, Part, long_queries, short_queries
from fp8kv.vllm.cache import CACHE_NAMES, PER_TOKEN_HEAD, LayerCache
from fp8kv.vllm.flash import FlashAttention
from fp8kv.vllm.scales import ServingScales, check_at_start
from fp8kv.vllm.settings import settings
from fp8kv.vllm.versions import (
    BACKEND_NAME,
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CacheLayout,
    CommonAttentionMetadata,
    current_config,
    split_decodes_and_prefills,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import DeviceCapability


class Fp8KVBackend(CacheLayout, AttentionBackend):
    """The requests that can be served, as answers to vLLM's own checks."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(CACHE_NAMES)
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[Fp8KVImpl]:
        return Fp8KVImpl

    @staticmethod
    def get_builder_cls() -> type[Fp8KVMetadataBuilder]:
        return Fp8KVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return bool(capability.major >= 8)

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: Any, *args: Any, **kwargs: Any
    ) -> str | None:
        if kv_cache_dtype == PER_TOKEN_HEAD and head_size % 4:
            return f"head_size must be a multiple of 4 with {PER_TOKEN_HEAD}, got {head_size}"
        return _ops.cuda_missing


@dataclass
class Fp8KVMetadata(AttentionMetadata):
    """The metadata of a step.

    Attributes:
        num_actual_tokens: rows of the queries that are not padding.
        block_table: int32 ``[num_seqs, max_blocks]``.
        seq_lens: int32 ``[num_seqs]``; the tokens of this step are counted.
        max_seq_len: an upper bound.
        slot_mapping: where the tokens of this step are stored.
        parts: in the order of the batch, short queries first.
        of_parts: `block_table` and `seq_lens` of each part, views made once for all layers, as each takes the
            host a microsecond or two.
    """

    num_actual_tokens: int
    block_table: Tensor
    seq_lens: Tensor
    max_seq_len: int
    slot_mapping: Tensor
    parts: list[Part]
    of_parts: list[tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.of_parts = [(self.block_table[part.sequences], self.seq_lens[part.sequences]) for part in self.parts]


class Fp8KVMetadataBuilder(AttentionMetadataBuilder[Fp8KVMetadata]):
    """Divides batches; checks scales, as it is made when all is loaded and before anything is served."""

    # Batches of short queries of one length are captured; all others run in pieces.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._copy_tokens = copy_tokens(vllm_config)
        check_at_start(vllm_config, layer_names, letters="kv", observe=settings().observe)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Fp8KVMetadata:
        batch = common_attn_metadata
        if batch.causal is not True or getattr(batch, "rswa_prefix_lens", None) is not None:
            raise NotImplementedError(
                f"fp8kv.vllm: attention must be causal, with a sliding window or none; use another backend than {BACKEND_NAME}"
            )
        threshold = self.reorder_batch_threshold or 1
        short, long, short_rows, _ = split_decodes_and_prefills(batch, decode_threshold=threshold)
        starts = batch.query_start_loc
        parts = []
        if short:
            bound = min(threshold, batch.max_query_len)
            parts.append(short_queries(short, short_rows, starts, bound))
        if long:
            host, lengths = batch.query_start_loc_cpu.tolist(), batch.seq_lens_cpu_upper_bound
            seq_lens = None if lengths is None else lengths.tolist()
            parts += long_queries(short, starts, host, seq_lens, self._copy_tokens)
        return Fp8KVMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            block_table=batch.block_table_tensor,
            seq_lens=batch.seq_lens,
            max_seq_len=batch.max_seq_len,
            slot_mapping=batch.slot_mapping,
            parts=parts,
        )

    def update_block_table(self, metadata: Fp8KVMetadata, blk_table: Tensor, slot_mapping: Tensor) -> Fp8KVMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class Fp8KVImpl(AttentionImpl[Fp8KVMetadata]):
    """Attention of one layer, and what stores its keys and values. Queries stay as they are."""

    supports_quant_query_input = False
    supports_dcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None or attn_type != AttentionType.DECODER:
            what = "ALiBi slopes" if alibi_slopes is not None else f"attention of the type {attn_type}"
            raise NotImplementedError(f"fp8kv.vllm: {what} can't be served; use another backend than {BACKEND_NAME}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        # A window is copied with all that is before it, so such layers read the cache.
        dtype = torch.get_default_dtype()  # that of the model, while it is made
        self._flash = FlashAttention.find(head_size, dtype, sinks) if sliding_window is None else None
        self._copy_tokens = copy_tokens(current_config())
        observe = settings().observe if kv_cache_dtype in QUANTIZED_CACHE_NAMES else 0
        self._serving_scales = ServingScales(observe) if observe else None
        self._cache: tuple[Tensor, LayerCache] | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Fp8KVMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the queries to the cache, in which their own tokens are already.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, padded.
            kv_cache: as `LayerCache.of` takes it.
            attn_metadata: None while vLLM measures memory, in which case `output` is 0.
            output: likewise; written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"fp8kv.vllm: {BACKEND_NAME} doesn't quantize its output")
        if attn_metadata is None:
            if self._flash is not None and self._copy_tokens:
                query.new_empty(2, self._copy_tokens, self.num_kv_heads, self.head_size)  # to be counted
            return output.fill_(0)
        cache = self._layer_cache(kv_cache)
        k_scale, v_scale = cache.scales(layer._k_scale, layer._v_scale)
        for part, (block_table, seq_lens) in zip(attn_metadata.parts, attn_metadata.of_parts, strict=True):
            if part.copy is not None and self._flash is not None:
                self._flash.attend(
                    part, part.copy, query, output, block_table, cache, (k_scale, v_scale),
                    softmax_scale=self.scale, softcap=self.logits_soft_cap, s_aux=self.sinks,
                )  # fmt: skip
                continue
            whole = part.rows == slice(0, len(query))  # a view takes the host longer than the question
            paged_attention(
                query if whole else query[part.rows],
                cache.key_cache,
                cache.value_cache,
                block_table,
                seq_lens,
                kv_cache_dtype=cache.dtype,
                k_scale=k_scale,
                v_scale=v_scale,
                softmax_scale=self.scale,
                cu_query_lens=part.cu_query_lens,
                max_query_len=part.max_query_len,
                max_seq_len=attn_metadata.max_seq_len,
                sliding_window=self.sliding_window,
                softcap=self.logits_soft_cap,
                sinks=self.sinks,
                out=output if whole else output[part.rows],
            )
        return output

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Stores the tokens of a step; rows of `key` and `value` beyond the slots are padding."""
        cache = self._layer_cache(kv_cache)
        if self._serving_scales is not None:
            self._serving_scales.before_append(layer, key, value, slot_mapping, cache)
        cache.append(key, value, slot_mapping, layer._k_scale, layer._v_scale)

    def _layer_cache(self, kv_cache: Tensor) -> LayerCache:
        """Views are made once: each costs microseconds of the host, in every layer and step."""
        if self._cache is None or self._cache[0] is not kv_cache:
            self._cache = kv_cache, LayerCache.of(kv_cache, self.head_size, self.kv_cache_dtype)
        return self._cache[1]


def copy_tokens(vllm_config: VllmConfig | None) -> int:
    """Tokens of a copy for long queries, at most; 0: there are no copies."""
    if vllm_config is None or vllm_config.model_config is None or settings().prefill != "gather":
        return 0
    of_a_step = vllm_config.scheduler_config.max_num_batched_tokens
    return int(min(MAX_TOKENS, max(vllm_config.model_config.max_model_len, of_a_step)))
