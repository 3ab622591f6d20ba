"""A batch divided into parts that are attended to by one call each. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

#: A sequence with fewer queries is left to `fp8kv.paged_attention`, which reads the cache as it is.
MIN_QUERIES = 128
#: Tokens that are copied at a time, at most: longer sequences are left to `fp8kv.paged_attention` too.
MAX_TOKENS = 1 << 17


class Copy(NamedTuple):
    """The keys and values of a part in 16 bits, one sequence behind the other.

    Attributes:
        cu_seq_lens: int32 ``[num_seqs + 1]``, 0 and the running sums of the lengths.
        num_tokens: of all sequences.
        max_seq_len: of the longest.
    """

    cu_seq_lens: Tensor
    num_tokens: int
    max_seq_len: int


class Part(NamedTuple):
    """Sequences that follow each other in a batch, and their queries.

    Attributes:
        sequences: from the first to the one behind the last.
        rows: their queries, likewise.
        cu_query_lens: int32 ``[num_seqs + 1]``, from 0 on; None: one query each.
        max_query_len: an upper bound.
        copy: None: the cache is read as it is.
    """

    sequences: slice
    rows: slice
    cu_query_lens: Tensor | None
    max_query_len: int
    copy: Copy | None = None


def short_queries(num_seqs: int, num_tokens: int, query_starts: Tensor, max_query_len: int) -> Part:
    """The part of the first sequences of a batch.

    Nothing of it is made of numbers that the host knows but those it is given, so it stays right in a CUDA
    graph in which `query_starts` changes.

    Args:
        num_seqs: padding included.
        num_tokens: likewise.
        query_starts: int32, at least ``[num_seqs + 1]``.
        max_query_len: an upper bound.
    """
    one_each = max_query_len == 1 and num_seqs == num_tokens
    return Part(
        slice(0, num_seqs),
        slice(0, num_tokens),
        None if one_each else query_starts[: num_seqs + 1],
        max_query_len,
    )


def long_queries(
    first: int, query_starts: Tensor, on_host: Sequence[int], seq_lens: Sequence[int] | None, max_tokens: int
) -> list[Part]:
    """The parts of the sequences from `first` on.

    Args:
        first: sequence.
        query_starts: int32 ``[num_seqs + 1]``.
        on_host: the same.
        seq_lens: of all sequences, right from `first` on; None: nothing is copied.
        max_tokens: of a copy; 0: nothing is copied.
    """
    query_lens = [b - a for a, b in pairwise(on_host[first:])]
    lengths = [0] * len(query_lens) if seq_lens is None else list(seq_lens[first:])
    parts = []
    for begin, end, copied in runs(query_lens, lengths, max_tokens):
        sequences = slice(first + begin, first + end)
        rows = slice(on_host[sequences.start], on_host[sequences.stop])
        if rows.start == rows.stop:
            continue  # padding
        sums = query_starts[sequences.start : sequences.stop + 1]
        parts.append(
            Part(
                sequences,
                rows,
                sums - rows.start if rows.start else sums,
                max(query_lens[begin:end]),
                _copy(lengths[begin:end], query_starts.device) if copied else None,
            )
        )
    return parts


def runs(query_lens: Sequence[int], seq_lens: Sequence[int], max_tokens: int) -> list[tuple[int, int, bool]]:
    """Divides sequences into runs that are copied together, or not copied.

    Args:
        query_lens: of each sequence.
        seq_lens: likewise; 0: not known, not copied.
        max_tokens: of a copy.

    Returns:
        The first sequence of each run, the one behind its last, and whether it is copied.

    Example:
        >>> from fp8kv.vllm.batch import runs
        >>> runs([500, 2, 200, 300, 300], [600, 2, 400, 300, 500], max_tokens=1000)
        [(0, 1, True), (1, 2, False), (2, 4, True), (4, 5, True)]
    """
    result: list[tuple[int, int, bool]] = []
    tokens = 0
    for i, (queries, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        copied = queries >= MIN_QUERIES and 0 < length <= max_tokens
        joins = bool(result) and result[-1][2] == copied and (not copied or tokens + length <= max_tokens)
        tokens = tokens + length if joins else length
        result.append((result.pop()[0] if joins else i, i + 1, copied))
    return result


def _copy(seq_lens: Sequence[int], device: torch.device) -> Copy:
    sums = torch.tensor([0, *seq_lens], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    if device.type == "cuda":
        sums = sums.pin_memory().to(device, non_blocking=True)
    return Copy(sums, sum(seq_lens), max(seq_lens))
