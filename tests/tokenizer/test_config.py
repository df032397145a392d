"""Configurations: nodes and facts, the settings of presets, and errors with dotted keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from tokenizer.config import Fact, ModelConfig, Node
from tokenizer.files import ConfigError
from tokenizer.model import Registered


class Book(Registered, family="tokenizer.quantizers"):
    """A family of three members, registered beside the quantizers."""


class WordsConfig(ModelConfig):
    words: int = Field(8, ge=2, description="how many")
    scale: float = Field(1.0, gt=0, description="how large")

    def check(self) -> Iterator[str]:
        if self.words * self.scale > 100:
            yield f"words: too many for a scale of {self.scale}"
            yield "scale: too large for them"


class SignsConfig(ModelConfig):
    shape: Literal["round", "square"] = Field("round", description="of a sign")
    lit: bool = Field(False, description="at night")


class Words(Book, name="words"):
    """Words in a book."""

    Config = WordsConfig


class Signs(Book, name="signs"):
    """Signs on a wall."""

    Config = SignsConfig


class ShelfConfig(ModelConfig):
    sides: Fact[tuple[int, ...]] = Field(description="of the room")
    steps: Literal[1, 3] = Field(1, description="of the ladder")
    first: Annotated[ModelConfig, Node(f"{__name__}:Book")] = Field(WordsConfig(words=9), description="a book")
    second: Annotated[ModelConfig | None, Node(f"{__name__}:Book", only=("signs",))] = Field(None, description="a wall")


class Shelf(Book, name="shelf"):
    """Two of them."""

    Config = ShelfConfig


def test_json_becomes_a_configuration_and_json_again() -> None:
    config = ShelfConfig(sides=[2, 3], first={"kind": "words", "scale": 2}, second={"kind": "signs"})
    assert config.sides == (2, 3) and isinstance(config.first, WordsConfig) and config.first.scale == 2.0
    assert config.to_dict() == {
        "kind": "shelf",
        "sides": [2, 3],
        "steps": 1,
        "first": {"kind": "words", "words": 8, "scale": 2.0},
        "second": {"kind": "signs", "shape": "round", "lit": False},
    }
    assert ShelfConfig(**{key: value for key, value in config.to_dict().items() if key != "kind"}) == config
    with pytest.raises(ValidationError):
        config.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"steps": True}, ["steps"]),
        ({"first": None}, ["first"]),
        ({"first": {"kind": ["words"]}}, ["first.kind"]),
        ({"first": {"kind": "words", "wrods": 3}}, ["first.wrods", "'first.words'"]),
        ({"first": {"kind": "words", "words": 1}}, ["first.words", "equal to 2"]),
        ({"first": {"kind": "words", "words": 300}}, ["first.words", "first.scale"]),
        ({"second": {"kind": "words"}}, ["second.kind", "signs"]),
        ({"zzz": 1, "steps": 2}, ["steps", "zzz"]),
    ],
)
def test_an_error_names_every_wrong_key(values: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(ConfigError, match="^shelf: ") as caught:
        ShelfConfig(**{"sides": [2, 3], **values})
    assert "\n" not in str(caught.value) and all(key in str(caught.value) for key in keys)


def test_a_preset_has_no_facts() -> None:
    choices = Shelf.choices()
    assert choices.facts == ("sides",) and "sides" not in choices.model_fields
    assert choices().model_dump() == {
        "kind": "shelf",
        "steps": 1,
        "first": {"kind": "words", "words": 9, "scale": 1.0},  # the shelf's default, not the book's
        "second": None,
    }
    with pytest.raises(ValidationError):
        choices(sides=[2, 3])
