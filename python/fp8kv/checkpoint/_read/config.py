"""config.json: how it is read, and what it says of the attention layers and heads of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
#: Where ModelOpt writes what others put into config.json.
MODELOPT_FILE = "hf_quant_config.json"
#: Fields that hold the config of the language model of a larger one.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_query_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
#: Types of layers without keys and values.
_NO_ATTENTION = {"linear_attention", "mamba", "mamba2", "conv", "moe", "mlp", "recurrent", "linear"}


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer; None: the config does not say."""

    query: int | None = None
    kv: int | None = None


def read_configs(path: Path) -> list[dict[str, Any]]:
    """The contents of a config file; of a directory, config.json and, if there is one, ModelOpt's file.

    Raises:
        FileNotFoundError: there is no such file, or no config.json in the directory.
        ValueError: a file is not JSON, or not an object.
    """
    files = [path]
    if path.is_dir():
        files = [path / CONFIG_FILE]
        if (path / MODELOPT_FILE).exists():
            files.append(path / MODELOPT_FILE)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} must be a file, but is not there")
    return [_read_object(file) for file in files]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, got: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} must hold an object, got {type(contents).__name__}")
    return contents


# Layers and heads


def heads_of_layers(config: dict[str, Any]) -> dict[int, Heads] | None:
    """The attention layers that have keys and values of their own; None if the config names no layers."""
    config = _language_model(config)
    types = _types(config)
    num_layers = _number(_first(config, _LAYERS)) or len(types or ())
    if num_layers == 0:
        return None
    # The last ones use the keys and values of earlier layers.
    shared = _number(config.get("num_kv_shared_layers"), 0) or 0
    own = range(max(0, num_layers - shared))
    types = types if types is not None else _types_from_rules(config, num_layers)
    with_attention = [n for n in own if n >= len(types) or types[n] not in _NO_ATTENTION]
    return {n: _heads(config, n) for n in with_attention if _block_has_attention(config, n)}


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal config that concerns the language model."""
    if _first(config, _LAYERS) is not None:
        return config
    nested = (_language_model(config[name]) for name in NESTED if isinstance(config.get(name), dict))
    return next((found for found in nested if _first(found, _LAYERS) is not None), config)


def _types(config: dict[str, Any]) -> list[str] | None:
    """The types of all layers, where the config lists them."""
    for name in ("layer_types", "layers_block_type"):
        if isinstance(config.get(name), list):
            return [str(kind) for kind in config[name]]
    pattern = config.get("hybrid_override_pattern")  # NemotronH
    if isinstance(pattern, str):
        return ["attention" if mark == "*" else "mamba" for mark in pattern]
    marks = config.get("attn_type_list")  # MiniMax
    if isinstance(marks, list):
        return ["attention" if mark == 1 else "linear" for mark in marks]
    return None


def _types_from_rules(config: dict[str, Any], num_layers: int) -> list[str]:
    """The same, where the config has a rule for them; empty if it has none."""
    indices = config.get("attn_layer_indices", config.get("full_attn_idxs"))  # Bamba, LFM2
    period, offset = _number(config.get("attn_layer_period")), config.get("attn_layer_offset", 0)  # Jamba
    interval = _number(config.get("full_attention_interval"))  # Qwen3-Next
    if isinstance(indices, list):
        attention = [n for n in range(num_layers) if n in indices]
    elif period is not None and isinstance(offset, int):
        attention = [n for n in range(num_layers) if n % period == offset]
    elif interval is not None:
        attention = [n for n in range(num_layers) if (n + 1) % interval == 0]
    elif isinstance(config.get("block_types"), list):  # RecurrentGemma
        pattern = [str(kind) for kind in config["block_types"]]
        return (pattern * num_layers)[:num_layers]
    else:
        return []
    return ["attention" if n in attention else "linear" for n in range(num_layers)]


def _block_has_attention(config: dict[str, Any], layer: int) -> bool:
    attention = _block(config, layer)
    return not (attention.get("no_op") or attention.get("replace_with_linear"))


def _block(config: dict[str, Any], layer: int) -> dict[str, Any]:
    """DeciLM has a config for each layer."""
    blocks = config.get("block_configs")
    block = blocks[layer] if isinstance(blocks, list) and layer < len(blocks) else None
    attention = block.get("attention") if isinstance(block, dict) else None
    return attention if isinstance(attention, dict) else {}


def _heads(config: dict[str, Any], layer: int) -> Heads:
    query = _of_layer(_first(config, _HEADS), layer)
    block = _block(config, layer)
    group = _number(block.get("n_heads_in_group"))
    if config.get("kv_lora_rank") is not None:
        # Latent attention caches no heads.
        kv = None
    elif config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv = 1  # Falcon has num_kv_heads besides, with another meaning.
    elif group is not None:
        kv = None if query is None else query // group
    else:
        candidates = (*_kv_counts(config, layer), block.get("num_key_value_heads"))
        given = [count for count in candidates if count is not None]
        kv = _of_layer(given[-1], layer) if given else query
    return Heads(query, kv)


def _kv_counts(config: dict[str, Any], layer: int) -> Iterator[Any]:
    """What the config says for all layers, and after it what holds for this one instead."""
    yield _first(config, _KV_HEADS)
    types = _types(config) or []
    if config.get("attention_k_eq_v") and types[layer : layer + 1] == ["full_attention"]:  # Gemma 4
        yield config.get("num_global_key_value_heads")


def _of_layer(counts: Any, layer: int) -> int | None:
    """One number for all layers, or a list of them."""
    if isinstance(counts, list):
        counts = counts[layer] if layer < len(counts) else None
    return _number(counts)


def _first(config: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _number(value: Any, least: int = 1) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else None
