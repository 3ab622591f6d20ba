"""What a benchmark found, and how it is shown: tables and pictures."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import fp8kv

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass
class Row:
    """One measurement. Times are in microseconds, `gbps` is 1e9 bytes a second, `share` is floor / time."""

    work: str
    shape: list[int]
    us: float
    gbps: float
    floor_us: float
    share: float
    peers: dict[str, float] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    isa: str | None = None
    threads: int | None = None


@dataclass
class Report:
    """All measurements of one run on one device.

    `warm`: the buffers stayed in the L2 cache. `pdl`: with programmatic dependent launch (FP8KV_PDL=1).
    `notes`: what was left out and why, and in which cases.
    """

    what: str
    device: str
    torch: str
    date: str
    fp8kv: str
    floor: str
    warm: bool = False
    pdl: bool = False
    rows: list[Row] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def begin(what: str, device: str, floor: str) -> Report:
        """An empty report of this version, of now."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Report(what, device, torch.__version__, now, fp8kv.__version__, floor)

    @property
    def title(self) -> str:
        warm = ", buffers in the L2 cache" if self.warm else ""
        pdl = ", FP8KV_PDL=1" if self.pdl else ""
        return f"fp8kv {self.fp8kv} on {self.device}{warm}{pdl}"

    def note(self, text: str, case: str) -> None:
        self.notes.setdefault(text, []).append(case)

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


# Tables


def table(report: Report) -> Table:
    """The report as a rich table."""
    from rich.table import Table

    on_cpu = any(row.isa for row in report.rows)
    with_models = any(row.models for row in report.rows)
    peers = list(dict.fromkeys(name for row in report.rows for name in row.peers))
    result = Table(title=f"{report.title}, bf16 and e4m3, PyTorch {report.torch}")
    for name in ("work", *(("models",) if with_models else ())):
        result.add_column(name, no_wrap=True)
    for name in (
        "shape",
        *(("isa", "threads") if on_cpu else ()),
        "us",
        "GB/s",
        "copy us",
        "share of copy",
        *peers,
    ):
        result.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for row in report.rows:
        if previous and row.work != previous:
            result.add_section()
        color = "green" if row.share >= 0.9 else "yellow" if row.share >= 0.7 else "red"
        cells = [row.work if row.work != previous else ""]
        if with_models:
            cells.append(", ".join(row.models))
        cells.append(_times(row.shape))
        if on_cpu:
            cells += [row.isa or "", str(row.threads)]
        cells += [f"{row.us:.2f}", f"{row.gbps:.0f}", f"{row.floor_us:.2f}", f"[{color}]{row.share:.0%}[/]"]
        cells += [f"{row.peers[name]:.2f}" if name in row.peers else "" for name in peers]
        result.add_row(*cells)
        previous = row.work
    return result


def host_table(report: Report) -> Table:
    """The host cost of the report as a rich table."""
    from rich.table import Table

    result = Table(title=f"Host cost of an eager call on {report.device}")
    result.add_column("call")
    result.add_column("us", justify="right")
    result.add_column("of torch.zero_", justify="right")
    base = report.host.get("torch.zero_", math.nan)
    for name, us in report.host.items():
        result.add_row(name, f"{us:.2f}", f"{us / base:.2f}")
    return result


# Pictures


def plot(report: Report, path: Path, target: float = 0.95) -> None:
    """Writes a picture (PNG) of the share of a copy by work, with a line at `target`.

    A bar for each shape of quantization. For caches and steps a panel for each work, the share over the
    number of tokens, with a line for each geometry.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw = _plot_bars if report.what == "quantize" else _plot_lines
    figure = draw(report, target)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_bars(report: Report, target: float) -> Figure:
    from matplotlib import pyplot

    works = list(dict.fromkeys(row.work for row in report.rows))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.22 * len(report.rows)), layout="constrained")
    labels = [_label(row) for row in report.rows]
    colors = dict(zip(dict.fromkeys(labels), _colors(len(set(labels))), strict=True))
    y = 0.0
    ticks: list[float] = []
    for work in works:
        first = y
        for row, label in zip(report.rows, labels, strict=True):
            if row.work != work:
                continue
            axes.barh(y, row.share * 100, height=0.9, color=colors[label])
            axes.text(row.share * 100 + 0.5, y, f"{row.us:.2f} us", va="center", fontsize=7)
            y += 1
        ticks.append((first + y - 1) / 2)
        y += 0.8
    axes.set_yticks(ticks, works)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.axvline(target * 100, color="black", linewidth=0.8, linestyle="--", label=f"target {target:.0%}")
    axes.set_xlabel("share of a copy of the same bytes, % (longer is faster)")
    axes.set_title(report.title)
    for label, color in colors.items():
        axes.barh(0, 0, color=color, label=label)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _plot_lines(report: Report, target: float) -> Figure:
    """Threads differ in the style of the lines; of the CPU's instruction sets only the best is shown."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    isa = report.rows[-1].isa
    rows = [row for row in report.rows if row.isa == isa]
    works = list(dict.fromkeys(row.work for row in rows))
    geometries = {tuple(row.shape[1:]): row.models for row in rows}
    colors = dict(zip(geometries, _colors(len(geometries)), strict=True))
    styles: dict[int | None, Literal["-", ":"]] = dict(
        zip(dict.fromkeys(row.threads for row in rows), ("-", ":"), strict=False)
    )
    columns = min(3, len(works))
    lines = -(-len(works) // columns)
    figure, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(1 + 4 * columns, 2 + 3 * lines),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axes in grid.flat[len(works) :]:
        axes.set_axis_off()
    for axes, work in zip(grid.flat, works, strict=False):
        for geometry, threads in product(geometries, styles):
            line = [
                row
                for row in rows
                if (row.work, tuple(row.shape[1:]), row.threads) == (work, geometry, threads)
            ]
            axes.plot(
                [row.shape[0] for row in line],
                [row.share * 100 for row in line],
                styles[threads],
                color=colors[geometry],
                marker=".",
            )
        axes.axhline(100, color="black", linewidth=0.8)
        axes.axhline(target * 100, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({row.shape[0] for row in rows}), map(str, ticks))
        axes.set_xlabel("tokens")
        axes.set_title(work, fontsize=10)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(bottom=0)
    legend = [
        Line2D([], [], color=colors[geometry], label=" ".join((_times(geometry), ", ".join(models))))
        for geometry, models in geometries.items()
    ]
    legend += [
        Line2D([], [], color="gray", linestyle=style, label=f"threads: {threads}")
        for threads, style in styles.items()
        if threads
    ]
    legend.append(Line2D([], [], color="black", linestyle="--", label=f"target {target:.0%}"))
    figure.legend(handles=legend, fontsize=8, loc="outside lower center", ncols=columns + 1)
    figure.supylabel("share of a copy of the same bytes, %", fontsize=10)
    figure.suptitle(report.title + (f", {isa}" if isa else ""), fontsize=10)
    return figure


def _label(row: Row) -> str:
    name = _times(row.shape)
    return f"{name}, {row.isa}, {row.threads} thr." if row.isa else name


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.9) for i in range(count)]
