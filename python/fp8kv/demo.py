"""`fp8kv demo`: what each granularity costs in accuracy, on real data that needs no download.

The data is the reference text that CPython ships (or a text file of yours). Words that stand near each other
are counted; the positive pointwise mutual information of those counts is a matrix of word associations, and
its leading eigenvectors give every word a feature vector (latent semantic analysis). A few features are far
larger than the others, as in the activations of language models, and that is what granularities are about.

Example:
    >>> import fp8kv.demo
    >>> tensors = fp8kv.demo.tensors(fp8kv.demo.reference_text()[:200_000], num_words=128, num_features=32)
    >>> [tuple(t.shape) for t in tensors.values()]
    [(4096, 32), (128, 128)]
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fp8kv
from fp8kv.group_shape import GroupShape

if TYPE_CHECKING:
    from rich.table import Table

GRANULARITIES = {
    "per tensor": GroupShape.PER_TENSOR,
    "per token": GroupShape.PER_TOKEN,
    "per channel": GroupShape.PER_CHANNEL,
    "per head of 64": GroupShape.per_head(64),
    "block 1x128": GroupShape(1, 128),
    "block 128x128": GroupShape(128, 128),
}


def reference_text() -> str:
    """The language reference and library topics that come with CPython, for its `help()`."""
    from pydoc_data import topics

    return "\n".join(str(text) for _, text in sorted(topics.topics.items()))


def tensors(
    text: str, num_words: int = 1024, num_features: int = 256, num_tokens: int = 4096
) -> dict[str, Tensor]:
    """Two bf16 matrices: feature vectors [tokens, features] and word associations [words, words] of `text`.

    Raises:
        ValueError: the text has too few words.
    """
    words = re.findall(r"[a-z]+|[^\sa-z]", text.lower())
    vocabulary = {word: i for i, (word, _) in enumerate(Counter(words).most_common(num_words))}
    ids = torch.tensor([vocabulary[word] for word in words if word in vocabulary])
    if len(vocabulary) < num_words or len(ids) < num_tokens:
        raise ValueError(
            f"fp8kv.demo: the text must have at least {num_words} different words and {num_tokens} in all, "
            f"got {len(vocabulary)} and {len(words)}"
        )
    counts = torch.zeros(num_words * num_words)
    for distance in range(1, 5):
        pairs = ids[:-distance] * num_words + ids[distance:]
        counts += torch.bincount(pairs, minlength=num_words * num_words)
    counts = counts.view(num_words, num_words)
    counts = counts + counts.T
    frequency = counts.sum(0).clamp_min(1)
    association = (counts * counts.sum() / (frequency[:, None] * frequency[None, :])).log().clamp_min(0)
    values, vectors = torch.linalg.eigh(association)
    order = values.abs().argsort(descending=True)[:num_features]
    features = vectors[:, order] * values[order]
    return {
        f"features of {num_tokens} words": features[ids[:num_tokens]].bfloat16(),
        "word associations": association.bfloat16(),
    }


@dataclass(frozen=True)
class Result:
    """What quantizing one tensor with one granularity costs and gives."""

    tensor: str
    granularity: str
    num_scales: int
    max_error: float
    relative_error: float  # of norms: |x - x'| / |x|
    snr_db: float
    lost: float  # share of the nonzero elements that became zero
    num_bytes: int  # elements and scales
    ms: float


def measure(name: str, x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> list[Result]:
    """Quantizes `x` with every granularity, and compares with what comes back."""
    results = []
    for granularity, group in GRANULARITIES.items():
        fp8kv.quantize(x, group_shape=group, dtype=dtype)
        _wait(x)
        start = time.perf_counter()
        q, scale = fp8kv.quantize(x, group_shape=group, dtype=dtype)
        _wait(x)
        ms = (time.perf_counter() - start) * 1e3
        exact = x.double()
        back = fp8kv.dequantize(q, scale, group_shape=group, dtype=torch.float32).double()
        error = back - exact
        relative = (error.norm() / exact.norm()).item()
        results.append(
            Result(
                tensor=name,
                granularity=granularity,
                num_scales=scale.numel(),
                max_error=error.abs().max().item(),
                relative_error=relative,
                snr_db=-20 * math.log10(relative) if relative > 0 else math.inf,
                lost=((back == 0) & (exact != 0)).sum().item() / max(1, exact.count_nonzero().item()),
                num_bytes=q.numel() + 4 * scale.numel(),
                ms=ms,
            )
        )
    return results


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def table(name: str, x: Tensor, results: list[Result], dtype: torch.dtype) -> Table:
    """The results of one tensor as a rich table."""
    from rich.table import Table

    shape = "x".join(map(str, x.shape))
    result = Table(
        title=f"{name}, {shape}, bf16 to {str(dtype).removeprefix('torch.float8_')} on {x.device} "
        f"({x.numel() * x.element_size():,} bytes before)"
    )
    result.add_column("granularity", no_wrap=True)
    for column in ("scales", "bytes", "max error", "relative error", "SNR dB", "lost to 0", "ms"):
        result.add_column(column, justify="right", no_wrap=True)
    best = max(row.snr_db for row in results)
    for row in results:
        snr = f"{row.snr_db:.2f}"
        result.add_row(
            row.granularity,
            f"{row.num_scales:,}",
            f"{row.num_bytes:,}",
            f"{row.max_error:.4g}",
            f"{row.relative_error:.4%}",
            f"[bold green]{snr}[/]" if row.snr_db == best else snr,
            f"{row.lost:.3%}",
            f"{row.ms:.3f}",
        )
    return result


def plot(results: list[Result], path: Path) -> None:
    """Writes a picture of signal-to-noise ratio and of the largest error by granularity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    names = list(dict.fromkeys(row.tensor for row in results))
    for offset, name in enumerate(names):
        rows = [row for row in results if row.tensor == name]
        y = [i + 0.38 * offset for i in range(len(rows))]
        left.plot([row.snr_db for row in rows], y, "o", label=name)
        right.barh(y, [row.max_error for row in rows], height=0.36)
    middle = 0.19 * (len(names) - 1)
    left.set_yticks([i + middle for i in range(len(GRANULARITIES))], list(GRANULARITIES))
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set_xlabel("signal-to-noise ratio, dB (further right is better)")
    right.set_xlabel("largest absolute error (shorter is better)")
    figure.legend(fontsize=8, loc="outside upper right", ncols=len(names))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
