"""What an FP8 KV cache costs a language model: perplexity, divergence from the 16-bit cache, memory, speed.

Described in docs/evaluation.md. `fp8kv eval` and `fp8kv demo` are made of it.

Example:
    >>> import torch
    >>> from fp8kv.evaluation import compare
    >>> logits = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    >>> compare(logits, logits, torch.tensor([1, 2])).agreeing
    2
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fp8kv._model_reader import cache_argument
from fp8kv.attention_scales import AttentionScales
from fp8kv.calibration import calibrate
from fp8kv.checkpoint import KVCacheScheme, KVScales, LayerScales

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from fp8kv.inspection import Inspection

#: Makes a cache with room for as many tokens.
CacheFactory = Callable[[int], Any]

REFERENCE = "16-bit"
PER_TENSOR, PER_HEAD, ON_THE_FLY = "e4m3 per tensor", "e4m3 per head", "e4m3 on the fly"
#: The rows that need no more than the model, and those that need scales, in the order of the table.
CACHES = (
    REFERENCE, "e4m3 scale 1.0", PER_TENSOR, PER_HEAD, "e4m3 per token-head", ON_THE_FLY, "e5m2 scale 1.0",
)  # fmt: skip
DECODED_TOKENS = 16
_CHUNK = 128  # positions whose logits are in float32 at a time


@dataclass(frozen=True)
class Row:
    """What was measured of one cache.

    Attributes:
        cache: its name.
        perplexity: of the text, token by token within each window.
        kl: mean Kullback-Leibler divergence of its next-token distribution from that with the 16-bit cache.
        agreement: share of the positions at which both find the same token the most likely.
        nbytes: of the cache, with a window and the tokens decoded after it.
        tokens_per_s: of greedy decoding after a window, one sequence.
    """

    cache: str
    perplexity: float
    kl: float
    agreement: float
    nbytes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Evaluation:
    """The rows of all caches, and how they were measured."""

    model: str
    device: str
    dtype: str
    cache_dtype: str
    layout: str
    num_windows: int
    window: int
    decoded_tokens: int
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an infinite perplexity becomes the string "inf"."""
        import fp8kv

        result = asdict(self)
        for row in result["rows"]:
            row.update({k: str(x) for k, x in row.items() if isinstance(x, float) and not math.isfinite(x)})
        return {"fp8kv": fp8kv.__version__, "torch": torch.__version__, **result}


class Comparison(NamedTuple):
    """Sums over the positions of a window."""

    nll: float
    kl: float
    agreeing: int

    def plus(self, other: Comparison) -> Comparison:
        """The sums over the positions of both."""
        return Comparison(self.nll + other.nll, self.kl + other.kl, self.agreeing + other.agreeing)


# Measuring


def evaluate(
    model: Any,
    windows: Tensor,
    caches: Mapping[str, CacheFactory],
    *,
    decoded_tokens: int = DECODED_TOKENS,
    progress: Callable[[str], object] = lambda what: None,
) -> list[Row]:
    """Runs the model on every window once with each cache, and compares all with the first.

    Args:
        model: a causal language model of `transformers`, in eval mode.
        windows: its tokens, ``[num_windows, window]``.
        caches: by name; the first is what the others are compared with.
        decoded_tokens: to be decoded after the first window, for the speed; at least 1.
        progress: called before each run with its cache's name, ``len(windows) * len(caches)`` times.

    Returns:
        One row for each cache, in their order.

    Raises:
        ValueError: there is no cache, no window, or a window has less than two tokens.
    """
    if not caches or windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            "evaluate: windows must be [num_windows, window] with at least two tokens, and caches not empty, "
            f"got {list(windows.shape)} and {len(caches)} caches"
        )
    num_windows, size = windows.shape
    sums = {name: Comparison(0.0, 0.0, 0) for name in caches}
    speed: dict[str, float] = {}
    nbytes: dict[str, int] = {}
    with torch.no_grad():
        for number, window in enumerate(windows.to(model.device)):
            expected: Tensor | None = None
            for name, make in caches.items():
                progress(name)
                cache = make(size + decoded_tokens)
                logits = _run(model, window[None], cache)[0]
                expected = logits if expected is None else expected
                found = compare(expected, logits, window[1:])
                sums[name] = sums[name].plus(found)
                if number == 0:
                    _, seconds = decode(model, logits[-1].argmax(), cache, decoded_tokens)
                    speed[name], nbytes[name] = decoded_tokens / seconds, cache.nbytes
    count = num_windows * size
    return [
        Row(
            name,
            _exp(total.nll / (count - num_windows)),
            max(0.0, total.kl / count),  # rounding errors alone may be negative
            total.agreeing / count,
            nbytes[name],
            speed[name],
        )
        for name, total in sums.items()
    ]


def compare(expected: Tensor, logits: Tensor, labels: Tensor) -> Comparison:
    """How far `logits` are from the `expected` ones, both ``[positions, vocabulary]``, in float32.

    Args:
        labels: the token after each position; the last ones may be unknown, so there may be fewer.
    """
    nll = kl = 0.0
    agreeing = 0
    for start in range(0, len(logits), _CHUNK):
        here = slice(start, start + _CHUNK)
        p, q = (x[here].float().log_softmax(-1) for x in (expected, logits))
        known = labels[here]
        nll -= q[: len(known)].gather(1, known[:, None]).double().sum().item()
        if logits is expected:
            agreeing += len(q)
            continue
        kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Comparison(nll, kl, agreeing)


def prefill(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Puts ``ids`` ``[1, tokens]`` into the cache, and returns the most likely next token."""
    with torch.no_grad():
        return _run(model, ids, cache)[0, -1].argmax()


def decode(model: Any, token: Tensor, cache: Any, num_tokens: int) -> tuple[list[int], float]:
    """Decodes greedily, one token at a time.

    Args:
        token: the first one, which is not in the cache yet.
        cache: has the tokens before it; has `num_tokens` more afterwards.

    Returns:
        The first token and those that followed it, `num_tokens + 1` in all, and the seconds it took.
    """
    tokens = [token]
    with torch.no_grad():
        _wait(model)
        start = time.perf_counter()
        for _ in range(num_tokens):
            tokens.append(_run(model, tokens[-1].view(1, 1), cache)[0, -1].argmax())
        _wait(model)
        return [int(x) for x in tokens], time.perf_counter() - start


def _run(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits
    return logits


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


# What is measured


def windows_of(tokenizer: Any, text: str, num_windows: int, window: int, skip: int = 0) -> Tensor:
    """The first windows of a text, one after the other: ``[num_windows, window]``.

    Args:
        tokenizer: of `transformers`. If it begins a text with a special token, every window begins with it.
        skip: tokens of the text to leave out at its beginning.

    Raises:
        ValueError: the text is too short.
    """
    start = tokenizer("")["input_ids"][:1]
    start = start if start == [tokenizer.bos_token_id] and window > 1 else []
    size = window - len(start)
    # So much of a long text is tokens enough, in any language; all of it would take long.
    needed = skip + num_windows * size
    ids = tokenizer(text[: 40 * needed], add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < needed:
        raise ValueError(f"the text must have at least {needed} tokens, got {len(ids)}")
    return torch.tensor([start + ids[i : i + size] for i in range(skip, needed, size)])


def calibrated(
    model: Any,
    calibration: Tensor,
    first: Tensor,
    names: Collection[str],
    cache_dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
) -> dict[str, KVScales]:
    """The scales that the rows of these names need, of those that are found by running the model.

    Args:
        calibration: tokens ``[num_windows, window]`` for `fp8kv.calibrate`.
        first: tokens likewise, for the scales that are calculated on the fly: the first that the model sees.
        names: of `CACHES`.
        progress: whether to show bars.
    """
    scales = {}
    if PER_TENSOR in names or PER_HEAD in names:
        batches = torch.split(calibration, 1)
        by_head = calibrate(model, batches, strategy="attn_head", progress=progress)
        scales = {PER_TENSOR: per_tensor(by_head), PER_HEAD: by_head}
    if ON_THE_FLY in names:
        scales[ON_THE_FLY] = on_the_fly(model, first, cache_dtype)
    return scales


def per_tensor(by_head: KVScales) -> KVScales:
    """The largest scale of the heads of each layer: what calibration per tensor finds in the same texts.

    Example:
        >>> import torch
        >>> from fp8kv import KVCacheScheme, KVScales, LayerScales
        >>> from fp8kv.evaluation import per_tensor
        >>> layer = LayerScales(q=None, k=torch.tensor([0.02, 0.03]), v=torch.tensor([0.05, 0.01]))
        >>> per_tensor(KVScales({0: layer}, KVCacheScheme("attn_head")))[0].k
        tensor([0.0300])
    """
    layers = {
        i: LayerScales(*(None if x is None else x.amax().view(1) for x in (layer.q, layer.k, layer.v)))
        for i, layer in by_head.items()
    }
    return KVScales(layers, replace(by_head.scheme, strategy="tensor"))


def on_the_fly(model: Any, first: Tensor, cache_dtype: torch.dtype = torch.bfloat16) -> KVScales:
    """Scales as an engine calculates them: `fp8kv.AttentionScales` observe the first tokens, then freeze."""
    from fp8kv._evaluated_caches import ObservingCache

    attention: dict[int, AttentionScales] = {}
    with torch.no_grad():
        for window in first.to(model.device):
            _run(model, window[None], ObservingCache(model.config, cache_dtype, attention))
    for layer in attention.values():
        layer.freeze()
    layers = {i: LayerScales(q=None, k=x.k_scale, v=x.v_scale) for i, x in attention.items()}
    return KVScales(layers, KVCacheScheme("tensor", observer="static_minmax"))


def caches(
    config: Any,
    names: Iterable[str],
    scales: Mapping[str, KVScales],
    cache_dtype: torch.dtype = torch.bfloat16,
    layout: str = "NHD",
) -> dict[str, CacheFactory]:
    """Factories of the caches of these names: of `CACHES`, or of `scales`.

    Args:
        config: of the model.
        scales: by name.
        cache_dtype: of the 16-bit cache.
        layout: "NHD" or "HND", of the FP8 caches.
    """
    from fp8kv._evaluated_caches import Cache8, Cache16

    def fp8(scales: Any, dtype: str = "fp8") -> CacheFactory:
        return lambda size: Cache8(
            config, cache_dtype, scales, dtype=dtype, layout=layout, max_cache_len=size
        )

    made: dict[str, CacheFactory] = {
        REFERENCE: lambda size: Cache16(config, cache_dtype),
        "e4m3 scale 1.0": fp8(None),
        "e4m3 per token-head": fp8("dynamic"),
        "e5m2 scale 1.0": fp8(None, "fp8_e5m2"),
    }
    made |= {name: fp8(of_name) for name, of_name in scales.items()}
    return {name: made[name] for name in names}


# Showing


def table(evaluation: Evaluation) -> Table:
    """The rows as a rich table."""
    from rich.table import Table
    from rich.text import Text

    size = f"{evaluation.num_windows} windows of {evaluation.window} tokens"
    arithmetic = f"{evaluation.dtype} arithmetic on {evaluation.device}"
    result = Table(title=Text(f"{evaluation.model}: {size}"), caption=Text(arithmetic))
    result.add_column("KV cache", no_wrap=True)
    for column in ("perplexity", "KL to 16-bit", "same top token", "cache MiB", "of 16-bit", "tokens/s"):
        result.add_column(column, justify="right")
    reference = evaluation.rows[0]
    for row in evaluation.rows:
        same = row is reference
        result.add_row(
            Text(row.cache),
            f"{row.perplexity:.3f}",
            "-" if same else f"{row.kl:.4f}",
            "-" if same else f"{row.agreement:.1%}",
            f"{row.nbytes / 2**20:.4g}",
            f"{row.nbytes / reference.nbytes:.1%}",
            f"{row.tokens_per_s:.1f}",
        )
    return result


def plot(evaluation: Evaluation, path: Path, inspection: Inspection | None = None) -> None:
    """Writes a picture (PNG): what every cache costs and takes, and the scales of a checkpoint if given."""
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

    from fp8kv import inspection as pictures

    colors, norm = colormaps["viridis"], LogNorm(*pictures.color_range(inspection))
    panels = [figure.add_subplot(grid[0, i]) for i in range(2)]
    for axes, name in zip(panels, "kv", strict=True):
        pictures.draw(axes, inspection, name, pictures.num_heads(inspection, name), colors, norm)
        axes.set_title(f"scales of {name.upper()}", fontsize=10)
    panels[0].set_ylabel("layer")
    figure.colorbar(ScalarMappable(norm, colors), ax=panels, fraction=0.08, aspect=40)
