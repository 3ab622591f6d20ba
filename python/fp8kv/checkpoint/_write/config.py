"""Writes llm-compressor's `quantization_config` into a model's config.json."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from fp8kv.checkpoint._read.config import NESTED
from fp8kv.checkpoint._read.quantization import regex_of
from fp8kv.checkpoint.scheme import COMPRESSED_TENSORS, KVCacheScheme

#: The version of compressed-tensors whose fields are written.
_VERSION = "0.19.0"
#: Names of the field; the second is the older one.
_KEYS = ("quantization_config", "compression_config")


def config_with_scales(
    config: dict[str, Any], scheme: KVCacheScheme, *, query: bool, attention_modules: Collection[str]
) -> dict[str, Any]:
    """A copy of `config` that describes how the KV cache, and with `query` the queries, are quantized.

    The description of weights quantized by compressed-tensors is kept; the description of attention is
    replaced.

    Args:
        config: of the model.
        scheme: its strategy and observer are written.
        query: whether there are query scales.
        attention_modules: names of the model's attention modules, such as "model.layers.0.self_attn".

    Raises:
        ValueError: `config` belongs to a checkpoint quantized with a method other than compressed-tensors, or
            excludes the attention modules from quantization although there are query scales.
    """
    old = _quantization(config)
    arguments = _arguments(scheme)
    groups: dict[str, Any] = {}
    for name, group in (old.get("config_groups") or {}).items():
        kept = _without_attention(group, attention_modules)
        if kept is not None:
            groups[name] = kept
    if query:
        for pattern in old.get("ignore") or []:
            if any(_matches(pattern, module) for module in attention_modules):
                raise ValueError(
                    "KVScales.save: scales must not have query scales when the source's quantization_config "
                    f"ignores attention modules, got {pattern!r} in its ignore list"
                )
        number = next(n for n in range(len(groups) + 1) if f"group_{n}" not in groups)
        groups[f"group_{number}"] = {
            "format": "dense",
            "input_activations": arguments,
            "output_activations": None,
            "targets": [_attention_target(config, attention_modules)],
            "weights": None,
        }
    new: dict[str, Any] = {
        "config_groups": groups,
        "format": "dense",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": arguments,
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }
    new |= {key: value for key, value in old.items() if key not in ("config_groups", "kv_cache_scheme")}
    new["quant_method"] = COMPRESSED_TENSORS
    return {**without_quantization(config), "quantization_config": new}


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config without quantization."""
    return {key: value for key, value in config.items() if key not in _KEYS}


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a config, {} if there is none.

    Raises:
        ValueError: it is not from compressed-tensors, or is nested in the config.
    """
    for name in NESTED:
        if isinstance(config.get(name), dict) and any(config[name].get(key) for key in _KEYS):
            raise ValueError(f"KVScales.save: source must have its quantization_config outside of {name} in config.json")
    for key in _KEYS:
        found = config.get(key)
        if found and not isinstance(found, dict):
            raise ValueError(f"KVScales.save: source must have an object as {key} in config.json, got {type(found).__name__}")
        if found:
            method = found.get("quant_method") or COMPRESSED_TENSORS
            if method != COMPRESSED_TENSORS:
                raise ValueError(
                    "KVScales.save: source must be a checkpoint without quantization, or one quantized with "
                    f"compressed-tensors, got quant_method {method!r}"
                )
            return dict(found)
    return {}


def _arguments(scheme: KVCacheScheme) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": scheme.observer,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": scheme.strategy,
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }


def _without_attention(group: Any, attention_modules: Collection[str]) -> Any:
    """A config group without the targets that are attention modules; None if nothing is left."""
    if not isinstance(group, dict) or group.get("weights") is not None:
        return group  # a preset, or a group of linear layers
    targets = [
        target
        for target in group.get("targets") or []
        if not (target.endswith("Attention") or any(_matches(target, module) for module in attention_modules))
    ]
    return {**group, "targets": targets} if targets else None


def _matches(target: str, module: str) -> bool:
    """Matches a target with the name of a module, as compressed-tensors does."""
    if target.startswith("re:"):
        regex = regex_of(target)
        return regex is not None and regex.match(module) is not None
    return target == module


def _attention_target(config: dict[str, Any], attention_modules: Collection[str]) -> str:
    """The class of the attention modules if transformers has it under the usual name, or else a pattern."""
    architecture = next(iter(config.get("architectures") or []), "")
    name = architecture.partition("For")[0] + "Attention"
    try:
        import transformers

        if hasattr(sys.modules[getattr(transformers, architecture).__module__], name):
            return name
    except Exception:
        # Not installed, an architecture it doesn't have, or one whose own dependencies are missing.
        pass
    last = {module.rpartition(".")[2] for module in attention_modules}
    return rf"re:.*\.({'|'.join(sorted(last))})$" if len(last) > 1 else f"re:.*{last.pop()}$"
