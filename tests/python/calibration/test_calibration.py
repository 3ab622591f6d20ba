"""calibrate: scales of the values that caches of real models receive, in one process and in several."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchEncoding,
    DynamicCache,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MiniMaxConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
    xLSTMConfig,
)
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fp8kv
from devices import require_gpus
from fp8kv.calibration import share, text_batches
from fp8kv.calibration.observers import make_observer
from helpers import assert_same_bytes, each_strategy, torch_threads

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "Llama, 3 query heads for one of K": lambda: LlamaConfig(**SIZES),
    "Llama, all heads": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "Llama, one head": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "Qwen3, norms of Q and K": lambda: Qwen3Config(**SIZES),
    "Gemma3, sliding windows": lambda: Gemma3TextConfig(**SIZES, **SLIDING),
}
LLAMA = "Llama, 3 query heads for one of K"
each_model = pytest.mark.parametrize("name", CONFIGS)
each_observer = pytest.mark.parametrize("observer", ["static_minmax", "percentile", "mse"])
MIN_SCALE = torch.tensor(1 / (448 * 512)).item()


def make(name: str = LLAMA, implementation: str = "sdpa", config: Any = None) -> Any:
    """A model with deterministic random weights, including biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or CONFIGS[name](), attn_implementation=implementation)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def cached(model: Any, ids: Tensor, **inputs: Any) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer ``[B, heads, N, head_size]``, in a cache that keeps all tokens."""
    kept = DynamicCache()
    with torch.no_grad():
        # Older versions of transformers know only the second name.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        model(ids, use_cache=True, **{name: kept}, **inputs)
    return [(layer.keys, layer.values) for layer in kept.layers if layer.keys is not None]


def scale(states: list[Tensor], strategy: str) -> Tensor:
    """Min-max over several ``[B, heads, N, head_size]``."""
    amax = torch.stack([x.float().abs().amax((0, 2, 3)) for x in states]).amax(0).cpu()
    amax = amax if strategy == "attn_head" else amax.max().reshape(1)
    return amax / torch.full_like(amax, 448.0)


def assert_scales(scales: fp8kv.KVScales, seen: list[list[tuple[Tensor, Tensor]]], strategy: str = "attn_head") -> None:
    """Compares with the min-max scales of K and V over several batches."""
    assert list(scales) == list(range(len(seen[0])))
    for layer in scales:
        assert_same_bytes(scales[layer].k, scale([batch[layer][0] for batch in seen], strategy))
        assert_same_bytes(scales[layer].v, scale([batch[layer][1] for batch in seen], strategy))


def assert_same_scales(actual: fp8kv.KVScales, expected: fp8kv.KVScales) -> None:
    assert actual.scheme == expected.scheme
    assert list(actual) == list(expected)
    for layer in expected:
        for name in "qkv":
            a, e = getattr(actual[layer], name), getattr(expected[layer], name)
            assert (a is None) == (e is None)
            if e is not None:
                assert_same_bytes(a, e)


# Observed values


@each_model
@each_strategy
def test_scales_are_amax_of_what_the_cache_receives(name: str, strategy: Any) -> None:
    model = make(name)
    batches = [tokens(2, 20), tokens(1, 33, seed=1), tokens(3, 1, seed=2)]
    scales = fp8kv.calibrate(model, batches, strategy=strategy)
    assert_scales(scales, [cached(model, batch) for batch in batches], strategy)
    assert scales.scheme == fp8kv.KVCacheScheme(strategy, quantizes_query=False, observer="static_minmax")
    assert all(scales[layer].q is None for layer in scales)


def test_on_any_device(device: torch.device) -> None:
    model = make().to(device)
    scales = fp8kv.calibrate(model, [tokens(2, 20)], strategy="attn_head")
    assert_scales(scales, [cached(model, tokens(2, 20).to(device))])
    assert scales[0].k.device.type == "cpu"


def queries_after_rope(model: Any, ids: Tensor) -> list[Tensor]:
    """``[B, heads, N, head_size]`` of every layer, from its hidden states."""
    found = []

    def observe(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        hidden = inputs["hidden_states"]
        query = module.q_proj(hidden).view(*hidden.shape[:2], -1, module.head_dim)
        query = getattr(module, "q_norm", nn.Identity())(query).transpose(1, 2)
        found.append(apply_rotary_pos_emb(query, query, *inputs["position_embeddings"])[0])

    hooks = [layer.self_attn.register_forward_pre_hook(observe, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


@each_model
@each_strategy
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_queries_are_those_after_norm_and_rope(name: str, strategy: Any, implementation: str) -> None:
    model = make(name, implementation)
    ids = tokens(2, 20)
    scales = fp8kv.calibrate(model, [ids], strategy=strategy, query=True)
    assert scales.scheme.quantizes_query
    assert_scales(scales, [cached(model, ids)], strategy)
    num_kv_heads = model.config.num_key_value_heads
    for layer, query in enumerate(queries_after_rope(model, ids)):
        of_groups = [query.unflatten(1, (num_kv_heads, -1))[:, :, member] for member in range(6 // num_kv_heads)]
        assert_same_bytes(scales[layer].q, scale(of_groups, strategy))


@each_model
@pytest.mark.parametrize("query", [False, True], ids=["", "query"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_the_model_computes_what_it_does_without_a_cache(name: str, query: bool, implementation: str, padded: bool) -> None:
    model = make(name, implementation)
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    inputs: dict[str, Any] = {}
    if padded:
        mask[0, :5] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    outputs: list[Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    fp8kv.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], strategy="tensor", query=query)
    with torch.no_grad():
        model(ids, use_cache=False, **inputs)
    hook.remove()
    assert_same_bytes(outputs[0], outputs[1])


def test_layers_without_a_cache_of_their_own_have_no_scales() -> None:
    config = Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 4}, num_kv_shared_layers=2, vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8, activation_sparsity_pattern=[0.0] * 4, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = make(config=config)
    scales = fp8kv.calibrate(model, [tokens(2, 20)], strategy="attn_head", query=True)
    assert list(scales) == [0, 1]
    assert_scales(scales, [cached(model, tokens(2, 20))])


def latent_config(model_type: str = "deepseek_v3", **fields: Any) -> Any:
    """Of latent attention: rows of 16 + 8 elements."""
    return AutoConfig.for_model(
        model_type, **SIZES | {"num_key_value_heads": 6}, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=3, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=1, moe_intermediate_size=32, **fields,
    )  # fmt: skip


@each_strategy
@each_observer
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_the_two_scales_of_a_latent_cache_are_those_of_its_row(model_type: str, observer: str, strategy: Any) -> None:
    """Whichever of its parts is larger."""
    model = make(config=latent_config(model_type))
    for layer, factor in enumerate((1, 200, 0.01)):
        model.model.layers[layer].self_attn.kv_a_proj_with_mqa.weight.data[16:] *= factor
    ids = tokens(2, 20)
    scales = fp8kv.calibrate(model, [ids], strategy=strategy, observer=observer)
    rows = [torch.cat(parts, -1) for parts in cached(model, ids)]
    assert [row.shape for row in rows] == [(2, 1, 20, 24)] * 3
    for layer, row in enumerate(rows):
        assert_same_bytes(scales[layer].k, scales[layer].v)
        expected = make_observer(observer, 1)
        expected.update(row.transpose(1, 2).flatten(0, 1))
        assert_same_bytes(scales[layer].k, expected.scales())
        if observer == "static_minmax":
            assert_same_bytes(scales[layer].k, scale([row], strategy))
    assert rows[1][..., 16:].abs().max() > 10 * rows[1][..., :16].abs().max()
    assert rows[2][..., 16:].abs().max() < rows[2][..., :16].abs().max() / 10


def test_latent_attention_that_caches_all_heads() -> None:
    """Some models with custom code do this; an engine stores other values."""
    model = make(config=latent_config())

    def cached_by_head(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        name = "cache" if "cache" in kwargs else "past_key_values"
        recording = kwargs[name]

        class Expanding:
            def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **options: Any) -> Any:
                expanded = module.expand_kv(key, value)
                recording.update(*expanded, layer)
                return key, value

        return args, kwargs | {name: Expanding()}

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(cached_by_head, with_kwargs=True)
    with pytest.raises(RuntimeError) as error:
        fp8kv.calibrate(model, [tokens(2, 20)], strategy="tensor")
    hook.remove()
    assert str(error.value) == (
        "calibrate: layer 1 of DeepseekV3ForCausalLM must give its cache the latent of 16 elements and the "
        "RoPE part of 8, as engines store them, got keys and values of 24 and 16 elements for 6 heads"
    )


def test_queries_of_latent_attention() -> None:
    with pytest.raises(ValueError) as error:
        fp8kv.calibrate(make(config=latent_config()), [IDS], strategy="tensor", query=True)
    assert str(error.value) == (
        "calibrate: query must be False for DeepseekV3ForCausalLM, as attention that reads its latent cache "
        "quantizes other queries than the model computes, got True"
    )


class ReadsItsCache(LlamaForCausalLM):
    """Reads the layers of its cache, like a second decoder, in batches of at least `since` tokens."""

    since = 0

    @wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        if input_ids.shape[1] >= self.since:
            kept = kwargs.get("cache", kwargs.get("past_key_values"))
            for layer, (key, value) in enumerate(cached(make(), input_ids)):
                assert_same_bytes(kept.layers[layer].keys, key)
                assert_same_bytes(kept.layers[layer].values, value)
        return output


def reader_of_its_cache(since: int = 0) -> ReadsItsCache:
    model = ReadsItsCache(CONFIGS[LLAMA]()).eval()
    model.load_state_dict(make().state_dict())
    model.since = since
    return model


@each_observer
def test_models_that_read_the_layers_of_their_cache(observer: str) -> None:
    batches = [tokens(2, 20), tokens(1, 33, seed=1)]
    arguments: dict[str, Any] = {"strategy": "attn_head", "observer": observer, "query": True}
    scales = fp8kv.calibrate(reader_of_its_cache(), batches, **arguments)
    assert_same_scales(scales, fp8kv.calibrate(make(), batches, **arguments))


def test_a_model_that_begins_to_read_its_cache_later() -> None:
    with pytest.raises(RuntimeError) as error:
        fp8kv.calibrate(reader_of_its_cache(since=30), [tokens(2, 20), tokens(1, 33)], strategy="tensor")
    assert str(error.value) == (
        "calibrate: the model must read the layers of its cache in every batch or in none, but does in this "
        "one and did not in those before"
    )


def test_nothing_is_kept_for_other_models() -> None:
    model, kept = make(), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs.get("cache", kwargs.get("past_key_values"))),
        with_kwargs=True,
    )
    fp8kv.calibrate(model, [tokens(2, 20)], strategy="tensor")
    hook.remove()
    assert [cache.get_seq_length() for cache in kept] == [0]


def test_models_of_other_families() -> None:
    model = make(config=GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64))
    scales = fp8kv.calibrate(model, [tokens(2, 20)], strategy="attn_head")
    assert_scales(scales, [cached(model, tokens(2, 20))])


def test_other_observers_see_the_same() -> None:
    model = make().bfloat16()
    ids = tokens(4, 30)
    keys, _ = cached(model, ids)[2]
    scales = fp8kv.calibrate(model, [ids], strategy="attn_head", observer="percentile", percentile=90)
    magnitudes = keys.transpose(0, 1).flatten(1).float().abs().sort(1).values
    expected = magnitudes[:, magnitudes.shape[1] * 9 // 10 - 1]
    assert_same_bytes(scales[2].k, expected / torch.full_like(expected, 448.0))
    assert scales.scheme.observer == "percentile"


def test_a_head_of_zeros_gets_the_smallest_scale() -> None:
    model = make()
    model.model.layers[0].self_attn.k_proj.weight.data[8:] = 0
    scales = fp8kv.calibrate(model, [tokens(2, 20)], strategy="attn_head")
    assert scales[0].k[1].item() == MIN_SCALE
    assert scales[0].k[0].item() > MIN_SCALE


def test_elements_that_are_not_finite_are_left_out_with_a_warning() -> None:
    model = make(config=LlamaConfig(**SIZES, attention_bias=True))
    model.model.layers[2].self_attn.v_proj.bias.data[3] = torch.nan
    clean = [layer[1].clone() for layer in cached(model, tokens(2, 20))]
    clean[2] = clean[2].nan_to_num(0)
    sentence = r"^calibrate: elements were NaN or infinite and were left out: 40 of 640 of v in layer 2$"
    with pytest.warns(UserWarning, match=sentence) as caught:
        scales = fp8kv.calibrate(model, [tokens(2, 20)], strategy="attn_head")
    assert caught[0].filename == __file__
    for layer in range(3):
        assert_same_bytes(scales[layer].v, scale([clean[layer]], "attn_head"))


# Batches


IDS = tokens(3, 12)


@pytest.mark.parametrize(
    "batches",
    [
        [IDS], [IDS.int()], list(IDS), IDS, iter([IDS[:1], IDS[1:]]), (row for row in IDS), [IDS, IDS],
        [{"input_ids": IDS}], [BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})],
        [{"input_ids": IDS.tolist(), "attention_mask": [[1] * 12] * 3, "token_type_ids": [[0] * 12] * 3}],
        [IDS, torch.zeros(0, 12, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)],
        [{"input_ids": IDS.numpy()}],
    ],
    ids=[
        "[B, N]", "int32", "[N]", "one tensor", "iterator", "generator", "twice", "dict", "encoding", "lists",
        "empty ones too", "numpy",
    ],
)  # fmt: skip
def test_forms_of_batches(batches: Any) -> None:
    model = make()
    scales = fp8kv.calibrate(model, batches, strategy="attn_head")
    # A batch of another size may use another algorithm for matrix products.
    expected = cached(model, IDS)
    for layer in range(3):
        for found, states in zip((scales[layer].k, scales[layer].v), expected[layer], strict=True):
            torch.testing.assert_close(found, scale([states], "attn_head"), rtol=1e-5, atol=0)


def padded(side: str, filler: int) -> tuple[Tensor, Tensor]:
    """Sequences of 12, 7, 0 and 3 tokens in a batch."""
    ids, mask = torch.full((4, 12), filler), torch.zeros(4, 12, dtype=torch.int64)
    for row, length in enumerate((12, 7, 0, 3)):
        place = slice(12 - length, 12) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = tokens(length, seed=row), 1
    return ids, mask


each_side = pytest.mark.parametrize("side", ["left", "right"])


@each_side
@each_model
def test_padding_has_no_influence(name: str, side: str) -> None:
    model = make(name)
    ids, mask = padded(side, filler=0)
    scales = fp8kv.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], strategy="attn_head", query=True)
    alone = fp8kv.calibrate(
        model, [tokens(length, seed=row) for row, length in enumerate((12, 7, 0, 3))], strategy="attn_head",
        query=True,
    )  # fmt: skip
    for layer in alone:
        for tensor in "qkv":
            found, expected = getattr(scales[layer], tensor), getattr(alone[layer], tensor)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@each_side
@each_observer
def test_what_the_padding_is_does_not_matter(side: str, observer: str) -> None:
    model = make()
    model.get_input_embeddings().weight.data[0] = 0
    model.get_input_embeddings().weight.data[96] = torch.eye(48)[5]
    model.model.layers[0].self_attn.v_proj.weight.data[:, 5] += 10
    first, second = (
        fp8kv.calibrate(
            model,
            [{"input_ids": ids, "attention_mask": mask}],
            strategy="attn_head",
            observer=observer,
            query=True,
        )
        for ids, mask in (padded(side, filler=0), padded(side, filler=96))
    )
    assert_same_scales(first, second)
    whole = [fp8kv.calibrate(model, [padded(side, filler)[0]], strategy="attn_head") for filler in (0, 96)]
    assert not torch.equal(whole[0][0].v, whole[1][0].v)  # otherwise this test would prove nothing


def test_batches_of_padding_alone_are_skipped() -> None:
    model = make()
    nothing = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}
    scales = fp8kv.calibrate(model, [nothing, IDS, nothing], strategy="attn_head")
    assert_scales(scales, [cached(model, IDS)])


# The model afterwards


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = make()
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    interface = AttentionInterface.get_interface
    during = []
    hook = model.register_forward_pre_hook(lambda module, args: during.append(module.training))

    def batches() -> Iterator[Tensor]:
        yield IDS
        assert AttentionInterface.get_interface is not interface
        if fails:
            raise OSError("no more text")

    if fails:
        with pytest.raises(OSError, match="no more text"):
            fp8kv.calibrate(model, batches(), strategy="tensor", query=True)
    else:
        fp8kv.calibrate(model, batches(), strategy="tensor", query=True)
    hook.remove()
    assert during == [False]
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sdpa"
    assert AttentionInterface.get_interface is interface
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_model_can_be_trained_afterwards() -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    config.max_position_embeddings = 16
    model = make(config=config)
    fp8kv.calibrate(model, [tokens(1, 40)], strategy="tensor")
    model(tokens(1, 40)).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_scales_are_ordinary_tensors() -> None:
    scales = fp8kv.calibrate(make(), [IDS], strategy="tensor")
    assert not scales[0].k.is_inference()
    assert not scales[0].k.requires_grad


def test_logits_are_computed_for_one_token_only() -> None:
    model = make()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    fp8kv.calibrate(model, [IDS], strategy="tensor")
    assert shapes == [(3, 1, 97)]


# Several devices


@pytest.mark.parametrize("kind", ["dispatched", "cpu offload", "disk offload", "partly on disk"])
def test_models_placed_by_accelerate(kind: str, tmp_path: Path) -> None:
    import accelerate

    model = make()
    expected = fp8kv.calibrate(model, [IDS], strategy="attn_head", query=True)
    if kind == "cpu offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        if kind == "partly on disk":
            del places["model.layers"]
            places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        places["model.rotary_emb"] = "cpu"
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    on_meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    assert on_meta == (kind != "dispatched")
    assert_same_scales(fp8kv.calibrate(model, [IDS], strategy="attn_head", query=True), expected)


def test_layers_on_two_gpus(cuda: torch.device) -> None:
    import accelerate

    require_gpus(2)
    expected = fp8kv.calibrate(make().to(cuda), [IDS], strategy="attn_head", query=True)
    model = make()
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    accelerate.dispatch_model(model, places | {"model.layers.2": 0, "model.norm": 1, "lm_head": 1})
    ids, mask = padded("left", filler=0)
    fp8kv.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], strategy="tensor", query=True)
    assert_same_scales(fp8kv.calibrate(model, [IDS], strategy="attn_head", query=True), expected)


# Several processes

BATCHES = [tokens(2, 9 + i, seed=i) for i in range(3)]
RUNS: dict[str, dict[str, Any]] = {
    f"{observer}, {strategy}": {"observer": observer, "strategy": strategy, "query": strategy == "tensor"}
    for observer in ("static_minmax", "percentile", "mse")
    for strategy in ("tensor", "attn_head")
}


def failing(rank: int) -> Iterator[Tensor]:
    yield BATCHES[0]
    if rank == 1:
        raise OSError("no more text")


def sharded_config() -> LlamaConfig:
    return LlamaConfig(**SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4})


def tensor_parallel(model: Any, size: int, module: str, columns: str, row: str) -> Any:
    """A module of each layer is sharded over the ranks; for attention, each computes its own heads."""
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns.split()} | {row: RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(getattr(layer, module), init_device_mesh("cpu", (size,)), plan)
    return model


def of_one_rank(rank: int, size: int, folder: Path) -> None:
    """Everything that needs several processes, in a single launch; results are written to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    model = make()
    for name, arguments in RUNS.items():
        scales = fp8kv.calibrate(model, share(BATCHES, rank, size), **arguments)
        found[name] = {layer: (scales[layer].q, scales[layer].k, scales[layer].v) for layer in scales}

    def attempt(model: Any, batches: Any, **arguments: Any) -> str:
        try:
            fp8kv.calibrate(model, batches, strategy="attn_head", **arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    whole_heads = tensor_parallel(make(config=sharded_config()), size, "mlp", "gate_proj up_proj", "down_proj")
    found["tensor parallel, whole heads"] = fp8kv.calibrate(whole_heads, [IDS], strategy="attn_head")[1].k
    sharded = tensor_parallel(make(config=sharded_config()), size, "self_attn", "q_proj k_proj v_proj", "o_proj")
    merged = fp8kv.calibrate(sharded, [IDS], strategy="tensor", query=True)[1]
    found["tensor parallel"] = {"q": merged.q, "k": merged.k, "v": merged.v}
    found["heads of tensor parallelism"] = attempt(sharded, [IDS])
    found["channels of tensor parallelism"] = attempt(sharded, [IDS], offset="mid")
    other = make("Llama, one head") if rank == 0 else model
    groups = [distributed.new_group([member]) for member in range(size)]
    found["a rank fails"] = attempt(model, failing(rank))
    found["a rank has a wrong model"] = attempt(nn.Linear(1, 1) if rank == 1 else model, [IDS])
    found["no tokens"] = attempt(model, [])
    found["another model"] = attempt(other, [IDS])
    channels = {"strategy": "channel", "dtype": "int8", "offset": "mid", "query": True}
    for name, arguments in {"channels": channels, "auto": {"dtype": "auto"}}.items():
        scales = fp8kv.calibrate(model, share(BATCHES, rank, size), **arguments)
        found[name] = {n: vars(scales[n]) for n in scales}, {n: vars(x) for n, x in scales.standard.items()}
        found[f"{name}, errors"] = scales.errors
    found["own group"] = fp8kv.calibrate(model, BATCHES[:1], strategy="tensor", group=groups[rank])[0].k
    found["group of others"] = attempt(model, [IDS], group=groups[rank - 1])
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    context = get_context("forkserver")
    context.set_forkserver_preload(["fp8kv", "torch.distributed.tensor.parallel", "transformers.models.llama.modeling_llama"])
    processes = [context.Process(target=of_one_rank, args=(rank, request.param, folder)) for rank in range(request.param)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    alive = [process.kill() for process in processes if process.is_alive()]
    assert not alive, "ranks wait for each other"
    assert [process.exitcode for process in processes] == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@cache
def of_one_process(name: str) -> fp8kv.KVScales:
    with torch_threads(1):
        return fp8kv.calibrate(make(), BATCHES, **RUNS[name])


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_have_the_scales_of_all_batches(ranks: list[dict[str, Any]], name: str) -> None:
    """With 4 ranks and 3 batches the last rank has none."""
    expected = of_one_process(name)
    for found in ranks:
        assert list(found[name]) == list(expected)
        for layer, (q, k, v) in found[name].items():
            assert_same_bytes(k, expected[layer].k)
            assert_same_bytes(v, expected[layer].v)
            assert (q is None) == (expected[layer].q is None)
            if q is not None:
                assert_same_bytes(q, expected[layer].q)


def assert_same_layers(found: dict[int, dict[str, Any]], expected: Any) -> None:
    assert list(found) == list(expected)
    for layer, fields in found.items():
        for name, x in fields.items():
            e = expected[layer][name] if isinstance(expected, dict) else getattr(expected[layer], name)
            if isinstance(x, Tensor):
                assert_same_bytes(x, e)
            else:
                assert x == e, (layer, name)


def test_all_ranks_have_the_channels_of_all_batches(ranks: list[dict[str, Any]]) -> None:
    with torch_threads(1):
        expected = fp8kv.calibrate(make(), BATCHES, strategy="channel", dtype="int8", offset="mid", query=True)
    assert expected.standard is not None
    for found in ranks:
        layers, standard = found["channels"]
        assert_same_layers(layers, expected)
        assert_same_layers(standard, {n: vars(x) for n, x in expected.standard.items()})


def test_all_ranks_choose_the_same(ranks: list[dict[str, Any]]) -> None:
    layers, standard = ranks[0]["auto"]
    assert ranks[0]["auto, errors"].keys() == layers.keys()
    for found in ranks[1:]:
        assert_same_layers(found["auto"][0], layers)
        assert_same_layers(found["auto"][1], standard)
        assert found["auto, errors"] == ranks[0]["auto, errors"]


@pytest.mark.parametrize(
    ("case", "own", "told"),
    [
        ("a rank fails", "OSError: no more text", "calibrate: rank 1 failed with OSError: no more text"),
        (
            "a rank has a wrong model",
            "ValueError: calibrate: model must be a causal language model of transformers, got Linear",
            "calibrate: rank 1 failed with ValueError: calibrate: model must be a causal language model of "
            "transformers, got Linear",
        ),
    ],
)
def test_a_failure_of_one_rank_is_one_of_all(ranks: list[dict[str, Any]], case: str, own: str, told: str) -> None:
    for rank, found in enumerate(ranks):
        assert found[case] == (own if rank == 1 else f"RuntimeError: {told}")


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (
            "no tokens",
            "ValueError: calibrate: batches must have at least one token that is not padding, got none",
        ),
        (
            "another model",
            "RuntimeError: calibrate: all ranks must have the same model, got models of different layers",
        ),
        (
            "group of others",
            "ValueError: calibrate: group must contain the rank that calls, got one without it",
        ),
    ],
)
def test_what_every_rank_refuses(ranks: list[dict[str, Any]], case: str, sentence: str) -> None:
    assert [found[case] for found in ranks] == [sentence] * len(ranks)


def test_tensor_parallel_ranks_have_the_scales_of_all_heads(ranks: list[dict[str, Any]]) -> None:
    expected = fp8kv.calibrate(make(config=sharded_config()), [IDS], strategy="tensor", query=True)[1]
    for found in ranks:
        for name in "qkv":
            torch.testing.assert_close(found["tensor parallel"][name], getattr(expected, name))


def test_tensor_parallel_ranks_that_have_all_heads(ranks: list[dict[str, Any]]) -> None:
    expected = fp8kv.calibrate(make(config=sharded_config()), [IDS], strategy="attn_head")[1].k
    for found in ranks:
        torch.testing.assert_close(found["tensor parallel, whole heads"], expected)


def test_heads_of_other_tensor_parallel_ranks_are_not_merged(ranks: list[dict[str, Any]]) -> None:
    sentence = (
        'ValueError: calibrate: strategy must be "tensor", and the scales plain FP8, for a model whose heads '
        'are spread over tensor-parallel ranks, got {}; load the model with device_map="auto" instead'
    )
    for case, got in (("heads", '"attn_head"'), ("channels", "other scales")):
        expected = [sentence.format(got)] * len(ranks)
        assert [found[f"{case} of tensor parallelism"] for found in ranks] == expected


def test_a_group_of_one_rank_shares_nothing(ranks: list[dict[str, Any]]) -> None:
    with torch_threads(1):
        expected = fp8kv.calibrate(make(), BATCHES[:1], strategy="tensor")[0].k
    for found in ranks:
        assert_same_bytes(found["own group"], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_batches(size: int) -> None:
    batches = list(range(5))
    shares = [share(batches, rank, size) for rank in range(size)]
    assert sorted(batch for part in shares for batch in part) == batches
    assert max(map(len, shares)) - min(map(len, shares)) <= 1  # type: ignore[arg-type]
    assert [list(share(iter(batches), rank, size)) for rank in range(size)] == shares


# Progress


@pytest.mark.parametrize("sized", [True, False])
def test_progress_is_told_after_each_batch(sized: bool) -> None:
    told: list[tuple[int, int | None]] = []
    fp8kv.calibrate(
        make(), [IDS] * 3 if sized else iter([IDS] * 3), strategy="tensor",
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(done, 3 if sized else None) for done in (1, 2, 3)]


@pytest.mark.parametrize("sized", [True, False])
def test_a_bar_on_stderr(capsys: pytest.CaptureFixture[str], sized: bool) -> None:
    fp8kv.calibrate(make(), [IDS] * 2 if sized else iter([IDS] * 2), strategy="tensor", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("2/2 batches" if sized else "2/? batches") in shown.err
    assert "72 tokens" in shown.err


@pytest.mark.parametrize("progress", [None, False])
def test_no_bar(capsys: pytest.CaptureFixture[str], progress: bool | None) -> None:
    fp8kv.calibrate(make(), [IDS], strategy="tensor", progress=progress)
    assert capsys.readouterr() == ("", "")


# Texts


class Bytes:
    """A tokenizer: bytes, with a token before each text if there is one."""

    def __init__(self, bos_token_id: int | None = 300) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": bos + list(text.encode())}


def texts_of(batches: list[Tensor]) -> list[list[str]]:
    return [["".join("<s>" if i == 300 else chr(i) for i in row) for row in batch.tolist()] for batch in batches]


@pytest.mark.parametrize(
    ("bos", "text", "numbers", "expected"),
    [
        (None, "abcdefgh", (4, 2, 1), [["ab"], ["cd"], ["ef"], ["gh"]]),
        (None, "abcdefgh", (4, 2, 3), [["ab", "cd", "ef"], ["gh"]]),
        (None, "abcdefgh", (2, 2, 4), [["ab", "ef"]]),
        (None, "abcdefgh", (3, 2, 4), [["ab", "cd", "ef"]]),
        (None, "abcdefgh", (9, 3, 1), [["abc"], ["def"]]),
        (None, "abc", (9, 5, 2), [["abc"]]),
        (None, ["ab", "c", "", "de"], (9, 2, 9), [["ab", "cd"]]),
        (300, "abcdefgh", (9, 4, 2), [["<s>abc", "<s>def"]]),
        (300, ["ab", "cdef"], (9, 4, 2), [["<s>abc", "<s>def"]]),
        (300, "ab", (9, 4, 2), [["<s>ab"]]),
        (300, "ab", (9, 1, 2), [["a", "b"]]),
    ],
)
def test_windows_of_a_text(
    bos: int | None, text: str | list[str], numbers: tuple[int, int, int], expected: list[list[str]]
) -> None:
    num_samples, seq_len, batch_size = numbers
    batches = text_batches(Bytes(bos), text, num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
    assert texts_of(batches) == expected


def test_windows_of_a_tokenizer_of_transformers() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "?": 1, "a": 2, "b": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", model_max_length=2)
    batches = text_batches(tokenizer, "a b c a", num_samples=2, seq_len=3, batch_size=2)
    assert [batch.tolist() for batch in batches] == [[[0, 2, 3], [0, 1, 2]]]


@pytest.mark.parametrize("name", ["num_samples", "seq_len", "batch_size"])
def test_numbers_of_windows_that_are_too_small(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^text_batches: {name} must be at least 1, got 0$"):
        text_batches(Bytes(), "abc", **{name: 0})


@pytest.mark.parametrize("text", ["", [], ["", ""]])
def test_an_empty_text(text: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"^text_batches: text must have at least one token, got an empty text$"):
        text_batches(Bytes(), text)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"strategy": "row"}, 'strategy must be "tensor", "attn_head" or "channel", got \'row\''),
        ({"observer": "max"}, 'observer must be one of "static_minmax", "percentile", "mse", got \'max\''),
        ({"percentile": 0}, "percentile must be above 0 and at most 100, got 0"),
        ({"percentile": 101}, "percentile must be above 0 and at most 100, got 101"),
        ({"percentile": "99"}, "percentile must be above 0 and at most 100, got '99'"),
        ({"headroom": "1"}, "headroom must be finite and above 0, got '1'"),
        ({"headroom": None}, "headroom must be finite and above 0, got None"),
        ({"batches": None}, "batches must be a list or another iterable, got NoneType"),
        ({"batches": 3}, "batches must be a list or another iterable, got int"),
        ({"model": nn.Linear(1, 1)}, "model must be a causal language model of transformers, got Linear"),
        ({"batches": []}, "batches must have at least one token that is not padding, got none"),
        (
            {"batches": [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}]},
            "batches must have at least one token that is not padding, got none",
        ),
        ({"batches": [{"ids": IDS}]}, "batches must have input_ids, got the keys ['ids']"),
        (
            {"batches": {"input_ids": IDS}},
            "batches must be tensors or lists of one length, got str 'input_ids'",
        ),
        (
            {"batches": [{"input_ids": [[1, 2], [3]]}]},
            "input_ids must be tensors or lists of one length, got list '[[1, 2], [3]]'",
        ),
        ({"batches": [IDS.float()]}, "batches must be integers, got float32"),
        ({"batches": [IDS.unsqueeze(0)]}, "batches must have the shape [B, N] or [N], got [1, 3, 12]"),
        ({"batches": [torch.tensor(3)]}, "batches must have the shape [B, N] or [N], got []"),
        (
            {"batches": [{"input_ids": IDS, "attention_mask": torch.ones(3, 11, dtype=torch.int64)}]},
            "attention_mask must have the shape [3, 12] of input_ids, got [3, 11]",
        ),
        ({"batches": [IDS, torch.tensor([3, 97])]}, "input_ids must be from 0 to 96, got 97"),
        ({"batches": [torch.tensor([-1])]}, "input_ids must be from 0 to 96, got -1"),
    ],
)
def test_what_does_not_fit(arguments: dict[str, Any], sentence: str) -> None:
    defaults = {"model": make(), "batches": [IDS], "strategy": "tensor"}
    with pytest.raises(ValueError) as error:
        fp8kv.calibrate(**defaults | arguments)
    assert str(error.value) == f"calibrate: {sentence}"


def test_a_model_with_an_encoder() -> None:
    config = T5Config(vocab_size=97, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"^calibrate: model must be .*, got T5ForConditionalGeneration$"):
        fp8kv.calibrate(T5ForConditionalGeneration(config), [IDS], strategy="tensor")


@pytest.mark.parametrize("padding", [0, 5])
def test_a_model_with_a_cache_class_of_its_own(padding: int) -> None:
    """MiniMax takes only its MiniMaxCache; of its layers of linear attention nothing is cached per token."""
    config = MiniMaxConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, layer_types=["linear_attention", "full_attention"] * 2, block_size=8, num_local_experts=2,
        num_experts_per_tok=1,
    )  # fmt: skip
    model = make(config=config)
    mask = torch.ones_like(IDS)
    mask[0, :padding] = 0
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        output = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
    kept = output.cache if "cache" in output else output.past_key_values
    for layer in (1, 3):
        keys, values = kept.layers[layer].keys, kept.layers[layer].values
        # Tokens of the batch and the sequence, in one row.
        seen[layer] = tuple(x.movedim(1, 0).flatten(1, 2)[:, mask.flatten() != 0][None] for x in (keys, values))
    scales = fp8kv.calibrate(model, [{"input_ids": IDS, "attention_mask": mask}], strategy="attn_head", query=True)
    assert list(scales) == [1, 3]
    for layer, (keys, values) in seen.items():
        assert_same_bytes(scales[layer].k, scale([keys], "attn_head"))
        assert_same_bytes(scales[layer].v, scale([values], "attn_head"))


def test_a_model_that_takes_no_cache_of_keys() -> None:
    model = make(config=xLSTMConfig(vocab_size=97, hidden_size=32, num_blocks=1, num_heads=2), implementation="eager")
    with pytest.raises(ValueError, match=r"^calibrate: model must cache keys and values, got xLSTMForCausalLM$"):
        fp8kv.calibrate(model, [IDS], strategy="tensor")


def test_a_model_whose_layers_have_no_keys() -> None:
    model = make(config=MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1), implementation="eager")
    with pytest.raises(RuntimeError, match=r"^calibrate: the layers of MambaForCausalLM must use a cache, but"):
        fp8kv.calibrate(model, [IDS], strategy="tensor")


def test_a_model_whose_queries_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    class Own:
        """Attention functions that cannot be replaced."""

        def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            return default

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Own())
    model = make(implementation="eager")
    fp8kv.calibrate(model, [IDS], strategy="tensor")
    with pytest.raises(RuntimeError, match=r"^calibrate: LlamaForCausalLM must take its attention function from"):
        fp8kv.calibrate(model, [IDS], strategy="tensor", query=True)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^calibrate: transformers must be installed, .*fp8kv\[transformers\]"):
        fp8kv.calibrate(model, [IDS], strategy="tensor")


def test_the_package_does_not_import_what_only_calibration_needs() -> None:
    code = (
        "import sys, fp8kv, fp8kv.calibration\n"
        "print([name for name in ('transformers', 'accelerate', 'rich') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
