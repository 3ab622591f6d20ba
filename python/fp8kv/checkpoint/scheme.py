"""`KVCacheScheme`: what a checkpoint's config says about its KV cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from fp8kv._checks import Strategy as Strategy
from fp8kv.checkpoint._read.config import NESTED, read_configs

#: The `quant_method` of llm-compressor, and of this package.
COMPRESSED_TENSORS = "compressed-tensors"

_CALLER = "KVCacheScheme.from_config"
#: Fields that only a `quantization_config` has.
_MARKS = ("quant_method", "kv_cache_scheme", "config_groups", "kv_cache_quant_algo", "quantization_status")


@dataclass(frozen=True)
class KVCacheScheme:
    """The `quantization_config` of a checkpoint, as far as the KV cache is concerned.

    Attributes:
        strategy: "tensor" or "attn_head": one scale per tensor or per attention head.
        quantizes_query: whether queries have scales too.
        observer: how the scales were found, such as "static_minmax"; None if the config does not say.
        producer: the `quant_method`, such as "compressed-tensors".

    Example:
        >>> from fp8kv import KVCacheScheme
        >>> KVCacheScheme.from_config({"quantization_config": {
        ...     "quant_method": "compressed-tensors",
        ...     "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}})
        KVCacheScheme(strategy='attn_head', quantizes_query=False, observer=None,
                      producer='compressed-tensors')
    """

    strategy: Strategy
    quantizes_query: bool = False
    observer: str | None = None
    producer: str = COMPRESSED_TENSORS

    @classmethod
    def from_config(cls, config: dict[str, Any] | str | Path) -> KVCacheScheme:
        """Reads the config of compressed-tensors, ModelOpt, AutoFP8 or Quark; see docs/checkpoints.md.

        Args:
            config: a whole config.json, its `quantization_config` (in older checkpoints
                `compression_config`), a hf_quant_config.json, or the path of such a file or of a checkpoint
                directory.

        Returns:
            The scheme. An attention group without `kv_cache_scheme` counts as the scheme of K and V too.

        Raises:
            FileNotFoundError: there is no such file, or no config.json in the directory.
            ValueError: the KV cache is not quantized, or in a way that is not supported, or the file is not
                JSON.

        Example:
            >>> from fp8kv import KVCacheScheme
            >>> KVCacheScheme.from_config({"kv_cache_scheme": {"num_bits": 4, "type": "float"}})
            Traceback (most recent call last):
            ...
            ValueError: KVCacheScheme.from_config: kv_cache_scheme.num_bits must be 8, got 4
        """
        if not isinstance(config, (dict, str, Path)):
            raise ValueError(f"{_CALLER}: config must be a dict or a path, got {type(config).__name__}")
        try:
            scheme = find_scheme([config] if isinstance(config, dict) else read_configs(Path(config)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_CALLER}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{_CALLER}: {error}") from None
        if scheme is None:
            raise ValueError(f"{_CALLER}: the config must have a KV cache in FP8 (kv_cache_scheme), got none")
        return scheme


def find_scheme(configs: list[dict[str, Any]]) -> KVCacheScheme | None:
    """That of the first config that has one; None if the KV cache is not quantized.

    Raises:
        ValueError: a scheme is not supported.
    """
    schemes = (_scheme(_quantization(config)) for config in configs)
    return next((scheme for scheme in schemes if scheme is not None), None)


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config`, wherever it is; empty if there is none."""
    for name in ("quantization_config", "compression_config"):
        if isinstance(config.get(name), dict):
            return _quantization(config[name])
    if isinstance(config.get("quantization"), dict):
        return {**config, **config["quantization"]}
    if any(name in config for name in _MARKS):
        return config
    nested = (_quantization(config[name]) for name in NESTED if isinstance(config.get(name), dict))
    return next((found for found in nested if found), {})


def _scheme(quantization: dict[str, Any]) -> KVCacheScheme | None:
    producer = _producer(quantization)
    if producer == "quark":
        return _of_quark(quantization)
    scheme = quantization.get("kv_cache_scheme")
    if isinstance(scheme, str):
        return _of_name("kv_cache_scheme", scheme, "static", producer)
    algorithm = quantization.get("kv_cache_quant_algo")
    if scheme is None and algorithm is not None:
        return _of_name("kv_cache_quant_algo", algorithm, "FP8", producer)
    return _of_compressed_tensors(quantization, producer)


def _producer(quantization: dict[str, Any]) -> str:
    producer = quantization.get("producer")
    name = producer.get("name") if isinstance(producer, dict) else None
    return str(quantization.get("quant_method") or name or COMPRESSED_TENSORS)


def _of_compressed_tensors(quantization: dict[str, Any], producer: str) -> KVCacheScheme | None:
    """`kv_cache_scheme`, and the groups whose targets are attention layers: those quantize queries too."""
    schemes = {}
    if quantization.get("kv_cache_scheme") is not None:
        schemes["kv_cache_scheme"] = quantization["kv_cache_scheme"]
    groups = dict(_attention_groups(quantization))
    schemes |= groups
    if not schemes:
        return None
    strategies = {name: _checked_strategy(name, scheme) for name, scheme in schemes.items()}
    (first, strategy), *others = strategies.items()
    for name, other in others:
        if other != strategy:
            raise ValueError(f'{name}.strategy must be that of {first}, "{strategy}", got "{other}"')
    observers = [scheme["observer"] for scheme in schemes.values() if scheme.get("observer") is not None]
    observer = str(observers[0]) if observers else None
    return KVCacheScheme(strategy, bool(groups), observer, producer)


def _attention_groups(quantization: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    groups = quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict) or group.get("weights") is not None:
            continue
        targets = group.get("targets")
        attention = any(map(_is_attention, targets if isinstance(targets, list) else [targets]))
        if attention and group.get("input_activations") is not None:
            yield f"config_groups.{name}.input_activations", group["input_activations"]


def _is_attention(target: Any) -> bool:
    """Whether a class ("LlamaAttention") or a regex ("re:.*self_attn$") means whole attention layers."""
    target = str(target).lower()
    return ("attention" in target or "attn" in target) and "proj" not in target


def _checked_strategy(name: str, scheme: Any) -> Strategy:
    if not isinstance(scheme, dict):
        raise ValueError(f"{name} must be an object, got {type(scheme).__name__}")
    kind = scheme.get("type")
    expected = {
        "num_bits": (8, scheme.get("num_bits", 8)),
        "type": ("float", kind.lower() if isinstance(kind, str) else kind),
        "symmetric": (True, scheme.get("symmetric", True)),
        "dynamic": (False, scheme.get("dynamic", False)),
    }
    for field, (value, actual) in expected.items():
        if actual != value:
            raise ValueError(f"{name}.{field} must be {_json(value)}, got {_json(actual)}")
    strategy = scheme.get("strategy")
    if strategy is None:
        strategy = "tensor" if scheme.get("group_size") is None else "group"
    for supported in get_args(Strategy):
        if strategy == supported:
            return supported  # type: ignore[no-any-return]
    raise ValueError(f'{name}.strategy must be "tensor" or "attn_head", got {_json(strategy)}')


def _of_name(field: str, value: Any, supported: str, producer: str) -> KVCacheScheme:
    """ModelOpt and AutoFP8: one word instead of a scheme."""
    if str(value).lower() != supported.lower():
        raise ValueError(f"{field} must be {_json(supported)}, got {_json(value)}")
    return KVCacheScheme("tensor", producer=producer)


def _of_quark(quantization: dict[str, Any]) -> KVCacheScheme | None:
    """Quark quantizes the outputs of the layers that `kv_cache_group` names, such as "*k_proj"."""
    export = quantization.get("export")
    group = export.get("kv_cache_group") if isinstance(export, dict) else None
    patterns = group or quantization.get("kv_cache_group")
    patterns = [str(pattern) for pattern in patterns] if isinstance(patterns, list) else []
    schemes = {}
    for field in ("kv_cache_quant_config", "layer_quant_config"):
        layers = quantization.get(field)
        for name, layer in layers.items() if isinstance(layers, dict) else ():
            in_group = field == "kv_cache_quant_config" or any(fnmatchcase(name, x) for x in patterns)
            outputs = layer.get("output_tensors") if isinstance(layer, dict) else None
            if in_group and outputs is not None:
                schemes[f"{field}.{name}.output_tensors"] = outputs
    if patterns and not schemes:
        raise ValueError(
            "layer_quant_config must have the layers of kv_cache_group with output_tensors, got none"
        )
    for name, scheme in schemes.items():
        _check_quark(name, scheme)
    return KVCacheScheme("tensor", producer="quark") if schemes else None


def _check_quark(name: str, scheme: Any) -> None:
    if not isinstance(scheme, dict):
        raise ValueError(f"{name} must be an object, got {type(scheme).__name__}")
    # An unknown `symmetric` is null there.
    symmetric = scheme.get("symmetric") is not False
    expected = {
        "dtype": ("fp8_e4m3", scheme.get("dtype")),
        "qscheme": ("per_tensor", scheme.get("qscheme")),
        "is_dynamic": (False, bool(scheme.get("is_dynamic"))),
        "symmetric": (True, symmetric),
    }
    for field, (value, actual) in expected.items():
        if actual != value:
            raise ValueError(f"{name}.{field} must be {_json(value)}, got {_json(actual)}")


def _json(value: Any) -> str:
    return json.dumps(value, default=str)
