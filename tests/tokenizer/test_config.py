"""How a model's configuration is written down: marks, what presets may say of it, and what its errors say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from tokenizer.config import Fact, ModelConfig, Node, choices_of, defaults_of, merge, with_defaults
from tokenizer.files import ConfigError
from tokenizer.model import Registered


class Book(Registered, family="tokenizer.quantizers"):
    """A family of three, found where the quantizers are."""


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


def said(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ShelfConfig(**{"sides": [2, 3], **values})
    return str(caught.value).removeprefix("shelf: ")


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
    ("values", "problem"),
    [
        ({"steps": True}, "steps: must be one of 1, 3 (got true)"),
        ({"steps": 1.0}, "steps: must be one of 1, 3 (got 1.0)"),
        ({"sides": [True]}, "sides: expected a whole number (got true)"),
        ({"sides": 3}, "sides: expected a list (got 3)"),
        ({"sides": [1] * 65}, f"sides: expected at most 64 values (got {[1] * 65})"),
        ({"first": 3}, "first: expected a mapping of keys (got 3)"),
        ({"first": None}, "first: expected a mapping of keys (got null)"),
        ({"first": {}}, "first.kind: missing; there are shelf, signs, words"),
        ({"first": {"kind": ["words"]}}, "first.kind: no Book is called ['words']; there are shelf, signs, words"),
        ({"first": {"kind": "words", "wrods": 3}}, "first.wrods: unknown key; did you mean 'first.words'?"),
        ({"first": {"kind": "words", "words": 1}}, "first.words: must be >= 2 (got 1)"),
        ({"first": {"kind": "words", "scale": "x"}}, "first.scale: expected a number (got 'x')"),
        ({"second": {"kind": "words"}}, "second.kind: must be signs (got 'words')"),
        ({"second": WordsConfig()}, "second.kind: must be signs (got 'words')"),
        ({"second": {"kind": "signs", "shape": "oval"}}, "second.shape: must be one of 'round', 'square' (got 'oval')"),
        ({"zzz": 1, "steps": 2}, "steps: must be one of 1, 3 (got 2); zzz: unknown key; there are sides, steps, "),
        ({"a b": 1}, "'a b': unknown key; there are "),
        ({"self": 1}, "self: unknown key; "),
    ],
)
def test_what_is_wrong_is_said_with_its_dotted_key(values: dict[str, Any], problem: str) -> None:
    assert said(**values).startswith(problem)


def test_all_that_is_wrong_between_fields_is_said_wherever_it_is() -> None:
    node = {"kind": "words", "words": 300, "scale": 1.0}
    lines = ["words: too many for a scale of 1.0", "scale: too large for them"]
    with pytest.raises(ConfigError, match=f"words: {'; '.join(lines)}$"):
        WordsConfig(words=300)
    assert said(first=node) == "; ".join(f"first.{line}" for line in lines)


def test_many_mistakes_are_told_in_part() -> None:
    with pytest.raises(ConfigError) as caught:
        WordsConfig(**{f"{k}": k for k in range(50)})
    assert str(caught.value).count("unknown key") == 20 and str(caught.value).endswith("; and more")


def test_a_preset_knows_no_facts() -> None:
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


class HeadedConfig(ModelConfig):
    kind = "headed"
    head: Annotated[ModelConfig | None, Node("prior.heads:Head")] = Field(None, description="a head")
    hidden: int = Field(32, ge=1, description="channels")


def test_a_node_may_be_its_kind_alone():
    config = choices_of(HeadedConfig, "")
    whole = with_defaults(config, merge(defaults_of(config), {"head": "logistic"}))
    assert whole == {"kind": "headed", "head": {"kind": "logistic", "components": 5}, "hidden": 32}
