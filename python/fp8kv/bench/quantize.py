"""The quantization operators in every granularity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fp8kv
from fp8kv.bench.measure import FP8, INPUT, Call, Case, small, torch_peer, vllm_ops
from fp8kv.group_shape import GroupShape

WORKS = {
    "static tensor": ("static", GroupShape.PER_TENSOR),
    "static channel": ("static", GroupShape.PER_CHANNEL),
    "static head 128": ("static", GroupShape.per_head(128)),
    "static token": ("static", GroupShape.PER_TOKEN),
    "static block 128x128": ("static", GroupShape(128, 128)),
    "dynamic token": ("dynamic", GroupShape.PER_TOKEN),
    "dynamic tensor": ("dynamic", GroupShape.PER_TENSOR),
    "dynamic block 1x128": ("dynamic", GroupShape(1, 128)),
    "dequant tensor": ("dequant", GroupShape.PER_TENSOR),
    "dequant token": ("dequant", GroupShape.PER_TOKEN),
}
SHAPES = {
    "cuda": (
        (1, 4096),
        (16, 4096),
        (128, 4096),
        (1024, 4096),
        (8192, 4096),
        (4096, 1024),
        (32768, 128),
        (4097, 5137),
        (16384, 8192),
    ),
    "cpu": ((1, 4096), (128, 4096), (1024, 4096), (8192, 4096), (513, 5137)),
}
QUICK_SHAPES = {"cuda": ((16, 4096), (1024, 4096)), "cpu": ((16, 4096),)}


def cases(device: torch.device, quick: bool) -> Iterator[QuantizeCase]:
    for work, (kind, group) in WORKS.items():
        for shape in (QUICK_SHAPES if quick else SHAPES)[device.type]:
            yield QuantizeCase(work, shape, device, kind, group)


@dataclass
class Buffers:
    """The tensors of one call."""

    input: Tensor
    result: Tensor
    scale: Tensor


@dataclass(frozen=True)
class QuantizeCase(Case[Buffers]):
    """`kind` is "static", "dynamic" or "dequant"."""

    kind: str
    group: GroupShape

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1] * (INPUT.itemsize + FP8.itemsize)

    def buffers(self, count: int) -> list[Buffers]:
        """Data distributed like activations."""
        made = []
        generator = torch.Generator(self.device).manual_seed(0)
        for _ in range(count):
            x = torch.randn(self.shape, generator=generator, device=self.device, dtype=torch.float32).to(INPUT)
            q, scale = fp8kv.quantize(x, group_shape=self.group, dtype=FP8)
            if self.kind == "dequant":
                made.append(Buffers(q, torch.empty_like(x), scale))
            else:
                made.append(Buffers(x, torch.empty_like(q), scale))
        return made

    def ours(self, b: Buffers) -> Call:
        if self.kind == "static":
            return lambda: fp8kv.static_scaled_fp8_quant(b.result, b.input, b.scale, self.group)
        if self.kind == "dynamic":
            return lambda: fp8kv.dynamic_scaled_fp8_quant(b.result, b.input, b.scale, None, self.group)
        return lambda: fp8kv.scaled_fp8_dequant(b.result, b.input, b.scale, self.group)

    def peer(self, name: str) -> Callable[[Buffers], Call] | None:
        if name == "vllm":
            return self._vllm()
        expression = self.expression()
        if expression is None:
            return None
        function = torch_peer(name, expression)
        return lambda b: lambda: function(b.input, b.scale)

    def expression(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The case in plain PyTorch; None if the groups don't divide the shape."""
        shape = self.shape
        rows, cols = (size if extent == -1 else min(extent, size) for size, extent in zip(shape, self.group, strict=True))
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

        return {"static": static, "dynamic": dynamic, "dequant": dequant}[self.kind]

    def _vllm(self) -> Callable[[Buffers], Call] | None:
        ops, group = vllm_ops(), self.group
        if ops is None:
            return None
        if self.kind == "dynamic" and group in (GroupShape.PER_TOKEN, GroupShape.PER_TENSOR):
            per_token = group == GroupShape.PER_TOKEN
            return lambda b: lambda: ops.scaled_fp8_quant(b.input, use_per_token_if_dynamic=per_token, output=b.result)
        if self.kind == "static" and group == GroupShape.PER_TENSOR:
            return lambda b: lambda: ops.scaled_fp8_quant(b.input, b.scale, output=b.result)
        if self.kind == "static" and group.rows == -1:
            return lambda b: lambda: ops.scaled_fp8_quant(b.input, b.scale.view(-1), output=b.result, group_shape=tuple(group))
        return None


def host_calls(device: torch.device) -> dict[str, Call]:
    """Calls for `host_cost`."""
    x = small(1, device).squeeze(1)
    q, scale = fp8kv.quantize(x)
    token_scale = torch.ones(x.shape[0], device=device)
    return {
        "static_scaled_fp8_quant": lambda: fp8kv.static_scaled_fp8_quant(q, x, scale),
        "static_scaled_fp8_quant, group_shape": lambda: fp8kv.static_scaled_fp8_quant(q, x, scale, (-1, -1)),
        "dynamic_scaled_fp8_quant, per token": lambda: fp8kv.dynamic_scaled_fp8_quant(q, x, token_scale, None, (1, -1)),
        "scaled_fp8_dequant": lambda: fp8kv.scaled_fp8_dequant(x, q, scale),
        "fp8kv.quantize (allocates)": lambda: fp8kv.quantize(x, scale),
    }
