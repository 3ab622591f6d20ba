"""Runs commands within the test process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from fp8kv.cli import _app

#: The first bytes of a PNG file.
PNG = b"\x89PNG\r\n\x1a\n"


def output_of(*arguments: str | Path, status: int = 0) -> str:
    """The output of `fp8kv`, with its layout."""
    result = CliRunner().invoke(_app.app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def invoke(*arguments: str | Path, status: int = 0) -> str:
    """The output on one line."""
    return " ".join(output_of(*arguments, status=status).split())
