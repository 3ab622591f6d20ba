"""Checkpoints for tests, of the form that llm-compressor writes: config.json and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

#: The sizes of the model whose checkpoints these are.
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
ATTENTION = "model.layers.{layer}.self_attn"


def scheme(strategy: str = "attn_head", **changes: Any) -> dict[str, Any]:
    """What `kv_cache_scheme` holds."""
    fields: dict[str, Any] = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
        "observer": "static_minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": strategy,
        "symmetric": True, "type": "float", "zp_dtype": None,
    }  # fmt: skip
    return fields | changes


def config(strategy: str = "attn_head", *, query: bool = False, **changes: Any) -> dict[str, Any]:
    """A config.json; `changes` replace fields of its `quantization_config`."""
    attention = {
        "format": "dense", "input_activations": scheme(strategy), "output_activations": None,
        "targets": ["LlamaAttention"], "weights": None,
    }  # fmt: skip
    quantization: dict[str, Any] = {
        "config_groups": {"group_0": attention} if query else {},
        "format": "dense",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": scheme(strategy),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": SIZES["num_attention_heads"] * SIZES["head_dim"],
        **SIZES,
        "quantization_config": quantization | changes,
    }


def scales(
    strategy: str = "attn_head", *, query: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of all layers, as llm-compressor names and shapes them; about 0.05."""
    generator = torch.Generator().manual_seed(seed)
    heads = {"k": SIZES["num_key_value_heads"], "v": SIZES["num_key_value_heads"]}
    if query:
        heads["q"] = SIZES["num_attention_heads"]
    tensors = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, count in heads.items():
            shape = (1,) if strategy == "tensor" else (count, 1, 1)
            scale = 0.02 + 0.06 * torch.rand(shape, generator=generator)
            stem = f"{ATTENTION.format(layer=layer)}.{name}"
            tensors[f"{stem}_scale"] = scale.to(dtype)
            if query:
                tensors[f"{stem}_zero_point"] = torch.zeros(shape).to(torch.float8_e4m3fn)
    return tensors


def weights(seed: int = 1) -> dict[str, Tensor]:
    """Some tensors that are no scales."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"{ATTENTION.format(layer=n)}.k_proj.weight" for n in range(SIZES["num_hidden_layers"])]
    return {name: torch.randn(64, 16, generator=generator).to(torch.bfloat16) for name in ["model.embed_tokens.weight", *names]}


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, *, shards: int = 1
) -> Path:
    """Of one file, or of several with an index; neighbors in `tensors` go to different shards."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def make_checkpoint(folder: Path, strategy: str = "attn_head", *, query: bool = False, shards: int = 1) -> Path:
    """A whole and healthy one."""
    tensors = weights() | scales(strategy, query=query)
    return write_checkpoint(folder, tensors, config(strategy, query=query), shards=shards)
