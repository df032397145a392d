"""The command line of a benchmark: `key=value`, or `--help`, which prints the first lines of its file."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_options(about: str | None, defaults: dict[str, Any], *, dotted: bool = False) -> SimpleNamespace:
    """The options of the command line as attributes, each of the type of its default; a default of None is for text
    that may be missing, and `str` for text that may not. `--help` prints `about` and exits.

    dotted: a key with a dot is a change to a preset; `changes` has these arguments as they were given. Exits with one
    line at a key that is unknown or missing, and at a value of another type.
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
            more = ", and keys of presets, with a dot" if dotted else ""
            raise SystemExit(f"{key}: unknown; there are {', '.join(defaults)}{more}")
    if missing := [key for key, value in values.items() if value is str]:
        raise SystemExit(f"{missing[0]}: missing; write {missing[0]}=..., or --help")
    return SimpleNamespace(**values, **({"changes": changes} if dotted else {}))


def read_value(key: str, text: str, default: Any) -> Any:
    """`text` as the type of `default`; exits where it is no such value."""
    kind = type(default)
    try:
        if kind is bool:
            return TRUTH[text.lower()]
        return kind(text) if kind in (int, float) else text
    except (KeyError, ValueError):
        raise SystemExit(f"{key}={text}: expected {EXPECTED[kind]}") from None


def choose(only: str | None, known: list[str]) -> list[str]:
    """The names in `only`, which commas separate, or all if it is None; exits at one that is not known."""
    chosen = known if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if strange := [name for name in chosen if name not in known]:
        raise SystemExit(f"only={strange[0]}: choose among {', '.join(known)}")
    return chosen


def need(*packages: str) -> None:
    """Exit with one line unless these packages, which a benchmark compares with, are installed."""
    if absent := [name for name in packages if find_spec(name) is None]:
        raise SystemExit(f"{absent[0]}: not installed; pip install {absent[0].replace('_', '-')}")


def with_helpers_of_tests() -> None:
    """Let what lies in `tests/support` be imported, too."""
    sys.path.insert(1, str(ROOT / "tests" / "support"))


def use_threads(count: int = 0) -> int:
    """Let torch and all that is started from here use `count` threads; 0: what OMP_NUM_THREADS says, or a thread for
    each processor. Returns how many."""
    found = count or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(found)
    import torch

    torch.set_num_threads(found)
    return found


def image_folder(name: str) -> Path:
    """Where the images called `name` are kept on this machine, which may be nowhere: in the folder SMALTI_DATA."""
    return Path(os.environ.get("SMALTI_DATA") or ROOT.parent / "shared" / "data") / name
