"""rope_quant_and_cache in the conventions of models: against plain PyTorch, and against modules of Transformers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8kv

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, MAX_POSITION = 6, 4, 2, 64
# A text token, four patches of an image and another text token: time, height and width.
POSITIONS = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]) * 9


def frequencies(rotary_dim: int) -> Tensor:
    return 10000.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / (rotary_dim // 2))


def step(device: torch.device, query: Tensor, key: Tensor, rotary_dim: int, positions: Tensor, **options: Any) -> list[Tensor]:
    """Queries and keys after the step, in fp32 and not quantized."""
    angles = torch.arange(MAX_POSITION, dtype=torch.float64).unsqueeze(1) * frequencies(rotary_dim)
    table = torch.cat((angles.cos(), angles.sin()), 1).float()
    out, caches = torch.empty_like(query, device=device), torch.zeros(2, 1, 16, *key.shape[1:], device=device)
    one, slots = torch.ones(1, device=device), torch.arange(len(key), device=device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    fp8kv.rope_quant_and_cache(
        query.to(device), key.to(device), key.to(device), out, *caches, slots, "auto", one, one, one,
        positions.to(device), table.to(device), **options,
    )  # fmt: skip
    return [out.cpu(), caches[0, 0, : len(key)].cpu()]


def heads(head_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(head_size)
    return [torch.randn(NUM_TOKENS, count, head_size, generator=generator) for count in (NUM_HEADS, NUM_KV_HEADS)]


# Plain PyTorch: complex numbers, one angle for each token and frequency


def rotated(x: Tensor, axes: str, is_neox: bool) -> Tensor:
    """`axes` names the position, of "thw", that each frequency takes."""
    row = torch.tensor(["thw".index(axis) for axis in axes])
    angles = POSITIONS[row].T * frequencies(2 * len(axes))
    pairs = x[..., : 2 * len(axes)].double()
    pairs = torch.stack(pairs.chunk(2, -1), -1) if is_neox else pairs.unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    parts = torch.view_as_real(turned)
    flat = torch.cat(parts.unbind(-1), -1) if is_neox else parts.flatten(-2)
    return torch.cat((flat, x[..., 2 * len(axes) :].double()), -1)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    ("section", "interleaved", "axes"),
    [
        ((4, 6, 6), False, "tttthhhhhhwwwwww"),
        ((6, 5, 5), True, "thwthwthwthwthwt"),
        ((8, 4, 4), True, "thwthwthwthwtttt"),
        ((11, 2, 3), True, "thwthwttwttttttt"),
        ((0, 16, 0), False, "hhhhhhhhhhhhhhhh"),
        ((2, 2, 1), False, "tthhw"),
        ((2, 2, 1), True, "thwth"),
    ],
)
def test_three_positions(device: torch.device, section: tuple[int, ...], interleaved: bool, axes: str, is_neox: bool) -> None:
    inputs = heads(40)
    results = step(
        device, *inputs, 2 * len(axes), POSITIONS, is_neox=is_neox, mrope_section=section, mrope_interleaved=interleaved
    )
    for x, actual in zip(inputs, results, strict=True):
        torch.testing.assert_close(actual, rotated(x, axes, is_neox).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("axes", ["t" * 20, "t" * 5])
def test_a_norm_after_rope(device: torch.device, axes: str, is_neox: bool) -> None:
    inputs, weights = heads(40), [torch.linspace(0.5, 2.0, 40), torch.linspace(-1.0, 1.0, 40)]
    results = step(
        device, *inputs, 2 * len(axes), POSITIONS[0], is_neox=is_neox, norm_after_rope=True, norm_eps=1e-5,
        q_norm_weight=weights[0], k_norm_weight=weights[1],
    )  # fmt: skip
    for x, weight, actual in zip(inputs, weights, results, strict=True):
        y = rotated(x, axes, is_neox)
        expected = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


# Transformers

MODELS = {
    "qwen2_vl": ("Qwen2VLTextConfig", "Qwen2VLRotaryEmbedding", (16, 24, 24), 128, 128),
    "qwen2_5_vl": ("Qwen2_5_VLTextConfig", "Qwen2_5_VLRotaryEmbedding", (16, 24, 24), 128, 128),
    "qwen3_vl": ("Qwen3VLTextConfig", "Qwen3VLTextRotaryEmbedding", (24, 20, 20), 128, 128),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5TextRotaryEmbedding", (11, 11, 10), 256, 64),
    "glm4v": ("Glm4vTextConfig", "Glm4vTextRotaryEmbedding", (8, 12, 12), 128, 64),
}


@pytest.mark.parametrize("model", MODELS)
def test_three_positions_of_transformers(device: torch.device, model: str) -> None:
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configs = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    config_class, embedding, section, head_size, rotary_dim = MODELS[model]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}
    config = getattr(configs, config_class)(
        hidden_size=NUM_HEADS * head_size, num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_KV_HEADS,
        head_dim=head_size, rope_parameters=rope | {"partial_rotary_factor": rotary_dim / head_size},
    )  # fmt: skip
    query, key = heads(head_size)
    cos, sin = getattr(module, embedding)(config)(query, POSITIONS.unsqueeze(1))
    expected = module.apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    results = step(
        device, query, key, rotary_dim, POSITIONS, is_neox=model != "glm4v", mrope_section=section,
        mrope_interleaved=model in ("qwen3_vl", "qwen3_5"),
    )  # fmt: skip
    for actual, right in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, right[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_the_norm_of_hunyuan(device: torch.device) -> None:
    pytest.importorskip("transformers")
    hunyuan = importlib.import_module("transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense")
    query, key = heads(32)
    angles = torch.cat([POSITIONS[:1, :, None] * frequencies(32)] * 2, -1).float()
    rotated_heads = hunyuan.apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], angles.cos(), angles.sin()
    )
    norms = [hunyuan.HunYuanDenseV1RMSNorm(32, eps=1e-5) for _ in range(2)]
    weights = [torch.linspace(0.5, 2.0, 32), torch.linspace(-1.0, 1.0, 32)]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data.copy_(weight)
    results = step(device, query, key, 32, POSITIONS[0], norm_after_rope=True, norm_eps=1e-5,
                   q_norm_weight=weights[0], k_norm_weight=weights[1])  # fmt: skip
    for actual, norm, x in zip(results, norms, rotated_heads, strict=True):
        torch.testing.assert_close(actual, norm(x)[0].transpose(0, 1).detach(), rtol=1e-4, atol=1e-4)
