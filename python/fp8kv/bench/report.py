"""Results of a benchmark, as tables and plots."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8kv import _ops
from fp8kv._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from rich.table import Table


@dataclass
class Row:
    """One measurement. Times are in microseconds, `gbps` is 1e9 bytes a second, `share` is floor / time.

    `errors`: the results of `Case.error`, of this library and of peers, if results are not exact.
    """

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
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """All measurements of one run on one device.

    `against`: "copy" or "read", the operation of the floor. `specified_gbps`: the card's specified bandwidth.
    `warm`: the buffers stayed in the L2 cache. `pdl`: with programmatic dependent launch (FP8KV_PDL=1).
    `notes`: what was omitted and why, and in which cases.
    """

    what: str
    device: str
    torch: str
    date: str
    fp8kv: str
    floor: str
    against: str = "copy"
    specified_gbps: float | None = None
    warm: bool = False
    pdl: bool = False
    rows: list[Row] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def begin(what: str, device: str, floor: str) -> Report:
        """An empty report with the current version and time."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Report(what, device, torch.__version__, now, _ops.version(), floor)

    @property
    def title(self) -> str:
        warm = ", buffers in the L2 cache" if self.warm else ""
        pdl = ", FP8KV_PDL=1" if self.pdl else ""
        return f"fp8kv {self.fp8kv} on {self.device}{warm}{pdl}"

    def note(self, text: str, case: str) -> None:
        self.notes.setdefault(text, []).append(case)

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read_json(path: Path) -> Report:
        """Reads a report written by `write_json`."""
        fields = json.loads(path.read_text())
        return Report(**fields | {"rows": [Row(**row) for row in fields["rows"]]})


# Tables


def table(report: Report) -> Table:
    """The report as a rich table; peers with known errors are in a separate one, `peer_table`."""
    require("rich", "cli", "a table")
    from rich.table import Table

    on_cpu = any(row.isa for row in report.rows)
    with_models = any(row.models for row in report.rows)
    inexact = any(row.errors for row in report.rows)
    peers = [] if inexact else _peers_of(report)
    result = Table(title=f"{report.title}, bf16 and e4m3 where no format is named, PyTorch {report.torch}")
    for name in ("work", *(("models",) if with_models else ())):
        result.add_column(name, no_wrap=True)
    for name in (
        "shape",
        *(("isa", "threads") if on_cpu else ()),
        "us",
        "GB/s",
        *(("of specified",) if report.specified_gbps else ()),
        f"{report.against} us",
        f"share of {report.against}",
        *(("error",) if inexact else ()),
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
        cells += [f"{row.us:.2f}", f"{row.gbps:.0f}"]
        if report.specified_gbps:
            cells.append(f"{row.gbps / report.specified_gbps:.0%}")
        cells += [f"{row.floor_us:.2f}", f"[{color}]{row.share:.0%}[/]"]
        if inexact:
            cells.append(f"{row.errors[OURS]:.1e}" if OURS in row.errors else "")
        cells += [f"{row.peers[name]:.2f}" if name in row.peers else "" for name in peers]
        result.add_row(*cells)
        previous = row.work
    return result


def peer_table(report: Report) -> Table | None:
    """Microseconds and error of peers, the fastest first, if errors are known; otherwise None.

    On a CPU, compared with the last instruction set, which is the best.
    """
    require("rich", "cli", "a table")
    from rich.table import Table

    rows = [row for row in _of_last_isa(report) if row.errors and row.peers]
    if not rows:
        return None
    isa = rows[0].isa
    result = Table(title=f"Compared with peers on {report.device}" + (f", {isa}" if isa else ""))
    result.add_column("work", no_wrap=True)
    for name in ("shape", *(("threads",) if isa else ()), f"{OURS} us", "fastest peer"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("peers: us (relative error)")
    for row in rows:
        peers = sorted(row.peers.items(), key=lambda peer: peer[1])
        result.add_row(
            row.work,
            _times(row.shape),
            *((str(row.threads),) if isa else ()),
            _us(row.us),
            f"{peers[0][1] / row.us:.2f} x",
            ", ".join(f"{name} {_us(us)} ({row.errors[name]:.1e})" for name, us in peers),
        )
    return result


def _peers_of(report: Report) -> list[str]:
    return list(dict.fromkeys(name for row in report.rows for name in row.peers))


def _of_last_isa(report: Report) -> list[Row]:
    """All rows, or on a CPU the rows of its last instruction set, which is the best."""
    return [row for row in report.rows if row.isa == report.rows[-1].isa]


def host_table(report: Report) -> Table:
    """The host cost of the report as a rich table."""
    require("rich", "cli", "a table")
    from rich.table import Table

    result = Table(title=f"Host cost of an eager call on {report.device}")
    result.add_column("call")
    result.add_column("us", justify="right")
    result.add_column("of torch.zero_", justify="right")
    base = report.host.get("torch.zero_", math.nan)
    for name, us in report.host.items():
        result.add_row(name, f"{us:.2f}", f"{us / base:.2f}")
    return result


# Plots


def plot(report: Report, path: Path) -> None:
    """Writes a plot (PNG) of the share of the floor, with a panel per case and a line at `MARK`.

    For quantization, one bar per shape. For caches and steps, the share over the number of tokens, with one
    line per geometry. For attention, one panel per case and geometry, with a line for this library and for
    each peer over the sizes. Of the CPU's instruction sets only the last, which is the best.
    """
    require("matplotlib", "plot", "a chart")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _of_last_isa(report)
    isa = rows[0].isa
    draw = {"quantize": _draw_bars, "attention": _draw_peers}.get(report.what, _draw_lines)
    works: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row.work}\n{_geometry(row)}" if draw is _draw_peers else row.work
        works.setdefault(title, []).append(row)
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
    panels = []
    for axes, (title, panel) in zip(grid.flat, works.items(), strict=False):
        axes.set_title(title, fontsize=10)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        panels.append((axes, panel))
    legend = draw(panels, rows)
    legend.append(_line(f"{MARK:.0%} of a {report.against}", color="black", linestyle="--"))
    figure.legend(handles=legend, fontsize=8, loc="outside lower center", ncols=columns + 1)
    figure.suptitle(report.title + (f", {isa}" if isa else ""), fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


#: The name of this library among its peers.
OURS = "fp8kv"
#: The share of the floor at which a dashed line is drawn.
MARK = 0.95
SHARE = "share of a copy of the same bytes, %"
Panels = Sequence[tuple["Axes", list[Row]]]  # one case each


def _draw_bars(panels: Panels, rows: Sequence[Row]) -> list[Line2D]:
    """One bar per shape and number of threads. Returns the legend."""
    threads = list(dict.fromkeys(row.threads for row in rows))
    shapes = list(dict.fromkeys(tuple(row.shape) for row in rows))
    colors = dict(zip(threads, _colors(len(threads)), strict=True))
    height = 0.9 / len(threads)
    for axes, panel in panels:
        for row in panel:
            y = shapes.index(tuple(row.shape)) - 0.45 + height * (threads.index(row.threads) + 0.5)
            axes.barh(y, row.share * 100, height=height, color=colors[row.threads], alpha=0.5)
            axes.text(2, y, f"{_us(row.us)} us", va="center", fontsize=7)
        axes.set_yticks(range(len(shapes)), [_times(shape) for shape in shapes], fontsize=8)
        axes.set_xlim(0, max(110, 100 * max(row.share for row in rows)))
        axes.set_xlabel(SHARE)
        _mark(axes.axvline)
    panels[0][0].invert_yaxis()
    return [_line(f"threads: {n}", color=colors[n], alpha=0.5, linewidth=5) for n in threads if n]


def _draw_lines(panels: Panels, rows: Sequence[Row]) -> list[Line2D]:
    """One line per geometry over the number of tokens, with one style per number of threads."""
    geometries = {tuple(row.shape[1:]): row.models for row in rows}
    colors = dict(zip(geometries, _colors(len(geometries)), strict=True))
    styles = dict(zip(dict.fromkeys(row.threads for row in rows), ("-", ":"), strict=False))
    tokens = sorted({row.shape[0] for row in rows})
    for axes, panel in panels:
        for geometry, threads in product(geometries, styles):
            line = [row for row in panel if (tuple(row.shape[1:]), row.threads) == (geometry, threads)]
            axes.plot(
                [row.shape[0] for row in line],
                [row.share * 100 for row in line],
                linestyle=styles[threads],
                color=colors[geometry],
                marker=".",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, map(str, tokens))
        axes.set_xlabel("tokens")
        axes.set_ylim(0, max(110, 103 * max(row.share for row in rows)))
        axes.set_ylabel(SHARE)
        _mark(axes.axhline)
    legend = [
        _line(" ".join((_times(geometry), ", ".join(models))), color=colors[geometry])
        for geometry, models in geometries.items()
    ]
    return legend + [_line(f"threads: {n}", color="gray", linestyle=style) for n, style in styles.items() if n]


def _draw_peers(panels: Panels, rows: Sequence[Row]) -> list[Line2D]:
    """One line for this library and for each peer over batch x context, with one style per number of threads.

    The share is relative to a read of the FP8 cache, also for peers that read 16 bits.
    """
    from matplotlib import colormaps

    def shares(row: Row) -> dict[str, float]:
        return {name: 100 * row.floor_us / us for name, us in ({OURS: row.us} | row.peers).items()}

    names = list(dict.fromkeys(name for row in rows for name in shares(row)))
    colors = dict(zip(names, ["black", *map(colormaps["tab10"], range(10))], strict=False))
    styles = dict(zip(dict.fromkeys(row.threads for row in rows), ("-", ":"), strict=False))
    highest = max(share for row in rows for share in shares(row).values())
    for axes, panel in panels:
        sizes = list(dict.fromkeys(_times(row.shape[:2]) for row in panel))
        for name, threads in product(names, styles):
            line = [row for row in panel if row.threads == threads and name in shares(row)]
            axes.plot(
                [sizes.index(_times(row.shape[:2])) for row in line],
                [shares(row)[name] for row in line],
                linestyle=styles[threads],
                color=colors[name],
                linewidth=2 if name == OURS else 1,
                marker=".",
            )
        axes.set_xticks(range(len(sizes)), sizes, fontsize=7, rotation=30)
        axes.set_xlabel("sequences x tokens")
        axes.set_ylabel("share of a read of K and V in FP8, %", fontsize=8)
        _mark(axes.axhline)
        axes.set_ylim(0, 110 if highest > 50 else 1.1 * highest)
    legend = [_line(name, color=color) for name, color in colors.items()]
    return legend + [_line(f"threads: {n}", color="gray", linestyle=style) for n, style in styles.items() if n]


def _geometry(row: Row) -> str:
    """Heads and head size of attention, and the models that have them."""
    return " ".join((_times(row.shape[2:]), ", ".join(row.models)))


def _mark(line: Callable[..., object]) -> None:
    line(100, color="black", linewidth=0.8)
    line(MARK * 100, color="black", linewidth=0.8, linestyle="--")


def _line(label: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def _us(us: float) -> str:
    return f"{us:,.2f}" if us < 100 else f"{us:,.0f}"


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.9) for i in range(count)]
