"""The command line of a benchmark: `key=value`, or `--help`, which prints the docstring of its file."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_options(about: str | None, defaults: dict[str, Any], *, dotted: bool = False) -> SimpleNamespace:
    """Parse the command line. Each option has the type of its default; None means optional text, and `str` required
    text. `--help` prints `about` and exits.

    dotted: arguments whose key contains a dot are changes to a preset, returned unparsed as `changes`. Exit with a
    one-line message if a key is unknown or missing, or a value has the wrong type.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print((about or "").strip())
        raise SystemExit
    values, changes = dict(defaults), []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise SystemExit(f"{argument}: expected key=value, or --help")
        if dotted and "." in key:
            changes.append(argument)
        elif key in defaults:
            values[key] = read_value(key, text, defaults[key])
        else:
            more = ", or a dotted key of a preset" if dotted else ""
            raise SystemExit(f"{key}: unknown; options are {', '.join(defaults)}{more}")
    if missing := [key for key, value in values.items() if value is str]:
        raise SystemExit(f"{missing[0]}: required; see --help")
    return SimpleNamespace(**values, **({"changes": changes} if dotted else {}))


def read_value(key: str, text: str, default: Any) -> Any:
    """Parse `text` as the type of `default`; exits if it cannot."""
    kind = type(default)
    try:
        if kind is bool:
            return TRUTH[text.lower()]
        return kind(text) if kind in (int, float) else text
    except (KeyError, ValueError):
        raise SystemExit(f"{key}={text}: expected {EXPECTED[kind]}") from None


def choose(only: str | None, known: list[str]) -> list[str]:
    """Split the comma-separated names in `only` (None: all); exits if one is unknown."""
    chosen = known if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"only={unknown[0]}: choose from {', '.join(known)}")
    return chosen


def require_packages(*packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise SystemExit(f"{missing[0]}: not installed; pip install {missing[0].replace('_', '-')}")


def add_test_helpers() -> None:
    sys.path.insert(1, str(ROOT / "tests" / "support"))


def use_threads(count: int = 0) -> int:
    """Set the number of threads of torch and of child processes, and return it. 0: OMP_NUM_THREADS, or the number of
    processors."""
    found = count or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(found)
    torch.set_num_threads(found)
    return found


def image_folder(name: str) -> Path:
    """Return the folder of a data set on this machine, below SMALTI_DATA. It need not exist."""
    return Path(os.environ.get("SMALTI_DATA") or ROOT.parent / "shared" / "data") / name
