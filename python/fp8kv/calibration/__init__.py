"""Calibration: scales for K, V and Q of a Hugging Face causal language model, from sample text.

Observers are defined in `fp8kv.calibration.observers`; docs/calibration.md explains which one to use, and how
much text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fp8kv._checks import WITHOUT_KEYS, Strategy, is_number, require
from fp8kv._dtypes import DEFAULT_FORMAT
from fp8kv.calibration import _progress
from fp8kv.calibration._chooser import Chooser
from fp8kv.calibration._formats import (
    AUTO,
    Choice,
    Wanted,
    check_wanted,
    layer_scales,
    scale_of_queries,
)
from fp8kv.calibration._model_reader import Wrapper, latent_sizes, reading, seeing_queries
from fp8kv.calibration._recorder import Recorder, all_ranks, is_distributed, is_first_rank
from fp8kv.calibration.observers import ChannelObserver, Observer, check_observer, make_observer
from fp8kv.calibration.texts import beginning, token_ids, windows_at
from fp8kv.checkpoint.scales import KVScales
from fp8kv.checkpoint.scheme import KVCacheScheme

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["calibrate", "share", "text_batches"]

T = TypeVar("T")
#: The observer of scales per channel.
_MINMAX = "static_minmax"


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    strategy: Strategy | None = None,
    observer: str = "static_minmax",
    query: bool = False,
    percentile: float = 99.99,
    dtype: str = "fp8",
    offset: str = "none",
    headroom: float = 1.0,
    group: ProcessGroup | None = None,
    progress: bool | Callable[[int, int | None], object] | None = None,
) -> KVScales:
    """Finds scales for the KV cache of a causal language model of `transformers`.

    The model reads all batches; K and V are observed as its cache receives them, after RoPE and all norms.
    For latent attention (DeepSeek's MLA), the row that engines cache is observed, the latent and the RoPE
    part: K and V have the same scale. NaN and infinite elements are ignored, with a warning. A head of zeros
    gets the smallest scale, ``1 / (448 * 512)`` in FP8. The cache keeps nothing, except for models that read
    the layers of their cache, and the model is restored afterwards.

    When `torch.distributed` is initialized, all ranks must call this, each with its share of the batches
    (`share`), which may be empty; all get the same scales, found from all batches. Tensor-parallel ranks must
    read the same batches, and support only FP8 scales per tensor.

    With ``dtype="auto"``, each layer gets the format, strategy and offsets with which its attention output is
    closest to that of 16 bits: FP8 with scales per head, or INT8 with scales per channel, either without
    offsets, with those of K, or with those of K and V. Whole batches are held out for that, at least a
    quarter of the tokens: scales of the others are compared on them, in a second pass over those. The final
    scales come from all tokens. From a single batch, scales are compared on what they were found from.

    Args:
        model: a causal language model of `transformers`, on one device or distributed by `accelerate`.
        batches: token ids ``[B, N]`` or ``[N]``, or the output of a tokenizer, with ``input_ids`` and
            optionally ``attention_mask``; any number, of any lengths. Padding does not affect the scales.
        strategy: "tensor", "attn_head" or "channel": one scale per layer, one per KV head, or one per channel
            of K and V, for each of K, V and Q, which has scales per head with the last. May be None with
            `dtype` "auto", which chooses it.
        observer: "static_minmax", "percentile" or "mse"; see `fp8kv.calibration.observers`. The others find
            plain FP8 scales only.
        query: whether to find scales for queries, one per group of heads that share a KV head.
        percentile: for the observer of that name.
        dtype: "fp8" or "fp8_e4m3", "fp8_e5m2", "int8", or "auto".
        offset: what is subtracted from each channel of K and V before it is quantized: "none"; "mean", its
            mean; "mid", the middle of its range.
        headroom: a factor of all scales: their range, as a multiple of the observed one.
        group: the ranks that work together; None: all of them.
        progress: True shows a bar on stderr, in the first rank; a function is called after each batch with
            the number of finished batches, and the total or None if it is unknown.

    Returns:
        The scales of all layers that have a cache, on the CPU.

    Raises:
        ValueError: an argument doesn't fit, or there is no token in any batch.
        RuntimeError: the model's attention doesn't use a cache, or another rank failed.
        ImportError: `transformers` is not installed.

    Example:
        >>> import torch, fp8kv
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> batches = [torch.randint(100, (2, 16)) for _ in range(3)]
        >>> scales = fp8kv.calibrate(model, batches, strategy="attn_head")
        >>> len(scales), scales[0].k.shape
        (2, torch.Size([2]))
        >>> int8 = fp8kv.calibrate(model, batches, strategy="channel", dtype="int8", offset="mean")
        >>> int8[0].k.shape, int8[0].k_offset.shape
        (torch.Size([2, 16]), torch.Size([2, 16]))
    """
    wanted = Wanted(strategy, dtype, offset, headroom)

    def make(letter: str, num_heads: int, head_size: int, device: torch.device) -> Observer:
        if wanted.is_plain or letter == "q":
            return make_observer(observer, num_heads, percentile=percentile, device=device)
        return ChannelObserver(num_heads, head_size, device)

    per_head = ("" if wanted.is_plain else "kv") + ("" if strategy == "tensor" else "kvq")
    recorder = Recorder(make, per_head=per_head, holds_out=dtype == AUTO)
    first = is_first_rank(group)
    shown = progress if first or progress is not True else None
    with all_ranks(recorder, group):
        check_wanted(wanted, observer)
        _check_arguments(model, batches, wanted, observer, percentile, query)
        kept = _observe(model, recorder, batches, seeing_queries(recorder) if query else None, shown)
    _check_what_was_seen(recorder, model, query)
    if first:
        recorder.warn_non_finite()
    if wanted.is_plain:
        scheme = KVCacheScheme(strategy, quantizes_query=query, observer=observer)  # type: ignore[arg-type]
        return KVScales(recorder.scales(), scheme)
    chosen = _compared(model, recorder, wanted, kept, group)
    return _scales_of_channels(recorder, wanted, chosen, query)


def calibrate_several(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    choices: Mapping[str, Choice | None],
    *,
    progress: bool = False,
) -> dict[str, KVScales]:
    """Scales of several kinds from one pass over the batches, for comparisons; for one process.

    Args:
        model: as for `calibrate`.
        batches: likewise.
        choices: by any name, what all layers are to have; None: what `calibrate` finds with "auto".
        progress: whether to show a bar.
    """
    holds_out = None in choices.values()
    recorder = Recorder(
        lambda letter, *sizes: ChannelObserver(*sizes), per_head="kv", holds_out=holds_out
    )  # fmt: skip
    auto = Wanted(None, AUTO, "none", 1.0)
    kind = auto if holds_out else Wanted("attn_head", "fp8", "none", 1.0)
    _check_arguments(model, batches, kind, _MINMAX, 100, False)
    kept = _observe(model, recorder, batches, None, progress)
    _check_what_was_seen(recorder, model, False)
    found = {}
    for name, choice in choices.items():
        wanted = auto if choice is None else Wanted(choice.strategy, choice.dtype, choice.k_offset, 1.0)
        chosen = (
            _compared(model, recorder, auto, kept, None)
            if choice is None
            else dict.fromkeys(recorder.observers, (choice, None))
        )
        found[name] = _scales_of_channels(recorder, wanted, chosen, False)
    return found


def _observe(
    model: nn.Module,
    recorder: Recorder,
    batches: Iterable[Tensor | Mapping[str, Any]],
    attention: Wrapper | None,
    progress: bool | Callable[[int, int | None], object] | None,
) -> list[Any]:
    """Reads all batches; those that were held out."""
    held_out = []
    with _reporting(progress, batches) as report, reading(model, recorder, attention) as read:
        for batch in batches:
            num_tokens = read(batch)
            report(num_tokens)
            if num_tokens and recorder.is_held_out:
                held_out.append(batch)
    return held_out


def _compared(
    model: nn.Module, recorder: Recorder, wanted: Wanted, batches: list[Any], group: ProcessGroup | None
) -> dict[int, tuple[Choice, float | None]]:
    """By layer, the choice with the least error on `batches`, and that error; or the only choice."""
    choices = wanted.choices()
    if len(choices) == 1:
        return dict.fromkeys(recorder.observers, (choices[0], None))
    candidates = {}
    for layer in recorder.observers:
        k, v = (recorder.channels(layer, letter, held_out=False) for letter in "kv")
        candidates[layer] = [layer_scales(choice, k, v, wanted.headroom) for choice in choices]
    chooser = Chooser(candidates)
    with all_ranks(chooser, group):
        with reading(model, chooser, chooser.wrap) as read:
            for batch in batches:
                read(batch)
        chooser.check(model)
    return {layer: (choices[place], error) for layer, (place, error) in chooser.best().items()}


def _scales_of_channels(
    recorder: Recorder,
    wanted: Wanted,
    chosen: Mapping[int, tuple[Choice, float | None]],
    query: bool,
) -> KVScales:
    """The scales of all tokens, those held out too; and FP8 scales of K and V themselves for other engines."""
    layers, standard = {}, {}
    fp8 = DEFAULT_FORMAT.cache_names[0]
    for layer, observers in recorder.observers.items():
        q = scale_of_queries(observers["q"], wanted.headroom) if query else None
        k, v = (recorder.channels(layer, letter, held_out=True) for letter in "kv")
        layers[layer] = layer_scales(chosen[layer][0], k, v, wanted.headroom, q)
        standard[layer] = layer_scales(Choice(fp8, wanted.standard), k, v, wanted.headroom, q)
    strategy: Strategy = "auto" if wanted.strategy is None or wanted.dtype == AUTO else wanted.strategy
    scheme = KVCacheScheme(strategy, quantizes_query=query, observer=_MINMAX)
    errors = {layer: error for layer, (_, error) in chosen.items() if error is not None}
    return KVScales(layers, scheme, standard=standard, errors=errors)


def text_batches(
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    num_samples: int = 128,
    seq_len: int = 1024,
    batch_size: int = 1,
) -> list[Tensor]:
    """Splits a text into windows for `calibrate`, deterministic and evenly spaced.

    Args:
        tokenizer: of `transformers`. If it starts a text with a special token, every window starts with it.
        text: one text, or several that are concatenated.
        num_samples: maximum number of windows; there are fewer if the text is short.
        seq_len: tokens per window; a shorter text becomes one shorter window.
        batch_size: windows per batch.

    Returns:
        Batches ``[batch_size, seq_len]``; the last may have fewer windows.

    Raises:
        ValueError: a number is below 1, or the text has no token.

    Example:
        >>> from fp8kv.calibration import text_batches
        >>> class Bytes:
        ...     bos_token_id = 256
        ...     def __call__(self, text, add_special_tokens=True, verbose=True):
        ...         return {"input_ids": [256] * add_special_tokens + list(text.encode())}
        >>> [batch.tolist() for batch in text_batches(Bytes(), "abcdef", num_samples=2, seq_len=3)]
        [[[256, 97, 98]], [[256, 99, 100]]]
    """
    for name, number in (("num_samples", num_samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"text_batches: {name} must be at least 1, got {number}")
    start = beginning(tokenizer, seq_len)
    ids: list[int] = []
    for part in [text] if isinstance(text, str) else text:
        ids += token_ids(tokenizer, part)
    if not ids:
        raise ValueError("text_batches: text must have at least one token, got an empty text")
    length = seq_len - len(start)
    available = max(1, len(ids) // length)
    chosen = min(num_samples, available)
    places = [i * available // chosen * length for i in range(chosen)]
    return list(torch.split(windows_at(ids, places, start, length), batch_size))


def share(batches: Iterable[T], rank: int, size: int) -> Iterable[T]:
    """The batches of one of `size` ranks: every size-th. A sequence gives a list, with a known length.

    Example:
        >>> from fp8kv.calibration import share
        >>> share([10, 11, 12, 13, 14], rank=1, size=2)
        [11, 13]
    """
    if isinstance(batches, Sequence):
        return list(batches[rank::size])
    return islice(batches, rank, None, size)


# Checks


def _check_arguments(model: nn.Module, batches: Any, wanted: Wanted, observer: str, percentile: float, query: bool) -> None:
    require("transformers", "transformers", "calibrate")
    check_observer("calibrate: observer", observer)
    if not is_number(percentile) or not 0 < percentile <= 100:
        raise ValueError(f"calibrate: percentile must be above 0 and at most 100, got {percentile!r}")
    config = getattr(model, "config", None)
    decodes = config is not None and not getattr(config, "is_encoder_decoder", False)
    if not decodes or not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"calibrate: model must be a causal language model of transformers, got {type(model).__name__}")
    if getattr(config, "model_type", None) in WITHOUT_KEYS:
        raise ValueError(f"calibrate: model must cache keys and values, got {type(model).__name__}")
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise ValueError(f"calibrate: batches must be a list or another iterable, got {type(batches).__name__}")
    if wanted.dtype == AUTO and latent_sizes(config) is not None:
        raise ValueError(
            f'calibrate: dtype must not be "{AUTO}" for {type(model).__name__}, as its attention expands the '
            "latent cache before it reads it"
        )
    if query and latent_sizes(config) is not None:
        raise ValueError(
            f"calibrate: query must be False for {type(model).__name__}, as attention that reads its latent "
            "cache quantizes other queries than the model computes, got True"
        )
    if not (wanted.is_plain and wanted.strategy == "tensor") and _is_tensor_parallel(model):
        got = f'"{wanted.strategy}"' if wanted.is_plain else "other scales"
        raise ValueError(
            'calibrate: strategy must be "tensor", and the scales plain FP8, for a model whose heads are '
            f'spread over tensor-parallel ranks, got {got}; load the model with device_map="auto" instead'
        )


def _is_tensor_parallel(model: nn.Module) -> bool:
    """Whether this process has only some of the heads; FSDP shards weights too, but computes all heads."""
    if not is_distributed():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return (getattr(model, "tp_size", None) or 1) > 1
    return any(
        isinstance(x, DTensor) and any(placement.is_shard() for placement in x.placements)
        for name, x in model.named_parameters()
        if "attn" in name or "attention" in name
    )


def _check_what_was_seen(recorder: Recorder, model: nn.Module, query: bool) -> None:
    name = type(model).__name__
    if recorder.num_tokens == 0:
        raise ValueError("calibrate: batches must have at least one token that is not padding, got none")
    if not recorder.observers:
        raise RuntimeError(f"calibrate: the layers of {name} must use a cache, but none has called it")
    if query and any("q" not in observers for observers in recorder.observers.values()):
        raise RuntimeError(
            f"calibrate: {name} must take its attention function from transformers' AttentionInterface "
            "with query=True, but not all layers do"
        )


# Progress


@contextmanager
def _reporting(
    progress: bool | Callable[[int, int | None], object] | None, batches: object
) -> Iterator[Callable[[int], object]]:
    """A function to call after each batch, with the number of its tokens."""
    try:
        total: int | None = len(batches)  # type: ignore[arg-type]
    except TypeError:
        total = None
    if progress is True:
        with _bar(total) as advance:
            yield advance
    elif callable(progress):
        done = count(1)
        yield lambda num_tokens: progress(next(done), total)
    else:
        yield lambda num_tokens: None


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[int], object]]:
    middle = ("batches", "{task.fields[num_tokens]:,} tokens")
    with _progress.bar("calibrating", total, middle=middle, num_tokens=0) as (bar, task):

        def advance(num_tokens: int) -> None:
            bar.update(task, advance=1, num_tokens=bar.tasks[0].fields["num_tokens"] + num_tokens)

        yield advance
