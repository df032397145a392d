"""`--import`: load modules with your own models, which are then available by name.

Importing runs code, so only the command line can request it, never a file.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

from .errors import UserError

IMPORTED: list[str] = []
"""Names that were loaded by `--import` in this process."""


def import_all(names: list[str]) -> None:
    """Import Python files and modules. Modules are also searched for in the working folder, and a file may import its
    neighbours. Raises `UserError` if a name is not found; errors raised by a module propagate."""
    for name in names:
        path = Path(name).expanduser().resolve() if name.endswith(".py") or "/" in name else None
        if not name or name.startswith(".") and path is None:
            raise UserError(f"--import {name}: expected a Python file (NAME.py) or a module")
        if path is not None and not (path.is_file() and path.suffix == ".py"):
            raise UserError(f"--import {name}: there is no Python file with this name")
        folder, module = (Path.cwd(), name) if path is None else (path.parent, path.stem)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # last, so that a user's `random.py` shadows nothing
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists; one of its own imports is missing
            raise UserError(f"--import {name}: no such module in {folder} or installed") from error
        if path is not None and Path(imported.__file__ or "").resolve() != path:
            raise UserError(f"--import {name}: another module is already called {module!r}; rename the file")
        if name not in IMPORTED:
            IMPORTED.append(name)


def format_imports() -> str:
    """Return ` --import NAME ...` for a follow-up command that needs the same models; empty if there are none."""
    return "".join(f" --import {shlex.quote(name)}" for name in IMPORTED)
