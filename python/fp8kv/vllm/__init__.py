"""The plug-in for vLLM: an attention backend that reads the FP8 cache, and our writes under vLLM's own.

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. What
was not asked for stays as it is. Described in docs/vllm.md; `import fp8kv` does not import this package.
"""

from __future__ import annotations

import logging

from fp8kv.vllm.settings import settings

__all__ = ["register"]

logger = logging.getLogger("vllm.fp8kv")


def register() -> None:
    """Makes the backend known under its name and, if asked to, takes over the writes of FLASH_ATTN.

    It may be called many times. It imports the registry of vLLM and no backend.

    Raises:
        ValueError: an environment variable has a value that it can't have, or another plug-in has replaced
            FLASH_ATTN or its query quantization already.
        ImportError: the writes were asked for, and this vLLM lacks an interface.
    """
    chosen = settings()
    try:
        from fp8kv.vllm import versions
    except ImportError as error:
        if chosen.writes:
            raise
        logger.warning("%s; its backend is unavailable", error)
        return
    versions.register_backends()
    if chosen.writes:
        from fp8kv.vllm import queries

        versions.replace_backend("FLASH_ATTN", "fp8kv.vllm.writes.WritesBackend")
        queries.replace_quantization()
