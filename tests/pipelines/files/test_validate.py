"""Invalid JSON is one error in one line: the file, the field, the value found, what is allowed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

from pipelines.files import Bool, FieldError, Number, Text, Whole, validate
from tokenizer.files import FormatError

PATH = Path("folder/file.json")


@dataclass(frozen=True)
class Inner:
    low: Number
    high: Number

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FieldError("high", "should be above low")


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: Annotated[Whole, Field(ge=1)] = 2
    inner: Inner = Inner(0, 1)
    names: list[Text] = []
    flag: Bool = True
    numbers: dict[str, Number] = {}


class Needy(BaseModel):
    wanted: Outer


def test_valid_data_is_converted_to_the_class():
    found = validate(Outer, {"count": 4, "inner": {"low": 1, "high": 2.5}, "numbers": {"a": 3}}, PATH)
    assert found.count == 4 and found.inner == Inner(1.0, 2.5) and type(found.numbers["a"]) is float
    assert validate(Inner, {"low": 0, "high": 0, "unknown": 1}, PATH) == Inner(0.0, 0.0)


@pytest.mark.parametrize(
    ("data", "field", "word"),
    [
        ({"count": True}, "count", "true"),
        ({"count": 2.0}, "count", "2.0"),
        ({"count": 0}, "count", "equal to 1"),
        ({"count": "x" * 10_000}, "count", "xxx"),
        ({"inner": {"low": 1}}, "inner.high", "missing"),
        ({"inner": {"low": 3, "high": 2}}, "inner.high", "above low"),
        ({"names": ["a", 3]}, "names.1", "text"),
        ({"flag": 1}, "flag", "true or false"),
        ({"numbers": {"a\x1b[2J": None}}, r"numbers.a\x1b[2J", "null"),
        ({"other": 1}, "other", "unknown key"),
    ],
)
def test_the_first_invalid_field_is_reported_in_a_line(data, field, word):
    with pytest.raises(FormatError) as caught:
        validate(Needy, {"wanted": data}, PATH)
    message = str(caught.value)
    assert message.startswith(f"{PATH}: wanted.{field}: ") and word in message
    assert message.isprintable() and len(message) < 400


def test_lone_surrogates_and_line_breaks_are_escaped():
    with pytest.raises(FormatError, match=r"folder/file\.json: ") as caught:
        validate(Outer, {"\ud800\n": 1}, PATH)
    assert str(caught.value).isprintable()
