"""`remap_scale_name`: maps the names of attention scales in checkpoints to one form.

The names of all producers are data: attention modules, the forms of names below them, and the words that
distinguish other models from the language model.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Modules

#: Modules of attention that cache the tokens of their own model.
_SELF = r"self_attn|self_attention|attention|attn|mixer|SelfAttention|temporal_block"
#: Modules of attention whose keys and values come from another model: an encoder, or a vision tower.
_CROSS = (
    r"cross_attn|encoder_attn|encdec_attn|src_attn|multihead_attn|cross_attention|crossattention|"
    r"encoder_decoder_attention|EncDecAttention"
)
#: A module between a layer and its attention: T5 (layer.0), DBRX (norm_attn_norm), and draft models.
_ABOVE = r"layer\.\d+|[A-Za-z_]+"
#: Modules between attention and its scales: engines (vLLM, SGLang), ChatGLM, GPT-Neo, BERT.
_BELOW = r"(?:attn|attn_mqa|attn_mha|mla_attn(?:\.mla_attn)?|core_attention|attention|self)"

#: Modules around other modules, which have their names as parts of all names in them: torch.compile, FSDP, checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

#: A quick filter for names in attention; most tensors belong to experts.
_ATTENTION = re.compile(r"att|Att|mixer|temporal_block")
#: Layer and attention of a tensor; the first matching number, because T5 has another one after it.
_PLACE = re.compile(
    rf"(?P<stack>(?:.*?\.)?)(?P<layer>\d{{1,4}})\.(?:(?P<above>{_ABOVE})\.)??(?P<module>{_SELF}|{_CROSS})\."
    r"(?P<rest>.*)"
)
#: EAGLE-3 has one layer, without a number.
_ONLY_LAYER = re.compile(rf"(?P<stack>(?:.*\.)?midlayer)\.(?P<module>{_SELF})\.(?P<rest>.*)")

# Forms of names, below the attention module

_KIND = r"(?:(?P<scale>scale)|zero_point)"
_LETTER = r"(?P<letter>q|k|v|kv)"
_FUSED = r"qkv_proj|qkqkv_proj|qkv|Wqkv|wqkv|W_pack|c_attn|query_key_value|kv_proj|kv_a_proj_with_mqa|kv_b_proj"
_FORMS = [
    re.compile(rf"(?:{_BELOW}\.)?{form}")
    for form in (
        # llm-compressor, AutoFP8 (kv), and parameters of vLLM and SGLang
        rf"{_LETTER}_{_KIND}",
        # ModelOpt, and its form after fusing projections
        rf"(?P<letter>[qkv])_proj\.(?P=letter)_{_KIND}",
        rf"(?:{_FUSED})\.{_LETTER}_{_KIND}",
        # Quark, and older compressed-tensors
        rf"(?P<letter>[qkv])_proj\.output_{_KIND}",
        # Seen in the wild
        rf"(?P<letter>q|[kv](?=_cache))(?:_cache)?\.{_KIND}",
        # Checkpoints of TensorRT-LLM
        r"(?P<letter>k|v|kv)_cache_(?P<scale>scaling_factor)",
        # Mistral's own format
        rf"{_LETTER}_fake_quantizer\.(?P<scale>qscale_act)",
        # ModelSlim, and parameters of vLLM on Ascend
        r"(?P<letter>[kv])_proj\.kv_cache_(?:(?P<scale>scale)|offset)",
        r"(?P<letter>[kv])_cache_(?:(?P<scale>scale)|offset)",
    )
]

#: Of ModelOpt's affine cache, which are no biases of projections.
_BIAS = re.compile(r"(?P<letter>[kv])_proj\.(?P=letter)_bias")

# Names that look like scales but have none of these forms

_SCALE_WORD = re.compile(r"scal(?:e|ing)|zero_?point|_amax", re.IGNORECASE)
_LETTER_WORD = re.compile(
    r"(?<![a-z])(?:q|k|v|kv|qkv|key|value|query|kqv)(?![a-z])|(?:^|_)(?:kv_?)?cache(?![a-z])", re.IGNORECASE
)
#: Other scales: of weights and inputs (such as Mistral's wk.qscale_act), probabilities, norms,
#: adapters; the plural is used by GPTQ and AWQ, for weights.
_OTHER_SCALE = re.compile(
    r"weight|input|w[qkvo]\.qscale_act|prob|softmax|norm|logit|lora|rope|rotary|(?:^|\.)(?:o|out)_|"
    r"indexer|bias|shape|\.scales$|layer_scale|residual",
    re.IGNORECASE,
)

# Models

#: Parts of a name that do not identify a model.
_TRIVIAL = re.compile(r"model|module|base_model|transformer|backbone|language_model|text_model|llm|layers?|h|blocks?")
#: Models that fill no KV cache while a text is generated.
_TOWERS = re.compile(
    r"vision|visual|image|audio|speech|vit(?![a-z])|siglip|(?<!transformer\.)encoder|qformer|resampler|"
    r"perceiver|projector|connector|vocoder|2wav|diffusion|dit(?![a-z])|sam(?![a-z])|codec"
)
#: Their encoder may still be a language model.
_LANGUAGE_MODEL = re.compile(r"(?:^|\.)(?:language_model|text_model|llm)(?=\.|$)")
#: Models with a KV cache that the language model does not need: drafts, and speech generation.
_COMPANIONS = re.compile(r"mtp|nextn|midlayer|eagle|draft|medusa|speculat|assistant|talker|code_predictor|depth_decoder")


class ScaleName(NamedTuple):
    """Whose scale or zero point a tensor is.

    Attributes:
        model: the model, as named by `model_of_stack`.
        layer: index in the model.
        module: the attention module, such as "self_attn" or "encoder_attn".
        letters: "q", "k", "v" or "kv".
        kind: "scale" or "zero_point".
    """

    model: str
    layer: int
    module: str
    letters: str
    kind: str


class Place(NamedTuple):
    """The location of an attention tensor: `stack` is the prefix before the layer number."""

    stack: str
    layer: int
    module: str
    rest: str


def remap_scale_name(name: str) -> str | None:
    """The standard name of an attention scale or zero point, from any producer's name.

    Args:
        name: of a tensor in a checkpoint.

    Returns:
        ``model.layers.N.self_attn.{q,k,v}_scale`` or ``..._zero_point``; None if it is not a scale of Q, K or
        V: a weight, a scale of a weight, input or probabilities, or a tensor of another model in the
        checkpoint, such as a vision tower, or of attention to another model. `kv_scale`, one scale for K and
        V, becomes `k_scale`; it must be used for V too.

    Example:
        >>> from fp8kv import remap_scale_name
        >>> remap_scale_name("language_model.model.layers.3.self_attn.k_proj.k_scale")
        'model.layers.3.self_attn.k_scale'
        >>> remap_scale_name("model.layers.3.self_attn.k_proj.weight_scale") is None
        True
    """
    found = parse_scale_name(name)
    if found is None:
        return None
    layer, letters, kind = found
    return f"model.layers.{layer}.self_attn.{letters[0]}_{kind}"


def parse_scale_name(name: str) -> tuple[int, str, str] | None:
    """Layer, letters ("q", "k", "v" or "kv") and kind ("scale" or "zero_point"); None for other tensors.

    Tensors of other models, and of attention to them, give None, except the layer of EAGLE-3.
    """
    found = find_scale_name(name)
    if found is None or is_cross(found.module) or (is_side_model(name) and "midlayer" not in found.model):
        return None
    return found.layer, found.letters, found.kind


def find_scale_name(name: str) -> ScaleName | None:
    """Parses the name of a scale, in any model; None if it has no known form."""
    place = find_place(name)
    return None if place is None else scale_at(place)


def scale_at(place: Place) -> ScaleName | None:
    """Parses the part of a name below attention; None if it is not a scale."""
    for form in _FORMS:
        match = form.fullmatch(place.rest)
        if match is not None:
            kind = "scale" if match["scale"] else "zero_point"
            return ScaleName(model_of_stack(place.stack), place.layer, place.module, match["letter"], kind)
    return None


def bias_at(place: Place) -> str | None:
    """The letter, "k" or "v", of a bias of ModelOpt's affine cache; None if it is something else."""
    match = _BIAS.fullmatch(place.rest)
    return None if match is None else match["letter"]


def find_place(name: str) -> Place | None:
    """Layer and attention of a tensor, or of a module with a trailing dot; None if it is not in attention."""
    if not _ATTENTION.search(name):
        return None
    name = unwrapped(name)
    match = _PLACE.fullmatch(name)
    if match is not None:
        stack, above = match["stack"], match["above"]
        if above is not None and is_side_model(above):
            stack += f"{above}."
        return Place(stack, int(match["layer"]), match["module"], match["rest"])
    match = _ONLY_LAYER.fullmatch(name)
    return None if match is None else Place(match["stack"], 0, match["module"], match["rest"])


def unwrapped(name: str) -> str:
    """The name of a tensor without parts such as "_orig_mod", which wrappers of modules add.

    Example:
        >>> from fp8kv.checkpoint.names import unwrapped
        >>> unwrapped("_orig_mod.model.layers.3.self_attn._fsdp_wrapped_module.k_scale")
        'model.layers.3.self_attn.k_scale'
    """
    return _WRAPPERS.sub("", name)


def looks_like_scale(name: str) -> bool:
    """Whether a name without a known form looks like a scale or zero point of Q, K or V.

    Example:
        >>> from fp8kv.checkpoint.names import looks_like_scale
        >>> looks_like_scale("model.layers.3.self_attn.key_scale_inv")
        True
        >>> looks_like_scale("model.layers.3.self_attn.k_proj.weight_scale_inv")
        False
    """
    above, _, last = name.rpartition(".")
    if not _SCALE_WORD.search(last) or "indexer" in name:
        return False
    if last == "_amax":
        above = above.removesuffix(".output_quantizer")
    end = f"{above.rpartition('.')[2]}.{last}"
    return not _OTHER_SCALE.search(end) and _LETTER_WORD.search(end) is not None


def is_cross(module: str) -> bool:
    """Whether an attention module takes its keys and values from another model."""
    return re.fullmatch(_CROSS, module) is not None


def model_of_stack(stack: str) -> str:
    """The distinctive part of the name of a stack of layers, without trivial parts; may be "".

    Example:
        >>> from fp8kv.checkpoint.names import model_of_stack
        >>> model_of_stack("model.layers."), model_of_stack("talker.code_predictor.model.layers.")
        ('', 'talker.code_predictor')
    """
    parts = (part for part in stack.split(".") if part and not part.isdecimal())
    return ".".join(part for part in parts if not _TRIVIAL.fullmatch(part))


def is_tower(name: str) -> bool:
    """Whether a tensor or stack belongs to a model without a KV cache."""
    found = list(_TOWERS.finditer(name))
    return bool(found) and not _LANGUAGE_MODEL.search(name, found[-1].end())


def is_side_model(name: str) -> bool:
    """Whether a tensor or stack belongs to a model other than the language model."""
    return is_tower(name) or _COMPANIONS.search(name) is not None
