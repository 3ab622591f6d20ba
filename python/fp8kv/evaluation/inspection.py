"""`fp8kv inspect`: shows the scales of a checkpoint as stored in its files, with their problems.

Example:
    >>> from fp8kv.evaluation import inspection
    >>> layers = [inspection.LayerRow(0, q=None, k=[0.02, 0.03], v=[float("nan"), 0.01])]
    >>> inspection.Inspection("model", scheme=None, layers=layers, problems=[]).as_dict()["layers"]
    [{'layer': 0, 'q': None, 'k': [0.02, 0.03], 'v': ['nan', 0.01]}]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8kv._checks import is_scale, require
from fp8kv.checkpoint._read.inventory import Entry, Key
from fp8kv.checkpoint._read.own_scales import OwnScales
from fp8kv.checkpoint._read.scales import read_numbers
from fp8kv.checkpoint.load import examine
from fp8kv.checkpoint.names import find_scale_name
from fp8kv.checkpoint.problems import Problem
from fp8kv.checkpoint.scales import ranges
from fp8kv.checkpoint.scheme import KVCacheScheme
from fp8kv.evaluation._pictures import plot_scales as plot

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "Inspection",
    "LayerRow",
    "inspect_checkpoint",
    "plot",
    "problem_lines",
    "report",
    "scheme_line",
    "table",
    "verdict",
]

SEVERITIES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class LayerRow:
    """The scales of one layer as stored in the files, including bad ones; None: the checkpoint has none.

    Attributes:
        layer: its index.
        q: the scales that every engine reads.
        k: likewise.
        v: likewise.
        format: what fp8kv uses instead, if there is a subfolder ``fp8kv``, as in "int8 per channel".
        error: of the attention output in that format, in calibration, relative.
    """

    layer: int
    q: list[float] | None
    k: list[float] | None
    v: list[float] | None
    format: str | None = None
    error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {"format": self.format, "error": self.error} if self.format is not None else {}
        return {"layer": self.layer, **{name: _jsonable(getattr(self, name)) for name in "qkv"}, **own}


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_checkpoint`.

    Attributes:
        checkpoint: its path.
        scheme: from the config; None if it has no usable scheme.
        layers: by index, including layers that should have scales but lack them.
        problems: the findings of `fp8kv.audit_checkpoint`.
    """

    checkpoint: str
    scheme: KVCacheScheme | None
    layers: list[LayerRow]
    problems: list[Problem]

    @property
    def name(self) -> str:
        """The name of its directory or file, even if the path is "."."""
        return Path(self.checkpoint).resolve().name

    @property
    def ok(self) -> bool:
        """Whether no problem has severity "error"."""
        return all(problem.severity != "error" for problem in self.problems)

    @property
    def has_query_scales(self) -> bool:
        """Whether the config or a layer quantizes queries."""
        promised = self.scheme is not None and self.scheme.quantizes_query
        return promised or any(row.q is not None for row in self.layers)

    def problems_of(self, layer: int, name: str | None = None) -> list[Problem]:
        """The problems of a layer, or of its "q", "k" or "v"."""
        found = [problem for problem in self.problems if problem.layer == layer]
        return [p for p in found if name is None or p.tensor is None or name in _names(p.tensor)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which lacks them, NaN and infinity become the strings "nan", "inf" and "-inf"."""
        return {
            "checkpoint": self.checkpoint,
            "ok": self.ok,
            "scheme": None if self.scheme is None else asdict(self.scheme),
            "layers": [row.as_dict() for row in self.layers],
            "problems": [problem.as_dict() for problem in self.problems],
        }


def _jsonable(values: list[float] | None) -> list[float | str] | None:
    return None if values is None else [x if math.isfinite(x) else str(x) for x in values]


def _names(tensor: str) -> str:
    """The letters of a scale or zero point: "q", "k" or "v", or several if it is unknown which."""
    found = find_scale_name(tensor)
    return "qkv" if found is None else found.letters


def inspect_checkpoint(checkpoint: str | Path, model: str | None = None) -> Inspection:
    """Reads all scales of a checkpoint as stored, and finds their problems.

    Args:
        checkpoint: as for `fp8kv.load_kv_scales`.
        model: which one, if there are several, as for `fp8kv.load_kv_scales`.

    Raises:
        FileNotFoundError: there is no such directory or file.
        ValueError: it is not a checkpoint, or does not have that model.
    """
    examined = examine(checkpoint, "inspect", model=model)
    path = examined.path
    if path.is_dir() and not ((path / "config.json").exists() or any(path.glob("*.safetensors*"))):
        raise ValueError(f"inspect: checkpoint must have a config.json or .safetensors files or be such a file, got {path}")
    made_up = {n: {letter: x.tolist() for letter, x in row.items()} for n, row in examined.scales.items()}
    raw = _raw_scales(examined.entries) or made_up
    layers = {*raw, *(examined.heads or ()), *(p.layer for p in examined.problems if p.layer is not None)}
    rows = [_row(n, raw.get(n, {}), examined.own) for n in sorted(layers)]
    return Inspection(str(checkpoint), examined.scheme, rows, examined.problems)


def _row(layer: int, scales: dict[str, list[float]], own: OwnScales | None) -> LayerRow:
    row = LayerRow(layer, scales.get("q"), scales.get("k"), scales.get("v"))
    found = None if own is None else own.layers.get(layer)
    return row if found is None else replace(row, format=found.format, error=found.error)


def _raw_scales(entries: dict[Key, list[Entry]]) -> dict[int, dict[str, list[float]]]:
    """All readable scales by layer and "q", "k" or "v"; the first of duplicates."""
    scales: dict[int, dict[str, list[float]]] = {}
    for key, copies in entries.items():
        try:
            values = read_numbers(copies[0].stored, scale=True)
        except (OSError, ValueError):  # which is among the problems
            continue
        if key.kind == "scale" and values is not None:
            scales.setdefault(key.layer, {})[key.letter] = values.tolist()
    return scales


# Text


def report(inspection: Inspection) -> Iterator[RenderableType]:
    """The full report, to print with rich: the scheme, the scales of every layer, the problems, a verdict."""
    require("rich", "cli", "a report")
    from rich.text import Text

    yield Text(scheme_line(inspection.scheme))
    yield table(inspection)
    yield from problem_lines(inspection.problems)
    yield verdict(inspection)


def scheme_line(scheme: KVCacheScheme | None) -> str:
    """The scheme as text."""
    if scheme is None:
        return "no scheme that can be used"
    per = "attention head" if scheme.strategy == "attn_head" else "tensor"
    of = "Q, K and V" if scheme.quantizes_query else "K and V"
    observer = scheme.observer or "not said"
    return f"{scheme.strategy}: one scale per {per} of {of}; observer {observer}; {scheme.producer}"


def table(inspection: Inspection) -> Table:
    """The scales of every layer as a rich table."""
    require("rich", "cli", "a table")
    from rich.table import Table
    from rich.text import Text

    names = "kvq" if inspection.has_query_scales else "kv"
    # Names must not be parsed as markup.
    result = Table(title=Text(f"Scales of {inspection.name}"))
    result.add_column("layer", justify="right", no_wrap=True)
    for name in names:
        result.add_column(f"{name}_scale", justify="right")
    result.add_column("scales", justify="right", no_wrap=True)
    with_formats = any(row.format is not None for row in inspection.layers)
    if with_formats:
        result.add_column("in fp8kv")
        result.add_column("error", justify="right", no_wrap=True)
    with_problems = any(problem.layer is not None for problem in inspection.problems)
    if with_problems:
        result.add_column("problems")
    for row in inspection.layers:
        found = inspection.problems_of(row.layer)
        kinds = {problem.kind: SEVERITIES[problem.severity] for problem in found}
        marks = ", ".join(f"[{style}]{kind}[/]" for kind, style in kinds.items())
        result.add_row(
            str(row.layer),
            *(_cell(getattr(row, name), inspection.problems_of(row.layer, name)) for name in names),
            _counts(row, names),
            *([row.format or "", "" if row.error is None else f"{row.error:.2g}"] if with_formats else []),
            *([marks] if with_problems else []),
        )
    return result


def _cell(values: list[float] | None, problems: Sequence[Problem]) -> str:
    """The value, or the smallest and largest one; unusable values are counted and shown."""
    if values is None:
        return "[bold red]missing[/]" if problems else "[dim]-[/]"
    good = [x for x in values if is_scale(x)]
    bad = [x for x in values if not is_scale(x)]
    text = " - ".join(f"{x:.3g}" for x in ((min(good), max(good)) if len(good) > 1 else good))
    if bad and len(values) == 1:
        text = f"{bad[0]:.3g}"
    elif bad:
        text = f"{text}{', ' if text else ''}{len(bad)} bad: {bad[0]:.3g}"
    worst = next((s for s in SEVERITIES if any(p.severity == s for p in problems)), None)
    style = SEVERITIES["error"] if bad else SEVERITIES.get(worst or "")
    return f"[{style}]{text}[/]" if style else text


def _counts(row: LayerRow, names: str) -> str:
    """The number of scales of K and V, and of Q."""
    lengths = [[len(values) for n in part if (values := getattr(row, n)) is not None] for part in ("kv", "q")]
    parts = ["/".join(dict.fromkeys(map(str, part))) or "-" for part in lengths]
    return f"{parts[0]}, q {parts[1]}" if "q" in names else parts[0]


def problem_lines(problems: Sequence[Problem]) -> Iterator[RenderableType]:
    """Every problem with its remedy, worst first; the same problem in many layers is one paragraph."""
    from rich.padding import Padding
    from rich.text import Text

    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda p: list(SEVERITIES).index(p.severity)):
        groups.setdefault((problem.severity, problem.kind, problem.remedy), []).append(problem)
    for (severity, kind, remedy), group in groups.items():
        head = Text.assemble((severity, SEVERITIES[severity]), f" {kind}: ")
        if len(group) > 1:
            where = ranges({p.layer for p in group if p.layer is not None})
            head.append(f"{len(group)} times{where and f', in layers {where}'}. The first: ")
        head.append(group[0].message)
        yield head
        yield Padding(Text(f"remedy: {remedy}"), (0, 0, 0, 2))


def verdict(inspection: Inspection) -> str:
    """One line: the number of problems, and whether the scales can be used."""
    if not inspection.problems:
        return "[green]no problems[/]"
    counts = [(sum(p.severity == s for p in inspection.problems), s, style) for s, style in SEVERITIES.items()]
    text = ", ".join(f"[{style}]{n} {s}{'s' if n > 1 else ''}[/]" for n, s, style in counts if n)
    use = "the scales can be used" if inspection.ok else "the scales must not be used as they are"
    return f"{text}: {use}"
