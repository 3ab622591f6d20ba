"""Writes safetensors files in chunks: tensors copied from other files, and new ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fp8kv.checkpoint._read.safetensors import DTYPES, StoredTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `dtype`, `shape` and `size` as in `StoredTensor`, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> NewTensor:
        """A copy of a small tensor on the CPU, of one of the `DTYPES` and at least one dimension."""
        data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), data)

    @property
    def size(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        yield self.data


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor | NewTensor], metadata: dict[str, str] | None) -> None:
    """Writes a file of these tensors.

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


def _item_size(tensor: StoredTensor | NewTensor) -> float:
    """Bytes of an element; empty tensors come first, where any of them is aligned."""
    count = math.prod(tensor.shape)
    return tensor.size / count if count else math.inf
