"""Engines as the tests have them: installed, or stood in for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import vllm_standins

INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module", params=["installed"] if INSTALLED else vllm_standins.RELEASES)
def vllm(request: pytest.FixtureRequest) -> Iterator[str]:
    """vLLM can be imported: the installed one, or else what stands in for each release."""
    vllm_standins.forget_the_plugin()
    if INSTALLED:
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, module in vllm_standins.modules(request.param).items():
            patch.setitem(sys.modules, name, module)
        yield request.param
    vllm_standins.forget_the_plugin()
