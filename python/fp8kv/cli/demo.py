"""`fp8kv demo`: from a language model to its KV cache of 8 bits, step by step, with the numbers.

Example:
    >>> from fp8kv.cli.demo import common_prefix
    >>> common_prefix([5, 7, 9, 2], [5, 7, 8, 2])
    2
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp8kv import evaluation
from fp8kv._dtypes import dtype_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fp8kv.checkpoint import KVScales
    from fp8kv.cli._models import Model
    from fp8kv.cli.evaluate import Options

QUESTION = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 32
TIMED_ROUNDS = 2
_FOLDERS = {evaluation.PER_TENSOR: "per_tensor", evaluation.PER_HEAD: "per_head", evaluation.AUTO: "auto"}


@dataclass(frozen=True)
class Answer:
    """The answer of a model with a cache.

    Attributes:
        tokens: up to the end of the answer.
        text: the same, decoded.
        nbytes: of the cache, which has room for the question and `ANSWER_TOKENS` more.
    """

    tokens: list[int]
    text: str
    nbytes: int


def run(
    options: Options, console: Console, out: Path | None, plot: Path | None, question: str = QUESTION
) -> evaluation.Evaluation:
    """Runs all steps.

    Args:
        options: those of `fp8kv eval`.
        out: directory to keep the checkpoints in, as "per_tensor", "per_head" and "auto"; None: not kept.
        plot: the file of the plot.

    Raises:
        CommandError: of `fp8kv eval`; or a checkpoint can't be written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return _Story(options, console, Path(temporary) if out is None else out).tell(plot, question)


class _Story:
    """Runs the steps in order, each with its time."""

    def __init__(self, options: Options, console: Console, out: Path) -> None:
        self.options, self.console, self.out = options, console, out
        self.number = 0

    def tell(self, plot: Path | None, question: str) -> evaluation.Evaluation:
        from fp8kv.checkpoint import load_kv_scales
        from fp8kv.cli import _models
        from fp8kv.cli import evaluate as command
        from fp8kv.cli._device import device_name, device_of
        from fp8kv.evaluation import inspection

        start = time.perf_counter()
        command.check_options(self.options)
        device = device_of(self.options.device)
        with self.step("A language model"):
            folder = command.model_folder(self.options, self.console)
            model = _models.load(folder, device, self.options.dtype)
            tokens = command.texts(self.options, model)
            self.say(
                f"{model.name}: {model.model.num_parameters() / 1e6:.0f} million parameters, "
                f"{dtype_name(model.model.dtype)} arithmetic on {device_name(device)}"
            )
        with self.step(f"Calibration: scales from {tokens.calibration.numel()} tokens of text"):
            first = tokens.evaluation[:1, : self.options.first_tokens]
            with command.reported():
                made = evaluation.calibrated(
                    model.model,
                    tokens.calibration,
                    first,
                    evaluation.CACHES,
                    model.cache_dtype,
                    progress=True,
                )
        with (
            self.step("Checkpoints with these scales, as llm-compressor writes them"),
            command.reported("a checkpoint cannot be written"),
        ):
            for name, below in _FOLDERS.items():
                made[name].save(self.out / below, source=folder)
                self.say(f"{name}: {self.out / below}")
        with self.step("What was chosen for each layer, and what other engines read: fp8kv inspect"):
            found = inspection.inspect_checkpoint(self.out / _FOLDERS[evaluation.AUTO])
            for part in inspection.report(found):
                self.console.print(part, highlight=False)
        with self.step("Loaded back, and compared with other caches: fp8kv eval"):
            for name, below in _FOLDERS.items():
                made[name] = load_kv_scales(self.out / below)
            result = command.measure(self.options, model, evaluation.CACHES, made, tokens)
            self.console.print(evaluation.table(result), highlight=False)
        with self.step("An answer with both caches"):
            self.answers(model, made, question)
        with self.step("Decoding: 16 bits, and bytes that attention reads directly"):
            self.speed(model, made, tokens.evaluation[:1])
        if plot is not None:
            evaluation.plot(result, plot, found)
            self.say(f"picture: {plot}")
        self.say(f"all in all: {time.perf_counter() - start:.0f} s")
        return result

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        from rich.markup import escape

        self.number += 1
        self.console.print(f"\n[bold]{self.number}. {escape(title)}[/]", highlight=False)
        start = time.perf_counter()
        yield
        self.console.print(f"[dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def answers(self, model: Model, scales: dict[str, KVScales], question: str) -> None:
        names = (evaluation.REFERENCE, evaluation.PER_HEAD)
        caches = evaluation.caches(model.model.config, names, scales, model.cache_dtype, self.options.layout)
        self.say(f"question: {question}")
        both = [answer(model, make, question) for make in caches.values()]
        for name, one in zip(names, both, strict=True):
            self.say(f"{name}, {one.nbytes / 2**20:.3g} MiB: {one.text}")
        expected, found = (one.tokens for one in both)
        same = common_prefix(expected, found)
        which = f"All {same}" if expected == found else f"The first {same}"
        self.say(f"{which} tokens are the same, with {both[1].nbytes / both[0].nbytes:.1%} of the memory.")

    def speed(self, model: Model, scales: dict[str, KVScales], prompt: Tensor) -> None:
        """Converts the model to the dtype of the checkpoint, in which Transformers' cache has 16 bits."""
        model.model.to(model.cache_dtype)
        prompt = prompt.to(model.model.device)
        names = (
            evaluation.REFERENCE, evaluation.PER_HEAD, evaluation.PER_TOKEN_HEAD, evaluation.PER_CHANNEL,
        )  # fmt: skip
        caches = evaluation.caches(model.model.config, names, scales, model.cache_dtype, self.options.layout)
        times = evaluation.step_times(model.model, prompt, caches, evaluation.DECODED_TOKENS, rounds=TIMED_ROUNDS)
        self.console.print(_times_table(times), highlight=False)
        device = model.model.device
        machine = (
            torch.cuda.get_device_name(device) + ", not compiled, so that the host limits small models"
            if device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        self.say(
            f"{dtype_name(model.cache_dtype)} arithmetic, {prompt.shape[1]} tokens before, {machine}, the caches in turns."
        )


def _times_table(times: dict[str, list[float]]) -> Table:
    from rich.table import Table

    result = Table("KV cache")
    for column in ("median of a step, ms", "of 16-bit", "best, ms", "of 16-bit"):
        result.add_column(column, justify="right")
    reference = times[evaluation.REFERENCE]
    for name, own in times.items():
        cells = []
        for figure in (median, min):
            cells += [f"{1e3 * figure(own):.1f}", f"{figure(own) / figure(reference):.0%}"]
        result.add_row(name, *cells)
    return result


def answer(model: Model, make_cache: evaluation.CacheFactory, question: str) -> Answer:
    """Greedy, at most `ANSWER_TOKENS` long."""
    ids = _prompt(model.tokenizer, question).to(model.model.device)
    cache = make_cache(ids.shape[1] + ANSWER_TOKENS)
    first = evaluation.prefill(model.model, ids, cache)
    tokens, _ = evaluation.decode(model.model, first, cache, ANSWER_TOKENS)
    ends = _ends(model)
    end = next((i for i, token in enumerate(tokens) if token in ends), ANSWER_TOKENS)
    text = model.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
    return Answer(tokens[:end], text, cache.nbytes)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of equal tokens before the first difference."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _prompt(tokenizer: Any, question: str) -> Tensor:
    """``[1, tokens]``."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": question}]
        question = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(question)["input_ids"]
    return torch.tensor([ids])


def _ends(model: Model) -> set[int]:
    ends = model.model.generation_config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, list) else [ends])
