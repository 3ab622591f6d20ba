"""The layers of a model with a KV cache, and their heads, from its config and its tensors.

The conventions of configs are tables: a field, how to read it, and the models that use it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fp8kv.checkpoint._read.config import LAYERS, field_of, first_of, positive
from fp8kv.checkpoint.names import is_cross

_HEADS = (
    "decoder_attention_heads", "num_attention_heads_per_layer", "num_attention_heads", "n_head", "n_heads",
    "num_query_heads", "num_heads", "attn.num_heads",
)  # fmt: skip
_KV_HEADS = (
    "num_key_value_heads_per_layer", "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv",
    "num_attention_groups", "multi_query_group_num", "attn_config.kv_n_heads", "attn.num_kv_heads",
)  # fmt: skip
#: No model has more; an invalid config must not exhaust memory.
_MOST_LAYERS = 10_000
#: Fields with a number of KV heads, or a head size, in any convention.
_ANY_KV_HEADS = re.compile(r"(?:kv|key_value).*(?:heads|groups)|attention_groups")
_KNOWN_KV_HEADS = {*_KV_HEADS, "num_global_key_value_heads", "swa_num_key_value_heads"}
_ANY_HEAD_SIZE = re.compile(r"head_(?:dim|size)|kv_channels|d_kv")
#: Types of layers without keys and values.
_NO_ATTENTION = re.compile(
    r"linear|mamba|ssm|conv|recurrent|delta|lightning|rwkv|kda|gdn|lru|hyena|identity|no_?op|^(?:moe|mlp|dense|none)$"
)
#: Types of layers with keys and values; what all others are is open.
_ATTENTION = re.compile(r"att|full|sliding|sparse|swa|window|chunk|global|local|hybrid|minicpm")
#: Types of layers that see a window of tokens.
_WINDOW = re.compile(r"sliding|window|local|swa|chunked")
#: Key projections, by any name.
KEY_PROJECTIONS = {
    "k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack", "wk", "k", "key", "kv_proj",
    "kv_a_proj_with_mqa", "wkv_a_with_mqa",
}  # fmt: skip


class Heads(NamedTuple):
    """The heads of an attention layer; None: not in the config."""

    query: int | None = None
    kv: int | None = None


@dataclass(frozen=True)
class Layers:
    """The layers of a model with their own keys and values.

    Attributes:
        heads: by index.
        unsure: the layers among them whose type, which is the value, is not known to have attention.
        field: the config field that lists them; None: all layers are assumed to have attention.
        optional: layers that cache the output of another model, and may stay in 16 bits.
        apart: layers that are omitted, because `field` in the config distinguishes them from all layers with
            scales.
    """

    heads: dict[int, Heads]
    unsure: Mapping[int, str] = field(default_factory=dict)
    field: str | None = None
    optional: frozenset[int] = frozenset()
    apart: tuple[int, ...] = ()


@dataclass(frozen=True)
class Attention:
    """An attention module among the tensors of a checkpoint.

    Attributes:
        name: such as "model.layers.0.self_attn".
        shapes: of its tensors, by the rest of their names, without scales of Q, K and V.
    """

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def parts(self) -> frozenset[str]:
        """The names of its submodules, such as "k_proj"."""
        return frozenset(rest.partition(".")[0] for rest in self.shapes)

    @property
    def makes_keys(self) -> bool:
        """Whether it has a key projection."""
        return bool(self.parts & KEY_PROJECTIONS)

    @property
    def is_cross(self) -> bool:
        """Whether its keys and values come from another model."""
        return is_cross(self.name.rpartition(".")[2])

    def rows(self, part: str) -> int | None:
        """The output size of a projection; None if there is none of that name."""
        shape = self.shapes.get(f"{part}.weight") or self.shapes.get(f"{part}.weight_packed")
        return shape[0] if shape else None


# Layers with attention, from configs


def _by_type(value: Any, num_layers: int) -> set[int] | None:
    if not isinstance(value, list) or not value:
        return None
    return {n for n, kind in enumerate(value) if not _NO_ATTENTION.search(str(kind).lower())}


def _by_mark(value: Any, num_layers: int) -> set[int] | None:
    return {n for n, mark in enumerate(value) if mark == "*"} if isinstance(value, str) else None


def _by_flag(value: Any, num_layers: int) -> set[int] | None:
    return {n for n, flag in enumerate(value) if flag == 1} if isinstance(value, list) else None


def _by_index(value: Any, num_layers: int) -> set[int] | None:
    return {n for n in range(num_layers) if n in value} if isinstance(value, list) else None


def _from_one(value: Any, num_layers: int) -> set[int] | None:
    return {n for n in range(num_layers) if n + 1 in value} if isinstance(value, list) else None


def _every(value: Any, num_layers: int) -> set[int] | None:
    interval = positive(value)
    return None if interval is None else {n for n in range(num_layers) if (n + 1) % interval == 0}


def _every_and_rest(value: Any, num_layers: int) -> set[int] | None:
    last, interval = _every(value, num_layers), positive(value)
    if last is None or interval is None:
        return None
    return last | set(range(num_layers // interval * interval, num_layers))


def _but_every(value: Any, num_layers: int) -> set[int] | None:
    interval = positive(value)
    return None if interval is None else {n for n in range(num_layers) if n % interval != 0}


def _repeated(value: Any, num_layers: int) -> set[int] | None:
    return _by_type((value * num_layers)[:num_layers], num_layers) if isinstance(value, list) else None


#: Fields that define the layers with attention, in order of precedence.
_LAYER_RULES: tuple[tuple[str, Callable[[Any, int], set[int] | None], str], ...] = (
    ("layer_types", _by_type, "Transformers"),
    ("layers_block_type", _by_type, "Nemotron-H, Bamba, Granite 4, Zamba 2"),
    ("mixer_types", _by_type, "MiniCPM-SALA"),
    ("hybrid_override_pattern", _by_mark, "Nemotron-H"),
    ("attn_type_list", _by_flag, "MiniMax-01"),
    ("linear_attn_config.full_attn_layers", _from_one, "Kimi Linear, Kimi K3"),
    ("attn_layer_indices", _by_index, "Bamba"),
    ("full_attn_idxs", _by_index, "LFM2"),
    ("attn_layer_idx", _by_index, "Mamba 2 with attention"),
    ("attn.layers", _by_index, "flash-linear-attention"),
    ("hybrid_layer_ids", _by_index, "Zamba 2"),
    ("full_attention_interval", _every, "Qwen3-Next"),
    ("layer_group_size", _every_and_rest, "Ling 2.5 and Ring, linear"),
    ("mb_per_layer", _but_every, "Phi-4-mini-flash"),
    ("block_types", _repeated, "RecurrentGemma"),
)
#: Fields with a type for each layer.
_TYPES = {path for path, read, _ in _LAYER_RULES if read is _by_type}
#: Layers that cache the output of a vision tower: Llama 3.2 Vision.
_CROSS_LAYERS = "cross_attention_layers"


def layers_of_config(config: Mapping[str, Any], *, listed: bool = True) -> Layers | None:
    """The layers with their own KV cache, from a model's config; None if it has no layers.

    Args:
        config: the model's.
        listed: False: all layers are assumed to have attention, whatever the config says.
    """
    types = _types(config)
    pattern = config.get("hybrid_override_pattern")
    num_layers = positive(first_of(config, LAYERS)) or len(types or (pattern if isinstance(pattern, str) else ""))
    if not 0 < num_layers <= _MOST_LAYERS:
        return None
    with_attention, field = _with_attention(config, num_layers) if listed else (range(num_layers), None)
    own = [n for n in _with_own_cache(config, num_layers) if n in with_attention]
    if listed and any(_block(config, n) for n in range(num_layers)):
        field = field or "block_configs"
    cross = config.get(_CROSS_LAYERS)
    optional = frozenset(n for n in own if n in cross) if isinstance(cross, list) else frozenset()
    heads = {n: _heads(config, n, types) for n in own if not _is_without(_block(config, n))}
    kinds = field_of(config, field) if field in _TYPES else []
    unsure = {n: str(kind) for n, kind in enumerate(kinds) if n in heads and not _ATTENTION.search(str(kind).lower())}
    return Layers(heads, unsure, field, optional)


def _with_attention(config: Mapping[str, Any], num_layers: int) -> tuple[Collection[int], str | None]:
    """The layers with attention, and the field that defines them; all layers if there is none."""
    for path, read, _ in _LAYER_RULES:
        value = field_of(config, path)
        layers = None if value is None else read(value, num_layers)
        if layers is not None:
            # A list of types may be shorter than the model.
            rest = range(len(value), num_layers) if read is _by_type else ()
            return layers | set(rest), path
    period, offset = positive(config.get("attn_layer_period")), config.get("attn_layer_offset", 0)  # Jamba
    if period is not None and isinstance(offset, int):
        return {n for n in range(num_layers) if n % period == offset}, "attn_layer_period"
    return range(num_layers), None


def _with_own_cache(config: Mapping[str, Any], num_layers: int) -> Iterator[int]:
    """The layers that do not reuse the keys and values of earlier ones."""
    end = num_layers - (positive(config.get("num_kv_shared_layers")) or 0)  # Gemma 3n and 4
    if positive(config.get("mb_per_layer")) is not None:  # Phi-4-mini-flash: its second half
        end = min(end, num_layers // 2 + 2)
    factor = positive(config.get("cla_share_factor")) if config.get("use_cla") else None  # Hunyuan
    groups = config.get("kv_reuse_group")  # Hymba: the first of a group has the cache
    if not isinstance(groups, list):
        factor, groups = factor or positive(config.get("kv_reuse_every_i_layer")), []
    others = [n for group in groups if isinstance(group, list) for n in group[1:]]
    for n in range(max(0, end)):
        if n % (factor or 1) == 0 and n not in others:
            yield n


def _types(config: Mapping[str, Any]) -> list[str]:
    """The types of all layers, if the config lists them."""
    for name in ("layer_types", "layers_block_type"):
        if isinstance(config.get(name), list):
            return [str(kind) for kind in config[name]]
    marks = config.get("attn_type_list")
    if isinstance(marks, list):
        return ["attention" if mark == 1 else "linear" for mark in marks]
    return []


# Heads, from configs


def _heads(config: Mapping[str, Any], layer: int, types: list[str]) -> Heads:
    kind = types[layer] if layer < len(types) else ""
    query = _of_layer(first_of(config, _HEADS), layer)
    kv = _of_layer(first_of(config, _KV_HEADS), layer)
    for own in _own_heads(config, layer, kind):
        query, kv = own.query or query, own.kv or kv
    group = positive(_block(config, layer).get("n_heads_in_group"))
    if config.get("kv_lora_rank") is not None:
        kv = None  # latent attention caches no heads
    elif config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv = 1  # Falcon also has num_kv_heads, with another meaning
    elif config.get("multi_query_attention") is False:
        kv = query  # ChatGLM also has multi_query_group_num, which is of no use then
    elif group is not None:
        kv = None if query is None else query // group
    elif first_of(config, _KV_HEADS) is None and kv is None:
        kv = query
    return Heads(query, kv)


def _own_heads(config: Mapping[str, Any], layer: int, kind: str) -> Iterator[Heads]:
    """Per-layer overrides, in each known convention."""
    if config.get("attention_k_eq_v", True) and kind == "full_attention":  # Gemma 4, before Transformers 5.15
        yield Heads(kv=positive(config.get("num_global_key_value_heads")))
    if _is_window(config, layer, kind):  # MiMo-V2, Inkling; Step-3.7 has the last one
        query = positive(first_of(config, ("swa_num_attention_heads", "num_sliding_attention_heads")))
        yield Heads(query, positive(config.get("swa_num_key_value_heads")))
    other = config.get("attention_other_setting")  # Step-3.5
    if isinstance(other, dict) and kind and kind == other.get("attention_type", "sliding_attention"):
        yield Heads(positive(other.get("num_attention_heads")), positive(other.get("num_attention_groups")))
    yield _named_heads(_block(config, layer))  # DeciLM
    per_layer = config.get("per_layer_config")  # Transformers 5.15
    if isinstance(per_layer, list):
        per_layer = {str(n): value for n, value in enumerate(per_layer)}
    if isinstance(per_layer, dict):
        yield _named_heads(per_layer.get(kind))
        yield _named_heads(per_layer.get(str(layer)))


def _named_heads(config: Any) -> Heads:
    if not isinstance(config, dict):
        return Heads()
    return Heads(positive(config.get("num_attention_heads")), positive(config.get("num_key_value_heads")))


def _is_window(config: Mapping[str, Any], layer: int, kind: str) -> bool:
    pattern = config.get("hybrid_layer_pattern")  # MiMo-V2: 1 if a layer has a window
    if isinstance(pattern, list):
        return layer < len(pattern) and pattern[layer] == 1
    local = config.get("local_layer_ids")  # Inkling
    if isinstance(local, list):
        return layer in local
    period = positive(first_of(config, ("sliding_window_pattern", "global_attn_every_n_layers")))
    if period is not None and not kind:  # Gemma 3, AFMoE
        return (layer + 1) % period != 0
    return bool(_WINDOW.search(kind))


def _block(config: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """DeciLM has one config per layer."""
    blocks = config.get("block_configs")
    block = blocks[layer] if isinstance(blocks, list) and layer < len(blocks) else None
    attention = block.get("attention") if isinstance(block, dict) else None
    return attention if isinstance(attention, dict) else {}


def _is_without(block: dict[str, Any]) -> bool:
    return bool(block.get("no_op") or block.get("replace_with_linear"))


def _of_layer(counts: Any, layer: int) -> int | None:
    """One number for all layers, or a list."""
    if isinstance(counts, list):
        counts = counts[layer] if layer < len(counts) else None
    return positive(counts)


# From tensors


def kv_heads_by_tensors(config: Mapping[str, Any], heads: Heads, attention: Attention | None) -> int | None:
    """The KV heads of a layer, from the shapes of its projections; None if they do not determine them.

    Args:
        config: of the model, with the head sizes.
        heads: from the config.
        attention: the tensors of the layer.
    """
    k, q = (None, None) if attention is None else (attention.rows("k_proj"), attention.rows("q_proj"))
    if not k:
        return None
    sizes = set(_numbers(config, _ANY_HEAD_SIZE))
    width = positive(config.get("hidden_size"))
    if width and heads.query:
        sizes.add(width // heads.query)
    # Queries have the size of keys, unless a gate is in the same projection.
    size = q // heads.query if q and heads.query and q % heads.query == 0 else None
    if size not in sizes:
        size = positive(config.get("head_dim"))
    return k // size if size and k % size == 0 else None


def with_tensors(
    layers: Layers | None,
    config: Mapping[str, Any],
    attention: Mapping[int, Attention],
    present: Collection[int],
    with_scales: Collection[int],
) -> Layers | None:
    """The layers from a config, corrected by the tensors, which take precedence.

    Args:
        layers: as the config has them.
        config: the model's.
        attention: the attention modules that there are.
        present: the layers of which there is any tensor.
        with_scales: the layers with scales of K or V.
    """
    makes_keys = {n for n, module in attention.items() if module.makes_keys}
    if layers is None:
        return Layers(dict.fromkeys(sorted(makes_keys), Heads())) if makes_keys else None
    if layers.field is not None and with_scales and not layers.heads.keys() & {*with_scales, *makes_keys}:
        every = with_tensors(layers_of_config(config, listed=False), {}, attention, present, with_scales)
        # The field means something else if the tensors are complete without it.
        if every is not None and (not layers.heads or every.heads.keys() <= set(with_scales)):
            return every
    kept = set(layers.heads)
    if makes_keys:
        kept -= set(present) - makes_keys - set(with_scales) - with_tied_weights(layers, attention, present)
    if layers.field is not None or not kept & set(with_scales):
        heads = {n: heads for n, heads in layers.heads.items() if n in kept}
        return _without_unknown_types(replace(layers, heads=heads), with_scales)
    field: str | None = None
    kinds = {attention[n].parts for n in with_scales if n in attention}
    if makes_keys:
        # Layers with different modules than all layers with scales are layers of another kind.
        kept = {n for n in kept if n not in attention or n in with_scales or attention[n].parts in kinds}
    elif len(with_scales) > 1:
        field = _field_that_tells(config, kept, kept & set(with_scales))
        kept = kept & set(with_scales) if field else kept
    heads = {n: heads for n, heads in layers.heads.items() if n in kept}
    apart = tuple(n for n in layers.heads if n not in kept) if field else ()
    return replace(layers, heads=heads, field=field, apart=apart)


def with_tied_weights(layers: Layers, attention: Mapping[int, Attention], present: Collection[int]) -> set[int]:
    """The layers whose attention is stored with another layer: each has its own cache (Zamba 2).

    These are the layers without attention among the tensors that the config distinguishes from others, which
    have none.

    Args:
        layers: as the config has them.
        attention: the layers with an attention module.
        present: the layers of which there is any tensor.
    """
    if layers.field is None or layers.heads.keys() >= set(present):
        return set()
    without = {n for n in present if n not in attention or not attention[n].shapes}
    return {n for n in layers.heads if n in without and n not in layers.unsure}


def _without_unknown_types(layers: Layers, with_scales: Collection[int]) -> Layers:
    """Without the layers of unknown types of which none has scales, if all other layers have some."""
    scaled = {layers.unsure.get(n) for n in with_scales}
    apart = tuple(n for n in layers.heads if n in layers.unsure and layers.unsure[n] not in scaled)
    heads = {n: heads for n, heads in layers.heads.items() if n not in apart}
    if not apart or not heads or not heads.keys() <= set(with_scales):
        return layers
    return replace(layers, heads=heads, apart=apart)


def with_counts(
    layers: Layers, config: Mapping[str, Any], attention: Mapping[int, Attention], counts: Mapping[int, int]
) -> dict[int, Heads]:
    """The heads of layers; a number of scales common to K and V may correct the config.

    The config is overridden by a number that the shapes of projections confirm; or, without projections, by a
    number in one of its own fields on KV heads with an unknown convention.

    Args:
        layers: as the config has them.
        config: the model's.
        attention: the attention modules that there are.
        counts: the number of scales of K and V, by layer.
    """
    heads = dict(layers.heads)
    unknown = set(_numbers(config, _ANY_KV_HEADS, _KNOWN_KV_HEADS))
    for n, count in counts.items():
        given = heads.get(n, Heads())
        if given.kv in (None, count):
            continue
        module = attention.get(n)
        by_shape = module is not None and module.rows("k_proj") is not None
        if count == kv_heads_by_tensors(config, given, module) or (not by_shape and count in unknown):
            heads[n] = Heads(None, count)
    return heads


#: Fields that distinguish layers for reasons other than their cache.
_OTHER_REASON = re.compile(r"mlp|moe|expert|dense|ffn|rope|window|sliding|cross|token")
_PERIOD = re.compile(r"interval|period|every|freq|group_size")


def _field_that_tells(config: Mapping[str, Any], layers: Collection[int], some: Collection[int]) -> str | None:
    """The config field that distinguishes exactly these layers from the others."""
    for name, value in _fields(config):
        if not _OTHER_REASON.search(name) and _tells(name, value, set(layers), set(some)):
            return name
    return None


def _tells(name: str, value: Any, layers: set[int], some: set[int]) -> bool:
    if some == layers:
        return False
    period = positive(value)
    if period is not None:
        return bool(_PERIOD.search(name)) and some == {n for n in layers if (n + 1) % period == 0}
    if not isinstance(value, (list, str)):
        return False
    numbers = [x for x in value if isinstance(x, int) and not isinstance(x, bool)]
    one_of_two = (some, layers - some)
    if len(numbers) == len(value) and any(set(numbers) in (x, {n + 1 for n in x}) for x in one_of_two):
        return True
    if len(value) != max(layers) + 1:
        return False
    kinds = [{repr(value[n]) for n in part} for part in one_of_two]
    return not kinds[0] & kinds[1]


def _numbers(config: Mapping[str, Any], name: re.Pattern[str], without: Collection[str] = ()) -> Iterator[int]:
    """The numbers in all fields with such names."""
    for path, value in _fields(config):
        last = path.rpartition(".")[2]
        if name.search(last) and last not in without:
            yield from filter(None, map(positive, value if isinstance(value, list) else [value]))


def _fields(config: Mapping[str, Any], above: str = "", depth: int = 3) -> Iterator[tuple[str, Any]]:
    """All fields, including nested ones, by path."""
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config" and depth:
            yield from _fields(value, f"{above}{name}.", depth - 1)
        else:
            yield f"{above}{name}", value
