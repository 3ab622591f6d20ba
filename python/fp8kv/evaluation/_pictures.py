"""Plots (PNG) of an evaluation, and of the scales of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8kv._checks import is_scale, require
from fp8kv.evaluation._results import REFERENCE, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LogNorm
    from matplotlib.figure import Figure

    from fp8kv.evaluation.inspection import Inspection


def plot_evaluation(evaluation: Evaluation, path: Path, inspection: Inspection | None = None) -> None:
    """Writes a plot (PNG): accuracy and memory of every cache, and the scales of a checkpoint if given."""
    require("matplotlib", "plot", "a picture")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11 if inspection is None else 16, 6), layout="constrained")
    if inspection is None:
        left: Any = figure.add_gridspec(2, 2)
    else:
        outer = figure.add_gridspec(1, 2, width_ratios=(11, 5.5))
        left = outer[0].subgridspec(2, 2)
        _plot_scales(figure, outer[1].subgridspec(1, 2), inspection)
    rows = evaluation.rows
    panels: list[tuple[str, list[float], str]] = [
        ("KL divergence from the 16-bit cache", [row.kl for row in rows], "{:.4f}"),
        (
            "another top token than with the 16-bit cache, %",
            [100 * (1 - x.agreement) for x in rows],
            "{:.1f}",
        ),
        ("perplexity", [row.perplexity for row in rows], "{:.2f}"),
        ("cache, MiB", [row.nbytes / 2**20 for row in rows], "{:.2f}"),
    ]
    for index, (title, values, form) in enumerate(panels):
        axes = figure.add_subplot(left[index // 2, index % 2])
        _plot_bars(axes, title, [row.cache for row in rows], values, form)
    figure.suptitle(
        f"KV caches of {evaluation.model}: {evaluation.num_windows} windows of {evaluation.window} tokens",
        parse_math=False,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_bars(axes: Axes, title: str, names: list[str], values: list[float], form: str) -> None:
    colors = ["#8a95a3" if name == REFERENCE else "#2f7ebc" for name in names]
    finite = [x if math.isfinite(x) else 0.0 for x in values]
    axes.barh(names, finite, color=colors)
    for y, (value, length) in enumerate(zip(values, finite, strict=True)):
        axes.text(length, y, f" {form.format(value)}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.17)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_scales(figure: Figure, grid: Any, inspection: Inspection) -> None:
    """The scales of K and V by layer and head."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    colors, norm = colormaps["viridis"], LogNorm(*color_range(inspection))
    panels = [figure.add_subplot(grid[0, i]) for i in range(2)]
    for axes, name in zip(panels, "kv", strict=True):
        draw(axes, inspection, name, num_heads(inspection, name), colors, norm)
        axes.set_title(f"scales of {name.upper()}", fontsize=10)
    panels[0].set_ylabel("layer")
    figure.colorbar(ScalarMappable(norm, colors), ax=panels, fraction=0.08, aspect=40)


# Scales

_UNUSABLE, _OUTSIDE, _MISSING, _NO_HEAD = "#d62728", "#ff5fd2", "#cfd8e3", "#ffffff"
_SPECIAL = {
    _UNUSABLE: "not finite or not above 0",
    _OUTSIDE: "implausible: beyond the color scale",
    _MISSING: "missing",
    _NO_HEAD: "no such head",
}


def plot_scales(inspection: Inspection, path: Path) -> None:
    """Writes a heat map (PNG): the scales of K, V and Q by layer and head, on a logarithmic color scale.

    Scales that are missing, unusable, or far from the unsuspicious ones have distinct colors.
    """
    require("matplotlib", "plot", "a picture")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogFormatter

    names = "kvq" if inspection.has_query_scales else "kv"
    heads = {name: num_heads(inspection, name) for name in names}
    widths = [min(max(1.2, (0.65 if heads[name] <= 4 else 0.3) * heads[name]), 7.0) for name in names]
    height = min(max(3.2, 0.19 * len(inspection.layers)), 12.0)
    figure, grid = pyplot.subplots(
        1,
        len(names),
        figsize=(2.6 + sum(widths) + 0.3 * len(names), height + 1.6),
        width_ratios=widths,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    low, high = color_range(inspection)
    colors, norm = pyplot.get_cmap("viridis"), LogNorm(low, high)
    seen: set[str] = set()
    for axes, name in zip(grid.flat, names, strict=True):
        seen |= draw(axes, inspection, name, heads[name], colors, norm)
    grid[0, 0].set_ylabel("layer")
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=list(grid.flat), label="scale", fraction=0.1, aspect=30)
    bar.ax.yaxis.set_major_formatter(LogFormatter())
    bar.ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    patches = [Patch(facecolor=color, edgecolor="black", label=label) for color, label in _SPECIAL.items() if color in seen]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    figure.suptitle(f"Scales of {inspection.name}", parse_math=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def num_heads(inspection: Inspection, name: str) -> int:
    """The columns of a panel: the largest number of scales of "k", "v" or "q" in a layer."""
    return max((len(getattr(row, name) or ()) for row in inspection.layers), default=1) or 1


def color_range(inspection: Inspection) -> tuple[float, float]:
    """The range of the scales without an error, and of all others within a factor of ten."""
    healthy: list[float] = []
    others: list[float] = []
    for row in inspection.layers:
        for name in "kvq":
            wrong = any(p.severity == "error" for p in inspection.problems_of(row.layer, name))
            (others if wrong else healthy).extend(x for x in getattr(row, name) or () if is_scale(x))
    values = healthy or others or [1.0]
    low, high = min(values), max(values)
    values += [x for x in others if low / 10 <= x <= high * 10]
    low, high = min(values), max(values)
    return (low, high) if low < high else (low / 2, high * 2)  # a range needs two values


def draw(axes: Axes, inspection: Inspection, name: str, num_heads: int, colors: Colormap, norm: LogNorm) -> set[str]:
    """Draws one panel; returns the special colors it uses."""
    from matplotlib.colors import to_rgba
    from matplotlib.ticker import MaxNLocator

    rows = [getattr(row, name) for row in inspection.layers]
    image = []
    seen: set[str] = set()
    for values in rows:
        special = [_special_color(values, head, norm) for head in range(num_heads)]
        seen.update(color for color in special if color is not None)
        image.append([colors(norm(values[head])) if c is None else to_rgba(c) for head, c in enumerate(special)])
    if not image:
        axes.set_axis_off()
        return seen
    layers = [row.layer for row in inspection.layers]
    axes.imshow(
        image, aspect="auto", interpolation="nearest",
        extent=(-0.5, num_heads - 0.5, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_title({"k": "K", "v": "V", "q": "Q"}[name])
    axes.set_xlabel("per tensor" if num_heads == 1 else "head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if num_heads == 1:
        axes.set_xticks([])
    step = -(-len(layers) // 40)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    if num_heads <= 4 and len(layers) <= 60:
        for y, values in enumerate(rows):
            for x, value in enumerate(values or ()):
                ink = "white" if sum(image[y][x][:3]) < 1.5 else "black"
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=7, color=ink)
    return seen


def _special_color(values: list[float] | None, head: int, norm: LogNorm) -> str | None:
    """None where the color shows the value."""
    if values is None:
        return _MISSING
    if head >= len(values):
        return _NO_HEAD
    if not is_scale(values[head]):
        return _UNUSABLE
    assert norm.vmin is not None
    assert norm.vmax is not None
    return None if norm.vmin <= values[head] <= norm.vmax else _OUTSIDE
