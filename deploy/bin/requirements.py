"""Prints the requirements that pyproject.toml names, a line each: they change less than the code.

python requirements.py EXTRA... [--without PACKAGE]
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("extras", nargs="+")
parser.add_argument("--without", action="append", default=[])
arguments = parser.parse_args()
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
named = list(project["dependencies"])
for extra in arguments.extras:
    named += project["optional-dependencies"][extra]
for requirement in named:
    if not any(requirement.startswith(name) for name in arguments.without):
        print(requirement)
