"""`Fp8Cache`: the cache as `generate` takes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from fp8kv._checks import LAYOUTS, check_choice, is_scale, quoted
from fp8kv._dtypes import CACHE_NAMES, QUANTIZED_CACHE_NAMES
from fp8kv.checkpoint import KVScales, LayerScales, load_kv_scales
from fp8kv.transformers.layers import DynamicFp8Layer, StaticFp8Layer, StaticWindowFp8Layer

#: Layer types, and the field of the config that bounds how far back such a layer looks.
_WINDOWS: dict[str, str | None] = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


class Fp8Cache(Cache):
    """A cache for Transformers that keeps keys and values in FP8, in a `fp8kv.PagedKVCache` for each layer.

    `update` quantizes the new tokens, stores them, and returns all tokens dequantized, the new ones too. The
    tensors that it returns are temporary: between steps only FP8 is alive.

    Without `max_cache_len` the cache is dynamic: it takes any number of sequences and grows with them, by at
    most one eighth and one block more than they need. With `max_cache_len` it is static: allocated once, at
    addresses that don't change, so that the forward pass can be compiled and captured.

    Args:
        config: of the model; its layers tell how far back each of them looks.
        scales: None: 1.0. A `fp8kv.KVScales`, as `fp8kv.load_kv_scales` and `fp8kv.calibrate` return it, or
            the folder of a checkpoint. "dynamic": one for each token and head, computed when it is stored.
        dtype: "fp8" or "fp8_e4m3", "fp8_e5m2", or the torch dtype.
        layout: "NHD" or "HND"; see `fp8kv.PagedKVCache`.
        block_size: tokens of a block.
        max_cache_len: static: tokens of a sequence, prompt and answer together.
        max_batch_size: static: sequences there is room for; None: those of the first call.
        device: static, with `max_batch_size`: allocates now, on this device. None: each layer allocates when
            it gets its first key, on the device of that key.

    Attributes:
        layers: of `fp8kv.transformers.layers`; ``layers[i].storage`` is the `fp8kv.PagedKVCache`.

    Raises:
        ValueError: an argument can't be used, scales are missing or don't fit, or the model has layers that
            keep other things than keys and values.

    Example:
        >>> import torch
        >>> from fp8kv.transformers import Fp8Cache
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
        >>> model = LlamaForCausalLM(config).eval()
        >>> cache = Fp8Cache(config, scales="dynamic")
        >>> ids = model.generate(torch.arange(1, 12)[None], max_new_tokens=5, past_key_values=cache)
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
        dtype: str | torch.dtype = "fp8",
        layout: str = "NHD",
        block_size: int = 16,
        max_cache_len: int | None = None,
        max_batch_size: int | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        _check_sizes(layout, block_size, max_cache_len, max_batch_size, device)
        config = _decoder_config(config)
        windows = _windows(config)
        options = {"dtype": _checked_dtype(dtype), "layout": layout, "block_size": block_size}
        layers: list[Any] = []
        for index, scale in enumerate(_scales_of_layers(scales, len(windows))):
            window, own = windows[index], options | {"scales": scale}
            if max_cache_len is None:
                layers.append(DynamicFp8Layer(index, own, window))
            elif window is None or window >= max_cache_len:
                sliding = window is not None
                layers.append(StaticFp8Layer(index, own, max_cache_len, max_batch_size, sliding))
            else:
                layers.append(StaticWindowFp8Layer(index, own, max_cache_len, max_batch_size, window))
        super().__init__(layers=layers)
        if device is not None:
            for layer, layer_config in zip(self.layers, _layer_configs(config), strict=True):
                heads, head_size = _geometry(layer_config)
                layer.allocate(max_batch_size, heads, head_size, torch.device(device))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers as they are allocated now, with the scales of single tokens.

        Example:
            >>> from transformers import LlamaConfig
            >>> from fp8kv.transformers import Fp8Cache
            >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
            >>> Fp8Cache(config, max_cache_len=64, max_batch_size=3, device="cpu").nbytes
            24576
        """
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes_16bit(self) -> int:
        """Bytes of the keys and values that Transformers' own 16-bit cache holds at the same point."""
        return sum(layer.nbytes_16bit for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens of all sequences: ``crop(-3)`` removes three.

        Raises:
            ValueError: there are not so many, or a layer with a window has forgotten the tokens before them:
                `activate_past_recording` keeps them. Nothing is removed then.
        """
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def __repr__(self) -> str:
        kinds = Counter(type(layer).__name__ for layer in self.layers)
        layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"Fp8Cache({layers}, {self.nbytes / 2**20:.4g} MiB)"


def _checked_dtype(dtype: str | torch.dtype) -> str:
    name = CACHE_NAMES.get(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in QUANTIZED_CACHE_NAMES:
        names = ", ".join(map(quoted, QUANTIZED_CACHE_NAMES))
        raise ValueError(f"Fp8Cache: dtype must be {names} or the torch dtype, got {dtype!r}")
    return name


def _check_sizes(
    layout: str, block_size: int, max_cache_len: int | None, max_batch_size: int | None, device: Any
) -> None:
    check_choice("Fp8Cache: layout", layout, LAYOUTS)
    sizes = {"block_size": block_size, "max_cache_len": max_cache_len, "max_batch_size": max_batch_size}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"Fp8Cache: {name} must be at least 1, got {size}")
    if max_batch_size is not None and max_cache_len is None:
        raise ValueError(
            "Fp8Cache: max_batch_size must be None without max_cache_len, as a dynamic cache grows, "
            f"got {max_batch_size}"
        )
    if device is not None and (max_cache_len is None or max_batch_size is None):
        raise ValueError(
            "Fp8Cache: device must be None without max_cache_len and max_batch_size, as each layer allocates "
            f"on the device of its first key, got {str(device)!r}"
        )


def _decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of it that describes the language model."""
    if config.is_encoder_decoder:
        raise ValueError(
            "Fp8Cache: config must be of a model without an encoder, as keys of an encoder are not cached, "
            f"got {type(config).__name__}"
        )
    return config.get_text_config(decoder=True)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """How many tokens a query of each layer sees, itself included; None: all."""
    configs = _layer_configs(config)
    types = getattr(config, "layer_types", None) or [_layer_type(layer) for layer in configs]
    for index, kind in enumerate(types):
        if kind not in _WINDOWS:
            raise ValueError(
                f"Fp8Cache: config must have layers of the types {', '.join(_WINDOWS)} only, "
                f"got {kind!r} for layer {index}"
            )
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or []):
        raise ValueError(
            "Fp8Cache: config must give every layer keys and values of its own, "
            f"got {type(config).__name__} with layers that share them"
        )
    fields = (_WINDOWS[kind] for kind in types)
    return [getattr(layer, field) if field else None for field, layer in zip(fields, configs, strict=True)]


def _layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """One for each layer: models may have layers of different sizes."""
    return getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers


def _layer_type(config: PreTrainedConfig) -> str:
    """For models that don't name the types of their layers."""
    bounded = (kind for kind, field in _WINDOWS.items() if field and getattr(config, field, None))
    return next(bounded, "full_attention")


def _geometry(config: PreTrainedConfig) -> tuple[int, int]:
    heads = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _scales_of_layers(scales: Any, num_layers: int) -> list[Any]:
    """What `PagedKVCache` takes, for each layer."""
    if scales is None or (isinstance(scales, str) and scales == "dynamic"):
        return [scales] * num_layers
    if isinstance(scales, (str, Path)):
        scales = load_kv_scales(scales, query=False)
    if not isinstance(scales, KVScales):
        raise ValueError(
            'Fp8Cache: scales must be None, "dynamic", KVScales or the folder of a checkpoint, '
            f"got {type(scales).__name__}"
        )
    return [_layer_scales(scales, index) for index in range(num_layers)]


def _layer_scales(scales: KVScales, index: int) -> LayerScales:
    """Those of K and V, checked and copied to the host, from where every new storage takes them."""
    layer = scales[index] if index in scales else LayerScales(q=None, k=None, v=None)
    copies = []
    for name, scale in (("k", layer.k), ("v", layer.v)):
        if scale is None:
            raise ValueError(
                f"Fp8Cache: scales must be there for every layer, got no {name} for layer {index}"
            )
        copies.append(scale.to("cpu", copy=True))
        if not all(map(is_scale, copies[-1].tolist())):
            raise ValueError(
                "Fp8Cache: scales must be finite and above 0, "
                f"got {scale.tolist()} for {name} of layer {index}"
            )
    return LayerScales(None, *copies)
