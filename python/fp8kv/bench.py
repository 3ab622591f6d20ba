"""Benchmarks: every operator against a copy of the same bytes, and against the peers that are installed.

On CUDA the time is that of one call inside a CUDA graph of many calls over rotating buffers, so that neither
the host nor the L2 cache flatters. **Floor** is the better of `cudaMemcpyAsync` and a plain 16-byte copy
kernel, moving as many bytes as the operator reads and writes, measured the same way in the same run;
**share** is floor / time. On CPU the floor is a copy with as many threads as the operator has.

Example:
    >>> import fp8kv.bench
    >>> report = fp8kv.bench.run("cpu", quick=True, only="static tensor", host=False)
    >>> report.rows[0].work, report.rows[0].us > 0
    ('static tensor', True)
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fp8kv
from fp8kv import _library
from fp8kv.group_shape import GroupShape

if TYPE_CHECKING:
    from rich.table import Table

Call = Callable[[], object]
cuda: Any = torch.cuda  # largely without annotations

INPUT = torch.bfloat16
FP8 = torch.float8_e4m3fn
PEERS = ("torch eager", "torch.compile", "vllm")


@dataclass(frozen=True)
class Work:
    """One operator with one granularity; `kind` is "static", "dynamic" or "dequant"."""

    name: str
    kind: str
    group: GroupShape


WORKS = (
    Work("static tensor", "static", GroupShape.PER_TENSOR),
    Work("static channel", "static", GroupShape.PER_CHANNEL),
    Work("static head 128", "static", GroupShape.per_head(128)),
    Work("static token", "static", GroupShape.PER_TOKEN),
    Work("static block 128x128", "static", GroupShape(128, 128)),
    Work("dynamic token", "dynamic", GroupShape.PER_TOKEN),
    Work("dynamic tensor", "dynamic", GroupShape.PER_TENSOR),
    Work("dynamic block 1x128", "dynamic", GroupShape(1, 128)),
    Work("dequant tensor", "dequant", GroupShape.PER_TENSOR),
    Work("dequant token", "dequant", GroupShape.PER_TOKEN),
)
CUDA_SHAPES = (
    (1, 4096),
    (16, 4096),
    (128, 4096),
    (1024, 4096),
    (8192, 4096),
    (4096, 1024),
    (32768, 128),
    (4097, 5137),
    (16384, 8192),
)
CPU_SHAPES = ((1, 4096), (128, 4096), (1024, 4096), (8192, 4096), (513, 5137))
QUICK_SHAPES = {"cuda": ((16, 4096), (1024, 4096)), "cpu": ((16, 4096),)}


@dataclass
class Row:
    """One measurement. Times are in microseconds, `gbps` is 1e9 bytes a second, `share` is floor / time."""

    work: str
    shape: list[int]
    us: float
    gbps: float
    floor_us: float
    share: float
    peers: dict[str, float] = field(default_factory=dict)
    isa: str | None = None
    threads: int | None = None


@dataclass
class Report:
    """All measurements of one run on one device."""

    device: str
    torch: str
    date: str
    fp8kv: str
    floor: str
    rows: list[Row] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def run(
    device: str | torch.device,
    *,
    quick: bool = False,
    only: str = "",
    peers: bool = False,
    host: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measures on `device`.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        quick: few shapes and few repetitions.
        only: measures only works whose "name MxN" contains this.
        peers: also measures PyTorch eager, torch.compile and, when it is installed, vLLM.
        host: also measures what an eager call costs the host.
        progress: is told what is measured next.

    Raises:
        ValueError: nothing matches `only`, or there is no such device.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("fp8kv.bench: device cuda is not available to PyTorch here")
    cases = list(_select(device.type, quick, only))
    if not cases:
        raise ValueError(f"fp8kv.bench: no work matches {only!r}")
    bench = _run_cuda if device.type == "cuda" else _run_cpu
    with torch.inference_mode():
        report = bench(device, cases, quick, PEERS if peers else (), progress)
        if host:
            progress("host cost of a call")
            report.host = host_cost(device, rounds=30 if quick else 200)
    return report


def _select(kind: str, quick: bool, only: str) -> Iterator[tuple[Work, tuple[int, int]]]:
    shapes = QUICK_SHAPES[kind] if quick else (CUDA_SHAPES if kind == "cuda" else CPU_SHAPES)
    for work in WORKS:
        for shape in shapes:
            if only in f"{work.name} {shape[0]}x{shape[1]}":
                yield work, shape


def _report(device_name: str, floor: str) -> Report:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Report(device=device_name, torch=torch.__version__, date=now, fp8kv=fp8kv.__version__, floor=floor)


# What is measured


@dataclass
class Buffers:
    """The tensors of one call."""

    input: Tensor
    result: Tensor
    scale: Tensor


def _buffers(work: Work, shape: tuple[int, int], device: torch.device, count: int) -> list[Buffers]:
    """`count` sets of buffers with random data of an activation's spread."""
    made = []
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(count):
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(INPUT)
        q, scale = fp8kv.quantize(x, group_shape=work.group, dtype=FP8)
        if work.kind == "dequant":
            made.append(Buffers(q, torch.empty_like(x), scale))
        else:
            made.append(Buffers(x, torch.empty_like(q), scale))
    return made


def _bytes(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * (INPUT.itemsize + FP8.itemsize)


def _ours(work: Work, b: Buffers) -> Call:
    if work.kind == "static":
        return lambda: fp8kv.static_scaled_fp8_quant(b.result, b.input, b.scale, work.group)
    if work.kind == "dynamic":
        return lambda: fp8kv.dynamic_scaled_fp8_quant(b.result, b.input, b.scale, None, work.group)
    return lambda: fp8kv.scaled_fp8_dequant(b.result, b.input, b.scale, work.group)


def _expression(work: Work, shape: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The work as one would write it in PyTorch; None where groups don't divide the shape."""
    rows, cols = (
        size if extent == -1 else min(extent, size) for size, extent in zip(shape, work.group, strict=True)
    )
    if shape[0] % rows or shape[1] % cols:
        return None
    limit = torch.finfo(FP8).max
    blocks = (shape[0] // rows, rows, shape[1] // cols, cols)

    def static(x: Tensor, scale: Tensor) -> Tensor:
        groups = x.view(blocks).float() / scale.view(blocks[0], 1, blocks[2], 1)
        return groups.clamp(-limit, limit).to(FP8).view(shape)

    def dynamic(x: Tensor, scale: Tensor) -> Tensor:
        groups = x.view(blocks).float()
        computed = (groups.abs().amax(dim=(1, 3), keepdim=True) / limit).clamp_min(1.0 / (limit * 512))
        return (groups / computed).clamp(-limit, limit).to(FP8).view(shape)

    def dequant(q: Tensor, scale: Tensor) -> Tensor:
        return (q.view(blocks).float() * scale.view(blocks[0], 1, blocks[2], 1)).to(INPUT).view(shape)

    return {"static": static, "dynamic": dynamic, "dequant": dequant}[work.kind]


def _peer(name: str, work: Work, shape: tuple[int, int]) -> Callable[[Buffers], Call] | None:
    """How a peer does this work on given buffers; None when it can't, or is not installed."""
    if name == "vllm":
        return _vllm(work)
    expression = _expression(work, shape)
    if expression is None:
        return None
    function: Callable[[Tensor, Tensor], Tensor] = expression
    if name == "torch.compile":
        torch.compiler.reset()
        function = torch.compile(expression, dynamic=False)
    return lambda b: lambda: function(b.input, b.scale)


def _vllm(work: Work) -> Callable[[Buffers], Call] | None:
    try:
        ops: Any = importlib.import_module("vllm._custom_ops")
    except ImportError:
        return None
    if work.kind == "dynamic" and work.group in (GroupShape.PER_TOKEN, GroupShape.PER_TENSOR):
        per_token = work.group == GroupShape.PER_TOKEN
        return lambda b: (
            lambda: ops.scaled_fp8_quant(b.input, use_per_token_if_dynamic=per_token, output=b.result)
        )
    if work.kind == "static" and work.group == GroupShape.PER_TENSOR:
        return lambda b: lambda: ops.scaled_fp8_quant(b.input, b.scale, output=b.result)
    if work.kind == "static" and work.group.rows == -1:
        return lambda b: (
            lambda: ops.scaled_fp8_quant(
                b.input, b.scale.view(-1), output=b.result, group_shape=tuple(work.group)
            )
        )
    return None


# CUDA


def _run_cuda(
    device: torch.device,
    cases: Sequence[tuple[Work, tuple[int, int]]],
    quick: bool,
    peers: Sequence[str],
    progress: Callable[[str], None],
) -> Report:
    replays = 5 if quick else 15
    with torch.cuda.device(device):
        floors = _CudaFloor(device, replays)
        report = _report(torch.cuda.get_device_name(device), floors.description)
        for work, shape in cases:
            progress(f"{work.name} {shape[0]}x{shape[1]}")
            count = _rotation(_bytes(shape), device)
            buffers = _buffers(work, shape, device, count)
            us = graph_time([_ours(work, b) for b in buffers], replays)
            times: dict[str, float] = {}
            for name in peers:
                peer = _peer(name, work, shape)
                if peer is not None:
                    times[name] = graph_time([peer(b) for b in buffers], replays)
            del buffers
            report.rows.append(_row(work, shape, us, floors.time(_bytes(shape), count), times))
    return report


def _row(work: Work, shape: tuple[int, int], us: float, floor_us: float, peers: dict[str, float]) -> Row:
    return Row(
        work=work.name,
        shape=list(shape),
        us=round(us, 3),
        gbps=round(_bytes(shape) / us / 1e3, 1),
        floor_us=round(floor_us, 3),
        share=round(floor_us / us, 4),
        peers={name: round(value, 3) for name, value in peers.items()},
    )


def _rotation(size: int, device: torch.device) -> int:
    """How many sets of buffers to rotate over: together above four times the L2 cache, but at most 512."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(512, max(2, math.ceil(4 * cache / size) + 1))


def graph_time(calls: Sequence[Call], replays: int) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph of at least 20 calls."""
    rounds = math.ceil(20 / len(calls))
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


def _run_cpu(
    device: torch.device,
    cases: Sequence[tuple[Work, tuple[int, int]]],
    quick: bool,
    peers: Sequence[str],
    progress: Callable[[str], None],
) -> Report:
    samples = 3 if quick else 7
    introspect = _library.introspect()
    report = _report(
        _cpu_name(),
        "copy of as many bytes with as many threads; with one, the better of Tensor.copy_ and memmove",
    )
    before = (introspect.cpu_isa(), torch.get_num_threads())
    try:
        for threads in sorted({1, before[1]}):
            torch.set_num_threads(threads)
            for work, shape in cases:
                progress(f"{work.name} {shape[0]}x{shape[1]}, {threads} threads")
                report.rows += _cpu_rows(work, shape, threads, samples, peers)
    finally:
        introspect.force_cpu_isa(before[0])
        torch.set_num_threads(before[1])
    return report


def _cpu_rows(
    work: Work, shape: tuple[int, int], threads: int, samples: int, peers: Sequence[str]
) -> Iterator[Row]:
    introspect = _library.introspect()
    size = _bytes(shape)
    count = max(2, min(32, (64 << 20) // size))
    buffers = _buffers(work, shape, torch.device("cpu"), count)
    half = size // 2
    pairs = [tuple(_random_bytes(half, buffers[0].input.device) for _ in range(2)) for _ in range(count)]
    copies: list[Callable[[Tensor, Tensor], object]] = [torch.Tensor.copy_]
    if threads == 1:
        copies.append(_memmove)
    floor_us = min(cpu_time([_copy_call(copy, b, a) for a, b in pairs], samples) for copy in copies)
    times = {}
    for name in ("torch eager", *(p for p in peers if p == "torch.compile")):
        peer = _peer(name, work, shape)
        if peer is not None:
            times[name] = cpu_time([peer(b) for b in buffers], samples)
    for isa in introspect.cpu_isas():
        introspect.force_cpu_isa(isa)
        us = cpu_time([_ours(work, b) for b in buffers], samples)
        row = _row(work, shape, us, floor_us, times)
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


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} CPUs)"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} CPUs)"


# The host's side


def host_cost(device: torch.device, rounds: int) -> dict[str, float]:
    """Microseconds an eager call costs the host, by op, beside `torch.zero_` in the same run.

    The tensors are small and the queue is kept short, so that what is measured is the way to the launch. On
    CPU the work itself, on 64 elements, is part of it.
    """
    x = torch.ones(16 if device.type == "cuda" else 1, 64, dtype=INPUT, device=device)
    q, scale = fp8kv.quantize(x)
    token_scale = torch.ones(x.shape[0], device=device)
    calls: dict[str, Call] = {
        "torch.zero_": lambda: x.zero_(),
        "static_scaled_fp8_quant": lambda: fp8kv.static_scaled_fp8_quant(q, x, scale),
        "static_scaled_fp8_quant, group_shape": lambda: fp8kv.static_scaled_fp8_quant(q, x, scale, (-1, -1)),
        "dynamic_scaled_fp8_quant, per token": lambda: fp8kv.dynamic_scaled_fp8_quant(
            q, x, token_scale, None, (1, -1)
        ),
        "scaled_fp8_dequant": lambda: fp8kv.scaled_fp8_dequant(x, q, scale),
        "fp8kv.quantize (allocates)": lambda: fp8kv.quantize(x, scale),
    }
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


# Presentation


def table(report: Report) -> Table:
    """The report as a rich table."""
    from rich.table import Table

    on_cpu = any(row.isa for row in report.rows)
    peers = list(dict.fromkeys(name for row in report.rows for name in row.peers))
    result = Table(title=f"fp8kv {report.fp8kv} on {report.device}, bf16 and e4m3, PyTorch {report.torch}")
    result.add_column("work", no_wrap=True)
    for name in (
        "shape",
        *(("isa", "threads") if on_cpu else ()),
        "us",
        "GB/s",
        "copy us",
        "share of copy",
        *peers,
    ):
        result.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for row in report.rows:
        if previous and row.work != previous:
            result.add_section()
        color = "green" if row.share >= 0.9 else "yellow" if row.share >= 0.7 else "red"
        cells = [row.work if row.work != previous else "", "x".join(map(str, row.shape))]
        if on_cpu:
            cells += [row.isa or "", str(row.threads)]
        cells += [f"{row.us:.2f}", f"{row.gbps:.0f}", f"{row.floor_us:.2f}", f"[{color}]{row.share:.0%}[/]"]
        cells += [f"{row.peers[name]:.2f}" if name in row.peers else "" for name in peers]
        result.add_row(*cells)
        previous = row.work
    return result


def host_table(report: Report) -> Table:
    """The host cost of the report as a rich table."""
    from rich.table import Table

    result = Table(title=f"Host cost of an eager call on {report.device}")
    result.add_column("call")
    result.add_column("us", justify="right")
    result.add_column("of torch.zero_", justify="right")
    base = report.host.get("torch.zero_", math.nan)
    for name, us in report.host.items():
        result.add_row(name, f"{us:.2f}", f"{us / base:.2f}")
    return result


def plot(report: Report, path: Path, target: float = 0.95) -> None:
    """Writes a bar chart of the share of a copy, one group of bars for each work, with a line at `target`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = list(dict.fromkeys(row.work for row in report.rows))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.22 * len(report.rows)), layout="constrained")
    labels = [_label(row) for row in report.rows]
    colors = dict(zip(dict.fromkeys(labels), _colors(len(set(labels))), strict=True))
    y = 0.0
    ticks: list[float] = []
    for work in works:
        first = y
        for row, label in zip(report.rows, labels, strict=True):
            if row.work != work:
                continue
            axes.barh(y, row.share * 100, height=0.9, color=colors[label])
            axes.text(row.share * 100 + 0.5, y, f"{row.us:.2f} us", va="center", fontsize=7)
            y += 1
        ticks.append((first + y - 1) / 2)
        y += 0.8
    axes.set_yticks(ticks, works)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.axvline(target * 100, color="black", linewidth=0.8, linestyle="--", label=f"target {target:.0%}")
    axes.set_xlabel("share of a copy of the same bytes, % (longer is faster)")
    axes.set_title(f"fp8kv {report.fp8kv} on {report.device}")
    for label, color in colors.items():
        axes.barh(0, 0, color=color, label=label)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(row: Row) -> str:
    name = "x".join(map(str, row.shape))
    return f"{name}, {row.isa}, {row.threads} thr." if row.isa else name


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.9) for i in range(count)]
