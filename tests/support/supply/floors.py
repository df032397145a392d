"""Whether the versions that pyproject.toml names are true: the suite with the lowest of them on the oldest Python that
it names, or with the newest on the newest Python that is here.

    python tests/support/supply/floors.py lowest|newest [--python PYTHON] [arguments of pytest]
    python tests/support/supply/floors.py resolve

Each has an environment of its own below build/, made anew when pyproject.toml changes; `newest` looks for newer
versions every time. It takes gigabytes: on Linux, PyPI's torch is the one for CUDA. `uv` on PATH makes them sooner, and
of links. `resolve` installs nothing: it asks uv whether the lowest versions go together, and writes all that would be
installed into build/lowest.txt. Several Pythons and versions of torch: `supply.matrix`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRA = "dev"  # which has the others, but for those of the benchmarks
NEWEST = 30  # as far as minor versions of Python are looked for


def requirements() -> list[str]:
    """What is required to run and to test, as `name>=version` or `name[extra]>=version`, but for our own extras."""
    extras = {name: listed for name, listed in PROJECT["optional-dependencies"].items() if name != "benchmarks"}
    listed = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    return list(dict.fromkeys(line for line in listed if not line.startswith(f"{PROJECT['name']}[")))


def lowest() -> list[str]:
    """The lowest versions as constraints for pip. Raises `ValueError` for a requirement without a lowest version."""
    found = {}
    for requirement in requirements():
        parts = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", requirement)
        if parts is None:
            raise ValueError(f"pyproject.toml: {requirement}: expected name>=version")
        if found.setdefault(parts[1], parts[2]) != parts[2]:
            raise ValueError(f"pyproject.toml: {parts[1]}: two lowest versions, {found[parts[1]]} and {parts[2]}")
    return [f"{name}=={version}" for name, version in found.items()]


def oldest_minor() -> int:
    """The minor version of the oldest Python that is named."""
    return int(PROJECT["requires-python"].removeprefix(">=3."))


def pythons() -> dict[int, str]:
    """The Pythons on PATH and of pyenv that are not too old, by their minor versions."""
    found = {}
    for minor in range(oldest_minor(), NEWEST):
        of_pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        if path := of_pyenv[-1] if of_pyenv else shutil.which(f"python3.{minor}"):
            found[minor] = str(path)
    return found


def prepare(name: str, python: str, pins: list[str], newer: bool = False) -> Path:
    """The Python of the environment called `name`, with everything installed at the versions of `pins`; newer: look
    for newer versions, if it is there already."""
    folder = ROOT / "build" / name
    stamp, pinned = folder / "made-for", "\n".join(pins)
    wanted = f"{python}\n{pinned}\n{(ROOT / 'pyproject.toml').read_text(encoding='utf-8')}"
    ours = folder / "bin" / "python"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(pinned, encoding="utf-8")
        install(ours, "-c", str(constraints))
        stamp.write_text(wanted, encoding="utf-8")
    elif newer:
        install(ours, "--upgrade", *([] if shutil.which("uv") else ["--upgrade-strategy", "eager"]))
    return ours


def install(python: Path, *options: str) -> None:
    """Install this checkout and all that its tests need."""
    uv = shutil.which("uv")
    command = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    subprocess.run([*command, "--quiet", *options, "-e", f"{ROOT}[{EXTRA}]"], check=True)


def versions(python: Path) -> str:
    """`Python 3.11.7, torch 2.10.0`, of an environment."""
    code = "import sys, torch; print(f'Python {sys.version.split()[0]}, torch {torch.__version__}')"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def resolve() -> int:
    """Write what the lowest versions bring along into build/lowest.txt; returns uv's exit code, 1 where they exclude
    each other, which it explains."""
    constraints = ROOT / "build" / "lowest-constraints.txt"
    constraints.parent.mkdir(exist_ok=True)
    constraints.write_text("\n".join(lowest()), encoding="utf-8")
    uv = shutil.which("uv") or str(ROOT / "build" / "supply" / "bin" / "uv")
    command = [uv, "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--extra", EXTRA, "pyproject.toml"]
    options = ["--constraints", str(constraints), "--python-version", f"3.{oldest_minor()}"]
    out = ["-o", str(ROOT / "build" / "lowest.txt")]
    return subprocess.run([*command, *options, *out], cwd=ROOT, stdout=subprocess.DEVNULL).returncode


def main() -> int:
    """The command line; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["lowest", "newest", "resolve"])
    parser.add_argument("--python", help="instead of the one that is looked for")
    chosen, arguments = parser.parse_known_args()
    if chosen.which == "resolve":
        return resolve()
    there = pythons()
    minor = oldest_minor() if chosen.which == "lowest" else max(there, default=oldest_minor())
    python = chosen.python or there.get(minor)
    if python is None:
        parser.error(f"there is no python3.{minor} on PATH or in ~/.pyenv/versions; name one with --python")
    newest = chosen.which == "newest"
    ours = prepare(f"floors-{chosen.which}", python, [] if newest else lowest(), newer=newest)
    print(f"{chosen.which}:", versions(ours), flush=True)
    return subprocess.run([str(ours), "-m", "pytest", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
