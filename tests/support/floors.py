"""Prints the lowest version of each package that pyproject.toml allows, as constraints for pip: see `make floors`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def floors(extras: list[str]) -> list[str]:
    """``name==version`` for each package of the project and of ``extras`` that has a lower bound."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    bounds = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", line) for line in asked)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


if __name__ == "__main__":
    sys.stdout.write("\n".join([*floors(sys.argv[1:]), ""]))
