"""`audit_checkpoint`: everything that is wrong with the scales of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fp8kv.checkpoint.files import find_tensors
from fp8kv.checkpoint.findings import finding
from fp8kv.checkpoint.heads import Heads, heads_of_layers
from fp8kv.checkpoint.problems import Problem
from fp8kv.checkpoint.scheme import KVCacheScheme, find_scheme, read_configs
from fp8kv.checkpoint.stored_scales import Entry, Key, StoredScales, find_entries, read_scales
from fp8kv.checkpoint.values import check_values

_COMPRESSED_TENSORS = "compressed-tensors"
_RANKS = {"error": 0, "warning": 1, "note": 2}


def audit_checkpoint(checkpoint: str | Path) -> list[Problem]:
    """All findings about the scales of a checkpoint, errors first; what is in it raises nothing.

    Args:
        checkpoint: a directory with config.json and .safetensors files, or one such file beside its config.

    Returns:
        A problem for each defect, with layer, tensor, value, severity and a remedy; docs/checkpoints.md lists
        the kinds. Empty if all is as it should be.

    Raises:
        FileNotFoundError: there is no such directory or file.

    Example:
        >>> import fp8kv, json, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
        >>> [problem.kind for problem in fp8kv.audit_checkpoint(folder)]
        ['file-missing', 'not-quantized']
    """
    return examine(checkpoint, "audit_checkpoint").problems


@dataclass
class Examined:
    """What a checkpoint holds.

    Attributes:
        scheme: what the config says; where it says nothing, what the tensors show. None if the config cannot
            be read or its scheme is not supported, and if there are no scales.
        heads: of the layers that have attention, by index; None if the config does not say.
        scales: by layer, then by "q", "k" and "v": the usable ones, fp32 ``[1]`` or ``[heads]``, whole.
        problems: all findings, errors first.
    """

    scheme: KVCacheScheme | None = None
    heads: dict[int, Heads] | None = None
    scales: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def examine(checkpoint: str | Path, caller: str, *, query: bool = True) -> Examined:
    """Reads and checks everything; with ``query=False`` as if there were no query scales.

    Raises:
        FileNotFoundError: there is no such directory or file.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(
            f"{caller}: checkpoint must be a directory or a .safetensors file, but {path} is not there"
        )
    found = Examined()
    usable_config = _examine_config(path if path.is_dir() else path.parent, found)
    tensors, file_problems = find_tensors(path)
    found.problems += file_problems
    entries = find_entries(tensors)
    if not query:
        entries = _without_query(entries)
    if usable_config:
        _settle_scheme(found, entries, query)
    if found.scheme is not None:
        _examine_scales(found, found.scheme, entries, complete=not file_problems)
    found.problems.sort(key=lambda p: (_RANKS[p.severity], -1 if p.layer is None else p.layer))
    return found


def _examine_config(folder: Path, found: Examined) -> bool:
    """Scheme and heads; False if the config cannot be read, or its scheme not be used."""
    prefix = "KVCacheScheme.from_config: "
    try:
        configs = read_configs(folder)
    except (OSError, ValueError) as error:
        found.problems.append(finding("config-unreadable", str(error).removeprefix(prefix)))
        return False
    found.heads = heads_of_layers(configs[0])
    try:
        found.scheme = find_scheme(configs)
    except ValueError as error:
        found.problems.append(finding("scheme-unsupported", str(error).removeprefix(prefix)))
        return False
    return True


def _settle_scheme(found: Examined, entries: dict[Key, list[Entry]], query: bool) -> None:
    """What the config leaves open, the tensors show."""
    scales = [entry for key, copies in entries.items() if key.kind == "scale" for entry in copies]
    has_query = any(key.side == "q" for key in entries)
    if found.scheme is not None:
        by_tensors = found.scheme.producer != _COMPRESSED_TENSORS  # whose configs have no field for it
        quantizes_query = query and (found.scheme.quantizes_query or (by_tensors and has_query))
        found.scheme = replace(found.scheme, quantizes_query=quantizes_query)
    elif scales:
        found.problems.append(
            finding(
                "scheme-missing", f"config.json must have a kv_cache_scheme, as there is {scales[0].name}"
            )
        )
        per_head = any(max(entry.stored.shape, default=1) > 1 for entry in scales)
        found.scheme = KVCacheScheme("attn_head" if per_head else "tensor", has_query, producer="unknown")
    else:
        found.problems.append(
            finding(
                "not-quantized", "config.json must have a kv_cache_scheme and there must be scales, got none"
            )
        )


def _examine_scales(
    found: Examined, scheme: KVCacheScheme, entries: dict[Key, list[Entry]], complete: bool
) -> None:
    if not scheme.quantizes_query:
        found.problems += _unused_query(entries)
        entries = _without_query(entries)
    stored, problems = read_scales(entries)
    wrong, bad = check_values(stored, scheme.strategy, found.heads or {})
    found.problems += [*problems, *wrong, *_observer(scheme), *_unexpected(stored, found.heads)]
    if complete:  # else what is absent is so because its file is
        found.problems += _absent(stored, scheme, found.heads)
    for layer, sides in stored.items():
        usable = {side: scale.values for side, scale in sides.items() if (layer, side) not in bad}
        found.scales[layer] = {side: values for side, values in usable.items() if values is not None}


def _without_query(entries: dict[Key, list[Entry]]) -> dict[Key, list[Entry]]:
    return {key: copies for key, copies in entries.items() if key.side != "q"}


def _unused_query(entries: dict[Key, list[Entry]]) -> Iterator[Problem]:
    names = [copies[0].name for key, copies in entries.items() if key.side == "q" and key.kind == "scale"]
    if names:
        yield finding("unused-query-scale", f"{names[0]} is there, but the config has no group of attention",
                      tensor=names[0], value=len(names))  # fmt: skip


def _observer(scheme: KVCacheScheme) -> Iterator[Problem]:
    observer = scheme.observer
    if scheme.producer != _COMPRESSED_TENSORS:
        return
    if observer is None:
        message = "The observer is not said; the default of some versions keeps only the last batch"
    elif observer == "minmax":
        message = 'The observer is "minmax", which keeps only the last batch in some versions'
    elif observer.startswith("memoryless"):
        message = f'The observer is "{observer}", which keeps only the last batch'
    else:
        return
    yield finding("observer", message, value=observer or "null")


def _unexpected(stored: StoredScales, heads: dict[int, Heads] | None) -> Iterator[Problem]:
    for layer, sides in stored.items():
        if heads is not None and layer not in heads:
            name = next(iter(sides.values())).name
            message = f"{name} is there, but the config has no such layer with keys and values of its own"
            yield finding("unexpected-layer", message, layer=layer, tensor=name)


def _absent(stored: StoredScales, scheme: KVCacheScheme, heads: dict[int, Heads] | None) -> Iterator[Problem]:
    layers = range(max(stored, default=-1) + 1) if heads is None else heads
    with_kv = [layer for layer in layers if {"k", "v"} & stored.get(layer, {}).keys()]
    if not with_kv:
        yield finding("layer-missing", "No layer has scales of K and V", value=0)
    for layer in layers if with_kv else ():
        sides = stored.get(layer, {})
        absent = {side: f"model.layers.{layer}.self_attn.{side}_scale" for side in "kv" if side not in sides}
        if len(absent) == 2:
            yield finding("layer-missing", "There are no scales of K and V", layer=layer)
        for side, name in absent.items() if len(absent) == 1 else ():
            other = next(sides[s].name for s in "kv" if s != side)
            yield finding("scale-missing", f"{name} must be there, as {other} is", layer=layer, tensor=name)
    if scheme.quantizes_query and with_kv:
        yield from _absent_query(stored, with_kv)


def _absent_query(stored: StoredScales, layers: list[int]) -> Iterator[Problem]:
    without = [layer for layer in layers if "q" not in stored[layer]]
    if len(without) == len(layers):
        yield finding(
            "query-scale-missing", "No layer has a query scale, but the config has a group of attention"
        )
        return
    for layer in without:
        name = f"model.layers.{layer}.self_attn.q_scale"
        yield finding(
            "query-scale-missing", f"{name} must be there, as in other layers", layer=layer, tensor=name
        )
