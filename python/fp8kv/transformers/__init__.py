"""`Fp8Cache` and `Int8Cache`: KV caches of 8 bits for Hugging Face models, for `generate` and direct calls.

Importing it registers the attention function "fp8kv" with Transformers. Described in docs/transformers.md.
`import fp8kv` does not import this module, because it needs Transformers.
"""

from __future__ import annotations

from fp8kv._checks import require

require("transformers", "transformers", "fp8kv.transformers")

from fp8kv.transformers import attention  # noqa: E402
from fp8kv.transformers.cache import Fp8Cache, Int8Cache  # noqa: E402

attention.register()

__all__ = ["Fp8Cache", "Int8Cache"]
