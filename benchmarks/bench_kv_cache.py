"""The benchmark of the paged KV cache as a script: `fp8kv bench cache`, with the same options (`--help`)."""

import sys

from fp8kv._cli import app

if __name__ == "__main__":
    app(["bench", "cache", *sys.argv[1:]])
