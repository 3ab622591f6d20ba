"""`Fp8Cache`: the KV cache of a Hugging Face model in FP8, for `generate` and for calls of the model.

Described in docs/transformers.md. `import fp8kv` does not import this module, as it needs Transformers.
"""

from __future__ import annotations

from fp8kv._checks import require

require("transformers", "transformers", "fp8kv.transformers")

from fp8kv.transformers.cache import Fp8Cache  # noqa: E402

__all__ = ["Fp8Cache"]
