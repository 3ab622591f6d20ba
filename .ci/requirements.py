"""Print what pyproject.toml asks for at run time and for development, one requirement a line, but for PyTorch."""

import pathlib
import re

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
for requirement in (*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)):
    if not re.match(r"torch\b", requirement):
        print(requirement)
