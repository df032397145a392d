"""`--import`: every verb can use models from outside the package; a file alone can never import one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails
from givens.token_datasets import make_split
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.config import importing
from pipelines.tokens import TokenDataset
from pipelines.tokens.meta import label_column
from prior import Prior
from tokenizer.base import smallest_type
from tokenizer.files import ConfigError

MINE = """
import torch
from torch import nn
from prior.base import Prior, PriorConfig


class Unigram(Prior, name="my_unigram"):
    Config = PriorConfig

    def __init__(self, config):
        super().__init__(config)
        self.logits = nn.Parameter(torch.zeros(config.grid.vocab_size))

    def forward(self, tokens, encoded=None):
        return self.logits.expand(len(tokens), tokens[0].numel(), -1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a custom prior and tokens; imports are undone afterwards."""
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importing, "IMPORTED", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_prior.py").write_text(MINE)
    pipe = make_pipeline(size=(28, 28))
    grid = pipe.tokenizer.grid
    ids = torch.zeros(16, *grid.shape).to(smallest_type(grid.vocab_size))
    rows = make_split(ids, label_column(["a", "b"]), label=torch.arange(16) % 2)
    TokenDataset(grid, rows.given.columns, {"train": rows, "test": rows}, pipe.tokenizer, {}).save(tmp_path / "tokens")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield tmp_path
    for name in ("my_prior", "my_other", "broken"):
        sys.modules.pop(name, None)


TRAIN = ["tokens=tokens", "out=run", "model.kind=my_unigram", "train.steps=2", "train.batch_size=4"]
TRAIN += ["track.wandb=disabled"]


def test_a_custom_model_is_trained_and_loaded(folder: Path, capsys: Any, one_process: None) -> None:
    name = "./my_prior.py"
    line = fails(capsys, "train_prior", *TRAIN)
    assert line.startswith("error: model.kind: ") and "--import" in line
    main(["train_prior", "--import", name, *TRAIN])
    assert json.loads((folder / "run/pipeline/prior/config.json").read_text())["kind"] == "my_unigram"
    assert f"smalti generate --import {name} pipeline=run/pipeline" in capsys.readouterr().out.splitlines()[-1]
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

    def forward(self, tokens, encoded=None):
        return self.scale * self.seen(tokens.flatten(1))
"""


@pytest.fixture
def peeks(folder: Path) -> Iterator[str]:
    """A prior that sees the token it predicts; the zero scale hides it at first."""
    (folder / "peeks.py").write_text(PEEKS)
    yield "peeks.py"
    sys.modules.pop("peeks", None)


def test_a_prior_that_looks_ahead_is_refused(
    peeks: str, folder: Path, capsys: Any, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By training, before and after, and by `evaluate`."""
    line = fails(capsys, "train_prior", "--import", peeks, *TRAIN, "model.kind=peeks")
    assert "peeks" in line and "looks ahead" in line and not (folder / "run/pipeline").exists()
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


def test_custom_models_are_verified(peeks: str, folder: Path, capsys: Any) -> None:
    assert "folder" in fails(capsys, "verify")
    main(["verify", "--import", "my_prior"])
    assert "my_unigram" in (text := capsys.readouterr().out) and "BROKEN" not in text
    line = fails(capsys, "verify", "--import", peeks, "vocab_size=2")
    assert "peeks" in line and line.startswith("error: --import: ")
    broken = MINE.replace("return self.logits", "raise NotImplementedError").replace("my_", "x_")
    (folder / "my_other.py").write_text(broken)
    with pytest.raises(SystemExit):
        main(["verify", "--import", "my_other.py"])
    assert "BROKEN  Prior x_unigram" in capsys.readouterr().out


def test_a_kind_in_a_file_is_never_imported(folder: Path) -> None:
    """Not even if a module of this name lies beside it."""
    make_pipeline(size=(28, 28)).save_pretrained(folder / "pipeline")
    config = json.loads((folder / "pipeline/prior/config.json").read_text())
    (folder / "pipeline/prior/config.json").write_text(json.dumps({**config, "kind": "my_prior"}))
    (folder / "my_prior.py").write_text("raise SystemExit('imported')")
    with pytest.raises(ConfigError):
        Prior.from_pretrained(folder / "pipeline/prior")


def test_the_name_of_another_model_cannot_be_taken(folder: Path, capsys: Any) -> None:
    (folder / "my_other.py").write_text(MINE.replace("my_unigram", "gpt"))
    line = fails(capsys, "verify", "folder=tokens", "--import", "my_other")
    assert "'gpt'" in line and "prior.gpt" in line
    assert Prior.find("gpt").__module__ == "prior.gpt"
