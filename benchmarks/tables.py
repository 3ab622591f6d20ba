"""Regenerates the tables of README.md and docs/performance.md from benchmarks/results.

A table stands between `<!-- table NAME -->` and `<!-- end -->`. A test compares the pages with the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "performance.md"]

Shape = tuple[int, ...]
Row = dict[str, Any]
Cell = Callable[[str, Shape], str]

_STEPS = (1, 16, 64, 256, 2048, 16384)


class Results:
    """The rows of a file of results by work and shape; of a CPU those of its best instruction set."""

    def __init__(self, name: str, threads: int | None = None) -> None:
        report = json.loads((RESULTS / f"{name}.json").read_text())
        isa = report["rows"][-1]["isa"]
        self.host: dict[str, float] = report["host"]
        self.rows: dict[tuple[str, Shape], Row] = {
            (row["work"], tuple(row["shape"])): row for row in report["rows"] if (row["isa"], row["threads"]) == (isa, threads)
        }

    def works(self) -> list[str]:
        return list(dict.fromkeys(work for work, _ in self.rows))

    def shapes(self, *geometry: int) -> list[Shape]:
        """In the order measured; of caches and steps those of the geometry."""
        return list(dict.fromkeys(shape for _, shape in self.rows if shape[1:] == geometry or not geometry))

    def us(self, work: str, shape: Shape) -> str:
        row = self.rows.get((work, shape))
        return _number(row["us"]) if row else ""


def _number(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def _table(first: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = [f"| {' | '.join((first, *columns))} |", f"| --- |{' ---: |' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def _matrix(works: Iterable[str], shapes: Sequence[Shape], cell: Cell, *before: Sequence[str]) -> str:
    """Works by shapes; for caches and steps by the number of tokens."""
    by_tokens = len({shape[1:] for shape in shapes}) == 1 and len(shapes[0]) > 2
    columns = [str(shape[0]) if by_tokens else "x".join(map(str, shape)) for shape in shapes]
    lines = [[work, *(cell(work, shape) for shape in shapes)] for work in works]
    return _table("us", columns, [*before, *lines])


def times(
    name: str,
    *geometry: int,
    shapes: Sequence[Shape] = (),
    threads: int | None = None,
) -> str:
    """Microseconds and share of a copy."""
    results = Results(name, threads)
    shapes = shapes or results.shapes(*geometry)

    def cell(work: str, shape: Shape) -> str:
        row = results.rows.get((work, shape))
        if row is None:
            return ""
        return f"{_number(row['us'])}, {row['share']:.0%}"

    copy = [_number(next(row["floor_us"] for (_, s), row in results.rows.items() if s == shape)) for shape in shapes]
    return _matrix(results.works(), shapes, cell, ["copy", *copy])


def shares(name: str, works: dict[str, str], *geometry: int, shapes: Sequence[Shape] = ()) -> str:
    """The share of a copy; `works` maps labels to the names in the file."""
    results = Results(name)
    return _matrix(
        works,
        shapes or results.shapes(*geometry),
        lambda work, shape: f"{results.rows[works[work], shape]['share']:.0%}",
    ).replace("| us |", "| share of a copy |", 1)


def beside(names: Sequence[str], *geometry: int, shapes: Sequence[Shape] = ()) -> str:
    """Microseconds of several runs: the first / the second / ..."""
    runs = [Results(name) for name in names]
    shapes = shapes or runs[-1].shapes(*geometry)
    return _matrix(runs[-1].works(), shapes, lambda work, shape: " / ".join(run.us(work, shape) or "-" for run in runs))


def peers(name: str, others: Sequence[str], *geometry: int, shapes: Sequence[Shape] = ()) -> str:
    """Microseconds: ours / the others'."""
    results = Results(name)

    def cell(work: str, shape: Shape) -> str:
        row = results.rows.get((work, shape))
        if row is None or not row["peers"]:
            return ""
        return " / ".join([_number(row["us"]), *(_number(row["peers"][other]) for other in others)])

    works = [work for work in results.works() if any(cell(work, shape) for shape in results.shapes(*geometry))]
    return _matrix(works, shapes or results.shapes(*geometry), cell)


def attention(name: str, threads: int | None = None) -> str:
    """Microseconds and share of a read, and microseconds of each peer, by work and shape."""
    rows = Results(name, threads).rows
    others = list(dict.fromkeys(other for row in rows.values() for other in row["peers"]))
    lines = [
        [
            f"{work}, {'x'.join(map(str, shape))}",
            _number(row["floor_us"]),
            f"{_number(row['us'])}, {row['share']:.0%}",
            *(_number(row["peers"][other]) if other in row["peers"] else "" for other in others),
        ]
        for (work, shape), row in rows.items()
    ]
    return _table("us", ["read", "fp8kv", *others], lines)


def host(names: dict[str, str]) -> str:
    """Host time of an eager call: us, and relative to torch.zero_ in the same run."""
    cells: dict[str, list[str]] = {}
    for position, suffix in enumerate(names.values()):
        for what in ("quantize", "cache", "decode"):
            costs = Results(f"{what}_{suffix}", 1 if suffix == "cpu" else None).host
            for call, us in costs.items():
                key = f"`torch.zero_`, in the run of {what}" if call == "torch.zero_" else call
                line = cells.setdefault(key, [""] * len(names))
                line[position] = f"{us:.1f}, {us / costs['torch.zero_']:.2f}"
    return _table("us, relative to `torch.zero_`", list(names), [[call, *line] for call, line in cells.items()])


def step_times() -> str:
    """A decode step with RoPE by number of tokens."""
    shapes = [(tokens, 32, 8, 128) for tokens in _STEPS]
    compiled = Results("decode_h100_peers").rows
    lines = [
        [label, *(Results(name).us("step rope NHD", shape) for shape in shapes)]
        for label, name in (("one launch", "decode_h100"), ("with `FP8KV_PDL=1`", "decode_h100_pdl"))
    ]
    lines.append(
        [
            "`torch.compile`",
            *(_number(compiled["step rope NHD", shape]["peers"]["torch.compile"]) for shape in shapes),
        ]
    )
    return _table("us, by number of tokens", list(map(str, _STEPS)), lines)


SMALL = [(1, 4096), (16, 4096), (128, 4096), (1024, 4096)]
TABLES: dict[str, Callable[[], str]] = {
    "quantize shares": lambda: shares(
        "quantize_h100",
        {
            "static, per tensor": "static tensor",
            "static, per channel": "static channel",
            "static, per head of 128": "static head 128",
            "dynamic, per token": "dynamic token",
            "dynamic, per tensor": "dynamic tensor",
        },
        shapes=[(1, 4096), (128, 4096), (1024, 4096), (8192, 4096), (16384, 8192)],
    ),
    "cache shares": lambda: shares(
        "cache_h100",
        {
            "append, per head, NHD": "append head NHD",
            "append, per head, HND": "append head HND",
            "append, per token and head, NHD": "append token-head NHD",
            "gather, per head, NHD": "gather head NHD",
        },
        8,
        128,
    ),
    "step": step_times,
    "quantize h100": lambda: times("quantize_h100"),
    "quantize h200": lambda: times("quantize_h200"),
    "quantize cpu": lambda: times("quantize_cpu", threads=1),
    "quantize small h100": lambda: beside(["quantize_h100", "quantize_h100_pdl", "quantize_h100_warm"], shapes=SMALL),
    "quantize peers h100": lambda: peers(
        "quantize_h100_peers", ["torch.compile", "torch eager"], shapes=[*SMALL, (8192, 4096)]
    ),
    "cache h100": lambda: times("cache_h100", 8, 128),
    "cache 32 h100": lambda: times("cache_h100", 32, 128),
    "cache geometries h100": lambda: times(
        "cache_h100", shapes=[(8192, 8, 64), (8192, 1, 128), (8192, 4, 128), (8192, 32, 128)]
    ),
    "cache h200": lambda: times("cache_h200", 8, 128),
    "cache cpu": lambda: times("cache_cpu", 8, 128, threads=1),
    "cache small h100": lambda: beside(["cache_h100", "cache_h100_pdl", "cache_h100_warm"], 8, 128),
    "cache peers h100": lambda: peers("cache_h100_peers", ["torch.compile", "torch eager"], 8, 128),
    "decode h100": lambda: times("decode_h100", 32, 8, 128),
    "decode h200": lambda: times("decode_h200", 32, 8, 128),
    "decode cpu": lambda: times("decode_cpu", 32, 8, 128, threads=1),
    "decode small h100": lambda: beside(["decode_h100", "decode_h100_pdl", "decode_h100_warm"], 32, 8, 128),
    "decode peers h100": lambda: peers("decode_h100_peers", ["separate ops", "torch.compile", "torch eager"], 32, 8, 128),
    "attention cpu": lambda: attention("attention_cpu", threads=1),
    "host": lambda: host({"H100": "h100", "H200": "h200", "CPU": "cpu"}),
}


def render(page: str) -> str:
    """The page with every table regenerated."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
