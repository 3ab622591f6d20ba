"""`fp8kv doctor`: what works here, and what would make it faster.

A self-test compares every operator with `fp8kv.reference`: the bytes, or for attention the error.

Example:
    >>> import fp8kv.cli.doctor
    >>> fp8kv.cli.doctor.self_test("cpu")
    []
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fp8kv
from fp8kv import _ops, reference
from fp8kv._dtypes import CACHE_NAMES, FP8_DTYPES
from fp8kv.group_shape import GroupShape

cuda: Any = torch.cuda  # largely without annotations


@dataclass(frozen=True)
class Check:
    """One finding: `ok` is None if something is merely absent."""

    name: str
    ok: bool | None
    detail: str


def as_dict(found: list[Check], faster: list[Check]) -> dict[str, Any]:
    """For JSON: what works here and what would make it faster; `ok` if nothing fails."""
    return {
        "ok": all(check.ok is not False for check in found),
        "checks": [asdict(check) for check in found],
        "faster": [{"name": check.name, "detail": check.detail} for check in faster],
    }


def checks() -> Iterator[Check]:
    """All findings about this installation and this machine; the self-tests come last."""
    info = fp8kv.build_info()
    compiler = re.sub(r"^(?=\d)", "g++ ", info["compiler"])  # only other compilers give their names
    yield Check("fp8kv", True, f"{info['version']}, built with {compiler}")
    yield Check("Python", True, f"{platform.python_version()} on {platform.platform()}")
    built = f"built for CUDA {info['torch_cuda']}" if info["torch_cuda"] else "built without CUDA"
    yield Check("PyTorch", True, f"{info['torch']}, {built}")
    for name, path in info["libraries"].items():
        yield Check(f"{name} library", True, path)
    yield from _cuda_checks(info)
    yield Check("instruction set", True, f"{info['cpu_isa']} (available: {', '.join(info['cpu_isas'])})")
    yield from _self_tests(info)


def _cuda_checks(info: dict[str, Any]) -> Iterator[Check]:
    available = cuda.is_available()
    if info["cuda_missing"] is not None:
        yield Check("CUDA library", False if available else None, info["cuda_missing"])
    else:
        yield Check("CUDA architectures", True, info["cuda_architectures"])
    if not available:
        yield Check("GPU", None, "none that PyTorch can use")
        return
    yield Check("CUDA driver", True, _driver())
    for index in range(cuda.device_count()):
        major, minor = cuda.get_device_capability(index)
        name = f"{cuda.get_device_name(index)}, compute capability {major}.{minor}"
        if info["cuda_architectures"] is None:
            continue
        runs = architecture_runs(info["cuda_architectures"], major, minor)
        yield Check(f"GPU {index}", runs, name if runs else f"{name}: no kernels for it in this build")


def advice() -> Iterator[Check]:
    """Advice that would make it faster here; `ok` is None."""
    info = fp8kv.build_info()
    best = info["cpu_isas"][-1]
    if info["cpu_isa"] != best:
        yield Check("FP8KV_CPU_ISA", None, f"without it the CPU kernels use {best}, not {info['cpu_isa']}")
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    if "OMP_NUM_THREADS" in os.environ and threads < cpus:
        yield Check("OMP_NUM_THREADS", None, f"operators on the CPU use {threads} of {cpus} CPUs")
    if not cuda.is_available():
        yield Check("GPU", None, "with an NVIDIA GPU that PyTorch can use, the operators are much faster")
        return
    if info["cuda_architectures"] is None:
        yield Check("CUDA library", None, "install an nvcc of version 12.8 or newer and fp8kv again, to use the GPU")
        return
    if os.environ.get("FP8KV_DEBUG") == "1":
        yield Check("FP8KV_DEBUG", None, "without it operators on CUDA do not wait for the GPU")
    capabilities = [cuda.get_device_capability(index) for index in range(cuda.device_count())]
    if os.environ.get("FP8KV_PDL") != "1" and max(capabilities) >= (9, 0):
        yield Check("FP8KV_PDL", None, "with FP8KV_PDL=1 kernels of a decode step overlap")
    for major, minor in sorted(set(capabilities)):
        if f"{major}{minor}" not in info["cuda_architectures"]:
            detail = f"a build for {major}.{minor} has code made for this GPU"
            yield Check("CUDA architectures", None, detail)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return "of unknown version (no answer from nvidia-smi)"
    return answer.split("\n")[0].strip()


def architecture_runs(architectures: str, major: int, minor: int) -> bool:
    """Whether code for `architectures`, such as "90-real;120-virtual", runs on a GPU of this capability.

    Binary code runs on its major version from its minor version on; PTX on all versions from its own on; code
    for an architecture with a suffix (90a) only on that architecture.

    Example:
        >>> from fp8kv.cli.doctor import architecture_runs
        >>> architecture_runs("80-real;90-real", 8, 9), architecture_runs("80-real;90-real", 12, 0)
        (True, False)
    """
    for match in re.finditer(r"(\d+)(\d)([af]?)(-real|-virtual)?", architectures):
        code = (int(match[1]), int(match[2]))
        if match[3]:
            if code == (major, minor):
                return True
            continue
        if match[4] != "-virtual" and code[0] == major and code[1] <= minor:
            return True
        if match[4] != "-real" and code <= (major, minor):
            return True
    return False


def _self_tests(info: dict[str, Any]) -> Iterator[Check]:
    try:
        _ops.introspect()
    except ImportError as error:
        yield Check("introspection", None, f"only the instruction set in use is tested: {error}")
    for isa in _ops.each_cpu_isa():
        yield _self_test_check(f"self-test on CPU, {isa}", "cpu")
    if info["cuda_architectures"] is not None and cuda.is_available():
        for index in range(cuda.device_count()):
            yield _self_test_check(f"self-test on GPU {index}", f"cuda:{index}")


def _self_test_check(name: str, device: str) -> Check:
    try:
        failures = self_test(device)
    except RuntimeError as error:
        return Check(name, False, str(error).splitlines()[0])
    return Check(name, not failures, "; ".join(failures) or PASSED)


PASSED = "the same bytes as fp8kv.reference; attention within its tolerance"


_GROUPS = {
    "tensor": GroupShape.PER_TENSOR,
    "token": GroupShape.PER_TOKEN,
    "channel": GroupShape.PER_CHANNEL,
    "head": GroupShape.per_head(64),
    "block": GroupShape(16, 32),
}


def self_test(device: str | torch.device) -> list[str]:
    """The names of operators that differ from `fp8kv.reference` on hostile values.

    Attention is compared within a tolerance on ordinary values. The reference runs on the CPU, so that a
    fault of the device can't affect both.
    """
    return [
        failure.replace("torch.", "")
        for input_type in (torch.float32, torch.float16, torch.bfloat16)
        for compare in (_quantization_failures, _cache_failures, _attention_failures)
        for failure in compare(device, input_type)
    ]


def _quantization_failures(device: str | torch.device, input_type: torch.dtype) -> Iterator[str]:
    x = _values(input_type)
    for name, group in _GROUPS.items():
        for dtype in FP8_DTYPES:
            what = f"{input_type}, {dtype}, per {name}"
            expected, expected_scale = reference.quantize(x, group_shape=group, dtype=dtype)
            actual, scale = fp8kv.quantize(x.to(device), group_shape=group, dtype=dtype)
            if not (_same(actual, expected) and _same(scale, expected_scale)):
                yield f"dynamic_scaled_fp8_quant ({what})"
            actual, _ = fp8kv.quantize(x.to(device), expected_scale.to(device), group_shape=group, dtype=dtype)
            if not _same(actual, expected):
                yield f"static_scaled_fp8_quant ({what})"
            value = reference.dequantize(expected, expected_scale, group_shape=group, dtype=input_type)
            back = fp8kv.dequantize(expected.to(device), expected_scale.to(device), group_shape=group, dtype=input_type)
            if not _same(back, value):
                yield f"scaled_fp8_dequant ({what})"
        amax = torch.zeros_like(expected_scale)
        running = amax.to(device)
        reference.group_amax(amax, x, group)
        fp8kv.group_amax(running, x.to(device), group)
        if not _same(running, amax):
            yield f"group_amax ({input_type}, per {name})"


#: For 5 blocks of 16 tokens with 4 heads. The third kind is computed.
_CACHE_SCALES = {
    "tensor": torch.tensor([0.3]),
    "head": torch.tensor([0.01, 1.9999998807907104, 3.0, 700.0]),
    "token and head": torch.zeros(5, 16, 4),
}


def _cache_failures(device: str | torch.device, input_type: torch.dtype) -> Iterator[str]:
    for name, scale in _CACHE_SCALES.items():
        for dtype in FP8_DTYPES:
            what = f"({input_type}, {dtype}, per {name})"
            expected = _append(reference, "cpu", input_type, dtype, scale)
            actual = _append(fp8kv, device, input_type, dtype, scale)
            if not all(map(_same, actual, expected)):
                op = "reshape_and_cache_flash_dynamic" if scale.dim() == 3 else "reshape_and_cache_flash"
                yield f"{op} {what}"
            if scale.dim() == 1:
                steps = [_step(ops, at, input_type, dtype, scale) for ops, at in ((fp8kv, device), (reference, "cpu"))]
                if not all(map(_same, *steps)):
                    yield f"rope_quant_and_cache {what}"
            rows = _gather(fp8kv, device, input_type, expected)
            if not all(map(_same, rows, _gather(reference, "cpu", input_type, expected))):
                yield f"gather_and_dequant_cache {what}"


def _step(
    ops: ModuleType, device: str | torch.device, input_type: torch.dtype, dtype: torch.dtype, scale: Tensor
) -> list[Tensor]:
    """Queries, and K and V caches, after one step with RoPE of slices of one tensor."""
    x = _values(input_type).to(device)
    heads = x.flatten()[: len(x) * 12 * 16].view(-1, 12, 16)
    query, key, value = heads[:, :4], heads[:, 4:8], heads[:, 8:]
    slots = torch.arange(len(heads), device=device) % 90
    slots = torch.where(slots < 80, slots, -1)[: min(len(heads), 90)]
    angles = torch.arange(90.0).view(-1, 1) * torch.tensor([1.0, 0.1, 0.01, 0.001])
    table = torch.cat((angles.cos(), angles.sin()), 1).to(device)
    out = torch.zeros(len(heads), 4, 16, dtype=dtype, device=device)
    caches = torch.zeros(2, 5, 16, 4, 16, dtype=dtype, device=device)
    ops.rope_quant_and_cache(
        query,
        key,
        value,
        out,
        *caches,
        slots,
        CACHE_NAMES[dtype],
        *[scale.to(device)] * 3,
        slots.abs(),
        table,
    )
    return [out, *caches]


def _append(
    ops: ModuleType, device: str | torch.device, input_type: torch.dtype, dtype: torch.dtype, scale: Tensor
) -> list[Tensor]:
    """The caches of K and V in the layout HND, and their scales."""
    key = _values(input_type).view(67, 4, 50).to(device)
    slots = torch.arange(67).roll(5)
    slots[::7] = -1
    arguments = (key, key.flip(0), *torch.zeros(2, 5, 4, 16, 50).to(device, dtype).transpose(2, 3))
    scales = [scale.to(device, copy=True), 2 * scale.to(device)]
    if scale.dim() == 3:
        ops.reshape_and_cache_flash_dynamic(*arguments, *scales, slots.to(device), CACHE_NAMES[dtype])
    else:
        ops.reshape_and_cache_flash(*arguments, slots.to(device), CACHE_NAMES[dtype], *scales)
    return [*arguments[2:], *scales]


def _gather(ops: ModuleType, device: str | torch.device, output_type: torch.dtype, stored: list[Tensor]) -> list[Tensor]:
    """K and V of two sequences."""
    key_cache, value_cache, k_scale, v_scale = (x.to(device) for x in stored)
    table, sums, starts = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([[4, 0, 3], [1, 2, -1]], [0, 45, 66], [3, 10])
    )
    key, value = torch.zeros(2, 70, 4, 50, dtype=output_type, device=device)
    name = CACHE_NAMES[key_cache.dtype]
    ops.gather_and_dequant_cache(key_cache, value_cache, key, value, table, sums, name, k_scale, v_scale, starts)
    return [key, value]


#: norm(out - reference) / norm(reference), by the dtype of the result: docs/attention.md.
_NORM_RULE = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}
#: Shapes of scales, for 6 blocks of 16 tokens with 2 heads of 64.
_ATTENTION_SCALES = {"tensor": (1,), "head": (2,), "channel": (2, 64), "token and head": (6, 16, 2)}


def _attention_failures(device: str | torch.device, input_type: torch.dtype) -> Iterator[str]:
    for name, shape in _ATTENTION_SCALES.items():
        for dtype in FP8_DTYPES:
            scale = torch.exp2(torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 2)
            actual = _attend(fp8kv, device, input_type, dtype, scale).cpu().double()
            exact = _attend(reference, "cpu", input_type, dtype, scale, torch.float64)
            error = actual - exact
            near = error.abs().max() <= 2.0**-8 * _LARGEST * scale.max()
            if not (near and error.norm() <= _NORM_RULE[input_type] * exact.norm()):
                yield f"paged_attention ({input_type}, {dtype}, per {name})"


#: No value of the caches of `_attend` is larger.
_LARGEST = 4.0


def _attend(
    ops: ModuleType,
    device: str | torch.device,
    input_type: torch.dtype,
    dtype: torch.dtype,
    scale: Tensor,
    output_type: torch.dtype | None = None,
) -> Tensor:
    """4 queries of two sequences, with sinks, softcap and a window, to K and V interleaved in memory."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 8, 64, generator=generator)
    stored = torch.randn(6, 16, 2, 128, generator=generator)
    stored = stored.clamp(-_LARGEST, _LARGEST).to(dtype).to(device)
    table, lengths, sums = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([[5, 0, 3], [1, 4, -1]], [45, 20], [0, 3, 4])
    )
    result: Tensor = ops.paged_attention(
        query.to(device, input_type),
        stored[..., :64],
        stored[..., 64:],
        table,
        lengths,
        kv_cache_dtype=CACHE_NAMES[dtype],
        k_scale=scale.to(device),
        v_scale=scale.to(device),
        cu_query_lens=sums,
        sliding_window=40,
        softcap=20.0,
        sinks=torch.linspace(-1, 1, 8, device=device),
        out=torch.empty(4, 8, 64, dtype=output_type or input_type, device=device),
    )
    return result


def _values(dtype: torch.dtype) -> Tensor:
    """[67, 200] values over the range of `dtype`, with zeros, subnormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-24, 15, (67, 200), generator=generator)
    x = torch.randn(67, 200, generator=generator) * torch.exp2(exponents.float())
    x[5, :] = 0
    x[7, 3], x[9, 70], x[11, 199], x[13, 0], x[17, 1] = float("nan"), float("inf"), -float("inf"), -0.0, 1e-45
    return x.to(dtype)


def _same(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))
