"""Texts and tokens for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Evaluation reads `reference_text` from here on; calibration reads the part before.
EVALUATION_START = 200_000


def reference_text() -> str:
    """The default text: the topics of CPython's `help()`, which need no download.

    Example:
        >>> from fp8kv.calibration.texts import EVALUATION_START, reference_text
        >>> len(reference_text()) > 2 * EVALUATION_START
        True
    """
    from pydoc_data import topics

    return "\n\n".join(str(text) for _, text in sorted(topics.topics.items()))


def beginning(tokenizer: Any, window: int) -> list[int]:
    """The special token at the start of a text, for every window; none if there is no space."""
    ids: list[int] = tokenizer("")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] and window > 1 else []


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Without special tokens, and without a warning if there are more than the model can read."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def windows_at(ids: list[int], places: Iterable[int], start: list[int], length: int) -> Tensor:
    """One window per position: `start`, then `length` tokens from there on, fewer at the end of the text."""
    return torch.tensor([start + ids[place : place + length] for place in places])
