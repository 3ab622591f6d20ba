"""Checks of the values of scales: their number, and whether they are plausible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

import torch
from torch import Tensor

from fp8kv._checks import Strategy, is_scale
from fp8kv._dtypes import DEFAULT_FORMAT
from fp8kv.checkpoint._read.layers import Heads
from fp8kv.checkpoint._read.scales import StoredScale, StoredScales
from fp8kv.checkpoint.problems import Problem, make_problem

#: In orders of magnitude: closer to three than to two.
_FAR = 2.5
#: For any scale: the amax of keys, values or queries is never below 4e-5, or above 4e7.
_SMALLEST, _LARGEST = 1e-7, 1e5
#: The scale of a head that was always zero, possibly in 16 bits.
_MIN_SCALE = DEFAULT_FORMAT.min_scale

#: Layer and letter.
Place = tuple[int, str]


def check_values(scales: StoredScales, strategy: Strategy, heads: Mapping[int, Heads]) -> tuple[list[Problem], set[Place]]:
    """All problems, and the layers and letters whose scales must not be used."""
    problems: list[Problem] = []
    bad: set[Place] = set()
    usual = _usual(scales)
    for layer, by_letter in scales.items():
        counts = dict(_wrong_counts(by_letter, strategy, heads.get(layer, Heads())))
        for letter, scale in by_letter.items():
            if scale.values is None:
                bad.add((layer, letter))
            elif letter in counts:
                bad.add((layer, letter))
                count = scale.values.numel()
                message = f"{scale.name} must have {counts[letter]}, got {count}"
                problems.append(make_problem("head-count", message, layer=layer, tensor=scale.name, value=count))
            else:
                found = list(_wrong_values(layer, letter, scale.name, scale.values, usual))
                problems += found
                if any(problem.severity == "error" for problem in found):
                    bad.add((layer, letter))
    return _once(problems), bad


def _wrong_counts(by_letter: dict[str, StoredScale], strategy: Strategy, heads: Heads) -> Iterator[tuple[str, str]]:
    """The letters with a wrong number of scales, and the expected number."""
    counts = {letter: scale.values.numel() for letter, scale in by_letter.items() if scale.values is not None}
    kv = heads.kv or counts.get("k") or counts.get("v") or 1
    for letter, count in counts.items():
        if strategy == "tensor":
            if count != 1:
                yield letter, "1 element, as the strategy is tensor"
        elif letter == "q":
            if heads.query not in (None, count):
                yield letter, f"{heads.query} elements, one for each query head"
            elif count < 1 or count % kv:
                yield letter, f"a multiple of {kv} elements, one for each query head"
        elif count != kv:
            source = "one for each KV head" if heads.kv is not None else "as many as that of K"
            yield letter, f"{kv} elements, {source}"


def _wrong_values(layer: int, letter: str, name: str, values: Tensor, usual: dict[Place, float]) -> Iterator[Problem]:
    finite = values.isfinite()
    valid = torch.tensor([is_scale(x) for x in values.tolist()], dtype=torch.bool)
    zero_head = _is_min_scale(values)
    groups = list(_comparable(layer, letter, usual))
    far = (values < _SMALLEST) | (values > _LARGEST)
    for logs in groups:
        distances = (values.log10().unsqueeze(-1) - torch.tensor(logs)).abs()
        far |= (distances >= _FAR).float().mean(-1) > 0.5
    plausible = "a plausible scale"
    if groups:
        whose = "the keys" if letter == "q" else "other layers"
        plausible = f"near {10 ** median(groups[0]):.3g}, the median of {whose}"
    defects = {
        "not-finite": (~finite, "must be finite"),
        "not-positive": (finite & ~valid, "must be above 0"),
        "implausible": (valid & far & ~zero_head, f"must be {plausible}"),
    }
    if letter == "q":
        # One defect with many symptoms: uninitialized memory.
        wrong = torch.stack([mask for mask, _ in defects.values()]).any(0)
        defects = {"query-scale": (wrong, f"must be finite, above 0 and {plausible}")}
    defects["zero-head"] = (zero_head, "shows a head that was always zero")
    for kind, (mask, verdict) in defects.items():
        heads = mask.nonzero().flatten().tolist()
        if heads:
            value = f"{values[heads[0]].item():.6g}"
            where = f" for head {heads[0]} ({len(heads)} of {len(values)} heads)" if len(values) > 1 else ""
            message = f"{name} {verdict}, got {value}{where}"
            yield make_problem(kind, message, layer=layer, tensor=name, value=value)


def _usual(scales: StoredScales) -> dict[Place, float]:
    """The logarithm of the median of each scale, over the values that may be correct."""
    usual = {}
    for layer, by_letter in scales.items():
        for letter, scale in by_letter.items():
            if scale.values is not None:
                x = scale.values
                x = x[(x >= _SMALLEST) & (x <= _LARGEST) & ~_is_min_scale(x)]
                if x.numel():
                    usual[layer, letter] = x.median().log10().item()
    return usual


def _comparable(layer: int, letter: str, usual: dict[Place, float]) -> Iterator[list[float]]:
    """Groups for comparison: other layers, and for queries the keys."""
    keys = [x for (_, other), x in usual.items() if other == "k"] if letter == "q" else []
    others = [x for (n, other), x in usual.items() if other == letter and n != layer]
    return filter(None, (keys, others))


def _is_min_scale(values: Tensor) -> Tensor:
    return (values / _MIN_SCALE - 1).abs() <= 0.02


def _once(problems: list[Problem]) -> list[Problem]:
    """A `kv_scale` is checked for K and for V, but its defect is reported once."""
    return list({(problem.kind, problem.tensor): problem for problem in reversed(problems)}.values())[::-1]
