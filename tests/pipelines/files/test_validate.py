"""What is wrong in a JSON file is said in one line: the file, the field, what was found, what is allowed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipelines.files import Bool, FieldError, Number, Text, Whole, validate
from tokenizer.files import FormatError

PATH = Path("folder/file.json")


def even(value: int) -> int:
    if value % 2:
        raise ValueError("should be even")
    return value


@dataclass(frozen=True)
class Inner:
    low: Number
    high: Number

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FieldError("high", "should be above low")


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: Annotated[Whole, Field(ge=1), AfterValidator(even)] = 2
    inner: Inner = Inner(0, 1)
    names: list[Text] = []
    flag: Bool = True
    numbers: dict[str, Number] = {}
    more: Inner | None = None


class Needy(BaseModel):
    wanted: Outer


def test_what_is_right_comes_back_as_the_class():
    found = validate(Outer, {"count": 4, "inner": {"low": 1, "high": 2.5}, "numbers": {"a": 3}}, PATH)
    assert found.count == 4 and found.inner == Inner(1.0, 2.5) and type(found.numbers["a"]) is float
    assert validate(Inner, {"low": 0, "high": 0, "unknown": 1}, PATH) == Inner(0.0, 0.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"count": True}, "count: should be a whole number (found True)"),
        ({"count": 2.0}, "count: should be a whole number (found 2.0)"),
        ({"count": "2"}, "count: should be a whole number (found '2')"),
        ({"count": 0}, "count: should be at least 1 (found 0)"),
        ({"count": 3}, "count: should be even"),
        ({"inner": None}, "inner: should be a mapping (found None)"),
        ({"inner": {"low": 1}}, "inner.high: missing"),
        ({"inner": {"low": True, "high": 2}}, "inner.low: should be a number (found True)"),
        ({"inner": {"low": 3, "high": 2}}, "inner.high: should be above low"),
        ({"more": {"low": 3, "high": 2}}, "more.high: should be above low"),
        ({"names": "abc"}, "names: should be a list (found 'abc')"),
        ({"names": ["a", 3]}, "names.1: should be text (found 3)"),
        ({"flag": 1}, "flag: should be true or false (found 1)"),
        ({"numbers": []}, "numbers: should be a mapping (found [])"),
        ({"numbers": {"a\x1b[2J": None}}, r"numbers.a\x1b[2J: should be a number (found None)"),
        ({"other": 1}, "other: no such field"),
    ],
)
def test_the_first_thing_that_is_wrong_is_said_in_a_line(data, message):
    with pytest.raises(FormatError) as found:
        validate(Outer, data, PATH)
    assert str(found.value) == f"{PATH}: {message}"
    with pytest.raises(FormatError) as found:
        validate(Needy, {"wanted": data}, PATH)
    assert str(found.value) == f"{PATH}: wanted.{message}"


@dataclass(frozen=True)
class Ascending:
    scores: dict[str, list[Number]]

    def __post_init__(self) -> None:
        for name, values in self.scores.items():
            if values != sorted(values):
                raise FieldError(f"scores.{name}", "should ascend")


@pytest.mark.parametrize(
    ("cls", "data", "problem"),
    [
        (Ascending, {"scores": {"\ud800": [2, 1]}}, r"scores.\ud800: should ascend"),
        (Ascending, {"scores": {"\n": [2, 1]}}, r"scores.\n: should ascend"),
        (Inner, {"low": 0, "high": 1, "\ud800": 1}, "Input should be a valid string, unable to parse raw data"),
    ],
)
def test_half_of_a_character_is_told(cls, data, problem):
    with pytest.raises(FormatError, match=re.escape(f"folder/file.json: {problem}")):
        validate(cls, data, PATH)


def test_a_long_value_is_cut():
    with pytest.raises(FormatError) as found:
        validate(Outer, {"count": "x" * 10_000}, PATH)
    assert len(str(found.value)) < 200
