"""The lock file: made for these very ranges, of files that anybody can fetch, each with its hash; and what is read off
it, which are pins for pip and a bill of materials."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from supply import floors, locked, matrix

packaging = pytest.importorskip("packaging")
from packaging.markers import Marker  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402
from packaging.version import Version  # noqa: E402

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
AGAIN = "pyproject.toml and uv.lock differ: run `make lock`"


def listed() -> list[Requirement]:
    """What pyproject.toml requires, each with the extra that it is in, as its marker."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra, texts in PROJECT["optional-dependencies"].items():
        for requirement in map(Requirement, texts):
            requirement.marker = Marker(f"extra == '{extra}'")
            found.append(requirement)
    return found


def ours() -> dict[str, Any]:
    """The entry of this project."""
    (entry,) = (package for package in locked.packages() if package["name"] == PROJECT["name"])
    return entry


def parts(name: str, extras: Any, specifier: Any, marker: Any) -> tuple[Any, ...]:
    """A requirement as it compares: in any spelling."""
    marker = str(Marker(str(marker))) if marker else ""
    return canonicalize_name(name), frozenset(extras), SpecifierSet(str(specifier or "")), marker


def test_the_lock_was_made_for_these_ranges() -> None:
    """As `uv lock --check` says it, without uv and a network."""
    wanted = {parts(each.name, each.extras, each.specifier, each.marker) for each in listed()}
    held = ours()["metadata"]["requires-dist"]
    found = {parts(e["name"], e.get("extras", ()), e.get("specifier"), e.get("marker")) for e in held}
    assert found == wanted, AGAIN
    assert ours()["version"] == PROJECT["version"], AGAIN
    assert set(ours()["metadata"]["provides-extras"]) == set(PROJECT["optional-dependencies"]), AGAIN
    (pythons,) = re.findall(r'^requires-python = "(.*)"$', (ROOT / "uv.lock").read_text(encoding="utf-8"), re.M)
    assert SpecifierSet(pythons) == SpecifierSet(PROJECT["requires-python"]), AGAIN


def test_what_is_locked_is_within_the_ranges() -> None:
    versions: dict[str, list[str]] = {}
    for package in locked.packages():
        versions.setdefault(package["name"], []).append(package["version"])
    requirements = [each for each in listed() if each.name != PROJECT["name"]]
    assert len(requirements) > 30
    for each in requirements:
        assert versions[canonicalize_name(each.name)], each
        assert all(each.specifier.contains(version) for version in versions[canonicalize_name(each.name)]), each


def test_what_is_locked_is_public_and_has_hashes() -> None:
    """No index of one machine, nothing but releases, and no local version: PyPI has no torch called +cpu."""
    others = [package for package in locked.packages() if package["name"] != PROJECT["name"]]
    assert len(others) > 200
    for package in others:
        assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
        assert Version(package["version"]).local is None, package["name"]
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
        assert files, package["name"]
        for file in files:
            assert urlsplit(file["url"])[:2] == ("https", "files.pythonhosted.org"), file["url"]
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"]), file["url"]
    assert set(re.findall(r"https?://([^/\"]+)", (ROOT / "uv.lock").read_text())) == {
        "pypi.org",
        "files.pythonhosted.org",
    }


def test_every_package_that_one_depends_on_is_locked() -> None:
    entries = locked.packages()
    names = {package["name"] for package in entries}
    for package in entries:
        needed = [*package.get("dependencies", ()), *sum(package.get("optional-dependencies", {}).values(), [])]
        assert {each["name"] for each in needed} <= names, package["name"]


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_pins_name_each_package_once_on_every_python(minor: int) -> None:
    """`pip install -c` takes them: of several versions the markers let one through."""
    for system in ("linux", "darwin", "win32"):
        environment = {"python_full_version": f"3.{minor}.7", "python_version": f"3.{minor}", "sys_platform": system}
        chosen = [
            each for each in map(Requirement, locked.pins()) if not each.marker or each.marker.evaluate(environment)
        ]
        names = [each.name for each in chosen]
        assert len(set(names)) == len(names) > 200 and {"torch", "numpy", "pillow"} <= set(names)
        assert all(re.fullmatch(r"==[\w.]+", str(each.specifier)) for each in chosen)


def uv() -> str:
    """Where uv is: on PATH, or where `make lock` installs it. Skips where it is not."""
    found = shutil.which("uv") or shutil.which("uv", path=str(ROOT / "build" / "supply" / "bin"))
    if found is None:
        pytest.skip("uv is not installed; `make sbom` does that")
    return found


def test_the_bill_of_materials_names_what_is_locked(tmp_path: Path) -> None:
    """As `make sbom` writes it, which needs no network."""
    path = tmp_path / "sbom.cdx.json"
    command = [uv(), "export", "--frozen", "--offline", "--quiet", "--all-extras", "--format", "cyclonedx1.5"]
    subprocess.run([*command, "--cache-dir", str(tmp_path), "-o", str(path)], check=True, cwd=ROOT)
    held = json.loads(path.read_text(encoding="utf-8"))
    assert (held["bomFormat"], held["specVersion"]) == ("CycloneDX", "1.5")
    main = held["metadata"]["component"]
    assert (main["name"], main["version"]) == (PROJECT["name"], PROJECT["version"])
    found = {(each["name"], each["version"]) for each in held["components"]}
    assert found == {(p["name"], p["version"]) for p in locked.packages() if p["name"] != PROJECT["name"]}
    assert all(each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}" for each in held["components"])
    refs = [each["bom-ref"] for each in held["components"]]
    assert len(set(refs)) == len(refs) and {each["ref"] for each in held["dependencies"]} <= {*refs, main["bom-ref"]}


# The table of Pythons and torches


def test_a_row_is_pinned_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix.pins_of("2.12.0") == ["torch==2.12.0"] and matrix.pins_of("newest") == []
    assert matrix.pins_of("lowest") == floors.lowest()
    monkeypatch.setattr(floors, "pythons", lambda: {11: "a", 12: "b", 13: "c"})
    torch = next(package["version"] for package in locked.packages() if package["name"] == "torch")
    assert matrix.usual_rows() == ["3.11:lowest", f"3.12:{torch}", "3.13:newest"]
    assert all((ROOT / path).exists() for path in matrix.CORE)


def test_a_row_tells_what_pytest_counted() -> None:
    text = "FAILED tests/a.py::test_b\n2 failed, 31 passed, 4 skipped, 1 error in 2.03s\n"
    assert matrix.counts_of(text) == {"failed": 2, "passed": 31, "skipped": 4, "error": 1}
    found = {"row": "3.12:newest", **matrix.counts_of(text), "result": "exit code 1"}
    assert matrix.line(found) == "| 3.12:newest |  | 31 | 2 | 4 |  |  | exit code 1 |"
    assert "there is no python3.99" in matrix.try_row("3.99:newest", [], keep=False)["result"]
