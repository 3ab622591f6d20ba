"""`fp8kv calibrate`: from a model on disk to a checkpoint with scales, in one process or under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from fp8kv._checks import STRATEGIES
from fp8kv.calibration import calibrate, share, text_batches
from fp8kv.calibration._formats import AUTO, OFFSETS, Wanted, check_wanted
from fp8kv.calibration._formats import DTYPES as KV_CACHE_DTYPES
from fp8kv.calibration.observers import OBSERVERS
from fp8kv.calibration.texts import reference_text
from fp8kv.checkpoint._read.config import NESTED
from fp8kv.checkpoint._write.source import Source
from fp8kv.cli._command import CommandError, check, check_count, check_option, reported
from fp8kv.cli._device import parse_device
from fp8kv.cli._models import DTYPES, check_installed, folder_of, load_model, load_tokenizer
from fp8kv.evaluation.inspection import Inspection, inspect_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from fp8kv._checks import Strategy
    from fp8kv.checkpoint import KVScales

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The arguments of the command."""

    model: str
    out: Path
    strategy: str | None
    observer: str
    percentile: float
    query: bool
    text: Path | None
    num_samples: int
    seq_len: int
    batch_size: int
    device: str
    device_map: str | None
    dtype: str
    overwrite: bool
    kv_cache_dtype: str = "fp8"
    offset: str = "none"
    headroom: float = 1.0

    @property
    def wanted(self) -> Wanted:
        """The scales; per tensor unless specified otherwise."""
        strategy = self.strategy or ("tensor" if self.kv_cache_dtype != AUTO else None)
        return Wanted(cast("Strategy | None", strategy), self.kv_cache_dtype, self.offset, self.headroom)


def run(options: Options, console: Console) -> Inspection:
    """Calibrates, saves and inspects; in all processes of torchrun, with the same outcome.

    Raises:
        CommandError: in all processes, the same.
    """
    from rich.markup import escape

    _check_device(options)
    with _processes(options.device) as processes:
        processes.together(lambda: _check_options(options))
        with console.status(escape(f"loading {options.model}")):
            folder, batches = processes.together(lambda: _prepare(options))
            model = processes.together(lambda: _load_model(options, folder, processes.device))
        windows = sum(len(batch) for batch in batches)
        console.print(f"{windows} windows of {options.seq_len} tokens", highlight=False)
        own = share(batches, processes.rank, processes.size)
        scales = processes.together(lambda: _calibrate(options, model, own))
        with console.status(escape(f"writing {options.out}")):
            return processes.together(lambda: _save(options, folder, scales), only_first=True)


# Processes


@dataclass(frozen=True)
class Processes:
    """This process under torchrun; without it, a single process."""

    rank: int
    size: int
    device: torch.device

    def together(self, action: Callable[[], T], *, only_first: bool = False) -> T:
        """The result of the action; an error in one process becomes the first one's error in all.

        With `only_first` the first process acts and the others get its result.
        """
        outcome: Any = None
        if self.rank == 0 or not only_first:
            try:
                outcome = action()
            except CommandError as error:
                outcome = error
        if self.size > 1:
            told: list[Any] = [None] * self.size
            failed = isinstance(outcome, CommandError)
            dist.all_gather_object(told, outcome if failed or only_first else None)
            errors = [x for x in told if isinstance(x, CommandError)]
            outcome = errors[0] if errors else told[0] if only_first else outcome
        if isinstance(outcome, CommandError):
            raise outcome
        result: T = outcome
        return result


@contextmanager
def _processes(device: str) -> Iterator[Processes]:
    kind, index = parse_device(device)
    own = torch.device(kind) if index is None else torch.device(kind, index)
    size, rank = _number_of_processes(), int(os.environ.get("RANK", "0"))
    if size == 1:
        yield Processes(0, 1, own)
        return
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(own)
    # Its functions have the default process group as a default argument. Imported while there is one, as
    # Transformers does when it loads a model, they would keep the group and its threads beyond its end; and
    # a thread of gloo that lets go of a tensor while the interpreter ends aborts the process.
    import_module("torch.distributed.nn.functional")
    # The first process alone copies the checkpoint, which takes longer than the usual timeout if it is large.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield Processes(rank, size, own)
    finally:
        dist.destroy_process_group()


def _number_of_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


# Steps


def _check_options(options: Options) -> None:
    """Checks everything that can be checked before loading."""
    if options.strategy is not None:
        check_option("strategy", options.strategy, STRATEGIES)
    check_option("kv-cache-dtype", options.kv_cache_dtype, KV_CACHE_DTYPES)
    for name, choices in (("offset", OFFSETS), ("observer", OBSERVERS), ("dtype", DTYPES)):
        check_option(name, getattr(options, name), choices)
    with reported("the options must fit together", (ValueError,), status=2):
        check_wanted(options.wanted, options.observer)
    for name in ("num_samples", "seq_len", "batch_size"):
        check_count(name, getattr(options, name))
    check(0 < options.percentile <= 100, f"--percentile must be in (0, 100], got {options.percentile}")
    _check_out(options)
    if options.text is not None:
        check(options.text.is_file(), f"--text must be a file, got {options.text}")
    if Path(options.model).is_dir():
        _check_model(Path(options.model), options)
    check_installed("transformers", *(("accelerate",) if options.device_map else ()))


def _check_device(options: Options) -> None:
    kind, index = parse_device(options.device)
    many = _number_of_processes() > 1
    if options.device_map is not None:
        check(options.device == "auto", "--device-map places the model itself and excludes --device")
        check(not many, "--device-map spreads a model over all GPUs and excludes torchrun")
    if kind == "cuda":
        check(
            not (many and index is not None),
            f"--device must be without a number under torchrun, got {options.device!r}",
        )
        needs = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if many else (index or 0) + 1
        found = torch.cuda.device_count()
        check(needs <= found, f"--device={options.device} needs {needs} GPUs, PyTorch finds {found}")


def _check_out(options: Options) -> None:
    out = options.out
    if out.is_dir() and any(out.iterdir()):
        check(options.overwrite, f"--output must be a new or an empty directory without --overwrite, got {out}")
        # It is replaced as a whole: refuse anything that is not a checkpoint.
        check((out / "config.json").is_file(), f"--output must be a checkpoint to be overwritten, got {out}")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    check(existing.is_dir(), f"--output must be a directory, but {existing} is a file")
    beside = out.absolute().parent if existing == out else existing
    check(os.access(beside, os.W_OK | os.X_OK), f"--output must be writable, but {beside} is not")


def _check_model(folder: Path, options: Options) -> None:
    """Checks that `KVScales.save` would make only after calibration."""
    check((folder / "config.json").is_file(), f"MODEL must have a config.json, got {folder}")
    out, model = options.out.resolve(), folder.resolve()
    check(
        model not in out.parents and out not in model.parents,
        f"--output must be a sibling of MODEL, neither in it nor around it, got {options.out}",
    )
    with reported(f"no checkpoint can be made from {folder}", (ValueError, OSError)):
        source = Source.read(folder)
        source.attention_modules()
    limits = [section.get("max_position_embeddings") for section in _sections(source.config)]
    limit = next((limit for limit in limits if limit), options.seq_len)
    check(
        options.seq_len <= limit,
        f"--seq-len must be at most {limit}, the max_position_embeddings of the model, got {options.seq_len}",
    )


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of the language model within a larger one take precedence."""
    nested = next((config[name] for name in NESTED if isinstance(config.get(name), dict)), None)
    return [config] if nested is None else [*_sections(nested), config]


def _prepare(options: Options) -> tuple[Path, list[Tensor]]:
    """The model's directory, and the batches of all processes."""
    fetched = not Path(options.model).is_dir()
    expected = f"MODEL must be a directory or the id of a model that can be fetched, got {options.model!r}"
    with reported(expected, status=2):
        folder = folder_of(options.model)
    if fetched:
        _check_model(folder, options)
    with reported(f"the tokenizer of {options.model} cannot be loaded"):
        tokenizer = load_tokenizer(folder)
    text = reference_text() if options.text is None else options.text.read_text(encoding="utf-8", errors="replace")
    with reported("--text cannot be read", (ValueError,), status=2):
        batches = text_batches(
            tokenizer,
            text,
            num_samples=options.num_samples,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
        )
    length = batches[0].shape[1]
    check(length == options.seq_len, f"--text must have --seq-len={options.seq_len} tokens, got {length}")
    return folder, batches


def _load_model(options: Options, folder: Path, device: torch.device) -> Any:
    with reported(f"the model {options.model} cannot be loaded"):
        model, _ = load_model(folder, options.dtype, options.device_map)
        return model if options.device_map else model.to(device)


def _calibrate(options: Options, model: Any, batches: Iterable[Tensor]) -> KVScales:
    with reported(f"{options.model} cannot be calibrated", (ValueError, RuntimeError)):
        return calibrate(
            model,
            batches,
            strategy=options.wanted.strategy,
            dtype=options.kv_cache_dtype,
            offset=options.offset,
            headroom=options.headroom,
            observer=options.observer,
            query=options.query,
            percentile=options.percentile,
            progress=True,
        )


def _save(options: Options, folder: Path, scales: KVScales) -> Inspection:
    with reported(f"{options.out} cannot be written", (ValueError, OSError)):
        scales.save(options.out, source=folder, overwrite=options.overwrite)
    return inspect_checkpoint(options.out)
