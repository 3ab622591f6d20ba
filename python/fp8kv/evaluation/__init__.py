"""The effect of a KV cache of 8 bits on a language model: perplexity, divergence from 16 bits, memory, speed.

Described in docs/evaluation.md. Used by `fp8kv eval` and `fp8kv demo`.

Example:
    >>> import torch
    >>> from fp8kv.evaluation import compare
    >>> logits = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    >>> compare(logits, logits, torch.tensor([1, 2])).agreeing
    2
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8kv.calibration import calibrate_several
from fp8kv.calibration._formats import Choice
from fp8kv.calibration._model_reader import cache_argument
from fp8kv.calibration.texts import beginning, token_ids, windows_at
from fp8kv.checkpoint import KVCacheScheme, KVScales, LayerScales
from fp8kv.checkpoint.scales import mapped
from fp8kv.evaluation._pictures import plot_evaluation as plot
from fp8kv.evaluation._results import REFERENCE, Evaluation, Row, table
from fp8kv.nn import AttentionScales

__all__ = [
    "AUTO",
    "CACHES",
    "CHOICES",
    "DECODED_TOKENS",
    "INT8_PER_TOKEN_HEAD",
    "ON_THE_FLY",
    "PER_CHANNEL",
    "PER_HEAD",
    "PER_TENSOR",
    "PER_TOKEN_HEAD",
    "REFERENCE",
    "TRANSFORMERS_FP8",
    "CacheFactory",
    "Comparison",
    "Evaluation",
    "Row",
    "caches",
    "calibrated",
    "compare",
    "decode",
    "evaluate",
    "on_the_fly",
    "per_tensor",
    "plot",
    "prefill",
    "step_times",
    "table",
    "windows_of",
]

#: Creates a cache for the given number of tokens.
CacheFactory = Callable[[int], Any]

PER_TENSOR, PER_HEAD, ON_THE_FLY = "e4m3 per tensor", "e4m3 per head", "e4m3 on the fly"
PER_TOKEN_HEAD, INT8_PER_TOKEN_HEAD = "e4m3 per token-head", "int8 per token-head"
PER_CHANNEL, AUTO = "int8 per channel", "auto"
#: What calibration finds for these rows in one pass; None: the best for each layer.
CHOICES: dict[str, Choice | None] = {
    PER_HEAD: Choice("fp8", "attn_head"),
    "e4m3 per head, offset of K": Choice("fp8", "attn_head", "mean"),
    "int8 per head": Choice("int8", "attn_head"),
    PER_CHANNEL: Choice("int8", "channel"),
    "int8 per channel, offset of K": Choice("int8", "channel", "mean"),
    AUTO: None,
}
#: The row that there is with Transformers 5.21 or newer, and a model whose layers all have full attention.
TRANSFORMERS_FP8 = "e4m3 of Transformers"
#: The rows, with and without scales, in the order of the table.
CACHES = (
    REFERENCE, "e4m3 scale 1.0", PER_TENSOR, PER_HEAD, "e4m3 per head, offset of K", PER_TOKEN_HEAD,
    ON_THE_FLY, "e5m2 scale 1.0", TRANSFORMERS_FP8, "int8 per head", PER_CHANNEL,
    "int8 per channel, offset of K", INT8_PER_TOKEN_HEAD, AUTO,
)  # fmt: skip
DECODED_TOKENS = 16
_CHUNK = 128  # positions whose logits are in float32 at a time


class Comparison(NamedTuple):
    """Sums over the positions of a window."""

    nll: float
    kl: float
    agreeing: int

    def plus(self, other: Comparison) -> Comparison:
        """The sums over the positions of both."""
        return Comparison(self.nll + other.nll, self.kl + other.kl, self.agreeing + other.agreeing)


# Measuring


def evaluate(
    model: Any,
    windows: Tensor,
    caches: Mapping[str, CacheFactory],
    *,
    decoded_tokens: int = DECODED_TOKENS,
    progress: Callable[[str], object] = lambda what: None,
) -> list[Row]:
    """Runs the model on every window once per cache, and compares all caches with the first.

    Args:
        model: a causal language model of `transformers`, in eval mode.
        windows: its tokens, ``[num_windows, window]``.
        caches: by name; the first is the baseline.
        decoded_tokens: number of tokens to decode after the first window, to measure speed; at least 1.
        progress: called before each run with its cache's name, ``len(windows) * len(caches)`` times.

    Returns:
        One row per cache, in the same order.

    Raises:
        ValueError: there is no cache, no window, or a window has less than two tokens.
    """
    if not caches or windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            "evaluate: windows must be [num_windows, window] with at least two tokens, and caches not empty, "
            f"got {list(windows.shape)} and {len(caches)} caches"
        )
    num_windows, size = windows.shape
    sums = {name: Comparison(0.0, 0.0, 0) for name in caches}
    speed: dict[str, float] = {}
    nbytes: dict[str, int] = {}
    with torch.no_grad():
        for number, window in enumerate(windows.to(model.device)):
            expected: Tensor | None = None
            for name, make in caches.items():
                progress(name)
                cache = make(size + decoded_tokens)
                logits = _run(model, window[None], cache)[0]
                expected = logits if expected is None else expected
                found = compare(expected, logits, window[1:])
                sums[name] = sums[name].plus(found)
                if number == 0:
                    _, seconds = decode(model, logits[-1].argmax(), cache, decoded_tokens)
                    speed[name], nbytes[name] = decoded_tokens / seconds, cache.nbytes
    count = num_windows * size
    return [
        Row(
            name,
            _exp(total.nll / (count - num_windows)),
            max(0.0, total.kl / count),  # rounding errors alone may be negative
            total.agreeing / count,
            nbytes[name],
            speed[name],
        )
        for name, total in sums.items()
    ]


def compare(expected: Tensor, logits: Tensor, labels: Tensor) -> Comparison:
    """Compares `logits` with the `expected` ones, both ``[positions, vocabulary]``, in float32.

    Args:
        labels: the token after each position; there may be fewer if the last ones are unknown.
    """
    nll = kl = 0.0
    agreeing = 0
    for start in range(0, len(logits), _CHUNK):
        here = slice(start, start + _CHUNK)
        p, q = (x[here].float().log_softmax(-1) for x in (expected, logits))
        known = labels[here]
        nll -= q[: len(known)].gather(1, known[:, None]).double().sum().item()
        if logits is expected:
            agreeing += len(q)
            continue
        kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Comparison(nll, kl, agreeing)


def prefill(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Puts ``ids`` ``[1, tokens]`` into the cache, and returns the most likely next token."""
    with torch.no_grad():
        return _run(model, ids, cache)[0, -1].argmax()


def decode(model: Any, token: Tensor, cache: Any, num_tokens: int) -> tuple[list[int], float]:
    """Decodes greedily, one token at a time.

    Args:
        token: the first token, which is not in the cache yet.
        cache: holds the tokens before it, and `num_tokens` more afterwards.

    Returns:
        The first token and the following ones, `num_tokens + 1` in total, and the seconds taken.
    """
    tokens = [token]
    with torch.no_grad():
        _wait(model)
        start = time.perf_counter()
        for _ in range(num_tokens):
            tokens.append(_run(model, tokens[-1].view(1, 1), cache)[0, -1].argmax())
        _wait(model)
        return [int(x) for x in tokens], time.perf_counter() - start


def step_times(
    model: Any, ids: Tensor, caches: Mapping[str, CacheFactory], num_tokens: int, rounds: int = 1
) -> dict[str, list[float]]:
    """Times steps of greedy decoding with each cache, in turns, so that what else the machine does hits all.

    Args:
        ids: the prompt, ``[1, tokens]``.
        num_tokens: to be decoded in a round; its first two steps are not counted.
        rounds: how often to start over.

    Returns:
        Seconds by cache, ``rounds * (num_tokens - 2)`` each.
    """
    names = list(caches)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        made = {name: caches[name](ids.shape[1] + num_tokens) for name in names}
        tokens = {name: prefill(model, ids, cache) for name, cache in made.items()}
        for number in range(num_tokens):
            for name in names if number % 2 else reversed(names):
                (_, token), seconds = decode(model, tokens[name], made[name], 1)
                tokens[name] = torch.tensor(token, device=ids.device)
                if number >= 2:
                    times[name].append(seconds)
    return times


def _run(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits
    return logits


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


# Inputs


def windows_of(tokenizer: Any, text: str, num_windows: int, window: int, skip: int = 0) -> Tensor:
    """The first windows of a text, consecutively: ``[num_windows, window]``.

    Args:
        tokenizer: of `transformers`. If it starts a text with a special token, every window starts with it.
        skip: number of tokens to skip at the beginning of the text.

    Raises:
        ValueError: the text is too short.
    """
    start = beginning(tokenizer, window)
    size = window - len(start)
    # This much of a long text gives enough tokens in any language; tokenizing all of it would take long.
    needed = skip + num_windows * size
    ids = token_ids(tokenizer, text[: 40 * needed])
    if len(ids) < needed:
        raise ValueError(f"the text must have at least {needed} tokens, got {len(ids)}")
    return windows_at(ids, range(skip, needed, size), start, size)


def calibrated(
    model: Any,
    calibration: Tensor,
    first: Tensor,
    names: Collection[str],
    cache_dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
) -> dict[str, KVScales]:
    """The scales that these rows need, found by running the model.

    Args:
        calibration: tokens ``[num_windows, window]`` for `fp8kv.calibrate`.
        first: tokens likewise, for the scales on the fly: the first tokens that the model sees.
        names: of `CACHES`.
        progress: whether to show bars.
    """
    scales = {}
    needed = {PER_HEAD if name == PER_TENSOR else name for name in names}
    choices = {name: choice for name, choice in CHOICES.items() if name in needed}
    if choices:
        scales = calibrate_several(model, torch.split(calibration, 1), choices, progress=progress)
    if PER_HEAD in scales:
        scales[PER_TENSOR] = per_tensor(scales[PER_HEAD])
    if ON_THE_FLY in names:
        scales[ON_THE_FLY] = on_the_fly(model, first, cache_dtype)
    return scales


def per_tensor(by_head: KVScales) -> KVScales:
    """The largest scale of the heads of each layer, equal to calibration per tensor on the same text.

    Example:
        >>> import torch
        >>> from fp8kv import KVCacheScheme, KVScales, LayerScales
        >>> from fp8kv.evaluation import per_tensor
        >>> layer = LayerScales(q=None, k=torch.tensor([0.02, 0.03]), v=torch.tensor([0.05, 0.01]))
        >>> per_tensor(KVScales({0: layer}, KVCacheScheme("attn_head")))[0].k
        tensor([0.0300])
    """
    layers = {i: mapped(layer, lambda x: x.amax().view(1)) for i, layer in by_head.items()}
    return KVScales(layers, replace(by_head.scheme, strategy="tensor"))


def on_the_fly(model: Any, first: Tensor, cache_dtype: torch.dtype = torch.bfloat16) -> KVScales:
    """Scales as an engine finds them: `fp8kv.AttentionScales` observes the first tokens, then freezes."""
    from fp8kv.evaluation._caches import ObservingCache

    attention: dict[int, AttentionScales] = {}
    with torch.no_grad():
        for window in first.to(model.device):
            _run(model, window[None], ObservingCache(model.config, cache_dtype, attention))
    for layer in attention.values():
        layer.freeze()
    layers = {i: LayerScales(q=None, k=x.k_scale, v=x.v_scale) for i, x in attention.items()}
    return KVScales(layers, KVCacheScheme("tensor", observer="static_minmax"))


def caches(
    config: Any,
    names: Iterable[str],
    scales: Mapping[str, KVScales],
    cache_dtype: torch.dtype = torch.bfloat16,
    layout: str = "NHD",
) -> dict[str, CacheFactory]:
    """Factories of the caches with these names, from `CACHES` or `scales`, as far as available.

    `TRANSFORMERS_FP8` is omitted if the version of Transformers, or the model, does not support it.

    Args:
        config: of the model.
        scales: by name.
        cache_dtype: dtype of the 16-bit cache.
        layout: "NHD" or "HND", for the caches of 8 bits.
    """
    from fp8kv.evaluation._caches import Cache8, Cache16, TransformersCache8

    def quantized(scales: Any, dtype: str | None = None) -> CacheFactory:
        return lambda size: Cache8(config, cache_dtype, scales, dtype=dtype, layout=layout, max_cache_len=size)

    made: dict[str, CacheFactory] = {
        REFERENCE: lambda size: Cache16(config, cache_dtype),
        "e4m3 scale 1.0": quantized(None),
        PER_TOKEN_HEAD: quantized("dynamic"),
        INT8_PER_TOKEN_HEAD: quantized("dynamic", "int8"),
        "e5m2 scale 1.0": quantized(None, "fp8_e5m2"),
    }
    made |= {name: quantized(of_name) for name, of_name in scales.items()}
    with suppress(ValueError):
        TransformersCache8(config, cache_dtype)
        made[TRANSFORMERS_FP8] = lambda size: TransformersCache8(config, cache_dtype)
    return {name: made[name] for name in names if name in made or name != TRANSFORMERS_FP8}
