"""Results of an evaluation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8kv import _ops
from fp8kv._checks import require

if TYPE_CHECKING:
    from rich.table import Table

#: The name of the baseline cache.
REFERENCE = "16-bit"


@dataclass(frozen=True)
class Row:
    """Measurements of one cache.

    Attributes:
        cache: its name.
        perplexity: of the text, token by token within each window.
        kl: mean Kullback-Leibler divergence of its next-token distribution from the 16-bit cache's.
        agreement: share of positions where both predict the same most likely token.
        nbytes: size of the cache, with a window and the tokens decoded after it.
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
        """For JSON, which cannot represent infinity: an infinite perplexity becomes the string "inf"."""
        result = asdict(self)
        for row in result["rows"]:
            row.update({k: str(x) for k, x in row.items() if isinstance(x, float) and not math.isfinite(x)})
        return {"fp8kv": _ops.version(), "torch": torch.__version__, **result}


def table(evaluation: Evaluation) -> Table:
    """The rows as a rich table."""
    require("rich", "cli", "a table")
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
