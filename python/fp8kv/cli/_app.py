"""The commands and their options."""

from __future__ import annotations

import json as jsonlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from fp8kv._checks import require

if TYPE_CHECKING:
    from rich.console import Console

    from fp8kv.cli.doctor import Check
    from fp8kv.evaluation.inspection import Inspection

app = typer.Typer(
    help="FP8 KV caches: find and inspect scales, evaluate models, test and benchmark this machine.",
    no_args_is_help=True,
    add_completion=False,
)

Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda" or "cuda:N"; auto uses the GPU if there is one.')]
# typer evaluates annotations, and Python 3.10 with older versions of it does not accept `Path | None` there.
OptionalPath = Optional[Path]  # noqa: UP045
MODEL_DTYPE = 'Dtype of the arithmetic: "auto", "bfloat16", "float16" or "float32"; auto: the model\'s own, on the CPU float32.'
CacheDir = Annotated[
    OptionalPath,
    typer.Option(help="Where the small model is stored. Default: FP8KV_CACHE, or ~/.cache/fp8kv."),
]


Json = Annotated[
    OptionalPath,
    typer.Option(help="Write the results as JSON to this file; without a file, or with -, to stdout alone."),
]
_STDOUT = Path("-")


def _console(json: Path | None = None) -> Console:
    """Wide enough for tables without a terminal; silent if JSON goes to stdout."""
    from rich.console import Console

    console = Console(quiet=json == _STDOUT)
    return console if console.is_terminal else Console(width=160, quiet=console.quiet)


def _write_json(path: Path | None, value: object) -> None:
    if path is None:
        return
    text = jsonlib.dumps(value, indent=1, allow_nan=False)
    if path == _STDOUT:
        typer.echo(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


@app.command()
def doctor(json: Json = None) -> None:
    """Shows what works here, with a self-test, and what would make it faster; exit status 1 on failures."""
    from fp8kv.cli import doctor as command

    _check_file("--json", json)
    console = _console(json)
    found = []
    for check in command.checks():
        mark = {True: "[green]ok  [/]", None: "[yellow]note[/]", False: "[red]FAIL[/]"}[check.ok]
        _show_check(console, mark, check)
        found.append(check)
    faster = list(command.advice())
    for check in faster:
        _show_check(console, "[cyan]tip [/]", check)
    result = command.as_dict(found, faster)
    _write_json(json, result)
    if not result["ok"]:
        raise typer.Exit(1)


def _show_check(console: Console, mark: str, check: Check) -> None:
    console.print(f"{mark} [bold]{check.name}[/]: ", end="", highlight=False)
    console.print(check.detail, markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="WHAT", help='"quantize", "cache", "decode" or "attention".')] = "quantize",
    device: Device = "auto",
    quick: Annotated[bool, typer.Option(help="Fewer shapes and repetitions.")] = False,
    only: Annotated[str, typer.Option(help='Only cases whose "name SHAPE models" matches this regular expression.')] = "",
    peers: Annotated[bool, typer.Option(help="Also measure PyTorch and, if installed, vLLM and FlashInfer.")] = False,
    peer: Annotated[str, typer.Option(help="Only peers whose name matches this regular expression.")] = "",
    warm: Annotated[bool, typer.Option(help="Keep all buffers in the GPU's L2 cache.")] = False,
    json: Json = None,
    plot: Annotated[OptionalPath, typer.Option(help="Write a chart (PNG) to this file.")] = None,
) -> None:
    """Measures every operator against a copy or a read of the same bytes in the same run."""
    from fp8kv import bench as benchmarks
    from fp8kv.cli._command import CommandError, reason_of
    from fp8kv.cli._device import device_of

    for option, path in (("--json", json), ("--plot", plot)):
        _check_file(option, path)
    console = _console(json)
    try:
        place = device_of(device)
        with console.status("...") as status:
            report = benchmarks.run(place, what, quick=quick, only=only, peers=peer or peers, warm=warm, progress=status.update)
    except CommandError as error:
        _fail(error.sentence, error.status)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except RuntimeError as error:
        _fail(f"fp8kv bench: {reason_of(error)}", 1)
    console.print(benchmarks.table(report))
    peers_found = benchmarks.peer_table(report)
    if peers_found is not None:
        console.print(peers_found)
    console.print(f"{report.against}: {report.floor}", highlight=False)
    for note, cases in report.notes.items():
        console.print(f"note: {note} ({len(cases)} cases, such as {cases[0]})", markup=False, highlight=False)
    console.print(benchmarks.host_table(report))
    _write_json(json, asdict(report))
    if plot is not None:
        benchmarks.plot(report, plot)


@app.command()
def demo(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Your model: a directory or an id. Default: SmolLM2-135M-Instruct."),
    ] = None,
    out: Annotated[OptionalPath, typer.Option(help="Keep the checkpoints in this directory.")] = None,
    plot: Annotated[OptionalPath, typer.Option(help="Write the plot (PNG) to this file.")] = Path("demo.png"),
    question: Annotated[Optional[str], typer.Option(help="Question for the model.")] = None,  # noqa: UP045
    text: Annotated[OptionalPath, typer.Option(help="A text instead of CPython's reference.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of the text to evaluate on.")] = 2,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help=MODEL_DTYPE)] = "auto",
    layout: Annotated[str, typer.Option(help='"NHD" or "HND".')] = "NHD",
    cache_dir: CacheDir = None,
) -> None:
    """Runs all steps on a real language model: calibrate, write, inspect, load, evaluate, answer."""
    from fp8kv.cli import demo as demonstration
    from fp8kv.cli import evaluate as command
    from fp8kv.cli._command import CommandError

    _check_file("--plot", plot)
    options = command.Options(
        model, text, windows, window, calibration_tokens,
        layout=layout, device=device, dtype=dtype, cache_dir=cache_dir,
    )  # fmt: skip
    try:
        demonstration.run(options, _console(), out, plot, question or demonstration.QUESTION)
    except CommandError as error:
        _fail(error.sentence, error.status)


@app.command("eval")
def eval_(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[MODEL]", help="A directory or an id. Default: SmolLM2-135M-Instruct."),
    ] = None,
    text: Annotated[OptionalPath, typer.Option(help="A text instead of CPython's reference.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of the text to evaluate on.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    first_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens for the scales on the fly. Default: the first window."),
    ] = None,
    scales: Annotated[OptionalPath, typer.Option(help="Add a row with the scales of this checkpoint.")] = None,
    only: Annotated[str, typer.Option(help="Only caches whose name contains this.")] = "",
    layout: Annotated[str, typer.Option(help='"NHD" or "HND".')] = "NHD",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help=MODEL_DTYPE)] = "auto",
    cache_dir: CacheDir = None,
    json: Json = None,
    plot: Annotated[OptionalPath, typer.Option(help="Write a plot (PNG) to this file.")] = None,
) -> None:
    """Compares FP8 KV caches with the 16-bit cache: accuracy of the model, memory and speed."""
    from fp8kv import evaluation
    from fp8kv.cli import evaluate as command
    from fp8kv.cli._command import CommandError

    for option, path in (("--json", json), ("--plot", plot)):
        _check_file(option, path)
    options = command.Options(
        model, text, windows, window, calibration_tokens, first_tokens, scales, only, layout, device, dtype,
        cache_dir,
    )  # fmt: skip
    console = _console(json)
    try:
        found = command.run(options, console)
    except CommandError as error:
        _fail(error.sentence, error.status)
    console.print(evaluation.table(found), highlight=False)
    _write_json(json, found.as_dict())
    if plot is not None:
        evaluation.plot(found, plot)


@app.command("inspect")
def inspect_(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint's directory or id, or a file with scales."),
    ],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='Which model, if there are several, such as "talker" or "encoder_attn".'),
    ] = None,
    json: Json = None,
    plot: Annotated[OptionalPath, typer.Option(help="Write a heat map (PNG) to this file.")] = None,
) -> None:
    """Shows the scales of a checkpoint and their problems; exit status 1 if one is an error."""
    from fp8kv.evaluation import inspection

    for option, path in (("--json", json), ("--plot", plot)):
        _check_file(option, path)
    try:
        found = inspection.inspect_checkpoint(checkpoint, model)
    except (OSError, ValueError) as error:
        _fail(str(error), 2)
    _write_json(json, found.as_dict())
    _show(found, _console(json))
    if plot is not None:
        inspection.plot(found, plot)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A language model: a directory or an id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory of the new checkpoint.")],
    strategy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='"tensor" (the default), "attn_head" or "channel"; "auto" formats choose it.'),
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help='"fp8", "fp8_e5m2", "int8" or "auto".')] = "fp8",
    offset: Annotated[
        str, typer.Option(help='Offsets of channels: "none", or the "mean" or the "mid" of the observed range.')
    ] = "none",
    headroom: Annotated[float, typer.Option(help="Range of the scales, as a multiple of the observed range.")] = 1.0,
    observer: Annotated[str, typer.Option(help='"static_minmax", "percentile" or "mse".')] = "static_minmax",
    percentile: Annotated[float, typer.Option(help="Percentile of the magnitudes, for that observer.")] = 99.99,
    query: Annotated[bool, typer.Option("--query", help="Also find scales for queries.")] = False,
    text: Annotated[OptionalPath, typer.Option(help="A text instead of CPython's reference.")] = None,
    num_samples: Annotated[int, typer.Option(help="Windows of the text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Windows per batch.")] = 1,
    device: Device = "auto",
    device_map: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='"auto" distributes the model over all GPUs, the CPU and the disk.'),
    ] = None,
    dtype: Annotated[str, typer.Option(help='Dtype of the model: "auto", "bfloat16", "float16" or "float32".')] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at OUTPUT.")] = False,
    plot: Annotated[OptionalPath, typer.Option(help="Write a heat map (PNG) to this file.")] = None,
) -> None:
    """Calibrates KV scales and writes a checkpoint with them; under torchrun, in several processes.

    MODEL's other files are copied unchanged.
    """
    from rich.console import Console

    from fp8kv.cli import calibrate as command
    from fp8kv.cli._command import CommandError
    from fp8kv.evaluation import inspection

    console = _console() if _is_first() else Console(quiet=True)
    _check_file("--plot", plot)
    options = command.Options(
        model, output, strategy, observer, percentile, query, text, num_samples, seq_len, batch_size, device,
        device_map, dtype, overwrite, kv_cache_dtype, offset, headroom,
    )  # fmt: skip
    try:
        found = command.run(options, console)
    except CommandError as error:
        _fail(error.sentence, error.status)
    _show(found, console)
    for line in (
        f"wrote {output}",
        f"to look at the scales: fp8kv inspect {output} --plot scales.png",
        f"to serve it with vLLM: vllm serve {output} --kv-cache-dtype fp8",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if plot is not None and _is_first():
        inspection.plot(found, plot)
    raise typer.Exit(0 if found.ok else 1)


def _show(found: Inspection, console: Console) -> None:
    from fp8kv.evaluation import inspection

    for part in inspection.report(found):
        console.print(part, highlight=False)


def _check_file(option: str, path: Path | None) -> None:
    """Fails early if the file cannot be written later."""
    if path is not None and not path.absolute().parent.is_dir():
        _fail(f"{option} must be a file in a directory that exists, got {path}", 2)
    if path is not None and option == "--plot":
        try:
            require("matplotlib", "plot", option)
        except ImportError as error:
            _fail(str(error), 1)


def _is_first() -> bool:
    """Whether this is the first process of torchrun; the others are silent."""
    return os.environ.get("RANK", "0") == "0"


def _fail(sentence: str, status: int) -> NoReturn:
    if _is_first():
        typer.echo(f"error: {sentence}", err=True)
    raise typer.Exit(status)
