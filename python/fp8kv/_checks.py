"""Checks that many modules make, each with its one sentence."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args

from torch import Tensor

#: One scale for each tensor, for each KV head, or for each channel of K and V; "auto": layers differ.
Strategy = Literal["tensor", "attn_head", "channel", "auto"]
#: Whether the heads of a token, or the tokens of a head, lie together in a block of a cache.
Layout = Literal["NHD", "HND"]

#: Those of checkpoints that other engines read.
STANDARD_STRATEGIES: tuple[Strategy, ...] = ("tensor", "attn_head")
#: Those that can be asked for.
STRATEGIES: tuple[Strategy, ...] = (*STANDARD_STRATEGIES, "channel")
LAYOUTS: tuple[str, ...] = get_args(Layout)
#: Types of models of `transformers` that cache something else than keys and values.
WITHOUT_KEYS = ("reformer", "rwkv", "xlnet", "xlstm")


def require(module: str, extra: str, purpose: str) -> None:
    """An `ImportError` that says what to install, unless the module is there.

    Args:
        module: of another package, such as "transformers".
        extra: of this package, which brings it; of fp8kv[extra].
        purpose: what needs it; the sentence begins with it.
    """
    if not is_installed(module):
        raise ImportError(
            f"{purpose}: {module} must be installed, for example with pip install 'fp8kv[{extra}]'",
            name=module,
        )


def is_installed(module: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(module) is not None


def check_size(name: str, size: Any, least: int) -> None:
    """A `ValueError` that begins with `name` unless the size is an integer of at least this number."""
    check_integer(name, size)
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")


def check_integer(name: str, number: Any) -> None:
    """A `ValueError` that begins with `name` unless this is an integer, of any package."""
    if isinstance(number, bool) or not hasattr(type(number), "__index__"):
        raise ValueError(f"{name} must be an int, got {type(number).__name__}")


def is_number(x: Any) -> bool:
    """Whether it can be compared with numbers."""
    return hasattr(type(x), "__float__")


def is_scale(x: float) -> bool:
    """Finite and above 0."""
    return 0 < x < math.inf


def check_scale_values(name: str, scale: Tensor) -> None:
    """A `ValueError` that begins with `name` unless all values, on the host, are finite and above 0."""
    _check_values(name, scale, (scale > 0) & (scale < math.inf), "finite and above 0")


def check_offset_values(name: str, offset: Tensor) -> None:
    """A `ValueError` that begins with `name` unless all values, on the host, are finite."""
    _check_values(name, offset, offset.isfinite(), "finite")


def _check_values(name: str, values: Tensor, valid: Tensor, expected: str) -> None:
    if not valid.all():
        place = tuple(valid.logical_not().nonzero()[0].tolist())
        where = f" for {placed(place)}" if values.numel() > 1 else ""
        raise ValueError(f"{name} must be {expected} in fp32, got {values[place].item()}{where}")


def placed(place: tuple[int, ...]) -> str:
    """As in "head 1" or "head 1, channel 5"."""
    return ", ".join(f"{name} {index}" for name, index in zip(("head", "channel"), place, strict=False))


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """A `ValueError` that begins with `name` unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {listed(map(quoted, choices))}, got {value!r}")


def quoted(word: str) -> str:
    """As in "NHD"."""
    return f'"{word}"'


def listed(words: Iterable[str], conjunction: str = "or") -> str:
    """As in "a, b or c"."""
    *others, last = words
    return f"{', '.join(others)} {conjunction} {last}" if others else last
