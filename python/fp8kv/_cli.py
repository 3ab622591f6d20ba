"""The command line: `fp8kv` and `python -m fp8kv`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="FP8 quantization: what works here, how fast it is, and how accurate.",
    no_args_is_help=True,
    add_completion=False,
)

Device = Annotated[
    str, typer.Option(help='"auto", "cpu", "cuda" or "cuda:N"; auto takes the GPU if there is one.')
]
# typer evaluates annotations, and Python 3.10 with older versions of it does not accept `Path | None` there.
OptionalPath = Optional[Path]  # noqa: UP045


def _console() -> Console:
    """Wide enough for the tables where there is no terminal whose width counts."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def main() -> None:
    """The entry point of the command."""
    app()


@app.command()
def doctor() -> None:
    """Shows what works here, with a bit-exactness self-test; exit status 1 if something does not."""
    from fp8kv.doctor import checks

    console = _console()
    failed = False
    for check in checks():
        mark = {True: "[green]ok  [/]", None: "[yellow]note[/]", False: "[red]FAIL[/]"}[check.ok]
        console.print(f"{mark} [bold]{check.name}[/]: ", end="", highlight=False)
        console.print(check.detail, markup=False, highlight=False, soft_wrap=True)
        failed = failed or check.ok is False
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="WHAT", help='"quantize" or "cache".')] = "quantize",
    device: Device = "auto",
    quick: Annotated[bool, typer.Option(help="Few shapes, few repetitions.")] = False,
    only: Annotated[str, typer.Option(help='Only works whose "name SHAPE models" contains this.')] = "",
    peers: Annotated[
        bool, typer.Option(help="Also PyTorch eager, torch.compile and, if installed, vLLM.")
    ] = False,
    json: Annotated[OptionalPath, typer.Option(help="Write all numbers to this file.")] = None,
    plot: Annotated[OptionalPath, typer.Option(help="Write a chart (PNG) to this file.")] = None,
) -> None:
    """Measures every operator against a copy of the same bytes in the same run."""
    from fp8kv import bench as benchmarks

    console = _console()
    try:
        with console.status("...") as status:
            report = benchmarks.run(
                _device(device), what, quick=quick, only=only, peers=peers, progress=status.update
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(benchmarks.table(report))
    console.print(f"copy: {report.floor}", highlight=False)
    for note, cases in report.notes.items():
        console.print(f"note: {note} ({len(cases)} cases, such as {cases[0]})", markup=False, highlight=False)
    console.print(benchmarks.host_table(report))
    if json is not None:
        report.write_json(json)
    if plot is not None:
        benchmarks.plot(report, plot)


@app.command()
def demo(
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help='"e4m3" or "e5m2".')] = "e4m3",
    text: Annotated[OptionalPath, typer.Option(help="A text to take instead of CPython's reference.")] = None,
    plot: Annotated[OptionalPath, typer.Option(help="Write a picture (PNG) to this file.")] = None,
) -> None:
    """Quantizes real tensors in every granularity and shows what each costs in accuracy."""
    import torch

    from fp8kv import demo as demonstration

    formats = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    if dtype not in formats:
        raise typer.BadParameter(f'dtype must be "e4m3" or "e5m2", got "{dtype}"')
    console = _console()
    source = (
        demonstration.reference_text() if text is None else text.read_text(encoding="utf-8", errors="replace")
    )
    try:
        tensors = demonstration.tensors(source)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    results = []
    for name, tensor in tensors.items():
        x = tensor.to(_device(device))
        rows = demonstration.measure(name, x, formats[dtype])
        results += rows
        console.print(demonstration.table(name, x, rows, formats[dtype]))
    console.print(
        "The scale of a group is amax / max. FP8 is a floating-point format: a scale moves its range and "
        "leaves its relative precision, so granularities differ little until the values of a group span it.",
        highlight=False,
    )
    if plot is not None:
        demonstration.plot(results, plot)


def _device(name: str) -> str:
    import torch

    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
