"""The quantization benchmark as a script: `fp8kv bench quantize`, with the same options (`--help`)."""

import sys

from fp8kv._cli import app

if __name__ == "__main__":
    app(["bench", "quantize", *sys.argv[1:]])
