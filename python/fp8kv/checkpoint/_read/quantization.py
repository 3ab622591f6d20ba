"""Parses how configs of all producers describe the quantization of a KV cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase, translate
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from fp8kv._checks import Strategy
from fp8kv.checkpoint._read.config import NESTED
from fp8kv.checkpoint.names import Place, find_place, model_of_stack

#: The `quant_method` of llm-compressor, and of this package.
COMPRESSED_TENSORS = "compressed-tensors"

FP8, NVFP4, REAL = "FP8", "NVFP4", "16 bits"


class Formats(NamedTuple):
    """The storage formats of K and V in a layer: `FP8`, `NVFP4` or `REAL`."""

    k: str
    v: str


_ALL_FP8, _ALL_REAL = Formats(FP8, FP8), Formats(REAL, REAL)
#: Format names of all producers, in lower case.
_WORDS = {
    **dict.fromkeys(
        ("static", "fp8", "fp8_e4m3", "fp8_e4m3fn", "float8", "float8_e4m3", "float8_e4m3fn", "e4m3",
         "e4m3fn", "fp8_static", "fp8_cast", "fp8_per_tensor", "fp8_pertensor"),
        _ALL_FP8,
    ),
    **dict.fromkeys(("nvfp4", "nvfp4_cast", "fp4", "e2m1", "fp4_e2m1"), Formats(NVFP4, NVFP4)),
    "fp8_k_nvfp4_v": Formats(FP8, NVFP4),
    **dict.fromkeys(("none", "null", "auto", "", "bf16", "bfloat16", "fp16", "float16", "half"), _ALL_REAL),
}  # fmt: skip
_STRATEGIES: dict[str, Strategy] = {
    **dict.fromkeys(("tensor", "per_tensor"), "tensor"),
    **dict.fromkeys(("attn_head", "head", "per_head", "per_attn_head"), "attn_head"),
}
#: ModelOpt describes floats by their numbers of exponent and mantissa bits.
_FLOAT_BITS = {(4, 3): 8, (2, 1): 4}
_MIXED = "mixed_precision"
#: Fields that only a `quantization_config` has.
_MARKS = (
    "quant_method", "kv_cache_scheme", "config_groups", "kv_cache_quant_algo", "quantization_status",
    "kv_cache_quantized_layers", "kv_cache_dtype",
)  # fmt: skip
#: Fields of ModelOpt and others with the name of the cache's format.
_WORD_FIELDS = ("kv_cache_quant_algo", "kv_cache_dtype")
_ALL_FIELDS = ("kv_cache_scheme", *_WORD_FIELDS)
#: Fields for the quantized layers and their formats; and fields for the excluded ones.
_LAYER_FIELD = "kv_cache_quantized_layers"
_LEFT_OUT = ("ignore", "ignored_layers", "exclude_modules", "exclude", "modules_to_not_convert")
#: Repetitions and alternatives of a regex; those of real configs have 5 or fewer.
_MOST_CHOICES = 8
#: Fields of a scheme, which distinguish it from a map of layers.
_SCHEME_FIELDS = {
    "num_bits",
    "type",
    "strategy",
    "dynamic",
    "symmetric",
    "quant_algo",
    "dtype",
    "format",
    "observer",
}


@dataclass(frozen=True)
class Statement:
    """The description of the cache in one config.

    Attributes:
        producer: the `quant_method`, such as "compressed-tensors".
        formats: of all layers not in `by_layer`.
        strategy: None: not specified.
        quantizes_query: whether queries have scales too.
        observer: None: not specified.
        by_layer: patterns of names, or indices, of layers with another format.
        left_out: patterns of the names of modules that are not quantized.
        of_projections: whether the outputs of `k_proj` and `v_proj` are quantized, instead of attention.
        before_rope: Quark: whether keys were observed before norm and RoPE; None: not specified.
        field: the config field it comes from.
        said: the reason why it is not FP8, for errors.
    """

    producer: str
    formats: Formats = _ALL_FP8
    strategy: Strategy | None = None
    quantizes_query: bool = False
    observer: str | None = None
    by_layer: Mapping[str, Formats] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    of_projections: bool = False
    before_rope: bool | None = None
    field: str = ""
    said: str = ""

    @property
    def is_quantized(self) -> bool:
        """Whether any part of the cache is not in 16 bits."""
        return any(formats != _ALL_REAL for formats in (self.formats, *self.by_layer.values()))

    @property
    def has_fp8(self) -> bool:
        """Whether any part of the cache is in FP8."""
        return any(FP8 in formats for formats in (self.formats, *self.by_layer.values()))

    @property
    def is_modelopt(self) -> bool:
        """Whether missing scales stand for 1.0, as with ModelOpt."""
        return self.producer.lower().startswith("modelopt")

    def formats_of(self, module: str) -> Formats:
        """The formats of an attention module, such as "model.layers.0.self_attn"."""
        found = (formats for pattern, formats in self.by_layer.items() if _matches(pattern, module))
        return next(found, self.formats)

    def leaves_out(self, module: str) -> bool:
        """Whether an attention module is deliberately not quantized.

        What is left out are linear layers as a rule, whose weights stay in 16 bits. So a name counts only if it
        is that of the module or of its layer, and a pattern if it matches the module; or one of its
        projections, if these are what is quantized. Of wildcards, those that match all parts of attention and
        nothing else of the layer stand for its linear layers: ModelOpt summarizes their names so. A regex is
        matched with the names of all modules, attention included, by compressed-tensors.
        """
        place = find_place(f"{module}.")
        if place is not None and _place(place) in self._places_left_out:
            return True
        names = [f"{module}{part}" for part in self._quantized_parts]
        layer = module.rpartition(".")[0]
        for pattern, regex in self._patterns_left_out:
            of_linears = regex.match(f"{module}.o_proj") and not regex.match(f"{layer}.mlp.down_proj")
            on_purpose = self.of_projections or pattern.startswith("re:") or not of_linears
            if on_purpose and any(map(regex.match, names)):
                return True
        return False

    @property
    def _quantized_parts(self) -> tuple[str, ...]:
        return ("", ".k_proj", ".v_proj") if self.of_projections else ("",)

    @cached_property
    def _places_left_out(self) -> frozenset[tuple[str, int]]:
        names = [name for name in self.left_out if not _is_pattern(name)]
        layers = [name for name in names if name.rpartition(".")[2].isdecimal()]
        places = [find_place(f"{name}.") for name in names] + [find_place(f"{name}.self_attn.") for name in layers]
        return frozenset(_place(x) for x in places if x is not None and f".{x.rest}"[:-1] in self._quantized_parts)

    @cached_property
    def _patterns_left_out(self) -> list[tuple[str, re.Pattern[str]]]:
        found = ((pattern, regex_of(pattern)) for pattern in self.left_out if _is_pattern(pattern))
        return [(pattern, regex) for pattern, regex in found if regex is not None]


def read_statements(config: Mapping[str, Any]) -> list[Statement]:
    """The statements of a config about the KV cache, one per field.

    Raises:
        ValueError: the format is not supported; the message starts with the field.
    """
    quantization = _quantization(config)
    producer = _producer(quantization)
    if producer == "quark":
        return list(filter(None, [_of_quark(quantization)]))
    left_out = tuple(_texts(quantization, _LEFT_OUT))
    found = []
    for statement in filter(None, (_of_scheme(quantization, producer), _of_words(quantization, producer))):
        by_layer = statement.by_layer or dict(_of_layers(quantization, statement))
        if not by_layer and _MIXED in (str(quantization.get(name)).lower() for name in _ALL_FIELDS):
            raise ValueError(f"{_LAYER_FIELD} must say what MIXED_PRECISION is for which layer, got none")
        found.append(replace(statement, by_layer=by_layer, left_out=left_out))
    return found


def contradicts(one: Statement, other: Statement) -> bool:
    """Whether two configs of a checkpoint contradict each other about the cache."""
    if one.by_layer or other.by_layer:
        # One of them may only state that it is mixed.
        return bool(one.by_layer and other.by_layer) and dict(one.by_layer) != dict(other.by_layer)
    strategies = {one.strategy, other.strategy} - {None}
    return one.formats != other.formats or len(strategies) > 1


# Location


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config`, at any of its locations; empty if there is none."""
    for name in ("quantization_config", "compression_config"):
        if isinstance(config.get(name), dict):
            return _quantization(config[name])
    if isinstance(config.get("quantization"), dict):
        return {**config, **config["quantization"]}
    if any(name in config for name in _MARKS):
        return config
    nested = (_quantization(config[name]) for name in NESTED if isinstance(config.get(name), dict))
    return next((found for found in nested if found), {})


def _producer(quantization: Mapping[str, Any]) -> str:
    producer = quantization.get("producer")
    name = producer.get("name") if isinstance(producer, dict) else None
    # TensorRT-LLM names none.
    usual = "modelopt" if "kv_cache_quant_algo" in quantization else COMPRESSED_TENSORS
    return str(quantization.get("quant_method") or name or usual)


# Format names


def _of_words(quantization: Mapping[str, Any], producer: str) -> Statement | None:
    for name in _WORD_FIELDS:
        if name in quantization:
            value = quantization[name]
            if value is None and _LAYER_FIELD in quantization:
                continue
            return _of_value(name, value, producer, "FP8")
    if _LAYER_FIELD in quantization:
        return Statement(producer, _ALL_REAL, field=_LAYER_FIELD, said=_LAYER_FIELD)
    return None


def _of_value(name: str, value: Any, producer: str, usual: str) -> Statement:
    """A format name, or a list or map of format names for the layers."""
    if isinstance(value, list) and value:
        value = {str(n): word for n, word in enumerate(value)}
    if isinstance(value, dict) and value:
        by_layer = _map(name, value, producer)
        return Statement(producer, _ALL_REAL, by_layer=by_layer, field=name, said=f"{name} must have FP8")
    formats = _formats(name, value, usual)
    return Statement(producer, formats, field=name, said=f"{name} must be {_json(usual)}, got {_json(value)}")


def _formats(name: str, value: Any, usual: str) -> Formats:
    word = "none" if value is None else value.lower().replace("-", "_") if isinstance(value, str) else ""
    if word == _MIXED:
        return _ALL_REAL
    if not isinstance(value, (str, type(None))) or word not in _WORDS:
        raise ValueError(f"{name} must be {_json(usual)}, got {_json(value)}")
    return _WORDS[word]


# Layers


def _of_layers(quantization: Mapping[str, Any], statement: Statement) -> Iterator[tuple[str, Formats]]:
    """The formats of layers in `kv_cache_quantized_layers`; a list contains the quantized layers."""
    layers = quantization.get(_LAYER_FIELD)
    if isinstance(layers, list) and layers:
        formats = statement.formats if statement.is_quantized else _ALL_FP8
        yield from {**dict.fromkeys(map(str, layers), formats), "*": _ALL_REAL}.items()
    elif isinstance(layers, dict) and layers:
        yield from _map(_LAYER_FIELD, layers, statement.producer).items()


def _map(where: str, layers: Mapping[str, Any], producer: str) -> dict[str, Formats]:
    """The formats of layers in a map, names before patterns; other layers stay in 16 bits."""
    result = {}
    for pattern, value in layers.items():
        name = f"{where}.{pattern}"
        if isinstance(value, dict):
            result[str(pattern)] = _scheme(name, value, producer)[0]
        else:
            result[str(pattern)] = _formats(name, value, "FP8")
    result.setdefault("*", _ALL_REAL)
    return dict(sorted(result.items(), key=lambda item: (item[0] == "*", _is_pattern(item[0]))))


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern of any producer matches the name of an attention module.

    It may be a regex ("re:..."), have wildcards, be the layer index, or a name: of the module, of a
    submodule, or of the layer. The prefix before the layer may differ between a config and its checkpoint, as
    long as the model is the same.
    """
    names = (module, f"{module}.k_proj")
    if _is_pattern(pattern):
        regex = regex_of(pattern)
        return regex is not None and any(map(regex.match, names))
    place = find_place(f"{module}.")
    if place is None:
        return pattern == module
    if pattern.isdecimal():
        return pattern == str(place.layer)
    named = _named(pattern)
    return named is not None and named == _place(place)


@lru_cache(maxsize=1 << 16)
def _named(name: str) -> tuple[str, int] | None:
    """The model and the number of a layer, by the name of the layer, or of attention or a part of it."""
    place = find_place(f"{name}.") or find_place(f"{name}.self_attn.")
    return None if place is None else _place(place)


@lru_cache(maxsize=4096)
def regex_of(pattern: str) -> re.Pattern[str] | None:
    """A regex ("re:...") or wildcards as a regex; None if it is invalid, or could take forever."""
    is_regex = pattern.startswith("re:")
    if is_regex and _is_costly(pattern[3:]):
        return None
    try:
        return re.compile(pattern[3:] if is_regex else translate(pattern))
    except (re.error, RecursionError, OverflowError):
        return None


def _is_costly(regex: str) -> bool:
    """Whether a regex repeats a group, or has so many parts to repeat or choose that the ways to match explode."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", regex)  # without escapes and sets
    plain = re.sub(r"\(\?(?:[:=!]|<[=!]|P<\w+>)", "(", plain)
    return re.search(r"\)[*+{]", plain) is not None or len(re.findall(r"[*+?{]+|\|[^)]*\)", plain)) > _MOST_CHOICES


def _is_pattern(name: str) -> bool:
    return name.startswith("re:") or any(mark in name for mark in "*?[")


def _place(place: Place) -> tuple[str, int]:
    return model_of_stack(place.stack), place.layer


def _texts(quantization: Mapping[str, Any], fields: Sequence[str]) -> Iterator[str]:
    for name in fields:
        value = quantization.get(name)
        for text in value if isinstance(value, list) else ():
            if isinstance(text, (str, int)) and not isinstance(text, bool):
                yield str(text)


# Schemes as objects: compressed-tensors, and ModelOpt since 0.40


def _of_scheme(quantization: Mapping[str, Any], producer: str) -> Statement | None:
    """`kv_cache_scheme`, and the groups whose targets are attention layers, which quantize queries too."""
    scheme = quantization.get("kv_cache_scheme")
    if isinstance(scheme, str):
        return _of_value("kv_cache_scheme", scheme, producer, "static")
    if isinstance(scheme, list) and scheme and all(isinstance(item, (dict, str)) for item in scheme):
        scheme = {str(n): item for n, item in enumerate(scheme)}
    schemes = {} if scheme is None else {"kv_cache_scheme": scheme}
    if isinstance(scheme, dict) and scheme and not scheme.keys() & _SCHEME_FIELDS:
        sides = {name.lower().removesuffix("_cache").removesuffix("s")[:1]: name for name in scheme}
        if len(scheme) != 2 or sides.keys() != {"k", "v"}:
            return _of_value("kv_cache_scheme", scheme, producer, "static")
        schemes = {f"kv_cache_scheme.{sides[side]}": scheme[sides[side]] for side in "kv"}
    groups = dict(_attention_groups(quantization))
    schemes |= groups
    if not schemes:
        return None
    parsed = {name: _scheme(name, value, producer) for name, value in schemes.items()}
    (first, (formats, strategy)), *others = parsed.items()
    if first.startswith("kv_cache_scheme."):
        formats = Formats(formats.k, others[0][1][0].v)
    for name, (_, other) in others:
        one, two = strategy or "tensor", other or "tensor"
        if one != two:
            raise ValueError(f'{name}.strategy must be that of {first}, "{one}", got "{two}"')
    observers = [x["observer"] for x in schemes.values() if x.get("observer") is not None]
    observer = str(observers[0]) if observers else None
    return Statement(
        producer,
        formats,
        strategy,
        quantizes_query=any(name.endswith("input_activations") for name in groups),
        observer=observer,
        of_projections=first.endswith("output_activations"),
        field=first,
        said=f"{first}.num_bits must be 8, got 4",
    )


def _attention_groups(quantization: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    groups = quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            continue
        targets = group.get("targets")
        targets = targets if isinstance(targets, list) else [targets]
        if group.get("weights") is None and group.get("input_activations") is not None:
            if any(map(_is_attention, targets)):
                yield f"config_groups.{name}.input_activations", group["input_activations"]
        elif group.get("output_activations") is not None and all(map(_makes_keys, targets)):
            yield f"config_groups.{name}.output_activations", group["output_activations"]


def _is_attention(target: Any) -> bool:
    """Whether a class ("LlamaAttention") or a regex ("re:.*self_attn$") means whole attention layers."""
    target = str(target).lower()
    return ("attention" in target or "attn" in target) and "proj" not in target


def _makes_keys(target: Any) -> bool:
    """Key or value projections, whose output scales were the cache's scales in older versions."""
    return bool(re.search(r"(?<![a-z])[kv]_proj", str(target)))


def _scheme(name: str, scheme: Any, producer: str) -> tuple[Formats, Strategy | None]:
    if not isinstance(scheme, dict):
        raise ValueError(f"{name} must be an object, got {type(scheme).__name__}")
    for word in ("quant_algo", "kv_cache_quant_algo", "dtype", "format"):
        if isinstance(scheme.get(word), str) and "num_bits" not in scheme:
            return _formats(f"{name}.{word}", scheme[word], "FP8"), None
    bits = scheme.get("num_bits", 8)
    if isinstance(bits, list) and len(bits) == 2 and all(isinstance(n, int) for n in bits):
        bits = _FLOAT_BITS.get((bits[0], bits[1]), bits)
    kind: Any = scheme.get("type", "float" if isinstance(scheme.get("num_bits"), list) else None)
    if bits == 4 and str(kind).lower() == "float" and producer.lower().startswith("modelopt"):
        return Formats(NVFP4, NVFP4), None
    expected = {
        "num_bits": (8, bits),
        "type": ("float", kind.lower() if isinstance(kind, str) else kind),
        "symmetric": (True, True if scheme.get("symmetric") is None else scheme["symmetric"]),
        "dynamic": (False, False if scheme.get("dynamic") is None else scheme["dynamic"]),
    }
    _check_fields(name, expected)
    strategy = scheme.get("strategy")
    if strategy is None:
        if scheme.get("group_size") is None:
            return _ALL_FP8, None
        strategy = "group"
    word = strategy.lower().replace("-", "_") if isinstance(strategy, str) else ""
    if word not in _STRATEGIES:
        raise ValueError(f'{name}.strategy must be "tensor" or "attn_head", got {_json(strategy)}')
    return _ALL_FP8, _STRATEGIES[word]


# Quark


def _of_quark(quantization: Mapping[str, Any]) -> Statement | None:
    """Quark quantizes the outputs of the layers that `kv_cache_group` names, such as "*k_proj"."""
    export = quantization.get("export")
    export = export if isinstance(export, dict) else {}
    patterns = export.get("kv_cache_group") or quantization.get("kv_cache_group")
    patterns = [str(pattern) for pattern in patterns] if isinstance(patterns, list) else []
    schemes: dict[str, Any] = {}
    names = []
    for where in ("kv_cache_quant_config", "layer_quant_config"):
        layers = quantization.get(where)
        for name, layer in layers.items() if isinstance(layers, dict) else ():
            in_group = where == "kv_cache_quant_config" or any(fnmatchcase(name, x) for x in patterns)
            outputs = layer.get("output_tensors") if isinstance(layer, dict) else None
            if in_group and outputs is not None:
                names.append(name)
                for scheme in outputs if isinstance(outputs, list) else [outputs]:
                    _check_quark(f"{where}.{name}.output_tensors", scheme)
                    schemes[name] = scheme
    if patterns and not schemes:
        raise ValueError("layer_quant_config must have the layers of kv_cache_group with output_tensors, got none")
    if not schemes:
        return None
    by_layer: dict[str, Formats] = {}
    if not any("*" in name or name.startswith("re:") for name in names):  # the layers one by one
        by_layer = {**dict.fromkeys(names, _ALL_FP8), "*": _ALL_REAL}
    post = quantization.get("kv_cache_post_rope", export.get("kv_cache_post_rope"))
    return Statement(
        "quark",
        field="output_tensors",
        by_layer=by_layer,
        left_out=tuple(_texts(quantization, _LEFT_OUT)),
        of_projections=True,
        before_rope=None if post is None else not post,
    )


def _check_quark(name: str, scheme: Any) -> None:
    if not isinstance(scheme, dict):
        raise ValueError(f"{name} must be an object, got {type(scheme).__name__}")
    dtype = scheme.get("dtype")
    fp8 = isinstance(dtype, str) and _WORDS.get(dtype.lower()) == _ALL_FP8
    expected = {
        "dtype": ("fp8_e4m3", "fp8_e4m3" if fp8 else dtype),
        "qscheme": ("per_tensor", scheme.get("qscheme")),
        "is_dynamic": (False, bool(scheme.get("is_dynamic"))),
        # An unknown `symmetric` is null there.
        "symmetric": (True, scheme.get("symmetric") is not False),
    }
    _check_fields(name, expected)


def _check_fields(name: str, expected: Mapping[str, tuple[Any, Any]]) -> None:
    """An error for the first field whose value is not the expected one."""
    for field_name, (value, actual) in expected.items():
        if actual != value:
            raise ValueError(f"{name}.{field_name} must be {_json(value)}, got {_json(actual)}")


def _json(value: Any) -> str:
    return json.dumps(value, default=str)
