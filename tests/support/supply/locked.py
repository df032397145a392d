"""What uv.lock holds, as pip reads it: a line for each package, with a marker where Pythons or systems differ.

    python tests/support/supply/locked.py pins.txt
    pip install -c pins.txt .

As constraints they are what is locked, whichever index the files come from: a torch for CPUs has the same number. What
also checks the files' hashes is `uv sync --locked`.
"""

from __future__ import annotations

import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


@cache
def packages() -> list[dict[str, Any]]:
    """The entries of uv.lock, this project's own among them."""
    return list(tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"])


def pins() -> list[str]:
    """`name==version`, or `name==version ; marker` where there are several versions of a package."""
    lines = []
    for package in packages():
        if "registry" in package["source"]:
            marker = " or ".join(f"({each})" for each in package.get("resolution-markers", ()))
            lines.append(f"{package['name']}=={package['version']}" + (f" ; {marker}" if marker else ""))
    return lines


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join([*pins(), ""]), encoding="utf-8")
