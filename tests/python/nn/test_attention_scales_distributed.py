"""AttentionScales in several processes: scales of all ranks, and tensor-parallel slices combined.

The same tests run with gloo on CPUs, in 2 and in 4 processes, and with NCCL if there are two GPUs.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from devices import require_gpus
from fp8kv import AttentionScales, KVCacheScheme, KVScales, LayerScales, PagedKVCache, reference
from fp8kv._checks import listed
from helpers import each_strategy, random_scales, values

NUM_HEADS, HEAD_SIZE, TOKENS = 8, 16, 10
E4M3 = torch.float8_e4m3fn


class Ranks:
    """Processes that form a process group, and run given functions."""

    def __init__(self, backend: str, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "fp8kv"])  # imported once, not by every process
        self.size = size
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(
                target=_serve,
                args=(backend, rank, size, str(folder / "store"), self._tasks[rank], self._results),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, size, device, *args)`` on all ranks: their results, in order."""
        for tasks in self._tasks:
            tasks.put((function, args))
        answers = sorted((self._results.get(timeout=90) for _ in range(self.size)), key=lambda x: x[0])
        errors = [f"rank {rank}: {error}" for rank, _, error in answers if error]
        assert not errors, "\n".join(errors)
        return [result for _, result, _ in answers]

    def end(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()


def _serve(backend: str, rank: int, size: int, store: str, tasks: Any, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, function(rank, size, device, *args), ""))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[("gloo", 2), ("gloo", 4), ("nccl", 2)], ids=lambda p: f"{p[0]} {p[1]}")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    backend, size = request.param
    if backend == "nccl":
        require_gpus(size)
    group = Ranks(backend, size, tmp_path_factory.mktemp("ranks"))
    yield group
    group.end()


def share(rank: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a rank."""
    shapes = [(TOKENS, heads, HEAD_SIZE) for heads in (NUM_HEADS, num_kv_heads, num_kv_heads)]
    return tuple(values(shape, torch.bfloat16, 7 * rank + n) for n, shape in enumerate(shapes))


def expected_scales(parts: list[tuple[Tensor, ...]], num_scales: int) -> list[list[float]]:
    """Of Q, K and V, from the tokens of all ranks."""
    scales = []
    for tensors in zip(*parts, strict=True):
        x = torch.cat(tensors).float().abs()
        finite = torch.where(x.isfinite(), x, 0)
        amax = torch.stack([group.max() for group in finite.chunk(num_scales, dim=1)])
        scales.append((amax / torch.tensor(448.0)).tolist())
    return scales


def lists(module: AttentionScales) -> list[list[float]]:
    return [module.q_scale.tolist(), module.k_scale.tolist(), module.v_scale.tolist()]


def new_module(device: torch.device, strategy: str) -> AttentionScales:
    return AttentionScales(NUM_HEADS, 2, HEAD_SIZE, strategy=strategy, device=device)


# Observations of all ranks


def freeze_what_ranks_see(rank: int, size: int, device: torch.device, strategy: str, seeing: list[int]) -> Any:
    module = new_module(device, strategy)
    if rank in seeing:
        module.observe(*(x.to(device) for x in share(rank, 2)))
    report = module.freeze(dist.group.WORLD)
    counts = [[sum(seen.clipped), sum(seen.observed)] for seen in (report.q, report.k, report.v)]
    return lists(module), counts


@each_strategy
def test_frozen_scales_are_those_of_what_all_ranks_saw(ranks: Ranks, strategy: str) -> None:
    everyone = list(range(ranks.size))
    parts = [share(rank, 2) for rank in everyone]
    results = ranks(freeze_what_ranks_see, strategy, everyone)
    assert [scales for scales, _ in results] == [expected_scales(parts, 1 if strategy == "tensor" else 2)] * ranks.size


@each_strategy
def test_a_rank_that_saw_nothing_gets_the_scales_of_the_others(ranks: Ranks, strategy: str) -> None:
    last = ranks.size - 1
    results = ranks(freeze_what_ranks_see, strategy, [last])
    expected = expected_scales([share(last, 2)], 1 if strategy == "tensor" else 2)
    assert [scales for scales, _ in results] == [expected] * ranks.size


def test_reports_add_up(ranks: Ranks) -> None:
    everyone = list(range(ranks.size))
    parts = [torch.cat([share(rank, 2)[n] for rank in everyone]).float() for n in range(3)]
    expected = [[int(x.abs().gt(448 + 2**-15).sum()), x.numel()] for x in parts]
    results = ranks(freeze_what_ranks_see, "attn_head", everyone)
    assert [counts for _, counts in results] == [expected] * ranks.size
    assert expected[0][0] > 0


def observe_without_freezing(rank: int, size: int, device: torch.device) -> Any:
    module = new_module(device, "attn_head")
    module.observe(None, *(x.to(device) for x in share(rank, 2)[1:]))
    together, alone = module.observations(dist.group.WORLD), module.observations()
    return together.k.observed, alone.k.observed, lists(module)


def test_observations_of_all_ranks_leave_those_of_each(ranks: Ranks) -> None:
    elements = TOKENS * HEAD_SIZE
    expected = ((elements * ranks.size,) * 2, (elements,) * 2, [[1.0, 1.0]] * 3)
    assert ranks(observe_without_freezing) == [expected] * ranks.size


def freeze_nothing(rank: int, size: int, device: torch.device) -> Any:
    module = new_module(device, "tensor")
    try:
        module.freeze(dist.group.WORLD)
    except RuntimeError as error:
        return str(error), lists(module)
    return "", lists(module)


def test_every_rank_raises_when_none_saw_anything(ranks: Ranks) -> None:
    for sentence, scales in ranks(freeze_nothing):
        assert sentence.startswith("AttentionScales.freeze: keys and values must have been observed, got none")
        assert scales == [[1.0]] * 3


def queries_on_one_rank(rank: int, size: int, device: torch.device) -> Any:
    module = new_module(device, "tensor")
    query, key, value = (x.to(device) for x in share(rank, 2))
    module.observe(query if rank == 1 else None, key, value)
    module.freeze(dist.group.WORLD)
    return module.q_scale.tolist()


def test_queries_that_one_rank_saw_make_the_query_scale_of_all(ranks: Ranks) -> None:
    assert ranks(queries_on_one_rank) == [expected_scales([share(1, 2)], 1)[0]] * ranks.size


def freeze_in_a_group_of_others(rank: int, size: int, device: torch.device) -> str:
    group = dist.new_group([0])
    module = new_module(device, "tensor")
    module.observe(None, *(x.to(device) for x in share(rank, 2)[1:]))
    try:
        module.freeze(group)
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_outside_the_group_is_told_so(ranks: Ranks) -> None:
    member, *others = ranks(freeze_in_a_group_of_others)
    assert member == ""
    for sentence in others:
        assert "group must be a process group that this rank belongs to, got" in sentence


def freeze_per_head_in_groups(rank: int, size: int, device: torch.device) -> Any:
    """Tensor parallelism of size / 2, twice: ranks r and r + size / 2 are replicas with the same heads."""
    tp_size = size // 2
    groups = [dist.new_group([r, r + tp_size]) for r in range(tp_size)]
    tp_rank, heads, kv_heads = rank % tp_size, NUM_HEADS // tp_size, 2 // tp_size
    module = AttentionScales(heads, kv_heads, HEAD_SIZE, strategy="attn_head", device=device)
    query, key, value = (x.to(device) for x in share(rank // tp_size, 2))
    module.observe(query.chunk(tp_size, 1)[tp_rank], key.chunk(tp_size, 1)[tp_rank], value.chunk(tp_size, 1)[tp_rank])
    module.freeze(groups[tp_rank])
    return lists(module)


def test_scales_per_head_are_reduced_over_replicas_of_the_heads(ranks: Ranks) -> None:
    tp_size = ranks.size // 2
    results = ranks(freeze_per_head_in_groups)
    expected = expected_scales([share(0, 2), share(1, 2)], 2)
    for replica in (results[:tp_size], results[tp_size:]):
        together = [[x for part in parts for x in part] for parts in zip(*replica, strict=True)]
        assert together == expected


def freeze_heads_of_tensor_parallelism(rank: int, size: int, device: torch.device, num_kv_heads: int, strategy: str) -> Any:
    """All ranks in one group. With fewer KV heads than ranks, neighbors have the same head."""
    heads = slice(rank * NUM_HEADS // size, (rank + 1) * NUM_HEADS // size)
    first = rank * num_kv_heads // size
    kv_heads = slice(first, max((rank + 1) * num_kv_heads // size, first + 1))
    query, key, value = (x.to(device) for x in share(0, num_kv_heads))
    query, key, value = query[:, heads], key[:, kv_heads], value[:, kv_heads]
    module = AttentionScales(query.shape[1], key.shape[1], HEAD_SIZE, strategy=strategy, first_kv_head=first, device=device)
    module.observe(query, key, value)
    report = module.freeze(dist.group.WORLD)
    return first, lists(module), report.k.observed


@each_strategy
@pytest.mark.parametrize("num_kv_heads", [8, 4, 2, 1])
def test_statistics_of_a_head_are_those_of_the_ranks_that_have_it(ranks: Ranks, num_kv_heads: int, strategy: str) -> None:
    expected = expected_scales([share(0, num_kv_heads)], num_kv_heads if strategy == "attn_head" else 1)
    elements = TOKENS * HEAD_SIZE * max(1, ranks.size // num_kv_heads)
    for first, scales, observed in ranks(freeze_heads_of_tensor_parallelism, num_kv_heads, strategy):
        if strategy == "tensor":
            assert scales == expected
        else:
            mine = slice(first, first + len(observed))
            assert scales == [letter[mine] for letter in expected]
            assert observed == (elements,) * len(observed)


def freeze_with_ranks_that_do_not_fit(rank: int, size: int, device: torch.device, case: str) -> Any:
    num_kv_heads = 2 if case == "numbers" and rank == 0 else 1
    first = 0 if case == "known to one" and rank == 0 else None
    module = AttentionScales(2, num_kv_heads, HEAD_SIZE, strategy="attn_head", first_kv_head=first, device=device)
    module.observe(None, *torch.ones(2, 3, num_kv_heads, HEAD_SIZE, device=device))
    try:
        module.freeze(dist.group.WORLD)
    except ValueError as error:
        return str(error), lists(module)[1]
    return "", lists(module)[1]


@pytest.mark.parametrize(("case", "first_rank"), [("numbers", "2 scales"), ("known to one", "1 scale from head 0 on")])
def test_ranks_whose_heads_do_not_fit_together(ranks: Ranks, case: str, first_rank: str) -> None:
    others = ["1 scale"] * (ranks.size - 1)
    for sentence, scales in ranks(freeze_with_ranks_that_do_not_fit, case):
        assert sentence == (
            "AttentionScales: the ranks of group must have the same heads or each its first_kv_head, got "
            f"{listed([first_rank, *others], 'and')}"
        )
        assert set(scales) == {1.0}


# Slices of tensor parallelism


def layer_scales(strategy: str, num_kv_heads: int) -> KVScales:
    shape = (num_kv_heads if strategy == "attn_head" else 1,)
    layers = {n: LayerScales(*(random_scales(shape, 3 * n + side) for side in range(3))) for n in range(2)}
    return KVScales(layers, KVCacheScheme(strategy, quantizes_query=True))


def slot_mapping() -> Tensor:
    return torch.tensor([3, -1, 11, 0, 7, 5, 4, -2, 8, 9])


def quantize_slices(rank: int, size: int, device: torch.device, strategy: str, num_kv_heads: int) -> Any:
    """The bytes of Q, K and V of all ranks, gathered on every rank."""
    heads = slice(rank * NUM_HEADS // size, (rank + 1) * NUM_HEADS // size)
    kv_heads = slice(rank * num_kv_heads // size, max((rank + 1) * num_kv_heads // size, rank * num_kv_heads // size + 1))
    query, key, value = (x.to(device) for x in share(0, num_kv_heads))
    query, key, value = query[:, heads], key[:, kv_heads], value[:, kv_heads]
    module = AttentionScales(query.shape[1], key.shape[1], HEAD_SIZE, strategy=strategy, device=device)
    module.load_scales(layer_scales(strategy, num_kv_heads).shard(rank, size)[1])
    cache = PagedKVCache(3, 4, key.shape[1], HEAD_SIZE, device=device)
    module.update_cache(key, value, cache, slot_mapping().to(device))
    gathered = []
    for mine in (module.quantize_query(query), cache.key_cache, cache.value_cache):
        mine = mine.contiguous().view(torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(parts, mine)
        gathered.append([part.cpu().numpy() for part in parts])
    return gathered


@each_strategy
@pytest.mark.parametrize("num_kv_heads", [8, 4, 2, 1])
def test_slices_put_together_are_the_whole(ranks: Ranks, strategy: str, num_kv_heads: int) -> None:
    """With fewer KV heads than ranks, neighbors own the same head."""
    query, key, value = share(0, num_kv_heads)
    scales = layer_scales(strategy, num_kv_heads)[1]
    q_scale = scales.q.repeat_interleave(NUM_HEADS // len(scales.q)).view(-1, 1)
    expected_query = reference.encode(query.float() / q_scale, E4M3).view(torch.uint8)
    caches = torch.zeros(2, 3, 4, num_kv_heads, HEAD_SIZE).to(E4M3)
    reference.reshape_and_cache_flash(key, value, *caches, slot_mapping(), "fp8", scales.k, scales.v)

    for query_parts, *cache_parts in ranks(quantize_slices, strategy, num_kv_heads):
        assert torch.equal(torch.cat([torch.from_numpy(x) for x in query_parts], dim=1), expected_query)
        for parts, cache in zip(cache_parts, caches.view(torch.uint8), strict=True):
            for rank, part in enumerate(parts):
                first = rank * num_kv_heads // ranks.size
                assert torch.equal(torch.from_numpy(part), cache[:, :, first : first + part.shape[2]])
            owned = sum(part.shape[2] for part in parts)
            assert owned == max(num_kv_heads, ranks.size)
