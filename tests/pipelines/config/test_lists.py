"""Lists on the command line without brackets, which zsh would take for a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from pipelines.commands.search import SearchConfig
from pipelines.config import Config, UserError
from pipelines.config.command import parse
from pipelines.generate import GenerateConfig
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_tokenizer import TrainTokenizerConfig

Side = Annotated[int, Field(ge=4)]


class Inner(Config):
    betas: tuple[float, float] = (0.9, 0.95)
    names: tuple[Literal["a", "b", "c"], ...] = ("a",)
    title: str = ""


class Whole(Config):
    out: str = ""
    side: Side | tuple[Side, Side] = 8
    labels: int | str | list[int | str] | None = None
    paths: list[str] | None = None
    inner: Inner = Inner()


def read(*argv: str, cls: type[Config] = Whole) -> Any:
    return parse(cls, list(argv), verb="try", description="")


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("labels", "3,8"),
        ("labels", "cat,3,big dog"),
        ("labels", "3,"),
        ("side", "32,96"),
        ("side", "32, 96"),
        ("inner.betas", "0.8,1e-1"),
        ("inner.names", "a,c"),
        ("inner.names", "c"),
        ("paths", "~/a,b"),
        ("paths", "~/a"),
    ],
)
def test_a_list_needs_no_brackets(key: str, plain: str) -> None:
    found = read(f"{key}={plain}")
    assert found == read(f"{key}=[{plain}]") and found != read()
    assert found == read(f"--{key}={plain}")


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("labels=3", "labels", 3),
        ("labels=cat", "labels", "cat"),
        ("labels=tench, Tinca tinca", "labels", "tench, Tinca tinca"),  # a class of ImageNet
        ('labels="a,b"', "labels", "a,b"),
        ("side=8", "side", 8),
        ("out=a,b", "out", "a,b"),
        ("out=3,8", "out", "3,8"),
        ("inner.title=a,b", "title", "a,b"),
    ],
)
def test_what_is_one_value_stays_one(argument: str, key: str, value: Any) -> None:
    found = read(argument)
    found = getattr(found.inner if key == "title" else found, key)
    assert found == value and type(found) is type(value)


def test_a_file_with_a_comma_in_its_name_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "a,b.png").touch()
    assert read(f"labels={tmp_path}/a,b.png").labels == f"{tmp_path}/a,b.png"
    assert read(f"labels={tmp_path}/a,c.png").labels == [f"{tmp_path}/a", "c.png"]


@pytest.mark.parametrize(
    "argument", ["side=32,2", "side=a,b", "inner.betas=1,2,3", "inner.names=a,d", "inner.betas=1,,2"]
)
def test_a_list_without_brackets_is_checked_as_one_with_them(argument: str) -> None:
    key = argument.partition("=")[0]
    with pytest.raises(UserError, match=f"^{key}: "):
        read(argument)


def test_an_unknown_key_with_commas_is_refused_by_its_name() -> None:
    for argument, key in (("sides=1,2", "sides"), ("inner.beta=1,2", "inner.beta")):
        with pytest.raises(UserError, match=f"^{key}: unknown key"):
            read(argument)


def test_verbs_take_lists_without_brackets() -> None:
    assert read("pipeline=x", "labels=3,8", cls=GenerateConfig).labels == [3, 8]
    assert read("pipeline=x", "images=3,8", cls=SearchConfig).images == [3, 8]
    argv = ["out=x", "data.image_size=32,96", "track.trackers=wandb,tensorboard"]
    found = read(*argv, "model.kind=vqvae", "model.widths=32,64", "model.quantizer.kind=fsq", cls=TrainTokenizerConfig)
    assert found.data.image_size == (32, 96) and found.track.trackers == ("wandb", "tensorboard")
    assert found.model["widths"] == [32, 64]
    found = read("tokens=x", "out=x", "model.kind=gpt", "model.window=2,3", cls=TrainPriorConfig)
    assert found.model["window"] == [2, 3]
