"""The documentation site: Sphinx over the Markdown of this folder. `make docs` builds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import fp8kv

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "fp8kv"
author = "fp8kv authors"
project_copyright = author
version = release = fp8kv.__version__

extensions = [
    "breathe",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_heading_anchors = 4

# Docstrings: Google style; names in single backticks become links where they are documented.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list: a property of the same name is documented once

breathe_projects = {"fp8kv": str(ROOT / "build" / "docs" / "doxygen" / "xml")}
breathe_default_project = "fp8kv"
suppress_warnings = ["duplicate_declaration.cpp"]  # namespaces, which every header opens

html_theme = "furo"
html_title = f"fp8kv {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
smartquotes_action = "D"  # dashes; quotes stay as they are, to be copied
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Where links to files outside of this folder lead, such as "https://HOST/OWNER/fp8kv/blob/COMMIT". Without it
# the site carries those files itself, and links to folders become plain text.
SOURCE = os.environ.get("FP8KV_DOCS_SOURCE", "").rstrip("/")


class LinkSource(SphinxTransform):
    """Links of a page that leave docs/ for a file or a folder of the repository."""

    default_priority = 50

    def apply(self, **kwargs: Any) -> None:
        page = self.env.doc2path(self.env.docname)
        links = [
            *self.document.findall(addnodes.download_reference),
            *self.document.findall(addnodes.pending_xref),
        ]
        for node in (node for node in links if node["reftype"] == "myst"):
            target = node["reftarget"] + ".md" * (node["refdomain"] == "doc")
            # A page that is included from the root of the repository has links relative to that.
            paths = [(folder / target).resolve() for folder in (page.parent, ROOT)]
            path = next((path for path in paths if path.exists()), None)
            if path is None or path.is_relative_to(DOCS) or not path.is_relative_to(ROOT):
                continue  # of the site, or broken, and Sphinx says so
            name = path.relative_to(ROOT).as_posix()
            if SOURCE:
                node.replace_self(nodes.reference("", "", *node.children, refuri=f"{SOURCE}/{name}"))
            elif path.is_dir():
                node.replace_self(node.children)
            else:
                node.replace_self(
                    addnodes.download_reference("", "", *node.children, **node.attributes | {"reftarget": "/../" + name})
                )


def insert_commands(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the help of every command into the page of the command line."""
    if docname == "reference/commands":
        command = [sys.executable, "-m", "typer", "fp8kv.cli._app", "utils", "docs", "--name", "fp8kv"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        commands = text[text.index("\n## ") :].replace("```console", "```")
        source[0] = source[0].replace("<!-- commands -->", commands)


def skip_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any) -> bool | None:
    """Fields of a NamedTuple say nothing that its docstring does not say."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_fields)
    app.add_transform(LinkSource)
    app.connect("source-read", insert_commands)
