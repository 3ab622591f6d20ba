"""Problems of the scales of a checkpoint, and their remedies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """A result of `fp8kv.audit_checkpoint`.

    Attributes:
        kind: a hyphenated identifier, such as "not-finite"; the kinds are listed in docs/checkpoints.md.
        severity: "error": the scales must not be used; "warning": they can be used, but accuracy may suffer;
            "note": informational.
        message: one sentence with layer, tensor and value.
        remedy: what to do about it, one sentence.
        layer: index of the layer; None if it concerns the whole checkpoint.
        tensor: name in the file; None if it does not concern a single tensor.
        value: the value found, as text; None if there is none.

    Example:
        >>> from fp8kv import Problem
        >>> problem = Problem("no-scales", "error", "Layer 7 has no scales.", "Calibrate the model.", layer=7)
        >>> print(problem)
        Layer 7 has no scales. Calibrate the model.
    """

    kind: str
    severity: Severity
    message: str
    remedy: str
    layer: int | None = None
    tensor: str | None = None
    value: str | None = None

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class CheckpointError(ValueError):
    """The scales of a checkpoint cannot be used.

    Attributes:
        problems: all those of severity "error".

    Example:
        >>> import json, pathlib, tempfile
        >>> import fp8kv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scheme = {"quant_method": "fp8", "kv_cache_scheme": "static"}
        ...     config = {"num_hidden_layers": 1, "quantization_config": scheme}  # and no tensors
        ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
        ...     try:
        ...         fp8kv.load_kv_scales(folder)
        ...     except fp8kv.CheckpointError as error:
        ...         print(sorted({problem.severity for problem in error.problems}))
        ['error']
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


# The kinds of problems; docs/checkpoints.md lists them

_RECALIBRATE = "Calibrate the model again, for example with fp8kv calibrate."
_DOWNLOAD = "Download or copy the file again."
_IGNORE_QUERY = (
    "Ignore the query scales and leave queries unquantized (load_kv_scales(..., query=False)), or calibrate the model again."
)

#: Kinds of errors that `load_kv_scales` accepts on request.
ACCEPTABLE = ("before-rope", "nvfp4-cache")
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
    "json-unreadable": (
        "error",
        "Give it one of the forms in docs/checkpoints.md, or the checkpoint's directory.",
    ),
    "tensor-missing": ("error", "Download or copy the index and this file again, from one source."),
    "layer-missing": (
        "error",
        "Calibrate the model again, with all attention layers; engines silently use the scale 1.0.",
    ),
    "scale-missing": ("error", _RECALIBRATE),
    "query-scale-missing": ("error", _IGNORE_QUERY),
    "query-scale": ("error", "It looks like uninitialized memory. " + _IGNORE_QUERY),
    "not-finite": ("error", _RECALIBRATE),
    "not-positive": ("error", _RECALIBRATE),
    "implausible": ("error", _RECALIBRATE),
    "head-count": (
        "error",
        "Use the config.json that the scales were made with, or calibrate the model again.",
    ),
    "wrong-dtype": ("error", "Store scales as float32, float16 or bfloat16."),
    "zero-point": ("error", "Quantize the model again with symmetric scales."),
    "conflicting-scales": ("error", "Remove the scales that are out of date, or calibrate the model again."),
    "unknown-scale": (
        "error",
        "If it is a scale of K, V or Q, give it one of the names in docs/checkpoints.md, or calibrate the model again.",
    ),
    "several-models": (
        "error",
        "Choose one of them, as in load_kv_scales(..., model=...).",
    ),
    "before-rope": (
        "error",
        "Calibrate the model again (with Quark: with kv_cache_post_rope); "
        'load_kv_scales(..., accept=["before-rope"]) takes the scales all the same, which is right for a '
        "model without RoPE and without a norm of keys.",
    ),
    "nvfp4-cache": (
        "error",
        'load_kv_scales(..., accept=["nvfp4-cache"]) takes the scales for an FP8 cache, which is right where '
        "they are amax / 448, as ModelOpt has them since January 2026.",
    ),
    "fp8kv-damaged": (
        "error",
        "Copy the folder again, or remove it, so that the scales in the model's files are used; or calibrate the model again.",
    ),
    "fp8kv-outdated": (
        "error",
        "Remove the folder, so that the scales in the model's files are used; or calibrate the model again with fp8kv.",
    ),
    "affine": (
        "warning",
        "fp8kv loads them as offsets; for an engine that doesn't, calibrate the model again without biases.",
    ),
    "sources-differ": (
        "warning",
        "The first of them counts; compare the scales with the model's keys and values.",
    ),
    "latent-scales": (
        "warning",
        "Use the larger one for the whole row, or calibrate the model again.",
    ),
    "rope-unsaid": (
        "warning",
        "Compare the model's accuracy with that of a 16-bit cache, above all if it has a norm of keys; or calibrate it again.",
    ),
    "unexpected-scale": ("warning", "It is loaded; leave it out if the cache of this layer is in 16 bits."),
    "observer": (
        "warning",
        "Compare the model's accuracy with that of a 16-bit cache, or calibrate again with an observer that "
        "keeps all batches, such as static_minmax.",
    ),
    "duplicate-scale": ("note", "Nothing needs to be done; one of them is enough."),
    "unexpected-layer": ("note", "Nothing needs to be done if it belongs to a draft model."),
    "unused-query-scale": ("note", "Nothing needs to be done; queries stay unquantized, as the config says."),
    "unused-scale": ("note", "Nothing needs to be done if the other scales of the layer are complete."),
    "other-model": ("note", "Nothing needs to be done, unless it is to be quantized too."),
    "unit-scales": (
        "note",
        "Nothing needs to be done if the model was quantized so on purpose; calibrated scales clip less.",
    ),
    "layer-unquantized": ("note", "Nothing needs to be done; the cache of this layer stays in 16 bits."),
    "layers-inferred": ("note", "Nothing needs to be done if these layers have no KV cache."),
    "zero-head": ("note", "Nothing needs to be done if these heads are always zero."),
}


def make_problem(
    kind: str,
    message: str,
    *,
    layer: int | None = None,
    tensor: str | None = None,
    value: object = None,
) -> Problem:
    """A problem of one of `KINDS`, with its severity and remedy."""
    severity, remedy = KINDS[kind]
    text = None if value is None else str(value)
    where = "" if layer is None else f"Layer {layer}: "
    return Problem(kind, severity, f"{where}{message}.", remedy, layer, tensor, text)
