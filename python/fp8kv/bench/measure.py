"""Measurements: times on CUDA and on the CPU, of copies or reads for comparison, and on the host."""

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
from fp8kv.bench.cards import specified_gbps
from fp8kv.bench.report import OURS, Report, Row

Call = Callable[[], object]
TimeOf = Callable[[Sequence[Call]], float]  # microseconds of one of the calls
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
        """A peer's call on given buffers; None if it doesn't support the case or is not installed."""

    def error(self, b: Buffers, result: Any) -> float | None:
        """The error of the result of a call on these buffers; None if results are exact."""
        return None


def torch_peer(name: str, expression: Callable[..., object]) -> Callable[..., object]:
    """The expression as the peer of that name runs it."""
    if name == "torch.compile":
        torch.compiler.reset()
        return torch.compile(expression, dynamic=False)
    return expression


def vllm_ops() -> Any:
    """None if vLLM is not installed."""
    try:
        return importlib.import_module("vllm._custom_ops")
    except ImportError:
        return None


class Settings(NamedTuple):
    """See `fp8kv.bench.run`; `peers` are the names of the peers to measure, `floor` is "copy" or "read"."""

    quick: bool
    peers: tuple[str, ...]
    warm: bool
    progress: Callable[[str], None]
    floor: str = "copy"


def run_cases(what: str, device: torch.device, cases: Sequence[Case[Any]], settings: Settings) -> Report:
    """Measures all cases on their device. Failures become notes in the report."""
    if device.type == "cuda":
        return _run_cuda(what, device, cases, settings)
    return _run_cpu(what, cases, settings)


class _Measured(NamedTuple):
    """Microseconds, and the result of `Case.error`."""

    us: float
    error: float | None


def _measured(case: Case[Buffers], calls: Sequence[Call], b: Buffers, time_of: TimeOf) -> _Measured:
    """The times of calls, the first of which works on the buffers `b`."""
    return _Measured(time_of(calls), case.error(b, calls[0]()))


def _measured_peers(
    names: Sequence[str],
    case: Case[Buffers],
    buffers: Sequence[Buffers],
    time_of: TimeOf,
    report: Report,
) -> dict[str, _Measured]:
    found = {}
    for name in names:
        try:
            peer = case.peer(name)
            if peer is not None:
                found[name] = _measured(case, [peer(b) for b in buffers], buffers[0], time_of)
        except Exception as error:  # an error of a peer must not lose the other numbers
            reason = (str(error).splitlines() or [""])[0]
            report.note(f"{name} left out: {type(error).__name__}: {reason}", case.name)
    return found


def _row(case: Case[Any], ours: _Measured, floor_us: float, peers: dict[str, _Measured]) -> Row:
    errors = {name: found.error for name, found in ({OURS: ours} | peers).items()}
    return Row(
        work=case.work,
        shape=list(case.shape),
        us=round(ours.us, 3),
        gbps=round(case.size / ours.us / 1e3, 1),
        floor_us=round(floor_us, 3),
        share=round(floor_us / ours.us, 4),
        peers={name: round(found.us, 3) for name, found in peers.items()},
        models=list(case.models),
        errors={name: float(f"{error:.3g}") for name, error in errors.items() if error is not None},
    )


# CUDA


def _run_cuda(what: str, device: torch.device, cases: Sequence[Case[Any]], settings: Settings) -> Report:
    replays = 5 if settings.quick else 15

    def time_of(calls: Sequence[Call]) -> float:
        return graph_time(calls, replays)

    with torch.cuda.device(device):
        floors = _CudaFloor(device, replays, settings.floor)
        report = Report.begin(what, torch.cuda.get_device_name(device), floors.description)
        report.warm, report.against = settings.warm, settings.floor
        report.specified_gbps = specified_gbps(report.device)
        memory = torch.cuda.get_device_properties(device).total_memory
        for case in cases:
            count = _rotation(case.size, device, settings.warm)
            if count < 2:
                report.note("left out: too large for a quarter of the L2 cache of this device", case.name)
                continue
            if 4 * count * case.size > memory:  # the buffers, the floor's buffers, and allocations of peers
                report.note("left out: too large for the memory of this device", case.name)
                continue
            settings.progress(case.name)
            cuda.empty_cache()  # otherwise small buffers are scattered over memory freed by earlier cases
            buffers = case.buffers(count)
            ours = _measured(case, [case.ours(b) for b in buffers], buffers[0], time_of)
            peers = _measured_peers(settings.peers, case, buffers, time_of, report)
            del buffers
            report.rows.append(_row(case, ours, floors.time(case.size, count), peers))
    return report


def _rotation(size: int, device: torch.device, warm: bool) -> int:
    """The number of sets of buffers to rotate over: more than four times the L2 cache, but at most 512.

    Warm: at most 16, within a quarter of the L2 cache; less than 2 if they don't fit.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if warm:
        return min(16, cache // 4 // size)
    return min(512, max(2, math.ceil(4 * cache / size) + 1))


def graph_time(calls: Sequence[Call], replays: int) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph of at least 200 calls.

    With fewer calls, the start of the graph, about 7 us, would be visible.
    """
    rounds = math.ceil(200 / len(calls))
    for call in calls[:2]:  # compile and load before the capture
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
        cuda._sleep(100_000)  # the GPU must wait for the host here, not the host for the GPU
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
# The store, hardly ever reached with random bytes, keeps the loads from being optimized out.
_READ_SOURCE = """
extern "C" __global__ void read16(const uint4* __restrict__ source, unsigned* target, int count) {
  const unsigned first = blockIdx.x * blockDim.x * VECTORS + threadIdx.x;
  uint4 x[VECTORS];
#pragma unroll
  for (unsigned k = 0; k < VECTORS; ++k) {
    const unsigned i = first + k * blockDim.x;
    x[k] = i < (unsigned)count ? source[i] : make_uint4(0, 0, 0, 0);
  }
  unsigned bits = 0;
#pragma unroll
  for (unsigned k = 0; k < VECTORS; ++k) bits ^= x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
  if (bits == 0x9e3779b9u) *target = bits;
}
"""


class _CudaFloor:
    """The time of a copy that reads half the bytes and writes the other half, or of a read of them all.

    Cached by size.
    """

    def __init__(self, device: torch.device, replays: int, kind: str) -> None:
        self.device = device
        self.replays = replays
        self.kind = kind
        self.known: dict[tuple[int, int], float] = {}
        if kind == "copy":
            self.kernels = _kernels(_COPY_SOURCE, "copy16", 1)
            self.description = "the better of cudaMemcpyAsync and a 16-byte copy kernel"
            if not self.kernels:
                self.description = "cudaMemcpyAsync only: PyTorch could not compile the copy kernel"
        else:
            self.kernels = _kernels(_READ_SOURCE, "read16", 2, 8)
            self.description = "the better of two kernels that read the bytes, 2 or 8 times 16 a thread"
            if not self.kernels:
                self.description = "torch.sum of the bytes: PyTorch could not compile the kernels that read"

    def time(self, size: int, count: int) -> float:
        key = (size, count)
        if key not in self.known:
            cuda.empty_cache()
            choices = self._copies(size, count) if self.kind == "copy" else self._reads(size, count)
            self.known[key] = min(graph_time(calls, self.replays) for calls in choices)
        return self.known[key]

    def _copies(self, size: int, count: int) -> list[list[Call]]:
        half = -(-size // 32) * 16
        pairs = [tuple(_random_bytes(half, self.device) for _ in range(2)) for _ in range(count)]
        return [
            [_call(torch.Tensor.copy_, target, source) for source, target in pairs],
            *([_call(kernel, source, target) for source, target in pairs] for kernel in self.kernels),
        ]

    def _reads(self, size: int, count: int) -> list[list[Call]]:
        sources = [_random_bytes(-(-size // 16) * 16, self.device) for _ in range(count)]
        target = torch.empty(16, dtype=torch.uint8, device=self.device)
        choices = [[_call(kernel, source, target) for source in sources] for kernel in self.kernels]
        return choices or [_sums(sources)]


def _call(function: Callable[[Tensor, Tensor], object], a: Tensor, b: Tensor) -> Call:
    return lambda: function(a, b)


def _sums(sources: Sequence[Tensor]) -> list[Call]:
    """Sums of the bytes, 8 at a time."""
    return [source.view(torch.int64).sum for source in sources]


def _random_bytes(count: int, device: torch.device) -> Tensor:
    """Not zeros, with which memory systems may be faster."""
    return torch.randint(256, (count,), dtype=torch.uint8, device=device)


def _kernels(source: str, name: str, *vectors: int) -> list[Callable[[Tensor, Tensor], object]]:
    """Kernels for each number of 16-byte accesses per thread; none if PyTorch can't compile them."""
    try:
        return [_kernel(source.replace("VECTORS", str(n)), name, n) for n in vectors]
    except (AttributeError, OSError, RuntimeError):
        return []


def _kernel(source: str, name: str, vectors: int) -> Callable[[Tensor, Tensor], object]:
    compiled = cuda._compile_kernel(source, name)

    def run(source: Tensor, target: Tensor) -> object:
        count = source.numel() // 16
        return compiled((-(-count // (256 * vectors)), 1, 1), (256, 1, 1), [source, target, count])

    return run


# CPU


def _run_cpu(what: str, cases: Sequence[Case[Any]], settings: Settings) -> Report:
    require("numpy", "cli", "fp8kv.bench on the CPU")
    samples = 3 if settings.quick else 7
    report = Report.begin(what, f"{cpu_name()} ({os.cpu_count()} CPUs)", _CPU_FLOORS[settings.floor])
    report.against = settings.floor
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            for case in cases:
                settings.progress(f"{case.name}, {threads} threads")
                report.rows += _cpu_rows(case, threads, samples, settings, report)
    finally:
        torch.set_num_threads(before)
    return report


_CPU_FLOORS = {
    "copy": "copy of as many bytes with as many threads; with one, the better of Tensor.copy_ and memmove",
    "read": "Tensor.sum of as many bytes, as 64-bit integers, with as many threads",
}


def _cpu_rows(case: Case[Any], threads: int, samples: int, settings: Settings, report: Report) -> Iterator[Row]:
    def time_of(calls: Sequence[Call]) -> float:
        return cpu_time(calls, samples)

    count = max(2, min(32, (64 << 20) // case.size))
    buffers = case.buffers(count)
    floor_us = min(map(time_of, _cpu_floors(case, count, threads, settings.floor)))
    peers = _measured_peers(settings.peers, case, buffers, time_of, report)
    for isa in each_cpu_isa():
        ours = _measured(case, [case.ours(b) for b in buffers], buffers[0], time_of)
        row = _row(case, ours, floor_us, peers)
        row.isa, row.threads = isa, threads
        yield row


def _cpu_floors(case: Case[Any], count: int, threads: int, kind: str) -> list[list[Call]]:
    if kind == "read":
        return [_sums([_random_bytes(case.size // 8 * 8, case.device) for _ in range(count)])]
    pairs = [tuple(_random_bytes(case.size // 2, case.device) for _ in range(2)) for _ in range(count)]
    copies: list[Callable[[Tensor, Tensor], object]] = [torch.Tensor.copy_]
    if threads == 1:
        copies.append(_memmove)
    return [[_call(copy, b, a) for a, b in pairs] for copy in copies]


def cpu_time(calls: Sequence[Call], samples: int) -> float:
    """Microseconds of one call: the median of `samples`, each of all calls and at least two milliseconds.

    Long calls get fewer samples, but at least three. With one thread, it is the CPU time of that thread,
    which excludes time in which others have the processor.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for call in calls:
        call()
    rounds = max(1, math.ceil(2e-3 / (clock() - start)))
    measured = []
    for _ in range(samples):
        start = clock()
        for _ in range(rounds):
            for call in calls:
                call()
        seconds = clock() - start
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
    """Host time of an eager call in microseconds, by name, with `torch.zero_` in the same run.

    Calls must be small: the queue is kept short, so that only the time to the launch is measured. On the CPU,
    the work itself is included.
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
