"""The attention function "fp8kv" for Transformers: reads the FP8 bytes of an `Fp8Cache` if possible.

Transformers calls the cache's `update` and passes its result to the attention function. A layer of `Fp8Cache`
marks these tensors with a `Stored`, which describes where their tokens are. A mark is an attribute of the
tensor object: it is lost if a model processes keys or values before attention, which then takes the usual
path. The mask function marks masks likewise, with the first position that each sequence sees.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from fp8kv._dtypes import REAL_DTYPES
from fp8kv.transformers.step import Step

#: The name for `attn_implementation`.
NAME = "fp8kv"
#: Longer steps dequantize their keys and values and use PyTorch's attention.
MAX_NEW_TOKENS = 8

_STORED = "_fp8kv_stored"
_STARTS = "_fp8kv_starts"
_sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
_sdpa_mask: Any = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def runs_on(device: torch.device) -> bool:
    """Whether `fp8kv.paged_attention` supports this device."""
    return device.type in ("cpu", "cuda")


class Stored:
    """The location of the tokens of keys and values.

    Args:
        layer: of `Fp8Cache`.
        step: the indices of the step; None if attention must use the tensors.
        whole: whether the tensors have all tokens, dequantized; otherwise only the new ones.
    """

    def __init__(self, layer: Any, step: Step | None, whole: bool) -> None:
        self.layer = layer
        self.step = step
        self.whole = whole

    def mark(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        setattr(key, _STORED, self)
        setattr(value, _STORED, self)
        return key, value


def choose(model_config: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Sets the attention function of a model to "fp8kv", if "fp8kv" can replace the current one.

    Args:
        model_config: of the model.
        config: the part of it that describes the language model.
    """
    chosen = config._attn_implementation
    classes: list[Any] = [
        mapping[type(one)]
        for one in (config, model_config)
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        if type(one) in mapping
    ]
    model = classes[0] if classes else None
    if model is None or not model._can_set_attn_implementation():
        return
    # Eager attention may be a choice or the only one, as "sdpa" has no softcap or sinks. If the model
    # supports FlashAttention, the arguments of the function are sufficient.
    no_other = chosen == "eager" and not model._supports_sdpa and model._supports_flash_attn
    if chosen == "sdpa" or no_other:
        config._attn_implementation = NAME


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function, with the arguments that Transformers passes to all attention functions.

    Args:
        module: of the model.
        query: ``[batch, num_heads, new tokens, head_size]``.
        key: ``[batch, num_kv_heads, tokens, head_size]``, from `Fp8Cache` or not.
        value: likewise.
        attention_mask: from `mask`, or 4-dimensional from the user; None: causal, without padding.
        dropout: for the attention weights.
        scaling: factor of the logits; None: ``head_size ** -0.5``.
        softcap: bound of the logits; None: no bound.
        s_aux: ``[num_heads]``, sinks.
        kwargs: further arguments, passed to "sdpa" or eager attention.

    Returns:
        ``[batch, new tokens, num_heads, head_size]``, and the weights of eager attention or None.
    """
    stored = _mark_of(key)
    if stored is not None:
        if stored is _mark_of(value):
            stored.layer.is_reached = True
        elif stored.whole:
            stored = None
        else:
            raise unreached(stored.layer.index)
    if stored is not None and stored.step is not None:
        plain = dropout == 0.0 and kwargs.get("position_bias") is None and _is_causal(module, kwargs)
        if plain and _can_read(query, attention_mask, stored.step):
            starts = getattr(attention_mask, _STARTS, None)
            return stored.layer.attend(query, stored.step, starts, scaling, softcap, s_aux), None
        if not stored.whole:
            key, value = stored.layer.read(stored.step, query.dtype)
    attention = _sdpa
    if softcap is not None or s_aux is not None:
        attention = _eager_attention(module)
        attention_mask = _additive(attention_mask, query, key, _is_causal(module, kwargs))
        kwargs |= {} if softcap is None else {"softcap": softcap}
        kwargs |= {} if s_aux is None else {"s_aux": s_aux}
    result: tuple[Tensor, Tensor | None] = attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def _mark_of(tensor: Tensor) -> Stored | None:
    stored: Stored | None = getattr(tensor, _STORED, None)
    return stored


def unreached(layer: int) -> RuntimeError:
    return RuntimeError(
        f'Fp8Cache: the keys and values of layer {layer} must reach the attention function "{NAME}" as the '
        "cache returned them, but the model has changed or used them; give Fp8Cache direct=False"
    )


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _can_read(query: Tensor, mask: Tensor | None, step: Step) -> bool:
    """Whether the query is for the new tokens, with a mask that `fp8kv.paged_attention` supports."""
    known = mask is None or hasattr(mask, _STARTS)
    records = torch.is_grad_enabled() and query.requires_grad
    return known and not records and query.shape[2] == step.num_tokens and query.dtype in REAL_DTYPES


def _eager_attention(module: torch.nn.Module) -> Any:
    """The model's eager attention, from the Python module of the layer's class."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f'fp8kv.transformers: attn_implementation "{NAME}" must find eager attention next to '
        f"{type(module).__name__}, as the model has softcap or sinks, got none"
    )


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    """The mask in the form for eager attention."""
    if mask is None:
        sizes = query.shape[2], key.shape[2]
        if sizes[0] == 1 or not is_causal:
            return None
        mask = torch.ones(sizes, dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def mask(**kwargs: Any) -> Tensor | None:
    """The mask function of "sdpa", which also marks masks that `fp8kv.paged_attention` does not need."""
    result: Tensor | None = _sdpa_mask(**kwargs)
    if result is not None and kwargs["q_length"] <= MAX_NEW_TOKENS and runs_on(result.device):
        starts = _starts_untested(kwargs) if torch.compiler.is_compiling() else _starts(result, kwargs)
        if starts is not None:
            result = result.contiguous()  # `generate` does this, and a copy has no mark
            setattr(result, _STARTS, starts)
    return result


def _starts(mask: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The first position that each sequence sees, if the mask contains nothing else but the window.

    So the padding is on the left, without holes. Reading the answer synchronizes with a GPU, as "sdpa" does
    to check for padding.
    """
    local_size = kwargs.get("local_size")
    queries = torch.arange(kwargs["q_length"], device=mask.device)[:, None] + kwargs["q_offset"]
    positions = torch.arange(kwargs["kv_length"], device=mask.device) + kwargs["kv_offset"]
    starts = mask[:, 0, 0].to(torch.uint8).argmax(-1) + kwargs["kv_offset"]
    expected = (positions <= queries) & (positions >= starts[:, None, None])
    if local_size is not None:
        expected &= positions > queries - local_size
    return starts.int() if mask.shape[1] == 1 and torch.equal(mask[:, 0], expected) else None


def _starts_untested(kwargs: dict[str, Any]) -> Tensor | None:
    """For a mask that compiled code computes from positions alone, and therefore can't inspect."""
    one_query = kwargs["q_length"] == 1 and kwargs.get("attention_mask") is None
    chunks = getattr(kwargs.get("config"), "attention_chunk_size", None)
    in_chunks = kwargs.get("local_size") is not None and chunks is not None
    if not one_query or in_chunks or kwargs.get("use_vmap"):
        return None
    return torch.zeros(kwargs["batch_size"], dtype=torch.int32, device=kwargs["device"])


def register() -> None:
    """Registers "fp8kv" with Transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
