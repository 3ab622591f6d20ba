"""Fp8Cache with INT8, scales for each channel and offsets: dequantized, read directly, and refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8kv
from cached_models import (
    LAYERS,
    STEPS,
    Expected,
    ExpectedStatic,
    Recorder,
    config_of,
    each_mode,
    generate,
    head_size_of,
    logits,
    model_of,
    offsets_of,
    scales_of,
    tokens,
)
from fp8kv import KVCacheScheme, KVScales
from fp8kv.transformers import Fp8Cache, Int8Cache
from helpers import assert_same_bytes

#: With full attention, with a window, with both; with norms of keys and heads of 24.
each_model = pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3", "Qwen3"])
#: Arguments beside the config, by a name.
KINDS = [
    "int8 per channel",
    "int8 per head",
    "int8 dynamic",
    "fp8 per channel",
    "offsets",
    "dynamic with offset",
    "mixed",
]
each_kind = pytest.mark.parametrize("kind", KINDS)


def with_offsets(scales: KVScales, config: Any) -> KVScales:
    k, v = offsets_of(config), offsets_of(config, seed=1)
    layers = {n: replace(layer, k_offset=k[n], v_offset=v[n]) for n, layer in scales.items()}
    return KVScales(layers, scales.scheme)


def of_int8(scales: KVScales) -> KVScales:
    """The scales of FP8 let INT8 saturate in some channels."""
    layers = {n: replace(layer, k=2 * layer.k, v=2 * layer.v, dtype="int8") for n, layer in scales.items()}
    return KVScales(layers, scales.scheme)


def made(kind: str, config: Any) -> dict[str, Any]:
    """Scales, dtype and offsets."""
    if kind == "int8 per channel":
        return {"scales": of_int8(scales_of("channel", config))}
    if kind == "int8 per head":
        return {"scales": of_int8(scales_of("head", config))}
    if kind == "int8 dynamic":
        return {"scales": "dynamic", "dtype": "int8"}
    if kind == "fp8 per channel":
        return {"scales": scales_of("channel", config)}
    if kind == "offsets":
        return {"scales": with_offsets(scales_of("head", config), config)}
    if kind == "dynamic with offset":
        return {"scales": "dynamic", "k_offset": offsets_of(config)}
    layers = {
        0: of_int8(scales_of("channel", config))[0],
        1: with_offsets(scales_of("head", config), config)[1],
    }
    return {"scales": KVScales(layers, KVCacheScheme("auto"))}


def caches(kind: str, config: Any, static: bool, direct: bool = False) -> tuple[Fp8Cache, Any]:
    """A cache, and the reference cache."""
    options = made(kind, config)
    fixed = {"max_cache_len": 40} if static else {}
    expected = (ExpectedStatic if static else Expected)(config=config, **fixed)
    dtype = torch.int8 if options.get("dtype") == "int8" else torch.float8_e4m3fn
    expected.rounds(options["scales"], dtype, (options.get("k_offset", {}), options.get("v_offset", {})))
    return Fp8Cache(config, **options, block_size=4, direct=direct, **fixed), expected


@each_mode
@each_kind
@each_model
def test_logits_are_those_of_what_the_reference_stores(name: str, kind: str, static: bool) -> None:
    model, ids = model_of(name), tokens()
    cache, expected = caches(kind, config_of(name), static)
    mask = torch.ones_like(ids)
    assert_same_bytes(logits(model, cache, ids, mask), logits(model, expected, ids, mask))


@each_mode
@each_kind
@each_model
def test_attention_reads_the_bytes(name: str, kind: str, static: bool) -> None:
    model, ids = model_of(name), tokens()
    cache, expected = caches(kind, model.config, static, direct=True)
    mask = torch.ones_like(ids)
    calls = []
    original = fp8kv.PagedKVCache.attend

    def attend(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8kv.PagedKVCache, "attend", attend)
        actual = logits(model, cache, ids, mask)
    exact = logits(model, expected, ids, mask)
    assert ((actual - exact).norm() / exact.norm()).item() < 1e-3
    assert len(calls) == LAYERS * (len(STEPS) - 1)  # all but the first, a prompt


@each_mode
def test_generate_with_beams(static: bool) -> None:
    """Blocks are copied, and a dynamic cache grows, with its scales and offsets."""
    model, ids = model_of("Llama"), tokens(2, 7)
    cache, expected = caches("mixed", config_of("Llama"), False)
    options = {"num_beams": 2}
    actual, wanted = generate(model, cache, ids, **options), generate(model, expected, ids, **options)
    assert actual.sequences.tolist() == wanted.sequences.tolist()
    assert cache.layers[0].storage.dtype == torch.int8
    assert cache.layers[1].storage.k_offset is not None


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("kind", ["mixed", "dynamic with offset"])
def test_generate_with_a_compiled_model(kind: str, name: str) -> None:
    """Formats and offsets are constants of a layer: there are as many graphs as with FP8 alone."""
    recorder = Recorder()
    original, ids = model_of(name), tokens(length=11)
    model = copy.deepcopy(original)  # it keeps what `generate` compiled
    cache, expected = caches(kind, config_of(name), static=True)
    actual = generate(model, cache, ids, compile_config=recorder.config())
    assert actual.sequences.tolist() == generate(original, expected, ids).sequences.tolist()
    assert len(recorder.graphs) == {"Llama": 1, "Mistral": 2}[name]


def test_each_layer_has_the_format_of_its_scales() -> None:
    config = config_of("Llama")
    cache, _ = caches("mixed", config, static=True)
    key = torch.ones(1, config.num_key_value_heads, 3, head_size_of(config))
    for index in range(LAYERS):
        cache.update(key, key, index)
    assert [layer.storage.kv_cache_dtype for layer in cache.layers] == ["int8", "fp8"]
    assert cache.clipped() is None


@pytest.mark.parametrize("dtype", ["int8", torch.int8])
def test_the_names_of_int8(dtype: Any) -> None:
    config = config_of("Llama")
    key = torch.full((1, config.num_key_value_heads, 3, head_size_of(config)), 500.0)
    for cache in (Fp8Cache(config, dtype=dtype), Int8Cache(config)):
        with pytest.warns(UserWarning, match=r"\(127 with the scale 1.0\)"):
            result, _ = cache.update(key, key, LAYERS - 1)
        assert result.unique().tolist() == [127.0]
        assert cache.layers[-1].storage.dtype == torch.int8
    assert isinstance(cache, Fp8Cache)
    assert Int8Cache(config, "dynamic", block_size=8).layers[0].block_size == 8


def test_a_calibrated_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    model = model_of("Llama")
    model.save_pretrained(tmp_path / "model")
    batches = [tokens(2, seed=seed) for seed in range(3)]
    scales = fp8kv.calibrate(model, batches, strategy="channel", dtype="int8", offset="mean")
    scales.save(tmp_path / "int8", source=tmp_path / "model")
    ids = tokens()
    mask = torch.ones_like(ids)
    results = [logits(model, Fp8Cache(config_of("Llama"), x), ids, mask) for x in (scales, tmp_path / "int8")]
    assert_same_bytes(*results)
    exact = model(ids).logits
    assert ((results[0] - exact).norm() / exact.norm()).item() < 0.05


def scales_with(index: int = 1, **changes: Any) -> KVScales:
    scales = scales_of("head", config_of("Llama"))
    return KVScales({**scales, index: replace(scales[index], **changes)}, scales.scheme)


ONES = torch.ones(2, 16)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"scales": scales_with(dtype="int8"), "dtype": "fp8"},
         'dtype must be None or "int8", as the scales of layer 1 were made for it, got "fp8"'),
        ({"scales": scales_with(), "dtype": "int8"},
         'dtype must be None or "fp8", as the scales of layer 0 were made for it, got "int8"'),
        ({"scales": scales_with(0, dtype="fp8_e5m2"), "dtype": "fp8"},
         'dtype must be None or "fp8_e5m2", as the scales of layer 0 were made for it, got "fp8"'),
        ({"scales": scales_with(k_offset=ONES), "k_offset": {0: ONES, 1: ONES}},
         "k_offset must be None, as scales have one, got both for layer 1"),
        ({"scales": "dynamic", "v_offset": {0: ONES}},
         "v_offset must be there for every layer, got none for layer 1"),
        ({"scales": "dynamic", "v_offset": ONES},
         "v_offset must be None or a mapping from layers to tensors, got Tensor"),
        ({"scales": "dynamic", "v_offset": {0: ONES, 1: ONES * float("nan")}},
         "v_offset of layer 1 must be finite in fp32, got nan for head 0, channel 0"),
        ({"scales": scales_with(k_offset=ONES * float("inf"))},
         "k_offset of layer 1 must be finite in fp32, got inf for head 0, channel 0"),
        ({"scales": scales_with(k=-ONES)},
         "scales of k in layer 1 must be finite and above 0 in fp32, got -1.0 for head 0, channel 0"),
    ],
    ids=["fp8 for int8", "int8 for fp8", "e4m3 for e5m2", "two offsets", "a layer less", "no mapping", "NaN",
         "infinite", "negative"],
)  # fmt: skip
def test_arguments_that_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Fp8Cache(config_of("Llama"), **arguments)
    assert str(error.value) == f"Fp8Cache: {sentence}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"scales": scales_with(k=torch.ones(2, 8))},
         "scales of k in layer 1 must have the shape [2, 16], as its keys have 2 heads of 16, got [2, 8]"),
        ({"scales": scales_with(v_offset=torch.ones(2, 8))},
         "v_offset in layer 1 must have the shape [2, 16], as its values have 2 heads of 16, got [2, 8]"),
        ({"scales": "dynamic", "k_offset": {0: ONES, 1: torch.ones(4, 16)}},
         "k_offset in layer 1 must have the shape [2, 16], as its keys have 2 heads of 16, got [4, 16]"),
    ],
    ids=["scales", "offset of scales", "offset"],
)  # fmt: skip
def test_shapes_that_do_not_fit_the_first_key(arguments: dict[str, Any], sentence: str) -> None:
    cache = Fp8Cache(config_of("Llama"), **arguments)
    with pytest.raises(ValueError) as error:
        cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 1)
    assert str(error.value) == f"Fp8Cache: {sentence}"


def test_fp8_scales_can_be_used_in_e5m2() -> None:
    cache = Fp8Cache(config_of("Llama"), scales_with(), dtype="fp8_e5m2")
    cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 1)
    assert cache.layers[1].storage.dtype == torch.float8_e5m2
