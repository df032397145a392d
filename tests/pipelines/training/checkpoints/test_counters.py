"""Counters in a resume state: what each may be, and in which words another is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.checkpoints.counters import check_counters
from tokenizer.files import FormatError

BEST = {"step": 3, "score": -0.5, "evaluation": {"loss": 1.0}}
NO_NUMBERS: list[Any] = [True, "1", None, [1], {}]
# Of each counter, what it is said to be; what it may be; and what not.
COUNTERS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "minutes": ("a number from 0", [0, 0.0, 7, 1e9], [-1, -0.1, math.nan, math.inf, *NO_NUMBERS]),
    "skipped": ("a whole number from 0", [0, 1, 10**12], [-1, 1.0, *NO_NUMBERS]),
    "skipped_in_a_row": ("a whole number from 0", [0, 1], [-1, 0.0, *NO_NUMBERS]),
    "window": (
        "the sum and the count of each term",
        [{}, {"loss": [0.5, 3]}, {"loss": [2, 0], "other": [math.nan, 1]}],
        [[], None, {"loss": [0.5]}, {"loss": [0.5, 3, 1]}, {"loss": (0.5, 3)}, {"loss": ["0.5", 3]}]
        + [{"loss": [0.5, 3.0]}, {"loss": [0.5, -1]}, {"loss": [True, 1]}, {"a": [1.0, 1], "b": 3}],
    ),
    "evaluation": (
        "numbers by name",
        [{}, {"loss": 1}, {"loss": math.inf}],
        [[], None, {"a": 1, "b": True}, {"a": "1"}],
    ),
    "reported": ("numbers by name", [{}, {"loss": 0.1}], [[], None, {"loss": None}]),
    "best": (
        "step, score and evaluation",
        [{}, BEST, {**BEST, "step": 0, "score": 0, "evaluation": {}}],
        [[], None, {"step": 3}, {**BEST, "more": 1}, {**BEST, "step": 3.0}, {**BEST, "score": math.nan}]
        + [{**BEST, "score": True}, {**BEST, "evaluation": None}, {"step": 3, "score": 1.0}],
    ),
    "precision": ("no or bf16", ["no", "bf16"], ["fp16", "BF16", None, "", 0]),
    "pending": (
        "names out of evaluate, log, preview, save",
        [[], ["save"], ["evaluate", "log", "preview", "save"]],
        ["save", None, ["save", "stop"], ["Save"], {"save": 1}],
    ),
}
PATH = Path("run", "state", "state.json")


def problem(counters: dict[str, Any]) -> str:
    """What is wrong with them; nothing, if they are right."""
    try:
        check_counters(counters, PATH)
    except FormatError as error:
        return str(error).removeprefix(f"{PATH}: counters: ")
    return ""


@pytest.mark.parametrize("name", COUNTERS)
def test_a_counter_is_of_its_kind(name):
    expected, right, wrong = COUNTERS[name]
    for value in right:
        assert problem({name: value, "skipped": 0}) == ""
    for value in wrong:
        assert problem({"skipped": 0, name: value}) == f"{name}: expected {expected}, found {value!r}"


def test_counters_are_those_that_are_known():
    names = ", ".join(COUNTERS)
    assert problem({"skipped": 0, "strange": 1}) == f"'strange' is not known to this version; there are {names}"
    assert problem({}) == problem({name: right[0] for name, (_, right, _) in COUNTERS.items()}) == ""
