"""Regenerates the tables of README.md and of the pages on performance from benchmarks/results.

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
PAGES = [ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "performance_h100.md"]

Shape = tuple[int, ...]
Row = dict[str, Any]
Cell = Callable[[str, Shape], str]


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
    """Microseconds: ours / those of the others that were measured, "-" where one can't do it."""
    results = Results(name)
    measured = {other for row in results.rows.values() for other in row["peers"]}
    others = [other for other in others if other in measured]

    def cell(work: str, shape: Shape) -> str:
        row = results.rows.get((work, shape))
        if row is None or not row["peers"]:
            return ""
        found = (row["peers"].get(other) for other in others)
        return " / ".join([_number(row["us"]), *("-" if us is None else _number(us) for us in found)])

    works = [work for work in results.works() if any(cell(work, shape) for shape in results.shapes(*geometry))]
    shapes = [shape for shape in shapes or results.shapes(*geometry) if any(cell(work, shape) for work in works)]
    return _matrix(works, shapes, cell)


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


SMALL = [(1, 4096), (16, 4096), (128, 4096), (1024, 4096)]
VLLM = {"h100": (), "h200": ("vllm",)}  # where it was installed


def tables_of(card: str) -> dict[str, Callable[[], str]]:
    """Those of quantization, caches and steps on a GPU."""

    def runs(what: str) -> list[str]:
        return [f"{what}_{card}", f"{what}_{card}_pdl", f"{what}_{card}_warm"]

    pytorch = ["torch.compile", "torch eager", *VLLM[card]]
    geometries = [(8192, 8, 64), (8192, 1, 128), (8192, 4, 128), (8192, 32, 128)]
    return {
        f"quantize {card}": lambda: times(f"quantize_{card}"),
        f"quantize small {card}": lambda: beside(runs("quantize"), shapes=SMALL),
        f"quantize peers {card}": lambda: peers(f"quantize_{card}_peers", pytorch, shapes=[*SMALL, (8192, 4096)]),
        f"cache {card}": lambda: times(f"cache_{card}", 8, 128),
        f"cache 32 {card}": lambda: times(f"cache_{card}", 32, 128),
        f"cache geometries {card}": lambda: times(f"cache_{card}", shapes=geometries),
        f"cache small {card}": lambda: beside(runs("cache"), 8, 128),
        f"cache peers {card}": lambda: peers(f"cache_{card}_peers", pytorch, 8, 128),
        f"decode {card}": lambda: times(f"decode_{card}", 32, 8, 128),
        f"decode small {card}": lambda: beside(runs("decode"), 32, 8, 128),
        f"decode peers {card}": lambda: peers(
            f"decode_{card}_peers", ["separate ops", "torch.compile", "torch eager"], 32, 8, 128
        ),
    }


TABLES: dict[str, Callable[[], str]] = {
    "quantize shares": lambda: shares(
        "quantize_h200",
        {
            "static, per tensor": "static tensor",
            "static, per channel": "static channel",
            "static, per head of 128": "static head 128",
            "dynamic, per token": "dynamic token",
            "dynamic, per tensor": "dynamic tensor",
        },
        shapes=[(1, 4096), (128, 4096), (1024, 4096), (8192, 4096), (16384, 8192)],
    ),
    **tables_of("h200"),
    **tables_of("h100"),
    "quantize cpu": lambda: times("quantize_cpu", threads=1),
    "cache cpu": lambda: times("cache_cpu", 8, 128, threads=1),
    "decode cpu": lambda: times("decode_cpu", 32, 8, 128, threads=1),
    "attention h200": lambda: attention("attention_h200"),
    "attention peers h200": lambda: attention("attention_h200_peers"),
    "attention int8 h200": lambda: attention("attention_h200_int8"),
    "attention cpu": lambda: attention("attention_cpu", threads=1),
    "host": lambda: host({"H200": "h200", "H100": "h100", "CPU": "cpu"}),
}


def render(page: str) -> str:
    """The page with every table regenerated."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
