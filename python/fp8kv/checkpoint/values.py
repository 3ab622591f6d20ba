"""Checks of the values of scales: how many there are, and whether they can be what calibration found."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fp8kv.checkpoint.findings import finding
from fp8kv.checkpoint.heads import Heads
from fp8kv.checkpoint.problems import Problem
from fp8kv.checkpoint.scheme import Strategy
from fp8kv.checkpoint.stored_scales import StoredScale, StoredScales

#: Nearer to three orders of magnitude than to two.
_FAR = 10**2.5
#: Of any scale: elements up to 4e-5, or above 4e7, are none of keys, values or queries.
_SMALLEST, _LARGEST = 1e-7, 1e5
#: What a head that was always zero gets, in 16 bits perhaps.
_MIN_SCALE = 1 / (448 * 512)

Place = tuple[int, str]


def check_values(
    scales: StoredScales, strategy: Strategy, heads: dict[int, Heads]
) -> tuple[list[Problem], set[Place]]:
    """All findings, and the layers and sides ("q", "k", "v") whose scales must not be used."""
    problems: list[Problem] = []
    bad: set[Place] = set()
    logs = _logarithms(scales)
    for layer, sides in scales.items():
        counts = dict(_wrong_counts(sides, strategy, heads.get(layer, Heads())))
        for side, scale in sides.items():
            if scale.values is None:
                bad.add((layer, side))
            elif side in counts:
                bad.add((layer, side))
                count = scale.values.numel()
                problems.append(
                    finding("head-count", f"{scale.name} must have {counts[side]}, got {count}",
                            layer=layer, tensor=scale.name, value=count)
                )  # fmt: skip
            else:
                found = list(_wrong_values(layer, side, scale.name, scale.values, logs))
                problems += found
                if any(problem.severity == "error" for problem in found):
                    bad.add((layer, side))
    return _once(problems), bad


def _wrong_counts(
    sides: dict[str, StoredScale], strategy: Strategy, heads: Heads
) -> Iterator[tuple[str, str]]:
    """The sides that have not as many scales as they should, and how many they should have."""
    counts = {side: scale.values.numel() for side, scale in sides.items() if scale.values is not None}
    kv = heads.kv or counts.get("k") or counts.get("v") or 1
    for side, count in counts.items():
        if strategy == "tensor":
            if count != 1:
                yield side, "1 element, as the strategy is tensor"
        elif side == "q" and heads.query is not None:
            if count != heads.query or count % kv:
                yield side, f"{heads.query} elements, one for each query head"
        elif side == "q":
            if count < 1 or count % kv:
                yield side, f"a multiple of {kv} elements, one for each query head"
        elif count != kv:
            source = "one for each KV head" if heads.kv is not None else "as many as that of K"
            yield side, f"{kv} elements, {source}"


def _wrong_values(
    layer: int, side: str, name: str, values: Tensor, logs: dict[Place, Tensor]
) -> Iterator[Problem]:
    finite, positive = values.isfinite(), values > 0
    zero_head = _is_min_scale(values)
    medians = list(_medians(layer, side, logs))
    far = (values < _SMALLEST) | (values > _LARGEST)
    for median in medians:
        far |= (values.log10() - median).abs() >= torch.tensor(_FAR).log10()
    whose = "keys" if side == "q" else "other layers"
    usual = f"near {10 ** medians[0]:.3g}, the median of {whose}" if medians else "a plausible scale"
    defects = {
        "not-finite": (~finite, "finite"),
        "not-positive": (finite & ~positive, "above 0"),
        "implausible": (finite & positive & far & ~zero_head, usual),
    }
    if side == "q":
        # One defect with many faces: memory that nobody wrote to.
        wrong = torch.stack([mask for mask, _ in defects.values()]).any(0)
        defects = {"query-scale": (wrong, f"finite, above 0 and {usual}")}
    defects["zero-head"] = (zero_head, "above that of a head that is always zero")
    for kind, (mask, expected) in defects.items():
        heads = mask.nonzero().flatten().tolist()
        if heads:
            value = f"{values[heads[0]].item():.6g}"
            where = f" for head {heads[0]} ({len(heads)} of {len(values)} heads)" if len(values) > 1 else ""
            yield finding(kind, f"{name} must be {expected}, got {value}{where}",
                          layer=layer, tensor=name, value=value)  # fmt: skip


def _logarithms(scales: StoredScales) -> dict[Place, Tensor]:
    """Those of all values that may be right."""
    logs = {}
    for layer, sides in scales.items():
        for side, scale in sides.items():
            if scale.values is not None:
                x = scale.values
                logs[layer, side] = x[(x >= _SMALLEST) & (x <= _LARGEST) & ~_is_min_scale(x)].log10()
    return logs


def _medians(layer: int, side: str, logs: dict[Place, Tensor]) -> Iterator[float]:
    """Of what the scales should be near to: those of other layers; queries are near to keys too."""
    others = [x for (other, s), x in logs.items() if s == side and other != layer]
    keys = [x for (_, s), x in logs.items() if s == "k"] if side == "q" else []
    for group in (keys, others):
        together = torch.cat(group) if group else torch.empty(0)
        if together.numel():
            yield together.median().item()


def _is_min_scale(values: Tensor) -> Tensor:
    return (values / _MIN_SCALE - 1).abs() <= 0.02


def _once(problems: list[Problem]) -> list[Problem]:
    """A `kv_scale` is checked for K and for V, but has its defect once."""
    return list({(problem.kind, problem.tensor): problem for problem in reversed(problems)}.values())[::-1]
