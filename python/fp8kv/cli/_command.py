"""How commands end early: with one sentence and an exit status."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from fp8kv._checks import listed


class CommandError(Exception):
    """Ends the command with a sentence and an exit status: 2 for wrong arguments, otherwise 1."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence, status)
        self.sentence, self.status = sentence, status


def check(condition: bool, sentence: str) -> None:
    """A `CommandError` with status 2 unless the condition holds."""
    if not condition:
        raise CommandError(sentence, 2)


def check_option(name: str, value: str, choices: Collection[str]) -> None:
    """A `CommandError` with status 2 unless the value of --name is one of the choices."""
    check(value in choices, f"--{name} must be {listed(choices)}, got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """A `CommandError` with status 2 unless the value of --name is at least this."""
    check(value >= least, f"--{name.replace('_', '-')} must be at least {least}, got {value}")


@contextmanager
def reported(what: str, errors: tuple[type[Exception], ...] = (Exception,), status: int = 1) -> Iterator[None]:
    """Turns expected errors into one sentence; a `CommandError` passes through."""
    try:
        yield
    except CommandError:
        raise
    except errors as error:
        raise CommandError(f"{what}: {reason_of(error)}", status) from error


def reason_of(error: Exception) -> str:
    """The first line of its message, or its type if there is none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
