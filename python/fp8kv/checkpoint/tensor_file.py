"""safetensors files as bytes: headers read, tensors moved from file to file without decoding them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fp8kv.checkpoint.problems import CheckpointError

_CHUNK = 1 << 24
_LONGEST_HEADER = 100_000_000  # of the format
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what the header says of it, and where its bytes are.

    Attributes:
        dtype: as safetensors names it, such as "BF16".
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
        """Its bytes, some at a time.

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


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `dtype`, `shape` and `size` as in `StoredTensor`, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> NewTensor:
        """A copy of a tensor on the CPU: float32, float16, bfloat16 or float8_e4m3fn."""
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), data)

    @property
    def size(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        yield self.data


def read_tensor_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str] | None]:
    """The tensors of a file by name, in the order of their bytes, and its ``__metadata__``.

    Only the header is read.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is no safetensors file, or not a whole one.
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


def write_tensor_file(
    path: Path, tensors: Mapping[str, StoredTensor | NewTensor], metadata: dict[str, str] | None
) -> None:
    """Writes a file of these tensors, some bytes at a time.

    Raises:
        OSError: a file cannot be read or written.
    """
    # Readers map the file into memory, so elements must be aligned, and there are no gaps: the larger go
    # first. Sorting is stable: the tensors of a file that was written like this keep their order.
    ordered = dict(sorted(tensors.items(), key=lambda item: -_item_size(item[1])))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, tensor in ordered.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered.values():
            for chunk in tensor.chunks():
                file.write(chunk)


def _stored(entry: dict[str, object], path: Path, start: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError(f"its header has an entry {entry}")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise ValueError(f"its header has an entry {entry}")
    return StoredTensor(dtype, tuple(shape), path, start + begin, end - begin)


def _item_size(tensor: StoredTensor | NewTensor) -> float:
    """Bytes of an element; empty tensors come first, where any of them is aligned."""
    count = math.prod(tensor.shape)
    return tensor.size / count if count else math.inf
