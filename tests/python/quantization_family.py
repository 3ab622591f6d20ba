"""The operators of the quantization family, their formats and their granularities, as tables.

Tests run for every row of them: a new operator is a row of `OPERATORS`, with the formats that it reads and
writes, and a new granularity a row of `GRANULARITIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fp8kv
from fp8kv import reference
from helpers import (
    QUANTIZED,
    REAL,
    assert_same_bytes,
    copy_bits,
    empty_view,
    placed,
    random_bits,
    random_scales,
    values,
)

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn

Group = Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Operator:
    """How an operator is called, and what goes in and comes out.

    `call` gets the function, the result (None without `results`), the input, the scale, the group shape and
    the upper bound of computed scales. "Scale" is the tensor with a number for each group, amax too.
    """

    name: str
    inputs: Mapping[str, torch.dtype]
    results: Mapping[str, torch.dtype]
    call: Callable[..., None]
    initial_scale: Callable[[Sequence[int]], Tensor] = random_scales
    group_is_optional: bool = True

    def random_input(self, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
        """With zeros, subnormal numbers, infinities and NaN."""
        if dtype in REAL.values():
            return values(shape, dtype, seed)
        return random_bits(shape, dtype, torch.Generator().manual_seed(seed))

    def check_shape(
        self,
        device: torch.device,
        shape: Sequence[int],
        scale_shape: Sequence[int],
        group: Group,
        input_dtype: torch.dtype | None = None,
        result_dtype: torch.dtype | None = None,
        layouts: Mapping[str, str] = {},
        seed: int = 0,
    ) -> None:
        """`check` with a random input. Without dtypes: bfloat16 and the first format."""
        x = self.random_input(shape, input_dtype or self.usual(self.inputs), seed)
        check(self, device, x, self.initial_scale(scale_shape), group, result_dtype, layouts)

    @staticmethod
    def usual(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        return dtypes.get("bf16") or next(iter(dtypes.values()))


STATIC = Operator(
    "static_scaled_fp8_quant", REAL, QUANTIZED,
    lambda op, result, x, scale, group, bound: op(result, x, scale, group),
)  # fmt: skip
DYNAMIC = Operator(
    "dynamic_scaled_fp8_quant", REAL, QUANTIZED,
    lambda op, result, x, scale, group, bound: op(result, x, scale, bound, group),
    initial_scale=lambda shape: torch.full(tuple(shape), 777.0),
)  # fmt: skip
DEQUANTIZE = Operator(
    "scaled_fp8_dequant",
    QUANTIZED,
    REAL,
    lambda op, result, x, scale, group, bound: op(result, x, scale, group),
)
AMAX = Operator(
    "group_amax", REAL, {}, lambda op, result, x, scale, group, bound: op(scale, x, group),
    initial_scale=lambda shape: torch.zeros(tuple(shape)), group_is_optional=False,
)  # fmt: skip
OPERATORS = {"static": STATIC, "dynamic": DYNAMIC, "dequantize": DEQUANTIZE, "amax": AMAX}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())

each_dtype_pair = pytest.mark.parametrize(
    ("operator", "input_dtype", "result_dtype"),
    [
        pytest.param(operator, input_dtype, result_dtype, id=" ".join((name, x, y)).strip())
        for name, operator in OPERATORS.items()
        for x, input_dtype in operator.inputs.items()
        for y, result_dtype in (operator.results or {"": None}).items()
    ],
)


def dtype_pairs_of(operator: Operator) -> list[tuple[torch.dtype, torch.dtype | None]]:
    return [*product(operator.inputs.values(), operator.results.values() or [None])]


#: An input of that shape, a group shape, and a shape of the scale that goes with both.
Problem = tuple[tuple[int, ...], Group, tuple[int, ...]]


def each_problem(problems: list[Problem]) -> pytest.MarkDecorator:
    """Every operator with every problem that it takes."""
    return pytest.mark.parametrize(
        ("operator", "shape", "group", "scale_shape"),
        [
            pytest.param(operator, *problem, id=f"{name}-{'-'.join(map(str, problem))}")
            for name, operator in OPERATORS.items()
            for problem in problems
            if problem[1] is not None or operator.group_is_optional
        ],
    )


#: name, group shape, shape of the scale for an input [M, N]
GRANULARITIES: dict[str, tuple[tuple[int, int], Callable[[int, int], tuple[int, ...]]]] = {
    "tensor": ((-1, -1), lambda m, n: (1,)),
    "token": ((1, -1), lambda m, n: (m, 1)),
    "channel": ((-1, 1), lambda m, n: (1, n)),
    "head 4": ((-1, 4), lambda m, n: (1, -(-n // 4))),
    "head 16": ((-1, 16), lambda m, n: (-(-n // 16),)),
    "block 3x5": ((3, 5), lambda m, n: (-(-m // 3), -(-n // 5))),
    "block 1x8": ((1, 8), lambda m, n: (m, -(-n // 8))),
    "block 1x128": ((1, 128), lambda m, n: (m, -(-n // 128))),
    "block 2xN": ((2, -1), lambda m, n: (-(-m // 2),)),
    "block 16x16": ((16, 16), lambda m, n: (-(-m // 16), -(-n // 16))),
    "element": ((1, 1), lambda m, n: (m, n)),
}
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)

#: Matrices around the sizes of vectors, of warps and of what one thread block does.
SHAPES = [
    (1, 1), (1, 7), (3, 8), (5, 16), (7, 33), (16, 64), (33, 100), (64, 130), (2, 1024), (9, 513), (300, 256),
]  # fmt: skip


def check(
    operator: Operator,
    device: torch.device,
    x: Tensor,
    scale: Tensor,
    group: Group = None,
    result_dtype: torch.dtype | None = None,
    layouts: Mapping[str, str] = {},
    scale_ub: Tensor | None = None,
) -> None:
    """Compares `operator` on `device` with the reference: scale, result and every byte around them.

    The input must stay as it is. `scale` is what the tensor holds before the call. `layouts` says how
    "input", "scale" and "result" lie in memory, contiguous by default; "as given" is as `x` lies.
    """
    dtype = result_dtype or operator.usual(operator.results) if operator.results else None

    def run(ops: ModuleType, at: torch.device) -> list[Tensor]:
        scales, around_scales = empty_view(scale.shape, torch.float32, layouts.get("scale", "contiguous"), at)
        copy_bits(scales, scale)
        result, around_result = None, []
        if dtype is not None:
            place = layouts.get("result", "contiguous")
            if place == "as given":
                result = buffer = torch.empty_like(x, dtype=dtype, device=at)
            else:
                result, buffer = empty_view(x.shape, dtype, place, at)
            around_result = [result, buffer]
        source = x if ops is reference else placed(x, layouts.get("input", "contiguous"), at)
        bound = None if scale_ub is None else scale_ub.to(at)
        operator.call(getattr(ops, operator.name), result, source, scales, group, bound)
        return [scales, around_scales, *around_result, source]

    for actual, expected in zip(run(fp8kv, device), run(reference, CPU), strict=True):
        assert_same_bytes(actual, expected)
