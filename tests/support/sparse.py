"""Tests of many combinations: by default each value of each parameter comes, all the others with `-m slow`.

    @pytest.mark.sparse
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", PRIORS)
    def test_...

is one test for each of the more numerous of the two, with the others in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest

Value = tuple[str, str]
"""A parameter's name, and what is told of a value of it."""


def thin_out(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what adds nothing to the values that are tried, of each test that is marked as sparse."""
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
    """Of its parameters; those of fixtures are among them."""
    return {(name, f"{type(value).__name__} {value!r}") for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]


def cover(sets: Sequence[set[Value]]) -> set[int]:
    """Places of a few sets that hold together all that any holds: each time one that adds most, the first of them."""
    missing, found = set().union(*sets), set()
    while missing:
        place = max(range(len(sets)), key=lambda place: len(sets[place] & missing))
        missing -= sets[place]
        found.add(place)
    return found
