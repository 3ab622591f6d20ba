"""The environment variables of the plug-in; docs/reference/environment.md describes them."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

from fp8kv._checks import check_choice

PREFILLS = ("gather", "paged")


class Settings(NamedTuple):
    """What was asked for.

    Attributes:
        writes: FLASH_ATTN keeps its attention and gets our writes and query quantization.
        observe: tokens that each layer observes before its scales are calculated; 0: it keeps its scales.
        prefill: "gather": long queries read a dequantized copy by FlashAttention where vLLM has it; "paged":
            `fp8kv.paged_attention` for all.
    """

    writes: bool
    observe: int
    prefill: str


@cache
def settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        ValueError: a variable has a value that it can't have, or two of them contradict each other.
    """
    writes = os.environ.get("FP8KV_VLLM_WRITES", "0")
    check_choice("fp8kv.vllm: FP8KV_VLLM_WRITES", writes, ("0", "1"))
    observe = os.environ.get("FP8KV_VLLM_OBSERVE", "0")
    if not observe.isdecimal():
        raise ValueError(f"fp8kv.vllm: FP8KV_VLLM_OBSERVE must be a number of tokens, got {observe!r}")
    prefill = os.environ.get("FP8KV_VLLM_PREFILL", "gather")
    check_choice("fp8kv.vllm: FP8KV_VLLM_PREFILL", prefill, PREFILLS)
    if writes == "1" and int(observe):
        raise ValueError(
            "fp8kv.vllm: FP8KV_VLLM_OBSERVE must be 0 with FP8KV_VLLM_WRITES=1, as FLASH_ATTN quantizes "
            f"queries too and their scales are not calculated, got {observe}"
        )
    return Settings(writes == "1", int(observe), prefill)
