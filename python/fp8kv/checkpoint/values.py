"""Checks of the values of scales: how many there are, and whether they can be what calibration found."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from fp8kv.checkpoint.findings import finding
from fp8kv.checkpoint.heads import Heads
from fp8kv.checkpoint.problems import Problem
from fp8kv.checkpoint.scheme import Strategy
from fp8kv.checkpoint.stored_scales import StoredScale, StoredScales

#: In orders of magnitude: nearer to three than to two.
_FAR = 2.5
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
    usual = _usual(scales)
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
                found = list(_wrong_values(layer, side, scale.name, scale.values, usual))
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
        elif side == "q":
            if heads.query not in (None, count):
                yield side, f"{heads.query} elements, one for each query head"
            elif count < 1 or count % kv:
                yield side, f"a multiple of {kv} elements, one for each query head"
        elif count != kv:
            source = "one for each KV head" if heads.kv is not None else "as many as that of K"
            yield side, f"{kv} elements, {source}"


def _wrong_values(
    layer: int, side: str, name: str, values: Tensor, usual: dict[Place, float]
) -> Iterator[Problem]:
    finite, positive = values.isfinite(), values > 0
    zero_head = _is_min_scale(values)
    groups = list(_comparable(layer, side, usual))
    far = (values < _SMALLEST) | (values > _LARGEST)
    for logs in groups:
        distances = (values.log10().unsqueeze(-1) - torch.tensor(logs)).abs()
        far |= (distances >= _FAR).float().mean(-1) > 0.5
    plausible = "a plausible scale"
    if groups:
        whose = "the keys" if side == "q" else "other layers"
        plausible = f"near {10 ** median(groups[0]):.3g}, the median of {whose}"
    defects = {
        "not-finite": (~finite, "must be finite"),
        "not-positive": (finite & ~positive, "must be above 0"),
        "implausible": (finite & positive & far & ~zero_head, f"must be {plausible}"),
    }
    if side == "q":
        # One defect with many faces: memory that nobody wrote to.
        wrong = torch.stack([mask for mask, _ in defects.values()]).any(0)
        defects = {"query-scale": (wrong, f"must be finite, above 0 and {plausible}")}
    defects["zero-head"] = (zero_head, "shows a head that was always zero")
    for kind, (mask, verdict) in defects.items():
        heads = mask.nonzero().flatten().tolist()
        if heads:
            value = f"{values[heads[0]].item():.6g}"
            where = f" for head {heads[0]} ({len(heads)} of {len(values)} heads)" if len(values) > 1 else ""
            message = f"{name} {verdict}, got {value}{where}"
            yield finding(kind, message, layer=layer, tensor=name, value=value)


def _usual(scales: StoredScales) -> dict[Place, float]:
    """The logarithm of the median of each scale, of the values that may be right."""
    usual = {}
    for layer, sides in scales.items():
        for side, scale in sides.items():
            if scale.values is not None:
                x = scale.values
                x = x[(x >= _SMALLEST) & (x <= _LARGEST) & ~_is_min_scale(x)]
                if x.numel():
                    usual[layer, side] = x.median().log10().item()
    return usual


def _comparable(layer: int, side: str, usual: dict[Place, float]) -> Iterator[list[float]]:
    """Groups of which the scales should be near to most: other layers, and for queries the keys."""
    keys = [x for (_, s), x in usual.items() if s == "k"] if side == "q" else []
    others = [x for (other, s), x in usual.items() if s == side and other != layer]
    return filter(None, (keys, others))


def _is_min_scale(values: Tensor) -> Tensor:
    return (values / _MIN_SCALE - 1).abs() <= 0.02


def _once(problems: list[Problem]) -> list[Problem]:
    """A `kv_scale` is checked for K and for V, but has its defect once."""
    return list({(problem.kind, problem.tensor): problem for problem in reversed(problems)}.values())[::-1]
