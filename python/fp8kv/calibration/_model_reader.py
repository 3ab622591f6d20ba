"""Reading texts with a Hugging Face model whose keys, values and queries are observed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fp8kv._dtypes import dtype_name
from fp8kv.calibration._recorder import Recorder

if TYPE_CHECKING:
    from transformers import Cache


#: Token ids, or the output of a tokenizer; see `fp8kv.calibrate`.
Batch: TypeAlias = "Tensor | Mapping[str, Any]"
#: An attention function of `transformers` to another one.
Wrapper: TypeAlias = "Callable[[Callable[..., Any]], Callable[..., Any]]"


class Reader(Protocol):
    """What `reading` notifies: a `Recorder`, for example."""

    def expect(self, mask: Tensor) -> None:
        """A batch with this mask, bool ``[B, N]``, comes next."""

    def forget_batch(self) -> None:
        """The batch, the first one, will be repeated."""

    def keys_and_values(self, layer: int, key: Tensor, value: Tensor) -> None:
        """``[B, num_kv_heads, N, head_size]``."""


@contextmanager
def reading(model: Any, recorder: Reader, attention: Wrapper | None = None) -> Iterator[Callable[[Batch], int]]:
    """A function that runs the model on a batch and returns the number of tokens that are not padding.

    Args:
        model: a causal language model of `transformers`, restored afterwards.
        recorder: notified of each batch; observes the keys and values of its tokens in every layer.
        attention: makes an attention function from the model's; None: the model's is left alone.
    """
    device = _input_device(model)
    num_embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    keeps = False  # until the model turns out to read cached tokens

    def read(batch: Batch) -> int:
        nonlocal keeps
        ids, mask = _tokens(batch, num_embeddings)
        if ids.numel():
            try:
                observe(ids, mask)
            except _CacheIsReadError:
                recorder.forget_batch()
                keeps = True
                observe(ids, mask)
        return int(mask.sum())

    def observe(ids: Tensor, mask: Tensor) -> None:
        recorder.expect(mask)
        cache = _recording_cache(model, recorder, keeps=keeps)
        model(**_inputs(model, ids.to(device), mask.to(device), cache))

    # Not inference_mode: buffers computed in a forward pass could not be used for training later.
    with _evaluating(model), torch.no_grad(), nullcontext() if attention is None else _wrapped(attention):
        yield read


def cache_argument(model: Any) -> str:
    """The name of the model's cache argument; older versions of transformers know only the second."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _inputs(model: Any, ids: Tensor, mask: Tensor, cache: Cache) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    inputs = {"input_ids": ids, cache_argument(model): cache, "use_cache": True}
    if not mask.all():
        inputs["attention_mask"] = mask.long()
        if "position_ids" in parameters:
            # The positions that tokens have without padding, as in `generate`: K and Q depend on them.
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if "logits_to_keep" in parameters:  # for all tokens, they would take more memory than everything else
        inputs["logits_to_keep"] = 1
    return inputs


def _tokens(batch: Batch, num_embeddings: int | None) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, N]`` of a batch, without rows of padding only."""
    mask = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ValueError(f"calibrate: batches must have input_ids, got the keys {sorted(batch)}")
        ids, mask = _integers("input_ids", batch["input_ids"]), batch.get("attention_mask")
    else:
        ids = _integers("batches", batch)
    mask = torch.ones_like(ids) if mask is None else _integers("attention_mask", mask).to(ids.device)
    if mask.shape != ids.shape:
        raise ValueError(
            f"calibrate: attention_mask must have the shape {list(ids.shape)} of input_ids, got {list(mask.shape)}"
        )
    # On a GPU, an id out of range would abort the process.
    limit = torch.iinfo(ids.dtype).max if num_embeddings is None else num_embeddings
    unknown = ids[(ids < 0) | (ids >= limit)]
    if unknown.numel():
        raise ValueError(f"calibrate: input_ids must be from 0 to {limit - 1}, got {int(unknown[0])}")
    rows = (mask != 0).any(1)
    return ids[rows], mask[rows] != 0


def _integers(name: str, values: Any) -> Tensor:
    """int64 ``[B, N]``."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"calibrate: {name} must be tensors or lists of one length, got {type(values).__name__} {str(values)[:40]!r}"
        ) from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"calibrate: {name} must be integers, got {dtype_name(tensor.dtype)}")
    if tensor.dim() not in (1, 2):
        raise ValueError(f"calibrate: {name} must have the shape [B, N] or [N], got {list(tensor.shape)}")
    return tensor.reshape(-1, tensor.shape[-1]).long() if tensor.numel() else tensor.new_zeros(0, 0).long()


def _input_device(model: Any) -> torch.device:
    embeddings = model.get_input_embeddings()
    # accelerate holds offloaded weights on the device "meta" and moves them when they are needed.
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    device = next(embeddings.parameters()).device if device is None else torch.device(device)
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; the mode of every module is restored."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class _CacheIsReadError(Exception):
    """The model reads keys or values that the cache did not keep."""


def _recording_cache(model: Any, recorder: Reader, *, keeps: bool) -> Cache:
    """A cache for the model's kinds of layers that passes its inputs to the recorder.

    It stores nothing, to save memory, except for models that read the layers of their cache.
    """
    from transformers import DynamicCache

    base: Any = _cache_class(model)
    latent = latent_sizes(model.config)

    class RecordingCache(base):  # type: ignore[misc]
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            seen = key_states, value_states
            if latent is not None and _is_latent(model, layer_idx, *seen, *latent):
                seen = (torch.cat(seen, -1),) * 2
            recorder.keys_and_values(layer_idx, *seen)
            if keeps:
                super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return key_states, value_states

    cache: Cache = RecordingCache(config=model.config) if base is DynamicCache else RecordingCache()
    if not keeps:
        for layer in cache.layers:
            _refuse_reads(layer)
    return cache


def _cache_class(model: Any) -> type[Cache]:
    """The class of caches that a model takes: `DynamicCache`, or a subclass defined beside the model, as of MiniMax."""
    from transformers import DynamicCache

    if getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return DynamicCache
    names = dict.fromkeys(kind.__module__ for kind in type(model).__mro__)
    classes = (x for name in names for x in vars(sys.modules[name]).values() if isinstance(x, type) and x.__module__ == name)
    return next((x for x in classes if issubclass(x, DynamicCache)), DynamicCache)


def latent_sizes(config: Any) -> tuple[int, int] | None:
    """Elements of the latent and of the RoPE part in a row of a latent cache; None without latent attention.

    Models of `transformers` cache the two as a key and a value of one head; engines as one row, with one
    scale.
    """
    config = config.get_text_config(decoder=True)
    latent, rope = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    return None if latent is None or rope is None else (latent, rope)


def _is_latent(model: Any, layer: int, key: Tensor, value: Tensor, latent: int, rope: int) -> bool:
    """Whether these are the two parts of a latent row; the model may also have layers of other attention.

    Raises:
        RuntimeError: the model has expanded them to keys and values of all heads, which engines don't cache.
    """
    sizes = key.shape[-1], value.shape[-1]
    config = model.config.get_text_config(decoder=True)
    if sizes == (getattr(config, "qk_nope_head_dim", 0) + rope, getattr(config, "v_head_dim", None)):
        raise RuntimeError(
            f"calibrate: layer {layer} of {type(model).__name__} must give its cache the latent of {latent} "
            f"elements and the RoPE part of {rope}, as engines store them, got keys and values of {sizes[0]} "
            f"and {sizes[1]} elements for {key.shape[1]} heads"
        )
    return sizes == (latent, rope)


def _refuse_reads(layer: Any) -> None:
    """Makes the missing keys and values of a cache layer raise when they are read."""

    def refuse(self: Any) -> Tensor:
        raise _CacheIsReadError

    def ignore(self: Any, value: Any) -> None:
        """Layers set them to None."""

    fields = {name: property(refuse, ignore) for name in ("keys", "values")}
    layer.__class__ = type(type(layer).__name__, (type(layer),), fields)


def seeing_queries(recorder: Recorder) -> Wrapper:
    """Records all queries, as passed to the current attention function."""

    def wrapper(attention: Callable[..., Any]) -> Callable[..., Any]:
        def observed(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            recorder.queries(query)
            return attention(module, query, *args, **kwargs)

        return observed

    return wrapper


@contextmanager
def _wrapped(wrapper: Wrapper) -> Iterator[None]:
    """Replaces the attention function of all models.

    All models get that function from one method. Replacing it keeps the name of the implementation, on which
    other behavior of models depends, such as the form of the mask.
    """
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return wrapper(original(self, *args, **kwargs))

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]
