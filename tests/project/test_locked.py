"""uv.lock matches pyproject.toml, and pins public releases with hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

packaging = pytest.importorskip("packaging")
from packaging.markers import Marker  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
OUTDATED = "pyproject.toml and uv.lock differ: run `make lock`"


def parts(name: str, extras: Any, specifier: Any, marker: Any) -> tuple[Any, ...]:
    """A normalised requirement."""
    marker = str(Marker(marker)) if marker else ""
    return canonicalize_name(name), frozenset(extras), SpecifierSet(str(specifier or "")), marker


def test_the_lock_matches_pyproject() -> None:
    """Like `uv lock --check`, without uv and a network."""
    listed = [(text, "") for text in PROJECT["dependencies"]]
    extras = PROJECT["optional-dependencies"]
    listed += [(text, f"extra == '{extra}'") for extra, texts in extras.items() for text in texts]
    required = [(Requirement(text), marker) for text, marker in listed]
    wanted = {parts(each.name, each.extras, each.specifier, marker) for each, marker in required}
    (ours,) = (package for package in LOCK["package"] if package["name"] == PROJECT["name"])
    held = ours["metadata"]["requires-dist"]
    found = {parts(e["name"], e.get("extras", ()), e.get("specifier"), e.get("marker")) for e in held}
    assert found == wanted and ours["version"] == PROJECT["version"], OUTDATED
    assert SpecifierSet(LOCK["requires-python"]) == SpecifierSet(PROJECT["requires-python"]), OUTDATED


def test_locked_packages_are_on_pypi_and_have_hashes() -> None:
    """No private index, and no local version such as torch +cpu."""
    for package in LOCK["package"]:
        if package["name"] != PROJECT["name"]:
            assert package["source"] == {"registry": "https://pypi.org/simple"} and "+" not in package["version"]
            files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
            assert files and all(re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"]) for file in files), package["name"]
