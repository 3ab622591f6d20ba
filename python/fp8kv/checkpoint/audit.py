"""`audit_checkpoint`: finds all problems of the scales of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from fp8kv.checkpoint.load import examine
from fp8kv.checkpoint.problems import Problem


def audit_checkpoint(checkpoint: str | Path, *, model: str | None = None) -> list[Problem]:
    """Returns all problems of the scales of a checkpoint, errors first; no content of it raises an error.

    Args:
        checkpoint: what `load_kv_scales` takes.
        model: which one, if there are several in the checkpoint, as for `load_kv_scales`.

    Returns:
        A problem for each defect, with layer, tensor, value, severity and a remedy; docs/checkpoints.md lists
        the kinds. Empty if there are none.

    Raises:
        FileNotFoundError: there is no such directory or file, and no model of that id can be downloaded.
        ValueError: `checkpoint` is another kind of file, or has no such model.

    Example:
        >>> import fp8kv, json, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
        >>> [problem.kind for problem in fp8kv.audit_checkpoint(folder)]
        ['file-missing', 'not-quantized']
    """
    return examine(checkpoint, "audit_checkpoint", model=model).problems
