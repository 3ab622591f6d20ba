"""Reading config.json and similar files, and the part that concerns each model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
#: ModelOpt's file for what other producers write to config.json.
MODELOPT_FILE = "hf_quant_config.json"
#: Mistral's own format, which has no config.json.
MISTRAL_FILE = "params.json"
#: Fields that hold the config of the language model of a larger one.
NESTED = (
    "text_config", "llm_config", "language_config", "language_model_config", "lm_config", "thinker_config",
    "decoder_config", "decoder",
)  # fmt: skip
#: Fields with the number of layers; a config that has one is that of a model.
LAYERS = (
    "decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers",
    "num_transformer_layers",
)  # fmt: skip

#: Configs and files of scales have 10 at most; what reads them calls itself for each.
_DEEPEST = 100


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """The contents of a config file; for a directory, of config.json and, if present, ModelOpt's file.

    Returns:
        By file name, config.json first; Mistral's params.json is read if there is no config.json.

    Raises:
        FileNotFoundError: there is no such file, or no config.json in the directory.
        ValueError: a file is not JSON, or not an object.
    """
    files = [path]
    if path.is_dir():
        files = [path / CONFIG_FILE]
        if not files[0].exists() and (path / MISTRAL_FILE).is_file():
            files = [path / MISTRAL_FILE]
        if (path / MODELOPT_FILE).exists():
            files.append(path / MODELOPT_FILE)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} must be a file, but does not exist")
    return {file.name: read_object(file) for file in files}


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not an object, or nested too deep.
    """
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, got: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} must hold an object, got {type(contents).__name__}")
    check_depth(contents, str(file))
    return contents


def check_depth(contents: Any, name: str) -> None:
    """A `ValueError`, which starts with the name, if objects and lists are nested deeper than those of any config."""
    level = [contents]
    for _ in range(_DEEPEST + 1):
        level = [x for x in level if isinstance(x, (dict, list))]
        if not level:
            return
        level = [value for x in level for value in (x.values() if isinstance(x, dict) else x)]
    raise ValueError(f"{name} must have at most {_DEEPEST} objects and lists in each other, got more")


# Models


def section_of_model(config: Mapping[str, Any], model: str = "", *, side: bool = False) -> Mapping[str, Any]:
    """The part of a config about one of its models; empty if a side model is not mentioned.

    Args:
        config: a whole config.json.
        model: as named by `names.model_of_stack`; "" for the language model.
        side: the config describes another model, except for a part of it.
    """
    section = config
    for part in filter(None, model.split(".")):
        own = next((section[name] for name in _sections(part) if isinstance(section.get(name), dict)), None)
        section = section if own is None else own
    return {} if side and section is config else _language_model(section)


def _sections(part: str) -> tuple[str, ...]:
    stem = part.removesuffix("_model").removesuffix("_tower")
    return f"{part}_config", f"{stem}_config", part


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a multimodal config that concerns the language model."""
    if first_of(config, LAYERS) is not None:
        return config
    nested = (_language_model(config[name]) for name in NESTED if isinstance(config.get(name), dict))
    return next((found for found in nested if first_of(found, LAYERS) is not None), config)


# Fields


def field_of(config: Mapping[str, Any], path: str) -> Any:
    """A field, or a nested one, such as "attn.layers"; None if absent."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def first_of(config: Mapping[str, Any], paths: tuple[str, ...]) -> Any:
    """The first field that is present."""
    return next((value for path in paths if (value := field_of(config, path)) is not None), None)


def positive(value: Any) -> int | None:
    """A positive integer; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
