"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fp8kv._checks import require

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def bar(
    label: str, total: int | None, *, middle: Sequence[str] = (), last: Sequence[str] = (), **fields: Any
) -> Iterator[tuple[Progress, TaskID]]:
    """A bar and its task; `middle` and `last` are the columns before and after the times."""
    require("rich", "cli", "a progress bar")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(label), BarColumn(), MofNCompleteColumn(), *map(TextColumn, middle),
        TimeElapsedColumn(), TimeRemainingColumn(), *map(TextColumn, last),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress, progress.add_task("", total=total, **fields)
