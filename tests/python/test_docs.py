"""Every example runs: the docstrings of the package, and the Python blocks of README.md and docs/."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import runpy
from pathlib import Path

import pytest

import fp8kv

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python"
MODULES = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((PACKAGE / "fp8kv").rglob("*.py"))
    if path.name != "__main__.py"
]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, (
        f"{result.failed} of {result.attempted} examples fail; they are in the captured output"
    )


@pytest.mark.parametrize("name", [name for name in fp8kv.__all__ if callable(getattr(fp8kv, name))])
def test_every_public_function_and_class_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(fp8kv, name).__doc__ or "")


def python_blocks(page: Path) -> list[str]:
    """The fenced blocks of a page marked `python`; those marked `python no-run` are not run."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, so that a page may build on what it did before; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "performance.md"], ids=lambda page: page.name
)
def test_the_tables_of_a_page_hold_the_numbers_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    render = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["render"]
    assert "<!-- table " in text
    assert render(text) == text, "run `python benchmarks/tables.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert os.path.exists(page.parent / target), f"{page.name} links to {target}"
