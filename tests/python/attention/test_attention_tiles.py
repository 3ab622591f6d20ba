"""The kernels of paged attention on tiles of 16 positions: every one, and every way to divide the work."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fp8kv
from attention_problems import Problem, check, int32

HEAD_SIZES = (64, 96, 128, 192, 256)
#: num_heads, num_kv_heads and queries per sequence, with the columns that they need.
COLUMNS = {4: ((8, 2), 1), 14: ((14, 2), 2), 32: ((8, 1), 4), 56: ((14, 2), 8), 200: ((10, 1), 20)}


@pytest.mark.parametrize("scales", ["head", "slot"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_kernel(device: torch.device, head_size: int, columns: int, scales: str) -> None:
    heads, queries = COLUMNS[columns]
    for cache, num_splits in (("e4m3", 0), ("e5m2", 1), ("e4m3", 3), ("int8", 0)):
        check(
            device, lengths=(300, 33, queries, 0), queries=(queries, queries, queries, 0), heads=heads,
            head_size=head_size, cache=cache, scales=(scales, scales), num_splits=num_splits,
        )  # fmt: skip


@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_sequences_of_all_lengths_share_the_work(device: torch.device, block_size: int) -> None:
    """More of them than lanes of a warp, some empty: shares begin and end anywhere in them."""
    lengths = [(37 * i * i) % 190 * (i % 7 > 0) for i in range(75)]
    check(device, lengths=lengths, heads=(4, 2), block_size=block_size)
    queries = [i % 4 for i in range(75)]
    check(device, lengths=lengths, queries=queries, heads=(4, 2), block_size=block_size, window=50)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("heads", [(8, 2), (12, 1), (5, 5)])
def test_one_sequence(device: torch.device, heads: tuple[int, int], head_size: int) -> None:
    """Short ones are merged in clusters of blocks."""
    options: dict[str, Any] = {"lengths": (1900,), "heads": heads, "head_size": head_size}
    check(device, **options, sinks=torch.float32)
    check(device, **options, window=700, softcap=30.0, cache="e5m2")
    check(device, **options, starts=[1890], cache="int8")
    check(device, **options | {"lengths": (5000,)})
    check(device, **options, queries=(3,), scales=("slot", "slot"), bounds=(8, 2048))


def test_random_problems(device: torch.device) -> None:
    choose = random.Random(0).choice
    for seed in range(40):
        lengths = [choose((0, 1, 15, 16, 17, 40, 130, 300)) for _ in range(choose((1, 2, 5)))]
        kv_heads, group = choose((1, 2, 3)), choose((1, 2, 7, 8, 9, 16))
        options: dict[str, Any] = {
            "queries": choose((None, [choose((0, 1, 2, 3, 8, 30)) for _ in lengths])),
            "heads": (kv_heads * group, kv_heads),
            "head_size": choose(HEAD_SIZES),
            "block_size": choose((16, 32, 64)),
            "cache": choose(("e4m3", "e5m2", "int8")),
            "query": choose((torch.bfloat16, torch.float16, torch.float32, None)),
            "scales": (choose(("tensor", "head", "slot")), choose(("tensor", "head", "channel", "slot"))),
            "starts": choose((None, [length // 3 for length in lengths])),
            "window": choose((None, None, 1, 16, 33)),
            "softcap": choose((0.0, 0.0, 20.0)),
            "sinks": choose((None, torch.float32)),
            "num_splits": choose((0, 0, 1, 2, 7)),
            "cache_layout": choose(("NHD", "HND")),
        }
        if options["cache"] == "int8" and options["query"] is None:
            continue  # refused
        check(device, Problem(lengths=lengths, seed=seed, **options))


def test_kv_heads_that_share_a_block(cuda: torch.device) -> None:
    """Where there is much to do, a block takes several KV heads. All sequences read the same blocks here."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(64, 32, 128, generator=generator).to(cuda, torch.bfloat16)
    caches = torch.randn(2, 64, 16, 8, 128, generator=generator).to(torch.float8_e4m3fn).to(cuda)
    table = torch.randint(0, 64, (64, 512), generator=generator).int().to(cuda)
    lengths = torch.randint(7000, 8192, (64,), generator=generator).int().to(cuda)
    k_scale, v_scale = (torch.rand(2, 8, generator=generator) + 0.5).to(cuda)
    out = fp8kv.paged_attention(query, *caches, table, lengths, k_scale=k_scale, v_scale=v_scale)
    for s in (0, 63):
        exact = fp8kv.reference.paged_attention(
            query[s : s + 1].cpu(), *caches.cpu(), table[s : s + 1].cpu(), int32(int(lengths[s])),
            k_scale=k_scale.cpu(), v_scale=v_scale.cpu(),
        )  # fmt: skip
        error = (out[s].cpu().double() - exact[0].double()).norm() / exact.double().norm()
        assert error <= 5e-3, "2.5e-3, and the rounding of the reference's result"
