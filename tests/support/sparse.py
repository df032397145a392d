"""Tests with many parameter combinations: by default a few that cover each value, and the rest with `-m slow`.

    @pytest.mark.sparse
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", PRIORS)
    def test_...

runs one test for each value of the longer list, with the values of the other in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest

Value = tuple[str, str]
"""A parameter's name, and a description of a value."""


def thin_out(items: Sequence[pytest.Item]) -> None:
    """Mark combinations of sparse tests as slow if their values are covered by others."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sparse") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for combinations in tests.values():
        kept = cover([values_of(item) for item in combinations])
        for place, item in enumerate(combinations):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


def values_of(item: pytest.Item) -> set[Value]:
    """The values of the parameters of a test, including those of fixtures."""
    return {(name, f"{type(value).__name__} {value!r}") for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]


def cover(sets: Sequence[set[Value]]) -> set[int]:
    """Indices of a few sets that cover the union, chosen greedily."""
    missing, found = set().union(*sets), set()
    while missing:
        place = max(range(len(sets)), key=lambda place: len(sets[place] & missing))
        missing -= sets[place]
        found.add(place)
    return found
