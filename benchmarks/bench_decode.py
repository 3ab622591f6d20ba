"""The benchmark of one decode step as a script: `fp8kv bench decode`, with the same options (`--help`)."""

import sys

from fp8kv._cli import app

if __name__ == "__main__":
    app(["bench", "decode", *sys.argv[1:]])
