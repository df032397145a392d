"""Names that a package has without having imported them (PEP 562): torch takes seconds, and not everybody who imports
a package asks for what needs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def late(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package that has `names`, each in the module below the package that is its
    value; the module is imported when the name is first asked for."""

    def get(name: str) -> Any:
        """Raises `AttributeError` for a name that is not there, so that Python looks for a module of this name."""
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{names[name]}"), name)

    def there() -> list[str]:
        """What the package has, and what it would have."""
        return sorted({*vars(sys.modules[package]), *names})

    return get, there
