"""The devices that tests run on, and the report of tests not run without a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import fp8kv


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the operators run on."""
    if request.param == "cuda":
        require_cuda()
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """For tests that need a GPU."""
    require_cuda()
    return torch.device("cuda")


def require_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    if fp8kv.build_info()["cuda_missing"] is not None:
        pytest.fail(f"there is a GPU, but no CUDA kernels: {fp8kv.build_info()['cuda_missing']}")


def require_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after all other reports
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> object:
    """Reports how many cases need a GPU, a larger one, or more of them, from the reasons of skips."""
    result = yield
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and "GPU" in report.longrepr[2]
    )
    if reasons:
        counts = [reason if len(reasons) == 1 else f"{reason} ({n:,})" for reason, n in reasons.most_common()]
        cases = f"{reasons.total():,} case{'s were' if reasons.total() > 1 else ' was'}"
        terminalreporter.write_line(f"CUDA: {cases} not run: {', '.join(counts)}", yellow=True)
    return result
