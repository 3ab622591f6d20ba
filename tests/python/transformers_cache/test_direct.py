"""The attention function "fp8kv", which reads the FP8 bytes of an `Fp8Cache`.

It is compared with Transformers' own caches of keys and values that the reference quantized and dequantized.
Sums have another order, so logits are close, not equal, and tokens are the same.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_same_bytes

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402

from cached_models import (  # noqa: E402
    E4M3,
    E5M2,
    LAYERS,
    MODELS,
    STEPS,
    Recorder,
    caches,
    config_of,
    each_mode,
    full_and_sliding,
    generate,
    left_padded,
    logits,
    model_of,
    scales_of,
    tokens,
    with_cache,
)
from fp8kv.transformers import Fp8Cache, attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Operators(TorchDispatchMode):
    """Counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def gathers(self) -> int:
        return self.counts["gather_and_dequant_cache"]

    @property
    def attentions(self) -> int:
        return self.counts["paged_attention"]


def pair(name: str, model: Any, scales: str = "dynamic", static: bool = False, **options: Any) -> Any:
    """A cache whose bytes are read, and the reference cache."""
    scale = scales_of(scales, model.config)
    return caches(name, scale, static, config=model.config, direct=True, **options)


def assert_close(actual: Tensor, expected: Tensor, error: float = 1e-3) -> None:
    actual, expected = actual.double(), expected.double()
    assert ((actual - expected).norm() / expected.norm()).item() < error


# Logits


@each_mode
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("scales", "fp8", "layout", "real"),
    [
        ("1.0", E4M3, "NHD", torch.float32),
        ("tensor", E5M2, "HND", torch.float32),
        ("head", E4M3, "HND", torch.float32),
        ("dynamic", E5M2, "NHD", torch.float32),
        ("dynamic", E4M3, "HND", torch.bfloat16),
    ],
    ids=["1.0", "tensor", "head", "dynamic", "bfloat16"],
)
def test_logits(name: str, static: bool, scales: str, fp8: torch.dtype, layout: str, real: torch.dtype) -> None:
    """A padded batch, as a prompt in two chunks, single tokens, several at once.

    All but the first chunk is read from the cache, unless a chunk of Llama 4 ends within a step: then two of
    its queries see different first positions.
    """
    model = model_of(name, real)
    cache, expected = pair(name, model, scales, static, dtype=fp8, layout=layout)
    ids, mask = left_padded(tokens(), 5, 0, 2)
    with Operators() as operators:
        actual = logits(model, cache, ids, mask)
    assert_close(actual, logits(model, expected, ids, mask), 1e-3 if real == torch.float32 else 3e-2)
    first = LAYERS if name != "Llama4" else LAYERS + 3
    assert (operators.gathers, operators.attentions) == (first, LAYERS * len(STEPS) - first)


@each_mode
@full_and_sliding
@pytest.mark.parametrize("steps", [(3, *[1] * 21), (2, 8, 8, 6), (9, 9, 6), (1,) * 24], ids=str)
def test_logits_of_prompts_in_chunks(name: str, static: bool, steps: tuple[int, ...]) -> None:
    """Chunks of more than 8 tokens use PyTorch's attention, like the first one."""
    model, ids = model_of(name), tokens()
    cache, expected = pair(name, model, static=static)
    mask = torch.ones_like(ids)
    with Operators() as operators:
        actual = logits(model, cache, ids, mask, steps)
    assert_close(actual, logits(model, expected, ids, mask, steps))
    dequantized = sum(size > 8 or not number for number, size in enumerate(steps))
    # A static window that such a chunk replaces gives the tokens before it and those of the chunk apart.
    replaced = static and name == "Mistral" and steps[:2] == (9, 9)
    assert operators.gathers == LAYERS * (dequantized + replaced)
    assert operators.attentions == LAYERS * (len(steps) - dequantized)


@each_mode
@full_and_sliding
@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_logits_with_any_block_size(name: str, static: bool, block_size: int) -> None:
    model, (ids, mask) = model_of(name), left_padded(tokens(), 4, 0, 9)
    cache, expected = pair(name, model, static=static, block_size=block_size)
    assert_close(logits(model, cache, ids, mask), logits(model, expected, ids, mask))


def decode_step(static: bool, num_layers: int) -> Operators:
    """What runs in one."""
    torch.manual_seed(0)
    config = config_of("Llama")
    config.num_hidden_layers = num_layers
    model = transformers.LlamaForCausalLM(config).eval()
    cache = Fp8Cache(model.config, "dynamic", **({"max_cache_len": 40} if static else {}))
    ids = tokens()
    logits(model, cache, ids[:, :20], torch.ones(3, 20).long(), (19, 1))
    with Operators() as operators:
        logits(model, cache, ids[:, 20:21], torch.ones(3, 21).long(), (1,))
    return operators


@each_mode
def test_a_decode_step_gathers_nothing_and_makes_its_indices_once(static: bool) -> None:
    one, four = decode_step(static, 1), decode_step(static, 4)
    assert (one.attentions, four.attentions) == (1, 4)
    assert (one.gathers, four.gathers) == (0, 0)
    for operator in ("arange", "floor_divide", "remainder", "full", "index_select"):
        assert one.counts[operator] == four.counts[operator], operator
    assert one.counts["arange"] > 0


# generate


@each_mode
@full_and_sliding
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 4},
     {"do_sample": True, "top_k": 5}],
    ids=["greedy", "beams", "several beams", "chunks", "sampling"],
)  # fmt: skip
def test_generate(name: str, static: bool, options: dict[str, Any]) -> None:
    model, (ids, mask) = model_of(name), left_padded(tokens(length=11), 4, 0, 1)
    cache, expected = pair(name, model, static=static)
    if options.get("prefill_chunk_size"):
        ids, mask = tokens(length=11), None
    with Operators() as operators:
        actual = generate(model, cache, ids, mask, **options).sequences.tolist()
    assert actual == generate(model, expected, ids, mask, **options).sequences.tolist()
    assert operators.attentions >= LAYERS * 11


@full_and_sliding
def test_assisted_decoding(name: str) -> None:
    model, ids = model_of(name), tokens(1, 6).repeat(1, 4)
    cache, expected = pair(name, model)
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 20}
    with Operators() as operators:
        actual = generate(model, cache, ids, **options).sequences.tolist()
    assert actual == generate(model, expected, ids, **options).sequences.tolist()
    assert operators.attentions >= LAYERS


@each_mode
@full_and_sliding
def test_a_conversation_goes_on(name: str, static: bool) -> None:
    model, more = model_of(name), tokens(length=5, seed=7)
    ids = tokens(length=8)
    cache, expected = pair(name, model, static=static)
    for _ in range(2):
        actual = generate(model, cache, ids, max_new_tokens=6).sequences
        assert actual.tolist() == generate(model, expected, ids, max_new_tokens=6).sequences.tolist()
        ids = torch.cat([actual, more], 1)


@each_mode
def test_crop_and_reset(static: bool) -> None:
    model, ids = model_of("Llama"), tokens()
    cache, _ = pair("Llama", model, static=static)
    mask = torch.ones_like(ids)
    for _ in range(2):
        _, expected = pair("Llama", model, static=static)
        for one in (cache, expected):
            logits(model, one, ids[:, :14], mask[:, :14], (12, 2))
        logits(model, cache, tokens(length=5, seed=9), mask[:, :19], (5,))
        cache.crop(torch.tensor(-5))  # as some releases of Transformers do
        actual = logits(model, cache, ids[:, 14:], mask, (1, 5, 4))
        assert_close(actual, logits(model, expected, ids[:, 14:], mask, (1, 5, 4)))
        cache.reset()


# Compiled


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GptOss"])
def test_compile_of_the_forward_pass(name: str) -> None:
    """As a whole, without a copy in the graph of single tokens, and one graph for all lengths."""
    recorder = Recorder()
    model, ids = model_of(name), tokens()
    cache, expected = pair(name, model, static=True)
    forward = torch.compile(model.forward, fullgraph=True, backend=recorder.backend)
    mask = torch.ones_like(ids)
    actual = [logits(model, cache, ids[:, :12], mask[:, :12], (12,))]
    with torch.no_grad():
        actual += [forward(piece, **with_cache(cache)).logits for piece in ids[:, 12:].split(1, 1)]
    assert_close(torch.cat(actual, 1), logits(model, expected, ids, mask, (12, *[1] * 12)))
    windows = name != "Llama"  # they keep a number, which compiles once more
    assert len(recorder.graphs) == 1 + windows
    for graph in recorder.graphs:
        called = Counter(str(node.target) for node in graph.graph.nodes)
        assert sum(count for target, count in called.items() if "paged_attention" in target) == LAYERS
        assert not [target for target in called if "gather_and_dequant" in target]


@pytest.mark.usefixtures("fresh_compiler")
@full_and_sliding
def test_generate_compiles_by_itself(name: str) -> None:
    """By the criteria of a GPU: masks come from outside then, with the padding."""
    recorder = Recorder()
    model = copy.deepcopy(model_of(name))  # it keeps what `generate` compiled
    ids, mask = left_padded(tokens(length=11), 4, 0, 1)
    cache, expected = pair(name, model, static=True)
    actual = generate(model, cache, ids, mask, compile_config=recorder.config()).sequences.tolist()
    assert actual == generate(model_of(name), expected, ids, mask).sequences.tolist()
    assert recorder.graphs
    for graph in recorder.graphs:
        assert "paged_attention" in graph.code
        assert "gather_and_dequant" not in graph.code


# Steps that dequantize


def assert_dequantized(model: Any, cache: Any, expected: Any, ids: Tensor, mask: Tensor) -> None:
    with Operators() as operators:
        actual = logits(model, cache, ids, mask)
    assert operators.attentions == 0
    assert_same_bytes(actual, logits(model, expected, ids, mask))


@each_mode
@full_and_sliding
def test_masks_with_holes_are_honoured(name: str, static: bool) -> None:
    model, ids = model_of(name), tokens()
    cache, expected = pair(name, model, static=static)
    mask = torch.ones_like(ids)
    mask[1, 5] = mask[1, 6] = 0
    with Operators() as operators:
        actual = logits(model, cache, ids, mask, (12, *[1] * 12))
    assert_close(actual, logits(model, expected, ids, mask, (12, *[1] * 12)))
    # Holes at the beginning of a window are like padding on the left.
    assert operators.attentions == {"Llama": 0, "Mistral": LAYERS * 11}[name]


def test_a_mask_of_four_dimensions_is_honoured() -> None:
    model, ids = model_of("Llama"), tokens()
    cache, expected = pair("Llama", model)
    own = torch.rand(3, 1, 1, 21, generator=torch.Generator().manual_seed(4)) > 0.3
    answers = []
    for one in (cache, expected):
        logits(model, one, ids[:, :20], torch.ones(3, 20).long(), (20,))
        with torch.no_grad():
            answers.append(model(ids[:, 20:21], attention_mask=own, **with_cache(one)).logits)
    assert_same_bytes(*answers)


def test_direct_false() -> None:
    model = copy.deepcopy(model_of("Llama"))
    model.set_attn_implementation("sdpa")
    cache, expected = caches("Llama", "dynamic", config=model.config, direct=False)
    assert model.config._attn_implementation == "sdpa"
    assert_dequantized(model, cache, expected, *left_padded(tokens(), 5, 0, 2))


def test_devices_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "runs_on", lambda device: False)
    model = model_of("Llama")
    assert_dequantized(model, *pair("Llama", model), *left_padded(tokens(), 5, 0, 2))


def test_the_model_has_another_attention_function() -> None:
    model = copy.deepcopy(model_of("Llama"))
    cache, expected = pair("Llama", model)
    model.set_attn_implementation("eager")
    assert_dequantized(model, cache, expected, *left_padded(tokens(), 5, 0, 2))


def test_a_forward_pass_that_records_gradients() -> None:
    model, ids = model_of("Llama"), tokens()
    cache, expected = pair("Llama", model)
    with Operators() as operators:
        actual = [model(piece, **with_cache(cache)).logits for piece in ids.split(8, 1)]
    assert operators.attentions == 0
    assert_same_bytes(torch.cat(actual, 1), logits(model, expected, ids, torch.ones_like(ids), (8, 8, 8)))
    assert actual[-1].requires_grad


def test_queries_alone_that_record_gradients() -> None:
    """As with an adapter in the projection of queries: K and V record nothing in the first layer."""
    model = copy.deepcopy(model_of("Llama")).requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    cache, expected = pair("Llama", model)
    actual = [model(piece, **with_cache(cache)).logits for piece in tokens().split(8, 1)]
    ids = tokens()
    assert_same_bytes(torch.cat(actual, 1), logits(model, expected, ids, torch.ones_like(ids), (8, 8, 8)))
    actual[-1].sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


class Changing(Fp8Cache):
    """Stands in for a model that processes keys before attention, such as latent attention."""

    changes = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = super().update(*args, **kwargs)
        return (key * 1.0, value) if self.changes else (key, value)


def test_keys_that_a_model_changes_are_dequantized() -> None:
    model = model_of("Llama")
    _, expected = pair("Llama", model)
    cache = Changing(model.config, "dynamic", block_size=4)
    assert_dequantized(model, cache, expected, *left_padded(tokens(), 5, 0, 2))


def test_keys_that_a_model_changes_later() -> None:
    model, ids = model_of("Llama"), tokens()
    cache = Changing(model.config, "dynamic", block_size=4)
    cache.changes = False
    logits(model, cache, ids[:, :13], torch.ones(3, 13).long(), (12, 1))
    cache.changes = True
    logits(model, cache, ids[:, 13:14], torch.ones(3, 14).long(), (1,))
    with pytest.raises(RuntimeError) as error:
        logits(model, cache, ids[:, 14:15], torch.ones(3, 15).long(), (1,))
    assert str(error.value) == (
        'Fp8Cache: the keys and values of layer 0 must reach the attention function "fp8kv" as the cache '
        "returned them, but the model has changed or used them; give Fp8Cache direct=False"
    )


# The attention function without the cache


@pytest.mark.parametrize(("name", "usual"), [("Llama", "sdpa"), ("Mistral", "sdpa"), ("Llama4", "sdpa"),
                                             ("GptOss", "eager"), ("Gemma2", "eager")])  # fmt: skip
@each_mode
def test_other_caches_with_fp8kv(name: str, usual: str, static: bool) -> None:
    """Like "sdpa", or if that is not supported, like eager attention: the same bytes."""
    model = copy.deepcopy(model_of(name))
    ids, mask = left_padded(tokens(), 5, 0, 2)
    answers = []
    for function in (usual, "fp8kv"):
        model.set_attn_implementation(function)
        assert model.config._attn_implementation == function
        cache = StaticCache(model.config, 40) if static else DynamicCache(config=model.config)
        answers.append(logits(model, cache, ids, mask))
    assert_same_bytes(*answers)
    with torch.no_grad():
        answers = []
        for function in (usual, "fp8kv"):
            model.set_attn_implementation(function)
            answers.append(model(ids, use_cache=False).logits)
    assert_same_bytes(*answers)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("Llama", "sdpa", "fp8kv"), ("Llama", "eager", "eager"), ("GptOss", "eager", "fp8kv"),
     ("Gemma2", "eager", "fp8kv"), ("Gemma3", "eager", "eager")],
)  # fmt: skip
def test_when_the_cache_chooses_it(name: str, before: str, after: str) -> None:
    """If "fp8kv" can replace the attention function; eager attention is a choice if there is another."""
    model = copy.deepcopy(model_of(name))
    if before == "eager" and after == "fp8kv" and model._supports_sdpa:
        pytest.skip("with this Transformers, the model has a choice")
    model.set_attn_implementation(before)
    Fp8Cache(model.config, direct=False)
    assert model.config._attn_implementation == before
    Fp8Cache(model.config)
    assert model.config._attn_implementation == after


# Layers of a static cache go together


def test_a_layer_that_missed_a_step() -> None:
    cache = Fp8Cache(config_of("Llama"), max_cache_len=40)
    one = torch.zeros(1, 2, 1, 16)
    for _ in range(2):
        cache.update(one, one, 0)
    with pytest.raises(ValueError) as error:
        cache.update(one, one, 1)
    assert str(error.value) == (
        "Fp8Cache: all layers of a static cache must get the tokens of every step, but layer 1 has missed some"
    )
    assert int(cache.get_seq_length()) == 2
    cache.reset()
    cache.update(one, one, 1)
    assert (int(cache.get_seq_length(0)), int(cache.get_seq_length(1))) == (0, 1)
