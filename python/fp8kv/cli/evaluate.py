"""`fp8kv eval`: from a model on disk to an `Evaluation`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fp8kv import evaluation
from fp8kv._checks import LAYOUTS
from fp8kv._dtypes import dtype_name
from fp8kv.calibration import _progress
from fp8kv.calibration.texts import EVALUATION_START, reference_text
from fp8kv.checkpoint import KVScales, load_kv_scales
from fp8kv.cli import _command, _models
from fp8kv.cli._command import CommandError, check, check_count, check_option
from fp8kv.cli._device import device_name, device_of

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Options:
    """The arguments of the command."""

    model: str | None
    text: Path | None = None
    windows: int = 8
    window: int = 1024
    calibration_tokens: int = 8192
    first_tokens: int | None = None
    scales: Path | None = None
    only: str = ""
    layout: str = "NHD"
    device: str = "auto"
    dtype: str = "auto"
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Texts:
    """Tokens: ``[windows, window]`` each."""

    evaluation: Tensor
    calibration: Tensor


def run(options: Options, console: Console) -> evaluation.Evaluation:
    """Loads, calibrates and evaluates, with bars.

    Raises:
        CommandError: an argument can't be used, or the model can't.
    """
    from rich.markup import escape

    check_options(options)
    names = [name for name in (*evaluation.CACHES, *_own(options)) if options.only in name]
    if not names:
        raise CommandError(f"--only must be part of a name of a cache, got {options.only!r}", 2)
    scales = _load_scales(options)
    device = device_of(options.device)
    folder = model_folder(options, console)
    with console.status(escape(f"loading {folder}")):
        model = _models.load(folder, device, options.dtype)
    tokens = texts(options, model)
    first = tokens.evaluation[:1, : options.first_tokens]
    with reported():
        scales |= evaluation.calibrated(model.model, tokens.calibration, first, names, model.cache_dtype, progress=True)
    return measure(options, model, names, scales, tokens)


def measure(
    options: Options, model: _models.Model, names: Sequence[str], scales: dict[str, KVScales], tokens: Texts
) -> evaluation.Evaluation:
    """Evaluates these caches, and the 16-bit one, with a bar."""
    wanted = dict.fromkeys((evaluation.REFERENCE, *names))
    with reported():
        caches = evaluation.caches(model.model.config, wanted, scales, model.cache_dtype, options.layout)
        check(
            list(names) != [evaluation.TRANSFORMERS_FP8] or len(caches) > 1,
            f"--only must leave a cache that works here, got {options.only!r}: the FP8 cache of Transformers "
            "needs version 5.21 or newer and a model whose layers all have full attention",
        )
        with _bar(len(caches) * len(tokens.evaluation)) as progress:
            rows = evaluation.evaluate(model.model, tokens.evaluation, caches, progress=progress)
    return evaluation.Evaluation(
        model=model.name,
        device=device_name(str(model.model.device)),
        dtype=dtype_name(model.model.dtype),
        cache_dtype=dtype_name(model.cache_dtype),
        layout=options.layout,
        num_windows=len(tokens.evaluation),
        window=options.window,
        decoded_tokens=evaluation.DECODED_TOKENS,
        rows=rows,
    )


# Steps


def check_options(options: Options) -> None:
    """Checks everything that can be checked before loading."""
    for name, least in (("windows", 1), ("window", 2), ("calibration_tokens", 1)):
        check_count(name, getattr(options, name), least)
    first = options.first_tokens
    check(
        first is None or 1 <= first <= options.window,
        f"--first-tokens must be from 1 to --window={options.window}, got {first}",
    )
    for name, choices in (("layout", LAYOUTS), ("dtype", _models.DTYPES)):
        check_option(name, getattr(options, name), choices)
    if options.text is not None:
        check(options.text.is_file(), f"--text must be a file, got {options.text}")


def model_folder(options: Options, console: Console) -> str | Path:
    """The user's model, or the small one."""
    if options.model is not None:
        return options.model
    try:
        with console.status("preparing the model: once, in half a minute"):
            return _models.small_model(options.cache_dir)
    except CommandError as error:
        raise CommandError(f"{error.sentence}; or name a model of your own") from error


def texts(options: Options, model: _models.Model) -> Texts:
    """The tokens of evaluation and calibration, which never overlap."""
    limit = getattr(model.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = options.window + evaluation.DECODED_TOKENS
    check(
        limit is None or needed <= limit,
        f"--window must be at most {(limit or 0) - evaluation.DECODED_TOKENS}, so that it and the "
        f"{evaluation.DECODED_TOKENS} tokens decoded after it are max_position_embeddings={limit} of the "
        f"model, got {options.window}",
    )
    size = min(options.window, options.calibration_tokens)
    count = options.calibration_tokens // size
    try:
        if options.text is None:
            text, skip = reference_text(), 0
            own, other = text[EVALUATION_START:], text[:EVALUATION_START]
        else:
            own = other = options.text.read_text(encoding="utf-8", errors="replace")
            skip = options.calibration_tokens
        return Texts(
            evaluation.windows_of(model.tokenizer, own, options.windows, options.window, skip),
            evaluation.windows_of(model.tokenizer, other, count, size),
        )
    except ValueError as error:
        hint = "--text, or --windows, --window and --calibration-tokens, must be changed"
        raise CommandError(f"{hint}: {error}", 2) from error


def _own(options: Options) -> list[str]:
    """The name of the row for the user's checkpoint."""
    return [] if options.scales is None else [options.scales.absolute().name]


def _load_scales(options: Options) -> dict[str, KVScales]:
    if options.scales is None:
        return {}
    with reported("--scales cannot be used", 2):
        return {_own(options)[0]: load_kv_scales(options.scales, query=False)}


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], object]]:
    with _progress.bar("evaluating", total, last=("{task.description}",)) as (bar, task):
        started = 0

        def progress(what: str) -> None:
            nonlocal started
            bar.update(task, description=what, completed=started)
            started += 1

        yield progress
        bar.update(task, description="", completed=total)


def reported(what: str = "the model cannot be evaluated", status: int = 1) -> AbstractContextManager[None]:
    """`_command.reported` for errors that a model or a checkpoint may raise."""
    return _command.reported(what, (ValueError, OSError, RuntimeError), status)
