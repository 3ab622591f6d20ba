"""How things are measured: times on CUDA and on the CPU, of copies next to them, and of the host."""

from __future__ import annotations

import importlib
import math
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fp8kv._checks import require
from fp8kv._dtypes import DEFAULT_FORMAT
from fp8kv._machine import cpu_name
from fp8kv._ops import each_cpu_isa
from fp8kv.bench.report import Report, Row

Call = Callable[[], object]
Buffers = TypeVar("Buffers")
cuda: Any = torch.cuda  # largely without annotations

INPUT = torch.bfloat16
FP8 = DEFAULT_FORMAT.dtype
PEERS = ("torch eager", "torch.compile", "vllm")


@dataclass(frozen=True)
class Case(ABC, Generic[Buffers]):
    """One operator on one shape; `Buffers` are the tensors of one call."""

    work: str
    shape: tuple[int, ...]
    device: torch.device

    #: Shapes without the number of tokens, and the models that have them.
    geometries: ClassVar[Mapping[tuple[int, ...], tuple[str, ...]]] = {}

    @property
    def name(self) -> str:
        return " ".join((self.work, "x".join(map(str, self.shape)), *self.models))

    @property
    def models(self) -> tuple[str, ...]:
        """Models that have this shape."""
        return self.geometries.get(self.shape[1:], ())

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes a call reads and writes."""

    @abstractmethod
    def buffers(self, count: int) -> list[Buffers]:
        """`count` sets of buffers with random data."""

    @abstractmethod
    def ours(self, b: Buffers) -> Call: ...

    @abstractmethod
    def peer(self, name: str) -> Callable[[Buffers], Call] | None:
        """How a peer does this work on given buffers; None when it can't, or is not installed."""


def torch_peer(name: str, expression: Callable[..., object]) -> Callable[..., object]:
    """The expression as the peer of that name runs it."""
    if name == "torch.compile":
        torch.compiler.reset()
        return torch.compile(expression, dynamic=False)
    return expression


def vllm_ops() -> Any:
    """None where vLLM is not installed."""
    try:
        return importlib.import_module("vllm._custom_ops")
    except ImportError:
        return None


class Settings(NamedTuple):
    """See `fp8kv.bench.run`; `peers` are the names of those to measure."""

    quick: bool
    peers: tuple[str, ...]
    warm: bool
    progress: Callable[[str], None]


def run_cases(what: str, device: torch.device, cases: Sequence[Case[Any]], settings: Settings) -> Report:
    """Measures all cases on their device. What can't be measured becomes a note of the report."""
    if device.type == "cuda":
        return _run_cuda(what, device, cases, settings)
    return _run_cpu(what, cases, settings)


def _row(case: Case[Any], us: float, floor_us: float, peers: dict[str, float]) -> Row:
    return Row(
        work=case.work,
        shape=list(case.shape),
        us=round(us, 3),
        gbps=round(case.size / us / 1e3, 1),
        floor_us=round(floor_us, 3),
        share=round(floor_us / us, 4),
        peers={name: round(value, 3) for name, value in peers.items()},
        models=list(case.models),
    )


def _peer_times(
    names: Sequence[str],
    case: Case[Buffers],
    buffers: Sequence[Buffers],
    time_of: Callable[[Sequence[Call]], float],
    report: Report,
) -> dict[str, float]:
    times = {}
    for name in names:
        try:
            peer = case.peer(name)
            if peer is not None:
                times[name] = time_of([peer(b) for b in buffers])
        except Exception as error:  # whatever a peer raises is no reason to lose the other numbers
            reason = (str(error).splitlines() or [""])[0]
            report.note(f"{name} left out: {type(error).__name__}: {reason}", case.name)
    return times


# CUDA


def _run_cuda(what: str, device: torch.device, cases: Sequence[Case[Any]], settings: Settings) -> Report:
    replays = 5 if settings.quick else 15
    with torch.cuda.device(device):
        floors = _CudaFloor(device, replays)
        report = Report.begin(what, torch.cuda.get_device_name(device), floors.description)
        report.warm = settings.warm
        memory = torch.cuda.get_device_properties(device).total_memory
        for case in cases:
            count = _rotation(case.size, device, settings.warm)
            if count < 2:
                report.note("left out: too large for a quarter of the L2 cache of this device", case.name)
                continue
            if 4 * count * case.size > memory:  # the buffers, those of the floor, and what peers allocate
                report.note("left out: too large for the memory of this device", case.name)
                continue
            settings.progress(case.name)
            cuda.empty_cache()  # else small buffers lie scattered over what earlier cases left behind
            buffers = case.buffers(count)
            us = graph_time([case.ours(b) for b in buffers], replays)
            times = _peer_times(
                settings.peers, case, buffers, lambda calls: graph_time(calls, replays), report
            )
            del buffers
            report.rows.append(_row(case, us, floors.time(case.size, count), times))
    return report


def _rotation(size: int, device: torch.device, warm: bool) -> int:
    """How many sets of buffers to rotate over: together above four times the L2 cache, but at most 512.

    If they are to stay warm at most 16, within a quarter of it; less than 2 where they don't fit.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if warm:
        return min(16, cache // 4 // size)
    return min(512, max(2, math.ceil(4 * cache / size) + 1))


def graph_time(calls: Sequence[Call], replays: int) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph of at least 200 calls.

    Fewer would show the start of the graph, about 7 us.
    """
    rounds = math.ceil(200 / len(calls))
    for call in calls[:2]:  # what is compiled or loaded at first is so before the capture
        call()
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    samples: list[float] = []
    for _ in range(replays):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(100_000)  # the GPU waits while the host enqueues, not the other way round
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(samples)


_COPY_SOURCE = """
extern "C" __global__ void copy16(const uint4* __restrict__ source, uint4* __restrict__ target, int count) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < (unsigned)count) target[i] = source[i];
}
"""


class _CudaFloor:
    """The time of a copy that reads half the bytes and writes the other half; remembered by size."""

    def __init__(self, device: torch.device, replays: int) -> None:
        self.device = device
        self.replays = replays
        self.known: dict[tuple[int, int], float] = {}
        self.kernel = _copy_kernel()
        self.description = "the better of cudaMemcpyAsync and a 16-byte copy kernel"
        if self.kernel is None:
            self.description = "cudaMemcpyAsync only: PyTorch could not compile the copy kernel"

    def time(self, size: int, count: int) -> float:
        key = (size, count)
        if key not in self.known:
            half = -(-size // 32) * 16
            cuda.empty_cache()
            pairs = [tuple(_random_bytes(half, self.device) for _ in range(2)) for _ in range(count)]
            times = [graph_time([_copy_call(torch.Tensor.copy_, b, a) for a, b in pairs], self.replays)]
            if self.kernel is not None:
                times.append(graph_time([_copy_call(self.kernel, b, a) for a, b in pairs], self.replays))
            self.known[key] = min(times)
        return self.known[key]


def _copy_call(copy: Callable[[Tensor, Tensor], object], target: Tensor, source: Tensor) -> Call:
    return lambda: copy(target, source)


def _random_bytes(count: int, device: torch.device) -> Tensor:
    """Not zeros: memory systems may be faster with those."""
    return torch.randint(256, (count,), dtype=torch.uint8, device=device)


def _copy_kernel() -> Callable[[Tensor, Tensor], object] | None:
    """A plain copy kernel with one 16-byte access a thread; None where PyTorch can't compile it."""
    try:
        compiled = cuda._compile_kernel(_COPY_SOURCE, "copy16")
    except (AttributeError, OSError, RuntimeError):
        return None

    def copy(target: Tensor, source: Tensor) -> object:
        count = target.numel() // 16
        return compiled((-(-count // 256), 1, 1), (256, 1, 1), [source, target, count])

    return copy


# CPU


def _run_cpu(what: str, cases: Sequence[Case[Any]], settings: Settings) -> Report:
    require("numpy", "cli", "fp8kv.bench on the CPU")
    samples = 3 if settings.quick else 7
    report = Report.begin(
        what,
        f"{cpu_name()} ({os.cpu_count()} CPUs)",
        "copy of as many bytes with as many threads; with one, the better of Tensor.copy_ and memmove",
    )
    peers = ("torch eager", *(name for name in settings.peers if name == "torch.compile"))
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            for case in cases:
                settings.progress(f"{case.name}, {threads} threads")
                report.rows += _cpu_rows(case, threads, samples, peers, report)
    finally:
        torch.set_num_threads(before)
    return report


def _cpu_rows(
    case: Case[Any], threads: int, samples: int, peers: Sequence[str], report: Report
) -> Iterator[Row]:
    count = max(2, min(32, (64 << 20) // case.size))
    buffers = case.buffers(count)
    half = case.size // 2
    pairs = [tuple(_random_bytes(half, case.device) for _ in range(2)) for _ in range(count)]
    copies: list[Callable[[Tensor, Tensor], object]] = [torch.Tensor.copy_]
    if threads == 1:
        copies.append(_memmove)
    floor_us = min(cpu_time([_copy_call(copy, b, a) for a, b in pairs], samples) for copy in copies)
    times = _peer_times(peers, case, buffers, lambda calls: cpu_time(calls, samples), report)
    for isa in each_cpu_isa():
        us = cpu_time([case.ours(b) for b in buffers], samples)
        row = _row(case, us, floor_us, times)
        row.isa, row.threads = isa, threads
        yield row


def cpu_time(calls: Sequence[Call], samples: int) -> float:
    """Microseconds of one call: the median of `samples`, each of all calls and at least two milliseconds.

    Calls that take long get fewer samples, but three.
    """
    start = time.perf_counter()
    for call in calls:
        call()
    rounds = max(1, math.ceil(2e-3 / (time.perf_counter() - start)))
    measured = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        seconds = time.perf_counter() - start
        measured.append(seconds * 1e6 / (rounds * len(calls)))
        if len(measured) >= 3 and seconds > 0.2:
            break
    return statistics.median(measured)


def _memmove(target: Tensor, source: Tensor) -> object:
    to, source_bytes = target.numpy(), source.numpy()
    to.data[:] = source_bytes.data
    return target


# The host


def host_cost(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Microseconds an eager call costs the host, by name, with `torch.zero_` of the same run.

    Calls must be small: the queue is kept short, so that what is measured is the way to the launch. On CPU
    the work itself is part of it.
    """
    x = small(1, device)
    calls = {"torch.zero_": lambda: x.zero_(), **calls}
    wait = cuda.synchronize if device.type == "cuda" else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(20):
                call()
            samples[name].append((time.perf_counter() - start) / 20 * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in samples.items()}


def small(heads: int, device: torch.device) -> Tensor:
    """Ones for `host_cost`, [tokens, heads, 64 / heads]: 16 tokens on CUDA, one on the CPU."""
    return torch.ones(16 if device.type == "cuda" else 1, heads, 64 // heads, dtype=INPUT, device=device)
