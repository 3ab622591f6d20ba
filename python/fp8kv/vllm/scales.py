"""The scales of vLLM's layers: checked at start-up, and calculated while serving. Nothing imports vLLM."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8kv._checks import check_scale_values
from fp8kv._dtypes import QUANTIZED_CACHE_NAMES
from fp8kv.checkpoint.load import examine
from fp8kv.nn import AttentionScales
from fp8kv.quantization import dequantize, static_scaled_fp8_quant
from fp8kv.vllm.cache import LayerCache

logger = logging.getLogger("vllm.fp8kv")

#: Room beyond what was observed. It costs an FP8 format no precision but that of its smallest numbers.
MARGIN = 2.0
#: Elements of a cache that `requantize` converts in one go, which bounds its temporary memory.
_CHUNK = 1 << 24

_WAY_OUT = "calibrate the model again, for example with fp8kv calibrate, or serve it with --kv-cache-dtype auto"


# At start-up


def check_at_start(vllm_config: Any, layer_names: Sequence[str], *, letters: str, observe: int) -> None:
    """Refuses scales that can't be right, before anything is served.

    Nothing is checked of weights that vLLM has made up (``load_format="dummy"``).

    Args:
        vllm_config: vLLM's, with the layers.
        layer_names: of the layers that share a kind of cache.
        letters: which of q, k and v have scales that are used.
        observe: as `fp8kv.vllm.settings.Settings.observe`.

    Raises:
        ValueError: the checkpoint or a layer has scales that can't be used, or the scales are to change
            while the cache is shared with other engines.
    """
    forward_context = vllm_config.compilation_config.static_forward_context
    layers = {name: forward_context[name] for name in layer_names}
    shared = [name for name, layer in layers.items() if _target(layer)]
    if observe and (shared or vllm_config.kv_transfer_config is not None):
        what = f"{shared[0]}, which reads the cache of another layer" if shared else "a KV connector"
        raise ValueError(
            f"fp8kv.vllm: FP8KV_VLLM_OBSERVE must be 0 with {what}, as all that share a cache must have the same scales"
        )
    static = {name: layer for name, layer in layers.items() if layer.kv_cache_dtype in QUANTIZED_CACHE_NAMES}
    if not static or vllm_config.load_config.load_format == "dummy":
        return
    check_checkpoint(vllm_config.model_config.model, query="q" in letters)
    check_layers(static, letters=letters)


def check_checkpoint(model: str, *, query: bool) -> None:
    """Refuses what `fp8kv.audit_checkpoint` calls an error in what vLLM reads, if the model is a folder.

    Args:
        model: vLLM's argument.
        query: whether queries are quantized, so that their scales matter.

    Raises:
        ValueError: an error was found.
    """
    if not Path(model).is_dir():
        return
    found = examine(model, "fp8kv.vllm", query=query)
    errors = [
        problem
        for problem in found.problems
        # vLLM doesn't read the subfolder "fp8kv".
        if problem.severity == "error" and not problem.kind.startswith("fp8kv-")
    ]
    if found.scheme is not None and errors:
        more = f" ({len(errors) - 1} more are found by fp8kv inspect {model})" if errors[1:] else ""
        raise ValueError(f"fp8kv.vllm: the scales of {model} can't be used: {errors[0]}{more}")


def check_layers(layers: Mapping[str, Any], *, letters: str) -> None:
    """Refuses scales that can't be right, and warns of layers that have none.

    Args:
        layers: vLLM's layers of an FP8 cache with scales of its own, by name.
        letters: which of q, k and v are used.

    Raises:
        ValueError: a scale is not finite, not above 0 or not of the right number, or a layer that reads the
            cache of another one has other scales.
    """
    for name, layer in layers.items():
        for letter in letters:
            scale = getattr(layer, f"_{letter}_scale").detach().float().reshape(-1).cpu()
            what = f"fp8kv.vllm: {letter}_scale of {name}"
            if len(scale) not in (1, layer.num_kv_heads):
                raise ValueError(
                    f"{what} must have 1 or {layer.num_kv_heads} elements, the KV heads of this rank, got "
                    f"{len(scale)}; {_WAY_OUT}"
                )
            try:
                check_scale_values(what, scale)
            except ValueError as error:
                raise ValueError(f"{error}; {_WAY_OUT}") from None
        _check_shared(name, layer, layers)
    without = [name for name, layer in layers.items() if not _has_scales(layer)]
    if without:
        logger.warning(
            "fp8kv.vllm: %d of %d layers have no scales, %s the first of them: their K and V are quantized "
            "with 1.0 and clipped beyond the range of FP8; calibrate the model with fp8kv calibrate, or set "
            "FP8KV_VLLM_OBSERVE",
            len(without),
            len(layers),
            without[0],
        )


def _check_shared(name: str, layer: Any, layers: Mapping[str, Any]) -> None:
    target = layers.get(_target(layer))
    if target is None:
        return
    for scale in ("_k_scale", "_v_scale"):
        if bool((getattr(layer, scale) != getattr(target, scale)).any()):
            raise ValueError(
                f"fp8kv.vllm: {name} reads the cache of another layer and must have its scales, got others; {_WAY_OUT}"
            )


def _target(layer: Any) -> str:
    """The layer whose cache is read in the place of an own one, or nothing."""
    return getattr(layer, "kv_sharing_target_layer_name", None) or ""


def _has_scales(layer: Any) -> bool:
    return any(bool((getattr(layer, scale) != 1).any()) for scale in ("_k_scale", "_v_scale"))


# While serving


class ServingScales:
    """Observes the first tokens of one layer, then makes its scales of them.

    What the cache holds by then is quantized again. Tokens in steps that are captured in a CUDA graph are not
    observed, as nothing of this should be replayed: with vLLM's defaults these are the decode steps.

    Args:
        num_tokens: how many.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.frozen = False
        self._scales: AttentionScales | None = None
        self._at_most = 0  # observed, as far as the host knows: padding may be among it

    def before_append(self, layer: Any, key: Tensor, value: Tensor, slot_mapping: Tensor, cache: LayerCache) -> None:
        """Observes what is about to be stored; with the last of it the scales change.

        Args:
            layer: with the scales ``_k_scale`` and ``_v_scale``, which are written in place.
            key: ``[num_tokens, num_kv_heads, head_size]``; rows beyond the slots are padding.
            value: likewise.
            slot_mapping: tokens with a negative slot are not observed.
            cache: the layer's.
        """
        if self.frozen or (key.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if self._scales is None:
            self._scales = self._make(layer, key, cache)
        self._scales.observe(None, key, value, slot_mapping)
        self._at_most += len(slot_mapping)
        if self._at_most >= self.num_tokens:
            self._at_most = sum(self._scales.observations().k.observed) // key[0].numel()
            if self._at_most >= self.num_tokens:
                self._freeze(self._scales, layer, cache)

    @staticmethod
    def _make(layer: Any, key: Tensor, cache: LayerCache) -> AttentionScales:
        heads, head_size = key.shape[1:]
        strategy = "attn_head" if layer._k_scale.numel() > 1 else "tensor"
        scales = AttentionScales(heads, heads, head_size, strategy=strategy, dtype=cache.torch_dtype, device=key.device)
        scales.k_scale.copy_(layer._k_scale.detach().reshape(-1))
        scales.v_scale.copy_(layer._v_scale.detach().reshape(-1))
        return scales

    @torch.no_grad()
    def _freeze(self, scales: AttentionScales, layer: Any, cache: LayerCache) -> None:
        before = scales.k_scale.clone(), scales.v_scale.clone()
        report = scales.freeze(margin=MARGIN)
        for stored, old, new in zip(
            (cache.key_cache, cache.value_cache), before, (scales.k_scale, scales.v_scale), strict=True
        ):
            requantize(stored.view(cache.torch_dtype), old, new)
        for letter in "kv":
            new = getattr(scales, f"{letter}_scale")
            own = getattr(layer, f"_{letter}_scale")
            own.copy_(new.view(own.shape))
            setattr(layer, f"_{letter}_scale_float", new.max().item())
        self.frozen, self._scales = True, None
        logger.info("fp8kv.vllm: %s has its scales: %s", getattr(layer, "layer_name", "a layer"), report)


def requantize(cache: Tensor, old: Tensor, new: Tensor) -> None:
    """Makes what was quantized with `old` stand for the same with `new`, rounded and clipped once more.

    Args:
        cache: FP8 ``[num_blocks, block_size, num_kv_heads, head_size]``, any strides; written.
        old: float32, 1 or num_kv_heads elements.
        new: likewise.
    """
    blocks = max(1, _CHUNK // max(1, cache[:1].numel()))
    for first in range(0, len(cache), blocks):
        part = cache[first : first + blocks]
        values = dequantize(part, old.view(1, 1, -1, 1), dtype=torch.float32)
        static_scaled_fp8_quant(part, values, new.view(1, 1, -1, 1))
