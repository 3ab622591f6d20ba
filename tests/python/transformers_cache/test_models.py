"""`Fp8Cache` with models with different kinds of layers: recurrent states, shared keys, 16-bit layers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_same_bytes

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

from cached_models import (  # noqa: E402
    E4M3,
    FIELDS,
    Expected,
    ExpectedStatic,
    config_of,
    each_mode,
    generate,
    left_padded,
    logits,
    model_of,
    there_and_back,
    tokens,
)
from fp8kv import KVCacheScheme, KVScales, LayerScales  # noqa: E402
from fp8kv.kv_cache.clipping import Clipped  # noqa: E402
from fp8kv.transformers import Fp8Cache  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
           "linear_value_head_dim": 16}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 9}
#: Models whose layers have attention or a recurrent state, or both.
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_experts": 2,
                   "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 32, **_LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 96},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **_MAMBA, "num_local_experts": 0,
                         "shared_intermediate_size": 64},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba"], "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "ssm_state_size": 16, "n_routed_experts": 2,
                   "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "moe_shared_expert_intermediate_size": 32, "n_groups": 1, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
                  "mamba_n_groups": 1},
}  # fmt: skip
#: Models whose last layers reuse the keys and values of earlier ones.
SHARING: dict[str, dict[str, Any]] = {
    "gemma4_text": {**_WINDOWS, "global_head_dim": 32, "num_kv_shared_layers": 2,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
    "gemma3n_text": {**_WINDOWS, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
                     "vocab_size_per_layer_input": 97, "laurel_rank": 8, "altup_num_inputs": 2,
                     "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4},
}  # fmt: skip
#: A model whose layers have 2 heads of 16 elements and 1 head of 32.
TWO_GEOMETRIES = {**_WINDOWS, "global_head_dim": 32, "num_global_key_value_heads": 1,
                  "attention_k_eq_v": True, "num_kv_shared_layers": 0,
                  "hidden_size_per_layer_input": 0}  # fmt: skip

_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
#: Models whose keys and values have heads of two sizes: by latent attention, or by their config.
TWO_HEAD_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_EXPERTS, "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 4,
                    "n_shared_experts": 1},
    "mimo_v2_flash": {**_EXPERTS, "head_dim": 24, "v_head_dim": 16, "sliding_window": 9,
                      "layer_types": ["full_attention", "sliding_attention"] * 2, "mlp_layer_types": ["dense"] * 4},
}  # fmt: skip
#: Heads, elements of K and of V in the layers of these; in windows MiMo has twice as many heads.
GEOMETRIES = {"deepseek_v3": [(1, 16, 8)] * 4, "mimo_v2_flash": [(2, 24, 16), (4, 24, 16)] * 2}


@functools.cache
def model_with(kind: str) -> Any:
    fields = (HYBRIDS | SHARING | TWO_HEAD_SIZES | {"gemma4": TWO_GEOMETRIES})[kind]
    sizes = {"num_hidden_layers": 4, "head_dim": 16}
    try:
        config = AutoConfig.for_model("gemma4_text" if kind == "gemma4" else kind, **FIELDS | sizes | fields)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:  # they are not initialized
            torch.nn.init.normal_(parameter)
    return model


def assert_logits_close(model: Any, static: bool, steps: tuple[int, ...], **options: Any) -> Fp8Cache:
    """Compares a cache, read directly or not, with a Transformers cache of reference values, but for padding."""
    fixed = {"max_cache_len": 40} if static else {}
    ids, mask = left_padded(tokens(), 5, 0, 2)
    expected_cache = (ExpectedStatic if static else Expected)(config=model.config, **fixed).rounds("dynamic")
    expected = logits(model, expected_cache, ids, mask, steps)
    for direct in (False, True):
        cache = Fp8Cache(model.config, "dynamic", direct=direct, **fixed, **options)
        actual = logits(model, cache, ids, mask, steps)
        difference = (actual - expected)[mask.bool()].norm() / expected[mask.bool()].norm()
        assert difference.item() < (1e-3 if direct else 1e-6)
    return cache


def random_scales(heads: int) -> LayerScales:
    return LayerScales(None, *torch.rand(2, heads).add(0.01))


# Recurrent states


@each_mode
@pytest.mark.parametrize("kind", HYBRIDS)
def test_logits_of_hybrid_models(kind: str, static: bool) -> None:
    """Recurrent states are Transformers' own; all others are FP8."""
    cache = assert_logits_close(model_with(kind), static, (12, *[1] * 12))
    attention = [layer for layer in cache.layers if hasattr(layer, "storage")]
    assert attention
    assert {layer.storage.dtype for layer in attention} == {E4M3}
    assert cache.nbytes < cache.nbytes_16bit


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_of_hybrid_models(kind: str, beams: int) -> None:
    model, ids = model_with(kind), tokens(2, 11)
    cache = Fp8Cache(model.config, "dynamic")
    expected = Expected(config=model.config).rounds("dynamic")
    actual = generate(model, cache, ids, num_beams=beams).sequences.tolist()
    assert actual == generate(model, expected, ids, num_beams=beams).sequences.tolist()


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1"])
@each_mode
def test_hybrid_caches_are_reset(kind: str, static: bool) -> None:
    model, ids = model_with(kind), tokens()
    cache = Fp8Cache(model.config, "dynamic", **({"max_cache_len": 40} if static else {}))
    mask = torch.ones_like(ids)
    first = logits(model, cache, ids, mask, (24,))
    cache.reset()
    assert_same_bytes(logits(model, cache, ids, mask, (24,)), first)


# Shared keys and values, layers of several sizes


@each_mode
@pytest.mark.parametrize("kind", SHARING)
def test_logits_of_models_that_share_keys(kind: str, static: bool) -> None:
    cache = assert_logits_close(model_with(kind), static, (7, 5, 1, 1, 1, 4, 1, 1, 3))
    assert sum(hasattr(layer, "storage") for layer in cache.layers) == 2


@each_mode
def test_logits_of_layers_of_two_geometries(static: bool) -> None:
    if model_with("gemma4").config.per_layer_config[1].head_dim != 32:
        pytest.skip("an older Transformers")
    cache = assert_logits_close(model_with("gemma4"), static, (7, 5, 1, 1, 1, 4, 1, 1, 3))
    sizes = [(layer.storage.num_kv_heads, layer.storage.head_size) for layer in cache.layers]
    assert sizes == [(2, 16), (1, 32)] * 2


def test_layers_of_two_geometries_are_allocated() -> None:
    config = model_with("gemma4").config
    cache = Fp8Cache(config, max_cache_len=32, max_batch_size=3, device="cpu")
    window = 2 * 3 * 32 * 2 * 16  # K and V, sequences, tokens, heads, elements; a ring of two blocks
    assert cache.nbytes == 2 * (window + 2 * 3 * 32 * 1 * 32)


def test_scales_of_layers_of_two_geometries() -> None:
    model, ids = model_with("gemma4"), tokens()
    scales = KVScales({i: random_scales((2, 1)[i % 2]) for i in range(4)}, KVCacheScheme("attn_head"))
    mask = torch.ones_like(ids)
    expected = logits(model, Expected(config=model.config).rounds(scales), ids, mask)
    actual = logits(model, Fp8Cache(model.config, scales, direct=False), ids, mask)
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-6


# Keys and values with heads of two sizes


each_two_head_sizes = pytest.mark.parametrize("kind", TWO_HEAD_SIZES)


@each_mode
@each_two_head_sizes
def test_logits_of_two_head_sizes(kind: str, static: bool) -> None:
    model = model_with(kind)
    cache = assert_logits_close(model, static, (7, 5, 1, 1, 1, 4, 1, 1, 3), block_size=4)
    storages = [layer.storage for layer in cache.layers]
    assert [(x.num_kv_heads, x.head_size, x.v_head_size) for x in storages] == GEOMETRIES[kind]
    ids, mask = left_padded(tokens(), 5, 0, 2)
    sixteen_bits = logits(model, DynamicCache(config=model.config), ids, mask)
    actual = logits(model, Fp8Cache(model.config, "dynamic"), ids, mask)
    assert ((actual - sixteen_bits).norm() / sixteen_bits.norm()).item() < 0.1


@each_mode
@each_two_head_sizes
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_given_scales_of_two_head_sizes(kind: str, static: bool, strategy: Any) -> None:
    model, ids = model_with(kind), tokens()
    generator = torch.Generator().manual_seed(4)

    def some(heads: int, *sizes: int) -> LayerScales:
        shapes = [(1,) if strategy == "tensor" else (heads, size) for size in sizes]
        return LayerScales(None, *(torch.rand(shape, generator=generator).add(0.1) * 2**-6 for shape in shapes))

    scales = KVScales({i: some(*sizes) for i, sizes in enumerate(GEOMETRIES[kind])}, KVCacheScheme(strategy))
    fixed = {"max_cache_len": 40} if static else {}
    mask = torch.ones_like(ids)
    rounds = (ExpectedStatic if static else Expected)(config=model.config, **fixed).rounds(scales)
    expected = logits(model, rounds, ids, mask)
    assert_same_bytes(logits(model, Fp8Cache(model.config, scales, direct=False, **fixed), ids, mask), expected)
    direct = logits(model, Fp8Cache(model.config, scales, **fixed), ids, mask)
    assert ((direct - expected).norm() / expected.norm()).item() < 2e-3


@each_two_head_sizes
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_two_head_sizes(kind: str, beams: int) -> None:
    model, ids = model_with(kind), tokens(2, 11)
    cache = Fp8Cache(model.config, "dynamic", block_size=4)
    expected = Expected(config=model.config).rounds("dynamic")
    actual = generate(model, cache, ids, num_beams=beams).sequences.tolist()
    assert actual == generate(model, expected, ids, num_beams=beams).sequences.tolist()


def test_caches_of_two_head_sizes_are_allocated() -> None:
    """What is allocated before the first key fits it; and the bytes are those of the two sizes."""
    model = model_with("deepseek_v3")
    cache = Fp8Cache(model.config, max_cache_len=32, max_batch_size=3, device="cpu")
    pointers = [layer.storage.storage.data_ptr() for layer in cache.layers]
    logits(model, cache, tokens(), torch.ones(3, 24, dtype=torch.int64), (24,))
    assert [layer.storage.storage.data_ptr() for layer in cache.layers] == pointers
    assert cache.layers[0].nbytes == 3 * 32 * 1 * (16 + 8)
    assert cache.layers[0].nbytes_16bit == 2 * cache.layers[0].nbytes


# Layers in 16 bits


@each_mode
@pytest.mark.parametrize(
    ("skip", "rounded"),
    [([0], (1,)), (["sliding_attention"], (1,)), ([1], (0,)), ("full_attention", (0,))],
    ids=["first", "windows", "second", "full"],
)
def test_layers_that_are_skipped(static: bool, skip: Any, rounded: tuple[int, ...]) -> None:
    """They are Transformers' own layers; scales of the other layers are sufficient."""
    model, ids = model_of("Gemma3"), tokens()
    scales = KVScales({index: random_scales(2) for index in rounded}, KVCacheScheme("attn_head"))
    fixed = {"max_cache_len": 40} if static else {}
    usual = StaticCache if static else DynamicCache
    kinds = [type(layer) for layer in usual(config=model.config, **fixed).layers]
    cache = Fp8Cache(model.config, scales, skip_layers=skip, **fixed)
    for index, layer in enumerate(cache.layers):
        assert (type(layer) is kinds[index]) == (index not in rounded)
    mask = torch.ones_like(ids)
    actual = logits(model, cache, ids, mask)

    expected = usual(config=model.config, **fixed)
    update = expected.update

    def rounding(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer in rounded:
            key = there_and_back(key, scales[layer].k, E4M3)
            value = there_and_back(value, scales[layer].v, E4M3)
        return update(key, value, layer, *args, **kwargs)

    expected.update = rounding
    wanted = logits(model, expected, ids, mask)
    assert ((actual - wanted).norm() / wanted.norm()).item() < 1e-3
    own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    assert cache.nbytes == own + cache.layers[rounded[0]].storage.nbytes


@pytest.mark.parametrize(
    ("skip", "sentence"),
    [
        ([2],
         'skip_layers must have numbers from 0 to 1 or the types "full_attention", "sliding_attention", '
         "got 2"),
        (["window"],
         'skip_layers must have numbers from 0 to 1 or the types "full_attention", "sliding_attention", '
         "got 'window'"),
        ([0, 1],
         "config must be of a model with keys and values to store in FP8, got Gemma3TextConfig without such "
         "layers, or skip_layers with all of them"),
    ],
    ids=["number", "type", "all"],
)  # fmt: skip
def test_skipped_layers_that_are_refused(skip: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Fp8Cache(config_of("Gemma3"), skip_layers=skip)
    assert str(error.value) == f"Fp8Cache: {sentence}"


# Clipping


def large_keys(scale: float) -> tuple[Tensor, Tensor]:
    """Three of K and one of V are beyond 448."""
    key, value = torch.ones(2, 2, 2, 5, 16)
    key[0, 0, :3, 0] = scale
    value[1, 1, 4, 7] = -scale
    return key, value


@each_mode
def test_a_default_that_clips_says_so_once(static: bool) -> None:
    cache = Fp8Cache(config_of("Llama"), **({"max_cache_len": 400} if static else {"block_size": 1}))
    assert cache.clipped() == Clipped(0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in range(2):
            cache.update(*large_keys(448.0), layer)
    assert cache.clipped() == Clipped(0, 0)
    cache.update(*large_keys(449.0), 0)
    with pytest.warns(UserWarning, match="Fp8Cache: 6 elements of K and 2 of V were clipped"):
        cache.update(*large_keys(449.0), 1)  # the last layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):  # the dynamic cache grows
            for layer in range(2):
                cache.update(*large_keys(float("inf")), layer)
    assert cache.clipped() == Clipped(6 + 20 * 6, 2 + 20 * 2)


@pytest.mark.filterwarnings("error")
def test_given_scales_are_not_counted() -> None:
    ones = LayerScales(None, torch.ones(1), torch.ones(1))
    for scales in (KVScales({0: ones, 1: ones}, KVCacheScheme("tensor")), "dynamic"):
        cache = Fp8Cache(config_of("Llama"), scales)
        for layer in range(2):
            cache.update(*large_keys(1e4), layer)
        assert cache.clipped() is None
