"""The quantization benchmark as a script: the same as `fp8kv bench`, with the same options (`--help`)."""

import typer

from fp8kv._cli import bench

if __name__ == "__main__":
    typer.run(bench)
