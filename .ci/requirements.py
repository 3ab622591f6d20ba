"""Print what pyproject.toml asks for at run time and for development, one requirement a line, but for PyTorch.

Left out is the group of a package that asks for other versions of PyTorch and Transformers.
"""

import pathlib
import re

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = [extra for name, extra in project["optional-dependencies"].items() if name != "llmcompressor"]
for requirement in (*project["dependencies"], *(requirement for extra in extras for requirement in extra)):
    if not re.match(r"(torch|fp8kv)\b", requirement):  # fp8kv[...]: extras that are printed anyway
        print(requirement)
