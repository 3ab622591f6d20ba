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

    app(arguments(sys.argv[1:]))


def arguments(given: list[str]) -> list[str]:
    """The arguments of a command, where `--json` without a file means stdout.

    Example:
        >>> from fp8kv.cli import arguments
        >>> arguments(["bench", "--json", "--quick"])
        ['bench', '--json', '-', '--quick']
    """
    complete = []
    for argument, following in zip(given, [*given[1:], "--"], strict=True):
        complete.append(argument)
        if argument == "--json" and following.startswith("--"):
            complete.append("-")
    return complete
