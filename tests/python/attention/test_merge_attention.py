"""merge_attention: results over parts of the keys become that over all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8kv
from helpers import assert_same_bytes, each_real

INF, NAN = math.inf, math.nan
NUM_TOKENS, NUM_HEADS, HEAD_SIZE = 5, 3, 16


def attention(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64: logits ``[tokens, heads, keys]`` and values ``[keys, heads, head_size]``."""
    out = torch.einsum("thk,khd->thd", logits.softmax(-1), values)
    return torch.where(logits.logsumexp(-1, keepdim=True) == -INF, 0.0, out), logits.logsumexp(-1)


def problem(num_keys: int, size: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_keys)
    logits = torch.randn(NUM_TOKENS, NUM_HEADS, num_keys, dtype=torch.float64, generator=generator) * size
    return logits, torch.randn(num_keys, NUM_HEADS, HEAD_SIZE, dtype=torch.float64, generator=generator)


@each_real
@pytest.mark.parametrize("cuts", [(1,), (20,), (39,), (10, 11, 30)], ids=str)
@pytest.mark.parametrize("size", [0.0, 3.0, 1000.0])
def test_parts_become_the_whole(device: torch.device, size: float, cuts: tuple[int, ...], real: torch.dtype) -> None:
    logits, values = problem(40, size)
    expected, expected_lse = attention(logits, values)
    parts = [
        tuple(x.to(device, dtype) for x, dtype in zip(attention(k, v), (real, torch.float32), strict=True))
        for k, v in zip(logits.tensor_split(cuts, 2), values.tensor_split(cuts), strict=True)
    ]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = fp8kv.merge_attention(out, lse, *part)
    assert out.dtype == real
    assert lse.dtype == torch.float32
    bound = len(parts) * 2 * torch.finfo(real).eps * values.abs().max().item()
    # A logit of 1000 in fp32 is off by 2^-15, and so is its weight.
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=bound + 1e-6 + size * 1e-6)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, NAN, INF])
def test_a_part_that_saw_nothing_has_no_influence(device: torch.device, garbage: float) -> None:
    logits, values = problem(7)
    logits[2] = -INF
    out, lse = (x.float().to(device) for x in attention(logits, values))
    nothing = torch.full_like(out, garbage), torch.full_like(lse, -INF)
    for merged in (fp8kv.merge_attention(out, lse, *nothing), fp8kv.merge_attention(*nothing, out, lse)):
        assert_same_bytes(merged[0], out)
        assert_same_bytes(merged[1], lse)
    assert out[2].unique().tolist() == [0.0]


def test_a_nan_stays_one(device: torch.device) -> None:
    out, lse = torch.ones(1, 2, 4, device=device), torch.zeros(1, 2, device=device)
    bad = out.clone()
    bad[0, 1, 2] = NAN
    merged, _ = fp8kv.merge_attention(out, lse, bad, lse)
    assert merged.isnan().nonzero().tolist() == [[0, 1, 2]]


def test_arguments_stay_as_they_are_and_may_have_any_strides(device: torch.device) -> None:
    logits, values = problem(9)
    halves = [attention(logits[..., part], values[part]) for part in (slice(4), slice(4, None))]
    arguments = [x.float().to(device) for half in halves for x in half]
    expected = fp8kv.merge_attention(*arguments)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments]
    before = [x.clone() for x in strided]
    for a, b in zip(fp8kv.merge_attention(*strided), expected, strict=True):
        assert_same_bytes(a, b)
    for a, b in zip(strided, before, strict=True):
        assert_same_bytes(a, b)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(device: torch.device) -> None:
    arguments = [torch.randn(3, 2, 8), torch.randn(3, 2), torch.randn(3, 2, 8), torch.randn(3, 2)]
    arguments = [x.to(device) for x in arguments]
    compiled = torch.compile(fp8kv.merge_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*arguments), fp8kv.merge_attention(*arguments), strict=True):
        assert_same_bytes(a, b)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"out_a": torch.ones(5, 3, 16).to(torch.float8_e4m3fn)},
            "out_a must be float32, float16 or bfloat16 [num_tokens, num_heads, head_size], got "
            "float8_e4m3fn of shape [5, 3, 16] on cpu",
        ),
        (
            {"lse_a": torch.ones(3, 5)},
            "lse_a must be float32 of shape [5, 3] on cpu as out_a is, got float32 of shape [3, 5] on cpu",
        ),
        (
            {"out_b": torch.ones(5, 3, 16).bfloat16()},
            "out_b must be float32 of shape [5, 3, 16] on cpu as out_a is, got bfloat16 of shape [5, 3, 16] on cpu",
        ),
        (
            {"lse_b": torch.ones(5, 3, device="meta")},
            "lse_b must be float32 of shape [5, 3] on cpu as out_a is, got float32 of shape [5, 3] on meta",
        ),
    ],
    ids=["out_a", "lse_a", "out_b", "lse_b"],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], sentence: str) -> None:
    usual = {"out_a": torch.ones(5, 3, 16), "lse_a": torch.ones(5, 3)}
    usual |= {"out_b": usual["out_a"], "lse_b": usual["lse_a"]}
    with pytest.raises(ValueError) as error:
        fp8kv.merge_attention(**usual | changes)
    assert str(error.value) == f"merge_attention: {sentence}"
