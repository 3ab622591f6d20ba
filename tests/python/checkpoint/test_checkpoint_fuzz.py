"""With any headers, configs and JSON files, loading and auditing end with problems or a clear error."""

from __future__ import annotations

import json
import random
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint_files import config, scheme
from fp8kv import audit_checkpoint, load_kv_scales

#: Mutations in all tests of this file together; more would take minutes.
MUTATIONS = 600
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION = "model.layers.0.self_attn"
CONFIGS: list[dict[str, Any]] = [
    config("attn_head", query=True),
    SIZES | {
        "layer_types": ["full_attention", "sliding_attention"], "hybrid_layer_pattern": [0, 1],
        "swa_num_key_value_heads": 8, "per_layer_config": {"0": {"num_key_value_heads": 2}},
        "attention_other_setting": {"attention_type": "full_attention", "num_attention_groups": 2},
        "block_configs": [{"attention": {"n_heads_in_group": 2}}],
        "quantization_config": {"kv_cache_scheme": scheme(), "ignore": ["re:.*x", "lm_head"]},
    },
    {
        "text_config": SIZES
        | {"linear_attn_config": {"full_attn_layers": [1]}, "cross_attention_layers": [1]},
        "talker_config": {"text_config": SIZES},
        "quantization_config": {
            "quant_method": "modelopt", "kv_cache_quant_algo": "MIXED_PRECISION",
            "kv_cache_quantized_layers": {ATTENTION: {"quant_algo": "FP8"}, "*": "NVFP4"},
        },
    },
    SIZES | {
        "attn_layer_period": 2, "block_types": ["a"], "full_attention_interval": 2,
        "quantization_config": {
            "quant_method": "quark", "kv_cache_post_rope": False, "export": {"kv_cache_group": ["*k_proj"]},
            "layer_quant_config": {
                "*k_proj": {"output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            },
        },
    },
]  # fmt: skip
JSON_FILES: list[dict[str, Any]] = [
    {"model_type": "llama", "kv_cache": {
        "dtype": "float8_e4m3fn",
        "scaling_factor": {"0": {"0": 0.04, "1": [0.05, 0.06]}, "1": {"0": 0.04, "1": {"k": 0.05, "v": 1}}},
    }},
    {"scales": {"k_scales": [0.1, 0.2], "v_scales": [0.3, [0.4]]}, "layer_ids": [0, 1], "qmax": 448},
    {f"{ATTENTION}.k_scale": 0.1, "1": {"v_scale": [[1]]}},
]  # fmt: skip
NAMES = [
    f"{ATTENTION}.k_scale", f"{ATTENTION}.v_proj.v_scale", f"{ATTENTION}.k_zero_point",
    f"{ATTENTION}.key_scale",
    f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.q_proj.weight",
    "model.layers.1.self_attn.k_proj.output_scale",
    "talker.model.layers.0.self_attn.kv_scale", "model.decoder.layers.0.encoder_attn.k_scale",
    "midlayer.self_attn.v_scale", "layers.0.attention.k_fake_quantizer.qscale_act",
    "model.layers.1.cross_attn.v_scale",
    "model.layers.9999.self_attn.k_scale", f"model.layers.{'9' * 5000}.self_attn.k_scale",
    "0.self_attn.k_scale",
    "decoder.block.3.layer.0.SelfAttention.k_scale", "vision_tower.layers.0.attn.k_scale", "kv_cache_scale",
    "..", "",
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 10**9, 10**30, float("nan"), float("inf"), "", "x", "FP8", "re:(",
    "re:.*", "*", "[", ATTENTION, [], [1], [[]], ["a"], [None], {}, {"a": 1}, {"0": {}}, [4, 3],
    "1" * 5000, [0] * 50,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value except itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(value: Any, rng: random.Random) -> Any:
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 2, 3])):
        *above, last = rng.choice(list(places(value)) or [()]) or [None]
        parent = value
        for key in above:
            parent = parent[key]
        if last is None:
            continue
        if isinstance(parent, dict) and rng.random() < 0.3:
            moved = parent.pop(last)
            if rng.random() < 0.5:
                parent[rng.choice(["num_hidden_layers", "layer_types", ATTENTION, "kv_cache_scheme", "0"])] = moved
        else:
            parent[last] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def tensors(rng: random.Random) -> bytes:
    """A .safetensors file that may be broken."""
    header: dict[str, Any] = {}
    data = b""
    for name in rng.sample(NAMES, rng.randrange(len(NAMES))):
        shape, count = rng.choice([([1], 1), ([2, 1, 1], 2), ([], 1), ([4], 4), ([0], 0), ([8, 8], 64)])
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * count]}
        values = [rng.choice([0.05, 0.1, float("nan"), 0, -1, 1e30, 1.0]) for _ in range(count)]
        data += struct.pack(f"<{count}f", *values)
    if header and rng.random() < 0.3:
        header = mutated(header, rng)
    text = json.dumps(header).encode()
    file = bytearray(len(text).to_bytes(8, "little") + text + data)
    if rng.random() < 0.1:
        file[rng.randrange(len(file))] = rng.randrange(256)
    return bytes(file)


@pytest.mark.parametrize("seed", range(6))
def test_mutations_raise_nothing_but_clear_errors(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    loaded = 0
    for number in range(MUTATIONS // 6):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(mutated(rng.choice(CONFIGS), rng)))
        (folder / "model.safetensors").write_bytes(tensors(rng))
        if rng.random() < 0.3:
            (folder / "hf_quant_config.json").write_text(json.dumps(mutated(rng.choice(CONFIGS), rng)))
        target = folder
        if rng.random() < 0.3:
            target = folder / "scales.json"
            target.write_text(json.dumps(mutated(rng.choice(JSON_FILES), rng)))
        assert isinstance(audit_checkpoint(target), list)
        for options in (
            {},
            {"on_problem": "warn"},
            {"model": rng.choice(["talker", "encoder_attn", "x", ""])},
        ):
            sentence = error_of(target, options)
            beginnings = (f"load_kv_scales: {target} has ", "load_kv_scales: model must be ")
            assert sentence is None or sentence.startswith(beginnings)
            loaded += sentence is None
    assert loaded > 0


def error_of(target: Path, options: dict[str, Any]) -> str | None:
    """The error that loading ends with; None if it succeeds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_kv_scales(target, **options)
    except ValueError as error:
        return str(error)
    return None
