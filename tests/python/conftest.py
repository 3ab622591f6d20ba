"""Fixtures for all tests. Tests with `device` run on the CPU and, if there is one, on the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read when PyTorch is loaded. Threads that spin while they wait make tests ten times slower on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import tiny_models
from devices import cuda as cuda
from devices import device as device
from devices import pytest_terminal_summary as pytest_terminal_summary
from devices import require_cuda
from fp8kv import _introspect
from helpers import torch_threads


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups tests that must run in the same process, for `--dist loadgroup`.

    Tests that need most of the memory of a GPU, so that they never run at the same time; and those of a
    module that share its `ranks`, so that the ranks are started once.
    """
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.xdist_group("large"))
        elif "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(f"ranks of {item.path.stem}"))


ISAS = ["generic", "avx2", "avx512"]


@contextmanager
def forced_isa(isa: str) -> Iterator[str]:
    if isa not in _introspect.cpu_isas():
        pytest.skip(f"this processor, or this build, has no {isa}")
    before = _introspect.cpu_isa()
    _introspect.force_cpu_isa(isa)
    yield isa
    _introspect.force_cpu_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every CPU instruction set the kernels are compiled for, made the active one."""
    with forced_isa(request.param):
        yield request.param


@pytest.fixture(params=[*ISAS, "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of all kernels there are: as `isa`, and CUDA."""
    if request.param == "cuda":
        require_cuda()
        yield torch.device("cuda")
        return
    with forced_isa(request.param):
        yield torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, for models so small that threads only slow each other down."""
    with torch_threads(1):
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Resets `torch.compile` before and after the test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model with random weights and its tokenizer."""
    return tiny_models.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 of its tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(tiny_models.random_text(400))
    return path
