"""What the plug-in takes of vLLM, without vLLM: the names, and methods with the parameters of two releases.

`test_vllm_interfaces.py` compares them with a release that is unpacked somewhere.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import sys
import types
from abc import ABC, abstractmethod
from importlib.machinery import ModuleSpec
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

RELEASES = ("0.26", "0.33")

T = TypeVar("T")


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class AttentionBackend(ABC):
    forward_includes_kv_cache_update = True

    @staticmethod
    @abstractmethod
    def get_name() -> str: ...

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type: ...

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type: ...

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        return None


class AttentionMetadata:
    pass


@dataclasses.dataclass
class CommonAttentionMetadata:
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True
    seq_lens_cpu_upper_bound: Tensor | None = None
    rswa_prefix_lens: Tensor | None = None


class AttentionMetadataBuilder(ABC, Generic[T]):
    reorder_batch_threshold: int | None = None

    @abstractmethod
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec = kv_cache_spec
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.device = device

    def _init_reorder_batch_threshold(
        self,
        reorder_batch_threshold: int | None = 1,
        supports_spec_as_decode: bool = False,
        supports_dcp_with_varlen: bool = False,
    ) -> None:
        speculative = self.vllm_config.speculative_config
        drafts = speculative.num_speculative_tokens if speculative and supports_spec_as_decode else 0
        self.reorder_batch_threshold = max(reorder_batch_threshold or 1, 1 + drafts)

    @abstractmethod
    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any: ...

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any: ...


class AttentionImpl(ABC, Generic[T]):
    supports_quant_query_input = False

    @abstractmethod
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
    ) -> None: ...

    @abstractmethod
    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor: ...


def split_decodes_and_prefills(
    common_attn_metadata: CommonAttentionMetadata,
    decode_threshold: int = 1,
    require_uniform: bool = False,
    treat_short_extends_as_decodes: bool = True,
) -> tuple[int, int, int, int]:
    starts = common_attn_metadata.query_start_loc_cpu.tolist()
    lens = [b - a for a, b in itertools.pairwise(starts)]
    decodes = next((i for i, length in enumerate(lens) if length > decode_threshold), len(lens))
    rows = starts[decodes] if decodes < len(lens) else common_attn_metadata.num_actual_tokens
    return decodes, len(lens) - decodes, rows, common_attn_metadata.num_actual_tokens - rows


class FlashAttentionImpl(AttentionImpl[Any]):
    """Notes what is left to it."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.head_size, self.kv_cache_dtype, self.attn_type = head_size, kv_cache_dtype, attn_type
        self.stored: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self.stored.append(key)


class FlashAttentionMetadataBuilder(AttentionMetadataBuilder[Any]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        raise NotImplementedError


class FlashAttentionBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> type:
        return FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type:
        return FlashAttentionMetadataBuilder


class QuantFP8:
    """Notes what is left to it."""

    name = "quant_fp8"

    def __init__(
        self,
        static: bool,
        group_shape: tuple[int, int],
        num_token_padding: int | None = None,
        column_major_scales: bool = False,
        tma_aligned_scales: bool = False,
        use_ue8m0: bool | None = None,
        compile_native: bool = True,
    ) -> None:
        self.group_shape, self.num_token_padding = group_shape, num_token_padding

    def forward_cuda(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        scale_ub: Tensor | None = None,
        use_triton: bool = False,
    ) -> tuple[Any, Any]:
        return "vLLM's", scale


def registry(release: str) -> types.SimpleNamespace:
    """`vllm.v1.attention.backends.registry`; from 0.33 on names can be added."""
    overrides: dict[Any, str] = {}

    class AttentionBackendEnum(enum.Enum):
        FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
        CUSTOM = None

        def is_overridden(self) -> bool:
            return self in overrides

        def get_path(self, include_classname: bool = True) -> str:
            return overrides.get(self, self.value)

    def add(name: str, value: str) -> Any:
        if name in AttentionBackendEnum.__members__:
            raise ValueError(f"{name} is there already")
        member = object.__new__(AttentionBackendEnum)
        member._name_, member._value_ = name, value
        AttentionBackendEnum._member_map_[name] = member
        AttentionBackendEnum._member_names_.append(name)
        return member

    def register_backend(backend: Any, class_path: str, is_mamba: bool = False) -> None:
        overrides[add(backend, class_path) if isinstance(backend, str) else backend] = class_path

    if release != "0.26":
        AttentionBackendEnum.register = staticmethod(add)  # type: ignore[attr-defined]
    return types.SimpleNamespace(AttentionBackendEnum=AttentionBackendEnum, register_backend=register_backend)


def custom_op() -> types.SimpleNamespace:
    """`vllm.model_executor.custom_op`."""
    replaced: dict[str, type] = {}

    class CustomOp:
        @classmethod
        def register_oot(cls, _decorated_op_cls: Any = None, name: str | None = None) -> Any:
            def decorator(op_cls: Any) -> Any:
                assert name is not None
                assert name not in replaced, f"Duplicate op name: {name}"
                op_cls.name = name
                replaced[name] = op_cls
                return op_cls

            return decorator

    return types.SimpleNamespace(CustomOp=CustomOp, op_registry_oot=replaced)


def modules(release: str) -> dict[str, types.ModuleType]:
    """The modules of one of `RELEASES`, by name."""
    attention = types.SimpleNamespace(
        AttentionBackend=AttentionBackend,
        AttentionCGSupport=AttentionCGSupport,
        AttentionImpl=AttentionImpl,
        AttentionMetadata=AttentionMetadata,
        AttentionMetadataBuilder=AttentionMetadataBuilder,
        AttentionType=AttentionType,
        CommonAttentionMetadata=CommonAttentionMetadata,
    )
    utils = types.SimpleNamespace(split_decodes_and_prefills=split_decodes_and_prefills)
    if release == "0.26":
        utils.get_kv_cache_layout = lambda: "NHD"
    flash = types.SimpleNamespace(
        FlashAttentionBackend=FlashAttentionBackend,
        FlashAttentionImpl=FlashAttentionImpl,
        FlashAttentionMetadataBuilder=FlashAttentionMetadataBuilder,
    )
    contents = {
        "vllm": types.SimpleNamespace(__version__=release),
        "vllm.config": types.SimpleNamespace(get_current_vllm_config_or_none=lambda: None),
        "vllm.v1.attention.backend": attention,
        "vllm.v1.attention.backends.registry": registry(release),
        "vllm.v1.attention.backends.utils": utils,
        "vllm.v1.attention.backends.flash_attn": flash,
        "vllm.model_executor.custom_op": custom_op(),
        "vllm.model_executor.layers.quantization.input_quant_fp8": types.SimpleNamespace(QuantFP8=QuantFP8),
    }
    result: dict[str, types.ModuleType] = {}
    for path, names in contents.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in result:
                result[name] = types.ModuleType(name)
                result[name].__spec__ = ModuleSpec(name, None, is_package=True)
                result[name].__path__ = []
                if i > 1:
                    setattr(result[".".join(parts[: i - 1])], parts[i - 1], result[name])
        vars(result[path]).update(vars(names))
    return result


def forget_the_plugin() -> None:
    """What of it was made with other modules of vLLM."""
    for name in [name for name in sys.modules if name.startswith("fp8kv.vllm")]:
        del sys.modules[name]
