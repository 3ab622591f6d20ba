"""What can be wrong with the scales of a checkpoint, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """One finding of `fp8kv.audit_checkpoint`.

    Attributes:
        kind: what is wrong, in one word with hyphens, such as "not-finite"; the kinds are listed in
            docs/checkpoints.md.
        severity: "error": the scales must not be used as they are; "warning": they can be used and the model
            may be worse for it; "note": good to know.
        message: one sentence with layer, tensor and value.
        remedy: what to do about it, one sentence.
        layer: index of the layer; None if it concerns the whole checkpoint.
        tensor: name in the file; None if it isn't about one.
        value: what was found, as text; None if there is nothing to show.

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
        problems: all findings of severity "error".

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
