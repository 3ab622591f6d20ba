"""The attention tensors of a checkpoint, by model."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fp8kv._checks import listed
from fp8kv.checkpoint._read.config import LAYERS, first_of, positive
from fp8kv.checkpoint._read.files import find_files
from fp8kv.checkpoint._read.layers import Attention
from fp8kv.checkpoint._read.safetensors import StoredTensor, read_header
from fp8kv.checkpoint.names import (
    Place,
    bias_at,
    find_place,
    is_cross,
    is_side_model,
    is_tower,
    looks_like_scale,
    model_of_stack,
    scale_at,
    unwrapped,
)
from fp8kv.checkpoint.problems import Problem, make_problem


class Key(NamedTuple):
    """The role of a tensor in a layer: `letter` is "q", "k" or "v", `kind` "scale" or "zero_point"."""

    layer: int
    letter: str
    kind: str


class Entry(NamedTuple):
    """A tensor in a file, with its name there."""

    name: str
    stored: StoredTensor


class Unknown(NamedTuple):
    """A tensor that looks like an attention scale; None: it is not in a numbered layer."""

    name: str
    layer: int | None


@dataclass
class ModelTensors:
    """The attention of one model.

    Attributes:
        stack: the prefix before the layer number, such as "model.layers.".
        entries: the scales and zero points; several tensors if they define the same one, and `kv_scale`
            listed for K and for V.
        biases: of ModelOpt's affine cache, by layer and letter.
        attention: the attention modules by layer.
        unknown: tensors that look like scales but have no known name.
        present: the layers with any tensor.
    """

    stack: str
    entries: dict[Key, list[Entry]] = field(default_factory=dict)
    biases: dict[tuple[int, str], Entry] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    unknown: list[Unknown] = field(default_factory=list)
    present: set[int] = field(default_factory=set)

    @property
    def is_tower(self) -> bool:
        """Whether the model has no KV cache."""
        return is_tower(self.stack)

    @property
    def is_side(self) -> bool:
        """Whether it is not the language model."""
        return is_side_model(self.stack)

    def scales(self) -> Iterator[Entry]:
        """All scales and zero points."""
        for copies in self.entries.values():
            yield from copies

    @property
    def layers_with_scales(self) -> set[int]:
        """The layers with a scale of K or V."""
        return {key.layer for key in self.entries if key.kind == "scale" and key.letter != "q"}


#: By name from `names.model_of_stack`; attention to another model has its module's name appended.
Models = dict[str, ModelTensors]


#: Scales that are not those of weights, although they are next to some.
_OF_OUTPUT = re.compile(r"(?:output|cache|(?:^|[._])[qkv]|(?:^|[._])kv)_[^.]*$|output_quantizer\._amax$")
#: A file of TensorRT-LLM, and the number of a layer in it.
_RANK_FILE = re.compile(r"rank(\d{1,5})\.safetensors")
_LAYER_NUMBER = re.compile(r"(?<=layers\.)\d{1,4}(?=\.)")


def take_inventory(checkpoint: Path, config: Mapping[str, Any]) -> tuple[Models, list[Problem]]:
    """The attention of all models, from the headers of a .safetensors file or of all in a directory.

    Args:
        checkpoint: the file or directory.
        config: that of the checkpoint, which says how TensorRT-LLM has distributed the layers over files.
    """
    files, problems = find_files(checkpoint)
    named: dict[str, list[StoredTensor]] = defaultdict(list)
    for file, names in files.items():
        first = _first_layer(file, config)
        for name, stored in _read_header(file, names, problems).items():
            named[_renumbered(name, first)].append(stored)
    return sort_tensors(named), problems


def _renumbered(name: str, first: int) -> str:
    """The name of a tensor if the layer with the number 0 in it is `first`."""
    return _LAYER_NUMBER.sub(lambda match: str(first + int(match[0])), name, count=1) if first else name


def _first_layer(file: Path, config: Mapping[str, Any]) -> int:
    """The layer that has the number 0 in a file: each stage of TensorRT-LLM's pipelines counts its own layers.

    The first stages have one layer more than the last ones if there are not equally many for all.
    """
    mapping, match = config.get("mapping"), _RANK_FILE.fullmatch(file.name)
    num_layers = positive(first_of(config, LAYERS))
    if match is None or num_layers is None or not isinstance(mapping, dict):
        return 0
    stages, *inner = (positive(mapping.get(f"{kind}_size")) or 1 for kind in ("pp", "tp", "cp"))
    stage = int(match[1]) // math.prod(inner)
    return stage * (num_layers // stages) + min(stage, num_layers % stages)


def sort_tensors(named: Mapping[str, list[StoredTensor]]) -> Models:
    """Tensors of all kinds, by the model whose attention they belong to."""
    models: Models = {}
    # Most tensors belong to experts, and are skipped.
    for name in sorted(name for name in named if find_place(name) or looks_like_scale(name)):
        place = find_place(name)
        scale = None if place is None else scale_at(place)
        if place is not None:
            tensors = models.setdefault(_model_of(place), ModelTensors(place.stack))
            module = unwrapped(name).removesuffix(f".{place.rest}")
            attention = tensors.attention.setdefault(place.layer, Attention(module))
            if scale is None:
                attention.shapes[place.rest] = named[name][0].shape
                letter = bias_at(place)
                if letter is not None:
                    tensors.biases[place.layer, letter] = Entry(name, named[name][0])
        if scale is not None:
            entries = [Entry(name, stored) for stored in named[name]]
            for letter in scale.letters:
                tensors.entries.setdefault(Key(scale.layer, letter, scale.kind), []).extend(entries)
        elif looks_like_scale(name) and (_OF_OUTPUT.search(name) or f"{name.rpartition('.')[0]}.weight" not in named):
            _add_unknown(models, name, place)
    models = _with_cross_layers(models)
    for tensors in models.values():
        tensors.entries = dict(sorted(tensors.entries.items()))
        number = re.compile(rf"{re.escape(tensors.stack)}(\d{{1,4}})\.")
        found = (number.match(name) for name in map(unwrapped, named) if name.startswith(tensors.stack))
        tensors.present = {int(match[1]) for match in found if match}
    return models


def _model_of(place: Place) -> str:
    model = model_of_stack(place.stack)
    if place.stack.endswith("midlayer."):
        return model
    return f"{model}.{place.module}".removeprefix(".") if is_cross(place.module) else model


def _add_unknown(models: Models, name: str, place: Place | None) -> None:
    """Adds a name without a known form to a model, by its location or its prefix."""
    if place is not None:
        model, stack, layer = _model_of(place), place.stack, place.layer
    elif match := re.match(r"(?P<stack>(?:.*?\.)?)(?P<layer>\d{1,4})\.", name):
        model, stack, layer = model_of_stack(match["stack"]), match["stack"], int(match["layer"])
    else:
        model, stack, layer = "", "", None
    models.setdefault(model, ModelTensors(stack)).unknown.append(Unknown(name, layer))


def _with_cross_layers(models: Models) -> Models:
    """Moves attention to another model to its own model if layers have it instead of self-attention."""
    merged = dict(models)
    for name, cross in models.items():
        first = next(iter(cross.attention.values()), None)
        module = "" if first is None else first.name.rpartition(".")[2]
        own = models.get(name.removesuffix(module).removesuffix("."))
        if not is_cross(module) or own is None or own is cross:
            continue
        if not own.attention.keys() & cross.attention.keys():
            own.entries |= cross.entries
            own.attention |= cross.attention
            own.unknown += cross.unknown
            del merged[name]
    return merged


def _read_header(file: Path, listed: list[str], problems: list[Problem]) -> dict[str, StoredTensor]:
    """The tensors of a file, which must include those in the index; none if it cannot be read."""
    if not _is_file(file):
        problems.append(make_problem("file-missing", f"{file} must be there, but is not"))
        return {}
    try:
        tensors, _ = read_header(file)
    except (OSError, ValueError) as error:
        problems.append(make_problem("file-corrupt", f"{file} cannot be read: {error}"))
        return {}
    missing = [name for name in listed if name not in tensors]
    if missing:
        some = f"{missing[0]} and {len(missing) - 1} more tensors" if missing[1:] else missing[0]
        message = f"{file} must have {some} that the index names, but has not"
        problems.append(make_problem("tensor-missing", message, tensor=missing[0], value=len(missing)))
    return tensors


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


# Choice of the model


def choose_model(models: Models, wanted: str | None) -> str:
    """The requested model; "" if there is none.

    Raises:
        ValueError: it is missing, or the choice is ambiguous; the message starts with "model must be".
    """
    if wanted is not None:
        exact = [name for name, tensors in models.items() if wanted in _names(name, tensors)]
        found = exact or [name for name in models if name.endswith(f".{wanted}")]
        if len(found) != 1:
            raise ValueError(f"model must be {_listed(models)}, got {wanted!r}")
        return found[0]
    with_scales = [name for name, tensors in models.items() if tensors.entries or tensors.unknown]
    language = [name for name in models if not models[name].is_side and not _is_attention_to(name, models)]
    choice = [name for name in with_scales if name in language]
    if not language:
        # A checkpoint of only a draft, or of another kind of part.
        choice = [name for name in with_scales if not models[name].is_tower]
    if "" in choice or not choice:
        return "" if "" in choice or not language else language[0]
    if len(choice) > 1:
        raise ValueError(f"model must be {_listed({name: models[name] for name in choice})}, got None")
    return choice[0]


def _names(name: str, tensors: ModelTensors) -> set[str]:
    """All accepted names of a model."""
    if is_cross(name.rpartition(".")[2]):
        return {name}
    stack = tensors.stack.removesuffix(".")
    return {name, stack, stack.rpartition(".")[0]} - {""}


def _is_attention_to(name: str, models: Models) -> bool:
    return is_cross(name.rpartition(".")[2]) and name.rpartition(".")[0] in models


def _listed(models: Models) -> str:
    names = [f'"{name or tensors.stack.removesuffix(".")}"' for name, tensors in models.items()]
    return listed(names) if names else "None, as there is no attention"
