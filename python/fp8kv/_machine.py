"""The name of the processor."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Its model, or its architecture where the system says no more."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()
