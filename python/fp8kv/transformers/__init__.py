"""`Fp8Cache`: an FP8 KV cache for Hugging Face models, for `generate` and direct calls of the model.

Importing it registers the attention function "fp8kv" with Transformers. Described in docs/transformers.md.
`import fp8kv` does not import this module, because it needs Transformers.
"""

from __future__ import annotations

from fp8kv._checks import require

require("transformers", "transformers", "fp8kv.transformers")

from fp8kv.transformers import attention  # noqa: E402
from fp8kv.transformers.cache import Fp8Cache  # noqa: E402

attention.register()

__all__ = ["Fp8Cache"]
