"""`KVCacheScheme`: what a checkpoint's config says about its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Strategy = Literal["tensor", "attn_head"]


@dataclass(frozen=True)
class KVCacheScheme:
    """The `quantization_config` of a checkpoint, as far as the KV cache is concerned.

    Attributes:
        strategy: "tensor" or "attn_head": one scale per tensor or per attention head.
        quantizes_query: whether queries have scales too.
        observer: how the scales were found, such as "static_minmax"; None if the config does not say.
        producer: the `quant_method`, such as "compressed-tensors".
    """

    strategy: Strategy
    quantizes_query: bool = False
    observer: str | None = None
    producer: str = "compressed-tensors"

    @classmethod
    def from_config(cls, config: dict[str, Any] | str | Path) -> KVCacheScheme:
        raise NotImplementedError
