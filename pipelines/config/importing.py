"""`--import`: models that lie outside the package, known by name once their module is imported.

Only a command line can ask for it, never a file: a module is code.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

from .errors import UserError

IMPORTED: list[str] = []
"""What `--import` has asked for in this process."""


def import_asked(names: list[str]) -> None:
    """Import Python files and modules, each once. Modules are also looked for in the working folder, and a file may
    import those beside it. Raises `UserError` where there is none; an error inside of a module is raised as it is."""
    for name in names:
        path = Path(name).expanduser().resolve() if name.endswith(".py") or "/" in name else None
        if not name or name.startswith(".") and path is None:
            raise UserError(f"--import {name}: expected a Python file (NAME.py) or a module")
        if path is not None and not (path.is_file() and path.suffix == ".py"):
            raise UserError(f"--import {name}: there is no Python file of this name")
        folder, module = (Path.cwd(), name) if path is None else (path.parent, path.stem)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # after all others: a user's `random.py` hides nothing
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and one that it imports is not
            raise UserError(f"--import {name}: no such module in {folder} or among those installed") from error
        if path is not None and Path(imported.__file__ or "").resolve() != path:
            raise UserError(f"--import {name}: another module is called {module!r}; give the file another name")
        if name not in IMPORTED:
            IMPORTED.append(name)


def as_asked() -> str:
    """` --import NAME ...`, for a command that is to know the same models; empty without any."""
    return "".join(f" --import {shlex.quote(name)}" for name in IMPORTED)
