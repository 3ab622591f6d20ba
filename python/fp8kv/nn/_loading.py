"""Scales and offsets of one attention layer in a state dict: found under all names, checked and reshaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fp8kv._checks import check_offset_values, check_scale_values
from fp8kv._dtypes import dtype_name
from fp8kv.checkpoint.names import parse_scale_name
from fp8kv.checkpoint.scales import reduce_query_scale


class LayerShape:
    """The sizes that scales and offsets may have.

    1 element; with strategies other than "tensor" also one per KV head, and with "channel", of K and V, also
    ``[num_kv_heads, head_size]``, which is the shape of offsets with every strategy.

    Attributes:
        num_scales: 1 or num_kv_heads, the scales of Q.
        channels: ``(num_kv_heads, head_size)``.
        of_scales: the shape of the scales of K and V.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int, strategy: str) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.per_head, self.per_channel = strategy != "tensor", strategy == "channel"
        self.num_scales = num_kv_heads if self.per_head else 1
        self.channels = (num_kv_heads, head_size)
        self.of_scales = self.channels if self.per_channel else (self.num_scales,)

    def fit(self, name: str, scale: Any, *, query: bool) -> Tensor:
        """`scale` as fp32 on the host: ``[num_scales]`` of Q, else of the shape `of_scales`.

        Raises:
            ValueError: it isn't a floating-point tensor, or its values are not of the right number, finite
                and above 0; the message begins with `name`.
        """
        per_channel = self.per_channel and not query
        host = _on_host(name, scale)
        if not (host.numel() in self._counts(query) or (per_channel and host.shape == self.channels)):
            raise ValueError(f"{name} must have {self._expected(query)}, got shape {list(scale.shape)}")
        if host.numel() in self._counts(query):
            host = host.reshape(-1)
        check_scale_values(name, host)
        if query:
            host = reduce_query_scale(host, self.num_kv_heads) if len(host) > self.num_scales else host
            return host.expand(self.num_scales)
        return (host.unsqueeze(1) if per_channel and host.dim() == 1 else host).expand(self.of_scales)

    def fit_offset(self, name: str, offset: Any) -> Tensor:
        """`offset` as fp32 ``[num_kv_heads, head_size]`` on the host.

        Raises:
            ValueError: it isn't a floating-point tensor of that shape, or not finite.
        """
        host = _on_host(name, offset)
        if host.shape != self.channels:
            raise ValueError(
                f"{name} must have the shape [num_kv_heads, head_size]={list(self.channels)}, those of this "
                f"rank, got {list(offset.shape)}"
            )
        check_offset_values(name, host)
        return host

    def _counts(self, query: bool) -> tuple[int, ...]:
        if not self.per_head:
            return (1,)
        return (1, self.num_kv_heads, self.num_heads) if query else (1, self.num_kv_heads)

    def _expected(self, query: bool) -> str:
        if not self.per_head:
            return '1 element with strategy "tensor"'
        heads = f"num_kv_heads={self.num_kv_heads}"
        heads = f"{heads} or num_heads={self.num_heads}" if query else heads
        channels = f", or the shape [num_kv_heads, head_size]={list(self.channels)}"
        return f"1 or {heads} elements{channels * (self.per_channel and not query)}, those of this rank"


class LayerState:
    """The scales of a layer in a state dict.

    Args:
        state_dict: names as in checkpoints, after `prefix`: whole, or from the layer or the attention on.
        prefix: keys without it are ignored.
        shape: the sizes that the scales may have.
        offsets: whether there may be offsets.

    Attributes:
        scales: "q", "k", "v" to fp32 scales of the layer's shapes, as far as present.
        offsets: "k", "v" to fp32 ``[num_kv_heads, head_size]``, as far as present.
        unknown: keys that are not scales.
        errors: a sentence for each tensor that can't be used; if there are any, nothing of this state should
            be used.
    """

    def __init__(self, state_dict: Mapping[str, Any], prefix: str, shape: LayerShape, offsets: bool = False) -> None:
        self.scales: dict[str, Tensor] = {}
        self.offsets: dict[str, Tensor] = {}
        self.unknown: list[str] = []
        self.errors: list[str] = []
        self._names: dict[str, str] = {}
        layers: set[int] = set()
        for key, tensor in state_dict.items():
            if not key.startswith(prefix):
                continue
            name = parse_relative_name(key.removeprefix(prefix))
            if name is None:
                self.unknown.append(key)
                continue
            layer, letters, kind = name
            layers.update(() if layer is None else (layer,))
            try:
                if kind == "zero_point":
                    _check_zero_point(key, tensor)
                elif kind == "offset" and not offsets:
                    raise ValueError(f"{key} must not be there without offsets=True, got an offset")
                elif kind == "offset":
                    self.offsets[letters] = shape.fit_offset(key, tensor)
                else:
                    self._add(key, letters, tensor, shape)
            except ValueError as error:
                self.errors.append(f"AttentionScales: {error}")
        if len(layers) > 1:
            numbers = ", ".join(str(layer) for layer in sorted(layers))
            self.errors = [f"AttentionScales: state_dict must hold the scales of one layer, got layers {numbers}"]

    def _add(self, key: str, letters: str, tensor: Any, shape: LayerShape) -> None:
        scale = shape.fit(key, tensor, query=letters == "q")
        for letter in letters:
            other = self.scales.get(letter)
            if other is not None and not torch.equal(other, scale):
                raise ValueError(
                    f"{key} must equal {self._names[letter]}, as both are the {letter}_scale of the layer, "
                    f"got {scale.tolist()} and {other.tolist()}"
                )
            self.scales[letter], self._names[letter] = scale, key


def parse_relative_name(name: str) -> tuple[int | None, str, str] | None:
    """`parse_scale_name` for names that may begin at the layer or the attention; the layer is None then.

    Names of offsets are those of scales with another ending; their kind is "offset".
    """
    if name.rpartition(".")[2] in ("k_offset", "v_offset"):
        found = parse_relative_name(f"{name.removesuffix('offset')}scale")
        return None if found is None else (*found[:2], "offset")
    found = parse_scale_name(name)
    if found is not None:
        return found
    for beginning in ("0.self_attn.", "0."):
        found = parse_scale_name(beginning + name)
        if found is not None:
            return None, *found[1:]
    return None


def name_below_owner(name: str, paths: Iterable[str]) -> str:
    """`name` itself if it has no owner among `paths`, or is below it."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        ancestor = "".join(f"{part}." for part in parts[:length])
        below = [path for path in paths if f"{path}.".startswith(ancestor)]
        if below:
            return name if len(below) > 1 else ".".join([below[0], *parts[length:]])
        if ancestor and parts[length - 1].isdecimal():
            break
    return name


def _check_zero_point(key: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        raise ValueError(f"{key} must be a tensor, got {_kind(tensor)}")
    values = tensor.detach().to("cpu", torch.float32).flatten()
    if values.ne(0).any():
        raise ValueError(f"{key} must be 0, as FP8 caches are symmetric, got {values[values != 0][0].item():g}")


def _on_host(name: str, x: Any) -> Tensor:
    """float32."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta):
        raise ValueError(f"{name} must be a floating-point tensor, got {_kind(x)}")
    return x.detach().to("cpu", torch.float32)


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "one on the meta device" if value.is_meta else dtype_name(value.dtype)
