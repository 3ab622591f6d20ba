"""`remap_scale_name`: the names that scales of attention have in checkpoints, and the one they get here."""

from __future__ import annotations

import re

#: Layer and attention module of a tensor of a language model, whatever stands before.
_ATTENTION = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<layer>\d+)\.(?:self_attn|self_attention|attention|attn|mixer)\.(?P<rest>.+)"
)
#: What has layers of its own, numbered from 0, beside those of the language model. ChatGLM names the latter
#: transformer.encoder.
_OTHER_MODELS = re.compile(r"vision|visual|image|audio|speech|(?<!transformer\.)encoder|mtp")
_KINDS = r"_(?P<kind>scale|zero_point)"
_FORMS = [
    re.compile(form)
    for form in (
        rf"(?:attn\.)?(?P<letter>q|k|v|kv){_KINDS}",
        rf"(?:qkv|qkqkv)_proj\.(?P<letter>q|k|v|kv){_KINDS}",
        rf"(?P<letter>[qkv])_proj\.(?:(?P=letter)|output){_KINDS}",
        r"(?P<letter>q|[kv](?=_cache))(?:_cache)?\.(?P<kind>scale|zero_point)",
    )
]


def remap_scale_name(name: str) -> str | None:
    """The name of a scale or zero point of attention, whoever wrote the checkpoint.

    Args:
        name: of a tensor in a checkpoint.

    Returns:
        ``model.layers.N.self_attn.{q,k,v}_scale`` or ``..._zero_point``; None if it is no scale of Q, K or V:
        a weight, the scale of a weight, of an input or of probabilities, or of another model in the
        checkpoint, such as a vision tower. `kv_scale`, one scale for K and V, becomes `k_scale`; it must be
        taken for V too.

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
    """Layer, letters ("q", "k", "v" or "kv") and kind ("scale" or "zero_point"); None for other tensors."""
    module = _ATTENTION.fullmatch(name)
    if module is None or _OTHER_MODELS.search(module["prefix"]):
        return None
    for form in _FORMS:
        match = form.fullmatch(module["rest"])
        if match is not None:
            return int(module["layer"]), match["letter"], match["kind"]
    return None
