"""Examples in docstrings and on pages run, links resolve, and every public name is documented."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

import fp8kv

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python"
#: Modules that need an engine; they have no examples.
OF_ENGINES = ("vllm/backend.py", "vllm/queries.py", "vllm/versions.py", "vllm/writes.py")
MODULES = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((PACKAGE / "fp8kv").rglob("*.py"))
    if path.name != "__main__.py" and not str(path).endswith(OF_ENGINES)
]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), *(ROOT / "examples").rglob("*.md")]


def skip_without_cache_keyword(name: str) -> None:
    """Examples give Transformers' models the argument `cache`, which versions up to 5.20 call otherwise."""
    if "transformers" in name:
        transformers = pytest.importorskip("transformers")
        if "cache" not in inspect.signature(transformers.LlamaModel.forward).parameters:
            pytest.skip("the examples are for a newer Transformers")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    skip_without_cache_keyword(name)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples fail; they are in the captured output"


@pytest.mark.parametrize("name", [name for name in fp8kv.__all__ if callable(getattr(fp8kv, name))])
def test_every_public_function_and_class_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(fp8kv, name).__doc__ or "")


def python_blocks(page: Path) -> list[str]:
    """The fenced blocks of a page marked `python`; those marked `python no-run` are not run."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, so that blocks may build on earlier ones; in an empty folder."""
    skip_without_cache_keyword(page.name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_a_page_have_at_most_128_columns(page: Path) -> None:
    """As lines of code have, but for tables and what stands between fences."""
    text = re.sub(r"^ *```.*?^ *```|^ *\|[^\n]*", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 128] == []


TABLES = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))


@pytest.mark.parametrize("page", TABLES["PAGES"], ids=lambda page: page.name)
def test_the_tables_of_a_page_hold_the_numbers_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert TABLES["render"](text) == text, "run `python benchmarks/tables.py`"


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, in the form of GitHub and the site."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize(
    "module",
    ["fp8kv", "fp8kv.calibration", "fp8kv.checkpoint", "fp8kv.evaluation", "fp8kv.nn", "fp8kv.reference",
     "fp8kv.transformers"],
)  # fmt: skip
def test_every_public_name_is_on_a_page_of_the_reference(module: str) -> None:
    folder = ROOT / "docs" / "reference" / "python"
    pages = "".join(page.read_text(encoding="utf-8") for page in folder.glob("*.md"))
    shown = set(re.findall(r"^\.\. auto(?!module)\w+:: (\S+)", pages, re.MULTILINE))
    for of_module, members in re.findall(r"^\.\. automodule:: (\S+)\n   :members:(.*)", pages, re.MULTILINE):
        names = members.replace(",", " ").split() or getattr(importlib.import_module(of_module), "__all__", ())
        shown |= {of_module, *(f"{of_module}.{name}" for name in names)}
    public = importlib.import_module(module).__all__
    assert [name for name in public if not {f"{module}.{name}", f"fp8kv.{name}"} & shown] == []


def declared(pattern: str, file: str) -> str:
    """What `pattern` finds in a file of the repository."""
    return re.search(pattern, (ROOT / file).read_text(encoding="utf-8"))[1]


@pytest.mark.parametrize(
    ("badge", "value"),
    [
        ("version", fp8kv.__version__),
        ("license", declared(r'\nlicense = "(.+)"', "pyproject.toml")),
        ("Python", declared(r'requires-python = ">=(.+)"', "pyproject.toml") + "+"),
        ("PyTorch", declared(r'\ndependencies = \["torch>=(.+)"\]', "pyproject.toml") + "+"),
        ("CUDA", declared(r"CUDA_COMPILER_VERSION VERSION_LESS ([\d.]+)", "cmake/Cuda.cmake") + "+"),
    ],
)
def test_badges_say_what_the_build_files_say(badge: str, value: str) -> None:
    """In the picture and in its alternative text."""
    assert f"![{badge} {value}" in (ROOT / "README.md").read_text(encoding="utf-8")
    picture = (ROOT / f"docs/images/{badge.lower()}.svg").read_text(encoding="utf-8")
    assert re.findall(r'y="14">(.+?)<', picture)[:2] == [badge, value]


def test_the_changelog_has_the_version() -> None:
    assert f"\n## {fp8kv.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


HEADER = """\
// Views.
//
// Example:
//   validate(problem);
//
// No framework.
#pragma once
#include "fp8kv/dtype.h"

// A view.
struct View {
  void* data = nullptr;  // the first element
  // Of elements.
  int stride = 1;
  int size() const {
    return 1;  // alone
  }
};
int version();  // of the library
"""
DOXYGEN = """\
/**
@file
Views.

Example:
@verbatim
  validate(problem);

@endverbatim
No framework.
*/
#pragma once
#include "fp8kv/dtype.h"

/**
A view.
*/
struct View {
  void* data = nullptr;  ///< the first element
  /**
Of elements.
  */
  int stride = 1;
  int size() const {
    return 1;  // alone
  }
};
int version();  ///< of the library
"""


def test_comments_of_a_header_become_those_of_doxygen() -> None:
    convert = runpy.run_path(str(ROOT / "docs" / "doxygen_filter.py"))["convert"]
    assert "\n".join(convert(HEADER)) == DOXYGEN
