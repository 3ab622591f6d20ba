"""The kinds of problems that checkpoints have, with severity and remedy; see docs/checkpoints.md."""

from __future__ import annotations

from fp8kv.checkpoint.problems import Problem, Severity

_RECALIBRATE = "Calibrate the model anew, for example with fp8kv calibrate."
_DOWNLOAD = "Download or copy the file again."
_IGNORE_QUERY = (
    "Ignore the query scales and leave queries unquantized (load_kv_scales(..., query=False)), "
    "or calibrate the model anew."
)

#: Severity and remedy of each kind.
KINDS: dict[str, tuple[Severity, str]] = {
    "config-unreadable": ("error", "Give the checkpoint the config.json of its model."),
    "scheme-unsupported": (
        "error",
        "Quantize the model with static, symmetric FP8 scales per tensor or head.",
    ),
    "scheme-missing": (
        "error",
        "Add the kv_cache_scheme that the scales were made with to quantization_config in config.json; "
        "engines ignore the scales without it.",
    ),
    "not-quantized": ("error", "Calibrate the model, for example with fp8kv calibrate."),
    "file-missing": ("error", _DOWNLOAD),
    "file-corrupt": ("error", _DOWNLOAD),
    "tensor-missing": ("error", "Download or copy the index and this file again, from one source."),
    "layer-missing": (
        "error",
        "Calibrate the model anew, with all attention layers; engines silently use the scale 1.0.",
    ),
    "scale-missing": ("error", _RECALIBRATE),
    "query-scale-missing": ("error", _IGNORE_QUERY),
    "query-scale": ("error", "It looks like uninitialized memory. " + _IGNORE_QUERY),
    "not-finite": ("error", _RECALIBRATE),
    "not-positive": ("error", _RECALIBRATE),
    "implausible": ("error", _RECALIBRATE),
    "head-count": (
        "error",
        "Use the config.json that the scales were made with, or calibrate the model anew.",
    ),
    "wrong-dtype": ("error", "Store scales as float32, float16 or bfloat16."),
    "zero-point": ("error", "Quantize the model anew with symmetric scales."),
    "conflicting-scales": ("error", "Remove the scales that are out of date, or calibrate the model anew."),
    "observer": (
        "warning",
        "Compare the model's accuracy with that of a 16-bit cache, or calibrate anew with an observer that "
        "keeps all batches, such as static_minmax.",
    ),
    "duplicate-scale": ("note", "Nothing needs to be done; one of them is enough."),
    "unexpected-layer": ("note", "Nothing needs to be done if it belongs to a draft model."),
    "unused-query-scale": ("note", "Nothing needs to be done; queries stay unquantized, as the config says."),
    "zero-head": ("note", "Nothing needs to be done if these heads are always zero."),
}


def finding(
    kind: str,
    message: str,
    *,
    layer: int | None = None,
    tensor: str | None = None,
    value: object = None,
) -> Problem:
    """A problem of this kind, with its severity and remedy."""
    severity, remedy = KINDS[kind]
    text = None if value is None else str(value)
    where = "" if layer is None else f"Layer {layer}: "
    return Problem(kind, severity, f"{where}{message}.", remedy, layer, tensor, text)
