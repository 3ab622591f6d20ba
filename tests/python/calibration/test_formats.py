"""calibrate with other formats, scales per channel, offsets and headroom, and what "auto" chooses."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fp8kv
from fp8kv import KVScales, LayerScales, reference
from fp8kv.calibration import _formats
from helpers import assert_same_bytes

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LIMITS = {"fp8": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0}
HEADS, SIZE = 2, 16


def llama() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3))
    return model.eval()


def qwen(slow: float, fast: float = 0.0) -> Any:
    """With a bias in the projection of K, far above the spread of its channels.

    Args:
        slow: in the channels that RoPE hardly turns, so that their mean in the cache is far from zero.
        fast: in one channel that RoPE turns with every token: its magnitude stays, its mean goes.
    """
    torch.manual_seed(0)
    fields = {key: value for key, value in SIZES.items() if key != "head_dim"}
    model = Qwen2ForCausalLM(Qwen2Config(**fields, initializer_range=0.3, rope_theta=1e6)).eval()
    bias = torch.randn(HEADS, SIZE, generator=torch.Generator().manual_seed(1)).sign() * slow
    bias.view(HEADS, 2, SIZE // 2)[:, :, : SIZE // 4] = 0
    bias[:, 0] = fast
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.copy_(bias.flatten())
        layer.self_attn.q_proj.weight.data *= 0.1  # logits of a usual size
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [tokens(2, 20, seed=seed) for seed in range(5)]


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


@torch.no_grad()
def cached(model: Any, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer, ``[tokens, heads, head_size]``."""
    parts = []
    for ids in batches:
        cache = DynamicCache()
        model(ids, **with_cache(model, cache))
        parts.append([(x.keys, x.values) for x in cache.layers])
    rows = [
        [torch.cat([part[layer][n].transpose(1, 2).flatten(0, 1) for part in parts]) for n in range(2)]
        for layer in range(len(parts[0]))
    ]
    return [(k, v) for k, v in rows]


def offset_of(x: Tensor, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    return x.double().mean(0).float() if kind == "mean" else ((x.amax(0).double() + x.amin(0)) / 2).float()


def scale_of(x: Tensor, offset: Tensor | None, strategy: str, dtype: str, headroom: float = 1.0) -> Tensor:
    amax = (x if offset is None else x - offset).abs().amax(0)
    amax = {"tensor": amax.amax().view(1), "attn_head": amax.amax(1), "channel": amax}[strategy]
    return (amax * headroom / LIMITS[dtype]).clamp(min=1 / (LIMITS[dtype] * 512))


# Scales and offsets


@pytest.mark.parametrize("offset", ["none", "mean", "mid"])
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head", "channel"])
def test_scales_and_offsets_are_those_of_what_the_cache_receives(strategy: Any, dtype: str, offset: str) -> None:
    model = llama()
    scales = fp8kv.calibrate(model, BATCHES, strategy=strategy, dtype=dtype, offset=offset)
    assert scales.scheme.strategy == strategy
    for layer, states in enumerate(cached(model, BATCHES)):
        assert scales[layer].dtype == dtype
        for letter, x in zip("kv", states, strict=True):
            shift, expected = getattr(scales[layer], f"{letter}_offset"), offset_of(x, offset)
            assert (shift is None) == (expected is None)
            if shift is not None:
                torch.testing.assert_close(shift, expected, rtol=1e-6, atol=1e-7)
            assert_close_scales(getattr(scales[layer], letter), scale_of(x, shift, strategy, dtype))


def assert_close_scales(actual: Tensor, expected: Tensor) -> None:
    """The model may compute the last bits of keys otherwise, with another number of tokens at a time."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_headroom_widens_all_scales() -> None:
    arguments: dict[str, Any] = {"strategy": "attn_head", "query": True}
    model = llama()
    plain = fp8kv.calibrate(model, BATCHES, **arguments)
    wide = fp8kv.calibrate(model, BATCHES, headroom=2.0, **arguments)
    assert wide.is_plain
    assert wide.standard is not None
    for layer in plain:
        for name in "qkv":
            for found in (wide[layer], wide.standard[layer]):
                assert_same_bytes(getattr(found, name), 2 * getattr(plain[layer], name))


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        ({"strategy": "channel", "dtype": "int8", "offset": "mean"}, "attn_head"),
        ({"strategy": "tensor", "dtype": "int8"}, "attn_head"),
        ({"strategy": "tensor", "offset": "mid"}, "tensor"),
        ({"strategy": "channel"}, "attn_head"),
        ({"dtype": "auto"}, "attn_head"),
    ],
    ids=["int8 per channel", "int8 per tensor", "offset", "fp8 per channel", "auto"],
)
def test_other_engines_get_scales_of_k_and_v_themselves(arguments: dict[str, Any], strategy: Any) -> None:
    model = llama()
    found = fp8kv.calibrate(model, BATCHES, **arguments).standard
    expected = fp8kv.calibrate(model, BATCHES, strategy=strategy)
    assert found is not None
    for layer in expected:
        assert_same_bytes(found[layer].k, expected[layer].k)
        assert_same_bytes(found[layer].v, expected[layer].v)


def test_elements_that_are_not_finite_are_left_out() -> None:
    model = llama()
    model.model.layers[1].self_attn.v_proj.weight.data[3] = float("inf")
    with pytest.warns(UserWarning, match="of v in layer 1$"):
        scales = fp8kv.calibrate(model, BATCHES, strategy="channel", dtype="int8", offset="mid")
    assert scales[1].v[0, 3].item() == torch.tensor(1 / (127 * 512)).item()
    assert scales[1].v_offset[0, 3].item() == 0
    assert scales[1].v_offset.isfinite().all()


def test_padding_does_not_count() -> None:
    model = llama()
    ids, mask = BATCHES[0].clone(), torch.ones_like(BATCHES[0])
    ids[1, :7], mask[1, :7] = 5, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    scales = fp8kv.calibrate(model, [batch], strategy="channel", dtype="int8", offset="mean")
    alone = fp8kv.calibrate(model, [ids[0], ids[1, 7:]], strategy="channel", dtype="int8", offset="mean")
    for layer in scales:
        torch.testing.assert_close(scales[layer].k_offset, alone[layer].k_offset, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scales[layer].k, alone[layer].k, rtol=1e-4, atol=0)


# auto


class StoredCache(DynamicCache):
    """Gives back one layer as a cache stores it, by the reference."""

    def __init__(self, layer: int, scales: LayerScales) -> None:
        super().__init__()
        self.quantized, self.scales = layer, scales

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == self.quantized:
            own = self.scales
            key_states = self.stored(key_states, own.k, own.k_offset)
            value_states = self.stored(value_states, own.v, own.v_offset)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def stored(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        shift = torch.zeros(HEADS, 1, SIZE) if offset is None else offset.unsqueeze(1)
        scale = scale.view(1, -1, 1, scale.shape[1] if scale.dim() == 2 else 1)
        dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[self.scales.dtype]
        q, _ = reference.quantize(x - shift, scale, dtype=dtype)
        return reference.dequantize(q, scale, dtype=torch.float32) + shift


@torch.no_grad()
def attention_output(model: Any, ids: Tensor, cache: Any, layer: int) -> Tensor:
    """What goes into o_proj."""
    found = []
    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0])
    )
    model(ids, **with_cache(model, cache))
    handle.remove()
    return found[0].double()


def error_of(model: Any, layer: int, scales: LayerScales, batches: list[Tensor]) -> float:
    squares = torch.zeros(2, dtype=torch.float64)
    for ids in batches:
        exact = attention_output(model, ids, DynamicCache(), layer)
        other = attention_output(model, ids, StoredCache(layer, scales), layer)
        squares += torch.stack([(other - exact).square().sum(), exact.square().sum()])
    return (squares[0] / squares[1]).sqrt().item()


def by_hand(model: Any, choice: Any, batches: list[Tensor]) -> dict[int, LayerScales]:
    dtype, strategy, *kinds = choice
    layers = {}
    for layer, states in enumerate(cached(model, batches)):
        offsets = [offset_of(x, kind) for x, kind in zip(states, kinds, strict=True)]
        k, v = (scale_of(x, o, strategy, dtype) for x, o in zip(states, offsets, strict=True))
        layers[layer] = LayerScales(None, k, v, *offsets, dtype=dtype)
    return layers


#: Format, strategy, offsets of K and V.
CHOICES = [
    (dtype, strategy, k, v)
    for dtype, strategy in (("fp8", "attn_head"), ("int8", "channel"))
    for k, v in (("none", "none"), ("mean", "none"), ("mean", "mean"), ("mid", "none"), ("mid", "mid"))
]


@pytest.mark.parametrize("generator", [False, True], ids=["list", "generator"])
def test_auto_takes_the_least_error_on_tokens_that_are_held_out(generator: bool) -> None:
    """Batches 0 and 4 of equal size are held out; the final scales are those of all."""
    model = llama()
    batches: Any = iter(BATCHES) if generator else BATCHES
    scales = fp8kv.calibrate(model, batches, dtype="auto")
    assert scales.scheme.strategy == "auto"
    held, kept = [BATCHES[0], BATCHES[4]], BATCHES[1:4]
    candidates = {choice: by_hand(model, choice, kept) for choice in CHOICES}
    for layer in scales:
        errors = {choice: error_of(model, layer, x[layer], held) for choice, x in candidates.items()}
        best = min(errors, key=errors.__getitem__)
        assert scales.errors[layer] == pytest.approx(errors[best], rel=1e-3)
        expected, found = by_hand(model, best, BATCHES)[layer], scales[layer]
        assert found.dtype == expected.dtype
        assert_close_scales(found.k, expected.k)
        assert_close_scales(found.v, expected.v)
        assert (found.k_offset is None, found.v_offset is None) == (best[2] == "none", best[3] == "none")


def test_auto_compares_what_is_there_if_there_is_one_batch() -> None:
    model = llama()
    scales = fp8kv.calibrate(model, BATCHES[:1], dtype="auto")
    for layer in scales:
        errors = [error_of(model, layer, by_hand(model, x, BATCHES[:1])[layer], BATCHES[:1]) for x in CHOICES]
        assert scales.errors[layer] == pytest.approx(min(errors), rel=1e-3)


def test_auto_with_a_strategy_chooses_format_and_offsets() -> None:
    scales = fp8kv.calibrate(llama(), BATCHES, strategy="attn_head", dtype="auto")
    assert {layer.k.shape for layer in scales.values()} == {(HEADS,)}
    assert scales.scheme.strategy == "auto"


def test_padding_does_not_count_for_the_choice() -> None:
    model = llama()
    ids, mask = BATCHES[0].clone(), torch.ones_like(BATCHES[0])
    ids[1, :9], mask[1, :9] = 5, 0
    padded = fp8kv.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], dtype="auto")
    ids[1, :9] = 60
    other = fp8kv.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], dtype="auto")
    assert padded.errors == other.errors


def test_the_summary_and_the_files_have_the_choice_and_its_error(tmp_path: Any) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "model")
    scales = fp8kv.calibrate(model, BATCHES, dtype="auto")
    lines = [line for line in scales.summary().split("\n") if line.startswith("layer")]
    assert len(lines) in (1, 2)
    assert all("error 0.0" in line for line in lines)
    scales.save(tmp_path / "saved", source=tmp_path / "model")
    loaded = fp8kv.load_kv_scales(tmp_path / "saved")
    assert loaded.errors == scales.errors
    assert loaded.summary().split("\n")[2] == scales.summary().split("\n")[2]


# Models with a large bias in K


def mean_errors(model: Any, kinds: dict[str, KVScales | dict[int, LayerScales]]) -> dict[str, float]:
    """Of the attention output, relative, mean over the layers, on another text."""
    text = [tokens(2, 40, seed=9)]
    return {name: sum(error_of(model, layer, x[layer], text) for layer in range(2)) / 2 for name, x in kinds.items()}


def errors_of_formats(model: Any) -> dict[str, float]:
    """Scales are found on one text, errors on another."""
    text = [tokens(4, 60, seed=seed) for seed in range(4)]
    one = LayerScales(None, torch.ones(1), torch.ones(1))
    arguments: dict[str, dict[str, Any]] = {
        "per head": {"strategy": "attn_head"},
        "per head, offset": {"strategy": "attn_head", "offset": "mean"},
        "int8": {"strategy": "channel", "dtype": "int8"},
        "int8, offset": {"strategy": "channel", "dtype": "int8", "offset": "mid"},
        "auto": {"dtype": "auto"},
    }
    found = {name: fp8kv.calibrate(model, text, **arguments[name]) for name in arguments}
    return mean_errors(model, {"1.0": {0: one, 1: one}} | found)


def test_the_order_of_formats_with_a_mean_far_from_zero() -> None:
    """The error of FP8 is relative to the key, mean and all; the step of INT8 is that of the range of a
    channel, which contains 0. With an offset, both are those of the spread alone."""
    errors = errors_of_formats(qwen(slow=300.0))
    assert errors["1.0"] > 1.5 * errors["int8"], errors
    order = ["per head", "int8", "per head, offset", "int8, offset"]
    for worse, better in itertools.pairwise(order):
        assert errors[worse] > 1.5 * errors[better], errors
    assert errors["auto"] < 1.1 * errors["int8, offset"], errors


def test_the_order_of_formats_with_keys_beyond_448() -> None:
    """The scale 1.0 clips them; an offset doesn't help where there is no mean; INT8 has the smaller steps."""
    errors = errors_of_formats(qwen(slow=0.0, fast=900.0))
    assert errors["1.0"] > 1.5 * errors["per head"], errors
    assert 0.7 < errors["per head, offset"] / errors["per head"] < 1.3, errors
    assert errors["per head"] > 3 * errors["int8"], errors
    assert errors["auto"] < 1.1 * min(errors.values()), errors


def test_the_order_of_formats_without_a_bias() -> None:
    errors = errors_of_formats(qwen(slow=0.0))
    assert 0.7 < errors["per head, offset"] / errors["per head"] < 1.3, errors
    assert errors["int8"] < 0.7 * errors["per head"], errors
    assert errors["auto"] < 1.1 * min(errors.values()), errors


# Bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"strategy": None}, 'strategy must be given unless dtype is "auto", got None'),
        ({"strategy": "auto"}, 'strategy must be "tensor", "attn_head" or "channel", got \'auto\''),
        ({"dtype": "int4"},
         'dtype must be "fp8", "fp8_e4m3", "fp8_e5m2", "int8" or "auto", got \'int4\''),
        ({"offset": "median"}, 'offset must be "none", "mean" or "mid", got \'median\''),
        ({"dtype": "auto", "offset": "mean"},
         'offset must be "none" with dtype "auto", which chooses it, got \'mean\''),
        ({"headroom": 0.0}, "headroom must be finite and above 0, got 0.0"),
        ({"headroom": float("nan")}, "headroom must be finite and above 0, got nan"),
        *(
            ({"observer": observer} | other,
             'observer must be "static_minmax" with scales per channel, other formats than "fp8", offsets or '
             f"headroom, got '{observer}'")
            for observer, other in (("mse", {"strategy": "channel"}), ("percentile", {"dtype": "int8"}),
                                    ("mse", {"offset": "mid"}), ("percentile", {"headroom": 1.5}),
                                    ("mse", {"dtype": "auto"}))
        ),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_do_not_fit(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        fp8kv.calibrate(llama(), BATCHES, **{"strategy": "attn_head"} | arguments)
    assert str(error.value) == f"calibrate: {sentence}"


def test_fp8_has_two_names() -> None:
    model = llama()
    scales = fp8kv.calibrate(model, BATCHES, strategy="attn_head", dtype="fp8_e4m3", observer="mse")
    expected = fp8kv.calibrate(model, BATCHES, strategy="attn_head", observer="mse")
    assert_same_bytes(scales[0].k, expected[0].k)
    assert _formats.Wanted("tensor", "fp8_e4m3", "none", 1.0).is_plain


def test_auto_without_the_attention_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    class Own:
        def get_interface(self, *args: Any) -> Any:
            return modeling_llama.eager_attention_forward

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Own())
    with pytest.raises(RuntimeError) as error:
        fp8kv.calibrate(llama(), BATCHES, dtype="auto")
    assert str(error.value) == (
        "calibrate: LlamaForCausalLM must take its attention function from transformers' AttentionInterface "
        'with dtype="auto", but not all layers do'
    )


def test_auto_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    fp8kv.calibrate(model, BATCHES, dtype="auto")
    assert all(module.training for module in model.modules() if isinstance(module, nn.Module))


def test_a_failing_generator_is_raised() -> None:
    def failing() -> Iterator[Tensor]:
        yield BATCHES[0]
        raise OSError("no more text")

    with pytest.raises(OSError, match="no more text"):
        fp8kv.calibrate(llama(), failing(), dtype="auto")
