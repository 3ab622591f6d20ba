"""Locating a checkpoint: a folder, a file of tensors or JSON, or a model on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fp8kv.checkpoint._read.config import CONFIG_FILE, MISTRAL_FILE, MODELOPT_FILE

#: The id of a model on the Hub: an owner and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: Files that describe their folder.
_OF_FOLDER = re.compile(rf"{re.escape(CONFIG_FILE)}|{MODELOPT_FILE}|{MISTRAL_FILE}|.+\.index\.json")
_NEEDED = ["*.json", "*.safetensors"]


def locate(checkpoint: str | Path, caller: str) -> Path:
    """The folder, .safetensors file or .json file of a checkpoint; downloaded from the Hub if needed.

    Raises:
        FileNotFoundError: it does not exist, and cannot be downloaded.
        ValueError: it is another kind of file, or not a path.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise ValueError(f"{caller}: checkpoint must be a path, got {type(checkpoint).__name__}")
    path = Path(checkpoint)
    if not _exists(path):
        if not _HUB_ID.fullmatch(str(checkpoint)) or path.suffix in (".json", ".safetensors"):
            raise FileNotFoundError(
                f"{caller}: checkpoint must be a directory or a .safetensors file, but {path} does not exist"
            )
        return _fetch(str(checkpoint), caller)
    if path.is_dir():
        return path
    if _OF_FOLDER.fullmatch(path.name):
        return path.parent
    if path.suffix not in (".safetensors", ".json"):
        raise ValueError(f"{caller}: checkpoint must be a directory, a .safetensors file or a .json file of scales, got {path}")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _fetch(model: str, caller: str) -> Path:
    """The folder of a model on the Hub, possibly from the download cache."""
    what = f"{caller}: checkpoint must be a directory or a .safetensors file, but {model} does not exist"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{what}; if it is a model on the Hugging Face Hub, download it first, or install "
            "huggingface_hub, with which this is done here: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(model, allow_patterns=_NEEDED))
    except Exception as error:
        # Any error: of the network, the Hub or the disk.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FileNotFoundError(
            f"{what}, and it cannot be downloaded from the Hugging Face Hub as a model of that id: {reason}"
        ) from error
