"""`KVCacheScheme`: what a checkpoint's config says about its KV cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

Strategy = Literal["tensor", "attn_head"]

#: Where ModelOpt writes what others put into config.json.
MODELOPT_FILE = "hf_quant_config.json"
#: Fields of config.json that hold the config of the language model of a larger one.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
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
    producer: str = "compressed-tensors"

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
        if isinstance(config, dict):
            configs = [config]
        elif isinstance(config, (str, Path)):
            configs = read_configs(Path(config))
        else:
            _refuse(f"config must be a dict or a path, got {type(config).__name__}")
        scheme = find_scheme(configs)
        if scheme is None:
            _refuse("the config must have a KV cache in FP8 (kv_cache_scheme), got none")
        return scheme


def read_configs(path: Path) -> list[dict[str, Any]]:
    """The contents of a config file; of a directory, config.json and, if there is one, ModelOpt's file.

    Raises:
        FileNotFoundError, ValueError: as `KVCacheScheme.from_config`.
    """
    if path.is_dir():
        beside = [path / MODELOPT_FILE] if (path / MODELOPT_FILE).exists() else []
        files = [path / "config.json", *beside]
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"KVCacheScheme.from_config: {file} must be a file, but is not there")
    return [_read_object(file) for file in files]


def find_scheme(configs: list[dict[str, Any]]) -> KVCacheScheme | None:
    """That of the first config that has one; None if the KV cache is not quantized.

    Raises:
        ValueError: a scheme is not supported.
    """
    schemes = (_scheme(_quantization(config)) for config in configs)
    return next((scheme for scheme in schemes if scheme is not None), None)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        _refuse(f"{file} must be JSON, got: {error}")
    if not isinstance(contents, dict):
        _refuse(f"{file} must hold an object, got {type(contents).__name__}")
    return contents


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
    return str(quantization.get("quant_method") or name or "compressed-tensors")


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
            _refuse(f'{name}.strategy must be that of {first}, "{strategy}", got "{other}"')
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
        _refuse(f"{name} must be an object, got {type(scheme).__name__}")
    kind = scheme.get("type")
    expected = {
        "num_bits": (8, scheme.get("num_bits", 8)),
        "type": ("float", kind.lower() if isinstance(kind, str) else kind),
        "symmetric": (True, scheme.get("symmetric", True)),
        "dynamic": (False, scheme.get("dynamic", False)),
    }
    for field, (value, actual) in expected.items():
        if actual != value:
            _refuse(f"{name}.{field} must be {_json(value)}, got {_json(actual)}")
    strategy = scheme.get("strategy")
    if strategy is None:
        strategy = "tensor" if scheme.get("group_size") is None else "group"
    for supported in get_args(Strategy):
        if strategy == supported:
            return supported  # type: ignore[no-any-return]
    _refuse(f'{name}.strategy must be "tensor" or "attn_head", got {_json(strategy)}')


def _of_name(field: str, value: Any, supported: str, producer: str) -> KVCacheScheme:
    """ModelOpt and AutoFP8: one word instead of a scheme."""
    if str(value).lower() != supported.lower():
        _refuse(f"{field} must be {_json(supported)}, got {_json(value)}")
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
        _refuse("layer_quant_config must have the layers of kv_cache_group with output_tensors, got none")
    for name, scheme in schemes.items():
        _check_quark(name, scheme)
    return KVCacheScheme("tensor", producer="quark") if schemes else None


def _check_quark(name: str, scheme: Any) -> None:
    if not isinstance(scheme, dict):
        _refuse(f"{name} must be an object, got {type(scheme).__name__}")
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
            _refuse(f"{name}.{field} must be {_json(value)}, got {_json(actual)}")


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"KVCacheScheme.from_config: {what}")
