"""The command line: `fp8kv` and `python -m fp8kv`."""

from __future__ import annotations

import sys

from fp8kv._checks import require


def main() -> None:
    """The entry point of the command."""
    try:
        for module in ("rich", "typer"):
            require(module, "cli", "fp8kv")
    except ImportError as error:
        sys.exit(f"error: {error}")
    from fp8kv.cli._app import app

    app()
