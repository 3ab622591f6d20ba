"""`KVCacheScheme`: the description of the KV cache in a checkpoint's config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8kv._checks import Strategy as Strategy
from fp8kv.checkpoint._read.config import CONFIG_FILE, check_depth, read_configs
from fp8kv.checkpoint._read.quantization import COMPRESSED_TENSORS as COMPRESSED_TENSORS
from fp8kv.checkpoint._read.quantization import Statement, contradicts, read_statements

_CALLER = "KVCacheScheme.from_config"


@dataclass(frozen=True)
class KVCacheScheme:
    """The part of a checkpoint's `quantization_config` about the KV cache.

    Attributes:
        strategy: "tensor" or "attn_head": one scale per tensor or per attention head.
        quantizes_query: whether queries have scales too.
        observer: how the scales were found, such as "static_minmax"; None if the config does not specify it.
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
            The scheme. An attention group without `kv_cache_scheme` is also the scheme of K and V, and a
            cache with some layers in FP8 counts as an FP8 cache.

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
            if isinstance(config, dict):
                check_depth(config, "config")
            configs = {"": config} if isinstance(config, dict) else read_configs(Path(config))
            statement = declared(configs).statement
            if statement is not None and not statement.has_fp8:
                raise ValueError(statement.said)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_CALLER}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{_CALLER}: {error}") from None
        if statement is None:
            raise ValueError(f"{_CALLER}: the config must have a KV cache in FP8 (kv_cache_scheme), got none")
        return scheme_of(statement)


@dataclass(frozen=True)
class Declared:
    """The descriptions of the KV cache in all configs of a checkpoint.

    Attributes:
        statement: of the first config that quantizes it; None if none does.
        contradictions: a sentence for each pair that does not agree.
    """

    statement: Statement | None = None
    contradictions: list[str] = field(default_factory=list)


def declared(configs: Mapping[str, Mapping[str, Any]]) -> Declared:
    """Combines configs, by the names of their files.

    Raises:
        ValueError: a scheme is not supported.
    """
    found = [(name, one) for name, config in configs.items() for one in _statements(name, config)]
    first = next(((name, one) for name, one in found if one.is_quantized), None)
    if first is None:
        return Declared()
    pairs = ((first, other) for other in found if other is not first)
    return Declared(first[1], [_contradiction(*one, *two) for one, two in pairs if contradicts(one[1], two[1])])


def _statements(name: str, config: Mapping[str, Any]) -> list[Statement]:
    try:
        return read_statements(config)
    except ValueError as error:
        where = "" if name in ("", CONFIG_FILE) else f" in {name}"
        raise ValueError(f"{error}{where}") from None


def scheme_of(statement: Statement) -> KVCacheScheme:
    """The part of a statement about all layers; "tensor" if no strategy is specified."""
    return KVCacheScheme(statement.strategy or "tensor", statement.quantizes_query, statement.observer, statement.producer)


def _contradiction(name: str, one: Statement, other_name: str, other: Statement) -> str:
    places = [f"{field} in {file or 'the config'}" for file, field in ((name, one.field), (other_name, other.field))]
    return f"{places[0]} must say the same as {places[1]}, got {_text(one)} and {_text(other)}"


def _text(statement: Statement) -> str:
    """As in "FP8", "FP8 per attn_head" or "FP8 for K, NVFP4 for V"."""
    if statement.by_layer:
        return "a map " + ", ".join(f"{name}: {_both(x)}" for name, x in list(statement.by_layer.items())[:3])
    strategy = f" per {statement.strategy}" if statement.strategy else ""
    return _both(statement.formats) + strategy


def _both(formats: Iterable[str]) -> str:
    k, v = formats
    return k if k == v else f"{k} for K and {v} for V"
