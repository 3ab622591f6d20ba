"""Print what pyproject.toml asks for, one requirement per line, except PyTorch.

Without arguments: at run time and for development. Left out are the extra of a package that asks for other versions of
PyTorch and Transformers, and that of the documentation. With arguments: the extras of these names alone.
"""

import pathlib
import re
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
names = sys.argv[1:]
requirements = [] if names else project["dependencies"]
for name in names or [name for name in extras if name not in ("docs", "llmcompressor")]:
    requirements += extras[name]
for requirement in requirements:
    if not re.match(r"(torch|fp8kv)\b", requirement):  # fp8kv[...]: extras that are printed anyway
        print(requirement)
