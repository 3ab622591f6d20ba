"""The header of a safetensors file, and its tensors as bytes at offsets.

Why the package of that name is not used: docs/internals/checkpoint_files.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8kv.checkpoint.problems import CheckpointError

#: The index of a checkpoint of several files.
INDEX_FILE = "model.safetensors.index.json"
#: The dtypes that PyTorch has too, by their name in a header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}

_CHUNK = 1 << 24
_LONGEST_HEADER = 100_000_000  # of the format


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its header entry and the location of its bytes.

    Attributes:
        dtype: the name in the header, such as "BF16"; may be unknown.
        shape: its sizes.
        path: the file.
        offset: of its first byte in the file.
        size: number of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, in chunks.

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.size
            while left > 0:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise OSError(f"{self.path} has become shorter while it was read")
                left -= len(chunk)
                yield chunk


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str] | None]:
    """The tensors of a file by name, in the order of their bytes, and its ``__metadata__``.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is not a safetensors file, or incomplete.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"the header cannot have {length} of {size} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None)
        tensors = {name: _stored(entry, path, 8 + length) for name, entry in header.items()}
        end = max((tensor.offset + tensor.size for tensor in tensors.values()), default=8 + length)
        if end != size:
            raise ValueError(f"its tensors end at byte {end} of {size}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset)), metadata


def _stored(entry: dict[str, object], path: Path, start: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError(f"its header has an entry {entry}")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise ValueError(f"its header has an entry {entry}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a shape or an offset in its header is no number of elements or bytes")
    return StoredTensor(dtype, tuple(shape), path, start + begin, end - begin)
