"""`fp8kv.transformers.Fp8Cache`, compared with Transformers' caches of quantized and dequantized values.

Both give the model the same numbers, so logits and tokens must be equal, not close.
"""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
from fp8kv import KVCacheScheme, KVScales, LayerScales, load_kv_scales
from helpers import assert_same_bytes, raw

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING  # noqa: E402

from cached_models import (  # noqa: E402
    E4M3,
    E5M2,
    FIELDS,
    HEAD_SIZE,
    KV_HEADS,
    LAYERS,
    LENGTH,
    ExpectedStatic,
    Recorder,
    assert_same_generation,
    caches,
    config_of,
    each_mode,
    each_model,
    full_and_sliding,
    generate,
    left_padded,
    logits,
    model_of,
    scales_of,
    there_and_back,
    tokens,
    with_cache,
)
from fp8kv.transformers import Fp8Cache  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# Results of the model


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
    """Otherwise, equal logits would prove nothing."""
    model, ids = model_of("Llama"), tokens()
    seen = [
        logits(model, cache, ids, torch.ones_like(ids))
        for cache in (
            DynamicCache(config=model.config),
            *(caches("Llama", scales_of(kind, model.config))[0] for kind in ("1.0", "tensor", "head", "dynamic")),
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
    cache = Fp8Cache(model.config, max_cache_len=8, direct=False)
    expected = ExpectedStatic(model.config, 8).rounds(None)
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
        actual = model(piece, **with_cache(cache)).logits
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
    """Otherwise, the tests of beam search would prove nothing."""
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


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("indices", "sentence"),
    [
        (torch.tensor([3]), "sequences must be from -2 to 1, got 3"),
        (torch.tensor([0, -3]), "sequences must be from -2 to 1, got -3"),
        (torch.tensor([True]), r"a mask of sequences must have the shape \[2\], got \[1\]"),
        (torch.tensor([True, True, False]), r"a mask of sequences must have the shape \[2\], got \[3\]"),
    ],
    ids=str,
)
def test_sequences_that_are_not_there(static: bool, indices: torch.Tensor, sentence: str) -> None:
    model, ids = model_of("Llama"), tokens()[:2]
    cache = Fp8Cache(model.config, "dynamic", **({"max_cache_len": 20, "max_batch_size": 4} if static else {}))
    logits(model, cache, ids[:, :14], torch.ones(2, 14).long(), (13, 1))
    with pytest.raises(ValueError, match=f"^Fp8Cache: {sentence}$"):
        cache.batch_select_indices(indices)
    cache.batch_select_indices(torch.tensor([-1]))
    assert cache.layers[0].batch_size == 1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_autocast(name: str, static: bool) -> None:
    """RoPE leaves keys in float32, while values are bfloat16."""
    model, ids, mask = model_of(name).float(), tokens(), torch.ones(3, 24).long()
    options = {"max_cache_len": 40, "max_batch_size": 3} if static else {}
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, Fp8Cache(model.config, "dynamic", dtype="int8", **options), ids, mask, (13, 1, 1, 9))
        expected = logits(model, DynamicCache(config=model.config), ids, mask, (13, 1, 1, 9))
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_model_that_reads_all_values_gets_them() -> None:
    """Doge computes its mask from them."""
    config = transformers.DogeConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DogeForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.A"):
            torch.nn.init.normal_(parameter)
    ids = torch.randint(1, 97, (2, 14))

    def steps(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(ids[:, :9], **with_cache(cache))
            return torch.cat([model(ids[:, i : i + 1], **with_cache(cache)).logits for i in range(9, 14)], 1)

    expected = steps(DynamicCache(config=config))
    found = steps(Fp8Cache(config, "dynamic", dtype="int8"))
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("fields", [{"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 2}], ids=str)
def test_heads_of_falcon(fields: dict[str, Any]) -> None:
    config = transformers.FalconConfig(vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **fields)
    model = transformers.FalconForCausalLM(config).eval()
    cache = Fp8Cache(config, max_cache_len=20, max_batch_size=2, device="cpu")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), **with_cache(cache))
    # The newer architecture repeats the heads of keys before it caches them.
    assert cache.layers[0].storage.num_kv_heads == (1 if "multi_query" in fields else 4)


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
    torch.testing.assert_close(logits(model, cache, after, mask, (1, 9)), logits(model, expected, after, mask, (1, 9)))


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
    """Tokens replaced in the ring by newer ones do not come back when those are removed."""
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
        assert bytes_of(4 * needed, bool(scales)) <= cache.nbytes <= bytes_of(4 * needed, bool(scales)) * 9 / 8
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
    logits(model_of(name, device=device), cache, tokens(2).to(device), torch.ones(2, 24, device=device).long())
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
    """Between steps, the allocator counts `nbytes`, about half of 16 bits."""
    cache = Fp8Cache(config_of(name), block_size=16)
    count = 9 if name == "Mistral" else 6000
    before = torch.cuda.memory_allocated()
    for layer in range(LAYERS):
        key = torch.randn(8, KV_HEADS, count, HEAD_SIZE, dtype=torch.bfloat16, device=cuda)
        cache.update(key, key, layer)
    del key
    resident = torch.cuda.memory_allocated() - before
    slots = 8 * 8 * count  # of the last step, int64
    others = (LAYERS + 1) * 8192  # scales, a table, rounding up
    assert cache.nbytes <= resident <= cache.nbytes + slots + others
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
            actual = forward(piece, **with_cache(cache)).logits
            torch.testing.assert_close(actual, model(piece, **with_cache(eager)).logits)
    assert addresses(cache) == before
    assert len(inputs_of_graphs) == 2
    for inputs in inputs_of_graphs:
        written = {index for index, info in enumerate(inputs.input_info) if info.mutates_data}
        assert len(written) == LAYERS * 3 + 1, "storage, scales of K and of V of each layer; one length"
        assert written <= set(inputs.static_input_indices)
    for a, e in zip(cache.layers, eager.layers, strict=True):
        assert int(a.cumulative_length) == LENGTH
        assert torch.equal(raw(a.storage.storage), raw(e.storage.storage))


@pytest.mark.usefixtures("fresh_compiler")
@full_and_sliding
def test_generate_compiles_by_itself(name: str) -> None:
    """By the criteria of a GPU, from the second token on; windows keep a number, which compiles once more."""
    recorder = Recorder()
    original, ids = model_of(name), tokens(length=11)
    model = copy.deepcopy(original)  # it keeps what `generate` compiled
    cache, expected = caches(name, "dynamic", static=True)
    actual = generate(model, cache, ids, compile_config=recorder.config())
    assert actual.sequences.tolist() == generate(original, expected, ids).sequences.tolist()
    assert len(recorder.graphs) == {"Llama": 1, "Mistral": 2}[name]


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


# Sources of scales


def test_scales_of_a_checkpoint(tmp_path: Path) -> None:
    """The folder, or what `load_kv_scales` reads from it; query scales, here not finite, are not needed."""
    tensors = checkpoint_files.scales(query=True)
    tensors["model.layers.0.self_attn.q_scale"].fill_(float("nan"))
    folder = checkpoint_files.write_checkpoint(tmp_path, tensors, checkpoint_files.config(query=True))
    sizes = checkpoint_files.SIZES
    config = transformers.LlamaConfig(**FIELDS | sizes)
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


# Errors


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
        ({"block_size": None}, "block_size must be an int, got NoneType"),
        ({"max_cache_len": "40"}, "max_cache_len must be an int, got str"),
        ({"skip_layers": None}, "skip_layers must be a list of numbers and types, got NoneType"),
        ({"k_offset": {0: 1.0, 1: 1.0}}, "k_offset of layer 0 must be a tensor, got float"),
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
         "scales of k in layer 0 must be finite and above 0 in fp32, got 0.0 for head 1"),
        ({"scales": scales_with(1, torch.ones(1), torch.tensor([float("inf")]))},
         "scales of v in layer 1 must be finite and above 0 in fp32, got inf"),
    ],
    ids=["16 bit", "torch dtype", "layout", "block size", "no block size", "string", "no layers", "offset", "no tokens",
         "no sequences", "dynamic batch",
         "dynamic device", "device without batch", "a number", "a layer less", "no v", "zero", "infinite"],
)  # fmt: skip
def test_arguments_that_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Fp8Cache(config_of("Llama"), **arguments)
    assert str(error.value) == f"Fp8Cache: {sentence}"


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Fp8Cache(config_of("Llama"), tmp_path / "nowhere")


#: The type of layers that select among their keys, which depends on the release.
SPARSE = "indexed_attention"
if SPARSE not in DYNAMIC_LAYER_TYPE_MAPPING:
    SPARSE = "deepseek_sparse_attention"


def with_types(*types: str) -> Any:
    config = config_of("Llama")
    config.layer_types = list(types)  # not checked, as those of a constructor are
    return config


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (lambda: transformers.T5Config(num_layers=1),
         "config must be of a model without an encoder, as keys of an encoder are not cached, got T5Config"),
        (lambda: transformers.MllamaConfig(),
         "config must be of a model without cross-attention layers, as it would read keys from the "
         "cache itself, got MllamaTextConfig"),
        (lambda: model_of("Llama"),
         "config must be a config of transformers, such as model.config, got LlamaForCausalLM"),
        (lambda: "org/model", "config must be a config of transformers, such as model.config, got str"),
        (lambda: config_of("Llama").to_dict(), "config must be a config of transformers, such as model.config, got dict"),
        (lambda: transformers.MiniMaxConfig(),
         "config must be of a model that takes any cache of Transformers, got MiniMaxConfig, whose model takes only "
         "its own; fp8kv.calibrate finds its KVScales, which AttentionScales and engines use"),
        (lambda: transformers.xLSTMConfig(),
         "config must be of a model that caches keys and values, got xLSTMConfig"),
        (lambda: with_types("full_attention", SPARSE),
         f"config must have layers whose keys and values can be FP8, got '{SPARSE}' for layer 1; "
         f'skip_layers=["{SPARSE}"] keeps such layers in 16 bits'),
        (lambda: with_types("full_attention", "unheard_of"),
         "config must have layers that Transformers has a cache for, got layers of the type 'unheard_of'"),
        (lambda: with_types("linear_attention", "linear_attention"),
         "config must be of a model with keys and values to store in FP8, "
         "got LlamaConfig without such layers, or skip_layers with all of them"),
    ],
    ids=["encoder", "cross-attention", "model", "id", "dict", "minimax", "xlstm", "sparse attention", "unknown",
         "no attention"],
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
         "value must have num_kv_heads=2 and head_size=16 as before, got 2 and 8 in layer 1"),
        ((3, 2, 1, 16), (3, 4, 1, 16),
         "key and value must be [batch, num_kv_heads, tokens, head_size], alike but for head_size, "
         "got [3, 2, 1, 16] and [3, 4, 1, 16] in layer 1"),
        ((3, 2, 16), (3, 2, 16),
         "key and value must be [batch, num_kv_heads, tokens, head_size], alike but for head_size, "
         "got [3, 2, 16] and [3, 2, 16] in layer 1"),
    ],
    ids=["batch", "heads", "head size", "head size of value", "heads of value", "dimensions"],
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
    sentence = "Fp8Cache: scales of layer 1 must have 1 or 2 elements for v, as its values have 2 heads, got 4"
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
    assert str(error.value) == ("Fp8Cache: max_cache_len must be at least the 41 tokens of a sequence, got 40")
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
    assert str(error.value) == (f"Fp8Cache.crop: tokens_to_remove must be from -5 to 0, as there are 5 tokens, got {count}")
    assert int(cache.get_seq_length()) == 5


# Copies


@full_and_sliding
@each_mode
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("scales", [None, "dynamic"], ids=["1.0", "dynamic"])
def test_copies_go_on_alike(name: str, static: bool, duplicate: Callable[[Any], Any], scales: Any) -> None:
    model, ids = model_of(name), tokens()
    cache = Fp8Cache(copy.copy(model.config), scales, max_cache_len=40 if static else None)
    logits(model, cache, ids[:, :12], torch.ones_like(ids[:, :12]), (12,))
    twin = duplicate(cache)
    rest, mask = ids[:, 12:], torch.ones_like(ids)
    expected = logits(model, cache, rest, mask, (4, *[1] * (rest.shape[1] - 4)))
    assert_same_bytes(logits(model, twin, rest, mask, (4, *[1] * (rest.shape[1] - 4))), expected)
    assert int(twin.get_seq_length()) == int(cache.get_seq_length()) == ids.shape[1]
    assert (twin.nbytes, twin.clipped()) == (cache.nbytes, cache.clipped())


def test_counts_on_their_way_stay_behind() -> None:
    """An event of a GPU can't be copied."""
    cache = Fp8Cache(config_of("Llama"))
    cache._clipping._on_its_way = (object(), [])
    assert pickle.loads(pickle.dumps(cache))._clipping._on_its_way is None
    assert cache._clipping._on_its_way is not None


# The package


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, fp8kv; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_cache_describes_itself() -> None:
    cache = Fp8Cache(config_of("Gemma3"), max_cache_len=64, max_batch_size=2, device="cpu")
    assert repr(cache) == "Fp8Cache(1 StaticWindowFp8Layer, 1 StaticFp8Layer, 0.01172 MiB)"
