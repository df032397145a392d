"""One test that looks at each of many things, which pytest would take longer to count than to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

Check = Callable[[Any], object]


def of_each(things: Iterable[object]) -> Callable[[Check], Callable[[], None]]:
    """Decorate check(thing): it fails with the names of all those for which it does, and what is said of the first."""
    those = list(things)

    def decorate(check: Check) -> Callable[[], None]:
        def test() -> None:
            failed = {}
            for thing in those:
                try:
                    check(thing)
                except (AssertionError, pytest.fail.Exception) as error:
                    failed[str(thing)] = error
            if failed:
                first = next(iter(failed.values()))
                first.add_note("of: " + ", ".join(failed))
                raise first

        assert those
        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.__module__ = check.__module__
        return test

    return decorate
