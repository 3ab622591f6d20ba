"""remap_scale_name: every name of scales in checkpoints, and names that are not scales."""

from __future__ import annotations

import pytest

from fp8kv import remap_scale_name

ATTENTION = "model.layers.7.self_attn"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q_scale", "q_scale"), ("k_scale", "k_scale"), ("v_scale", "v_scale"),
        ("q_zero_point", "q_zero_point"), ("k_zero_point", "k_zero_point"), ("v_zero_point", "v_zero_point"),
        ("attn.q_scale", "q_scale"), ("attn.k_scale", "k_scale"), ("attn.v_zero_point", "v_zero_point"),
        ("kv_scale", "k_scale"), ("attn.kv_scale", "k_scale"),
        ("q_proj.q_scale", "q_scale"), ("k_proj.k_scale", "k_scale"), ("v_proj.v_scale", "v_scale"),
        ("k_proj.k_zero_point", "k_zero_point"),
        ("qkv_proj.q_scale", "q_scale"), ("qkv_proj.k_scale", "k_scale"), ("qkv_proj.v_scale", "v_scale"),
        ("qkv_proj.v_zero_point", "v_zero_point"),
        ("qkqkv_proj.k_scale", "k_scale"), ("qkqkv_proj.v_scale", "v_scale"),
        ("q.scale", "q_scale"), ("k_cache.scale", "k_scale"), ("v_cache.scale", "v_scale"),
        ("v_cache.zero_point", "v_zero_point"),
        ("kv_cache_scaling_factor", "k_scale"), ("v_cache_scaling_factor", "v_scale"),
        ("k_fake_quantizer.qscale_act", "k_scale"), ("kv_fake_quantizer.qscale_act", "k_scale"),
        ("k_proj.kv_cache_scale", "k_scale"), ("v_proj.kv_cache_offset", "v_zero_point"),
        ("k_cache_scale", "k_scale"), ("attn_mqa.k_scale", "k_scale"),
        ("mla_attn.mla_attn.k_scale", "k_scale"),
        ("wqkv.k_scale", "k_scale"), ("W_pack.v_scale", "v_scale"), ("kv_a_proj_with_mqa.k_scale", "k_scale"),
        ("q_proj.output_scale", "q_scale"), ("k_proj.output_scale", "k_scale"),
        ("v_proj.output_scale", "v_scale"), ("v_proj.output_zero_point", "v_zero_point"),
    ],
)  # fmt: skip
def test_names(name: str, expected: str) -> None:
    assert remap_scale_name(f"{ATTENTION}.{name}") == f"{ATTENTION}.{expected}"


@pytest.mark.parametrize(
    "attention",
    [
        "model.layers.12.self_attn",
        "layers.12.self_attn",
        "12.self_attn",
        "language_model.model.layers.12.self_attn",
        "model.language_model.layers.12.self_attn",
        "thinker.model.layers.12.self_attn",
        "backbone.layers.12.mixer",
        "transformer.h.12.attn",
        "transformer.encoder.layers.12.self_attention",
        "model.decoder.layers.12.self_attn",
        "model.encoder.language_model.layers.12.self_attn",
        "decoder.block.12.layer.0.SelfAttention",
        "transformer.blocks.12.norm_attn_norm.attn",
        "layers.12.attention",
        "_orig_mod.model.layers.12.self_attn",
        "model.layers.12._orig_mod.self_attn",
        "model.layers.12.self_attn._orig_mod",
        "_fsdp_wrapped_module.model.layers.12._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn._fsdp_wrapped_module",
    ],
)
def test_prefixes(attention: str) -> None:
    assert remap_scale_name(f"{attention}.k_proj.k_scale") == "model.layers.12.self_attn.k_scale"


@pytest.mark.parametrize(
    "name",
    [
        "", "k_scale", "self_attn.k_scale", "model.embed_tokens.weight", "lm_head.k_scale",
        f"{ATTENTION}", f"{ATTENTION}.", f"{ATTENTION}.scale",
        f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.k_proj.weight_scale", f"{ATTENTION}.k_proj.scale",
        f"{ATTENTION}.k_proj.weight_scale_inv", f"{ATTENTION}.k_proj.input_scale",
        f"{ATTENTION}.k_proj.weight_zero_point",
        f"{ATTENTION}.qkv_proj.output_scale", f"{ATTENTION}.o_proj.output_scale",
        f"{ATTENTION}.prob_output_scale", f"{ATTENTION}.attn.prob_scale",
        f"{ATTENTION}.k_proj.v_scale", f"{ATTENTION}.v_proj.k_scale", f"{ATTENTION}.o_scale",
        f"{ATTENTION}.k_scale_inv", f"{ATTENTION}.xk_scale", f"{ATTENTION}.k_norm.weight",
        f"{ATTENTION}.k_scale.weight", f"{ATTENTION}.k.scale", f"{ATTENTION}.K_scale",
        "model.layers.7.mlp.k_scale", "model.layers.7.cross_attn.k_scale", "model.layers.x.self_attn.k_scale",
        "model.layers.-1.self_attn.k_scale", "model.layers.7self_attn.k_scale",
        # Other models in the same checkpoint, whose layers start from 0 too.
        "vision_tower.encoder.layers.7.self_attn.k_proj.output_scale", "visual.blocks.7.attn.k_scale",
        "model.audio_tower.layers.7.self_attn.k_scale", "model.encoder.layers.7.self_attn.k_scale",
        "mtp.layers.0.self_attn.k_scale", "talker.model.layers.7.self_attn.k_scale",
        "model.decoder.layers.7.encoder_attn.k_scale", "decoder.block.7.layer.1.EncDecAttention.k_scale",
        "eagle_module.layers.0.self_attn.k_scale", "model.layers.123456.self_attn.k_scale",
        f"{ATTENTION}.k_proj.kv_cache_offset_scale", f"{ATTENTION}.wk.qscale_act",
    ],
)  # fmt: skip
def test_what_is_no_scale_of_the_model(name: str) -> None:
    assert remap_scale_name(name) is None


def test_the_only_layer_of_a_draft_is_the_first() -> None:
    assert remap_scale_name("midlayer.self_attn.k_scale") == "model.layers.0.self_attn.k_scale"


def test_names_of_its_own_stay_as_they_are() -> None:
    for name in (f"{ATTENTION}.{letter}_{kind}" for letter in "qkv" for kind in ("scale", "zero_point")):
        assert remap_scale_name(name) == name
