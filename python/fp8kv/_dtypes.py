"""The formats that the library quantizes to, the dtypes of values, and what caches of them are called."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """A quantized format; a new one is a row of `FORMATS`.

    Attributes:
        dtype: of its tensors.
        max: the largest finite value.
        min_scale: the smallest scale that is computed, that of a group of zeros.
        nan_byte: what NaN is quantized to.
        cache_names: the spellings of `kv_cache_dtype`. The last is what the public attribute
            `kv_cache_dtype` of a cache says that was made with the dtype; the sentences of the operators
            call the format by the first.
    """

    dtype: torch.dtype
    max: float
    min_scale: float
    nan_byte: int
    cache_names: tuple[str, ...]


FORMATS = {
    row.dtype: row
    for row in (
        Format(
            torch.float8_e4m3fn,
            max=448.0,
            min_scale=1 / (448 * 512),
            nan_byte=0x7F,
            cache_names=("fp8", "fp8_e4m3"),
        ),
        Format(
            torch.float8_e5m2,
            max=57344.0,
            min_scale=1 / (57344 * 512),
            nan_byte=0x7F,
            cache_names=("fp8_e5m2",),
        ),
        Format(
            torch.int8,
            max=127.0,
            min_scale=1 / (127 * 512),
            nan_byte=0,
            cache_names=("int8",),
        ),
    )
}
#: Those of FP8. Only in these can queries be quantized, and only tensors of these may be uint8.
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
#: What is meant where no format is named: by configs of checkpoints, hence by calibration, and by benchmarks.
DEFAULT_FORMAT = FORMATS[torch.float8_e4m3fn]
#: What is quantized, and what is dequantized to.
REAL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """As in "float8_e4m3fn"."""
    return str(dtype).removeprefix("torch.")


#: What `kv_cache_dtype` can be, but for "auto", and the dtype of such a cache; the quantized ones first.
CACHE_DTYPES = {
    **{name: row.dtype for row in FORMATS.values() for name in row.cache_names},
    **{dtype_name(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)},
}
#: The `kv_cache_dtype` of each dtype; of a format the last of its `cache_names`.
CACHE_NAMES = {dtype: name for name, dtype in CACHE_DTYPES.items()}
#: What `kv_cache_dtype` can be if the cache is quantized.
QUANTIZED_CACHE_NAMES = tuple(name for row in FORMATS.values() for name in row.cache_names)
