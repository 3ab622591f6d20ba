"""The specified memory bandwidth of GPUs."""

from __future__ import annotations

import re

#: 1e9 bytes per second, by a part of the card's name in CUDA; the first match counts.
_SPECIFIED = {
    r"\bB200\b": 8000.0,
    r"\bH200\b": 4800.0,
    r"\bH100 PCIe\b": 2000.0,
    r"\bH100 NVL\b": 3900.0,
    r"\bH100\b": 3350.0,
    r"\bH20\b": 4000.0,
    r"\bA100-PCIE-40GB\b|\bA100-SXM4-40GB\b": 1555.0,
    r"\bA100 80GB PCIe\b": 1935.0,
    r"\bA100\b": 2039.0,
    r"\bL40S?\b": 864.0,
    r"\bL4\b": 300.0,
    r"\bA40\b": 696.0,
    r"\bA10G?\b": 600.0,
    r"\bRTX PRO 6000 Blackwell\b": 1792.0,
    r"\bRTX 6000 Ada\b": 960.0,
    r"\bRTX A6000\b": 768.0,
    r"\bRTX 5090\b": 1792.0,
    r"\bRTX 4090\b": 1008.0,
    r"\bRTX 3090\b": 936.0,
}


def specified_gbps(name: str) -> float | None:
    """The bandwidth of the card with this name; None if it is not in the table.

    Example:
        >>> from fp8kv.bench.cards import specified_gbps
        >>> specified_gbps("NVIDIA H100 80GB HBM3"), specified_gbps("an unknown card")
        (3350.0, None)
    """
    return next((gbps for pattern, gbps in _SPECIFIED.items() if re.search(pattern, name)), None)
