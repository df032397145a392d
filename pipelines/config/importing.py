"""`--import`: models that lie outside the package, known by name once their module is imported.

Only a command line can ask for it, never what a file says: a module is code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

from .arguments import UserError

IMPORTED: list[str] = []
"""What `--import` has asked for in this process."""


def import_asked(names: list[str]) -> None:
    """Import Python files and modules, each once; modules are looked for in the working folder too. Raises `UserError`
    where there is none; what goes wrong inside of them is raised as it is."""
    for name in names:
        if not name:
            raise UserError("--import: expected a Python file or a module after it")
        if name.endswith(".py") or "/" in name:
            import_file(name)
        else:
            import_module(name)
        if name not in IMPORTED:
            IMPORTED.append(name)


def import_file(name: str) -> None:
    """Import a file under its own name; it may import the files beside it."""
    path = Path(os.path.expanduser(name)).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"--import {name}: there is no Python file of this name")
    there = sys.modules.get(path.stem)
    if there is not None:
        if Path(getattr(there, "__file__", None) or "").resolve() == path:
            return
        raise UserError(f"--import {name}: a module is called {path.stem!r} already; give the file another name")
    look_in(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def import_module(name: str) -> None:
    """Import a module by its dotted name."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise UserError(f"--import {name}: neither a Python file (NAME.py) nor the name of a module")
    look_in(Path.cwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and misses another
        raise UserError(f"--import {name}: no such module in {Path.cwd()} or among those installed") from error


def look_in(folder: Path) -> None:
    """Find modules there, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def as_asked() -> str:
    """` --import NAME ...`, for a command that is to know the same models; empty without any."""
    return "".join(f" --import {shlex.quote(name)}" for name in IMPORTED)
