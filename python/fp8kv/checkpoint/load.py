"""`load_kv_scales`: the scales of a checkpoint, checked, and the share of a tensor-parallel rank.

`examine` does what loading and auditing have in common: it reads everything and checks it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fp8kv.checkpoint._audit.presence import (
    check_absent,
    check_observer,
    check_unexpected,
    check_unused_query,
)
from fp8kv.checkpoint._audit.values import check_values
from fp8kv.checkpoint._read.config import Heads, heads_of_layers, read_configs
from fp8kv.checkpoint._read.scales import Entry, Key, find_scales, read_scales
from fp8kv.checkpoint.problems import CheckpointError, Problem, make_problem
from fp8kv.checkpoint.scales import (
    KVScales,
    LayerScales,
    check_rank,
    counted,
    kv_heads_of_rank,
    mapped,
    reduce_query_scale,
)
from fp8kv.checkpoint.scheme import COMPRESSED_TENSORS, KVCacheScheme, find_scheme

#: As many problems are shown in full, or of one kind.
_MANY = 5
_RANKS = {"error": 0, "warning": 1, "note": 2}


def load_kv_scales(
    checkpoint: str | Path,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    device: torch.device | str = "cpu",
    on_problem: str = "raise",
    query: bool = True,
    fnuz: bool = False,
) -> KVScales:
    """Reads the scales of all layers of a checkpoint; of its files, only headers and scales are read.

    Every rank checks the whole checkpoint, so that all of them raise the same error.

    Args:
        checkpoint: a directory with config.json and .safetensors files, or one such file beside its config.
        tp_rank: the rank among `tp_size` tensor-parallel ones.
        tp_size: their number. Scales per head are shared out like KV heads: each rank gets as many neighbors,
            or one head, replicated, if there are more ranks than heads.
        device: of the result.
        on_problem: "raise": problems of severity "error" are raised. "warn": all problems but notes are
            warnings; bad scales are None, and a layer without usable scales is missing.
        query: False: query scales are ignored, with all that is wrong with them, and `q` is None.
        fnuz: doubles the scales, for hardware whose FP8 is float8_e4m3fnuz: the same byte means half as much
            there.

    Returns:
        fp32 scales by layer, ``[1]`` or ``[KV heads of the rank]``; one query scale for each KV group, the
        largest of its heads. ``.problems`` has all that was found.

    Raises:
        FileNotFoundError: there is no such directory or file.
        CheckpointError: a problem of severity "error" with ``on_problem="raise"``; a config that cannot be
            read, has an unsupported scheme or no quantized KV cache.
        ValueError: an argument cannot be used, or `tp_size` does not fit the number of KV heads.

    Example:
        >>> import fp8kv, json, pathlib, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "observer": "static_minmax"}
        >>> config = {"num_hidden_layers": 1, "quantization_config": {"kv_cache_scheme": scheme}}
        >>> _ = (folder / "config.json").write_text(json.dumps(config))
        >>> stem = "model.layers.0.self_attn"
        >>> save_file({f"{stem}.k_scale": torch.tensor([0.05]), f"{stem}.v_scale": torch.tensor([0.02])},
        ...           folder / "model.safetensors")
        >>> scales = fp8kv.load_kv_scales(folder)
        >>> scales[0].k, scales[0].q, scales.problems
        (tensor([0.0500]), None, [])
    """
    if on_problem not in ("raise", "warn"):
        raise ValueError(f'load_kv_scales: on_problem must be "raise" or "warn", got {on_problem!r}')
    try:
        check_rank(tp_rank, tp_size)
    except ValueError as error:
        raise ValueError(f"load_kv_scales: {error}") from None
    found = examine(checkpoint, "load_kv_scales", query=query)
    errors = [problem for problem in found.problems if problem.severity == "error"]
    if found.scheme is None or (errors and on_problem == "raise"):
        raise CheckpointError(_message(checkpoint, errors), errors)
    if on_problem == "warn":
        _warn(found.problems)
    layers = {
        layer: _layer(by_letter, 2.0 if fnuz else 1.0)
        for layer, by_letter in found.scales.items()
        if by_letter.keys() & {"k", "v"}
    }
    _check_tp_size(layers, tp_size)
    return KVScales(layers, found.scheme, found.problems).shard(tp_rank, tp_size).to(device)


def _layer(scales: dict[str, Tensor], factor: float) -> LayerScales:
    q, k, v = (scales.get(letter) for letter in "qkv")
    if q is not None:
        kv = k if k is not None else v
        assert kv is not None
        q = reduce_query_scale(q, kv.numel())
    return mapped(LayerScales(q, k, v), lambda scale: scale * factor)


def _check_tp_size(layers: dict[int, LayerScales], tp_size: int) -> None:
    for index, layer in layers.items():
        for scale in (layer.k, layer.v):
            try:
                if scale is not None:
                    kv_heads_of_rank(scale.numel(), 0, tp_size)
            except ValueError as error:
                raise ValueError(f"load_kv_scales: layer {index}: {error}") from error


def _message(checkpoint: str | Path, errors: list[Problem]) -> str:
    lines = [f"load_kv_scales: {checkpoint} has {counted(len(errors), 'problem')}: {errors[0]}"]
    lines += [problem.message for problem in errors[1:_MANY]]
    if errors[_MANY:]:
        lines.append(f"And {len(errors) - _MANY} more; fp8kv.audit_checkpoint lists all.")
    return "\n".join(lines)


def _warn(problems: list[Problem]) -> None:
    """One warning for each problem, or for all of a kind where they are many."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.severity != "note":
            kinds.setdefault(problem.kind, []).append(problem)
    for kind, found in kinds.items():
        if len(found) > _MANY:
            texts = [f"{len(found)} findings of kind {kind}, the first of them: {found[0]}"]
        else:
            texts = [str(problem) for problem in found]
        for text in texts:
            warnings.warn(f"load_kv_scales: {text}", stacklevel=3)


# What loading and auditing have in common


@dataclass
class Examined:
    """What a checkpoint holds.

    Attributes:
        scheme: what the config says; where it says nothing, what the tensors show. None if the config cannot
            be read or its scheme is not supported, and if there are no scales.
        heads: of the layers that have attention, by index; None if the config does not say.
        entries: the scales and zero points among the tensors, wrong ones too.
        scales: by layer, then by letter: the usable ones, fp32 ``[1]`` or ``[heads]``, of all ranks.
        problems: all of them, errors first.
    """

    scheme: KVCacheScheme | None = None
    heads: dict[int, Heads] | None = None
    entries: dict[Key, list[Entry]] = field(default_factory=dict)
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
    entries, file_problems = find_scales(path)
    found.entries = entries if query else _without_query(entries)
    found.problems += file_problems
    if usable_config:
        _complete_scheme(found, query)
    if found.scheme is not None:
        _examine_scales(found, found.scheme, complete=not file_problems)
    found.problems.sort(key=lambda p: (_RANKS[p.severity], -1 if p.layer is None else p.layer))
    return found


def _examine_config(folder: Path, found: Examined) -> bool:
    """Scheme and heads; False if the config cannot be read, or its scheme not be used."""
    try:
        configs = read_configs(folder)
    except (OSError, ValueError) as error:
        found.problems.append(make_problem("config-unreadable", str(error)))
        return False
    found.heads = heads_of_layers(configs[0])
    try:
        found.scheme = find_scheme(configs)
    except ValueError as error:
        found.problems.append(make_problem("scheme-unsupported", str(error)))
        return False
    return True


def _complete_scheme(found: Examined, query: bool) -> None:
    """What the config leaves open, the tensors show."""
    scales = [entry for key, copies in found.entries.items() if key.kind == "scale" for entry in copies]
    has_query = any(key.letter == "q" for key in found.entries)
    if found.scheme is not None:
        by_tensors = found.scheme.producer != COMPRESSED_TENSORS  # whose configs have no field for it
        quantizes_query = query and (found.scheme.quantizes_query or (by_tensors and has_query))
        found.scheme = replace(found.scheme, quantizes_query=quantizes_query)
    elif scales:
        message = f"config.json must have a kv_cache_scheme, as there is {scales[0].name}"
        found.problems.append(make_problem("scheme-missing", message))
        per_head = any(max(entry.stored.shape, default=1) > 1 for entry in scales)
        found.scheme = KVCacheScheme("attn_head" if per_head else "tensor", has_query, producer="unknown")
    else:
        message = "config.json must have a kv_cache_scheme and there must be scales, got none"
        found.problems.append(make_problem("not-quantized", message))


def _examine_scales(found: Examined, scheme: KVCacheScheme, complete: bool) -> None:
    entries = found.entries
    if not scheme.quantizes_query:
        found.problems += check_unused_query(entries)
        entries = _without_query(entries)
    stored, problems = read_scales(entries)
    wrong, bad = check_values(stored, scheme.strategy, found.heads or {})
    found.problems += [*problems, *wrong, *check_observer(scheme), *check_unexpected(stored, found.heads)]
    if complete:  # else what is absent is so because its file is
        found.problems += check_absent(stored, scheme, found.heads)
    for layer, by_letter in stored.items():
        usable = {letter: scale.values for letter, scale in by_letter.items() if (layer, letter) not in bad}
        found.scales[layer] = {letter: values for letter, values in usable.items() if values is not None}


def _without_query(entries: dict[Key, list[Entry]]) -> dict[Key, list[Entry]]:
    return {key: copies for key, copies in entries.items() if key.letter != "q"}
