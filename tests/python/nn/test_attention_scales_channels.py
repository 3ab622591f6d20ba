"""AttentionScales with a scale for each channel, with offsets, and of INT8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kv import AttentionScales, LayerScales, PagedKVCache, reference
from fp8kv.nn import statistics
from helpers import assert_same_bytes, each_real, random_scales, values

E4M3 = torch.float8_e4m3fn
NUM_HEADS, NUM_KV_HEADS, SIZE = 4, 2, 24
CHANNELS = (NUM_KV_HEADS, SIZE)
LIMITS = {E4M3: 448.0, torch.int8: 127.0}
NAMES = {E4M3: "fp8", torch.int8: "int8"}
each_dtype = pytest.mark.parametrize("dtype", LIMITS, ids=["e4m3", "int8"])
each_offsets = pytest.mark.parametrize("offsets", [False, True], ids=["", "offsets"])
each_strategy = pytest.mark.parametrize("strategy", ["tensor", "attn_head", "channel"])


def make(strategy: str = "channel", dtype: torch.dtype = torch.int8, offsets: bool = False, **options: Any) -> AttentionScales:
    """Scales and offsets that differ."""
    module = AttentionScales(NUM_HEADS, NUM_KV_HEADS, SIZE, strategy=strategy, dtype=dtype, offsets=offsets, **options)
    for seed, letter in enumerate("qkv"):
        scale = getattr(module, f"{letter}_scale")
        scale.copy_(random_scales(scale.shape, seed))
    if offsets:
        for seed, x in enumerate((module.k_offset, module.v_offset)):
            assert x is not None
            x.copy_(values(CHANNELS, torch.float32, seed, specials=False))
    return module


def on_cpu(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.cpu() for x in tensors]


def qkv(device: torch.device, tokens: int = 9, real: torch.dtype = torch.bfloat16) -> list[Tensor]:
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    return [values((tokens, n, SIZE), real, seed).to(device) for seed, n in enumerate(heads, 3)]


def test_the_buffers_at_first(device: torch.device) -> None:
    module = AttentionScales(4, 2, 24, strategy="channel", offsets=True, dtype=torch.int8, device=device)
    state = module.state_dict()
    assert list(state) == ["q_scale", "k_scale", "v_scale", "k_offset", "v_offset"]
    assert [list(x.shape) for x in state.values()] == [[2], *[[2, 24]] * 4]
    assert [x.unique().tolist() for x in state.values()] == [[1.0]] * 3 + [[0.0]] * 2
    assert all(x.dtype == torch.float32 for x in module.bfloat16().state_dict().values())
    assert AttentionScales(4, 2, 24, strategy="channel").k_offset is None
    assert repr(module) == (
        "AttentionScales(num_heads=4, num_kv_heads=2, head_size=24, strategy='channel', dtype=int8, "
        "calculate_kv_scales=False, offsets=True)"
    )


# Use


@each_dtype
@each_offsets
@each_strategy
@each_real
def test_what_is_stored(device: torch.device, real: torch.dtype, strategy: str, offsets: bool, dtype: torch.dtype) -> None:
    module = make(strategy, dtype, offsets, device=device)
    _, key, value = qkv(device, real=real)
    cache = PagedKVCache(3, 4, *CHANNELS, dtype=dtype, device=device)
    slots = torch.tensor([0, 3, -1, 5, 11, 2, 7, 8, 9])
    module.update_cache(key, value.flatten(1), cache, slots.to(device))
    expected = torch.zeros(2, 3, 4, *CHANNELS).to(dtype)
    reference.reshape_and_cache_flash(
        key.cpu(), value.cpu(), *expected, slots, NAMES[dtype],
        *on_cpu(module.k_scale, module.v_scale, module.k_offset, module.v_offset),
    )  # fmt: skip
    for actual, e in zip((cache.key_cache, cache.value_cache), expected, strict=True):
        assert_same_bytes(actual, e)
    for name in ("k_scale", "v_scale", "k_offset", "v_offset"):
        assert getattr(cache, name) is getattr(module, name)


@each_dtype
@pytest.mark.parametrize("observes", [False, True], ids=["fused", "observing"])
@pytest.mark.parametrize("paged", [False, True], ids=["pair", "paged"])
def test_a_step(device: torch.device, dtype: torch.dtype, observes: bool, paged: bool) -> None:
    """Appended and attended to, from one query a sequence, with all positions in one block."""
    module = make("channel", dtype, offsets=True, calculate_kv_scales=observes, device=device)
    query, key, value = (0.05 * x.nan_to_num(0, 0, 0).clamp(-9, 9) for x in qkv(device))
    cache = PagedKVCache(1, 9, *CHANNELS, dtype=dtype, device=device)
    given = cache if paged else (cache.key_cache, cache.value_cache)
    slots = torch.arange(9, device=device)
    out = torch.empty_like(query) if dtype == E4M3 else None
    rows = module.append_step(query, key, value, given, slots, out=out)
    assert_same_bytes(rows, query.cpu())
    table, lengths = torch.zeros(1, 1).int().to(device), torch.tensor([9]).int().to(device)
    attended = module.attend_step(rows[8:], given, table, lengths)

    own = on_cpu(module.k_scale, module.v_scale, module.k_offset, module.v_offset)
    expected = torch.zeros(2, 1, 9, *CHANNELS).to(dtype)
    reference.reshape_and_cache_flash(key.cpu(), value.cpu(), *expected, slots.cpu(), NAMES[dtype], *own)
    for actual, e in zip((cache.key_cache, cache.value_cache), expected, strict=True):
        assert_same_bytes(actual, e)
    exact = torch.empty(1, NUM_HEADS, SIZE, dtype=torch.float64)
    reference.paged_attention(
        query[8:].cpu(), *expected, table.cpu(), lengths.cpu(), kv_cache_dtype=NAMES[dtype], k_scale=own[0],
        v_scale=own[1], k_offset=own[2], v_offset=own[3], out=exact,
    )  # fmt: skip
    torch.testing.assert_close(attended.double().cpu(), exact, atol=4e-2, rtol=2e-2)


@pytest.mark.parametrize("observes", [False, True], ids=["fused", "observing"])
def test_without_offsets_those_of_the_cache_are_used(device: torch.device, observes: bool) -> None:
    module = make("attn_head", E4M3, calculate_kv_scales=observes, device=device)
    shift = torch.full(CHANNELS, 7.0)
    cache = PagedKVCache(3, 4, *CHANNELS, device=device, k_offset=shift)
    query, key, value = qkv(device)
    module.append_step(query, key, value, cache, torch.arange(9, device=device))
    expected = torch.zeros(2, 3, 4, *CHANNELS).to(E4M3)
    reference.reshape_and_cache_flash(
        key.cpu(), value.cpu(), *expected, torch.arange(9), "fp8", *on_cpu(module.k_scale, module.v_scale),
        k_offset=shift,
    )  # fmt: skip
    assert_same_bytes(cache.key_cache, expected[0])
    assert_same_bytes(cache.value_cache, expected[1])
    assert_same_bytes(cache.k_offset, shift)
    if observes:
        difference = key.float().cpu() - shift
        amax = torch.where(difference.isfinite(), difference, 0).abs().amax((0, 2))
        assert module.observations().k.amax == tuple(amax.tolist())


def test_a_16_bit_cache_takes_no_offsets(device: torch.device) -> None:
    module = make("channel", torch.int8, offsets=True, device=device)
    cache = PagedKVCache(3, 4, *CHANNELS, dtype="bfloat16", device=device)
    query, key, value = (x.nan_to_num(0, 0, 0).clamp(-9, 9) for x in qkv(device))
    rows = module.append_step(query, key, value, cache, torch.arange(9, device=device))
    assert_same_bytes(cache.key_cache.flatten(0, 1)[:9], key.cpu())
    table, lengths = torch.zeros(9, 1).int().to(device), torch.ones(9).int().to(device)
    out = module.attend_step(rows, cache, table, lengths)
    assert_same_bytes(out[0], value[0].cpu().repeat_interleave(2, 0))


def test_what_int8_and_channels_do_not_give() -> None:
    query = torch.ones(1, NUM_HEADS, SIZE)
    with pytest.raises(ValueError) as error:
        make("attn_head").quantize_query(query)
    assert str(error.value) == (
        "AttentionScales.quantize_query: the module must be FP8, as queries of int8 caches are not quantized, got dtype int8"
    )
    for module, kind in (
        (make("attn_head"), "dtype int8"),
        (make("channel", E4M3), 'strategy "channel"'),
    ):
        with pytest.raises(ValueError) as error:
            module.descales(3)
        assert str(error.value) == (
            "AttentionScales.descales: the module must be FP8 with scales per tensor or per head, as "
            f"FlashAttention-3 reads no others, got {kind}; `attend_step` reads such a cache"
        )


# Observation


def finite_amax(x: Tensor, strategy: str) -> Tensor:
    """[tokens, heads, head_size], in the shape of the scales."""
    x = torch.where(x.isfinite(), x, 0).abs()
    return {"tensor": x.amax().view(1), "attn_head": x.amax((0, 2)), "channel": x.amax(0)}[strategy]


@each_dtype
@each_offsets
@each_strategy
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_what_is_seen_becomes_the_scale(
    device: torch.device, strategy: str, offsets: bool, dtype: torch.dtype, strided: bool
) -> None:
    module = make(strategy, dtype, offsets, device=device)
    query, key, value = qkv(device, 40)
    if strided:
        key, value = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (key, value))
    slots = torch.arange(40, device=device)
    slots[7] = -1
    module.observe(query, key, value, slots)
    seen = module.freeze(margin=1.5)
    kept = [x for x in range(40) if x != 7]
    for letter, x in (("k", key), ("v", value)):
        offset = getattr(module, f"{letter}_offset")
        difference = x.float().cpu()[kept] - (0 if offset is None else offset.cpu())
        amax = finite_amax(difference, strategy)
        limit = torch.tensor(LIMITS[dtype])
        widened = (amax * 1.5).clamp(max=torch.finfo(torch.float32).max)
        expected = (widened / limit).clamp(min=1 / (LIMITS[dtype] * 512))
        assert_same_bytes(getattr(module, f"{letter}_scale"), expected)
        assert getattr(seen, letter).amax == tuple(amax.view(len(amax), -1).amax(1).tolist())
        groups = 1 if strategy == "tensor" else NUM_KV_HEADS
        assert getattr(seen, letter).observed == (39 * NUM_KV_HEADS * SIZE // groups,) * groups
    assert module.q_scale.shape == (1 if strategy == "tensor" else NUM_KV_HEADS,)


def test_clipped_elements_are_counted_per_head(device: torch.device) -> None:
    module = AttentionScales(2, 2, 3, strategy="channel", offsets=True, dtype=torch.int8, device=device)
    assert module.k_offset is not None
    module.k_scale.copy_(torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]))
    module.k_offset[0, 2] = 100.0
    key = torch.tensor([[[200.0, 200.0, 200.0], [127.0, 127.5, -float("inf")]]], device=device)
    module.observe(None, key, torch.ones_like(key))
    assert module.observations().k.clipped == (1, 2)


def test_channels_are_observed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, key, value = qkv(torch.device("cpu"), 40)
    whole, pieces = make(offsets=True), make(offsets=True)
    whole.observe(None, key, value)
    monkeypatch.setattr(statistics, "_CHUNK", 7 * NUM_KV_HEADS * SIZE)
    pieces.observe(None, key, value)
    assert_same_bytes(pieces.k_amax, whole.k_amax)
    assert pieces.observations() == whole.observations()


# Loading


def state(**changes: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("k_scale", "v_scale", "k_offset", "v_offset")
    return {name: torch.rand(CHANNELS, generator=generator) + 0.5 for name in names} | changes


@pytest.mark.parametrize("prefix", ["", "model.layers.3.self_attn.", "self_attn.attn.", "layers.3.attention."])
def test_names(prefix: str) -> None:
    module, given = make(offsets=True), state()
    query = module.q_scale.clone()
    module.load_state_dict({prefix + name: x for name, x in given.items()})
    for name, x in given.items():
        assert_same_bytes(getattr(module, name), x)
    assert_same_bytes(module.q_scale, query)


def test_offsets_with_names_of_the_parent() -> None:
    parent = torch.nn.ModuleDict({"k_proj": torch.nn.Linear(2, 2), "attn": make(offsets=True)})
    AttentionScales.accept_foreign_names(parent)
    given = state()
    parent.load_state_dict(given | parent["k_proj"].state_dict(prefix="k_proj."))
    for name, x in given.items():
        assert_same_bytes(getattr(parent["attn"], name), x)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (torch.tensor(0.5), torch.full(CHANNELS, 0.5)),
        (torch.tensor([[[0.5]], [[2.0]]]), torch.tensor([[0.5], [2.0]]).expand(CHANNELS)),
    ],
    ids=["tensor", "heads"],
)
def test_fewer_scales_are_those_of_many_channels(scale: Tensor, expected: Tensor) -> None:
    module = make(offsets=True)
    module.load_state_dict({"k_scale": scale, "v_scale": scale})
    assert_same_bytes(module.k_scale, expected.contiguous())
    assert_same_bytes(module.v_scale, expected.contiguous())
    assert module.state_dict()["k_offset"].eq(0).all()  # what is missing is 0


def test_a_state_dict_can_be_loaded_again(device: torch.device) -> None:
    module, other = make(offsets=True, device=device), make(offsets=True, device=device)
    other.k_scale.fill_(3.0)
    other.load_state_dict(module.state_dict())
    for (name, x), y in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_module_that_leaves_the_meta_device_has_values() -> None:
    module = AttentionScales(4, 2, 24, strategy="channel", offsets=True, device="meta").to_empty(device="cpu")
    assert [x.unique().tolist() for x in module.state_dict().values()] == [[1.0]] * 3 + [[0.0]] * 2


def test_scales_of_a_checkpoint(device: torch.device) -> None:
    module, given = make(offsets=True, device=device), state()
    addresses = [x.data_ptr() for x in module.buffers()]
    layer = LayerScales(None, given["k_scale"], given["v_scale"], given["k_offset"], dtype="int8")
    module.load_scales(layer)
    for name, x in (given | {"v_offset": torch.zeros(CHANNELS)}).items():
        assert_same_bytes(getattr(module, name), x)
    assert [x.data_ptr() for x in module.buffers()] == addresses


SHAPES = "1 or num_kv_heads=2 elements, or the shape [num_kv_heads, head_size]=[2, 24], those of this rank"


@pytest.mark.parametrize(
    ("options", "changes", "sentence"),
    [
        ({}, {"k_scale": torch.ones(24, 2)}, f"k_scale must have {SHAPES}, got shape [24, 2]"),
        ({}, {"v_scale": -torch.ones(2, 24)},
         "v_scale must be finite and above 0 in fp32, got -1.0 for head 0, channel 0"),
        ({}, {"k_offset": torch.ones(2)},
         "k_offset must have the shape [num_kv_heads, head_size]=[2, 24], those of this rank, got [2]"),
        ({}, {"v_offset": torch.full((2, 24), float("inf"))},
         "v_offset must be finite in fp32, got inf for head 0, channel 0"),
        ({"offsets": False}, {}, "k_offset must not be there without offsets=True, got an offset"),
        ({"strategy": "attn_head"}, {},
         "k_scale must have 1 or num_kv_heads=2 elements, those of this rank, got shape [2, 24]"),
    ],
    ids=["shape", "sign", "offset", "infinite", "no offsets", "per head"],
)  # fmt: skip
def test_states_that_are_refused(options: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    module = make(**{"offsets": True} | options)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state(**changes))
    assert f"AttentionScales: {sentence}" in str(error.value)
    for name, x in module.state_dict().items():
        assert_same_bytes(x, before[name])


@pytest.mark.parametrize(
    ("options", "changes", "sentence"),
    [
        ({}, {"dtype": "fp8"},
         'scales must be for values up to 127, the largest of "int8", got scales for "fp8", '
         "whose largest is 448"),
        ({"offsets": False}, {}, "scales.k_offset must be None without offsets=True, got an offset"),
        ({}, {"k": torch.ones(1), "k_offset": torch.ones(3, 24)},
         "scales.k_offset must have the shape [num_kv_heads, head_size]=[2, 24], those of this rank, "
         "got [3, 24]"),
    ],
    ids=["format", "no offsets", "heads"],
)  # fmt: skip
def test_scales_that_are_refused(options: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    module = make(**{"offsets": True} | options)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    one = torch.full(CHANNELS, 5.0)
    with pytest.raises(ValueError) as error:
        module.load_scales(LayerScales(**{"q": None, "k": one, "v": one, "k_offset": one, "dtype": "int8"} | changes))
    assert str(error.value) == f"AttentionScales.load_scales: {sentence}"
    for name, x in module.state_dict().items():
        assert_same_bytes(x, before[name])
