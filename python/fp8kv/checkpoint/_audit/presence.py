"""Checks of what there is: scales for all layers, none too many, and an observer that can be trusted."""

from __future__ import annotations

from collections.abc import Iterator

from fp8kv.checkpoint._read.config import Heads
from fp8kv.checkpoint._read.scales import Entry, Key, StoredScales
from fp8kv.checkpoint.problems import Problem, make_problem
from fp8kv.checkpoint.scheme import COMPRESSED_TENSORS, KVCacheScheme


def check_observer(scheme: KVCacheScheme) -> Iterator[Problem]:
    """A problem if the observer may have seen the last batch only."""
    observer = scheme.observer
    if scheme.producer != COMPRESSED_TENSORS:
        return
    if observer is None:
        message = "The observer is not said; the default of some versions keeps only the last batch"
    elif observer == "minmax":
        message = 'The observer is "minmax", which keeps only the last batch in some versions'
    elif observer.startswith("memoryless"):
        message = f'The observer is "{observer}", which keeps only the last batch'
    else:
        return
    yield make_problem("observer", message, value=observer or "null")


def check_unused_query(entries: dict[Key, list[Entry]]) -> Iterator[Problem]:
    """A problem if there are query scales, of which the config says nothing."""
    names = [copies[0].name for key, copies in entries.items() if key.letter == "q" and key.kind == "scale"]
    if names:
        message = f"{names[0]} is there, but the config has no group of attention"
        yield make_problem("unused-query-scale", message, tensor=names[0], value=len(names))


def check_unexpected(stored: StoredScales, heads: dict[int, Heads] | None) -> Iterator[Problem]:
    """A problem for each layer with scales that the config does not have."""
    for layer, by_letter in stored.items():
        if heads is not None and layer not in heads:
            name = next(iter(by_letter.values())).name
            message = f"{name} is there, but the config has no such layer with keys and values of its own"
            yield make_problem("unexpected-layer", message, layer=layer, tensor=name)


def check_absent(
    stored: StoredScales, scheme: KVCacheScheme, heads: dict[int, Heads] | None
) -> Iterator[Problem]:
    """A problem for each layer, or one of its scales, that is not there."""
    layers = range(max(stored, default=-1) + 1) if heads is None else heads
    with_kv = [layer for layer in layers if {"k", "v"} & stored.get(layer, {}).keys()]
    if not with_kv:
        yield make_problem("layer-missing", "No layer has scales of K and V", value=0)
    for layer in layers if with_kv else ():
        by_letter = stored.get(layer, {})
        absent = [letter for letter in "kv" if letter not in by_letter]
        if len(absent) == 2:
            yield make_problem("layer-missing", "There are no scales of K and V", layer=layer)
        elif absent:
            (other,) = {"k", "v"} - set(absent)
            name = _name(layer, absent[0])
            message = f"{name} must be there, as {by_letter[other].name} is"
            yield make_problem("scale-missing", message, layer=layer, tensor=name)
    if scheme.quantizes_query and with_kv:
        yield from _absent_query(stored, with_kv)


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
