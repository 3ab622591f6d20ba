"""How commands end early: with one sentence and an exit status."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CommandError(Exception):
    """Ends the command with a sentence and an exit status: 2 if the arguments are to blame, else 1."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence, status)
        self.sentence, self.status = sentence, status


def require(condition: bool, sentence: str) -> None:
    """A `CommandError` with status 2 unless the condition holds."""
    if not condition:
        raise CommandError(sentence, 2)


@contextmanager
def reported(
    what: str, errors: tuple[type[Exception], ...] = (Exception,), status: int = 1
) -> Iterator[None]:
    """Errors that are to be expected become one sentence; a `CommandError` has its own."""
    try:
        yield
    except CommandError:
        raise
    except errors as error:
        raise CommandError(f"{what}: {reason_of(error)}", status) from error


def chosen_device(name: str) -> tuple[str, int | None]:
    """What --device says: "cpu" or "cuda", and its number if it has one; "auto" is the GPU if there is one.

    Raises:
        CommandError: it says something else.
    """
    match = re.fullmatch(r"auto|cpu|cuda(:(?P<index>\d+))?", name)
    if match is None:
        raise CommandError(f'--device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}', 2)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu", None
    return name.partition(":")[0], None if match["index"] is None else int(match["index"])


def reason_of(error: Exception) -> str:
    """Its first line, or what it is if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
