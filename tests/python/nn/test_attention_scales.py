"""AttentionScales: loading, quantization, observation, freezing, and errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8kv import AttentionScales, KVCacheScheme, KVScales, LayerScales, PagedKVCache, reference
from fp8kv.nn import Observations, Observed, statistics
from helpers import (
    assert_same_bytes,
    each_fp8,
    each_real,
    each_strategy,
    empty_caches,
    key_and_value,
    placed,
    random_scales,
    values,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CPU = torch.device("cpu")
SIZE = 24
BUFFERS = [f"{side}_{kind}" for side in "qkv" for kind in ("scale", "amax", "clipped", "observed")]
#: Heads of Q, heads of K and V.
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1), "one head": (1, 1)}
each_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
#: Memory layouts of an engine's tensors.
PLACES = ["contiguous", "offset 1", "transposed", "columns", "rows", "steps", "inside"]
each_place = pytest.mark.parametrize("place", PLACES)


def make(
    heads: tuple[int, int] = (6, 2), strategy: str = "attn_head", device: torch.device = CPU, **kwargs: Any
) -> AttentionScales:
    """With scales that differ per head, and are not powers of two."""
    module = AttentionScales(*heads, SIZE, strategy=strategy, device=device, **kwargs)
    for seed, scale in enumerate((module.q_scale, module.k_scale, module.v_scale), 5):
        scale.copy_(random_scales(scale.shape, seed))
    return module


def snapshot(module: AttentionScales) -> dict[str, Tensor]:
    return {name: getattr(module, name).clone() for name in BUFFERS}


def addresses(module: AttentionScales) -> list[int]:
    return [getattr(module, name).data_ptr() for name in BUFFERS]


def assert_unchanged(module: AttentionScales, before: dict[str, Tensor]) -> None:
    for name, buffer in before.items():
        assert_same_bytes(getattr(module, name), buffer)


def of_heads(scale: Tensor, num_heads: int) -> Tensor:
    """[num_heads, 1]: each scale for all heads that share it."""
    scale = scale.cpu()
    return scale.repeat_interleave(num_heads // len(scale)).view(-1, 1)


def fused(
    tokens: int, heads: tuple[int, int], real: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one QKV tensor."""
    num_heads, num_kv_heads = heads
    qkv = values((tokens, (num_heads + 2 * num_kv_heads) * SIZE), real, seed).to(device)
    query, key, value = qkv.split([num_heads * SIZE, num_kv_heads * SIZE, num_kv_heads * SIZE], dim=-1)
    return (
        query.view(tokens, num_heads, SIZE),
        key.view(tokens, num_kv_heads, SIZE),
        value.view(tokens, num_kv_heads, SIZE),
    )


# The module


def test_the_buffers_at_first(device: torch.device) -> None:
    module = AttentionScales(8, 2, 64, strategy="attn_head", device=device)
    for side in "qkv":
        scale = getattr(module, f"{side}_scale")
        assert (scale.dtype, scale.device.type, scale.tolist()) == (torch.float32, device.type, [1.0, 1.0])
    assert AttentionScales(8, 2, 64).q_scale.tolist() == [1.0]
    assert list(module.state_dict()) == ["q_scale", "k_scale", "v_scale"]
    assert not list(module.parameters())


def test_the_default_device_and_dtype(device: torch.device) -> None:
    torch.set_default_dtype(torch.float16)
    try:
        with device:
            module = AttentionScales(8, 2, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {getattr(module, name).device.type for name in BUFFERS} == {device.type}
    assert module.k_scale.dtype == module.k_amax.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_kv_heads": -2}, "num_kv_heads must be at least 1, got -2"),
        ({"head_size": 0}, "head_size must be at least 1, got 0"),
        ({"first_kv_head": -1}, "first_kv_head must be at least 0, got -1"),
        ({"num_heads": "8"}, "num_heads must be an int, got str"),
        ({"head_size": None}, "head_size must be an int, got NoneType"),
        ({"first_kv_head": 0.0}, "first_kv_head must be an int, got float"),
        ({"num_heads": 7}, "num_heads must be a multiple of num_kv_heads=2, got 7"),
        ({"num_heads": 1}, "num_heads must be a multiple of num_kv_heads=2, got 1"),
        ({"strategy": "auto"}, 'strategy must be "tensor", "attn_head" or "channel", got \'auto\''),
        ({"dtype": torch.bfloat16}, "dtype must be float8_e4m3fn, float8_e5m2 or int8, got bfloat16"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^AttentionScales: {sentence}$"):
        AttentionScales(**({"num_heads": 8, "num_kv_heads": 2, "head_size": 64} | change))


def test_repr() -> None:
    assert repr(AttentionScales(8, 2, 64, strategy="attn_head", dtype=E5M2, calculate_kv_scales=True)) == (
        "AttentionScales(num_heads=8, num_kv_heads=2, head_size=64, strategy='attn_head', "
        "dtype=float8_e5m2, calculate_kv_scales=True)"
    )


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "to(cpu, float16)": lambda model: model.to("cpu", torch.float16),
    "type(float16)": lambda model: model.type(torch.float16),
    "float": lambda model: model.float(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_a_change_of_the_models_dtype_leaves_the_buffers(convert: Callable[[nn.Module], object]) -> None:
    module = make()
    module.observe(None, *key_and_value(3, 2, SIZE, torch.float32))
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "scales": module})
    before, places = snapshot(module), addresses(module)
    convert(model)
    assert_unchanged(module, before)
    assert addresses(module) == places


def test_a_change_of_the_models_dtype_reaches_its_other_modules() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "scales": make()}).half()
    assert model["linear"].weight.dtype == torch.float16


def test_moving_to_another_device_and_dtype_keeps_values(cuda: torch.device) -> None:
    module = make()
    before = snapshot(module)
    nn.ModuleDict({"scales": module}).to(cuda, torch.bfloat16)
    assert {getattr(module, name).device.type for name in BUFFERS} == {"cuda"}
    assert_unchanged(module, before)


def test_a_module_that_leaves_the_meta_device_has_values(device: torch.device) -> None:
    module = AttentionScales(8, 2, 64, strategy="attn_head", device="meta").to_empty(device=device)
    assert module.k_scale.device.type == device.type
    assert_unchanged(module, snapshot(AttentionScales(8, 2, 64, strategy="attn_head")))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent(duplicate: Callable[[AttentionScales], AttentionScales]) -> None:
    module = make()
    before = snapshot(module)
    other = duplicate(module)
    assert_unchanged(other, before)
    other.load_scales(LayerScales(q=None, k=torch.ones(2), v=torch.ones(2)))
    assert_unchanged(module, before)


# load_state_dict

#: Names of k_scale; the others follow by replacing the letter.
NAMES = {
    "own": "k_scale",
    "attn": "attn.k_scale",
    "self_attn": "self_attn.k_scale",
    "full": "model.layers.3.self_attn.k_scale",
    "full attn": "model.layers.3.self_attn.attn.k_scale",
    "without model": "layers.11.self_attn.k_scale",
    "multimodal": "language_model.model.layers.3.self_attn.k_scale",
    "ModelOpt": "model.layers.3.self_attn.k_proj.k_scale",
    "ModelOpt relative": "k_proj.k_scale",
    "fused": "model.layers.3.self_attn.qkv_proj.k_scale",
    "fused relative": "qkv_proj.k_scale",
    "fused twice": "model.layers.3.self_attn.qkqkv_proj.k_scale",
    "mixer": "backbone.layers.3.mixer.k_proj.k_scale",
    "Quark": "model.layers.3.self_attn.k_proj.output_scale",
    "Quark relative": "k_proj.output_scale",
    "cache": "model.layers.3.self_attn.k_cache.scale",
    "cache relative": "k_cache.scale",
}


def named(name: str, side: str) -> str:
    start, end = name.rsplit("k_", 1)
    return f"{start.replace('k_proj', f'{side}_proj')}{side}_{end}"


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_every_name(name: str) -> None:
    module = make()
    result = module.load_state_dict({named(name, "k"): torch.tensor([0.5, 0.25]), named(name, "v"): torch.tensor([3.0, 7.0])})
    assert (module.k_scale.tolist(), module.v_scale.tolist()) == ([0.5, 0.25], [3.0, 7.0])
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        "q_scale", "attn.q_scale", "model.layers.3.self_attn.q_scale", "q.scale", "q_proj.output_scale",
        "model.layers.3.self_attn.q.scale", "model.layers.3.self_attn.q_proj.output_scale",
    ],
)  # fmt: skip
def test_every_name_of_a_query_scale(name: str) -> None:
    module = make()
    module.load_state_dict({name: torch.tensor(0.5), "kv_scale": torch.tensor(2.0)})
    assert module.q_scale.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["kv_scale", "attn.kv_scale", "model.layers.3.self_attn.kv_scale", "qkv_proj.kv_scale"])
@each_strategy
def test_one_scale_for_keys_and_values(name: str, strategy: str) -> None:
    module = make(strategy=strategy)
    module.load_state_dict({name: torch.tensor(0.75)})
    assert set(module.k_scale.tolist() + module.v_scale.tolist()) == {0.75}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (2,), (2, 1, 1), (1, 2, 1)], ids=lambda shape: str(list(shape)))
def test_every_shape_and_dtype_of_scales_per_head(device: torch.device, shape: tuple[int, ...]) -> None:
    module = make(device=device)
    places = addresses(module)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        given = torch.tensor([0.1, 0.3][: math.prod(shape)], dtype=dtype).view(shape)
        module.load_state_dict({"k_scale": given, "v_scale": given.to(device) * 2})
        rounded = given.flatten().float().tolist()
        expected = rounded if len(rounded) == 2 else rounded * 2
        assert module.k_scale.tolist() == expected
        assert module.v_scale.tolist() == [2 * x for x in expected]
        assert addresses(module) == places


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=lambda shape: str(list(shape)))
def test_every_shape_of_a_scale_per_tensor(shape: tuple[int, ...]) -> None:
    module = make(strategy="tensor")
    given = torch.full(shape, 0.3, dtype=torch.bfloat16)
    module.load_state_dict({f"{side}_scale": given for side in "qkv"})
    assert [getattr(module, f"{side}_scale").tolist() for side in "qkv"] == [[0.30078125]] * 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1.0, 3.0, 2.0, 0.5, 0.25, 0.125], [3.0, 0.5]),
        ([4.0, 5.0], [4.0, 5.0]),
        ([6.0], [6.0, 6.0]),
    ],
    ids=["all heads", "KV heads", "one"],
)
def test_query_scales_become_those_of_kv_groups(given: list[float], expected: list[float]) -> None:
    module = make((6, 2))
    module.load_state_dict({"q_scale": torch.tensor(given).view(-1, 1, 1), "kv_scale": torch.tensor(1.0)})
    assert module.q_scale.tolist() == expected


def test_a_missing_query_scale_stays() -> None:
    module = make()
    before = module.q_scale.tolist()
    assert module.load_state_dict({"kv_scale": torch.tensor(1.0)}).missing_keys == []
    assert module.q_scale.tolist() == before


@pytest.mark.parametrize("side", "kv")
def test_a_missing_scale_of_keys_or_values_is_a_missing_key(side: str) -> None:
    module = nn.ModuleDict({"attn": make()})
    other = {"k": "v", "v": "k"}[side]
    state = {f"attn.{other}_scale": torch.tensor([0.5, 0.5])}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "attn.{side}_scale"'):
        module.load_state_dict(state)
    before = getattr(module["attn"], f"{side}_scale").tolist()
    assert module.load_state_dict(state, strict=False).missing_keys == [f"attn.{side}_scale"]
    assert getattr(module["attn"], f"{other}_scale").tolist() == [0.5, 0.5]
    assert getattr(module["attn"], f"{side}_scale").tolist() == before


@pytest.mark.parametrize(
    "name", ["k_proj.weight", "k_proj.weight_scale", "k_proj.input_scale", "prob_output_scale", "k_scales"]
)
def test_what_is_no_scale_is_an_unexpected_key(name: str) -> None:
    state = {"kv_scale": torch.tensor(1.0), name: torch.tensor(1.0)}
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{name}"'):
        make().load_state_dict(state)
    assert make().load_state_dict(state, strict=False).unexpected_keys == [name]


def test_zero_points_that_are_zero() -> None:
    module = make()
    points = {f"{side}_zero_point": torch.zeros(2, 1, 1).to(E4M3) for side in "qkv"}
    assert not module.load_state_dict({"kv_scale": torch.tensor(0.5), **points}).unexpected_keys
    assert module.k_scale.tolist() == [0.5, 0.5]


NEGATIVE_ZERO_POINT = torch.tensor([-0.0]).to(E4M3)


def test_a_negative_zero_is_a_zero_point() -> None:
    assert not make().load_state_dict({"kv_scale": torch.tensor(0.5), "k_zero_point": NEGATIVE_ZERO_POINT})[1]


FINITE = "must be finite and above 0 in fp32, got"
REFUSED: dict[str, tuple[str, Any, str]] = {
    "NaN": ("k_scale", torch.tensor([0.5, math.nan]), f"{FINITE} nan for head 1"),
    "inf": ("v_scale", torch.tensor(math.inf), f"{FINITE} inf"),
    "-inf": ("v_scale", torch.tensor([-math.inf, 1.0]), f"{FINITE} -inf for head 0"),
    "0": ("k_scale", torch.zeros(1), f"{FINITE} 0.0"),
    "-0": ("k_scale", torch.tensor([[-0.0]]), f"{FINITE} -0.0"),
    "negative": ("k_scale", torch.tensor(-1.5), f"{FINITE} -1.5"),
    "0 in fp32": ("k_scale", torch.tensor(1e-60, dtype=torch.float64), f"{FINITE} 0.0"),
    "inf in fp32": ("k_scale", torch.tensor(1e60, dtype=torch.float64), f"{FINITE} inf"),
    "one query head": (
        "q_scale", torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 1.0]), f"{FINITE} -1.0 for head 4",
    ),
    "uninitialized query scales": ("q_scale", torch.full((6, 1, 1), math.nan), f"{FINITE} nan for head 0"),
    "three heads": (
        "k_scale", torch.ones(3), "must have 1 or num_kv_heads=2 elements, those of this rank, got shape [3]",
    ),
    "query heads for keys": (
        "k_scale", torch.ones(6, 1, 1),
        "must have 1 or num_kv_heads=2 elements, those of this rank, got shape [6, 1, 1]",
    ),
    "four query heads": (
        "q_scale", torch.ones(4),
        "must have 1 or num_kv_heads=2 or num_heads=6 elements, those of this rank, got shape [4]",
    ),
    "none": (
        "k_scale", torch.ones(0), "must have 1 or num_kv_heads=2 elements, those of this rank, got shape [0]",
    ),
    "integers": ("k_scale", torch.tensor([1, 1]), "must be a floating-point tensor, got int64"),
    "number": ("k_scale", 0.5, "must be a floating-point tensor, got float"),
    "nothing": ("k_scale", None, "must be a floating-point tensor, got NoneType"),
    "meta": (
        "k_scale", torch.ones(2, device="meta"),
        "must be a floating-point tensor, got one on the meta device",
    ),
    "zero point": (
        "v_zero_point", torch.tensor([0.0, 2.0]).to(E4M3), "must be 0, as FP8 caches are symmetric, got 2",
    ),
    "zero point NaN": (
        "q_zero_point", torch.tensor([math.nan]), "must be 0, as FP8 caches are symmetric, got nan",
    ),
    "zero point of no tensor": ("k_zero_point", 0, "must be a tensor, got int"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "sentence"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("assign", [False, True], ids=["", "assign"])
def test_a_bad_tensor_is_refused_with_its_key_and_changes_nothing(name: str, bad: Any, sentence: str, assign: bool) -> None:
    module = make((6, 2))
    layer = "model.layers.3.self_attn"
    state = {f"{layer}.{side}_scale": torch.full((2,), 0.5) for side in "qkv"} | {f"{layer}.{name}": bad}
    before = snapshot(module)
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state, strict=False, assign=assign)
    assert f"AttentionScales: {layer}.{name} {sentence}" in str(error.value)
    assert_unchanged(module, before)


def test_many_scales_do_not_fit_a_module_per_tensor() -> None:
    with pytest.raises(RuntimeError) as error:
        make((6, 2), "tensor").load_state_dict({"k_scale": torch.ones(2), "v_scale": torch.ones(1)})
    assert 'AttentionScales: k_scale must have 1 element with strategy "tensor", got shape [2]' in str(error.value)


def test_every_bad_tensor_is_reported() -> None:
    with pytest.raises(RuntimeError) as error:
        make().load_state_dict({"k_scale": torch.tensor(-1.0), "v_scale": torch.tensor(math.nan)})
    assert "k_scale must be finite" in str(error.value)
    assert "v_scale must be finite" in str(error.value)


def test_a_bad_layer_does_not_keep_others_from_being_loaded() -> None:
    model = nn.ModuleList([make(), make()])
    before = snapshot(model[1])
    state = {"0.kv_scale": torch.tensor(0.5), "1.kv_scale": torch.tensor(-0.5)}
    with pytest.raises(RuntimeError, match=r"AttentionScales: 1\.kv_scale must be finite and above 0"):
        model.load_state_dict(state)
    assert model[0].k_scale.tolist() == [0.5, 0.5]
    assert_unchanged(model[1], before)


def test_scales_of_several_layers_are_refused() -> None:
    module = make()
    before = snapshot(module)
    state = {f"model.layers.{n}.self_attn.kv_scale": torch.tensor(1.0) for n in (10, 2)}
    with pytest.raises(RuntimeError, match="state_dict must hold the scales of one layer, got layers 2, 10"):
        module.load_state_dict(state)
    assert_unchanged(module, before)


def test_two_names_for_a_scale_may_agree() -> None:
    module = make()
    module.load_state_dict(
        {
            "kv_scale": torch.tensor(0.5),
            "k_scale": torch.tensor([0.5, 0.5]),
            "v_proj.v_scale": torch.tensor(0.5),
        }
    )
    assert module.v_scale.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("names", [("kv_scale", "v_scale"), ("v_cache.scale", "v_proj.output_scale")])
def test_two_names_for_a_scale_must_not_disagree(names: tuple[str, str]) -> None:
    module = make()
    before = snapshot(module)
    state = {"k_scale": torch.tensor(0.5), names[0]: torch.tensor(0.5), names[1]: torch.tensor(0.25)}
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state)
    assert (
        f"AttentionScales: {names[1]} must equal {names[0]}, as both are the v_scale of the layer, "
        "got [0.25, 0.25] and [0.5, 0.5]"
    ) in str(error.value)
    assert_unchanged(module, before)


@each_strategy
def test_a_state_dict_can_be_loaded_again(device: torch.device, strategy: str) -> None:
    module = make(strategy=strategy, device=device)
    other = AttentionScales(6, 2, SIZE, strategy=strategy, device=device)
    assert str(other.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    for name in ("q_scale", "k_scale", "v_scale"):
        assert_same_bytes(getattr(other, name), getattr(module, name))


def test_assigning_copies_in_place() -> None:
    module = make()
    places = addresses(module)
    given = torch.tensor([0.5, 0.25])
    module.load_state_dict({"k_scale": given, "v_scale": given}, assign=True)
    given.fill_(9.0)
    assert (module.k_scale.tolist(), module.v_scale.tolist()) == ([0.5, 0.25], [0.5, 0.25])
    assert addresses(module) == places


def test_a_module_on_the_meta_device_becomes_real_when_assigned(device: torch.device) -> None:
    model = nn.ModuleDict({"attn": AttentionScales(6, 2, SIZE, strategy="attn_head", device="meta")})
    model.load_state_dict({"attn.kv_scale": torch.tensor(0.5, device=device).bfloat16()}, assign=True)
    expected = AttentionScales(6, 2, SIZE, strategy="attn_head")
    expected.load_state_dict({"kv_scale": torch.tensor(0.5)})
    assert_unchanged(model["attn"], snapshot(expected))
    assert model["attn"].k_scale.device.type == device.type


def test_a_module_on_the_meta_device_is_refused_without_assigning() -> None:
    model = nn.ModuleDict({"attn": AttentionScales(6, 2, SIZE, device="meta")})
    with pytest.raises(RuntimeError, match=r"attn\.k_scale must be on a real device, got the meta device; pass"):
        model.load_state_dict({"attn.kv_scale": torch.tensor(0.5)})


def test_hooks_before_loading_run() -> None:
    module = make()

    def rename(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, *__: Any) -> None:
        state_dict[f"{prefix}kv_scale"] = state_dict.pop(f"{prefix}mine")

    module.register_load_state_dict_pre_hook(rename)
    module.load_state_dict({"mine": torch.tensor(0.5)})
    assert module.k_scale.tolist() == [0.5, 0.5]


# load_state_dict of a model


class Attention(nn.Module):
    """As engines build it: projections, and the attention layer with the scales."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(2, 2, bias=False)
        self.attn = make()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()


class Model(nn.Module):
    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def scales(self) -> list[AttentionScales]:
        return [layer.self_attn.attn for layer in self.model.layers]


def checkpoint_of(model: Model, k_name: str, v_name: str) -> dict[str, Tensor]:
    """All its tensors, with scales under other names: 0.5 and 0.25 in layer 0, 1.5 and 1.25 in layer 1..."""
    state = {name: x for name, x in model.state_dict().items() if "scale" not in name}
    for n in range(len(model.model.layers)):
        state[f"model.layers.{n}.self_attn.{k_name}"] = torch.tensor(n + 0.5).bfloat16()
        state[f"model.layers.{n}.self_attn.{v_name}"] = torch.tensor([n + 0.25]).bfloat16()
    return state


@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [
        ("attn.k_scale", "attn.v_scale"), ("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"), ("k_cache.scale", "v_cache.scale"),
        ("k_proj.output_scale", "v_proj.output_scale"), ("attn.k_scale", "v_proj.v_scale"),
    ],
    ids=str,
)  # fmt: skip
def test_names_at_the_level_of_the_parent(k_name: str, v_name: str) -> None:
    model = Model()
    AttentionScales.accept_foreign_names(model)
    model.load_state_dict(checkpoint_of(model, k_name, v_name))
    assert [scales.k_scale.tolist() for scales in model.scales()] == [[n + 0.5] * 2 for n in range(3)]
    assert [scales.v_scale.tolist() for scales in model.scales()] == [[n + 0.25] * 2 for n in range(3)]


def test_names_below_the_module_need_no_hook() -> None:
    model = Model()
    model.load_state_dict(checkpoint_of(model, "attn.k_proj.k_scale", "attn.v_scale"))
    assert model.scales()[2].k_scale.tolist() == [2.5, 2.5]


def test_names_at_the_level_of_the_parent_are_unexpected_without_the_hook() -> None:
    model = Model(1)
    handle = AttentionScales.accept_foreign_names(model)
    handle.remove()
    result = model.load_state_dict(checkpoint_of(model, "k_scale", "v_scale"), strict=False)
    assert result.unexpected_keys == [f"model.layers.0.self_attn.{side}_scale" for side in "kv"]


def test_the_hook_on_a_module_inside_the_model() -> None:
    model = Model()
    AttentionScales.accept_foreign_names(model.model)
    model.load_state_dict(checkpoint_of(model, "k_scale", "v_scale"))
    assert model.scales()[1].v_scale.tolist() == [1.25, 1.25]


def test_the_hook_for_a_state_dict_of_one_layer() -> None:
    attention = Attention()
    AttentionScales.accept_foreign_names(attention)
    attention.load_state_dict({"kv_scale": torch.tensor(0.5), "k_proj.weight": torch.zeros(2, 2)})
    assert attention.attn.v_scale.tolist() == [0.5, 0.5]


def test_the_scales_of_a_layer_that_the_model_lacks_stay_unexpected() -> None:
    model = Model(1)
    AttentionScales.accept_foreign_names(model)
    state = checkpoint_of(model, "k_scale", "v_scale")
    state["model.layers.1.self_attn.k_scale"] = torch.tensor(7.0)
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["model.layers.1.self_attn.k_scale"]
    assert model.scales()[0].k_scale.tolist() == [0.5, 0.5]


def test_a_name_that_could_mean_two_modules_stays_unexpected() -> None:
    model = Model(1)
    model.model.layers[0].self_attn.sparse = make()
    AttentionScales.accept_foreign_names(model)
    before = snapshot(model.scales()[0])
    state = checkpoint_of(model, "k_scale", "v_scale")
    assert len(model.load_state_dict(state, strict=False).unexpected_keys) == 2
    assert_unchanged(model.scales()[0], before)


def test_a_parents_name_beside_the_modules_own_stays_unexpected() -> None:
    model = Model(1)
    AttentionScales.accept_foreign_names(model)
    state = checkpoint_of(model, "attn.k_scale", "attn.v_scale")
    state["model.layers.0.self_attn.k_scale"] = torch.tensor(7.0)
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["model.layers.0.self_attn.k_scale"]
    assert model.scales()[0].k_scale.tolist() == [0.5, 0.5]


def test_an_error_names_the_layer_of_a_model() -> None:
    model = Model()
    AttentionScales.accept_foreign_names(model)
    state = checkpoint_of(model, "k_scale", "v_scale")
    state["model.layers.2.self_attn.q_scale"] = torch.tensor([1e-2, math.nan])
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.self_attn\.attn\.q_scale .* got nan for head 1"):
        model.load_state_dict(state)


def test_other_tensors_of_the_model_are_loaded_as_ever() -> None:
    model = Model()
    AttentionScales.accept_foreign_names(model)
    state = checkpoint_of(model, "k_scale", "v_scale")
    state["model.layers.1.self_attn.k_proj.weight"] = torch.full((2, 2), 7.0)
    model.load_state_dict(state)
    assert model.model.layers[1].self_attn.k_proj.weight.eq(7.0).all()


# load_scales


def test_the_scales_of_a_layer(device: torch.device) -> None:
    module = make(device=device)
    places = addresses(module)
    module.load_scales(LayerScales(torch.tensor([0.5, 1.5]), torch.tensor([2.5, 3.5]), torch.tensor([4.5])))
    assert module.q_scale.tolist() == [0.5, 1.5]
    assert module.k_scale.tolist() == [2.5, 3.5]
    assert module.v_scale.tolist() == [4.5, 4.5]
    assert addresses(module) == places


def test_scales_without_queries_leave_the_query_scale() -> None:
    module = make()
    before = module.q_scale.tolist()
    module.load_scales(LayerScales(None, torch.ones(2), torch.ones(2)))
    assert module.q_scale.tolist() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": None}, "scales.k must be a floating-point tensor, got NoneType"),
        ({"v": None}, "scales.v must be a floating-point tensor, got NoneType"),
        ({"v": torch.tensor([1.0, 0.0])}, "scales.v must be finite and above 0 in fp32, got 0.0 for head 1"),
        ({"q": torch.tensor([math.nan])}, "scales.q must be finite and above 0 in fp32, got nan"),
        ({"k": torch.ones(4)}, r"scales.k must have 1 or num_kv_heads=2 elements, .* got shape \[4\]"),
    ],
    ids=["k missing", "v missing", "zero", "NaN", "of other ranks"],
)
def test_scales_of_a_layer_that_are_refused(change: dict[str, Any], sentence: str) -> None:
    module = make()
    before = snapshot(module)
    scales = {"q": torch.ones(2), "k": torch.ones(2), "v": torch.ones(2)} | change
    with pytest.raises(ValueError, match=f"^AttentionScales.load_scales: {sentence}$"):
        module.load_scales(LayerScales(**scales))
    assert_unchanged(module, before)


@pytest.mark.parametrize("scales", [None, {"k": torch.ones(2)}, KVScales({}, KVCacheScheme("tensor"))], ids=type)
def test_what_is_no_scales_of_a_layer(scales: Any) -> None:
    with pytest.raises(ValueError) as error:
        make().load_scales(scales)
    assert str(error.value) == (
        "AttentionScales.load_scales: scales must be the LayerScales of one layer, such as "
        f"load_kv_scales(checkpoint)[0], got {type(scales).__name__}"
    )


def test_scales_are_not_loaded_onto_the_meta_device() -> None:
    module = AttentionScales(6, 2, SIZE, device="meta")
    with pytest.raises(ValueError, match="load_scales: the module must be on a real device, got the meta device"):
        module.load_scales(LayerScales(None, torch.ones(1), torch.ones(1)))


# quantize_query


def check_quantized_queries(
    device: torch.device, heads: tuple[int, int], strategy: str, fp8: torch.dtype, real: torch.dtype
) -> None:
    module = make(heads, strategy, device, dtype=fp8)
    query, _, _ = fused(13, heads, real, device)
    expected = reference.encode(query.cpu().float() / of_heads(module.q_scale, heads[0]), fp8).to(device)
    assert_same_bytes(module.quantize_query(query), expected)
    assert_same_bytes(module.quantize_query(query.flatten(1)), expected.flatten(1))


@each_heads
@each_strategy
def test_quantized_queries(device: torch.device, heads: tuple[int, int], strategy: str) -> None:
    check_quantized_queries(device, heads, strategy, E4M3, torch.bfloat16)


@each_fp8
@each_real
def test_quantized_queries_of_every_dtype(device: torch.device, fp8: torch.dtype, real: torch.dtype) -> None:
    check_quantized_queries(device, HEADS["GQA"], "attn_head", fp8, real)


@each_strategy
@each_place
def test_queries_and_results_anywhere_in_memory(device: torch.device, strategy: str, place: str) -> None:
    module = make((6, 2), strategy, device)
    query = values((7, 6, SIZE), torch.bfloat16)
    expected = reference.encode(query.float() / of_heads(module.q_scale, 6), E4M3)
    out = placed(torch.zeros(7, 6, SIZE).to(E4M3), place, device)
    assert module.quantize_query(placed(query, place, device), out) is out
    assert_same_bytes(out, expected.to(device))


@pytest.mark.parametrize("shape", [(0, 6, SIZE), (0, 6 * SIZE)], ids=str)
def test_no_queries(device: torch.device, shape: tuple[int, ...]) -> None:
    module = make(device=device, calculate_kv_scales=True)
    assert module.quantize_query(torch.empty(shape, device=device)).shape == shape


@pytest.mark.parametrize("shape", [(5, 2, SIZE), (5, 6, SIZE + 1), (5, 6 * SIZE + 1), (5,), (1, 5, 6, SIZE), ()], ids=str)
def test_queries_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        make((6, 2)).quantize_query(torch.ones(shape))
    assert str(error.value) == (
        f"AttentionScales.quantize_query: query must have the shape [num_tokens, 6, 24] or [num_tokens, 144], got {list(shape)}"
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "came"),
    [
        ((5, 6 * SIZE), E4M3, "float8_e4m3fn of shape [5, 144]"),
        ((4, 6, SIZE), E4M3, "float8_e4m3fn of shape [4, 6, 24]"),
        ((5, 6, SIZE), E5M2, "float8_e5m2 of shape [5, 6, 24]"),
    ],
    ids=["flat", "rows", "dtype"],
)
def test_results_of_another_form_are_refused(shape: tuple[int, ...], dtype: torch.dtype, came: str) -> None:
    out = torch.zeros(shape).to(dtype)
    with pytest.raises(ValueError) as error:
        make((6, 2)).quantize_query(torch.ones(5, 6, SIZE), out)
    assert str(error.value) == (f"AttentionScales.quantize_query: out must be float8_e4m3fn of shape [5, 6, 24], got {came}")
    assert not out.view(torch.uint8).any()


# update_cache

SLOTS = torch.tensor([3, -1, 11, 0, 7])


def check_tokens_in_caches(
    device: torch.device,
    heads: tuple[int, int],
    strategy: str,
    fp8: torch.dtype = E4M3,
    layout: str = "NHD",
    in_bytes: bool = False,
) -> None:
    module = make(heads, strategy, device, dtype=fp8)
    _, key, value = fused(8, heads, torch.bfloat16, device)
    shape, dtype = (3, 4, heads[1], SIZE), torch.uint8 if in_bytes else fp8
    key_cache, value_cache, actual = empty_caches(shape, dtype, layout, device)
    module.update_cache(key, value, (key_cache, value_cache), SLOTS.to(device))
    key_cache, value_cache, expected = empty_caches(shape, dtype, layout, CPU)
    name = {E4M3: "fp8_e4m3", E5M2: "fp8_e5m2"}[fp8]
    scales = module.k_scale.cpu(), module.v_scale.cpu()
    reference.reshape_and_cache_flash(key.cpu(), value.cpu(), key_cache, value_cache, SLOTS, name, *scales)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bytes(a.cpu(), e)


@each_heads
@each_strategy
def test_tokens_in_caches(device: torch.device, heads: tuple[int, int], strategy: str) -> None:
    check_tokens_in_caches(device, heads, strategy)


@each_fp8
@pytest.mark.parametrize("layout", ["NHD", "HND", "[nb, 2] HND", "halves NHD"])
@pytest.mark.parametrize("in_bytes", [False, True], ids=["fp8", "uint8"])
def test_tokens_in_caches_of_every_layout_and_dtype(
    device: torch.device, fp8: torch.dtype, layout: str, in_bytes: bool
) -> None:
    check_tokens_in_caches(device, HEADS["GQA"], "attn_head", fp8, layout, in_bytes)


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_paged_cache_takes_over_what_it_lost_of_the_scales(device: torch.device, name: str) -> None:
    module, cache = make((6, 2), "tensor", device), PagedKVCache(3, 4, 2, SIZE, device=device)
    key, value = (x.to(device) for x in key_and_value(5, 2, SIZE, torch.bfloat16))
    of_the_module = {"k_scale": module.k_scale, "v_scale": module.v_scale}
    cache.use_scales(**of_the_module | {name: torch.ones(1, device=device)})
    module.update_cache(key, value, cache, SLOTS.to(device))
    assert getattr(cache, name) is of_the_module[name]


@each_strategy
def test_a_paged_cache_takes_over_the_scales(device: torch.device, strategy: str) -> None:
    module = make((6, 2), strategy, device)
    cache = PagedKVCache(3, 4, 2, SIZE, device=device)
    key, value = (x.to(device) for x in key_and_value(5, 2, SIZE, torch.bfloat16))
    module.update_cache(key, value, cache, SLOTS.to(device))
    assert cache.k_scale is module.k_scale
    assert cache.v_scale is module.v_scale
    gathered, _ = cache.gather(torch.tensor([[0, 1, 2]]), [12])
    scale = of_heads(module.k_scale, 2)
    stored = reference.encode(key.cpu().float() / scale, E4M3).float() * scale
    stored = reference.round_to(stored, torch.bfloat16)
    for token, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            assert_same_bytes(gathered[slot].cpu(), stored[token])


def test_a_paged_cache_of_e5m2() -> None:
    module = make(dtype=E5M2)
    cache = PagedKVCache(3, 4, 2, SIZE, dtype="fp8_e5m2")
    key, value = key_and_value(1, 2, SIZE, torch.float32)
    module.update_cache(key, value, cache, torch.tensor([4]))
    expected = reference.encode(value / of_heads(module.v_scale, 2), E5M2)
    assert_same_bytes(cache.value_cache[1, :1], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("owner", ["class", "pair"])
def test_a_cache_that_is_not_fp8_is_written_without_scales(dtype: str, owner: str) -> None:
    module = make()
    cache = PagedKVCache(3, 4, 2, SIZE, dtype=dtype)
    key, value = key_and_value(1, 2, SIZE, cache.dtype)
    pair = (cache.key_cache, cache.value_cache)
    module.update_cache(key, value, cache if owner == "class" else pair, torch.tensor([4]))
    assert_same_bytes(cache.key_cache[1, :1], reference.round_to(key.float(), cache.dtype))
    assert cache.k_scale.tolist() == [1.0]


def test_flat_keys_and_values() -> None:
    module = make()
    one, other = PagedKVCache(3, 4, 2, SIZE), PagedKVCache(3, 4, 2, SIZE)
    key, value = key_and_value(5, 2, SIZE, torch.float32)
    module.update_cache(key, value, one, SLOTS)
    module.update_cache(key.flatten(1), value.flatten(1), other, SLOTS)
    assert_same_bytes(other.storage, one.storage)
    assert one.storage.view(torch.uint8).any()


@pytest.mark.parametrize(
    ("make_cache", "error", "sentence"),
    [
        (
            lambda: PagedKVCache(3, 4, 2, SIZE, scales="dynamic"), ValueError,
            "AttentionScales.update_cache: cache must take the scales of this module, got a dynamic Paged",
        ),
        (lambda: PagedKVCache(3, 4, 2, SIZE, dtype=E5M2), RuntimeError, "kv_cache_dtype"),
        (lambda: PagedKVCache(3, 4, 1, SIZE), RuntimeError, "num_kv_heads=1"),
    ],
    ids=["dynamic", "other FP8", "other heads"],
)  # fmt: skip
def test_caches_that_are_refused(make_cache: Callable[[], PagedKVCache], error: type[Exception], sentence: str) -> None:
    module = make(calculate_kv_scales=True)
    cache, before = make_cache(), snapshot(module)
    scale = cache.k_scale
    with pytest.raises(error, match=sentence):
        module.update_cache(*key_and_value(5, 2, SIZE, torch.float32), cache, SLOTS)
    assert not cache.storage.view(torch.uint8).any()
    assert cache.k_scale is scale
    assert_unchanged(module, before)


@pytest.mark.parametrize("name", ["key", "value"])
def test_keys_and_values_of_other_heads_are_refused(name: str) -> None:
    tensors = {"key": torch.ones(5, 2, SIZE), "value": torch.ones(5, 2, SIZE)} | {name: torch.ones(5, 6, SIZE)}
    with pytest.raises(ValueError, match=rf"update_cache: {name} must have the shape .* got \[5, 6, 24\]"):
        make((6, 2)).update_cache(**tensors, cache=PagedKVCache(3, 4, 6, SIZE), slot_mapping=SLOTS)


# descales


@each_strategy
@pytest.mark.parametrize("num_seqs", [0, 1, 5])
def test_descales_are_views(device: torch.device, strategy: str, num_seqs: int) -> None:
    module = make((6, 2), strategy, device)
    for side, descale in zip("qkv", module.descales(num_seqs), strict=True):
        scale = getattr(module, f"{side}_scale")
        assert descale.shape == (num_seqs, 2)
        assert descale.tolist() == [(scale.tolist() * 2)[:2]] * num_seqs
        assert descale.untyped_storage().data_ptr() == scale.untyped_storage().data_ptr()


# observe


#: The largest quotients that are not clipped: one fp32 step above the range.
LIMITS = {E4M3: 448 + 2**-15, E5M2: 57344 + 2**-8}


def seen_of(x: Tensor, scale: Tensor, fp8: torch.dtype = E4M3) -> tuple[list[float], list[int], list[int]]:
    """amax, clipped and observed of each scale, in plain steps on the CPU."""
    x, scale = x.cpu().float(), scale.cpu()
    amax, clipped, observed = [], [], []
    for group, s in zip(x.chunk(len(scale), dim=1), scale, strict=True):
        finite = group[group.isfinite()].abs()
        amax.append(finite.max().item() if finite.numel() else 0.0)
        clipped.append(int((group / s).abs().gt(LIMITS[fp8]).sum()))
        observed.append(group.numel())
    return amax, clipped, observed


def assert_seen(module: AttentionScales, side: str, expected: tuple[list[float], list[int], list[int]]) -> None:
    actual = (getattr(module, f"{side}_{kind}").tolist() for kind in ("amax", "clipped", "observed"))
    assert tuple(actual) == expected


def check_observed(device: torch.device, heads: tuple[int, int], strategy: str, fp8: torch.dtype, real: torch.dtype) -> None:
    sides = dict(zip("qkv", fused(31, heads, real, device), strict=True))
    for flat in (False, True):
        module = make(heads, strategy, device, dtype=fp8)
        module.observe(*(x.flatten(1) if flat else x for x in sides.values()))
        for side, x in sides.items():
            assert_seen(module, side, seen_of(x, getattr(module, f"{side}_scale"), fp8))
        assert sum(module.k_clipped.tolist()) > 0


@each_heads
@each_strategy
def test_what_is_observed(device: torch.device, heads: tuple[int, int], strategy: str) -> None:
    check_observed(device, heads, strategy, E4M3, torch.bfloat16)


@each_fp8
@each_real
def test_what_is_observed_of_every_dtype(device: torch.device, fp8: torch.dtype, real: torch.dtype) -> None:
    check_observed(device, HEADS["GQA"], "attn_head", fp8, real)


@each_strategy
@each_place
def test_what_is_observed_anywhere_in_memory(device: torch.device, strategy: str, place: str) -> None:
    module = make((6, 2), strategy, device)
    key, value = key_and_value(31, 2, SIZE, torch.bfloat16)
    key, value = placed(key, place, device), placed(value, place, device)
    module.observe(None, key, value)
    assert_seen(module, "k", seen_of(key, module.k_scale))
    assert_seen(module, "v", seen_of(value, module.v_scale))
    assert_seen(module, "q", ([0.0] * len(module.q_scale), [0] * len(module.q_scale), [0] * len(module.q_scale)))


@each_strategy
def test_steps_add_up(device: torch.device, strategy: str) -> None:
    module = make((6, 2), strategy, device)
    places = addresses(module)
    steps = [fused(tokens, (6, 2), torch.bfloat16, device, seed=tokens) for tokens in (5, 0, 1, 17)]
    for step in steps:
        module.observe(*step)
    for side, parts in zip("qkv", zip(*steps, strict=True), strict=True):
        assert_seen(module, side, seen_of(torch.cat(parts), getattr(module, f"{side}_scale")))
    assert addresses(module) == places


@pytest.mark.parametrize("tokens", [1, 2, 3, 50])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_many_tokens_are_observed_in_pieces(
    device: torch.device, tokens: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = fused(tokens, (6, 2), torch.float16, device)
    slots = torch.arange(tokens, device=device) % 3 - 1 if padded else None
    whole, pieces = make(device=device), make(device=device)
    whole.observe(query, key, value, slots)
    monkeypatch.setattr(statistics, "_CHUNK", 7 * SIZE)  # three tokens of K and V, one of Q
    pieces.observe(query, key, value, slots)
    assert_unchanged(pieces, snapshot(whole))


@pytest.mark.parametrize(
    ("x", "clipped", "amax"),
    [
        (448.0, 0, 448.0), (-448.0, 0, 448.0), (448 + 2**-15, 0, 448 + 2**-15), (-464.0, 1, 464.0),
        (448 + 2**-14, 1, 448 + 2**-14), (math.inf, 1, 0.0), (-math.inf, 1, 0.0), (math.nan, 0, 0.0),
        (3e38, 1, 3e38), (1e-45, 0, 1e-45), (-0.0, 0, 0.0),
    ],
    ids=str,
)  # fmt: skip
def test_what_counts_as_clipped(device: torch.device, x: float, clipped: int, amax: float) -> None:
    module = AttentionScales(1, 1, 1, device=device)
    module.observe(None, torch.full((1, 1, 1), x, device=device), torch.zeros(1, 1, 1, device=device))
    assert module.k_clipped.item() == clipped
    assert module.k_observed.item() == 1
    assert module.k_amax.item() == torch.tensor(amax).item()


def test_clipping_is_decided_by_the_rounded_quotient(device: torch.device) -> None:
    """Where a product with the reciprocal would decide otherwise."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4096, generator=generator) + 0.5
    bits = (scale * 448).view(torch.int32)
    x = torch.stack([(bits + k).view(torch.float32) for k in range(-3, 4)])
    expected = (x / scale).abs().gt(LIMITS[E4M3])
    assert expected.ne((x * (1 / scale)).abs().gt(LIMITS[E4M3])).any()
    module = AttentionScales(4096, 4096, 1, strategy="attn_head", device=device)
    module.k_scale.copy_(scale)
    module.observe(None, x.unsqueeze(2).to(device), x.unsqueeze(2).to(device))
    assert module.k_clipped.tolist() == expected.sum(0).tolist()


@each_strategy
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_padding_is_not_observed(device: torch.device, strategy: str, dtype: torch.dtype) -> None:
    module = make((6, 2), strategy, device)
    sides = fused(9, (6, 2), torch.float32, device)
    for x in sides:
        x[1], x[3], x[6:] = 1e30, math.inf, -1e30
    module.observe(*sides, torch.tensor([5, -1, 0, -9, 2, 3], dtype=dtype, device=device))
    for side, x in zip("qkv", sides, strict=True):
        assert_seen(module, side, seen_of(x[[0, 2, 4, 5]], getattr(module, f"{side}_scale")))
    assert sides[1][1].eq(1e30).all(), "the padding itself stays"


def test_a_step_of_padding_only(device: torch.device) -> None:
    module = make(device=device)
    before = snapshot(module)
    sides = fused(3, (6, 2), torch.bfloat16, device)
    module.observe(*sides, torch.full((3,), -1, device=device))
    module.observe(*sides, torch.empty(0, dtype=torch.int64, device=device))
    assert_unchanged(module, before)


def test_what_is_observed_stays_as_it_is(device: torch.device) -> None:
    sides = fused(9, (6, 2), torch.float32, device)
    copies = [x.clone() for x in sides]
    make(device=device).observe(*sides)
    for x, before in zip(sides, copies, strict=True):
        assert_same_bytes(x, before)


def test_tensors_that_require_gradients_are_observed() -> None:
    module = make()
    key = torch.ones(3, 2, SIZE, requires_grad=True)
    module.observe(None, key * 2, key)
    assert module.k_amax.tolist() == [2.0, 2.0]
    assert not module.k_amax.requires_grad


KV = (torch.ones(5, 2, SIZE), torch.ones(5, 2, SIZE))
REFUSED_TENSORS: dict[str, tuple[tuple[Any, ...], str]] = {
    "query of KV heads": ((torch.ones(5, 2, SIZE), *KV), r"query must have the shape .* got \[5, 2, 24\]"),
    "key of query heads": (
        (None, torch.ones(5, 6, SIZE), KV[1]),
        r"key must have the shape .* got \[5, 6, 24\]",
    ),
    "value of one dimension": ((None, KV[0], torch.ones(5)), r"value must have the shape .* got \[5\]"),
    "float64": (
        (None, KV[0], KV[1].double()),
        "value must be float32, float16 or bfloat16 on cpu, got float64 on cpu",
    ),
    "integers": (
        (torch.ones(5, 6, SIZE).int(), *KV),
        "query must be float32, float16 or bfloat16 on cpu, got int32 on cpu",
    ),
    "other device": (
        (None, KV[0], KV[1].to("meta")),
        "value must be float32, float16 or bfloat16 on cpu, got float32 on meta",
    ),
    "fewer rows than slots": (
        (None, KV[0], KV[1][:3], torch.arange(4)),
        "value must have at least 4 rows, one for each element of slot_mapping, got 3",
    ),
    "slots of two dimensions": (
        (None, *KV, torch.arange(4).view(2, 2)),
        r"slot_mapping must be int32 or int64 of one dimension on cpu, got int64 of shape \[2, 2\] on cpu",
    ),
    "slots of floats": (
        (None, *KV, torch.ones(4)),
        r"slot_mapping must be int32 or int64 of one dimension on cpu, got float32 of shape \[4\] on cpu",
    ),
}


@pytest.mark.parametrize(("args", "sentence"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS.keys())
def test_tensors_that_cannot_be_observed_change_nothing(args: tuple[Any, ...], sentence: str) -> None:
    module = make((6, 2))
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"^AttentionScales.observe: {sentence}$"):
        module.observe(*args)
    assert_unchanged(module, before)


def test_observing_takes_little_memory(cuda: torch.device) -> None:
    module = AttentionScales(8, 8, 128, strategy="attn_head", device=cuda)
    qkv = torch.randn(65536, 3 * 8 * 128, dtype=torch.bfloat16, device=cuda)  # 400 MB
    sides = [x.view(65536, 8, 128) for x in qkv.chunk(3, dim=1)]
    slots = torch.zeros(65536, dtype=torch.int64, device=cuda)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module.observe(*sides, slots)
    assert torch.cuda.max_memory_allocated() - before < 40e6


@pytest.mark.parametrize("per_channel", [False, True], ids=["", "per channel"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_opcheck_of_the_operator_that_observes(device: torch.device, padded: bool, per_channel: bool) -> None:
    x = values((5, 2, 1, SIZE), torch.bfloat16, specials=False).to(device)
    shape = (2, SIZE) if per_channel else (2,)
    amax, scale = torch.zeros(shape, device=device), torch.ones(shape, device=device)
    offset = torch.ones(2, SIZE, device=device) if per_channel else None
    counts = [torch.zeros(2, dtype=torch.int64, device=device) for _ in range(2)]
    slots = SLOTS.to(device) if padded else None
    op = torch.ops.fp8kv._observe_groups.default
    torch.library.opcheck(op, (x, scale, amax, *counts, 448.0, slots, offset))


# discard_observations and observations


@each_strategy
def test_a_warm_up_is_discarded(device: torch.device, strategy: str) -> None:
    module = make((6, 2), strategy, device)
    places, before = addresses(module), snapshot(module)
    module.observe(*fused(9, (6, 2), torch.float32, device))
    module.discard_observations()
    assert_unchanged(module, before)
    assert addresses(module) == places


def test_the_report(device: torch.device) -> None:
    module = AttentionScales(2, 2, 4, strategy="attn_head", device=device)
    key = torch.tensor([[[1.0, -2.0, 3.0, 0.5], [500.0, -4.0, math.inf, math.nan]]], device=device)
    module.observe(None, key, key[:, :, :].flip(1))
    report = module.observations()
    assert report == Observations(
        q=Observed((0.0, 0.0), (0, 0), (0, 0)),
        k=Observed((3.0, 500.0), (0, 2), (4, 4)),
        v=Observed((500.0, 3.0), (2, 0), (4, 4)),
    )
    assert report.k.clipped_fraction == 0.25
    assert report.clipped_fraction == 0.25
    assert report.q.clipped_fraction == 0.0
    assert module.observations() == report, "to report changes nothing"


NOTHING = Observed((0.0,), (0,), (0,))
REPORTS = {
    "nothing": ((NOTHING, NOTHING, NOTHING), "Nothing was observed."),
    "all well": (
        (NOTHING, Observed((3.5,), (0,), (1000,)), Observed((0.25,), (0,), (1234567,))),
        "Observed 1,000 elements of K (amax 3.5) and 1,234,567 elements of V (amax 0.25). The scales in force clip none.",
    ),
    "one clipped": (
        (NOTHING, Observed((500.0,), (3,), (4000,)), Observed((2.0,), (0,), (4000,))),
        "Observed 4,000 elements of K (amax 500) and 4,000 elements of V (amax 2). "
        "Warning: the scales in force clip 3 elements of K (0.075%).",
    ),
    "heads clipped": (
        (
            Observed((2.0, 3.0), (0, 0), (8, 8)),
            Observed((2.0, 500.0), (0, 5), (4, 4)),
            Observed((900.0, 500.0), (4, 2), (4, 4)),
        ),
        "Observed 16 elements of Q (amax 3), 8 elements of K (amax 500) and 8 elements of V (amax 900). "
        "Warning: the scales in force clip 5 elements of K (62.5%, head 1) and 6 elements of V (75%, "
        "heads 0 and 1).",
    ),
}


@pytest.mark.parametrize(("sides", "text"), REPORTS.values(), ids=REPORTS.keys())
def test_the_report_as_text(sides: tuple[Observed, Observed, Observed], text: str) -> None:
    assert str(Observations(*sides)) == text


# freeze


@pytest.mark.parametrize(
    ("dtype", "amax", "margin", "expected"),
    [
        (E4M3, 448.0, 1.0, 1.0), (E4M3, 7.0, 1.0, 0.015625), (E4M3, 7.0, 2.0, 0.03125),
        (E4M3, 0.0, 1.0, 1 / (448 * 512)), (E4M3, 1e-12, 1.0, 1 / (448 * 512)), (E5M2, 57344.0, 1.0, 1.0),
        (E5M2, 0.0, 1.0, 1 / (57344 * 512)), (E4M3, 14.0, 0.5, 0.015625),
        (E4M3, 3e38, 10.0, 3.4028234663852886e38 / 448), (E4M3, 1.0, 1.0, 0.0022321429569274187),
    ],
    ids=str,
)  # fmt: skip
def test_what_was_seen_becomes_the_scale(
    device: torch.device, dtype: torch.dtype, amax: float, margin: float, expected: float
) -> None:
    module = AttentionScales(1, 1, 2, dtype=dtype, device=device)
    x = torch.tensor([[[-amax, amax / 2]]], device=device)
    module.observe(x, x, x)
    module.freeze(margin=margin)
    for scale in (module.q_scale, module.k_scale, module.v_scale):
        assert scale.item() == torch.tensor(expected).item()


@each_strategy
def test_frozen_scales_clip_nothing_of_what_was_seen(device: torch.device, strategy: str) -> None:
    heads = HEADS["GQA"]
    module = make(heads, strategy, device)
    places = addresses(module)
    steps = [
        [values(x.shape, torch.bfloat16, seed, specials=False).to(device) for x in fused(7, heads, torch.bfloat16, CPU)]
        for seed in range(3)
    ]
    for step in steps:
        module.observe(*step)
    report = module.freeze()
    assert report.clipped_fraction > 0, "the scales before were too small"
    assert addresses(module) == places
    for step in steps:
        module.observe(*step)
    assert module.observations().clipped_fraction == 0
    for side, parts in zip("qkv", zip(*steps, strict=True), strict=True):
        scale = getattr(module, f"{side}_scale")
        groups = torch.cat(parts).cpu().float().chunk(len(scale), dim=1)
        amax = torch.stack([group.abs().max() for group in groups])
        assert_same_bytes(scale.cpu(), amax / torch.tensor(448.0))


def test_an_all_zero_head_gets_the_smallest_scale_and_others_their_own() -> None:
    module = AttentionScales(2, 2, 2, strategy="attn_head")
    key = torch.tensor([[[0.0, -0.0], [448.0, 1.0]]])
    module.observe(None, key, key)
    module.freeze()
    assert module.k_scale.tolist() == [torch.tensor(1 / (448 * 512)).item(), 1.0]


def test_a_query_scale_stays_when_no_query_was_seen() -> None:
    module = make()
    before = module.q_scale.tolist()
    module.observe(None, *key_and_value(5, 2, SIZE, torch.float32))
    module.freeze()
    assert module.q_scale.tolist() == before


def test_freezing_forgets_what_was_seen_and_reports_it() -> None:
    module = make()
    module.observe(None, *key_and_value(5, 2, SIZE, torch.float32))
    expected = module.observations()
    assert module.freeze() == expected
    assert str(module.observations()) == "Nothing was observed."


def observe_nothing(module: AttentionScales) -> None:
    pass


def observe_and_discard(module: AttentionScales) -> None:
    module.observe(*fused(5, (6, 2), torch.float32, CPU))
    module.discard_observations()


def observe_empty(module: AttentionScales) -> None:
    module.observe(*fused(0, (6, 2), torch.float32, CPU))


def observe_queries_only(module: AttentionScales) -> None:
    module.quantize_query(torch.ones(5, 6, SIZE))


@pytest.mark.parametrize("prepare", [observe_nothing, observe_and_discard, observe_empty, observe_queries_only])
def test_nothing_seen_cannot_be_frozen(prepare: Callable[[AttentionScales], None]) -> None:
    module = make((6, 2), calculate_kv_scales=True)
    prepare(module)
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="freeze: keys and values must have been observed, got none; call observe"):
        module.freeze()
    assert_unchanged(module, before)
    assert module.calculate_kv_scales


@pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan, "1", None])
def test_margins_that_are_refused(margin: Any) -> None:
    module = make()
    module.observe(None, *KV)
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"freeze: margin must be finite and above 0, got {margin!r}$"):
        module.freeze(margin=margin)
    assert_unchanged(module, before)


@pytest.mark.parametrize("group", [0, "world", -100], ids=str)
def test_what_is_no_process_group_is_refused(group: Any) -> None:
    module = make()
    module.observe(None, *KV)
    before = snapshot(module)
    with pytest.raises(ValueError, match="group must be a process group that this rank belongs to, got"):
        module.freeze(group)
    assert_unchanged(module, before)


# calculate_kv_scales


@each_strategy
def test_scales_are_calculated_from_what_is_used(device: torch.device, strategy: str) -> None:
    """The current scales are still used; tokens with a negative slot are not observed."""
    module = make((6, 2), strategy, device, calculate_kv_scales=True)
    expected = make((6, 2), strategy, device)
    query, key, value = fused(8, (6, 2), torch.bfloat16, device)
    caches = [PagedKVCache(3, 4, 2, SIZE, device=device) for _ in range(2)]
    assert_same_bytes(module.quantize_query(query), expected.quantize_query(query))
    module.update_cache(key, value, caches[0], SLOTS.to(device))
    expected.update_cache(key, value, caches[1], SLOTS.to(device))
    assert_same_bytes(caches[0].storage, caches[1].storage)
    assert_seen(module, "q", seen_of(query, module.q_scale))
    for side, x in (("k", key), ("v", value)):
        assert_seen(module, side, seen_of(x[[0, 2, 3, 4]], getattr(module, f"{side}_scale")))
    assert sum(expected.k_observed.tolist()) == sum(expected.q_observed.tolist()) == 0


def test_calculation_ends_with_freeze() -> None:
    module = make(calculate_kv_scales=True)
    cache = PagedKVCache(3, 4, 2, SIZE)
    module.update_cache(*key_and_value(5, 2, SIZE, torch.float32), cache, SLOTS)
    module.freeze()
    assert not module.calculate_kv_scales
    module.update_cache(*key_and_value(5, 2, SIZE, torch.float32), cache, SLOTS)
    module.quantize_query(torch.ones(5, 6, SIZE))
    assert str(module.observations()) == "Nothing was observed."


def test_a_16_bit_cache_is_observed_too() -> None:
    """An engine calibrates this way while its cache is not quantized yet."""
    module = make(calculate_kv_scales=True)
    key, value = key_and_value(5, 2, SIZE, torch.bfloat16)
    module.update_cache(key, value, PagedKVCache(3, 4, 2, SIZE, dtype="bfloat16"), SLOTS)
    assert_seen(module, "k", seen_of(key[SLOTS >= 0], module.k_scale))


# torch.compile


def layer_step(module: AttentionScales, qkv: Tensor, cache: Any, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = qkv * 2
    query, key, value = qkv.split([6 * SIZE, 2 * SIZE, 2 * SIZE], dim=-1)
    module.observe(query, key, value, slots)
    module.update_cache(key.unflatten(1, (2, SIZE)), value.unflatten(1, (2, SIZE)), cache, slots)
    return (module.quantize_query(query).view(torch.uint8), *module.descales(3))


@pytest.mark.parametrize("owner", ["pair", "class"])
@each_strategy
def test_under_torch_compile(device: torch.device, owner: str, strategy: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer_step, fullgraph=True, backend="aot_eager")
    modules = [make((6, 2), strategy, device, calculate_kv_scales=True) for _ in range(2)]
    caches = [PagedKVCache(3, 4, 2, SIZE, device=device) for _ in range(2)]
    places = addresses(modules[0])
    arguments = [c if owner == "class" else (c.key_cache, c.value_cache) for c in caches]
    for seed in range(2):
        qkv = values((5, 10 * SIZE), torch.bfloat16, seed).to(device)
        actual = compiled(modules[0], qkv, arguments[0], SLOTS.to(device))
        expected = layer_step(modules[1], qkv, arguments[1], SLOTS.to(device))
        for a, e in zip(actual, expected, strict=True):
            assert_same_bytes(a, e)
    assert_unchanged(modules[0], snapshot(modules[1]))
    assert_same_bytes(caches[0].storage, caches[1].storage)
    assert addresses(modules[0]) == places
    assert owner == "pair" or caches[0].k_scale is modules[0].k_scale


def test_compiled_code_follows_the_end_of_calculation() -> None:
    torch._dynamo.reset()
    module = make(calculate_kv_scales=True)
    compiled = torch.compile(AttentionScales.quantize_query, fullgraph=True, backend="aot_eager")
    compiled(module, torch.ones(5, 6, SIZE))
    module.observe(None, *KV)
    assert module.freeze().q.observed == (5 * 3 * SIZE,) * 2
    compiled(module, torch.ones(5, 6, SIZE))
    assert module.q_observed.tolist() == [0, 0]


# CUDA graphs


def test_nothing_on_the_way_of_a_token_synchronizes(cuda: torch.device) -> None:
    module = make(device=cuda, calculate_kv_scales=True)
    cache = PagedKVCache(3, 4, 2, SIZE, device=cuda)
    query, key, value = fused(5, (6, 2), torch.bfloat16, cuda)
    slots = SLOTS.to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.observe(query, key, value)
        module.observe(query, key, value, slots)
        module.quantize_query(query)
        module.update_cache(key, value, cache, slots)
        module.descales(3)
        module.discard_observations()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_strategy
@each_fp8
def test_a_captured_graph_observes_and_takes_new_scales(cuda: torch.device, strategy: str, fp8: torch.dtype) -> None:
    module = make((6, 2), strategy, cuda, dtype=fp8, calculate_kv_scales=True)
    cache = PagedKVCache(3, 4, 2, SIZE, dtype=fp8, device=cuda)
    query, key, value = (x.clone() for x in fused(5, (6, 2), torch.bfloat16, cuda))
    slots = SLOTS.to(cuda)
    out = torch.zeros(query.shape, dtype=fp8, device=cuda)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        module.quantize_query(query, out)
        module.update_cache(key, value, cache, slots)
        return module.descales(2)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        descales = step()
    module.discard_observations()

    expected = make((6, 2), strategy, CPU, dtype=fp8)
    expected_cache = PagedKVCache(3, 4, 2, SIZE, dtype=fp8, device=CPU)
    for seed in (1, 2):
        for buffer, x in zip((query, key, value), fused(5, (6, 2), torch.bfloat16, CPU, seed), strict=True):
            buffer.copy_(x)
        graph.replay()
        sides = [x.cpu() for x in (query, key, value)]
        expected.observe(sides[0], sides[1], sides[2], SLOTS)
        expected.observe(sides[0][SLOTS < 0], *(x[:0] for x in sides[1:]))  # queries have no slots
    assert module.observations() == expected.observations()

    module.freeze()
    expected.freeze()
    graph.replay()
    assert_same_bytes(out.cpu(), expected.quantize_query(sides[0]))
    expected.update_cache(sides[1], sides[2], expected_cache, SLOTS)
    assert_same_bytes(
        cache.key_cache.flatten(0, 1)[SLOTS[SLOTS >= 0]].cpu(),
        expected_cache.key_cache.flatten(0, 1)[SLOTS[SLOTS >= 0]],
    )
    for a, e in zip(descales, expected.descales(2), strict=True):
        assert_same_bytes(a.cpu(), e)
