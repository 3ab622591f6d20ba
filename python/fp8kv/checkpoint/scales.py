"""`KVScales`: the scales of all layers, and their shards for tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fp8kv._checks import STANDARD_STRATEGIES, Strategy, check_choice, check_integer, listed
from fp8kv._dtypes import (
    CACHE_DTYPES,
    DEFAULT_FORMAT,
    FORMATS,
    FP8_DTYPES,
    QUANTIZED_CACHE_NAMES,
    dtype_name,
)
from fp8kv.checkpoint._read.own_scales import OwnLayer, OwnScales
from fp8kv.checkpoint._write.checkpoint import write_checkpoint
from fp8kv.checkpoint.problems import Problem, Severity
from fp8kv.checkpoint.scheme import KVCacheScheme

#: Names in files of the tensors of a layer, where they differ.
_OWN_NAMES = {"k": "k_scale", "v": "v_scale"}


@dataclass(frozen=True, eq=False)
class LayerScales:
    """The scales of one attention layer: fp32, ``[1]`` per tensor, ``[num_kv_heads]`` per head, or for each
    channel of K and V ``[num_kv_heads, head_size]``.

    Query scales are per KV group: query heads that share a KV head share a scale, as FlashAttention-3
    requires (`reduce_query_scale`).

    Attributes:
        q: None if queries are not quantized.
        k: None only if it is missing in the checkpoint, loaded with ``on_problem="warn"``.
        v: likewise.
        k_offset: fp32 ``[num_kv_heads, head_size]``, which a cache subtracts from K; None: 0.
        v_offset: likewise, of V.
        dtype: the format that the scales were made for: "fp8", "fp8_e5m2" or "int8".

    Raises:
        ValueError: a tensor is not float32 of such a shape, or there is no such format.

    Example:
        >>> import torch
        >>> from fp8kv import LayerScales
        >>> scales = LayerScales(q=None, k=torch.ones(8), v=torch.ones(8))
        >>> scales.shard(tp_rank=1, tp_size=4).k.shape
        torch.Size([2])
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    k_offset: Tensor | None = None
    v_offset: Tensor | None = None
    dtype: str = "fp8"

    def __post_init__(self) -> None:
        check_choice("LayerScales: dtype", self.dtype, QUANTIZED_CACHE_NAMES)
        for name, x in self._tensors().items():
            if not isinstance(x, Tensor):
                raise ValueError(f"LayerScales: {name} must be None or a tensor, got {type(x).__name__}")
            sizes = {"q": (1,), "k": (1, 2), "v": (1, 2)}.get(name, (2,))
            if x.dtype != torch.float32 or x.dim() not in sizes:
                words = listed(("one", "two")[size - 1] for size in sizes)
                raise ValueError(
                    f"LayerScales: {name} must be float32 of {words} dimension{'s' * (sizes != (1,))}, "
                    f"got {dtype_name(x.dtype)} of shape {list(x.shape)}"
                )
        for letter, scale, offset in (("k", self.k, self.k_offset), ("v", self.v, self.v_offset)):
            if scale is None or offset is None:
                continue
            fits = scale.shape == offset.shape if scale.dim() == 2 else len(scale) in (1, len(offset))
            if not fits:
                raise ValueError(
                    f"LayerScales: {letter}_offset must be for the heads of {letter}, "
                    f"got shapes {list(offset.shape)} and {list(scale.shape)}"
                )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = by_letter(self) | {"k_offset": self.k_offset, "v_offset": self.v_offset}
        return {name: x for name, x in tensors.items() if x is not None}

    @property
    def is_plain(self) -> bool:
        """Whether it is FP8 (E4M3) with scales per tensor or head alone, as other engines read it."""
        per_channel = any(x is not None and x.dim() == 2 for x in (self.k, self.v))
        offsets = self.k_offset is not None or self.v_offset is not None
        return not (per_channel or offsets) and CACHE_DTYPES[self.dtype] == DEFAULT_FORMAT.dtype

    @property
    def is_fp8(self) -> bool:
        """Whether the format is one of FP8."""
        return CACHE_DTYPES[self.dtype] in FP8_DTYPES

    @property
    def strategy(self) -> str:
        """ "channel", "attn_head" or "tensor", by the shapes of the scales of K and V."""
        scales = [x for x in (self.k, self.v) if x is not None]
        if any(x.dim() == 2 for x in scales):
            return "channel"
        return "attn_head" if any(len(x) > 1 for x in scales) else "tensor"

    def standard(self, strategy: Strategy) -> LayerScales:
        """FP8 (E4M3) scales of K and V themselves, large enough for all that these scales and offsets keep.

        Args:
            strategy: "attn_head", or "tensor": one element. A scale per tensor without offsets stays one.
        """
        limit = FORMATS[CACHE_DTYPES[self.dtype]].max

        def of(scale: Tensor | None, offset: Tensor | None) -> Tensor | None:
            if scale is None:
                return None
            bound = scale.unsqueeze(-1) if scale.dim() == 1 else scale
            bound = bound * limit + (0 if offset is None else offset.abs())
            largest = bound.amax().view(1) if strategy == "tensor" else bound.amax(1)
            return largest / DEFAULT_FORMAT.max

        return LayerScales(self.q, of(self.k, self.k_offset), of(self.v, self.v_offset))

    def shard(self, tp_rank: int, tp_size: int) -> LayerScales:
        """The scales of the KV heads that a tensor-parallel rank owns; see `kv_heads_of_rank`."""

        def of_rank(x: Tensor) -> Tensor:
            # One element is the scale of the tensor, or of its only head: it applies to every rank.
            return x[kv_heads_of_rank(len(x), tp_rank, tp_size)]

        return mapped(self, of_rank)

    def to(self, device: torch.device | str) -> LayerScales:
        """The same on another device."""
        return mapped(self, lambda scale: scale.to(device))


class KVScales(Mapping[int, LayerScales]):
    """The scales of a model by layer index, as returned by `load_kv_scales` and `calibrate`.

    Args:
        layers: scales by layer index.
        scheme: from the config, or from calibration. Its strategy may be "channel", or "auto" if the layers
            were given formats and strategies of their own.
        problems: the problems found in the checkpoint.
        standard: for `save`, the scales of K and V themselves, FP8 per tensor or head, that engines read
            which know no offsets, scales per channel and INT8. None: found from `layers`, from above.
        errors: by layer, the relative error of the attention output in calibration, if it was measured.

    Example:
        >>> import torch
        >>> from fp8kv import KVCacheScheme, KVScales, LayerScales
        >>> layer = LayerScales(q=None, k=torch.full((2,), 0.02), v=torch.full((2,), 0.03))
        >>> scales = KVScales({0: layer, 1: layer}, KVCacheScheme("attn_head"))
        >>> len(scales), scales[1].k.shape
        (2, torch.Size([2]))
    """

    def __init__(
        self,
        layers: Mapping[int, LayerScales],
        scheme: KVCacheScheme,
        problems: Sequence[Problem] = (),
        *,
        standard: Mapping[int, LayerScales] | None = None,
        errors: Mapping[int, float] | None = None,
    ) -> None:
        if not isinstance(layers, Mapping):
            raise ValueError(f"KVScales: layers must be a mapping from numbers to LayerScales, got {type(layers).__name__}")
        if not isinstance(scheme, KVCacheScheme):
            raise ValueError(f"KVScales: scheme must be a KVCacheScheme, got {type(scheme).__name__}")
        self._layers = dict(sorted(layers.items()))
        self.scheme = scheme
        self.problems = list(problems)
        self.standard = None if standard is None else dict(standard)
        self.errors = dict(errors or {})

    def __getitem__(self, layer: int) -> LayerScales:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def shard(self, tp_rank: int, tp_size: int) -> KVScales:
        """The scales of a tensor-parallel rank: `LayerScales.shard` of every layer."""
        return self._each(lambda layer: layer.shard(tp_rank, tp_size))

    def to(self, device: torch.device | str) -> KVScales:
        """The same on another device."""
        return self._each(lambda layer: layer.to(device))

    def _each(self, function: Callable[[LayerScales], LayerScales]) -> KVScales:
        layers, standard = (
            None if x is None else {index: function(layer) for index, layer in x.items()} for x in (self._layers, self.standard)
        )
        return KVScales(layers or {}, self.scheme, self.problems, standard=standard, errors=self.errors)

    @property
    def is_plain(self) -> bool:
        """Whether all layers are what other engines read: FP8 (E4M3) with scales per tensor or head alone."""
        return all(layer.is_plain for layer in self.values())

    def summary(self) -> str:
        """A few lines of text: scheme, layers, heads, ranges of the scales, problems.

        If not all are FP8 with scales per tensor or head, also the formats of the layers, and the error of
        the attention output that calibration has measured.

        Example:
            >>> import torch
            >>> from fp8kv import KVCacheScheme, KVScales, LayerScales
            >>> layer = LayerScales(q=None, k=torch.tensor([0.02, 0.03]), v=torch.tensor([0.01, 0.05]))
            >>> print(KVScales({0: layer, 1: layer}, KVCacheScheme("attn_head")).summary())
            strategy attn_head, observer unknown, by compressed-tensors
            2 layers, 2 KV heads
            k: 0.02 to 0.03, median 0.02
            v: 0.01 to 0.05, median 0.01
            no problems
        """
        scheme = self.scheme
        lines = [
            f"strategy {scheme.strategy}, observer {scheme.observer or 'unknown'}, by {scheme.producer}",
            counted(len(self), "layer") + self._heads(),
            *([] if self.is_plain else self._formats()),
        ]
        for letter in "qkv":
            scales = [x for layer in self.values() if (x := by_letter(layer)[letter]) is not None]
            if scales:
                x = torch.cat([scale.flatten() for scale in scales])
                lines.append(f"{letter}: {x.min():.4g} to {x.max():.4g}, median {x.median():.4g}")
        severities = [problem.severity for problem in self.problems]
        counts = [counted(severities.count(s), s) for s in get_args(Severity) if s in severities]
        return "\n".join([*lines, ", ".join(counts) or "no problems"])

    def _formats(self) -> list[str]:
        """As in "layers 0-3, 7: int8 per channel, error 0.0021 to 0.0043"."""
        groups: dict[str, list[int]] = {}
        for index, own in self._own().layers.items():
            groups.setdefault(own.format, []).append(index)
        lines = []
        for name, layers in groups.items():
            errors = [self.errors[index] for index in layers if index in self.errors]
            ends = " to ".join(f"{x:.2g}" for x in dict.fromkeys((min(errors), max(errors)))) if errors else ""
            noun = "layer" if len(layers) == 1 else "layers"
            lines.append(f"{noun} {ranges(layers)}: {name}{ends and f', error {ends}'}")
        return lines

    def _own(self) -> OwnScales:
        """What `save` writes for this package."""
        layers = {}
        for index, layer in self.items():
            tensors = {_OWN_NAMES.get(name, name): x for name, x in layer._tensors().items() if name != "q"}
            layers[index] = OwnLayer(layer.dtype, layer.strategy, tensors, self.errors.get(index))
        return OwnScales(self.scheme.strategy, layers)

    def _standard(self) -> tuple[dict[int, dict[str, Tensor | None]], Strategy]:
        """The scales that every engine reads, by layer and letter, and their strategy."""
        strategy: Strategy = self.scheme.strategy
        if strategy not in STANDARD_STRATEGIES or not all(layer.is_fp8 for layer in self.values()):
            strategy = "attn_head"
        if self.is_plain:
            return {index: by_letter(layer) for index, layer in self.items()}, strategy
        given = self.standard or {}
        return {
            index: by_letter(given[index] if index in given else layer.standard(strategy)) for index, layer in self.items()
        }, strategy

    def _heads(self) -> str:
        """The number of heads is unknown with one scale per tensor."""
        if self.scheme.strategy == "tensor":
            return ""
        counts = {len(x) for layer in self.values() for x in (layer.k, layer.v) if x is not None}
        return f", {' or '.join(map(str, sorted(counts)))} KV heads" if counts else ""

    def save(
        self,
        checkpoint_dir: str | Path,
        source: str | Path | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Writes a complete checkpoint with these scales, in the format of llm-compressor.

        That format has FP8 scales per tensor or head. If there are others, or offsets, it gets FP8 scales per
        head of K and V themselves, which every engine reads, and a subfolder ``fp8kv`` the rest, which
        `load_kv_scales` prefers.

        All files of the source are included, without older scales. Other tensors keep their bytes, and shards
        stay the same files: scales get a new one. Scales have the model's dtype, rounded up. The new folder
        is built next to `checkpoint_dir` and replaces it atomically, so that a crash leaves either the old or
        the new one; the disk must have space for both. Under torch.distributed, only one rank should save.

        Args:
            checkpoint_dir: where to write. It may be new, empty, an earlier checkpoint of the source, or the
                source, which is then replaced.
            source: directory of the checkpoint that the scales are for, with safetensors files; not
                quantized, or quantized by compressed-tensors. None: `checkpoint_dir`.
            overwrite: replace a `checkpoint_dir` with any other contents.

        Raises:
            FileNotFoundError: a file of the source is missing.
            FileExistsError: `checkpoint_dir` holds something else.
            ValueError: the scales are not usable, or do not match the source: other layers, other numbers of
                heads or only one tensor-parallel rank; or they cannot be added to the source. A
                CheckpointError if a file of the source is corrupt.
            OSError: a file can't be read or written. Nothing has changed in any of these cases.

        Example:
            >>> import json, tempfile, torch
            >>> from pathlib import Path
            >>> from safetensors.torch import load_file, save_file
            >>> from fp8kv import KVCacheScheme, KVScales, LayerScales
            >>> folder = Path(tempfile.mkdtemp())
            >>> config = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
            >>> (folder / "config.json").write_text(json.dumps(config))
            76
            >>> save_file({"model.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)},
            ...           folder / "model.safetensors")
            >>> layer = LayerScales(q=None, k=torch.full((2,), 0.02), v=torch.full((2,), 0.03))
            >>> scales = KVScales({0: layer}, KVCacheScheme("attn_head", observer="static_minmax"))
            >>> scales.save(folder)
            >>> load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_scale"].shape
            torch.Size([2, 1, 1])
        """
        standard, strategy = self._standard()
        write_checkpoint(
            standard,
            None if self.is_plain else self._own(),
            replace(self.scheme, strategy=strategy),
            Path(checkpoint_dir),
            None if source is None else Path(source),
            overwrite=overwrite,
        )


def kv_heads_of_rank(num_kv_heads: int, tp_rank: int, tp_size: int) -> slice:
    """The KV heads that a tensor-parallel rank owns.

    With at least as many heads as ranks, each owns the same number of adjacent heads; otherwise heads are
    replicated and each rank owns one, shared with its neighbors.

    Raises:
        ValueError: the rank is not below the size, or neither number divides the other.

    Example:
        >>> from fp8kv.checkpoint import kv_heads_of_rank
        >>> kv_heads_of_rank(8, tp_rank=1, tp_size=4), kv_heads_of_rank(2, tp_rank=5, tp_size=8)
        (slice(2, 4, None), slice(1, 2, None))
    """
    check_rank(tp_rank, tp_size)
    if num_kv_heads % tp_size and tp_size % num_kv_heads:
        raise ValueError(f"tp_size must divide the {num_kv_heads} KV heads or be a multiple of their number, got {tp_size}")
    count = max(1, num_kv_heads // tp_size)
    first = tp_rank * num_kv_heads // tp_size
    return slice(first, first + count)


def reduce_query_scale(scale: Tensor, num_kv_heads: int) -> Tensor:
    """One query scale per KV group, the largest of its heads: ``[num_heads]`` to ``[num_kv_heads]``.

    Raises:
        ValueError: the heads are not a multiple of the KV heads.

    Example:
        >>> import torch
        >>> from fp8kv.checkpoint import reduce_query_scale
        >>> reduce_query_scale(torch.tensor([1.0, 3.0, 2.0, 0.5]), num_kv_heads=2)
        tensor([3., 2.])
    """
    if scale.numel() % num_kv_heads:
        raise ValueError(f"query scales must be a multiple of the {num_kv_heads} KV heads, got {scale.numel()}")
    return scale.reshape(num_kv_heads, -1).amax(1)


def by_letter(layer: LayerScales) -> dict[str, Tensor | None]:
    """The scales of "q", "k" and "v"."""
    return {"q": layer.q, "k": layer.k, "v": layer.v}


def mapped(layer: LayerScales, function: Callable[[Tensor], Tensor]) -> LayerScales:
    """The results of a function for each scale and offset that is present."""
    results: dict[str, Any] = {name: function(x) for name, x in layer._tensors().items()}
    return replace(layer, **results)


def check_rank(tp_rank: int, tp_size: int) -> None:
    """A `ValueError` unless there is such a tensor-parallel rank."""
    check_integer("tp_rank", tp_rank)
    check_integer("tp_size", tp_size)
    if tp_size < 1 or not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank must be from 0 to tp_size - 1, got {tp_rank} with tp_size={tp_size}")


def ranges(numbers: Iterable[int]) -> str:
    """As in "0-3, 7"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(x[0]) if len(x) == 1 else f"{x[0]}-{x[-1]}" for x in found)


def counted(number: int, noun: str) -> str:
    """As in "2 layers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
