"""PagedKVCache: its storage, what it stores and reads back, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kv import PagedKVCache, reference
from fp8kv.kv_cache.paged import as_stored
from helpers import (
    assert_same_bytes,
    copy_bits,
    each_real,
    key_and_value,
    random_bits,
    random_scales,
    random_slots,
    raw,
    sentinels,
    values,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CPU = torch.device("cpu")
each_layout = pytest.mark.parametrize("layout", ["NHD", "HND"])


@dataclass(frozen=True)
class Scales:
    """As load_kv_scales and others give them."""

    k: Any
    v: Any
    k_offset: Any = None
    v_offset: Any = None
    dtype: Any = None


PER_HEAD = Scales(random_scales((3,)), random_scales((3,), seed=2))
PER_CHANNEL = Scales(random_scales((3, 24)), random_scales((3, 24), seed=2))
K_OFFSET, V_OFFSET = values((2, 3, 24), torch.float32, specials=False)
#: What a cache of 3 heads of 24 may be made with.
KINDS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8_e5m2 per tensor": {"dtype": "fp8_e5m2", "scales": Scales(0.3, 0.7)},
    "fp8_e4m3 per head": {"dtype": "fp8_e4m3", "scales": PER_HEAD},
    "fp8 dynamic": {"scales": "dynamic"},
    "e5m2 dynamic": {"dtype": E5M2, "scales": "dynamic"},
    "fp8 per channel": {"scales": PER_CHANNEL},
    "int8 per channel of k": {"dtype": "int8", "scales": Scales(PER_CHANNEL.k, PER_HEAD.v)},
    "int8 dynamic": {"dtype": "int8", "scales": "dynamic"},
    "fp8 with offsets": {"scales": PER_HEAD, "k_offset": K_OFFSET, "v_offset": V_OFFSET},
    "int8 with offsets of scales": {
        "dtype": "int8", "scales": Scales(PER_CHANNEL.k, PER_CHANNEL.v, K_OFFSET, V_OFFSET),
    },
    "fp8 dynamic with an offset": {"scales": "dynamic", "k_offset": K_OFFSET},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": "float32"},
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(device: torch.device, kind: str = "fp8", layout: str = "NHD", num_blocks: int = 5) -> PagedKVCache:
    """Of 4 tokens a block and 3 heads of 24."""
    return PagedKVCache(num_blocks, 4, 3, 24, layout=layout, device=device, **KINDS[kind])


def offsets_of(kind: str) -> dict[str, Tensor]:
    """Those that it gives a cache, in either way."""
    options = KINDS[kind]
    names = ("k_offset", "v_offset")
    found = {name: options.get(name, getattr(options.get("scales"), name, None)) for name in names}
    return {name: offset for name, offset in found.items() if offset is not None}


def contents(cache: PagedKVCache) -> list[Tensor]:
    """All that belongs to tokens: [num_blocks, block_size, ...]."""
    scales = [cache.k_scale, cache.v_scale] if cache.dynamic else []
    return [cache.key_cache, cache.value_cache, *scales]


def fill(cache: PagedKVCache, seed: int = 0) -> list[Tensor]:
    """Any bits everywhere; returns them."""
    generator = torch.Generator().manual_seed(seed)
    bits = [random_bits(x.shape, x.dtype, generator) for x in contents(cache)]
    for x, b in zip(contents(cache), bits, strict=True):
        copy_bits(x, b)
    return bits


# The storage


@pytest.mark.parametrize(
    ("given", "name", "dtype"),
    [
        ("fp8", "fp8", E4M3), ("fp8_e4m3", "fp8_e4m3", E4M3), ("fp8_e5m2", "fp8_e5m2", E5M2),
        ("float16", "float16", torch.float16), ("bfloat16", "bfloat16", torch.bfloat16),
        ("float32", "float32", torch.float32), (E4M3, "fp8_e4m3", E4M3), (E5M2, "fp8_e5m2", E5M2),
        ("int8", "int8", torch.int8), (torch.int8, "int8", torch.int8),
        (torch.float16, "float16", torch.float16), (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float32, "float32", torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes(device: torch.device, given: str | torch.dtype, name: str, dtype: torch.dtype) -> None:
    cache = PagedKVCache(2, 4, 3, 24, dtype=given, device=device)
    assert cache.kv_cache_dtype == name
    assert cache.dtype == cache.storage.dtype == cache.key_cache.dtype == cache.value_cache.dtype == dtype
    assert cache.nbytes == 2 * 2 * 4 * 3 * 24 * dtype.itemsize


@pytest.mark.parametrize(("layout", "inner"), [("NHD", (4, 3)), ("HND", (3, 4))])
def test_blocks_are_pieces_of_one_tensor_of_zeros(device: torch.device, layout: str, inner: tuple[int, int]) -> None:
    cache = make(device, layout=layout)
    assert (cache.num_blocks, cache.block_size, cache.num_kv_heads, cache.head_size) == (5, 4, 3, 24)
    assert cache.layout == layout
    assert cache.storage.shape == (5, 2, *inner, 24)
    assert cache.storage.is_contiguous()
    assert not raw(cache.storage).any()
    assert cache.device == cache.storage.device
    assert cache.device.type == device.type
    block, offset, head = 3, 2, 1
    place = (offset, head) if layout == "NHD" else (head, offset)
    for side, view in enumerate((cache.key_cache, cache.value_cache)):
        assert view.shape == (5, 4, 3, 24)
        element = cache.storage[block, side][place]
        assert view[block, offset, head].data_ptr() == element.data_ptr()
        assert view.stride(3) == 1


def test_the_default_device(device: torch.device) -> None:
    with device:
        cache = PagedKVCache(2, 4, 3, 24, scales=Scales(0.5, PER_HEAD.v.to(device)))
        assert cache.device.type == device.type
        cache.append(torch.ones(1, 3, 24), torch.ones(1, 3, 24), torch.tensor([5]))
        key, _ = cache.gather(torch.tensor([[1]]), [2])
    assert key.device == cache.k_scale.device == cache.device
    assert key[1].cpu().eq(1).all()


def test_dynamic_scales(device: torch.device) -> None:
    cache = make(device, "fp8 dynamic")
    assert cache.dynamic
    for scale in (cache.k_scale, cache.v_scale):
        assert scale.shape == (5, 4, 3)
        assert scale.dtype == torch.float32
        assert not scale.any()
    assert cache.nbytes == 5 * 4 * 2 * 3 * (24 + 4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.5, [0.5]), (2, [2.0]), (torch.tensor(0.25), [0.25]), (torch.tensor([[0.25]]), [0.25]),
        (torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
        (torch.tensor([[[1.0]], [[2.0]], [[3.0]]], dtype=torch.bfloat16), [1.0, 2.0, 3.0]),
        (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), [1.0, 2.0, 3.0]),
        (torch.arange(1.0, 7.0).half()[::2], [1.0, 3.0, 5.0]),
        (torch.nn.Parameter(torch.tensor([0.5])), [0.5]),
    ],
    ids=["float", "int", "0-D", "2-D", "per head", "[H, 1, 1] bf16", "fp64", "strided fp16", "parameter"],
)  # fmt: skip
def test_scales_are_copied_as_fp32(device: torch.device, given: Any, expected: list[float]) -> None:
    given = given.to(device, copy=True) if isinstance(given, Tensor) else given  # it is written to below
    cache = PagedKVCache(2, 4, 3, 24, device=device, scales=Scales(given, 0.75))
    assert not cache.dynamic
    assert_same_bytes(cache.k_scale, torch.tensor(expected))
    assert_same_bytes(cache.v_scale, torch.tensor([0.75]))
    assert cache.k_scale.device == cache.device
    assert not cache.k_scale.requires_grad
    if isinstance(given, Tensor):
        given.data.fill_(777.0)
        assert_same_bytes(cache.k_scale, torch.tensor(expected))


@pytest.mark.parametrize("in_scales", [False, True])
def test_scales_per_channel_and_offsets_are_copied_as_fp32(device: torch.device, in_scales: bool) -> None:
    scale, offset = random_scales((3, 24)).double(), torch.linspace(-9.0, 9.0, 72).view(3, 24).bfloat16()
    given = [scale.to(device, copy=True), offset.to(device, copy=True)]
    offsets = {"v_offset": given[1]}
    cache = PagedKVCache(
        2, 4, 3, 24, device=device, scales=Scales(given[0], 0.75, **(offsets if in_scales else {})),
        **({} if in_scales else offsets),
    )  # fmt: skip
    for x in given:
        x.fill_(777.0)
    assert_same_bytes(cache.k_scale, scale.float())
    assert_same_bytes(cache.v_scale, torch.tensor([0.75]))
    assert cache.k_offset is None
    assert cache.v_offset is not None
    assert_same_bytes(cache.v_offset, offset.float())


@pytest.mark.filterwarnings("ignore:PagedKVCache. .* were clipped")
@each_kind
@each_real
def test_as_stored_is_what_gather_gives(device: torch.device, real: torch.dtype, kind: str) -> None:
    cache = make(device, kind)
    if cache.dtype.itemsize > 1:
        return
    key, value = (x.to(device) for x in key_and_value(9, 3, 24, real))
    cache.append(key, value, torch.arange(9, device=device))
    given = [x.transpose(0, 1)[None] for x in cache.gather(torch.arange(5)[None], [9], real)]
    stored = as_stored(cache, key.transpose(0, 1)[None], value.transpose(0, 1)[None])
    for actual, expected in zip(stored, given, strict=True):
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_without_scales_they_are_1(device: torch.device, kind: str) -> None:
    cache = make(device, kind)
    assert cache.k_scale.tolist() == cache.v_scale.tolist() == [1.0]


# append and gather


@pytest.mark.filterwarnings("ignore:PagedKVCache. .* were clipped")
@each_layout
@each_kind
@each_real
def test_append_and_gather(device: torch.device, real: torch.dtype, kind: str, layout: str) -> None:
    cache = make(device, kind, layout)
    key, value = key_and_value(9, 3, 24, real)
    slots = random_slots(9, 20)
    cache.append(key.to(device), value.to(device), slots.to(device))

    expected = [torch.zeros(x.shape).to(x.dtype) for x in contents(cache)]
    scales = [x.cpu() for x in (cache.k_scale, cache.v_scale)]
    offsets = offsets_of(kind)
    if cache.dynamic:
        scales = expected[2:]
        reference.reshape_and_cache_flash_dynamic(key, value, *expected, slots, cache.kv_cache_dtype, **offsets)
    else:
        reference.reshape_and_cache_flash(key, value, *expected, slots, cache.kv_cache_dtype, *scales, **offsets)
    for a, e in zip(contents(cache), expected, strict=True):
        assert_same_bytes(a, e)

    table, sums = torch.tensor([[4, 1], [0, -1]], dtype=torch.int32), torch.tensor([0, 7, 10]).int()
    rows = torch.empty(2, 10, 3, 24, dtype=real)
    reference.gather_and_dequant_cache(
        *expected[:2], *rows, table, sums, cache.kv_cache_dtype, *scales, torch.tensor([1, 0]).int(),
        **offsets,
    )  # fmt: skip
    for actual, e in zip(cache.gather(table.to(device), [7, 3], real, seq_starts=[1, 0]), rows, strict=True):
        assert actual.device == cache.device
        assert_same_bytes(actual, e)


def test_gather_gives_bfloat16(device: torch.device) -> None:
    key, value = make(device).gather(torch.tensor([[0]]), [2])
    assert key.dtype == value.dtype == torch.bfloat16
    assert key.shape == value.shape == (2, 3, 24)


def gathered(cache: PagedKVCache, table: list[list[int]], lengths: list[int], starts: list[int]) -> list[Tensor]:
    """By the reference, as fp32."""
    rows = [torch.empty(sum(lengths), 3, 24) for _ in "kv"]
    sums = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    reference.gather_and_dequant_cache(
        cache.key_cache.cpu(), cache.value_cache.cpu(), *rows, torch.tensor(table).int(),
        torch.tensor(sums).int(), cache.kv_cache_dtype, cache.k_scale.cpu(), cache.v_scale.cpu(),
        torch.tensor(starts).int(),
    )  # fmt: skip
    return rows


@pytest.mark.parametrize(
    "form",
    [
        lambda x: torch.tensor(x, dtype=torch.int32), lambda x: torch.tensor(x, dtype=torch.int64),
        lambda x: torch.tensor(x, dtype=torch.int16), lambda x: torch.tensor(x, dtype=torch.uint8),
    ],
    ids=["int32", "int64", "int16", "uint8"],
)  # fmt: skip
@pytest.mark.parametrize("home", ["cpu", "device"])
def test_types_and_devices_of_indices(device: torch.device, form: Callable[[Any], Tensor], home: str) -> None:
    cache = make(device)
    fill(cache)
    table, lengths, starts = [[4, 1, 9], [0, 9, 9], [2, 3, 9]], [5, 0, 6], [2, 0, 1]
    expected = gathered(cache, table, lengths, starts)
    at = CPU if home == "cpu" else device
    for seq_lens in (lengths, tuple(lengths), form(lengths).to(at)):
        for seq_starts in (starts, form(starts).to(at)):
            actual = cache.gather(form(table).to(at), seq_lens, torch.float32, seq_starts=seq_starts)
            for a, e in zip(actual, expected, strict=True):
                assert_same_bytes(a, e)


@pytest.mark.parametrize(("far", "limit"), [((1 << 32) + 1, (1 << 31) - 1), (-(1 << 32) + 1, -(1 << 31))])
def test_large_block_numbers_do_not_wrap(device: torch.device, far: int, limit: int) -> None:
    """They must not become block 1."""
    cache = make(device)
    fill(cache)
    table = torch.tensor([[2, far]], device=device)
    key, _ = cache.gather(table, [4], torch.float32)
    assert_same_bytes(key, gathered(cache, [[2]], [4], [0])[0])
    out = [sentinels((8, 3, 24), torch.float32, device) for _ in "kv"]
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=f"num_blocks - 1 = 4, got {limit} at 1 in sequence 0"):
            cache.gather(table, [8], out=(out[0], out[1]))
    else:
        cache.gather(table, [8], out=(out[0], out[1]))
        assert_same_bytes(out[0][:4], key)
    assert_same_bytes(out[0][4:], sentinels((4, 3, 24), torch.float32, CPU))


def test_gather_into_given_rows(device: torch.device) -> None:
    cache = make(device, "fp8_e4m3 per head")
    fill(cache)
    buffer = sentinels((20, 2, 3, 24), torch.float32, device)
    out = (buffer[:, 0], buffer[:, 1])
    lengths = torch.tensor([5, 3], device=device)
    result = cache.gather(torch.tensor([[4, 1], [0, 2]]), lengths, torch.float16, out=out)
    assert result[0] is out[0]
    assert result[1] is out[1]
    for side, expected in enumerate(gathered(cache, [[4, 1], [0, 2]], [5, 3], [0, 0])):
        assert_same_bytes(buffer[:8, side], expected)
    assert_same_bytes(buffer[8:], sentinels((12, 2, 3, 24), torch.float32, CPU))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_gather_of_nothing(device: torch.device, lengths: list[int]) -> None:
    table = torch.full((len(lengths), 2), -1)
    for seq_lens in (lengths, torch.tensor(lengths, dtype=torch.int32, device=device)):
        key, value = make(device).gather(table, seq_lens)
        assert key.shape == value.shape == (0, 3, 24)


def test_gather_into_given_rows_does_not_synchronize(cuda: torch.device) -> None:
    cache = make(cuda)
    table = torch.zeros(2, 2, dtype=torch.int32, device=cuda)
    lengths = torch.tensor([5, 3], device=cuda)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=cuda)
    out = (torch.empty(8, 3, 24, device=cuda), torch.empty(8, 3, 24, device=cuda))
    cache.gather(table, lengths, seq_starts=starts, out=out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.gather(table, lengths, seq_starts=starts, out=out)
        with pytest.raises(RuntimeError, match="synchronizing"):
            cache.gather(table, lengths, seq_starts=starts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# copy_blocks


@each_layout
@each_kind
def test_copy_blocks_within_a_cache(device: torch.device, kind: str, layout: str) -> None:
    """All sources are read before anything is written: blocks change places."""
    pairs = [(0, 1), (1, 0), (4, 3)]
    for mapping in (pairs, torch.tensor(pairs), torch.tensor(pairs, dtype=torch.int32, device=device)):
        cache = make(device, kind, layout)
        before = fill(cache)
        cache.copy_blocks(mapping)
        for actual, x in zip(contents(cache), before, strict=True):
            assert_same_bytes(actual, x[[1, 0, 2, 4, 4]])


@pytest.mark.parametrize("layouts", [("NHD", "NHD"), ("HND", "HND"), ("NHD", "HND"), ("HND", "NHD")], ids=str)
@each_kind
def test_swapping_to_a_cache_on_the_cpu_and_back(device: torch.device, kind: str, layouts: tuple[str, str]) -> None:
    """Of another number of blocks."""
    cache, swap = make(device, kind, layouts[0]), make(CPU, kind, layouts[1], num_blocks=3)
    before, in_swap = fill(cache), fill(swap, seed=1)
    swap.copy_blocks([(4, 0), (1, 2)], source=cache)
    for actual, x, old in zip(contents(swap), before, in_swap, strict=True):
        assert_same_bytes(actual, torch.stack([raw(x)[4], raw(old)[1], raw(x)[1]]).view(x.dtype).squeeze(-1))
    fill(cache, seed=2)
    cache.copy_blocks(torch.tensor([[0, 4], [2, 1]]), source=swap)
    for actual, x in zip(contents(cache), before, strict=True):
        assert_same_bytes(actual.cpu()[[4, 1]], x[[4, 1]])


@pytest.mark.parametrize("head_size", [1, 2, 3, 4, 7, 12, 64])
@pytest.mark.parametrize("dtype", ["fp8", "bfloat16", "float32"])
def test_copy_blocks_of_heads_of_any_size(device: torch.device, dtype: str, head_size: int) -> None:
    source, target = (PagedKVCache(3, 2, 5, head_size, dtype=dtype, layout=layout, device=device) for layout in ("NHD", "HND"))
    bits = fill(source)
    target.copy_blocks([(2, 0), (0, 1)], source)
    for actual, x in zip(contents(target), bits, strict=True):
        assert_same_bytes(actual[:2], x[[2, 0]])
    assert not raw(target.storage[2]).any()


@pytest.mark.parametrize("mapping", [[], torch.empty(0, 2, dtype=torch.int64), torch.empty(0).int()], ids=repr)
def test_copy_no_blocks(device: torch.device, mapping: Any) -> None:
    cache = make(device)
    before = fill(cache)
    cache.copy_blocks(mapping)
    for actual, x in zip(contents(cache), before, strict=True):
        assert_same_bytes(actual, x)


def test_scales_that_say_the_same_are_the_same(device: torch.device) -> None:
    source = PagedKVCache(2, 4, 3, 24, device=device, scales=Scales(0.5, 0.25))
    target = PagedKVCache(
        2, 4, 3, 24, device=device, dtype=E4M3, scales=Scales(torch.full((3,), 0.5), torch.full((3, 1), 0.25))
    )
    bits = fill(source)
    target.copy_blocks([(0, 0), (1, 1)], source)
    assert_same_bytes(target.key_cache, bits[0])


# The rest


@pytest.mark.parametrize("num_seqs", [0, 1, 7])
def test_descales_are_views(device: torch.device, num_seqs: int) -> None:
    cache = PagedKVCache(2, 4, 3, 24, device=device, scales=Scales(0.5, PER_HEAD.v))
    k, v = cache.descales(num_seqs)
    assert_same_bytes(k, torch.full((num_seqs, 3), 0.5))
    assert_same_bytes(v, PER_HEAD.v.expand(num_seqs, 3))
    for view, scale in ((k, cache.k_scale), (v, cache.v_scale)):
        assert view.untyped_storage().data_ptr() == scale.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("kind", "dtype", "scales", "mebibytes"),
    [
        ("fp8", "fp8", "per tensor", "0.002747"),
        ("fp8_e5m2 per tensor", "fp8_e5m2", "per tensor", "0.002747"),
        ("fp8_e4m3 per head", "fp8_e4m3", "per head", "0.002747"),
        ("e5m2 dynamic", "fp8_e5m2", "dynamic", "0.003204"),
        ("bfloat16", "bfloat16", None, "0.005493"),
        ("int8 per channel of k", "int8", "per channel", "0.002747"),
        ("fp8 with offsets", "fp8", "per head with offsets", "0.002747"),
    ],
)
def test_a_cache_describes_itself(kind: str, dtype: str, scales: str | None, mebibytes: str) -> None:
    assert repr(make(CPU, kind, "HND")) == (
        f"PagedKVCache(num_blocks=5, block_size=4, num_kv_heads=3, head_size=24, dtype='{dtype}', "
        f"layout='HND', scales={scales!r}, device='cpu', {mebibytes} MiB)"
    )


def test_a_cache_without_blocks(device: torch.device) -> None:
    cache = make(device, "fp8 dynamic", num_blocks=0)
    x = torch.ones(2, 3, 24, device=device)
    cache.append(x, x, torch.tensor([-1, -1], device=device))
    cache.copy_blocks([])
    assert cache.nbytes == 0
    assert cache.gather(torch.empty(1, 0, dtype=torch.int32), [0])[0].shape == (0, 3, 24)


# What it refuses

SHAPES = "1 or num_kv_heads=3 elements, or the shape [num_kv_heads, head_size]=[3, 24]"
STRINGS = '"fp8", "fp8_e4m3", "fp8_e5m2", "int8", "float16", "bfloat16", "float32" or the torch dtype'


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_blocks": -1}, "num_blocks must be at least 0, got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"head_size": -3}, "head_size must be at least 1, got -3"),
        ({"num_blocks": "2"}, "num_blocks must be an int, got str"),
        ({"block_size": True}, "block_size must be an int, got bool"),
        ({"num_kv_heads": None}, "num_kv_heads must be an int, got NoneType"),
        ({"head_size": 24.0}, "head_size must be an int, got float"),
        ({"v_head_size": "24"}, "v_head_size must be an int, got str"),
        ({"layout": "nhd"}, 'layout must be "NHD" or "HND", got \'nhd\''),
        ({"dtype": "auto"},
         'dtype must say what the elements are, such as "bfloat16" or the dtype of the model, got "auto"'),
        ({"dtype": "int16"}, f"dtype must be {STRINGS}, got 'int16'"),
        ({"dtype": ["fp8"]}, f"dtype must be {STRINGS}, got ['fp8']"),
        ({"dtype": torch.float8_e4m3fnuz}, f"dtype must be {STRINGS}, got torch.float8_e4m3fnuz"),
        ({"dtype": "float16", "scales": Scales(1.0, 1.0)},
         "scales must be None with dtype 'float16', as only FP8 and int8 use them"),
        ({"dtype": torch.bfloat16, "scales": "dynamic"},
         "scales must be None with dtype 'bfloat16', as only FP8 and int8 use them"),
        ({"scales": "static"}, "scales must be None, \"dynamic\" or have .k and .v, got 'static'"),
        ({"scales": 0.5}, 'scales must be None, "dynamic" or have .k and .v, got 0.5'),
        ({"scales": Scales(torch.ones(2), 1.0)},
         f"scales.k must have {SHAPES}, got shape [2]"),
        ({"scales": Scales(1.0, torch.ones(0))},
         f"scales.v must have {SHAPES}, got shape [0]"),
        ({"scales": Scales(1.0, torch.ones(72))}, f"scales.v must have {SHAPES}, got shape [72]"),
        ({"scales": Scales(1.0, torch.ones(24, 3))}, f"scales.v must have {SHAPES}, got shape [24, 3]"),
        ({"scales": Scales(None, 1.0)}, "scales.k must be a float or a floating-point tensor, got NoneType"),
        ({"scales": Scales(1.0, torch.ones(3, dtype=torch.int64))},
         "scales.v must be a float or a floating-point tensor, got int64"),
        ({"scales": Scales(math.nan, 1.0)}, "scales.k must be finite and above 0 in fp32, got nan"),
        ({"scales": Scales(1.0, -math.inf)}, "scales.v must be finite and above 0 in fp32, got -inf"),
        ({"scales": Scales(1e39, 1.0)}, "scales.k must be finite and above 0 in fp32, got inf"),
        ({"scales": Scales(1.0, torch.tensor([1e-50]).double())},
         "scales.v must be finite and above 0 in fp32, got 0.0"),
        ({"scales": Scales(torch.tensor([1.0, 1.0, 0.0]), 1.0)},
         "scales.k must be finite and above 0 in fp32, got 0.0 for head 2"),
        ({"scales": Scales(1.0, torch.tensor([1.0, -0.5, 0.0]))},
         "scales.v must be finite and above 0 in fp32, got -0.5 for head 1"),
        ({"scales": Scales(1.0, torch.ones(3, 24).index_fill(1, torch.tensor([5]), math.inf))},
         "scales.v must be finite and above 0 in fp32, got inf for head 0, channel 5"),
        ({"scales": Scales(1.0, torch.ones(3, device="meta"))},
         "scales.v must be on a real device, got the meta device"),
        ({"k_offset": torch.ones(3, 24, device="meta")}, "k_offset must be on a real device, got the meta device"),
        ({"k_offset": 0.5}, "k_offset must be a floating-point tensor, got float"),
        ({"v_offset": torch.ones(3, 24).int()}, "v_offset must be a floating-point tensor, got int32"),
        ({"v_offset": torch.ones(3)},
         "v_offset must have the shape [num_kv_heads, head_size]=[3, 24], got [3]"),
        ({"scales": "dynamic", "k_offset": torch.full((3, 24), math.nan)},
         "k_offset must be finite in fp32, got nan for head 0, channel 0"),
        ({"scales": Scales(1.0, 1.0, None, torch.ones(3, 1))},
         "scales.v_offset must have the shape [num_kv_heads, head_size]=[3, 24], got [3, 1]"),
        ({"scales": Scales(1.0, 1.0, torch.ones(3, 24)), "k_offset": torch.ones(3, 24)},
         "k_offset must be None, as scales have one, got both"),
        ({"dtype": "float16", "v_offset": torch.ones(3, 24)},
         "v_offset must be None with dtype 'float16', as only FP8 and int8 use offsets"),
        ({"dtype": "int8", "scales": Scales(1.0, 1.0, dtype="fp8")},
         'scales must be for values up to 127, the largest of "int8", got scales for "fp8", '
         "whose largest is 448"),
        ({"scales": Scales(1.0, 1.0, dtype="fp8_e5m2")},
         'scales must be for values up to 448, the largest of "fp8", got scales for "fp8_e5m2", '
         "whose largest is 57344"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_what_can_not_be_made(device: torch.device, arguments: dict[str, Any], sentence: str) -> None:
    usual = {"num_blocks": 2, "block_size": 4, "num_kv_heads": 3, "head_size": 24, "device": device}
    with pytest.raises(ValueError) as error:
        PagedKVCache(**(usual | arguments))
    assert str(error.value) == f"PagedKVCache: {sentence}"


ONES = torch.ones(3, 24)
INTEGERS = "must be integers, a tensor or lists of one length, got"
LENGTHS = f"seq_lens must be at least 0 and sum to at most {(1 << 31) - 1}, got"


@pytest.mark.parametrize(
    ("table", "lengths", "starts", "sentence"),
    [
        (torch.zeros(2, 2), [1, 1], None, "block_table must be integers, got float32"),
        (torch.zeros(2, 2).bool(), [1, 1], None, "block_table must be integers, got bool"),
        (torch.zeros(2, 2).int(), torch.ones(2), None, "seq_lens must be integers, got float32"),
        (torch.zeros(2, 2).int(), [1, 1], torch.zeros(2).half(), "seq_starts must be integers, got float16"),
        (None, [1, 1], None, f"block_table {INTEGERS} NoneType"),
        ([[0, 1], [2]], [1, 1], None, f"block_table {INTEGERS} list"),
        (torch.zeros(2, 2).int(), None, None, f"seq_lens {INTEGERS} NoneType"),
        (torch.zeros(2, 2).int(), ["1", "1"], None, f"seq_lens {INTEGERS} list"),
        (torch.zeros(2, 2).int(), [1.5, 1], None, "seq_lens must be integers, got float32"),
        (torch.zeros(2, 2).int(), 1, None, "seq_lens must be [num_seqs], got shape []"),
        (torch.zeros(2, 2).int(), [1, -1], None, f"{LENGTHS} -1 to 1"),
        (torch.zeros(2, 2).int(), [1 << 30, 1 << 30], None, f"{LENGTHS} 1073741824 to 1073741824"),
    ],
    ids=["float table", "bool table", "float lengths", "half starts", "no table", "ragged table", "no lengths",
         "strings", "floats", "a number", "negative length", "too many"],
)  # fmt: skip
def test_what_gather_refuses(device: torch.device, table: Any, lengths: Any, starts: Tensor | None, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        make(device).gather(table, lengths, seq_starts=starts)
    assert str(error.value) == f"PagedKVCache.gather: {sentence}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "bfloat16"}, "dtype must be a torch dtype, got 'bfloat16'"),
        ({"dtype": None}, "dtype must be a torch dtype, got None"),
        ({"out": torch.empty(1, 3, 24)}, "out must be two tensors, key and value, got Tensor"),
    ],
    ids=["string", "no dtype", "one tensor"],
)
def test_results_that_gather_refuses(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        make(CPU).gather([[0]], [1], **options)
    assert str(error.value) == f"PagedKVCache.gather: {sentence}"


@pytest.mark.parametrize("kind", ["fp8", "fp8 dynamic"])
@pytest.mark.parametrize("name", ["key", "value", "slot_mapping"])
def test_append_takes_no_none(kind: str, name: str) -> None:
    cache = make(CPU, kind)
    before = fill(cache)
    arguments = {"key": ONES[None], "value": ONES[None], "slot_mapping": torch.tensor([5])} | {name: None}
    with pytest.raises(ValueError, match=rf"^PagedKVCache.append: {name} must be a tensor,.* got None$"):
        cache.append(**arguments)
    for actual, x in zip(contents(cache), before, strict=True):
        assert_same_bytes(actual, x)


def test_arguments_that_are_no_tensors_and_no_caches() -> None:
    cache = make(CPU)
    for call, sentence in (
        (lambda: cache.attend(None, [[0]], [1]), "attend: query must be a tensor, got None"),
        (lambda: cache.use_scales(1.0, 1.0), "use_scales: k_scale must be a tensor, got float"),
        (lambda: cache.descales("3"), "descales: num_seqs must be an int, got str"),
        (lambda: cache.copy_blocks([(0, 1)], ONES), "copy_blocks: source must be a PagedKVCache, got Tensor"),
        (lambda: cache.copy_blocks({0: 1}), f"copy_blocks: block_mapping {INTEGERS} dict"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"PagedKVCache.{sentence}"


@each_kind
@each_layout
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_caches_can_be_copied(kind: str, layout: str, duplicate: Callable[[PagedKVCache], PagedKVCache]) -> None:
    cache = make(CPU, kind, layout=layout)
    before = fill(cache)
    twin = duplicate(cache)
    assert repr(twin) == repr(cache)
    for actual, x in zip(contents(twin), before, strict=True):
        assert_same_bytes(actual, x)
    for name in ("k_scale", "v_scale", "k_offset", "v_offset"):
        ours, theirs = getattr(cache, name), getattr(twin, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_same_bytes(theirs, ours)
    # The views are of its own storage.
    assert twin.key_cache.data_ptr() == twin.storage.data_ptr() != cache.storage.data_ptr()
    twin.append(torch.ones(1, 3, 24), torch.ones(1, 3, 24), torch.tensor([5]))
    for actual, x in zip(contents(cache), before, strict=True):
        assert_same_bytes(actual, x)


def test_copies_keep_what_compilers_are_told() -> None:
    cache = make(CPU)
    torch._dynamo.mark_static_address(cache.storage)
    twin = pickle.loads(pickle.dumps(cache))
    assert vars(twin.storage) == vars(cache.storage) != {}


def test_append_and_gather_pass_on_what_the_ops_say(device: torch.device) -> None:
    x, slots = torch.ones(1, 3, 24, device=device), torch.tensor([5], device=device)
    for kind, op in (("fp8", "reshape_and_cache_flash"), ("fp8 dynamic", "reshape_and_cache_flash_dynamic")):
        with pytest.raises(RuntimeError) as error:
            make(device, kind).append(x, x.double(), slots)
        assert str(error.value) == f"fp8kv::{op}: value must be float32 as key is, got float64"
    with pytest.raises(RuntimeError) as error:
        make(device).gather(torch.zeros(3, 2).int(), [1, 1])
    assert str(error.value) == (
        "fp8kv::gather_and_dequant_cache: cu_seq_lens must have num_seqs + 1 = 4 elements, "
        "as block_table has num_seqs rows, got shape [3]"
    )


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ([(0, 5)], "block_mapping must have destination blocks from 0 to 4, got 5"),
        ([(0, 1), (-1, 2)], "block_mapping must have source blocks from 0 to 2, got -1"),
        ([(3, 1)], "block_mapping must have source blocks from 0 to 2, got 3"),
        ([(1 << 32, 1)], "block_mapping must have source blocks from 0 to 2, got 4294967296"),
        ([(0, 1, 2)], "block_mapping must have rows of two blocks, got shape [1, 3]"),
        ([0, 1], "block_mapping must have rows of two blocks, got shape [2]"),
        (torch.zeros(1, 2), "block_mapping must be integers, got float32"),
    ],
    ids=["destination", "negative", "source", "far", "triples", "no pairs", "floats"],
)
def test_mappings_that_are_refused(device: torch.device, mapping: Sequence[Any] | Tensor, sentence: str) -> None:
    cache, source = make(device), make(CPU, num_blocks=3)
    before = fill(cache)
    with pytest.raises(ValueError) as error:
        cache.copy_blocks(mapping, source)
    assert str(error.value) == f"PagedKVCache.copy_blocks: {sentence}"
    for actual, x in zip(contents(cache), before, strict=True):
        assert_same_bytes(actual, x)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (PagedKVCache(5, 8, 3, 24), "block_size=4 as this cache, got 8"),
        (PagedKVCache(5, 4, 2, 24), "num_kv_heads=3 as this cache, got 2"),
        (PagedKVCache(5, 4, 3, 32), "head_size=24 as this cache, got 32"),
        (PagedKVCache(5, 4, 3, 24, dtype=E5M2),
         "dtype=torch.float8_e4m3fn as this cache, got torch.float8_e5m2"),
        (PagedKVCache(5, 4, 3, 24, scales="dynamic"), "dynamic=False as this cache, got True"),
        (PagedKVCache(5, 4, 3, 24, scales=Scales(0.5, 1.0)), "the k_scale of this cache, [1.0], got [0.5]"),
        (PagedKVCache(5, 4, 3, 24, scales=Scales(1.0, torch.tensor([1.0, 1.0, 2.0]))),
         "the v_scale of this cache, [1.0], got [1.0, 1.0, 2.0]"),
        (PagedKVCache(5, 4, 3, 24, scales=Scales(1.0, ONES.index_fill(1, torch.tensor([7]), 2.0))),
         "the v_scale of this cache, [1.0], got 2.0 for head 0, channel 7"),
        (PagedKVCache(5, 4, 3, 24, scales=Scales(1.0, 1.0), k_offset=0.5 * ONES),
         "the k_offset of this cache, 0.0 for head 0, channel 0, got 0.5 for head 0, channel 0"),
    ],
    ids=["block_size", "num_kv_heads", "head_size", "dtype", "dynamic", "k_scale", "v_scale", "channels",
         "k_offset"],
)  # fmt: skip
def test_sources_that_do_not_fit(device: torch.device, source: PagedKVCache, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        make(device).copy_blocks([(0, 0)], source)
    assert str(error.value) == f"PagedKVCache.copy_blocks: source must have {sentence}"


def test_a_dynamic_cache_has_no_descales(device: torch.device) -> None:
    with pytest.raises(ValueError) as error:
        make(device, "fp8 dynamic").descales(2)
    assert str(error.value) == (
        "PagedKVCache.descales: the cache must have scales per tensor or per head, got dynamic=True; "
        "`attend` reads such a cache"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scales": PER_CHANNEL},
         "have scales per tensor or per head, got one for each channel; `attend` reads such a cache"),
        ({"dtype": "int8"}, "be FP8, as FlashAttention-3 reads no int8; `attend` does"),
    ],
    ids=["per channel", "int8"],
)  # fmt: skip
def test_descales_of_what_flash_attention_can_not_read(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        PagedKVCache(2, 4, 3, 24, device="cpu", **options).descales(2)
    assert str(error.value) == f"PagedKVCache.descales: the cache must {sentence}"


@pytest.mark.parametrize(
    ("dtype", "made_for"), [("fp8", "fp8_e4m3"), ("fp8_e4m3", "int8"), ("fp8_e5m2", "fp8"), ("int8", "int8")]
)
def test_scales_for_smaller_values_can_be_used(dtype: str, made_for: str) -> None:
    assert PagedKVCache(2, 4, 3, 24, dtype=dtype, scales=Scales(0.5, 0.5, dtype=made_for)).k_scale == 0.5


# Scales that belong to somebody else


def test_scales_in_use_are_the_same_tensors(device: torch.device) -> None:
    cache = PagedKVCache(4, 16, 2, 8, device=device)
    k_scale, v_scale = torch.ones(2, device=device), torch.ones(1, device=device)
    cache.use_scales(k_scale, v_scale)
    k_scale.fill_(0.5)
    x = torch.ones(1, 2, 8, device=device)
    cache.append(x, x, torch.tensor([3], device=device))
    assert cache.key_cache[0, 3].float().unique().tolist() == [2.0]
    assert cache.value_cache[0, 3].float().unique().tolist() == [1.0]
    assert [y.unique().tolist() for y in cache.gather(torch.tensor([[0]]), [4])] == [[0.0, 1.0]] * 2


def test_copies_of_blocks_look_at_the_scales_in_use(device: torch.device) -> None:
    first, second = PagedKVCache(4, 16, 2, 8, device=device), PagedKVCache(4, 16, 2, 8, device=device)
    first.use_scales(torch.full((2,), 0.5, device=device), torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"source must have the k_scale of this cache, \[1.0\], got \[0.5, 0.5\]"):
        second.copy_blocks([(0, 1)], source=first)
    second.use_scales(torch.full((1,), 0.5, device=device), torch.ones(1, device=device))
    second.copy_blocks([(0, 1)], source=first)


#: Ways in which new weights come; PyTorch's version counter sees the first only.
CHANGES: dict[str, Callable[[Tensor, float], object]] = {
    "in place": lambda scale, x: scale.fill_(x),
    "by .data": lambda scale, x: scale.data.fill_(x),
    "by memory": lambda scale, x: torch.from_dlpack(scale.detach()).fill_(x),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_copies_of_blocks_see_scales_that_changed_on_the_device(
    device: torch.device, name: str, change: str, inference: bool
) -> None:
    with torch.inference_mode(inference):
        source, target = (PagedKVCache(2, 4, 3, 24, device=device, scales=Scales(0.5, 0.5)) for _ in range(2))
        bits = fill(source)
        CHANGES[change](getattr(source, name), 0.25)
        with pytest.raises(ValueError, match=rf"the {name} of this cache, \[0.5\], got \[0.25\]"):
            target.copy_blocks([(0, 0)], source)
        assert not raw(target.storage).any()
        CHANGES[change](getattr(target, name), 0.25)
        target.copy_blocks([(0, 0)], source)
        assert_same_bytes(target.key_cache[0], bits[0][0])


def test_caches_with_the_same_scales_are_copied_without_a_wait(cuda: torch.device) -> None:
    source, target = PagedKVCache(2, 4, 3, 24, device=cuda), PagedKVCache(2, 4, 3, 24, device=cuda)
    target.use_scales(source.k_scale, source.v_scale)
    pairs = torch.tensor([[0, 1]], device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        target.copy_blocks(pairs, source)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_of_16_bit_blocks_have_no_scales_to_compare() -> None:
    source, target = (PagedKVCache(2, 4, 3, 24, dtype="bfloat16") for _ in range(2))
    bits = fill(source)
    source.k_scale.fill_(0.5)
    target.copy_blocks([(0, 0)], source)
    assert_same_bytes(target.key_cache[0], bits[0][0])


@pytest.mark.parametrize(
    ("options", "scale", "sentence"),
    [
        ({"scales": "dynamic"}, torch.ones(2), "the cache must take given scales, but has scales of its own"),
        ({"dtype": "bfloat16"}, torch.ones(2), "but has dtype 'bfloat16' and no scales"),
        (
            {},
            torch.ones(3),
            "k_scale must be float32 with 1 or num_kv_heads=2 elements, or the shape "
            "[num_kv_heads, head_size]=[2, 8] on cpu, got float32 of shape [3]",
        ),
        ({}, torch.ones(2).half(), "got float16 of shape [2] on cpu"),
    ],
    ids=["dynamic", "16 bits", "three heads", "half"],
)
def test_scales_that_cannot_be_used(options: dict[str, Any], scale: torch.Tensor, sentence: str) -> None:
    cache = PagedKVCache(4, 16, 2, 8, device="cpu", **options)
    before = cache.k_scale
    with pytest.raises(ValueError) as error:
        cache.use_scales(scale, torch.ones(2))
    assert sentence in str(error.value)
    assert cache.k_scale is before


def test_offsets_in_use_are_the_same_tensors(device: torch.device) -> None:
    cache = PagedKVCache(4, 16, 2, 8, device=device, v_offset=torch.ones(2, 8))
    own = cache.v_offset
    k_scale, k_offset = torch.ones(2, 8, device=device), torch.zeros(2, 8, device=device)
    cache.use_scales(k_scale, k_scale, k_offset)
    assert cache.v_offset is own
    k_offset.fill_(3.0)
    x = torch.full((1, 2, 8), 5.0, device=device)
    cache.append(x, x, torch.tensor([3], device=device))
    assert cache.key_cache[0, 3].float().unique().tolist() == [2.0]
    assert cache.value_cache[0, 3].float().unique().tolist() == [4.0]
    with pytest.raises(ValueError) as error:
        cache.use_scales(k_scale, k_scale, v_offset=torch.ones(2, device=device))
    assert str(error.value) == (
        "PagedKVCache.use_scales: v_offset must be float32 of shape [2, 8] on "
        f"{cache.device}, got float32 of shape [2] on {cache.device}"
    )
    assert cache.v_offset is own


def test_a_gather_can_be_compiled(device: torch.device) -> None:
    cache = PagedKVCache(4, 16, 2, 8, device=device)
    x = torch.randn(20, 2, 8, device=device)
    cache.append(x, x, torch.arange(20, device=device))
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([20], dtype=torch.int32, device=device)
    expected, _ = cache.gather(table, lengths, torch.float32)

    def gather(key: Tensor, value: Tensor) -> Tensor:
        return cache.gather(table, lengths, out=(key, value))[0]

    out = torch.empty(2, 20, 2, 8, device=device)
    assert_same_bytes(torch.compile(gather, fullgraph=True, backend="eager")(*out), expected)
