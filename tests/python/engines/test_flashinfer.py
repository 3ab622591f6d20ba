"""FlashInfer attends to caches as this library writes them, with the scales beside them.

Not run where FlashInfer is not installed. It compiles a kernel for each combination of dtypes, which takes minutes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fp8kv
from attention_problems import assert_near, int32
from fp8kv import reference
from helpers import empty_caches

flashinfer: Any = pytest.importorskip("flashinfer", minversion="0.7.4")

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
LENGTHS = [1, 16, 17, 300, 1000]
ONE_EACH = [1] * len(LENGTHS)
WORKSPACE = 128 << 20  # bytes
#: What FlashInfer may differ by, in max|v|. It rounds to bf16: the probabilities, which changes their sum too; the
#: scale of V; V times it; the result. Each time a number changes by 2^-8 of it at most.
LARGEST = 5 * 2.0**-8
#: The same as a share of the norm of all results: roundings of 1.7e-3 in the root mean square, and half as much again.
WHOLE = 5**0.5 * 1.7e-3 * 1.5


class Written(NamedTuple):
    """K and V of all sequences in random blocks. Slots of no token hold NaN, and so do their scales."""

    caches: tuple[Tensor, ...]  # K and V, [num_blocks, block_size, num_kv_heads, head_size]
    scales: tuple[Tensor, ...]
    table: Tensor
    lengths: Tensor


def write(cache_layout: str, device: torch.device, scales: tuple[Tensor, ...] | None = None) -> Written:
    """With given scales, or with one for each token and head."""
    torch.manual_seed(0)
    counts = [-(-length // BLOCK_SIZE) for length in LENGTHS]
    blocks = sum(counts) + 3
    *caches, buffers = empty_caches((blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE), torch.float8_e4m3fn, cache_layout, device)
    for buffer in buffers:
        buffer.view(torch.uint8).fill_(0x7F)
    lengths, table = int32(*LENGTHS), torch.full((len(LENGTHS), max(counts)), -1, dtype=torch.int32)
    for row, used in zip(table, torch.randperm(blocks).int()[:-3].split(counts), strict=True):
        row[: len(used)] = used
    slots = (table.unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(1)
    slot_mapping = torch.cat([row[:length] for row, length in zip(slots, LENGTHS, strict=True)]).to(device)
    # Tokens and heads of sizes that differ by up to 16
    shape = (2, sum(LENGTHS), KV_HEADS)
    key, value = (torch.randn(*shape, HEAD_SIZE) * torch.exp2(4 * torch.rand(*shape, 1) - 2)).to(device, torch.bfloat16)
    if scales is None:
        scales = tuple(torch.full((2, blocks, BLOCK_SIZE, KV_HEADS), torch.nan, device=device))
        fp8kv.reshape_and_cache_flash_dynamic(key, value, *caches, *scales, slot_mapping, "fp8")
    else:
        fp8kv.reshape_and_cache_flash(key, value, *caches, slot_mapping, "fp8", *scales)
    return Written(tuple(caches), scales, table.to(device), lengths.to(device))


def attend(written: Written, layout: str, query: Tensor, queries: list[int], **scales: Any) -> Tensor:
    """By FlashInfer's decode, or for several queries of a sequence, its prefill."""
    pages = [-(-length // BLOCK_SIZE) for length in LENGTHS]
    where = (
        int32(0, *pages).cumsum(0).int(),
        torch.cat([row[:count] for row, count in zip(written.table, pages, strict=True)]),
        int32(*[(length - 1) % BLOCK_SIZE + 1 for length in LENGTHS]),
    )
    sizes = (HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE)
    options = {
        "q_data_type": torch.bfloat16,
        "kv_data_type": torch.float8_e4m3fn,
        "use_token_head_sf": "kv_cache_sf" in scales,
    }
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
    if queries == ONE_EACH:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout, use_tensor_cores=True, backend="fa2")
        wrapper.plan(*where, *sizes, **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, layout, backend="fa2")
        wrapper.plan(int32(0, *queries).cumsum(0).int(), *where, *sizes, causal=True, **options)
    result: Tensor = wrapper.run(query, as_flashinfer(layout, written.caches), **scales)
    return result


def of_slots(written: Written) -> tuple[Tensor, ...]:
    """The scales of K and V, [num_blocks, block_size, num_kv_heads], as views."""
    return tuple(scale.expand(written.caches[0].shape[:3]) for scale in written.scales)


def as_flashinfer(layout: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[num_blocks, block_size, num_kv_heads, ...] in the order of its layout, as views."""
    return tuple(x.transpose(1, 2) if layout == "HND" else x for x in tensors)


def check(written: Written, layout: str, queries: list[int], **scales: Any) -> None:
    """FlashInfer's result and that of `paged_attention` against fp64 arithmetic on the dequantized cache."""
    query = torch.randn(sum(queries), HEADS, HEAD_SIZE).to(written.table.device, torch.bfloat16)
    scales = scales or {"kv_cache_sf": as_flashinfer(layout, of_slots(written))}
    actual = attend(written, layout, query, queries, **scales)
    tensors = [query, *written.caches, written.table, written.lengths]
    options = {
        "k_scale": written.scales[0],
        "v_scale": written.scales[1],
        "cu_query_lens": int32(0, *queries).cumsum(0).int().to(query.device),
    }
    ours = fp8kv.paged_attention(*tensors, **options)
    exact = torch.empty(query.shape, dtype=torch.float64)
    on_host = {name: x.cpu() for name, x in options.items()}
    reference.paged_attention(*(x.cpu() for x in tensors), **on_host, out=exact)
    largest = torch.stack([largest_v(written, s) for s in range(len(LENGTHS))])
    of_queries = largest.repeat_interleave(torch.tensor(queries), 0)
    assert_near(ours.cpu(), exact, of_queries)
    error = (actual.cpu().double() - exact).abs()
    assert (error.amax(-1) <= LARGEST * of_queries).all()
    assert error.norm() <= WHOLE * exact.norm()


def largest_v(written: Written, sequence: int) -> Tensor:
    """The largest magnitude of the values of a sequence that each query head sees: [num_heads]"""
    position = torch.arange(LENGTHS[sequence])
    place = written.table[sequence].cpu()[position // BLOCK_SIZE].long(), position % BLOCK_SIZE
    scale = of_slots(written)[1].cpu()[place].double()
    values = written.caches[1].cpu()[place].double() * scale.unsqueeze(-1)
    return values.abs().amax((0, 2)).repeat_interleave(HEADS // KV_HEADS)


@pytest.mark.parametrize("queries", [ONE_EACH, [1, 3, 17, 20, 40]], ids=["decode", "prefill"])
@pytest.mark.parametrize("cache_layout", ["NHD", "HND", "[nb, 2] NHD", "[nb, 2] HND", "halves NHD", "halves HND"])
def test_scales_per_token_and_head(cache_layout: str, queries: list[int], cuda: torch.device) -> None:
    check(write(cache_layout, cuda), cache_layout[-3:], queries)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("scales", [1, KV_HEADS], ids=["per tensor", "per head"])
def test_given_scales_as_those_of_slots(scales: int, layout: str, cuda: torch.device) -> None:
    """Expanded with strides of 0, which takes no memory; they may change in place."""
    check(write(layout, cuda, given(scales, cuda)), layout, ONE_EACH)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_scales_per_tensor_on_the_host(layout: str, cuda: torch.device) -> None:
    written = write(layout, cuda, given(1, cuda))
    k_scale, v_scale = (scale.item() for scale in written.scales)
    check(written, layout, ONE_EACH, k_scale=k_scale, v_scale=v_scale)


def given(count: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.linspace(0.02, 0.06, 2 * count, device=device).split(count))
