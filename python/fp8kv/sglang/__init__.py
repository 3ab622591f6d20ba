"""The plug-in for SGLang: its FP8 cache is written by our append, in one launch.

SGLang finds `register` by the entry point ``sglang.srt.plugins`` and calls it in each of its processes. What
was not asked for stays as it is. Described in docs/sglang.md; `import fp8kv` does not import this package.
"""

from __future__ import annotations

import os

from fp8kv._checks import check_choice

__all__ = ["register"]

#: The method whose work is taken over, of the pool of all models without latent attention.
TARGET = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer"


def register() -> None:
    """With FP8KV_SGLANG_WRITES=1, hooks the store of the cache.

    Raises:
        ValueError: the variable has another value than 0 or 1. SGLang logs that, and goes on without.
        ImportError: this SGLang has no hooks; likewise.
    """
    asked = os.environ.get("FP8KV_SGLANG_WRITES", "0")
    check_choice("fp8kv.sglang: FP8KV_SGLANG_WRITES", asked, ("0", "1"))
    if asked == "1":
        from fp8kv.sglang.store import set_kv_buffer

        try:
            from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        except ImportError as error:
            raise ImportError(
                f"fp8kv.sglang: SGLang must be installed, in a version with plug-ins as 0.5.23 has ({error})",
                name=error.name,
            ) from error
        HookRegistry.register(TARGET, set_kv_buffer, HookType.AROUND)
