"""Texts that need no download: what models are calibrated on and evaluated with when the user names none."""

from __future__ import annotations

#: Where the part of `reference_text` begins that evaluations read; calibrations read what is before it.
EVALUATION_START = 200_000


def reference_text() -> str:
    """The language reference and library topics that come with CPython, for its `help()`.

    Example:
        >>> from fp8kv.texts import EVALUATION_START, reference_text
        >>> len(reference_text()) > 2 * EVALUATION_START
        True
    """
    from pydoc_data import topics

    return "\n\n".join(str(text) for _, text in sorted(topics.topics.items()))
