"""`--import`: models that lie outside the package are known to every verb, in every process, and to no file's word."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import errors_of, fails
from processes import run_file
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.config import importing
from pipelines.tokens import TokenDataset, TokenSplit
from pipelines.tokens.shards import smallest_type
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import ConfigError, IntegrityError

MINE = '''
"""A prior of frequencies."""
import torch
from pydantic import Field
from torch import nn
from prior import Prior
from tokenizer import Tokenizer
from prior.base import PriorConfig


class UnigramConfig(PriorConfig):
    scale: float = Field(1.0, gt=0, description="of the logits")


class Unigram(Prior, name="my_unigram"):
    """The same logits everywhere."""

    Config = UnigramConfig

    def __init__(self, config: UnigramConfig) -> None:
        super().__init__(config)
        self.logits = nn.Parameter(torch.zeros(config.grid.vocab_size))

    def forward(self, tokens, labels=None):
        return self.config.scale * self.logits.expand(len(tokens), tokens[0].numel(), -1)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a prior of one's own, and tokens; what is imported is forgotten afterwards."""
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importing, "IMPORTED", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_prior.py").write_text(MINE)
    pipe = make_pipeline(size=(28, 28))
    grid = pipe.tokenizer.grid
    rows = TokenSplit(torch.zeros(16, *grid.shape).to(smallest_type(grid.vocab_size)), torch.arange(16) % 2)
    TokenDataset(grid, ["a", "b"], {"train": rows, "test": rows}, pipe.tokenizer, {}).save(tmp_path / "tokens")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield tmp_path
    for name in ("my_prior", "my_other", "broken"):
        sys.modules.pop(name, None)


TRAIN = [
    "tokens=tokens",
    "out=run",
    "model.kind=my_unigram",
    "train.steps=2",
    "train.batch_size=4",
    "track.wandb=disabled",
]


@pytest.mark.parametrize("name", ["my_prior", "my_prior.py", "./my_prior.py"])
def test_a_model_of_ones_own_is_trained_loaded_and_told_of(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], one_process: None
) -> None:
    main(["train_prior", "--import", name, *TRAIN, "model.scale=2"])
    assert json.loads((folder / "run/pipeline/prior/config.json").read_text())["kind"] == "my_unigram"
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith(f"next: smalti generate --import {name} pipeline=run/pipeline")
    main(["generate", f"--import={name}", "pipeline=run/pipeline", "num_images=2"])
    assert (folder / "grid.png").is_file()


PEEKS = """
import torch
from torch import nn
from prior.base import Prior, PriorConfig


class Peeks(Prior, name="peeks"):
    Config = PriorConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.grid.vocab_size
        self.seen, self.scale = nn.Embedding(size, size), nn.Parameter(torch.zeros(()))

    def forward(self, tokens, labels=None):
        return self.scale * self.seen(tokens.flatten(1))
"""


@pytest.fixture
def peeks(folder: Path) -> Iterator[str]:
    """A prior that sees the token it predicts, which its output layer of zero hides at first."""
    (folder / "peeks.py").write_text(PEEKS)
    yield "peeks.py"
    sys.modules.pop("peeks", None)


def test_a_prior_that_looks_ahead_is_not_trained(peeks: str, folder: Path, capsys: Any, one_process: None) -> None:
    line = fails(capsys, "train_prior", "--import", peeks, *TRAIN, "model.kind=peeks")
    assert "peeks" in line and "looks ahead" in line and not (folder / "run/pipeline").exists()


def test_a_prior_that_learns_to_look_ahead_is_noticed(
    peeks: str, folder: Path, capsys: Any, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By training and by `evaluate`, each of which looks at the weights that it judges."""
    monkeypatch.setattr("pipelines.train_prior.with_random_weights", lambda model: model)
    with pytest.raises(SystemExit) as caught:
        main(["train_prior", "--import", peeks, *TRAIN, "model.kind=peeks", "train.lr=0.1", "train.steps=20"])
    assert caught.value.code == 2 and "looks ahead" in capsys.readouterr().err.splitlines()[-1]
    pipe = make_pipeline(size=(28, 28))
    prior = Prior.create("peeks", grid=pipe.tokenizer.grid, tokenizer=pipe.tokenizer.fingerprint())
    torch.nn.init.ones_(prior.scale)
    ImagePipeline(pipe.tokenizer, prior).save_pretrained(folder / "pipeline")
    evaluate = ["evaluate", "--import", peeks, "pipeline=pipeline", "num_images=0", "data.limit=80"]
    assert "looks ahead" in fails(capsys, *evaluate)


def test_models_of_ones_own_are_verified(peeks: str, folder: Path, capsys: Any) -> None:
    assert "folder" in fails(capsys, "verify")
    main(["verify", "--import", "my_prior.py"])
    assert "my_unigram" in (text := capsys.readouterr().out) and "BROKEN" not in text
    line = fails(capsys, "verify", "--import", peeks, "vocab_size=2")
    assert "peeks" in line and "promises broken" in line


BROKEN = """
import torch
from tokenizer import Tokenizer
from tokenizer.base import TokenizerConfig
from prior import Prior
from tokenizer import Tokenizer
from prior.base import PriorConfig


class Unfinished(Tokenizer, name="unfinished"):
    Config = TokenizerConfig

    def __init__(self, config):
        super().__init__(config)


class Raises(Prior, name="raises"):
    Config = PriorConfig

    def forward(self, tokens, labels=None):
        raise NotImplementedError
"""


def test_what_a_model_raises_while_it_is_verified_is_a_broken_promise(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "_members", dict(Tokenizer._members))
    (folder / "my_other.py").write_text(BROKEN)
    line = fails(capsys, "verify", "--import", "my_other.py")
    assert "promises broken" in line


def test_a_file_of_the_home_is_found(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A shell leaves the `~` of `--import=~/my_prior.py` as it is."""
    monkeypatch.setenv("HOME", str(folder))
    main(["plan", "--import=~/my_prior.py", "tokens=tokens", "model.kind=my_unigram", "gpus=1"])
    assert "my_unigram, an image" in capsys.readouterr().out


def test_help_and_plan_know_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train_prior", "--import", "my_prior", "model.kind=my_unigram", "--help", "model"])
    assert re.search(r"^  model.scale +float > 0 ", capsys.readouterr().out, re.M)
    main(["plan", "--import", "my_prior", "tokens=tokens", "model.kind=my_unigram", "gpus=1"])
    assert "my_unigram, an image" in capsys.readouterr().out


def test_every_process_of_a_launch_imports_it(folder: Path) -> None:
    """Each is started with the same command line, as a module."""
    assert run_file("-m", "pipelines.train_prior", "--import", "my_prior", *TRAIN, "--dry-run", RANK="1") == ""


def test_without_it_the_error_hints_at_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "train_prior", *TRAIN)
    assert "model.kind: no Prior is called 'my_unigram'; there are" in line
    assert line.endswith("; one of your own has to be imported first, as --import FILE does")


def test_what_a_file_says_is_never_imported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose kind is the name of a module beside it stays unread, and says how to know the kind."""
    pipe = make_pipeline(size=(28, 28))
    pipe.save_pretrained(folder / "pipeline")
    config = json.loads((folder / "pipeline/prior/config.json").read_text())
    (folder / "pipeline/prior/config.json").write_text(json.dumps({**config, "kind": "my_prior"}))
    (folder / "my_prior.py").write_text("raise SystemExit('imported')")
    with pytest.raises(ConfigError, match="imported first"):
        Prior.from_pretrained(folder / "pipeline/prior")
    (folder / "mine.yaml").write_text("import: my_prior\n--import: my_prior\n")
    lines = errors_of(capsys, "train_prior", "--config", "mine.yaml", "tokens=tokens", "out=run")
    assert any("unknown key" in line for line in lines)
    with pytest.raises(IntegrityError):
        ImagePipeline.from_pretrained(folder / "pipeline")


@pytest.mark.parametrize(
    "name", ["my_piror", "my_piror.py", "a b", "../my_prior", ".my_prior", "tokens/meta.json", "json.py", ""]
)
def test_what_cannot_be_imported(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of another module counts among it: `json.py` would be found second."""
    (folder / "json.py").write_text("")
    line = fails(capsys, "verify", "folder=tokens", "--import", name)
    assert line.startswith(f"error: --import {name}: ") and name not in importing.IMPORTED


def test_a_bug_in_it_keeps_its_traceback(folder: Path) -> None:
    """Also when it misses a module of its own; and it can be tried again."""
    for text, error in ("1 / 0", ZeroDivisionError), ("import not_there", ModuleNotFoundError):
        (folder / "broken.py").write_text(textwrap.dedent(text))
        for name in ("broken.py", "broken"):
            with pytest.raises(error):
                main(["verify", "folder=tokens", "--import", name])
        assert "broken" not in sys.modules


def test_a_model_without_settings_is_told_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And has not joined its family."""
    (folder / "my_bare.py").write_text("from prior import Prior\n\n\nclass Bare(Prior, name='bare'):\n    pass\n")
    line = fails(capsys, "verify", "folder=tokens", "--import", "my_bare")
    assert line == "error: Bare has no settings: give it a class of them, as `Config`"
    assert "bare" not in Prior.available()


def test_one_name_is_for_one_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of another module cannot take a name that there is."""
    (folder / "my_other.py").write_text(MINE.replace("my_unigram", "gpt"))
    line = fails(capsys, "verify", "folder=tokens", "--import", "my_other")
    assert line.startswith("error: 'gpt' is already ") and "prior.gpt" in line
    assert Prior.find("gpt").__module__ == "prior.gpt"
