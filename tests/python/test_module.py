"""The Python functions and the module: results, allocations and errors."""

from __future__ import annotations

import pytest
import torch

import fp8kv
from fp8kv import GroupShape, QuantFP8, reference
from fp8kv._ops import introspect
from helpers import assert_same_bytes, each_fp8, each_real, random_scales, raw, values

E4M3 = torch.float8_e4m3fn

# GroupShape


def test_the_names_of_group_shapes() -> None:
    assert GroupShape.PER_TENSOR == (-1, -1)
    assert GroupShape.PER_TOKEN == (1, -1)
    assert GroupShape.PER_CHANNEL == (-1, 1)
    assert GroupShape.per_head(128) == (-1, 128)
    assert GroupShape(rows=3, cols=5) == (3, 5)


def test_a_group_shape_is_a_named_tuple() -> None:
    rows, cols = GroupShape(2, 7)
    assert (rows, cols) == (2, 7)
    assert GroupShape(2, 7)._asdict() == {"rows": 2, "cols": 7}
    assert repr(GroupShape(2, 7)) == "GroupShape(rows=2, cols=7)"


@pytest.mark.parametrize("head_size", [0, -1])
def test_a_head_has_at_least_one_element(head_size: int) -> None:
    with pytest.raises(ValueError, match=f"GroupShape.per_head: head_size must be at least 1, got {head_size}"):
        GroupShape.per_head(head_size)


# quantize and dequantize


@pytest.mark.parametrize(
    ("shape", "group", "expected"),
    [
        ((4, 6), None, (1,)),
        ((4, 6), GroupShape.PER_TENSOR, (1,)),
        ((4, 6), GroupShape.PER_TOKEN, (4, 1)),
        ((2, 3, 6), GroupShape.PER_TOKEN, (2, 3, 1)),
        ((6,), GroupShape.PER_TOKEN, (1,)),
        ((), GroupShape.PER_TOKEN, (1,)),
        ((4, 6), GroupShape.PER_CHANNEL, (1, 6)),
        ((2, 3, 6), GroupShape.PER_CHANNEL, (1, 6)),
        ((4, 6), GroupShape.per_head(2), (1, 3)),
        ((4, 6), GroupShape.per_head(4), (1, 2)),
        ((2, 3, 6), GroupShape(1, 2), (2, 3, 3)),
        ((2, 3, 6), GroupShape(4, 4), (2, 2)),
        ((4, 6), GroupShape(100, 100), (1, 1)),
        ((4, 6), (2, -1), (2, 1)),
        ((0, 6), GroupShape.PER_TOKEN, (0, 1)),
        ((0, 6), GroupShape.PER_CHANNEL, (1, 6)),
        ((4, 0), GroupShape(1, 2), (4, 0)),
    ],
    ids=str,
)
def test_the_shape_of_a_computed_scale(
    device: torch.device, shape: tuple[int, ...], group: tuple[int, int] | None, expected: tuple[int, ...]
) -> None:
    x = torch.ones(shape, device=device)
    q, scale = fp8kv.quantize(x, group_shape=group)
    assert (scale.shape, scale.dtype, scale.device) == (expected, torch.float32, x.device)
    assert (q.shape, q.dtype, q.device) == (x.shape, E4M3, x.device)
    assert fp8kv.dequantize(q, scale, group_shape=group).shape == x.shape


@each_fp8
@each_real
def test_quantize_with_a_scale(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x, scale = values((5, 40), real), random_scales((5, 1))
    on_device = scale.to(device)
    q, returned = fp8kv.quantize(x.to(device), on_device, group_shape=GroupShape.PER_TOKEN, dtype=fp8)
    assert returned is on_device
    assert_same_bytes(q, reference.quantize(x, scale, group_shape=(1, -1), dtype=fp8)[0])


@each_fp8
@each_real
def test_quantize_without_a_scale(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    x = values((5, 40), real)
    q, scale = fp8kv.quantize(x.to(device), group_shape=GroupShape.PER_TOKEN, dtype=fp8)
    expected, expected_scale = reference.quantize(x, group_shape=(1, -1), dtype=fp8)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(q, expected)


def test_quantize_with_a_bound(device: torch.device) -> None:
    x, bound = values((5, 40), torch.float32, specials=False), torch.tensor([1.5])
    q, scale = fp8kv.quantize(x.to(device), scale_ub=bound.to(device))
    expected, expected_scale = reference.quantize(x, scale_ub=bound)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(q, expected)


def test_quantize_into_a_given_tensor(device: torch.device) -> None:
    x = values((5, 40), torch.float32).to(device)
    out = torch.zeros(5, 60, dtype=torch.float8_e5m2, device=device)
    q, _ = fp8kv.quantize(x, group_shape=(1, -1), out=out[:, :40])
    assert q.data_ptr() == out.data_ptr()
    assert q.dtype == torch.float8_e5m2, "out decides the format"
    assert_same_bytes(out[:, :40], reference.quantize(x.cpu(), group_shape=(1, -1), dtype=torch.float8_e5m2)[0])
    assert not raw(out)[:, 40:].any()


@each_fp8
@each_real
def test_dequantize(device: torch.device, real: torch.dtype, fp8: torch.dtype) -> None:
    q, scale = reference.quantize(values((5, 40), torch.float32), group_shape=(1, 16), dtype=fp8)
    x = fp8kv.dequantize(q.to(device), scale.to(device), group_shape=(1, 16), dtype=real)
    assert x.dtype == real
    assert_same_bytes(x, reference.dequantize(q, scale, group_shape=(1, 16), dtype=real))


def test_dequantize_into_a_given_tensor(device: torch.device) -> None:
    q, scale = reference.quantize(values((5, 40), torch.float32))
    out = torch.zeros(5, 60, dtype=torch.float16, device=device)
    x = fp8kv.dequantize(q.to(device), scale.to(device), out=out[:, :40])
    assert x.data_ptr() == out.data_ptr()
    assert_same_bytes(out[:, :40], reference.dequantize(q, scale, dtype=torch.float16))
    assert not out[:, 40:].any()


def test_dequantize_gives_bf16_unless_told(device: torch.device) -> None:
    q, scale = fp8kv.quantize(torch.ones(3, device=device))
    assert fp8kv.dequantize(q, scale).dtype == torch.bfloat16


def test_results_of_strided_inputs_are_contiguous(device: torch.device) -> None:
    x = torch.ones(6, 8, device=device).T
    q, scale = fp8kv.quantize(x)
    assert q.is_contiguous()
    assert fp8kv.dequantize(q.T, scale).is_contiguous()


# QuantFP8


def test_static_layer(device: torch.device) -> None:
    x, scale = values((5, 40), torch.bfloat16).to(device), torch.full((1,), 0.25, device=device)
    q, returned = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)(x, scale)
    assert returned is scale
    assert_same_bytes(q, reference.quantize(x.cpu(), scale.cpu())[0])


@each_fp8
def test_dynamic_layer(device: torch.device, fp8: torch.dtype) -> None:
    x = values((5, 40), torch.bfloat16)
    layer = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN, dtype=fp8)
    q, scale = layer(x.to(device))
    expected, expected_scale = reference.quantize(x, group_shape=(1, -1), dtype=fp8)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(q, expected)


def test_dynamic_layer_with_a_bound(device: torch.device) -> None:
    x, bound = values((5, 40), torch.bfloat16, specials=False), torch.tensor(0.5)
    layer = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
    q, scale = layer(x.to(device), scale_ub=bound.to(device))
    expected, expected_scale = reference.quantize(x, group_shape=(1, -1), scale_ub=bound)
    assert_same_bytes(scale, expected_scale)
    assert_same_bytes(q, expected)


@pytest.mark.parametrize(("rows", "padding", "padded"), [(5, 17, 17), (5, 5, 5), (5, 3, 5), (0, 4, 4), (5, 0, 5)], ids=str)
def test_padding_adds_rows_of_zeros(device: torch.device, rows: int, padding: int, padded: int) -> None:
    x = values((rows, 40), torch.bfloat16)
    layer = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN, num_token_padding=padding)
    q, scale = layer(x.to(device))
    assert q.shape == (padded, 40)
    assert scale.shape == (rows, 1)
    assert_same_bytes(q[:rows], reference.quantize(x, group_shape=(1, -1))[0])
    assert not raw(q)[rows:].any()


def test_padding_of_a_static_layer(device: torch.device) -> None:
    x, scale = values((2, 3, 8), torch.bfloat16), torch.tensor([2.0])
    layer = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, num_token_padding=4)
    q, _ = layer(x.to(device), scale.to(device))
    assert q.shape == (4, 3, 8)
    assert_same_bytes(q[:2], reference.quantize(x, scale)[0])
    assert not raw(q)[2:].any()


@pytest.mark.parametrize(
    ("static", "padding", "scale", "bound", "sentence"),
    [
        (True, None, None, None, "QuantFP8: scale must be given when static=True, got None"),
        (False, None, torch.ones(1), None,
         "QuantFP8: scale must be None when static=False, as scales are computed, got a tensor of shape [1]"),
        (True, None, torch.ones(1), torch.ones(1),
         "fp8kv.quantize: scale_ub must be None when a scale is given, as it bounds computed scales"),
        (False, 16, None, None,
         "QuantFP8: x must have at least 2 dimensions with num_token_padding, got shape [8]"),
    ],
    ids=["no scale", "a scale", "a bound", "padding of a vector"],
)  # fmt: skip
def test_what_the_layer_refuses(
    static: bool, padding: int | None, scale: torch.Tensor | None, bound: torch.Tensor | None, sentence: str
) -> None:
    layer = QuantFP8(static=static, group_shape=GroupShape.PER_TENSOR, num_token_padding=padding)
    with pytest.raises(ValueError) as error:
        layer(torch.ones(8), scale, bound)
    assert str(error.value) == sentence


def test_the_layer_has_no_state() -> None:
    layer = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)
    assert not layer.state_dict()
    assert not list(layer.parameters())


def test_the_layer_describes_itself() -> None:
    layer = QuantFP8(False, GroupShape(1, 128), dtype=torch.float8_e5m2, num_token_padding=17)
    text = "QuantFP8(static=False, group_shape=(1, 128), dtype=torch.float8_e5m2, num_token_padding=17)"
    assert repr(layer) == text


# The package


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert fp8kv.__version__ == version("fp8kv")


def test_build_info() -> None:
    info = fp8kv.build_info()
    assert info["version"] == fp8kv.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in info["cpu_isas"]
    assert "cpu" in info["libraries"]
    assert (info["cuda_architectures"] is None) == (info["cuda_missing"] is not None)


def test_the_documentation_and_the_functions_of_the_reference_have_the_same_arguments() -> None:
    import inspect

    for name in set(reference.__all__) & set(fp8kv.__all__):
        ours, specified = inspect.signature(getattr(fp8kv, name)), inspect.signature(getattr(reference, name))
        defaults = {p.name: p.default for p in ours.parameters.values() if p.name != "workspace"}
        assert list(defaults.items()) == [(p.name, p.default) for p in specified.parameters.values()], name


# Plans, as exposed by the C++ library


@pytest.mark.parametrize(
    ("group_shape", "path"),
    [
        ((-1, -1), "vectorized"),
        ((1, -1), "vectorized"),
        ((-1, 1), "per column"),
        ((-1, 3), "per column"),
    ],
)
def test_a_plan_names_the_path_of_its_granularity(group_shape: tuple[int, int], path: str) -> None:
    plan = introspect().plan_quantize(64, 96, group_shape)
    assert plan["path"] == path
    assert plan["aligned"]
    assert plan["blocks"] * plan["threads"] * plan["rows_per_thread"] * 8 >= 64 * 96


def test_a_plan_for_a_dtype_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be float32, .* got 'float64'"):
        introspect().plan_quantize(4, 8, (-1, -1), input="float64")
