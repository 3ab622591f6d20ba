"""`load_kv_scales`: the scales of a checkpoint, checked, and the share of a tensor-parallel rank."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from fp8kv.checkpoint.audit import examine
from fp8kv.checkpoint.problems import CheckpointError, Problem
from fp8kv.checkpoint.scales import KVScales, LayerScales, kv_heads_of_rank, reduce_query_scale

#: As many findings are shown in full, or of one kind.
_MANY = 5


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
        on_problem: "raise": findings of severity "error" are raised. "warn": all findings but notes are
            warnings; bad scales are None, and a layer without usable scales is missing.
        query: False: query scales are ignored, with all that is wrong with them, and `q` is None.
        fnuz: doubles the scales, for hardware whose FP8 is float8_e4m3fnuz: the same byte means half as much
            there.

    Returns:
        fp32 scales by layer, ``[1]`` or ``[KV heads of the rank]``; one query scale for each KV group, the
        largest of its heads. ``.problems`` has all findings.

    Raises:
        FileNotFoundError: there is no such directory or file.
        CheckpointError: a finding of severity "error" with ``on_problem="raise"``; a config that cannot be
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
    if tp_size < 1 or not 0 <= tp_rank < tp_size:
        raise ValueError(
            f"load_kv_scales: tp_rank must be from 0 to tp_size - 1, got {tp_rank} with tp_size={tp_size}"
        )
    found = examine(checkpoint, "load_kv_scales", query=query)
    errors = [problem for problem in found.problems if problem.severity == "error"]
    if found.scheme is None or (errors and on_problem == "raise"):
        raise CheckpointError(_message(checkpoint, errors), errors)
    if on_problem == "warn":
        _warn(found.problems)
    layers = {
        layer: _layer(sides, 2.0 if fnuz else 1.0)
        for layer, sides in found.scales.items()
        if sides.keys() & {"k", "v"}
    }
    _check_tp_size(layers, tp_size)
    return KVScales(layers, found.scheme, found.problems).shard(tp_rank, tp_size).to(device)


def _layer(sides: dict[str, Tensor], factor: float) -> LayerScales:
    k, v, q = (sides.get(side) for side in "kvq")
    if q is not None:
        kv = k if k is not None else v
        assert kv is not None
        q = reduce_query_scale(q, kv.numel())
    return LayerScales(*(None if scale is None else scale * factor for scale in (q, k, v)))


def _check_tp_size(layers: dict[int, LayerScales], tp_size: int) -> None:
    for index, layer in layers.items():
        for scale in (layer.k, layer.v):
            try:
                if scale is not None:
                    kv_heads_of_rank(scale.numel(), 0, tp_size)
            except ValueError as error:
                raise ValueError(f"load_kv_scales: layer {index}: {error}") from error


def _message(checkpoint: str | Path, errors: list[Problem]) -> str:
    count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
    lines = [f"load_kv_scales: {checkpoint} has {count}: {errors[0]}"]
    lines += [problem.message for problem in errors[1:_MANY]]
    if errors[_MANY:]:
        lines.append(f"And {len(errors) - _MANY} more; fp8kv.audit_checkpoint lists all.")
    return "\n".join(lines)


def _warn(problems: list[Problem]) -> None:
    """One warning for each finding, or for all of a kind where they are many."""
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
