"""The option --device."""

from __future__ import annotations

import re

import torch

from fp8kv._machine import cpu_name
from fp8kv.cli._command import CommandError


def parse_device(name: str) -> tuple[str, int | None]:
    """Parses --device: "cpu" or "cuda", with an optional index; "auto" is the GPU if there is one.

    Raises:
        CommandError: it is anything else.
    """
    match = re.fullmatch(r"auto|cpu|cuda(:(?P<index>\d+))?", name)
    if match is None:
        raise CommandError(f'--device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}', 2)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu", None
    return name.partition(":")[0], None if match["index"] is None else int(match["index"])


def device_of(name: str) -> str:
    """The PyTorch device for --device.

    Raises:
        CommandError: there is no such device.
    """
    kind, index = parse_device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and (index or 0) >= count:
        raise CommandError(f"--device must be one that PyTorch finds, got {name!r} with {count} GPUs", 2)
    return kind if index is None else f"{kind}:{index}"


def device_name(device: str) -> str:
    """A description of the device for reports."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
