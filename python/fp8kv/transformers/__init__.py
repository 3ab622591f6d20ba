"""`Fp8Cache`: the KV cache of a Hugging Face model in FP8, for `generate` and for calls of the model.

Importing it makes the attention function "fp8kv" known to Transformers. Described in docs/transformers.md.
`import fp8kv` does not import this module, as it needs Transformers.
"""

from __future__ import annotations

from fp8kv._checks import require

require("transformers", "transformers", "fp8kv.transformers")

from fp8kv.transformers import attention  # noqa: E402
from fp8kv.transformers.cache import Fp8Cache  # noqa: E402

attention.register()

__all__ = ["Fp8Cache"]
