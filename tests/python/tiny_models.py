"""Language models with random weights, small enough to run in milliseconds, whose tokens are words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(60)]
LAYERS, KV_HEADS, HEAD_SIZE = 2, 2, 16


def make_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A Llama and its tokenizer on disk; `changes` replace fields of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": len(WORDS) + 1, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE,
        "max_position_embeddings": 128, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**fields | changes)).to(dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """One token per word of `WORDS`, starting from 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)


def random_text(num_tokens: int, seed: int = 0) -> str:
    """The given number of words, one token each."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (num_tokens,), generator=generator).tolist())
