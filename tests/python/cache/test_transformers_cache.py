"""`fp8kv.transformers.Fp8Cache` beside Transformers' own caches of keys and values that went to FP8 and back.

Both give the model the same numbers, so logits and tokens must be equal, not close.
"""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checkpoint_files
from fp8kv import KVCacheScheme, KVScales, LayerScales, load_kv_scales, reference
from helpers import assert_same_bytes, raw

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402

from fp8kv.transformers import Fp8Cache  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Newer releases name the argument `cache`; all of Transformers 5 know this name.
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LENGTH = 24  # tokens of the sequences
STEPS = (7, 5, 1, 1, 1, 4, 1, 1, 3)  # they come in these pieces
LAYERS, KV_HEADS, HEAD_SIZE = 2, 2, 16

_COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
    "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
#: Models with full attention, with windows, with both, and with chunks that don't look back.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama-2": ("Llama", {"num_key_value_heads": 4}),
    "Qwen3": ("Qwen3", {"head_dim": 24}),
    "Mistral": ("Mistral", {"sliding_window": 9}),
    "Gemma3": ("Gemma3", {"sliding_window": 9, "head_dim": 16,
                          "layer_types": ["sliding_attention", "full_attention"]}),
    "Llama4": ("Llama4", {"attention_chunk_size": 9, "head_dim": 16, "num_local_experts": 2,
                          "intermediate_size_mlp": 96,
                          "layer_types": ["chunked_attention", "full_attention"]}),
}  # fmt: skip
each_model = pytest.mark.parametrize("name", _MODELS)
each_mode = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
full_and_sliding = pytest.mark.parametrize("name", ["Llama", "Mistral"])


def config_of(name: str) -> Any:
    kind, changes = _MODELS[name]
    suffix = "TextConfig" if kind in ("Gemma3", "Llama4") else "Config"
    return getattr(transformers, kind + suffix)(**_COMMON | changes)


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, _MODELS[name][0] + "ForCausalLM")(config_of(name))
    return model.eval().to(device, dtype)


def scales_of(kind: str, config: Any) -> Any:
    """Some heads saturate with these, others use little of the range."""
    if kind in ("1.0", "dynamic"):
        return None if kind == "1.0" else "dynamic"
    count = 1 if kind == "tensor" else config.num_key_value_heads
    generator = torch.Generator().manual_seed(1)
    layers = {
        index: LayerScales(None, *torch.exp2(torch.rand(2, count, generator=generator) * 8 - 12))
        for index in range(LAYERS)
    }
    return KVScales(layers, KVCacheScheme("tensor" if kind == "tensor" else "attn_head"))


def there_and_back(x: Tensor, scale: Tensor | None, fp8: torch.dtype) -> Tensor:
    """[batch, heads, tokens, head_size] quantized and dequantized by the reference, in the layout of memory
    that is natural for a cache; None computes a scale for each token and head."""
    if scale is None:
        q, computed = reference.quantize(x, group_shape=(1, -1), dtype=fp8)
        back = reference.dequantize(q, computed, group_shape=(1, -1), dtype=x.dtype)
    else:
        scale = scale.to(x.device).view(1, -1, 1, 1)
        back = reference.dequantize(reference.quantize(x, scale, dtype=fp8)[0], scale, dtype=x.dtype)
    return back


def by_tokens(x: Tensor) -> Tensor:
    """The same values; all heads of a token lie together."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class _ThereAndBack:
    """Makes a cache of Transformers one of FP8 values in the dtype of the model."""

    def rounds(self, scales: Any, fp8: torch.dtype = E4M3) -> Any:
        self.scales, self.fp8 = scales, fp8
        return self

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        one = LayerScales(None, torch.ones(1), torch.ones(1))
        own = (
            LayerScales(None, None, None) if self.scales == "dynamic" else (self.scales or {}).get(layer, one)
        )
        key, value = there_and_back(key, own.k, self.fp8), there_and_back(value, own.v, self.fp8)
        key, value = super().update(key, value, layer, *args, **kwargs)  # type: ignore[misc]
        return by_tokens(key), by_tokens(value)


class Expected(_ThereAndBack, DynamicCache):  # type: ignore[misc]
    pass


class ExpectedStatic(_ThereAndBack, StaticCache):  # type: ignore[misc]
    pass


def caches(
    name: str, scales: Any = None, static: bool = False, dtype: torch.dtype = E4M3, **options: Any
) -> tuple[Fp8Cache, Any]:
    """A cache, and the one to compare it with."""
    config = config_of(name)
    fixed = {"max_cache_len": 40} if static else {}
    expected = (ExpectedStatic if static else Expected)(config=config, **fixed)
    options = {"block_size": 4} | fixed | options
    return Fp8Cache(config, scales, dtype=dtype, **options), expected.rounds(scales, dtype)


def tokens(batch: int = 3, length: int = LENGTH, seed: int = 2) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, *padding: int) -> tuple[Tensor, Tensor]:
    """Ids and mask."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return ids * mask, mask


@torch.no_grad()
def logits(model: Any, cache: Any, ids: Tensor, mask: Tensor, steps: Sequence[int] = STEPS) -> Tensor:
    """Of all tokens, given to the model in pieces; the cache may hold earlier ones, which the mask has."""
    past, pieces = mask.shape[1] - ids.shape[1], []
    for piece in ids.split(list(steps), 1):
        past += piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :past], past_key_values=cache).logits)
    return torch.cat(pieces, 1)


def generate(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True} | options
    return model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=cache,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def assert_same_generation(actual: Any, expected: Any) -> None:
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for a, e in zip(actual.logits, expected.logits, strict=True):
        assert_same_bytes(a, e)


# What the model computes


@each_mode
@each_model
@pytest.mark.parametrize(
    ("scales", "fp8", "layout", "real"),
    [
        ("1.0", E4M3, "NHD", torch.bfloat16),
        ("tensor", E5M2, "HND", torch.float32),
        ("head", E4M3, "HND", torch.bfloat16),
        ("head", E5M2, "NHD", torch.float16),
        ("dynamic", E4M3, "NHD", torch.float32),
        ("dynamic", E5M2, "HND", torch.bfloat16),
    ],
    ids=["1.0", "tensor", "head HND", "head NHD", "dynamic NHD", "dynamic HND"],
)
def test_logits(
    device: torch.device,
    name: str,
    static: bool,
    scales: str,
    fp8: torch.dtype,
    layout: str,
    real: torch.dtype,
) -> None:
    """A padded batch, as a prompt in two chunks, single tokens, several at once."""
    model = model_of(name, real, device)
    cache, expected = caches(name, scales_of(scales, model.config), static, fp8, layout=layout)
    ids, mask = (x.to(device) for x in left_padded(tokens(), 5, 0, 2))
    assert_same_bytes(logits(model, cache, ids, mask), logits(model, expected, ids, mask))


def test_quantization_is_seen() -> None:
    """If it weren't, equal logits would say nothing."""
    model, ids = model_of("Llama"), tokens()
    seen = [
        logits(model, cache, ids, torch.ones_like(ids))
        for cache in (
            DynamicCache(config=model.config),
            *(
                caches("Llama", scales_of(kind, model.config))[0]
                for kind in ("1.0", "tensor", "head", "dynamic")
            ),
            caches("Llama", dtype=E5M2)[0],
        )
    ]
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen)


@each_mode
@full_and_sliding
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_logits_with_any_block_size(name: str, static: bool, block_size: int) -> None:
    model, ids = model_of(name), tokens()
    cache, expected = caches(name, None, static, block_size=block_size)
    mask = torch.ones_like(ids)
    assert_same_bytes(logits(model, cache, ids, mask), logits(model, expected, ids, mask))


@each_mode
@full_and_sliding
@pytest.mark.parametrize("steps", [(24,), (8, 8, 8), (9, 15), (1,) * 24, (10, 1, 13), (3, 20, 1)], ids=str)
def test_logits_of_prompts_in_chunks(name: str, static: bool, steps: tuple[int, ...]) -> None:
    model, ids = model_of(name), tokens()
    cache, expected = caches(name, "dynamic", static)
    mask = torch.ones_like(ids)
    assert_same_bytes(logits(model, cache, ids, mask, steps), logits(model, expected, ids, mask, steps))


def test_a_window_wider_than_a_static_cache() -> None:
    model, ids = model_of("Mistral"), tokens(length=8)
    cache, expected = Fp8Cache(model.config, max_cache_len=8), ExpectedStatic(model.config, 8).rounds(None)
    mask = torch.ones_like(ids)
    assert_same_bytes(logits(model, cache, ids, mask, (6, 2)), logits(model, expected, ids, mask, (6, 2)))
    assert cache.is_sliding == [True, True]
    assert cache.nbytes == 2 * 3 * 16 * 2 * KV_HEADS * HEAD_SIZE, "one block of 16, and no more for a ring"


def test_eager_attention() -> None:
    model, ids = model_of("Llama"), tokens()
    cache, expected = caches("Llama")
    model.set_attn_implementation("eager")
    try:
        ids, mask = left_padded(ids, 3)
        assert_same_bytes(logits(model, cache, ids, mask), logits(model, expected, ids, mask))
    finally:
        model.set_attn_implementation("sdpa")


def test_hostile_keys_come_back_as_the_reference_says() -> None:
    """Infinities, NaN, zeros and subnormals; through the ring of a window, too, where they bypass it."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e-40, 3e38, 448.0]).repeat(1, KV_HEADS, 20, 2)
    for cache, expected in (caches(name, s, m) for name in ("Llama", "Mistral") for s in (None, "dynamic")
                            for m in (False, True)):  # fmt: skip
        actual = cache.update(x, -x, 0)
        for a, e in zip(actual, expected.update(x, -x, 0), strict=True):
            assert_same_bytes(a[:, :, :20].contiguous(), e[:, :, :20].contiguous())


def test_a_forward_pass_that_records_gradients() -> None:
    model, ids = model_of("Llama"), tokens()
    cache, expected = caches("Llama")
    for piece in ids.split(8, 1):
        actual = model(piece, past_key_values=cache).logits
        assert_same_bytes(actual, logits(model, expected, piece, torch.ones(3, expected.get_seq_length() + 8)
                                         .long(), (8,)))  # fmt: skip
    assert actual.requires_grad
    assert not cache.layers[0].storage.storage.requires_grad


# generate


@each_mode
@full_and_sliding
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True},
     {"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "sampling", "beams", "beam sampling", "several beams", "several samples"],
)  # fmt: skip
def test_generate(device: torch.device, name: str, static: bool, options: dict[str, Any]) -> None:
    if static and device.type == "cuda":
        options = options | {"disable_compile": True}  # compiled, attention rounds differently
    model = model_of(name, device=device)
    ids, mask = (x.to(device) for x in left_padded(tokens(length=11), 4, 0, 1))
    cache, expected = caches(name, "dynamic", static)
    actual = generate(model, cache, ids, mask, **options)
    assert_same_generation(actual, generate(model, expected, ids, mask, **options))
    assert int(cache.get_seq_length()) == 11 + 12 - 1


def test_beams_are_reordered() -> None:
    """If they never were, the tests of beam search would say nothing."""
    cache, reorders = caches("Llama")[0], []
    original = cache.reorder_cache
    cache.reorder_cache = lambda beams: (reorders.append(beams.tolist()), original(beams))
    generate(model_of("Llama"), cache, tokens(2, 11), num_beams=3)
    assert any(beams != sorted(set(beams)) for beams in reorders)


@each_mode
@full_and_sliding
@pytest.mark.parametrize("chunk", [1, 4, 10, 100])
def test_generate_with_chunks_of_the_prompt(name: str, static: bool, chunk: int) -> None:
    model, ids = model_of(name), tokens(length=21)
    cache, expected = caches(name, None, static)
    actual = generate(model, cache, ids, prefill_chunk_size=chunk)
    assert_same_generation(actual, generate(model, expected, ids, prefill_chunk_size=chunk))


@each_mode
@full_and_sliding
def test_a_conversation_goes_on(name: str, static: bool) -> None:
    model, more = model_of(name), tokens(length=5, seed=7)
    ids = tokens(length=8)
    cache, expected = caches(name, "dynamic", static)
    for _ in range(2):
        actual = generate(model, cache, ids, max_new_tokens=6)
        assert_same_generation(actual, generate(model, expected, ids, max_new_tokens=6))
        ids = torch.cat([actual.sequences, more], 1)


@full_and_sliding
def test_assisted_decoding(name: str) -> None:
    """Candidates that are not accepted are cropped, in layers with a window after it is full, too."""
    model, ids = model_of(name), tokens(1, 6).repeat(1, 4)
    cache, expected = caches(name, "dynamic")
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 20}
    actual = generate(model, cache, ids, **options)
    assert_same_generation(actual, generate(model, expected, ids, **options))
    assert cache.get_seq_length() == expected.get_seq_length()


# Operations on sequences


@each_mode
@pytest.mark.parametrize("scales", ["head", "dynamic"])
@full_and_sliding
def test_sequences_change_places(device: torch.device, name: str, static: bool, scales: str) -> None:
    model = model_of(name, device=device)
    cache, expected = caches(name, scales_of(scales, model.config), static)
    ids = tokens().to(device)
    mask = torch.ones_like(ids)
    logits(model, cache, ids[:, :14], mask[:, :14], (13, 1))
    logits(model, expected, ids[:, :14], mask[:, :14], (13, 1))
    for order in ([2, 0, 1], [1, 1, 0]):
        for one in (cache, expected):
            one.reorder_cache(torch.tensor(order))
    after = ids[[2, 0, 1]][[1, 1, 0]][:, 14:]
    actual = logits(model, cache, after, mask, (1, 1, 8))
    assert_same_bytes(actual, logits(model, expected, after, mask, (1, 1, 8)))


@full_and_sliding
@pytest.mark.parametrize(
    "indices",
    [torch.tensor([2, 0]), torch.tensor([True, False, True]), torch.tensor([1]), [0, 0, 1, 2]],
    ids=["two", "mask", "one", "list"],
)
def test_sequences_are_selected(name: str, indices: Any) -> None:
    model, ids = model_of(name), tokens()
    cache, expected = caches(name, "dynamic")
    for one in (cache, expected):
        logits(model, one, ids[:, :14], torch.ones(3, 14).long(), (13, 1))
        one.batch_select_indices(indices)
    ids = ids[indices]
    mask = torch.ones_like(ids)
    actual = logits(model, cache, ids[:, 14:], mask, (1, 9))
    assert_same_bytes(actual, logits(model, expected, ids[:, 14:], mask, (1, 9)))


@full_and_sliding
def test_sequences_are_repeated(name: str) -> None:
    model, ids = model_of(name), tokens()
    cache, expected = caches(name, "dynamic")
    for one in (cache, expected):
        logits(model, one, ids[:, :14], torch.ones(3, 14).long(), (13, 1))
        one.batch_repeat_interleave(2)
    ids = ids.repeat_interleave(2, 0)
    mask = torch.ones_like(ids)
    actual = logits(model, cache, ids[:, 14:], mask, (1, 9))
    assert_same_bytes(actual, logits(model, expected, ids[:, 14:], mask, (1, 9)))


def test_a_static_cache_selects_and_repeats_in_place() -> None:
    model, ids = model_of("Llama"), tokens()
    cache = Fp8Cache(model.config, max_cache_len=40, max_batch_size=4, block_size=4)
    _, expected = caches("Llama")
    for one in (cache, expected):
        logits(model, one, ids[:, :14], torch.ones(3, 14).long(), (13, 1))
        one.batch_select_indices(torch.tensor([2, 0]))
        one.batch_repeat_interleave(2)
    after, mask = ids[[2, 2, 0, 0], 14:], torch.ones(4, 24).long()
    # Attention over all of `max_cache_len` and over the tokens there are may differ in the last bits.
    torch.testing.assert_close(
        logits(model, cache, after, mask, (1, 9)), logits(model, expected, after, mask, (1, 9))
    )


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@each_mode
def test_an_empty_cache_has_no_sequences_to_change(operation: str, static: bool) -> None:
    model, ids = model_of("Llama"), tokens()
    cache, expected = caches("Llama", None, static)
    getattr(cache, operation)(2 if "repeat" in operation else torch.tensor([1, 0]))
    mask = torch.ones_like(ids)
    assert_same_bytes(logits(model, cache, ids, mask), logits(model, expected, ids, mask))


def crop_and_go_on(name: str, static: bool, first: int, wrong: int) -> None:
    """`wrong` tokens that are removed leave no trace."""
    model, ids = model_of(name), tokens()
    cache, expected = caches(name, "dynamic", static)
    mask = torch.ones_like(ids)
    cache.activate_past_recording()
    for one in (cache, expected):
        logits(model, one, ids[:, :first], mask[:, :first], (first,))
    logits(model, cache, tokens(length=wrong, seed=9), mask[:, : first + wrong], (wrong,))
    cache.crop(-wrong)
    assert int(cache.get_seq_length()) == first
    steps = (1, LENGTH - first - 1)
    actual = logits(model, cache, ids[:, first:], mask, steps)
    assert_same_bytes(actual, logits(model, expected, ids[:, first:], mask, steps))


@each_mode
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_crop(name: str, static: bool) -> None:
    crop_and_go_on(name, static, 14, 10)


def test_crop_of_a_window_that_was_recorded() -> None:
    crop_and_go_on("Mistral", False, 14, 10)


@each_mode
def test_crop_of_a_window_that_is_not_full(static: bool) -> None:
    crop_and_go_on("Mistral", static, 5, 3)


def test_crop_of_a_window_twice() -> None:
    """What newer tokens had replaced in the ring does not come back when those are removed."""
    cache = Fp8Cache(config_of("Mistral"), max_cache_len=40, block_size=4)  # a ring of 16 for a window of 9
    for layer in range(LAYERS):
        cache.update(*torch.randn(2, 1, KV_HEADS, 24, HEAD_SIZE), layer)
    cache.crop(-8)
    with pytest.raises(ValueError, match="must leave the window of layer 0 in the cache, got -8"):
        cache.crop(-8)
    assert cache.get_seq_length() == 16


@each_mode
def test_crop_of_a_window_that_is_gone_changes_nothing(static: bool) -> None:
    model, ids = model_of("Gemma3"), tokens()
    cache, expected = caches("Gemma3", None, static)
    mask = torch.ones_like(ids)
    first = logits(model, cache, ids[:, :23], mask[:, :23], (23,))
    assert_same_bytes(first, logits(model, expected, ids[:, :23], mask[:, :23], (23,)))
    with pytest.raises(ValueError) as error:
        cache.crop(-15)
    assert str(error.value) == (
        "Fp8Cache.crop: tokens_to_remove must leave the window of layer 0 in the cache, got -15; "
        "call activate_past_recording before the tokens are added"
    )
    actual = logits(model, cache, ids[:, 23:], mask, (1,))
    assert_same_bytes(actual, logits(model, expected, ids[:, 23:], mask, (1,)))


@each_mode
@full_and_sliding
def test_reset(name: str, static: bool) -> None:
    """The next batch may be of another size; NaN of the last one must not come through the mask."""
    model, ids = model_of(name), tokens(2)
    cache, expected = caches(name, "dynamic", static, **({"max_batch_size": 3} if static else {}))
    for layer in range(LAYERS):
        cache.update(*torch.full((2, 3, KV_HEADS, 30, HEAD_SIZE), float("nan")), layer)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    mask = torch.ones_like(ids)
    assert_same_bytes(logits(model, cache, ids, mask), logits(model, expected, ids, mask))


# Memory


def bytes_of(num_tokens: int, dynamic: bool = False, heads: int = KV_HEADS, size: int = HEAD_SIZE) -> int:
    """Of K and V in FP8."""
    return 2 * num_tokens * heads * (size + (4 if dynamic else 0))


def blocks(length: int, block_size: int = 4) -> int:
    return -(-length // block_size)


@pytest.mark.parametrize("scales", [None, "dynamic"])
def test_a_dynamic_cache_grows_with_little_slack(scales: str | None) -> None:
    cache = Fp8Cache(config_of("Llama"), scales, block_size=4)
    assert cache.nbytes == cache.nbytes_16bit == 0
    sizes = set()
    for length in range(1, 200):
        key = torch.randn(3, KV_HEADS, 1, HEAD_SIZE, dtype=torch.bfloat16)
        cache.update(key, key, 0)
        needed = 3 * blocks(length)
        assert (
            bytes_of(4 * needed, bool(scales)) <= cache.nbytes <= bytes_of(4 * needed, bool(scales)) * 9 / 8
        )
        assert cache.nbytes_16bit == 2 * bytes_of(3 * length)
        sizes.add(cache.nbytes)
    assert len(sizes) < 25, "storage that grew with every block would have 50 sizes"


def test_a_dynamic_cache_keeps_the_window_only() -> None:
    """Of a long prompt, of long chunks, and of many single tokens."""
    cache = Fp8Cache(config_of("Mistral"), block_size=1)
    for count in (1000, 1, 300, *[1] * 100):
        key = torch.randn(3, KV_HEADS, count, HEAD_SIZE)
        cache.update(key, key, 0)
        assert cache.nbytes <= bytes_of(3 * (8 + 3)), "a window of 9 has 8 tokens of the past"
    assert cache.nbytes_16bit == 2 * bytes_of(3 * 8)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
@pytest.mark.parametrize("scales", [None, "dynamic"])
def test_a_static_cache_is_allocated_once(device: torch.device, name: str, scales: str | None) -> None:
    config = config_of(name)
    cache = Fp8Cache(config, scales, max_cache_len=100, max_batch_size=3, block_size=16, device=device)
    window = {"Llama": 112, "Gemma3": 32}[name]  # 9 tokens may begin in one block and end in another
    expected = bytes_of(3 * window, bool(scales)) + bytes_of(3 * 112, bool(scales))
    assert cache.nbytes == expected
    assert cache.is_initialized
    before = addresses(cache)
    logits(model_of(name, device=device), cache, tokens().to(device), torch.ones(3, 24, device=device).long())
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    cache.reset()
    logits(
        model_of(name, device=device), cache, tokens(2).to(device), torch.ones(2, 24, device=device).long()
    )
    assert addresses(cache) == before
    assert cache.nbytes == expected


def addresses(cache: Fp8Cache) -> list[int]:
    return [
        tensor.data_ptr()
        for layer in cache.layers
        for tensor in (layer.storage.storage, layer.storage.k_scale, layer.table, layer.cumulative_length)
    ]


def test_early_initialization_by_transformers() -> None:
    cache, expected = caches("Llama", None, static=True)
    cache.early_initialization(
        batch_size=3, num_heads=KV_HEADS, head_dim=HEAD_SIZE, dtype=torch.float32, device=torch.device("cpu")
    )
    assert cache.nbytes == 2 * bytes_of(3 * 40)
    model, ids = model_of("Llama"), tokens()
    mask = torch.ones_like(ids)
    assert_same_bytes(logits(model, cache, ids, mask), logits(model, expected, ids, mask))


@each_mode
@full_and_sliding
def test_what_attention_sees_does_not_stay_alive(name: str, static: bool) -> None:
    cache = caches(name, "dynamic", static)[0]
    seen = []
    for count in (20, 1, 1):
        for layer in range(LAYERS):
            key = torch.randn(3, KV_HEADS, count, HEAD_SIZE, dtype=torch.bfloat16)
            seen += [weakref.ref(x.untyped_storage()) for x in (*cache.update(key, key, layer), key)]
            del key
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []


@full_and_sliding
def test_resident_bytes_on_the_gpu(cuda: torch.device, name: str) -> None:
    """What the allocator counts between steps is what `nbytes` says, about half of 16 bit."""
    cache = Fp8Cache(config_of(name), block_size=16)
    count = 9 if name == "Mistral" else 6000
    before = torch.cuda.memory_allocated()
    for layer in range(LAYERS):
        key = torch.randn(8, KV_HEADS, count, HEAD_SIZE, dtype=torch.bfloat16, device=cuda)
        cache.update(key, key, layer)
    del key
    resident = torch.cuda.memory_allocated() - before
    assert cache.nbytes <= resident <= cache.nbytes + LAYERS * 8192  # scales, and what is rounded up
    if name == "Llama":
        assert cache.nbytes < 0.57 * cache.nbytes_16bit


# The static cache in compiled code


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_the_forward_pass(device: torch.device) -> None:
    """As a whole, prompt and single tokens: two compilations, whatever the length, and the bytes of eager.

    All that is written to must be known to keep its address, or there would be no CUDA graph.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    inputs_of_graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        inputs_of_graphs.append(torch._guards.TracingContext.get().fw_metadata)
        return make_boxed_func(graph.forward)

    model, ids = model_of("Gemma3", device=device), tokens().to(device)
    options = {"max_batch_size": 3, "device": device}
    cache, eager = (caches("Gemma3", "dynamic", True, **options)[0] for _ in range(2))
    forward = torch.compile(model.forward, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    before = addresses(cache)
    with torch.no_grad():
        for piece in ids.split([12] + [1] * 12, 1):
            actual = forward(piece, past_key_values=cache).logits
            torch.testing.assert_close(actual, model(piece, past_key_values=eager).logits)
    assert addresses(cache) == before
    assert len(inputs_of_graphs) == 2
    for inputs in inputs_of_graphs:
        written = {index for index, info in enumerate(inputs.input_info) if info.mutates_data}
        assert len(written) == LAYERS * 4, "storage, scales of K and of V, length"
        assert written <= set(inputs.static_input_indices)
    for a, e in zip(cache.layers, eager.layers, strict=True):
        assert int(a.cumulative_length) == LENGTH
        assert torch.equal(raw(a.storage.storage), raw(e.storage.storage))


@pytest.mark.usefixtures("fresh_compiler")
@full_and_sliding
def test_generate_compiles_by_itself(name: str) -> None:
    """By the criteria of a GPU, from the second token on; windows keep a number, which compiles once more."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compilation = transformers.CompileConfig(backend=backend, mode=None, fullgraph=True)
    compilation._compile_all_devices = True
    original, ids = model_of(name), tokens(length=11)
    model = copy.deepcopy(original)  # it keeps what `generate` compiled
    cache, expected = caches(name, "dynamic", static=True)
    actual = generate(model, cache, ids, compile_config=compilation)
    assert actual.sequences.tolist() == generate(original, expected, ids).sequences.tolist()
    assert len(graphs) == {"Llama": 1, "Mistral": 2}[name]


@pytest.mark.usefixtures("fresh_compiler")
@full_and_sliding
def test_generate_on_the_gpu_captures_graphs(cuda: torch.device, name: str) -> None:
    """As Transformers compiles by default: the tokens of the dynamic cache, in a second run, too."""
    from torch._dynamo.utils import counters

    model, ids = model_of(name, device=cuda), tokens(length=11).to(cuda)
    cache = Fp8Cache(model.config, "dynamic", max_cache_len=40, max_batch_size=3, device=cuda)
    expected = generate(model, Fp8Cache(model.config, "dynamic"), ids).sequences.tolist()
    counters.clear()
    for _ in range(2):
        assert generate(model, cache, ids).sequences.tolist() == expected
        cache.reset()
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["inductor"]["cudagraph_skips"] == 0


@each_mode
def test_only_a_static_cache_asks_to_be_compiled(static: bool) -> None:
    for name in ("Llama", "Gemma3"):
        assert caches(name, None, static)[0].is_compileable == static


# Where scales come from


def test_scales_of_a_checkpoint(tmp_path: Path) -> None:
    """The folder, or what `load_kv_scales` reads from it; query scales, here not finite, are not needed."""
    tensors = checkpoint_files.scales(query=True)
    tensors["model.layers.0.self_attn.q_scale"].fill_(float("nan"))
    folder = checkpoint_files.write_checkpoint(tmp_path, tensors, checkpoint_files.config(query=True))
    sizes = checkpoint_files.SIZES
    config = transformers.LlamaConfig(**_COMMON | sizes)
    key = torch.randn(1, sizes["num_key_value_heads"], 5, sizes["head_dim"])
    for scales in (folder, str(folder), load_kv_scales(folder, query=False)):
        cache = Fp8Cache(config, scales)
        for layer in range(sizes["num_hidden_layers"]):
            k, v = cache.update(key, 2 * key, layer)
            for actual, x, side in ((k, key, "k"), (v, 2 * key, "v")):
                scale = tensors[f"model.layers.{layer}.self_attn.{side}_scale"].float().flatten()
                assert_same_bytes(actual.contiguous(), there_and_back(x, scale, E4M3))


def test_scales_are_copied() -> None:
    scales = scales_of("head", config_of("Llama"))
    key = torch.randn(1, KV_HEADS, 5, HEAD_SIZE)
    expected = Fp8Cache(config_of("Llama"), scales).update(key, key, 0)[0]
    cache = Fp8Cache(config_of("Llama"), scales, block_size=1)  # so that it grows
    cache.update(key[:, :, :1], key[:, :, :1], 0)
    scales[0].k.fill_(5.0)
    assert_same_bytes(cache.update(key[:, :, 1:], key[:, :, 1:], 0)[0].contiguous(), expected.contiguous())


# What is refused


def scales_with(index: int, k: Any, v: Any) -> KVScales:
    layers = dict(scales_of("head", config_of("Llama")))
    return KVScales(layers | {index: LayerScales(None, k, v)}, KVCacheScheme("attn_head"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "bfloat16"},
         'dtype must be "fp8", "fp8_e4m3", "fp8_e5m2", "int8" or the torch dtype, got \'bfloat16\''),
        ({"dtype": torch.float16},
         'dtype must be "fp8", "fp8_e4m3", "fp8_e5m2", "int8" or the torch dtype, got torch.float16'),
        ({"layout": "NDH"}, 'layout must be "NHD" or "HND", got \'NDH\''),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_cache_len": 0}, "max_cache_len must be at least 1, got 0"),
        ({"max_cache_len": 8, "max_batch_size": -1}, "max_batch_size must be at least 1, got -1"),
        ({"max_batch_size": 2},
         "max_batch_size must be None without max_cache_len, as a dynamic cache grows, got 2"),
        ({"device": "cpu"},
         "device must be None without max_cache_len and max_batch_size, "
         "as each layer allocates on the device of its first key, got 'cpu'"),
        ({"device": "cpu", "max_cache_len": 8},
         "device must be None without max_cache_len and max_batch_size, "
         "as each layer allocates on the device of its first key, got 'cpu'"),
        ({"scales": 0.5},
         'scales must be None, "dynamic", KVScales or the folder of a checkpoint, got float'),
        ({"scales": KVScales({0: LayerScales(None, torch.ones(1), torch.ones(1))}, KVCacheScheme("tensor"))},
         "scales must be there for every layer, got no k for layer 1"),
        ({"scales": scales_with(1, torch.ones(1), None)},
         "scales must be there for every layer, got no v for layer 1"),
        ({"scales": scales_with(0, torch.tensor([0.5, 0.0]), torch.ones(2))},
         "scales must be finite and above 0, got [0.5, 0.0] for k of layer 0"),
        ({"scales": scales_with(1, torch.ones(1), torch.tensor([float("inf")]))},
         "scales must be finite and above 0, got [inf] for v of layer 1"),
    ],
    ids=["16 bit", "torch dtype", "layout", "block size", "no tokens", "no sequences", "dynamic batch",
         "dynamic device", "device without batch", "a number", "a layer less", "no v", "zero", "infinite"],
)  # fmt: skip
def test_arguments_that_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Fp8Cache(config_of("Llama"), **arguments)
    assert str(error.value) == f"Fp8Cache: {sentence}"


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Fp8Cache(config_of("Llama"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (lambda: transformers.T5Config(num_layers=1),
         "config must be of a model without an encoder, as keys of an encoder are not cached, got T5Config"),
        (lambda: transformers.LlamaConfig(**_COMMON, layer_types=["full_attention", "linear_attention"]),
         "config must have layers of the types full_attention, sliding_attention, chunked_attention only, "
         "got 'linear_attention' for layer 1"),
        (lambda: transformers.LlamaConfig(**_COMMON, kv_sharing_modes=["store", "reuse"]),
         "config must give every layer keys and values of its own, "
         "got LlamaConfig with layers that share them"),
    ],
    ids=["encoder", "linear attention", "shared keys"],
)  # fmt: skip
def test_models_that_are_refused(config: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Fp8Cache(config())
    assert str(error.value) == f"Fp8Cache: {sentence}"


@each_mode
@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ((2, 2, 1, 16), (2, 2, 1, 16), "key must have the 3 sequences that the cache has, got 2 in layer 1"),
        ((3, 4, 1, 16), (3, 4, 1, 16),
         "key must have num_kv_heads=2 and head_size=16 as before, got 4 and 16 in layer 1"),
        ((3, 2, 1, 24), (3, 2, 1, 24),
         "key must have num_kv_heads=2 and head_size=16 as before, got 2 and 24 in layer 1"),
        ((3, 2, 1, 16), (3, 2, 1, 8),
         "key and value must be of one shape [batch, num_kv_heads, tokens, head_size], "
         "got [3, 2, 1, 16] and [3, 2, 1, 8] in layer 1"),
        ((3, 2, 16), (3, 2, 16),
         "key and value must be of one shape [batch, num_kv_heads, tokens, head_size], "
         "got [3, 2, 16] and [3, 2, 16] in layer 1"),
    ],
    ids=["batch", "heads", "head size", "value", "dimensions"],
)  # fmt: skip
def test_tokens_that_do_not_fit(static: bool, key: Any, value: Any, sentence: str) -> None:
    cache = caches("Llama", None, static)[0]
    cache.update(*torch.randn(2, 3, KV_HEADS, 5, HEAD_SIZE), 1)
    before = raw(cache.layers[1].storage.storage)
    with pytest.raises(ValueError) as error:
        cache.update(torch.randn(key), torch.randn(value), 1)
    assert str(error.value) == f"Fp8Cache: {sentence}"
    assert int(cache.get_seq_length(1)) == 5
    assert torch.equal(raw(cache.layers[1].storage.storage), before)


@each_mode
def test_scales_of_another_number_of_heads(static: bool) -> None:
    scales = scales_with(1, torch.ones(1), torch.ones(4))
    sentence = "Fp8Cache: scales of layer 1 must have 1 or 2 elements for v, as its keys have 2 heads, got 4"
    cache = caches("Llama", scales, static)[0]
    with pytest.raises(ValueError) as error:
        cache.update(*torch.randn(2, 3, KV_HEADS, 5, HEAD_SIZE), 1)
    assert str(error.value) == sentence
    assert cache.nbytes == 0
    if static:
        with pytest.raises(ValueError) as error:
            caches("Llama", scales, static, max_batch_size=1, device="cpu")
        assert str(error.value) == sentence


def test_more_tokens_than_a_static_cache_has_room_for() -> None:
    cache = caches("Llama", None, static=True)[0]
    cache.update(*torch.randn(2, 3, KV_HEADS, 39, HEAD_SIZE), 0)
    with pytest.raises(ValueError) as error:
        cache.update(*torch.randn(2, 3, KV_HEADS, 2, HEAD_SIZE), 0)
    assert str(error.value) == (
        "Fp8Cache: max_cache_len must be at least the 41 tokens of a sequence, got 40"
    )
    assert int(cache.get_seq_length()) == 39


def test_more_sequences_than_a_static_cache_has_room_for() -> None:
    cache = Fp8Cache(config_of("Llama"), max_cache_len=40, max_batch_size=2)
    with pytest.raises(ValueError) as error:
        cache.update(*torch.randn(2, 3, KV_HEADS, 1, HEAD_SIZE), 0)
    sentence = "Fp8Cache: key must have at most max_batch_size=2 sequences, got 3 in layer 0"
    assert str(error.value) == sentence
    cache.update(*torch.randn(2, 2, KV_HEADS, 1, HEAD_SIZE), 0)
    with pytest.raises(ValueError, match="must have at most max_batch_size=2 sequences, got 4"):
        cache.batch_repeat_interleave(2)


@each_mode
@pytest.mark.parametrize("count", [-6, 1])
def test_crop_of_what_is_not_there(static: bool, count: int) -> None:
    cache = caches("Llama", None, static)[0]
    cache.update(*torch.randn(2, 3, KV_HEADS, 5, HEAD_SIZE), 0)
    cache.update(*torch.randn(2, 3, KV_HEADS, 5, HEAD_SIZE), 1)
    with pytest.raises(ValueError) as error:
        cache.crop(count)
    assert str(error.value) == (
        f"Fp8Cache.crop: tokens_to_remove must be from -5 to 0, as there are 5 tokens, got {count}"
    )
    assert int(cache.get_seq_length()) == 5


# The package


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, fp8kv; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_cache_describes_itself() -> None:
    cache = Fp8Cache(config_of("Gemma3"), max_cache_len=64, max_batch_size=2, device="cpu")
    assert repr(cache) == "Fp8Cache(1 StaticWindowFp8Layer, 1 StaticFp8Layer, 0.01172 MiB)"
