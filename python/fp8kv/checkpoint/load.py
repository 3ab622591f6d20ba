"""`load_kv_scales`: loads and checks the scales of a checkpoint, for one tensor-parallel rank.

`examine`, shared by loading and auditing, reads and checks everything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8kv._checks import Strategy, listed
from fp8kv._dtypes import CACHE_DTYPES, FP8_DTYPES
from fp8kv.checkpoint._audit import presence
from fp8kv.checkpoint._audit.values import check_values
from fp8kv.checkpoint._read.affine import Biases, read_biases
from fp8kv.checkpoint._read.config import MISTRAL_FILE, read_configs, section_of_model
from fp8kv.checkpoint._read.files import files_beside
from fp8kv.checkpoint._read.inventory import Entry, Key, Models, ModelTensors, choose_model, take_inventory
from fp8kv.checkpoint._read.json_scales import read_json_scales
from fp8kv.checkpoint._read.layers import Heads, Layers, layers_of_config, with_counts, with_tensors
from fp8kv.checkpoint._read.locate import locate
from fp8kv.checkpoint._read.own_scales import (
    FOLDER,
    OwnLayer,
    OwnScales,
    digest_of,
    has_own_scales,
    read_own_scales,
    tensor_name,
)
from fp8kv.checkpoint._read.quantization import Statement
from fp8kv.checkpoint._read.scales import StoredScales, read_scales
from fp8kv.checkpoint.problems import ACCEPTABLE, CheckpointError, Problem, make_problem
from fp8kv.checkpoint.scales import (
    KVScales,
    LayerScales,
    check_rank,
    counted,
    kv_heads_of_rank,
    reduce_query_scale,
)
from fp8kv.checkpoint.scheme import COMPRESSED_TENSORS, KVCacheScheme, declared, scheme_of

#: The number of problems shown in full, in total or of one kind.
_MANY = 5
_RANKS = {"error": 0, "warning": 1, "note": 2}


def load_kv_scales(
    checkpoint: str | Path,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    device: torch.device | str = "cpu",
    on_problem: str = "raise",
    query: bool = True,
    fnuz: bool = False,
    model: str | None = None,
    accept: Collection[str] = (),
) -> KVScales:
    """Loads the scales of all layers of a checkpoint; only headers and scales are read from its files.

    If there is a subfolder ``fp8kv``, as `KVScales.save` makes it for formats, scales per channel and offsets
    that other engines don't know, its scales are those that count.

    Every rank checks the whole checkpoint, so that all of them raise the same error.

    Args:
        checkpoint: a directory with config.json and .safetensors files, one such file next to its config, a
            .json file of scales, or the id of a model on the Hugging Face Hub, which is downloaded.
        tp_rank: the tensor-parallel rank.
        tp_size: the number of tensor-parallel ranks. Scales per head are sharded like KV heads: each rank
            gets the same number of adjacent heads, or one replicated head if there are more ranks than heads.
        device: of the result.
        on_problem: "raise": problems of severity "error" are raised. "warn": all problems except notes become
            warnings; bad scales are None, and a layer without usable scales is missing.
        query: False: query scales and their problems are ignored, and `q` is None.
        fnuz: doubles the scales of FP8, for hardware whose FP8 is float8_e4m3fnuz: the same byte stands for
            half the value there.
        model: which one, if there are several in the checkpoint, by the distinctive part of its tensor names,
            such as "talker" or "encoder_attn" (attention to an encoder). None: the language model.
        accept: kinds of errors that become warnings: "before-rope" uses scales of keys before norm and RoPE,
            "nvfp4-cache" the scales of an NVFP4 cache.

    Returns:
        fp32 scales by layer, ``[1]``, ``[KV heads of the rank]`` or ``[KV heads of the rank, head_size]``;
        one query scale per KV group, the largest of its heads. ``.problems`` has all problems found.

    Raises:
        FileNotFoundError: there is no such directory or file, and no model of that id can be downloaded.
        CheckpointError: a problem of severity "error" with ``on_problem="raise"``; a config that cannot be
            read, has an unsupported scheme or no quantized KV cache.
        ValueError: an argument cannot be used, or `tp_size` does not fit the number of KV heads.

    Example:
        >>> import fp8kv, json, pathlib, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "observer": "static_minmax"}
        >>> config = {"num_hidden_layers": 1, "quantization_config": {"kv_cache_scheme": scheme}}
        >>> _ = (folder / "config.json").write_text(json.dumps(config))
        >>> stem = "model.layers.0.self_attn"
        >>> save_file({f"{stem}.k_scale": torch.tensor([0.05]), f"{stem}.v_scale": torch.tensor([0.02])},
        ...           folder / "model.safetensors")
        >>> scales = fp8kv.load_kv_scales(folder)
        >>> scales[0].k, scales[0].q, scales.problems
        (tensor([0.0500]), None, [])
    """
    if on_problem not in ("raise", "warn"):
        raise ValueError(f'load_kv_scales: on_problem must be "raise" or "warn", got {on_problem!r}')
    try:
        check_rank(tp_rank, tp_size)
    except ValueError as error:
        raise ValueError(f"load_kv_scales: {error}") from None
    found = examine(checkpoint, "load_kv_scales", query=query, model=model, accept=accept)
    errors = [problem for problem in found.problems if problem.severity == "error"]
    if found.scheme is None or (errors and on_problem == "raise"):
        raise CheckpointError(_message(checkpoint, errors), errors)
    if on_problem == "warn":
        _warn(found.problems)
    standard = {layer: _layer(by_letter) for layer, by_letter in found.scales.items() if by_letter.keys() & {"k", "v"}}
    layers = {n: _with_offsets(layer, found.biases.get(n, {})) for n, layer in standard.items()}
    scheme = found.scheme
    if found.own is not None:
        layers = {n: _own_layer(own, standard[n].q) for n, own in found.own.layers.items()}
        scheme = replace(scheme, strategy=found.own.strategy)
    if fnuz:
        layers, standard = ({n: _doubled(layer) for n, layer in x.items()} for x in (layers, standard))
    _check_tp_size(layers, tp_size)
    scales = KVScales(
        layers, scheme, found.problems,
        standard=None if found.biases else standard,
        errors={} if found.own is None else found.own.errors,
    )  # fmt: skip
    return scales.shard(tp_rank, tp_size).to(device)


def _layer(scales: dict[str, Tensor]) -> LayerScales:
    q, k, v = (scales.get(letter) for letter in "qkv")
    if q is not None:
        kv = k if k is not None else v
        assert kv is not None
        q = reduce_query_scale(q, kv.numel())
    return LayerScales(q, k, v)


def _with_offsets(layer: LayerScales, biases: Mapping[str, Tensor | None]) -> LayerScales:
    return replace(layer, k_offset=biases.get("k"), v_offset=biases.get("v"))


def _own_layer(own: OwnLayer, q: Tensor | None) -> LayerScales:
    tensors = {name.removesuffix("_scale"): x for name, x in own.tensors.items()}
    return LayerScales(q, tensors["k"], tensors["v"], tensors.get("k_offset"), tensors.get("v_offset"), own.dtype)


def _doubled(layer: LayerScales) -> LayerScales:
    """The scales of FP8; those of INT8 and offsets are not for another type."""
    q = None if layer.q is None else 2 * layer.q
    if CACHE_DTYPES[layer.dtype] not in FP8_DTYPES:
        return replace(layer, q=q)
    k, v = (None if x is None else 2 * x for x in (layer.k, layer.v))
    return replace(layer, q=q, k=k, v=v)


def _check_tp_size(layers: dict[int, LayerScales], tp_size: int) -> None:
    for index, layer in layers.items():
        for x in (layer.k, layer.v, layer.k_offset, layer.v_offset):
            try:
                if x is not None:
                    kv_heads_of_rank(len(x), 0, tp_size)
            except ValueError as error:
                raise ValueError(f"load_kv_scales: layer {index}: {error}") from error


def _message(checkpoint: str | Path, errors: list[Problem]) -> str:
    lines = [f"load_kv_scales: {checkpoint} has {counted(len(errors), 'problem')}: {errors[0]}"]
    lines += [problem.message for problem in errors[1:_MANY]]
    if errors[_MANY:]:
        lines.append(f"And {len(errors) - _MANY} more; fp8kv.audit_checkpoint lists all.")
    return "\n".join(lines)


def _warn(problems: list[Problem]) -> None:
    """One warning per problem, or per kind if there are many."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.severity != "note":
            kinds.setdefault(problem.kind, []).append(problem)
    for kind, found in kinds.items():
        if len(found) > _MANY:
            texts = [f"{len(found)} findings of kind {kind}, the first of them: {found[0]}"]
        else:
            texts = [str(problem) for problem in found]
        for text in texts:
            warnings.warn(f"load_kv_scales: {text}", stacklevel=3)


# Shared by loading and auditing


@dataclass
class Examined:
    """What a checkpoint holds.

    Attributes:
        path: of its directory, or its file.
        scheme: from the config, or from the tensors where the config does not specify it. None if the config
            cannot be read, its scheme is not supported, or there are no scales.
        heads: of the layers that have a KV cache, by index; None if unknown.
        entries: the scales and zero points among the tensors, including wrong ones.
        scales: by layer, then by letter: the usable scales, fp32 ``[1]`` or ``[heads]``, of all ranks.
        biases: of ModelOpt's affine cache, by layer and letter.
        own: the scales of the subfolder `fp8kv`, which count instead of `scales`; None if there are none, or
            they can't be used.
        problems: all of them, errors first.
    """

    path: Path
    scheme: KVCacheScheme | None = None
    heads: dict[int, Heads] | None = None
    entries: dict[Key, list[Entry]] = field(default_factory=dict)
    scales: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    biases: Biases = field(default_factory=dict)
    own: OwnScales | None = None
    problems: list[Problem] = field(default_factory=list)


def examine(
    checkpoint: str | Path,
    caller: str,
    *,
    query: bool = True,
    model: str | None = None,
    accept: Collection[str] = (),
) -> Examined:
    """Reads and checks everything; with ``query=False`` as if there were no query scales.

    Raises:
        FileNotFoundError: there is no such directory or file.
        ValueError: `checkpoint` is something else, there is no such model, or an error cannot be accepted.
    """
    if not (model is None or isinstance(model, str)):
        raise ValueError(f"{caller}: model must be None or a str, got {type(model).__name__}")
    _check_accept(accept, caller)
    path = locate(checkpoint, caller)
    found = _Examination(path, query)
    try:
        name = choose_model(found.models, model)
    except ValueError as error:
        if model is not None:
            raise ValueError(f"{caller}: {error}") from None
        found.add([make_problem("several-models", str(error))])
    else:
        found.examine(name)
        if name == _default_model(found.models):
            found.examine_own_scales()
    result = found.result
    result.problems = [
        replace(problem, severity="warning") if problem.kind in accept else problem for problem in result.problems
    ]
    if any(problem.kind == "before-rope" and problem.severity == "error" for problem in result.problems):
        # RoPE does not apply to values.
        result.scales = {n: {"v": x["v"]} for n, x in result.scales.items() if "v" in x}
    result.problems.sort(key=lambda p: (_RANKS[p.severity], -1 if p.layer is None else p.layer))
    return result


def _check_accept(accept: Collection[str], caller: str) -> None:
    choices = listed((f'"{kind}"' for kind in ACCEPTABLE), "and")
    is_list = isinstance(accept, Collection) and not isinstance(accept, str)
    if not is_list or any(kind not in ACCEPTABLE for kind in accept):
        raise ValueError(f"{caller}: accept must be a list of {choices}, got {accept!r}")


class _Examination:
    """One pass over a checkpoint: reads its files first, then examines one of the `models`."""

    def __init__(self, path: Path, query: bool) -> None:
        self.path, self.query = path, query
        self.is_json = path.suffix == ".json" and not path.is_dir()
        self.result = Examined(path)
        self.config: Mapping[str, Any] = {}
        #: The producer if there are scales but no scheme.
        self.producer: str | None = "JSON file" if self.is_json else None
        self.statement: Statement | None = None
        self.layers: Layers | None = None
        self.models: Models = {}
        self.tensors = ModelTensors("model.layers.")
        self.complete = True  # otherwise, scales may be absent because their file is
        self.usable = self._read_config()
        self._read_tensors()

    def examine(self, name: str) -> None:
        """Everything about the model of this name."""
        self.tensors = self.models.get(name, self.tensors)
        self._find_layers(name)
        self.result.entries = self.tensors.entries if self.query else _without_query(self.tensors.entries)
        if self.usable:
            self._find_scheme()
        if self.result.scheme is not None:
            self._examine_scales(self.result.scheme)
        self.add(presence.check_other_models(self.models, name))

    def examine_own_scales(self) -> None:
        """Examines the scales of the subfolder, which is about the language model."""
        if not self.path.is_dir() or not has_own_scales(self.path) or self.result.scheme is None:
            return
        try:
            own = read_own_scales(self.path)
            self._check_own_layers(own)
        except (OSError, ValueError) as error:
            self.add([make_problem("fp8kv-damaged", str(error))])
            self.result.scales = {}
            return
        if own.digest != digest_of(self.result.scales):
            message = f"{self.path / FOLDER} must belong to the scales in the model's files, which have changed"
            self.add([make_problem("fp8kv-outdated", message)])
            return
        self.result.own = own

    def _check_own_layers(self, own: OwnScales) -> None:
        """A `ValueError` unless they are those of the model's files, with as many heads."""
        if own.layers.keys() != self.result.scales.keys():
            numbers = sorted(own.layers.keys() ^ self.result.scales.keys())
            raise ValueError(
                f"{self.path / FOLDER} must have the layers that have scales in the files of the model, but "
                f"they differ in layer {numbers[0]}"
            )
        for n, layer in own.layers.items():
            heads = max((x.numel() for letter, x in self.result.scales[n].items() if letter != "q"), default=1)
            wrong = [name for name, x in layer.tensors.items() if heads > 1 and len(x) not in (1, heads)]
            if wrong:
                raise ValueError(
                    f"{tensor_name(n, wrong[0])} in {FOLDER} must be for {heads} KV heads, as the scales in "
                    f"the model's files are, got {len(layer.tensors[wrong[0]])}"
                )

    def add(self, problems: Iterable[Problem]) -> None:
        """Adds problems to those of the result."""
        self.result.problems += problems

    def _read_config(self) -> bool:
        """False if the config cannot be read, or its scheme is not supported."""
        folder = self.path if self.path.is_dir() else self.path.parent
        try:
            configs = read_configs(folder)
        except (OSError, ValueError) as error:
            if not self.is_json:
                self.add([make_problem("config-unreadable", str(error))])
            return self.is_json
        self.config = next(iter(configs.values()))
        if self.is_json:
            return True
        if MISTRAL_FILE in configs:
            self.producer = "mistral"
            return True
        try:
            said = declared(configs)
        except ValueError as error:
            self.add([make_problem("scheme-unsupported", str(error))])
            return False
        self.statement = said.statement
        self.add(make_problem("sources-differ", sentence) for sentence in said.contradictions)
        return True

    def _read_tensors(self) -> None:
        if not self.is_json:
            self.models, problems = take_inventory(self.path, self.config)
            self.complete = not problems
            self.add(problems)
            return
        try:
            self.models, model_type = read_json_scales(self.path, layers_of_config(section_of_model(self.config)))
        except (OSError, ValueError) as error:
            self.add([make_problem("json-unreadable", str(error))])
            self.complete = False
            return
        section = section_of_model(self.config)
        types = [part["model_type"] for part in (self.config, section) if part.get("model_type") is not None]
        if model_type is not None and types and model_type not in types:
            message = f"{self.path.name} is for models of type {model_type}, but the config next to it is not"
            self.add([make_problem("sources-differ", message, value=model_type)])

    def _find_layers(self, name: str) -> None:
        tensors = self.tensors
        with_scales = tensors.layers_with_scales | {x.layer for x in tensors.unknown if x.layer is not None}
        alone = sum(bool(x.attention) for x in self.models.values()) <= 1
        side = tensors.is_side and not (alone and self._is_described(name, with_scales))
        self.config = section_of_model(self.config, name, side=side)
        self.layers = with_tensors(layers_of_config(self.config), self.config, tensors.attention, tensors.present, with_scales)
        self.result.heads = None if self.layers is None else self.layers.heads

    def _is_described(self, name: str, with_scales: Collection[int]) -> bool:
        """Whether the config is of this model, the only one; next to a draft, it may be that of the whole model."""
        layers = layers_of_config(section_of_model(self.config, name))
        return self.tensors.is_tower or layers is None or len(layers.heads) <= len({*self.tensors.attention, *with_scales})

    def _find_scheme(self) -> None:
        """Fills in from the tensors what the config leaves open."""
        scales = [entry for key, copies in self.result.entries.items() if key.kind == "scale" for entry in copies]
        has_query = any(key.letter == "q" for key in self.result.entries)
        by_tensors = _strategy(self.result.entries)
        if self.producer is not None and scales:
            self.result.scheme = KVCacheScheme(by_tensors, has_query, producer=self.producer)
        elif self.statement is not None:
            if not (self.statement.has_fp8 or scales):
                self.add([make_problem("scheme-unsupported", self.statement.said)])
                return
            scheme = scheme_of(replace(self.statement, strategy=self.statement.strategy or by_tensors))
            no_field = scheme.producer != COMPRESSED_TENSORS  # for queries, in configs of others
            quantizes_query = self.query and (scheme.quantizes_query or (no_field and has_query))
            self.result.scheme = replace(scheme, quantizes_query=quantizes_query)
        elif scales:
            message = f"config.json must have a kv_cache_scheme, as there is {scales[0].name}"
            self.add([make_problem("scheme-missing", message)])
            self.result.scheme = KVCacheScheme(by_tensors, has_query, producer="unknown")
        elif not self.tensors.unknown and (self.complete or not self.is_json):
            elsewhere = self._elsewhere()
            message = "config.json must have a kv_cache_scheme and there must be scales, got none"
            if elsewhere is not None:
                message += f", but {elsewhere}"
            if self.is_json:
                message = f"{self.path} must have scales of the language model, got none"
            self.add([make_problem("not-quantized", message)])
        else:
            self.add(presence.check_unknown(self.tensors, {}))

    def _examine_scales(self, scheme: KVCacheScheme) -> None:
        entries = self.result.entries
        if not scheme.quantizes_query:
            self.add(presence.check_unused_query(entries))
            entries = _without_query(entries)
        stored, problems = read_scales(entries)
        heads = self._heads(stored, scheme)
        wrong, bad = check_values(stored, scheme.strategy, heads)
        self.add([*problems, *wrong, *presence.check_observer(scheme)])
        self.add(presence.check_unexpected(stored, self.layers))
        self.add(presence.check_unknown(self.tensors, stored))
        if self.config.get("kv_lora_rank") is not None:
            self.add(presence.check_latent(stored))
        if self.statement is not None:
            self.add(presence.check_rope(entries, self.statement, self.tensors.attention))
            self.add(presence.check_formats(stored, self.statement, self._module))
        if self.config.get("kv_lora_rank") is not None:
            bad |= {(layer, "v") for layer in _complete_latent(stored) if (layer, "k") in bad}
        for layer, by_letter in stored.items():
            usable = {letter: scale.values for letter, scale in by_letter.items() if (layer, letter) not in bad}
            self.result.scales[layer] = {letter: values for letter, values in usable.items() if values is not None}
        self.result.biases, problems = read_biases(self.tensors.biases, heads)
        self.add(problems)
        for layer, biases in self.result.biases.items():
            for letter, bias in biases.items():
                if bias is None:
                    self.result.scales.get(layer, {}).pop(letter, None)
        if self.complete:
            self._check_absent(stored, scheme)

    def _heads(self, stored: StoredScales, scheme: KVCacheScheme) -> Mapping[int, Heads]:
        """The heads from the config, corrected by the tensors if K and V have the same number of scales."""
        if self.layers is None or scheme.strategy == "tensor":
            return self.result.heads or {}
        counts = {}
        for layer, by_letter in stored.items():
            values = [scale.values for letter in "kv" if (scale := by_letter.get(letter)) is not None]
            numbers = {x.numel() for x in values if x is not None}
            if len(values) == 2 and len(numbers) == 1:
                counts[layer] = numbers.pop()
        self.result.heads = with_counts(self.layers, self.config, self.tensors.attention, counts)
        return self.result.heads

    def _check_absent(self, stored: StoredScales, scheme: KVCacheScheme) -> None:
        elsewhere = self._elsewhere()
        has_scales = bool(self.tensors.entries or self.tensors.unknown) or elsewhere is not None
        units = presence.unit_layers(has_scales, self.layers, self.statement, self._module)
        if units:
            message = (
                "The config has an FP8 cache and there are no scales, as ModelOpt does it on purpose "
                "(fp8_cast): all are 1.0, so that magnitudes above 448 are clipped"
            )
            self.add([make_problem("unit-scales", message, value=len(units))])
            self.result.scales = {n: {letter: torch.ones(1) for letter in found} for n, found in units.items()}
            self.result.scheme = replace(scheme, strategy="tensor", quantizes_query=False)
            return
        reasons = presence.reasons_to_be_absent(self.tensors, self.layers, self.statement, self._module)
        self.add(presence.check_absent(stored, scheme, self.layers, reasons, elsewhere))

    def _module(self, layer: int) -> str:
        """The name of the attention module of a layer."""
        module = self.tensors.attention.get(layer)
        return f"{self.tensors.stack}{layer}.self_attn" if module is None else module.name

    def _elsewhere(self) -> str | None:
        """Where else there are, or may be, scales: in other models, and in other files of the directory."""
        stacks = [f"{x.stack}*" for x in self.models.values() if x is not self.tensors and x.entries]
        if stacks:
            return f"there are some of {', '.join(stacks)}"
        files = ", ".join(files_beside(self.path))
        return f"{files} may have some: give that file instead of the directory" if files else None


def _default_model(models: Models) -> str | None:
    """The model that is meant if none is named; None if that is ambiguous."""
    try:
        return choose_model(models, None)
    except ValueError:
        return None


def _strategy(entries: Mapping[Key, list[Entry]]) -> Strategy:
    """Per head if a layer has several scales of K, and the same number for V."""
    counts = {
        (key.layer, key.letter): math.prod(copies[0].stored.shape) for key, copies in entries.items() if key.kind == "scale"
    }
    per_head = any(n > 1 and n == counts.get((layer, "v")) for (layer, letter), n in counts.items() if letter == "k")
    return "attn_head" if per_head else "tensor"


def _complete_latent(stored: StoredScales) -> list[int]:
    """Layers without a scale of V, which get that of K: latent attention caches one row for both."""
    layers = [layer for layer, by_letter in stored.items() if "k" in by_letter and "v" not in by_letter]
    for layer in layers:
        stored[layer]["v"] = stored[layer]["k"]
    return layers


def _without_query(entries: dict[Key, list[Entry]]) -> dict[Key, list[Entry]]:
    return {key: copies for key, copies in entries.items() if key.letter != "q"}
