"""Benchmarks: every operator against a copy of the same bytes, and against installed peers.

On CUDA, the time is per call inside a CUDA graph of many calls over rotating buffers, so that neither host
overhead nor L2 cache hits distort it. **Floor** is the better of `cudaMemcpyAsync` and a plain 16-byte copy
kernel, moving as many bytes as the operator reads and writes, measured the same way in the same run;
**share** is floor / time. A **warm** run rotates over buffers and caches that together fit in the L2 cache,
where an operator finds what the previous kernel has just written. On the CPU, the floor is a copy with the
operator's number of threads.

Attention only reads: its floor is a plain read of the bytes of K and V that it attends to, on the CPU their
sum. Because it is not exact, errors of a sample are measured too: see `fp8kv.bench.attention`.

Example:
    >>> import fp8kv.bench
    >>> report = fp8kv.bench.run("cpu", quick=True, only="static tensor", host=False)
    >>> report.rows[0].work, report.rows[0].us > 0
    ('static tensor', True)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from fp8kv._checks import listed, quoted
from fp8kv.bench import attention, attention_peers, decode, kv_cache, quantize
from fp8kv.bench.measure import PEERS, Call, Case, Settings, host_cost, run_cases
from fp8kv.bench.report import Report, Row, host_table, peer_table, plot, table

__all__ = ["SUITES", "Report", "Row", "Suite", "host_table", "peer_table", "plot", "run", "table"]


class Suite(NamedTuple):
    """One benchmark: ``cases(device, quick, warm)`` yields its cases.

    `peers` are measured on CUDA, `cpu_peers` on the CPU, where only `torch.compile` is optional.
    """

    cases: Callable[[torch.device, bool, bool], Iterable[Case[Any]]]
    host_calls: Callable[[torch.device], dict[str, Call]]
    peers: tuple[str, ...] = PEERS
    cpu_peers: tuple[str, ...] = ("torch eager", "torch.compile")
    floor: str = "copy"

    def chosen_peers(self, device: torch.device, asked: bool | str) -> tuple[str, ...]:
        names = self.peers if device.type == "cuda" else self.cpu_peers
        if isinstance(asked, str):
            return tuple(name for name in names if re.search(asked, name))
        if asked:
            return names
        return () if device.type == "cuda" else tuple(name for name in names if name != "torch.compile")


SUITES = {
    "quantize": Suite(lambda device, quick, warm: quantize.cases(device, quick), quantize.host_calls),
    "cache": Suite(kv_cache.cases, kv_cache.host_calls),
    "decode": Suite(decode.cases, decode.host_calls, decode.PEERS),
    "attention": Suite(
        attention.cases,
        attention.host_calls,
        tuple(attention_peers.CUDA_PEERS),
        tuple(attention_peers.CPU_PEERS),
        "read",
    ),
}


def run(
    device: str | torch.device,
    what: str = "quantize",
    *,
    quick: bool = False,
    only: str = "",
    peers: bool | str = False,
    warm: bool = False,
    host: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measures on `device`.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        what: "quantize", "cache", "decode" or "attention".
        quick: few shapes and few repetitions.
        only: a regular expression; measures only cases whose "name MxN" (for caches and steps "name
            TOKENSx... models", for attention "name BATCHxCONTEXTx... models") matches it.
        peers: also measures PyTorch eager, torch.compile and, if installed, vLLM (quantization and appends)
            and FlashInfer (steps); for attention on CUDA, the attention of PyTorch, vLLM and FlashInfer. One
            that raises is omitted, with a note in the report. On the CPU, all except torch.compile are measured
            by default. A string: only those whose name matches this regular expression.
        warm: keeps all buffers within the L2 cache, on CUDA; omits cases that don't fit.
        host: also measures the host time of an eager call.
        progress: called with the name of the next case.

    Raises:
        ValueError: there is no such benchmark or device, `only` is not a regular expression, no case matches
            it and fits in memory, or `warm` is set on the CPU.
    """
    if what not in SUITES:
        raise ValueError(f'fp8kv.bench: what must be {listed(map(quoted, SUITES))}, got "{what}"')
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("fp8kv.bench: device cuda is not available to PyTorch here")
    if warm and device.type != "cuda":
        raise ValueError("fp8kv.bench: warm buffers are measured on cuda only")
    suite = SUITES[what]
    for argument, expression in (("only", only), ("peers", peers)):
        try:
            re.compile(expression if isinstance(expression, str) else "")
        except re.error as error:
            raise ValueError(f"fp8kv.bench: {argument} must be a regular expression, got {expression!r}: {error}") from error
    cases = [case for case in suite.cases(device, quick, warm) if re.search(only, case.name)]
    if not cases:
        raise ValueError(f"fp8kv.bench: no work matches {only!r}")
    with torch.inference_mode():
        settings = Settings(quick, suite.chosen_peers(device, peers), warm, progress, suite.floor)
        report = run_cases(what, device, cases, settings)
        report.pdl = device.type == "cuda" and os.environ.get("FP8KV_PDL") == "1"
        if not report.rows:
            raise ValueError(f"fp8kv.bench: {'; '.join(report.notes)}")
        if host:
            progress("host cost of a call")
            report.host = host_cost(suite.host_calls(device), device, rounds=30 if quick else 200)
    return report
