"""The five steps as Python functions: the same configurations, results and mistakes as the commands.

Covers: pipelines/steps.py, `build_config` and `nest_settings` in pipelines/config.
"""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command import errors_of
from optional import needs_digits

from pipelines import ImagePipeline, steps
from pipelines.__main__ import load_verb
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.tokens import load_tokens
from tokenizer import Tokenizer
from tokenizer.files import PipelineLoadError

CALLS: list[tuple[str, Any, dict[str, Any], list[str]]] = [
    (
        "train_tokenizer",
        "vqvae_digits",
        {"out": Path("runs/a"), "train": {"steps": 4, "minutes": None}, "model": {"quantizer": {"kind": "fsq"}}},
        ["--config", "vqvae_digits", "out=runs/a", "train.steps=4", "train.minutes=null", "model.quantizer.kind=fsq"],
    ),
    (
        "train_tokenizer",
        (),
        {"out": "~/a", "data": {"source": "digits"}, "model": "vit", "model.dim": 64, "model.quantizer": "fsq"},
        ["out=~/a", "data.source=digits", "model=vit", "model.dim=64", "model.quantizer=fsq"],
    ),
    (
        "train_prior",
        ["gpt_digits", Path("prior/gpt_fashion_mnist")],
        {"tokens": "t", "out": "o", "model.dim": 32, "train": {"lr": 1e-5}, "sampler.top_p": 0.9},
        ["--config", "gpt_digits", "--config", "prior/gpt_fashion_mnist", "tokens=t", "out=o", "model.dim=32"]
        + ["train.lr=1e-5", "sampler.top_p=.9"],
    ),
    (
        "generate",
        (),
        {"pipeline": "digits", "num_images": 4, "labels": (3, 8), "out": "grid, two.png", "overwrite": True},
        ["pipeline=digits", "num_images=4", "labels=3,8", 'out="grid, two.png"', "overwrite=true"],
    ),
    ("evaluate", (), {"pipeline": "digits", "num_images": 0}, ["pipeline=digits", "num_images=0"]),
]


def config_of(monkeypatch: pytest.MonkeyPatch, step: str, config: Any, settings: dict[str, Any]) -> Any:
    """The configuration with which a function calls `run`."""
    received: list[Any] = []
    monkeypatch.setattr(load_verb(step), "run", received.append)
    getattr(steps, step)(config, **settings)
    (found,) = received
    return found


def parsed(step: str, argv: list[str]) -> Any:
    """The configuration of the command."""
    main = load_verb(step).main
    return parse(main.args[0], argv, verb=step, description=None, defaults=main.keywords.get("defaults"))


@pytest.mark.parametrize(("step", "config", "settings", "argv"), CALLS)
def test_a_function_runs_what_its_command_runs(monkeypatch, step, config, settings, argv):
    assert config_of(monkeypatch, step, config, settings) == parsed(step, argv)


def test_the_order_of_settings_does_not_matter(monkeypatch):
    """A kind does not reset what stands before it, whether nested, with dots or as a string."""
    settings = {"out": "o", "model": "vit", "model.dim": 64, "model.quantizer.codes": 32, "train": {"steps": 3}}
    settings |= {"model.quantizer": {"kind": "vq"}, "train.lr": 0.5}
    found = [
        config_of(monkeypatch, "train_tokenizer", "vqvae_digits", dict(each))
        for each in itertools.islice(itertools.permutations(settings.items()), 0, None, 397)
    ]
    model, train = found[0].model, found[0].train
    assert len(found) > 10 and all(each == found[0] for each in found)
    assert model["kind"] == "vit" and model["dim"] == 64 and model["quantizer"]["codes"] == 32
    assert train.steps == 3 and train.lr == 0.5 and train.batch_size == 32  # the last from the preset


@pytest.mark.parametrize(
    ("step", "config", "settings", "argv"),
    [
        ("evaluate", (), {"pipeline": "nowhere"}, ["pipeline=nowhere"]),
        (
            "train_tokenizer",
            (),
            {"out": "o", "train": {"lr": -1, "steps": "a"}},
            ["out=o", "train.lr=-1", "train.steps=a"],
        ),
    ],
)
def test_a_mistake_is_an_exception_with_the_lines_of_the_command(  # one line each
    tmp_path, monkeypatch, capsys, step, config, settings, argv
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, PipelineLoadError)) as caught:
        getattr(steps, step)(config, **settings)
    assert [f"error: {line}" for line in str(caught.value).splitlines()] == errors_of(capsys, step, *argv)
    assert not list(tmp_path.iterdir())


@needs_digits
@pytest.mark.usefixtures("one_process")
def test_the_five_steps_from_images_to_figures(tmp_path, monkeypatch):
    """Each takes what the one before returned."""
    monkeypatch.chdir(tmp_path)
    few = {"steps": 2, "batch_size": 4, "warmup_steps": 1}
    small = {"widths": [16], "tail": [8, 8], "blocks": [1], "quantizer": {"codes": 16, "dim": 8}}
    one = steps.train_tokenizer("vqvae_digits", out="one", data={"limit": 60}, model=small, train=few)
    Tokenizer.from_pretrained(one / "tokenizer")
    tokens = steps.encode(tokenizer=one, out="tokens", augmentations=1)
    two = steps.train_prior("gpt_digits", tokens=tokens, out=tmp_path / "two", model={"dim": 16, "depth": 1}, train=few)
    assert load_tokens(tokens).grid == ImagePipeline.from_pretrained(two).prior.grid
    picture = steps.generate(pipeline=two, num_images=3, out="three.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    figures = steps.evaluate(pipeline=two, num_images=4, feature_steps=0)
    saved = json.loads((two / "evaluation" / "evaluation.json").read_text())
    assert figures["num_images"] > 0 and {key: saved[key] for key in figures} == json.loads(json.dumps(figures))
    again = partial(steps.train_prior, "gpt_digits", tokens=tokens, out="two", model={"dim": 16, "depth": 1})
    assert again(train=few) == two.relative_to(tmp_path)  # complete: nothing is trained again
