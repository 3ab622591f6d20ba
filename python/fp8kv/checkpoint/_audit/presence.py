"""Checks of presence: scales for all layers, no superfluous ones, and a reliable observer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch

from fp8kv.checkpoint._read.inventory import Entry, Key, Models, ModelTensors
from fp8kv.checkpoint._read.layers import Attention, Layers
from fp8kv.checkpoint._read.quantization import FP8, NVFP4, REAL, Statement
from fp8kv.checkpoint._read.scales import StoredScales
from fp8kv.checkpoint.problems import Problem, make_problem
from fp8kv.checkpoint.scheme import COMPRESSED_TENSORS, KVCacheScheme


def check_observer(scheme: KVCacheScheme) -> Iterator[Problem]:
    """A problem if the observer may have kept only the last batch."""
    observer = scheme.observer
    if scheme.producer != COMPRESSED_TENSORS:
        return
    if observer is None:
        message = "The observer is not specified; the default of some versions keeps only the last batch"
    elif observer == "minmax":
        message = 'The observer is "minmax", which keeps only the last batch in some versions'
    elif observer.startswith("memoryless"):
        message = f'The observer is "{observer}", which keeps only the last batch'
    else:
        return
    yield make_problem("observer", message, value=observer or "null")


def check_unused_query(entries: dict[Key, list[Entry]]) -> Iterator[Problem]:
    """A problem if there are query scales that the config does not mention."""
    names = [copies[0].name for key, copies in entries.items() if key.letter == "q" and key.kind == "scale"]
    if names:
        message = f"{names[0]} is there, but the config has no group of attention"
        yield make_problem("unused-query-scale", message, tensor=names[0], value=len(names))


def check_unexpected(stored: StoredScales, layers: Layers | None) -> Iterator[Problem]:
    """A problem for each layer with scales that is not in the config."""
    for layer, by_letter in stored.items():
        if layers is not None and layer not in layers.heads:
            name = next(iter(by_letter.values())).name
            message = f"{name} is there, but the config has no such layer with keys and values of its own"
            yield make_problem("unexpected-layer", message, layer=layer, tensor=name)
    if layers is not None and layers.apart:
        some = ", ".join(map(str, layers.apart[:3])) + (", ..." if layers.apart[3:] else "")
        message = f"{layers.field} in the config tells layers {some} apart from those with scales"
        yield make_problem("layers-inferred", message, value=len(layers.apart))


def check_unknown(tensors: ModelTensors, stored: StoredScales) -> Iterator[Problem]:
    """A problem for each tensor that looks like a scale: an error if the layer lacks one of its scales."""
    for name, layer in tensors.unknown:
        complete = stored and (layer is None or {"k", "v"} <= stored.get(layer, {}).keys())
        message = f"{name} looks like a scale of attention, but is none that is known"
        yield make_problem("unused-scale" if complete else "unknown-scale", message, layer=layer, tensor=name)


def check_latent(stored: StoredScales) -> Iterator[Problem]:
    """A problem for each layer of latent attention whose scales differ, though it caches one row."""
    for layer, by_letter in stored.items():
        k, v = (None if scale is None else scale.values for scale in map(by_letter.get, "kv"))
        if k is not None and v is not None and not torch.equal(k, v):
            name = by_letter["v"].name
            message = f"{name} must be that of K, as latent attention caches one row for both, but is another"
            yield make_problem("latent-scales", message, layer=layer, tensor=name)


def check_other_models(models: Models, chosen: str) -> Iterator[Problem]:
    """A problem for each other model with scales."""
    for name, tensors in models.items():
        names = [entry.name for entry in tensors.scales()]
        names = names or [unknown.name for unknown in tensors.unknown]
        if name != chosen and names:
            choice = name or tensors.stack.removesuffix(".")
            message = (
                f"{names[0]} is of another model than the one whose scales these are; "
                f'load_kv_scales(..., model="{choice}") loads those'
            )
            yield make_problem("other-model", message, tensor=names[0], value=choice)


def check_rope(entries: dict[Key, list[Entry]], statement: Statement, attention: Mapping[int, Attention]) -> Iterator[Problem]:
    """A problem if scales describe the outputs of projections, but the cache holds other values."""
    names = [name for key, copies in entries.items() if key.letter != "v" for name, _ in copies]
    if not names or statement.before_rope is False:
        return
    kind, said, of_outputs = "rope-unsaid", "", "_proj.output_" in names[0]
    norm = next((f"{x.name}.{rest}" for x in attention.values() for rest in x.shapes if _KEY_NORM.search(rest)), None)
    if statement.before_rope:
        kind = "before-rope"
        said = f"kv_cache_post_rope is false: {names[0]} is of keys before norm and RoPE, and not of the cache"
    elif statement.producer == "quark":
        said = f"Without kv_cache_post_rope, {names[0]} may be of keys before norm and RoPE" if of_outputs else ""
    elif of_outputs or statement.of_projections:
        said = f"{names[0]} is of the output of a projection: of keys before RoPE"
        if norm is not None:
            kind, said = "before-rope", f"{said} and {norm}, and not of the cache"
    if said:
        yield make_problem(kind, said, tensor=names[0], value=len(names))


#: Weights of a norm of keys, which follows their projection.
_KEY_NORM = re.compile(r"(?:^|\.)k(?:ey)?_?(?:layer)?_?norm\.weight$")


def check_formats(stored: StoredScales, statement: Statement, module_of: Callable[[int], str]) -> Iterator[Problem]:
    """A problem for scales of layers that are not in FP8."""
    wrong: dict[int, str] = {}
    for layer, by_letter in stored.items():
        formats = statement.formats_of(module_of(layer))._asdict()
        for letter, scale in by_letter.items():
            if formats.get(letter) == NVFP4:
                wrong.setdefault(layer, scale.name)
            elif formats.get(letter) == REAL:
                message = f"{scale.name} is there, but the config leaves it in 16 bits"
                yield make_problem("unexpected-scale", message, layer=layer, tensor=scale.name)
    if wrong and not statement.by_layer:
        name = next(iter(wrong.values()))
        yield make_problem("nvfp4-cache", f"{name} is for a cache in NVFP4", tensor=name, value=len(wrong))
        return
    for layer, name in wrong.items():
        yield make_problem("nvfp4-cache", f"{name} is for a cache in NVFP4", layer=layer, tensor=name)


def check_absent(
    stored: StoredScales,
    scheme: KVCacheScheme,
    layers: Layers | None,
    missing_on_purpose: Callable[[int, str], str | None],
    elsewhere: str | None = None,
) -> Iterator[Problem]:
    """A problem for each missing layer or scale.

    Args:
        stored: the scales that are present.
        scheme: whether there must be query scales.
        layers: the layers with a KV cache; None: all up to the last that has scales.
        missing_on_purpose: the reason why a layer has no scale of a letter, if there is one.
        elsewhere: where else there are, or may be, scales.
    """
    expected = range(max(stored, default=-1) + 1) if layers is None else layers.heads
    with_kv = [layer for layer in expected if {"k", "v"} & stored.get(layer, {}).keys()]
    reasons = {layer: {x: missing_on_purpose(layer, x) for x in "kv"} for layer in expected}
    some_unknown = any(UNKNOWN in why.values() for why in reasons.values())
    all_on_purpose = bool(reasons) and all(why["k"] and why["v"] for why in reasons.values())
    if not with_kv and not some_unknown and not all_on_purpose:
        message = "No layer has scales of K and V" + (f", but {elsewhere}" if elsewhere else "")
        yield make_problem("layer-missing", message, value=0)
        return
    for layer in expected:
        by_letter = stored.get(layer, {})
        absent = [letter for letter in "kv" if letter not in by_letter]
        why = [reason for letter in absent if (reason := reasons[layer][letter])]
        if len(why) == len(absent) > 0:
            if why[0] != UNKNOWN:
                yield make_problem("layer-unquantized", why[0], layer=layer)
        elif len(absent) == 2:
            yield make_problem("layer-missing", "There are no scales of K and V", layer=layer)
        elif absent:
            (other,) = {"k", "v"} - set(absent)
            name = _name(layer, absent[0])
            message = f"{name} must be there, as {by_letter[other].name} is"
            yield make_problem("scale-missing", message, layer=layer, tensor=name)
    if scheme.quantizes_query and with_kv:
        yield from _absent_query(stored, with_kv)


#: A layer has scales, but none with a known name, which is a separate problem.
UNKNOWN = "unknown"


def reasons_to_be_absent(
    tensors: ModelTensors, layers: Layers | None, statement: Statement | None, module_of: Callable[[int], str]
) -> Callable[[int, str], str | None]:
    """The reason why a layer may have no scale of K or V, as text for `check_absent`."""
    unknown = {item.layer for item in tensors.unknown}

    def reason(layer: int, letter: str) -> str | None:
        if layer in unknown or None in unknown:
            return UNKNOWN
        if statement is not None and statement.formats_of(module_of(layer))._asdict()[letter] == REAL:
            return "The config leaves its cache in 16 bits, or one of K and V"
        if layer in tensors.layers_with_scales:
            return None
        if layers is not None and layer in layers.optional:
            return "It caches what another model has made, and has no scales"
        module = module_of(layer)
        if statement is not None and tensors.layers_with_scales and statement.leaves_out(module):
            return f"The config leaves {module} out of what is quantized, and there are no scales"
        return None

    return reason


def unit_layers(
    has_scales: bool, layers: Layers | None, statement: Statement | None, module_of: Callable[[int], str]
) -> Mapping[int, str]:
    """Letters of the layers whose scales are 1.0, because ModelOpt exported none for an FP8 config."""
    if has_scales or statement is None or layers is None or not statement.is_modelopt:
        return {}
    formats = {n: statement.formats_of(module_of(n)) for n in layers.heads if n not in layers.optional}
    letters = {n: "".join(x for x in "kv" if one._asdict()[x] == FP8) for n, one in formats.items()}
    return {n: found for n, found in letters.items() if found}


def _absent_query(stored: StoredScales, layers: list[int]) -> Iterator[Problem]:
    without = [layer for layer in layers if "q" not in stored[layer]]
    if len(without) == len(layers):
        message = "No layer has a query scale, but the config has a group of attention"
        yield make_problem("query-scale-missing", message)
        return
    for layer in without:
        name = _name(layer, "q")
        message = f"{name} must be there, as in other layers"
        yield make_problem("query-scale-missing", message, layer=layer, tensor=name)


def _name(layer: int, letter: str) -> str:
    return f"model.layers.{layer}.self_attn.{letter}_scale"
