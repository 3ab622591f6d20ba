"""What all operators of the quantization family have in common: granularities, dtypes, layouts and shapes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from helpers import KINDS_OF_LAYOUTS, LAYOUTS, REAL, each_quantized, each_real
from quantization_family import (
    AMAX,
    CPU,
    DEQUANTIZE,
    DYNAMIC,
    GRANULARITIES,
    OPERATORS,
    SHAPES,
    STATIC,
    Group,
    Operator,
    Problem,
    check,
    dtype_pairs_of,
    each_dtype_pair,
    each_granularity,
    each_operator,
    each_problem,
)

#: Granularities that lead to kernels of their own.
KINDS_OF_GRANULARITIES = ["tensor", "token", "channel", "head 4", "block 3x5"]


# Granularities and dtypes


@each_dtype_pair
@each_granularity
def test_every_granularity(
    device: torch.device,
    granularity: str,
    operator: Operator,
    input_dtype: torch.dtype,
    result_dtype: torch.dtype | None,
) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for shape in SHAPES:
        operator.check_shape(device, shape, scale_shape(*shape), group, input_dtype, result_dtype, seed=sum(shape))


@each_operator
@each_granularity
def test_every_granularity_for_each_instruction_set(isa: str, granularity: str, operator: Operator) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    for dtypes in dtype_pairs_of(operator):
        for shape in SHAPES:
            operator.check_shape(CPU, shape, scale_shape(*shape), group, *dtypes, seed=sum(shape))


FORMS: list[tuple[Group, list[tuple[int, ...]]]] = [
    (None, [(), (1,), (1, 1), (1, 1, 1), (12, 1), (1, 40), (3, 5), (12, 40)]),
    ((-1, -1), [(), (1,), (1, 1), (1, 1, 1)]),
    ((1, -1), [(12,), (12, 1), (1, 12, 1)]),
    ((-1, 1), [(40,), (1, 40), (1, 1, 40)]),
    ((-1, 8), [(5,), (1, 5)]),
    ((5, -1), [(3,), (3, 1), (1, 3, 1)]),
    ((5, 8), [(3, 5), (1, 3, 5)]),
]


@each_operator
def test_every_form_of_a_scale(device: torch.device, operator: Operator) -> None:
    for group, scale_shapes in FORMS:
        for scale_shape in scale_shapes if group is not None or operator.group_is_optional else ():
            operator.check_shape(device, (12, 40), scale_shape, group)


@each_operator
@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "head 16", "block 3x5", "block 1x128"])
@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (300, 4096), (4097, 515), (2000, 128)], ids=str)
def test_shapes_of_models(device: torch.device, shape: tuple[int, int], granularity: str, operator: Operator) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    operator.check_shape(device, shape, scale_shape(*shape), group)


@each_dtype_pair
def test_many_rows_of_channels(
    device: torch.device,
    operator: Operator,
    input_dtype: torch.dtype,
    result_dtype: torch.dtype | None,
) -> None:
    """So many that a thread takes several: of whole vectors, and of odd length."""
    for shape in ((600, 4096), (2100, 515)):
        operator.check_shape(device, shape, shape[1:], (-1, 1), input_dtype, result_dtype)


@each_operator
@pytest.mark.parametrize("power", [8, 16, 32, 64, 128, 256, 512, 1024])
def test_rows_around_powers_of_two(device: torch.device, power: int, operator: Operator) -> None:
    """Vectors, warps, thread blocks, and what the CPU takes at a time: one element less, none, one more."""
    for length, rows, dtypes in product((power - 1, power, power + 1), (1, 3), dtype_pairs_of(operator)):
        for group, scale_shape in (((-1, -1), ()), ((1, -1), (rows,)), ((-1, 1), (length,))):
            operator.check_shape(device, (rows, length), scale_shape, group, *dtypes)


@each_dtype_pair
@pytest.mark.parametrize("shape", [(37, 657), (9, 2053), (500, 17)], ids=str)
def test_groups_that_end_anywhere(
    device: torch.device,
    shape: tuple[int, int],
    operator: Operator,
    input_dtype: torch.dtype,
    result_dtype: torch.dtype | None,
) -> None:
    """In contiguous rows of odd length, of whose last group may remain a few elements."""
    rows, cols = shape
    for height, width in ((-1, 128), (1, 128), (16, 128), (1, 17), (1, 250), (1, -1), (5, -1)):
        count = (1 if height == -1 else -(-rows // height), 1 if width == -1 else -(-cols // width))
        operator.check_shape(device, shape, count, (height, width), input_dtype, result_dtype)


@each_quantized
@each_real
def test_a_single_number(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = torch.tensor(-3.25)
    for group, scale_shape in ((None, ()), (None, (1,)), ((-1, -1), ()), ((1, 1), (1,)), ((1, -1), (1, 1))):
        scale = torch.full(scale_shape, 0.25)
        check(STATIC, device, x.to(real), scale, group, fp8)
        check(DYNAMIC, device, x.to(real), scale, group, fp8)
        check(DEQUANTIZE, device, x.to(fp8), scale, group, real)
        if group is not None:
            check(AMAX, device, x.to(real), scale, group)


# Memory


def layouts_of_operators() -> list[object]:
    """All for static quantization; other operators compute indices as it does, and get one of each kind."""
    return [
        pytest.param(operator, sides, layout, id=f"{name}-{' and '.join(sides)}-{layout}")
        for name, operator in OPERATORS.items()
        for sides in (("input",), ("scale",), ("result",), ("input", "result"))
        if operator is STATIC or len(sides) == 1
        if operator.results or "result" not in sides
        for layout in (LAYOUTS if operator is STATIC else (*KINDS_OF_LAYOUTS, "inside"))
        if layout != "contiguous"
    ]


@pytest.mark.parametrize("granularity", KINDS_OF_GRANULARITIES)
@pytest.mark.parametrize(("operator", "sides", "layout"), layouts_of_operators())
def test_layouts(device: torch.device, operator: Operator, sides: tuple[str, ...], layout: str, granularity: str) -> None:
    group, scale_shape = GRANULARITIES[granularity]
    whole_vectors = [((5, 48), real) for real in REAL]
    for shape, real in (*whole_vectors, ((18, 37), "fp32"), ((3, 257), "fp16")):
        dtypes = operator.inputs.get(real), operator.results.get(real)
        operator.check_shape(device, shape, scale_shape(*shape), group, *dtypes, layouts=dict.fromkeys(sides, layout))


#: "offset 4" differs from "offset 1" in the loads only, and has every partner in the test of misalignment.
PAIRED_LAYOUTS = [layout for layout in KINDS_OF_LAYOUTS if layout != "offset 4"]


@pytest.mark.parametrize("result_layout", PAIRED_LAYOUTS)
@pytest.mark.parametrize("input_layout", PAIRED_LAYOUTS)
@pytest.mark.parametrize("operator", [STATIC, DYNAMIC, DEQUANTIZE], ids=["static", "dynamic", "dequantize"])
def test_pairs_of_layouts(device: torch.device, operator: Operator, input_layout: str, result_layout: str) -> None:
    layouts = {"input": input_layout, "result": result_layout}
    for group, scale_shape in (((-1, -1), ()), ((1, -1), (6,)), ((-1, 1), (40,)), ((2, 8), (3, 5))):
        operator.check_shape(device, (6, 40), scale_shape, group, layouts=layouts)


@each_operator
@pytest.mark.parametrize("offset_in", range(8))
def test_misaligned_by_every_number_of_elements(device: torch.device, operator: Operator, offset_in: int) -> None:
    """Input and result, each by any number; for every pair of dtypes."""
    for offset_out, dtypes in product(range(8 if operator.results else 1), dtype_pairs_of(operator)):
        offsets = {"input": offset_in, "result": offset_out}
        layouts = {name: f"offset {offset}" for name, offset in offsets.items() if offset}
        for shape in ((4, 64), (1, 100), (7, 129)):
            for group, scale_shape in (((-1, -1), ()), ((1, -1), shape[:1]), ((-1, 1), shape[1:])):
                operator.check_shape(device, shape, scale_shape, group, *dtypes, layouts)


@each_operator
@pytest.mark.parametrize("source", [(1, 40), (12, 1), (1, 1)], ids=["rows", "columns", "all"])
def test_expanded_input(device: torch.device, source: tuple[int, int], operator: Operator) -> None:
    x = operator.random_input(source, operator.usual(operator.inputs)).expand(12, 40)
    for group, scale_shape in (((-1, -1), ()), ((1, -1), (12,)), ((-1, 1), (40,)), ((5, 7), (3, 6))):
        check(operator, device, x, operator.initial_scale(scale_shape), group, layouts={"input": "as given"})


@each_operator
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], ids=str)
def test_permuted_input(device: torch.device, order: tuple[int, int, int], operator: Operator) -> None:
    for (input_dtype, result_dtype), result in product(dtype_pairs_of(operator), ("contiguous", "as given")):
        x = operator.random_input((6, 10, 16), input_dtype).permute(order)
        rows, cols = x.shape[0] * x.shape[1], x.shape[2]
        blocks = (-(-rows // 4), -(-cols // 3))
        layouts = {"input": "as given", "result": result}
        for group, scale_shape in (((1, -1), (rows,)), ((-1, 1), (cols,)), ((4, 3), blocks)):
            scale = operator.initial_scale(scale_shape)
            check(operator, device, x, scale, group, result_dtype, layouts)


# Shapes

DIMENSIONS: list[Problem] = [
    ((2, 3, 64), None, (1, 3, 1)),
    ((5, 8, 64), None, (1, 8, 1)),
    ((5, 8, 64), None, (5, 8, 1)),
    ((5, 8, 64), None, (1, 1, 64)),
    ((4, 6, 8), None, (2, 3, 4)),
    ((4, 6, 8), None, (4, 6, 8)),
    ((2, 3, 4, 5), None, (2, 1, 4, 1)),
    ((2, 3, 4, 16), None, (2, 1, 4, 1)),
    ((2, 2, 3, 2, 3, 2), None, (1, 2, 1, 2, 1, 2)),
    ((2, 3, 64), (1, -1), (2, 3, 1)),
    ((2, 3, 64), (1, -1), (6,)),
    ((2, 3, 64), (1, 16), (2, 3, 4)),
    ((2, 3, 64), (1, 16), (6, 4)),
    ((2, 3, 64), (-1, 16), (4,)),
    ((2, 3, 64), (-1, 1), (1, 1, 64)),
    ((2, 6, 10), (4, 3), (3, 4)),
    ((3, 5, 10), (4, 3), (4, 4)),
    ((3, 5, 7, 9), (2, -1), (53,)),
    ((3, 5, 7, 9), (35, 4), (3, 3)),
    ((3, 5, 7, 9), (10, 4), (11, 3)),
    ((64,), (-1, 16), (4,)),
    ((64,), (1, -1), (1,)),
    ((1,), (-1, -1), (1,)),
    ((), None, ()),
    ((), (1, 1), (1,)),
    ((2, 1, 3, 1, 2, 2, 1, 5), None, (1, 1, 3, 1, 1, 2, 1, 1)),
    ((2, 1, 3, 1, 2, 2, 1, 5), (1, -1), (24,)),
]


@each_problem(DIMENSIONS)
def test_more_and_fewer_dimensions(
    device: torch.device,
    operator: Operator,
    shape: tuple[int, ...],
    group: Group,
    scale_shape: tuple[int, ...],
) -> None:
    for dtypes in dtype_pairs_of(operator):
        operator.check_shape(device, shape, scale_shape, group, *dtypes)
    for layout in ("transposed", "columns", "rows", "inside") if shape else ():
        for sides in (("input",), ("scale", "result"), ("input", "scale", "result")):
            operator.check_shape(device, shape, scale_shape, group, layouts=dict.fromkeys(sides, layout))


@each_operator
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 11, 100])
def test_groups_of_rows_across_leading_dimensions(device: torch.device, rows: int, operator: Operator) -> None:
    """Groups of flat rows that begin and end inside the leading dimensions of a strided input."""
    for layout in ("contiguous", "inside", "rows", "transposed"):
        for cols in (-1, 7):
            scale_shape = (-(-60 // rows), 1 if cols == -1 else 4)
            layouts = {"input": layout, "result": "inside"}
            operator.check_shape(device, (3, 4, 5, 24), scale_shape, (rows, cols), layouts=layouts)


@each_operator
@pytest.mark.parametrize("group", [(7, 9), (4, 8), (100, 100), (1, 100), (100, 1), (10, 32)], ids=str)
def test_ragged_blocks(device: torch.device, group: tuple[int, int], operator: Operator) -> None:
    for shape in ((10, 33), (1, 100), (25, 64), (11, 129)):
        scale_shape = [-(-size // extent) for size, extent in zip(shape, group, strict=True)]
        operator.check_shape(device, shape, scale_shape, group)


EMPTY: list[Problem] = [
    ((0,), None, ()), ((0,), (-1, -1), (1,)), ((0, 5), None, (1,)), ((5, 0), None, ()),
    ((0, 5), (1, -1), (0,)), ((0, 5), (1, -1), (0, 1)), ((5, 0), (1, -1), (5,)), ((5, 0), (-1, 1), (0,)),
    ((5, 0), (-1, 1), (1, 0)), ((0, 5), (-1, 1), (5,)), ((0, 5), (-1, 2), (1, 3)), ((0, 5), (2, 2), (0, 3)),
    ((2, 0, 4), None, (1, 0, 1)), ((0, 4, 4), None, (1, 4, 1)), ((0, 0), (1, 1), (0, 0)),
]  # fmt: skip


@each_operator
def test_empty(device: torch.device, operator: Operator) -> None:
    """A group without elements gets the smallest scale from dynamic quantization, and keeps its amax."""
    for dtypes in dtype_pairs_of(operator):
        for shape, group, scale_shape in EMPTY:
            if group is not None or operator.group_is_optional:
                operator.check_shape(device, shape, scale_shape, group, *dtypes)
