"""`Fp8Cache`: the cache for `generate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    StaticCache,
)
from transformers.configuration_utils import PreTrainedConfig

from fp8kv._checks import (
    LAYOUTS,
    WITHOUT_KEYS,
    check_choice,
    check_offset_values,
    check_scale_values,
    check_size,
    quoted,
)
from fp8kv._dtypes import CACHE_DTYPES, CACHE_NAMES, DEFAULT_FORMAT, QUANTIZED_CACHE_NAMES
from fp8kv.checkpoint import KVScales, LayerScales, load_kv_scales
from fp8kv.checkpoint.scales import mapped
from fp8kv.kv_cache.clipping import Clipped
from fp8kv.transformers import attention, layers
from fp8kv.transformers.clipping import Clipping
from fp8kv.transformers.layers import Fp8Layer, Geometry, LayerOptions
from fp8kv.transformers.progress import Progress
from fp8kv.transformers.step import Steps

#: Transformers' layers whose keys and values become FP8, and whether they have a recurrent state as well.
_STORED_IN_FP8 = {
    DynamicLayer: False,
    DynamicSlidingWindowLayer: False,
    LinearAttentionAndFullAttentionLayer: True,
    LinearAttentionAndSlidingWindowAttentionLayer: True,
}
#: Fields of a config with the window of a layer, and the type of such a layer.
_BOUNDED = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
#: Types of models that compute something else from the values that `update` returns.
_READ_ALL_VALUES = ("doge",)
#: Types of models that take only caches of a class of their own.
_OWN_CACHES = ("minimax",)


class Fp8Cache(Cache):
    """A cache for Transformers that stores keys and values in FP8 or INT8, a `fp8kv.PagedKVCache` per layer.

    `update` quantizes the new tokens and stores them. In steps of up to 8 tokens, the attention function
    "fp8kv" then reads the stored bytes; for prompts, and where that is not possible, `update` returns all
    tokens dequantized, including the new ones. Such tensors are temporary: between steps, only quantized data
    is kept.

    Without `max_cache_len` the cache is dynamic: it accepts any number of sequences and grows with them, to
    at most one eighth and one block more than needed. With `max_cache_len` it is static: allocated once, at
    addresses that don't change, so that the forward pass can be compiled and captured.

    Layers with states other than keys and values, and layers that reuse another layer's keys and values, work
    as in Transformers' own caches.

    Args:
        config: of the model, which defines the layers and their windows.
        scales: None: 1.0; clipped elements are counted, with a warning. A `fp8kv.KVScales`, as
            `fp8kv.load_kv_scales` and `fp8kv.calibrate` return it, or the folder of a checkpoint; with the
            format of each layer, scales per tensor, head or channel, and offsets. "dynamic": one per token
            and head, computed when the token is stored.
        dtype: "fp8" or "fp8_e4m3", "fp8_e5m2", "int8", or the torch dtype. None: the formats that `scales`
            were made for, otherwise "fp8".
        layout: "NHD" or "HND"; see `fp8kv.PagedKVCache`.
        block_size: tokens per block.
        max_cache_len: makes the cache static: tokens per sequence, prompt and answer together.
        max_batch_size: static caches: maximum number of sequences; None: the number in the first call.
        device: static caches, with `max_batch_size`: allocates immediately, on this device. None: each layer
            allocates with its first key, on the key's device.
        k_offset: what is subtracted from the keys of a layer before they are quantized, by its index, as
            `fp8kv.PagedKVCache` takes it; together with "dynamic", or no scales. None: the offsets of `scales`.
        v_offset: likewise, of values.
        skip_layers: layers that stay in the model's dtype, by index, or by type as in the config, such as
            "sliding_attention".
        direct: whether attention may read the stored bytes. If the attention function of `config` is "sdpa",
            or eager attention because the model has no other, it is set to "fp8kv", which does the same for
            every other cache.

    Attributes:
        layers: from `fp8kv.transformers.layers`; ``layers[i].storage`` is the `fp8kv.PagedKVCache`. Layers
            that are not in FP8 are Transformers' own.

    Raises:
        ValueError: an argument can't be used, scales are missing, don't fit or are for another format than
            `dtype`, or the model has layers with unknown states.

    Example:
        >>> import torch
        >>> from fp8kv.transformers import Fp8Cache
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
        >>> model = LlamaForCausalLM(config).eval()
        >>> cache = Fp8Cache(model.config, scales="dynamic")
        >>> ids = model.generate(torch.arange(1, 12)[None], max_new_tokens=5, cache=cache)
        >>> ids.shape, cache.get_seq_length()
        (torch.Size([1, 16]), 15)

    See also: `fp8kv.PagedKVCache`.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        scales: Any = None,
        *,
        dtype: str | torch.dtype | None = None,
        layout: str = "NHD",
        block_size: int = 16,
        max_cache_len: int | None = None,
        max_batch_size: int | None = None,
        device: torch.device | str | int | None = None,
        k_offset: Mapping[int, Tensor] | None = None,
        v_offset: Mapping[int, Tensor] | None = None,
        skip_layers: Sequence[int | str] = (),
        direct: bool = True,
    ) -> None:
        _check_sizes(layout, block_size, max_cache_len, max_batch_size, device)
        name = None if dtype is None else _checked_dtype(dtype)
        storage = {"layout": layout, "block_size": block_size}
        decoder = _decoder_config(config)
        plans = _plans(decoder, skip_layers)
        self._fp8 = [index for index, plan in enumerate(plans) if plan is not None]
        direct = direct and decoder.model_type not in _READ_ALL_VALUES
        self._clipping, self._progress, steps = Clipping(), Progress(self._fp8), Steps()
        by_layer = _scales_of_layers(scales, self._fp8)
        offsets = _offsets_of_layers({"k_offset": k_offset, "v_offset": v_offset}, by_layer)
        # For the layers that are not in FP8.
        own: Cache = StaticCache(decoder, max_cache_len) if max_cache_len else DynamicCache(config=decoder)
        for index in self._fp8:
            plan = plans[index]
            assert plan is not None
            of_layer = {"dtype": _format(name, by_layer[index], index), "scales": by_layer[index]}
            options = LayerOptions(
                index, storage | of_layer | offsets[index], decoder, self._clipping, direct, plan.is_shared,
                plan.window,
            )  # fmt: skip
            room = None if max_cache_len is None else (max_cache_len, max_batch_size)
            own.layers[index] = _layer(options, plan, steps, self._progress, room)
        super().__init__(layers=own.layers)
        if device is not None:
            configs = _layer_configs(decoder)
            for index in self._fp8:
                self.layers[index].allocate(max_batch_size, _geometry(configs[index]), torch.device(device))
        if direct:
            attention.choose(config, decoder)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new tokens of a layer.

        Returns:
            ``[batch, num_kv_heads, tokens, head_size]`` of K and V: all tokens, dequantized, or only the new
            ones, if the attention function "fp8kv" reads the others.
        """
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._fp8[-1]:
            self._clipping.look()
        return result

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of tokens of the next `update` if it returns all, and the position of the first."""
        self._clipping.look()
        return super().get_mask_sizes(query_length, layer_idx)

    def clipped(self) -> Clipped | None:
        """The number of clipped elements of K and V, in a cache without explicit scales.

        It synchronizes. A single warning is issued when elements were clipped, on a GPU as soon as this is
        known without synchronization.

        Returns:
            The counts; None if scales were given or are computed, because nothing is counted then.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig
            >>> from fp8kv.transformers import Fp8Cache
            >>> cache = Fp8Cache(LlamaConfig(num_hidden_layers=1))
            >>> _ = cache.update(torch.ones(1, 32, 5, 128), torch.ones(1, 32, 5, 128), 0)
            >>> cache.clipped()
            Clipped(k=0, v=0)
        """
        no_scales = self.layers[self._fp8[0]].options.storage["scales"] is None
        return self._clipping.read() if no_scales else None

    @property
    def nbytes(self) -> int:
        """Bytes currently allocated in all layers, including scales per token and other states.

        Example:
            >>> from transformers import LlamaConfig
            >>> from fp8kv.transformers import Fp8Cache
            >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
            >>> Fp8Cache(config, max_cache_len=64, max_batch_size=3, device="cpu").nbytes
            24576
        """
        return sum(_other_bytes(layer) + getattr(layer, "nbytes", 0) for layer in self.layers)

    @property
    def nbytes_16bit(self) -> int:
        """Bytes of the keys and values that Transformers' own 16-bit cache holds at the same point."""
        return sum(_other_bytes(layer) + getattr(layer, "nbytes_16bit", 0) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens of all sequences: ``crop(-3)`` removes three.

        Raises:
            ValueError: there are fewer tokens, or a layer with a window no longer has the tokens before them,
                which `activate_past_recording` would keep. Nothing is removed then.
        """
        tokens_to_remove = int(tokens_to_remove)  # some releases of Transformers pass a tensor
        for index in self._fp8:
            self.layers[index].check_crop(tokens_to_remove)
        # Transformers' own layers first, because they may raise errors.
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, Fp8Layer)):
            layer.crop(tokens_to_remove)
        self._progress.crop(tokens_to_remove)

    def __repr__(self) -> str:
        kinds = Counter(type(layer).__name__ for layer in self.layers)
        layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"Fp8Cache({layers}, {self.nbytes / 2**20:.4g} MiB)"


class Int8Cache(Fp8Cache):
    """`Fp8Cache` with ``dtype="int8"``: INT8, whose scales of channels come from calibration.

    Args:
        config: as for `Fp8Cache`.
        scales: likewise; best from ``fp8kv.calibrate(..., strategy="channel", dtype="int8")``.
        options: of `Fp8Cache`, by name.

    Example:
        >>> import torch
        >>> from fp8kv.transformers import Int8Cache
        >>> from transformers import LlamaConfig
        >>> cache = Int8Cache(LlamaConfig(num_hidden_layers=1), "dynamic")
        >>> _ = cache.update(torch.ones(1, 32, 5, 128), torch.ones(1, 32, 5, 128), 0)
        >>> cache.layers[0].storage.dtype
        torch.int8
    """

    def __init__(self, config: PreTrainedConfig, scales: Any = None, **options: Any) -> None:
        super().__init__(config, scales, **{"dtype": "int8"} | options)


def _checked_dtype(dtype: str | torch.dtype) -> str:
    name = CACHE_NAMES.get(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in QUANTIZED_CACHE_NAMES:
        names = ", ".join(map(quoted, QUANTIZED_CACHE_NAMES))
        raise ValueError(f"Fp8Cache: dtype must be {names} or the torch dtype, got {dtype!r}")
    return name


def _check_sizes(layout: str, block_size: int, max_cache_len: int | None, max_batch_size: int | None, device: Any) -> None:
    check_choice("Fp8Cache: layout", layout, LAYOUTS)
    sizes = {"block_size": block_size, "max_cache_len": max_cache_len, "max_batch_size": max_batch_size}
    for name, size in sizes.items():
        if size is not None or name == "block_size":
            check_size(f"Fp8Cache: {name}", size, 1)
    if max_batch_size is not None and max_cache_len is None:
        raise ValueError(
            f"Fp8Cache: max_batch_size must be None without max_cache_len, as a dynamic cache grows, got {max_batch_size}"
        )
    if device is not None and (max_cache_len is None or max_batch_size is None):
        raise ValueError(
            "Fp8Cache: device must be None without max_cache_len and max_batch_size, as each layer allocates "
            f"on the device of its first key, got {str(device)!r}"
        )


def _decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of the config that describes the language model."""
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"Fp8Cache: config must be a config of transformers, such as model.config, got {type(config).__name__}"
        )
    if config.is_encoder_decoder:
        raise ValueError(
            "Fp8Cache: config must be of a model without an encoder, as keys of an encoder are not cached, "
            f"got {type(config).__name__}"
        )
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "cross_attention_layers", None):
        raise ValueError(
            "Fp8Cache: config must be of a model without cross-attention layers, as it would read keys from "
            f"the cache itself, got {type(decoder).__name__}"
        )
    if decoder.model_type in WITHOUT_KEYS:
        raise ValueError(f"Fp8Cache: config must be of a model that caches keys and values, got {type(decoder).__name__}")
    if decoder.model_type in _OWN_CACHES:
        raise ValueError(
            f"Fp8Cache: config must be of a model that takes any cache of Transformers, got {type(decoder).__name__}, "
            "whose model takes only its own; fp8kv.calibrate finds its KVScales, which AttentionScales and engines use"
        )
    return decoder


@dataclass
class _Plan:
    """The storage of a layer in FP8.

    Args:
        window: number of tokens that a query sees, including itself; None: all.
        is_shared: whether other layers use its keys and values.
        num_states: recurrent states in addition to keys and values; None: the layer has none.
    """

    window: int | None
    is_shared: bool
    num_states: int | None


def _plans(config: PreTrainedConfig, skip_layers: Sequence[int | str]) -> list[_Plan | None]:
    """One per layer; None: it stays Transformers' own."""
    types = _layer_types(config)
    try:
        own = DynamicCache(config=config).layers
    except KeyError as error:
        raise ValueError(
            f"Fp8Cache: config must have layers that Transformers has a cache for, got layers of the type {error}"
        ) from None
    skipped = _skipped(skip_layers, types)
    plans = [None if index in skipped else _plan(config, types, index, layer) for index, layer in enumerate(own)]
    if not any(plans):
        raise ValueError(
            "Fp8Cache: config must be of a model with keys and values to store in FP8, "
            f"got {type(config).__name__} without such layers, or skip_layers with all of them"
        )
    return plans


def _plan(config: PreTrainedConfig, types: list[str], index: int, layer: Any) -> _Plan | None:
    if not isinstance(layer, CacheLayerMixin):
        return None
    if type(layer) not in _STORED_IN_FP8:
        raise ValueError(
            f"Fp8Cache: config must have layers whose keys and values can be FP8, got {types[index]!r} for "
            f"layer {index}; skip_layers=[{quoted(types[index])}] keeps such layers in 16 bits"
        )
    modes = getattr(config, "kv_sharing_modes", None)
    takers = "reuse" in modes if modes else getattr(config, "num_kv_shared_layers", 0)
    is_shared = bool(takers) and (not modes or modes[index] == "store")
    num_states = getattr(layer, "number_of_states", 1) if _STORED_IN_FP8[type(layer)] else None
    return _Plan(getattr(layer, "sliding_window", None), is_shared, num_states)


def _skipped(skip_layers: Sequence[int | str], types: list[str]) -> set[int]:
    """The layers selected by index or type."""
    if isinstance(skip_layers, (int, str)):
        skip_layers = [skip_layers]
    if not isinstance(skip_layers, Collection):
        raise ValueError(f"Fp8Cache: skip_layers must be a list of numbers and types, got {type(skip_layers).__name__}")
    skipped: set[int] = set()
    for one in skip_layers:
        named = {index for index, kind in enumerate(types) if one in (index, kind)}
        if not named:
            known = ", ".join(map(quoted, sorted(set(types))))
            raise ValueError(
                f"Fp8Cache: skip_layers must have numbers from 0 to {len(types) - 1} or the types {known}, got {one!r}"
            )
        skipped |= named
    return skipped


def _layer(
    options: LayerOptions,
    plan: _Plan,
    steps: Steps,
    progress: Progress,
    room: tuple[int, int | None] | None,
) -> Fp8Layer:
    """A layer of the matching class; the second of each kind also has recurrent states."""
    arguments: tuple[Any, ...] = (options, steps)
    classes: list[Any] = [layers.DynamicFp8Layer, layers.HybridDynamicFp8Layer]
    if room is not None:
        arguments = (options, progress, *room)
        classes = [layers.StaticFp8Layer, layers.HybridStaticFp8Layer]
        if plan.window is not None and plan.window < room[0]:
            classes = [layers.StaticWindowFp8Layer, layers.HybridStaticWindowFp8Layer]
    is_hybrid = plan.num_states is not None
    layer: Fp8Layer = classes[is_hybrid](*([plan.num_states] if is_hybrid else []), *arguments)
    return layer


def _other_bytes(layer: Any) -> int:
    """The bytes that Transformers keeps in a layer."""
    names = ("keys", "values", "conv_states", "recurrent_states", "indexer_keys")
    return sum(_bytes(getattr(layer, name, None)) for name in names)


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return value.nbytes if isinstance(value, Tensor) else 0


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return list(getattr(config, "layer_types", None) or map(_layer_type, _layer_configs(config)))


def _layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """One per layer: models may have layers of different sizes."""
    return getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers


def _layer_type(config: PreTrainedConfig) -> str:
    """For models that don't specify the types of their layers."""
    bounded = (kind for field, kind in _BOUNDED.items() if getattr(config, field, None))
    return next(bounded, "full_attention")


def _geometry(config: PreTrainedConfig) -> Geometry:
    """The geometry of what `update` will get: with latent attention one head, the latent as key and the RoPE part as value."""
    if getattr(config, "kv_lora_rank", None):
        return Geometry(1, config.kv_lora_rank, config.qk_rope_head_dim)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # Falcon
        return Geometry(1, head_size, head_size)
    v_head_size = getattr(config, "v_head_dim", None) or head_size
    return Geometry(getattr(config, "num_key_value_heads", None) or heads, head_size, v_head_size)


def _scales_of_layers(scales: Any, indices: Iterable[int]) -> dict[int, Any]:
    """The `scales` argument of `PagedKVCache`, for each of these layers."""
    if scales is None or (isinstance(scales, str) and scales == "dynamic"):
        return dict.fromkeys(indices, scales)
    if isinstance(scales, (str, Path)):
        scales = load_kv_scales(scales, query=False)
    if not isinstance(scales, KVScales):
        raise ValueError(
            f'Fp8Cache: scales must be None, "dynamic", KVScales or the folder of a checkpoint, got {type(scales).__name__}'
        )
    return {index: _layer_scales(scales, index) for index in indices}


def _layer_scales(scales: KVScales, index: int) -> LayerScales:
    """The scales of K and V, checked and copied to the host, for every new storage."""
    layer = scales[index] if index in scales else LayerScales(q=None, k=None, v=None)
    host = replace(mapped(layer, lambda x: x.to("cpu", copy=True)), q=None)
    for name, scale, offset in (("k", host.k, host.k_offset), ("v", host.v, host.v_offset)):
        if scale is None:
            raise ValueError(f"Fp8Cache: scales must be there for every layer, got no {name} for layer {index}")
        check_scale_values(f"Fp8Cache: scales of {name} in layer {index}", scale)
        if offset is not None:
            check_offset_values(f"Fp8Cache: {name}_offset of layer {index}", offset)
    return host


def _offsets_of_layers(offsets: dict[str, Mapping[int, Tensor] | None], scales: dict[int, Any]) -> dict[int, dict[str, Tensor]]:
    """The arguments of `PagedKVCache` of these names, for each layer."""
    found: dict[int, dict[str, Tensor]] = {index: {} for index in scales}
    for name, by_layer in offsets.items():
        if by_layer is None:
            continue
        if not isinstance(by_layer, Mapping):
            raise ValueError(
                f"Fp8Cache: {name} must be None or a mapping from layers to tensors, got {type(by_layer).__name__}"
            )
        for index, of_layer in scales.items():
            if getattr(of_layer, name, None) is not None:
                raise ValueError(f"Fp8Cache: {name} must be None, as scales have one, got both for layer {index}")
            if index not in by_layer:
                raise ValueError(f"Fp8Cache: {name} must be there for every layer, got none for layer {index}")
            if not isinstance(by_layer[index], Tensor):
                got = type(by_layer[index]).__name__
                raise ValueError(f"Fp8Cache: {name} of layer {index} must be a tensor, got {got}")
            found[index][name] = by_layer[index].detach().to("cpu", torch.float32, copy=True)
            check_offset_values(f"Fp8Cache: {name} of layer {index}", found[index][name])
    return found


def _format(dtype: str | None, scales: Any, index: int) -> str:
    """The format of a layer; FP8 scales are for E5M2 too, whose range is larger."""
    made_for = scales.dtype if isinstance(scales, LayerScales) else None
    if dtype is None or made_for is None:
        return dtype or made_for or DEFAULT_FORMAT.cache_names[0]
    ours, theirs = CACHE_DTYPES[dtype], CACHE_DTYPES[made_for]
    if ours != theirs and (ours, theirs) != (torch.float8_e5m2, DEFAULT_FORMAT.dtype):
        raise ValueError(
            f'Fp8Cache: dtype must be None or "{made_for}", as the scales of layer {index} were made for it, got "{dtype}"'
        )
    return dtype
