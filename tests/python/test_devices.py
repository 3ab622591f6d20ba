"""The line at the end of a session that says how many cases were not run for want of a GPU."""

from __future__ import annotations

import pytest
import torch

pytest_plugins = ["pytester"]

CONFTEST = "from devices import cuda, device, pytest_terminal_summary"
TESTS = """
import pytest

@pytest.mark.parametrize("x", [1, 2, 3])
def test_on_both(device, x): pass

def test_on_cuda_only(cuda): pass

def test_of_something_else():
    pytest.skip("this processor can't do it")
"""
LARGE = """
import pytest
import torch
from devices import require_gpus
from helpers import require_gpu_memory

@pytest.mark.large
def test_that_is_large(device):
    require_gpu_memory(device, 24)

def test_of_two():
    require_gpus(2)
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder of tests on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    return pytester


def last_lines(result: pytest.RunResult) -> list[str]:
    """The line before the one that counts all tests, and that."""
    return [line for line in result.outlines if line.strip()][-2:]


def test_cases_without_a_gpu_are_counted(session: pytest.Pytester) -> None:
    result = session.runpytest_inprocess("-ra")
    result.assert_outcomes(passed=3, skipped=5)
    assert last_lines(result)[0] == "CUDA: 4 cases were not run: PyTorch finds no GPU"


def test_one_case(session: pytest.Pytester) -> None:
    result = session.runpytest_inprocess("-k", "only")
    assert last_lines(result)[0] == "CUDA: 1 case was not run: PyTorch finds no GPU"


def test_nothing_is_said_where_all_cases_were_run(session: pytest.Pytester) -> None:
    result = session.runpytest_inprocess("-k", "cpu or else")
    result.assert_outcomes(passed=3, skipped=1, deselected=4)
    result.stdout.no_fnmatch_line("*CUDA*")


def test_cases_for_larger_machines_are_counted(session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU of this machine, real or not, has 8 GB."""
    session.makepyfile(test_large=LARGE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"total_memory": 8e9}))
    result = session.runpytest_inprocess("-m", "not large", "test_large.py")
    assert last_lines(result)[0] == "CUDA: 1 case was not run: needs 2 GPUs"
    result = session.runpytest_inprocess("test_large.py")
    assert "needs 24 GB of GPU memory (1)" in last_lines(result)[0]


def test_cases_of_all_workers_are_counted(session: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    session.makeconftest(f"{CONFTEST}\nimport torch\ntorch.cuda.is_available = lambda: False")
    result = session.runpytest_inprocess("-n", "2")
    result.assert_outcomes(passed=3, skipped=5)
    assert last_lines(result)[0] == "CUDA: 4 cases were not run: PyTorch finds no GPU"
