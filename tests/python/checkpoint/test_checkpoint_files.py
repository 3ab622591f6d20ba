"""Reading and writing safetensors files, compared with the package `safetensors`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint_files import ATTENTION, SIZES, config
from fp8kv import CheckpointError, audit_checkpoint
from fp8kv.checkpoint._read.safetensors import DTYPES, StoredTensor, read_header
from fp8kv.checkpoint._read.scales import read_numbers
from fp8kv.checkpoint._write.safetensors import NewTensor, write_tensors

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda x: x != "__metadata__")


def some_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(100).reshape(shape).to(DTYPES[name])


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6),
    st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1),
)
def test_a_file_of_the_package_is_read_as_the_package_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    entries: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str] | None,
) -> None:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file({name: some_tensor(*entry) for name, entry in entries.items()}, path, metadata)
    tensors, found = read_header(path)
    assert found == metadata
    with safe_open(path, "pt") as theirs:
        assert tensors.keys() == set(theirs.keys())
        for name, ours in tensors.items():
            shown = theirs.get_slice(name)
            assert (ours.dtype, list(ours.shape)) == (shown.get_dtype(), shown.get_shape())
            numbers = read_numbers(ours, scale=False)
            assert numbers is not None
            assert numbers.tolist() == theirs.get_tensor(name).float().flatten().tolist()


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes.filter(lambda x: len(x) > 0)), max_size=6))
def test_the_package_reads_a_file_that_is_written_here(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    tensors = {name: some_tensor(*entry) for name, entry in entries.items()}
    write_tensors(path, {name: NewTensor.of(x) for name, x in tensors.items()}, {"format": "pt"})
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape)
        assert theirs[name].float().tolist() == tensor.float().tolist()


def test_tensors_of_dtypes_that_nobody_knows_yet_are_read_and_copied(tmp_path: Path) -> None:
    header = {
        "new": {"dtype": "MX9", "shape": [8], "data_offsets": [0, 9]},
        "scale": {"dtype": "F32", "shape": [1], "data_offsets": [9, 13]},
    }
    text = json.dumps(header).encode()
    data = bytes(range(13))
    (tmp_path / "old.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    tensors, _ = read_header(tmp_path / "old.safetensors")
    write_tensors(tmp_path / "new.safetensors", tensors, None)
    copied, _ = read_header(tmp_path / "new.safetensors")
    assert {name: (x.dtype, x.shape, b"".join(x.chunks())) for name, x in copied.items()} == {
        "new": ("MX9", (8,), data[:9]),
        "scale": ("F32", (1,), data[9:]),
    }


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert time.perf_counter() - start < 0.1
    assert str(error.value) == (f"{path} is no whole safetensors file: the header cannot have 100000001 of 200000000 bytes")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": 3, "shape": [1], "data_offsets": [0, 4]}, "its header has an entry {'dtype': 3, "),
        ({"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}, "its header has an entry {'dtype': 'U8', "),
        (
            {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]},
            "a shape or an offset in its header is no number of elements or bytes",
        ),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0, 8]}, "its tensors end at byte 116 of 112"),
    ],
    ids=["dtype", "offsets", "shape", "beyond the end"],
)
def test_what_is_wrong_with_a_header_is_said(tmp_path: Path, entry: dict[str, object], reason: str) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps({"a": entry}).encode()
    text += b" " * (100 - len(text))
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path} is no whole safetensors file: {reason}")


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1234")
    with pytest.raises(OSError) as error:
        list(StoredTensor("U8", (8,), path, 0, 8).chunks())
    assert str(error.value) == f"{path} has become shorter while it was read"


def test_a_scale_larger_than_any_does_not_fill_the_memory(tmp_path: Path) -> None:
    """100 GB of K scales, all in a hole of a sparse file."""
    name, size = f"{ATTENTION.format(layer=0)}.k_scale", 100 << 30
    header = {name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        os.truncate(path, 8 + len(text) + size)
    except OSError as error:
        pytest.skip(f"the file system has no files of this size: {error}")
    sizes = SIZES | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config() | sizes))
    problem, *_ = audit_checkpoint(tmp_path)
    assert (problem.kind, problem.tensor) == ("file-corrupt", name)
    assert f"{size} bytes are too many for scales" in problem.message
