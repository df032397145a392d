"""The folder of a run: what is refused before anything changes there, and which settings may change on resume."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from contextlib import nullcontext
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from folders import contents
from launch import metrics, prior_arguments, states, tokenizer_arguments, train_prior, train_tokenizer
from one_process import one_process
from tiny_task import (
    TinyTask,
    assert_same_run,
    assert_same_tensors,
    copy_run,
    read_checkpoint,
    stopped_at,
    train_tiny,
    trainer_of,
)

from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_tokenizer import TrainTokenizerConfig
from pipelines.training import reporting
from pipelines.training.reporting import Pace
from pipelines.training.run_folder import check_run_folder
from pipelines.training.schedule import TrainConfig, learning_rate
from tokenizer.files import PipelineLoadError

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"log_every": 3, "evaluate_every": 4, "preview_every": 6, "save_every": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of eight steps."""
    with one_process():
        return train_tiny(tmp_path_factory.mktemp("finished") / "run", **EVERY)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return copy_run(finished, tmp_path / "run")


def assert_refused(run: Path, *parts: str, error: type[Exception] = UserError, **settings: Any) -> None:
    """Assert that the run is refused with an error that contains `parts`, and that its folder is unchanged."""
    before = contents(run) if run.is_dir() else run.read_bytes()
    with pytest.raises(error) as caught:
        train_tiny(run, **{**EVERY, **settings})
    assert not [part for part in parts if part not in str(caught.value)], caught.value
    assert before == (contents(run) if run.is_dir() else run.read_bytes())


# Folders that are not this run's


@pytest.mark.parametrize("name", ["notes.txt", ".tmp-config.json-mine", "state/step-00000001/state.json"])
def test_a_folder_with_other_files_is_refused(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert_refused(tmp_path / "run", str(tmp_path / "run"), "out=")


@pytest.mark.parametrize("text", ['{"out": [1', "[1]"])
def test_a_damaged_configuration_is_refused(run, text):
    (run / "config.json").write_text(text)
    assert_refused(run, "config.json", error=PipelineLoadError)


def test_another_configuration_is_refused_with_the_differences(run, tokens):
    assert_refused(run, "train.lr: 0.01 -> 0.02", "train.seed: 0 -> 5", "out=", lr=0.02, seed=5)
    before = contents(run)
    for train in (train_tokenizer, partial(train_prior, tokens=tokens)):  # neither stage of the real models
        with pytest.raises(UserError, match="out="):
            train(run)
    assert contents(run) == before


def test_a_snapshot_without_checkpoints_is_not_overwritten(tmp_path):
    """An empty `state/` means that the run was killed in its first save, so that it starts over."""
    run = train_tokenizer(tmp_path / "run", train__steps=2)
    whole = copy_run(run, tmp_path / "whole")
    shutil.rmtree(run / "state")
    before = contents(run)
    with pytest.raises(UserError, match="tokenizer/"):
        train_tokenizer(run, train__steps=2)
    assert contents(run) == before
    (run / "state").mkdir()
    train_tokenizer(run, train__steps=2)
    assert_same_run(run, whole)


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path):
    for settings, key in (({"steps": None}, "train.steps"), ({"accumulate": 3}, "train.batch_size")):
        with pytest.raises(UserError, match=f"^{key}"):
            train_tiny(tmp_path / "new" / "run", **settings)
    with pytest.raises(UserError, match="nowhere"):
        train_tiny(tmp_path / "new" / "run", Mock(side_effect=UserError("data.source: nowhere")))
    assert not list(tmp_path.iterdir())


# The model that a run started from


def test_a_run_resumes_only_with_the_model_it_started_from(tmp_path):
    first = partial(TinyTask, init={"source": "there", "fingerprint": "a"})
    other = partial(TinyTask, init={"source": "there", "fingerprint": "b"})
    with stopped_at(4):
        train_tiny(tmp_path / "run", first, init="there")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="^init: there"):
        train_tiny(tmp_path / "run", other, init="there", log_every=5)
    assert contents(tmp_path / "run") == before
    train_tiny(tmp_path / "run", first, init="there")
    assert metrics(tmp_path / "run")[-1]["step"] == 8


# The end of a run


def test_a_finished_run_changes_nothing_but_out(run, finished, capsys):
    """A setting that an older configuration lacks is completed by its default."""
    before, config = contents(run), json.loads((run / "config.json").read_text())
    del config["train"]["keep_best"]
    (run / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        train_tiny(run, **EVERY)
        after = contents(run)
        assert {name for name in after if after[name] != before.get(name)} == {"config.json"}
        assert set(after) == set(before)
        assert json.loads((run / "config.json").read_text()) == {
            **json.loads((finished / "config.json").read_text()),
            "out": str(run),
        }
    printed = capsys.readouterr().out
    assert printed.count("already finished: 8 steps") == 2 and "continuing" not in printed


def test_a_finished_run_continues_to_another_end(run, capsys):
    """The record is kept, the former last step is not evaluated again, and the new schedule applies from there."""
    before, pictures = metrics(run), contents(run / "previews")
    train_tiny(run, **EVERY, steps=14)
    assert "train.steps: 8 -> 14" in capsys.readouterr().out
    assert metrics(run)[: len(before)] == before
    assert [line["step"] for line in metrics(run) if "loss" in line] == [3, 6, 8, 9, 12, 14]
    assert [line["step"] for line in metrics(run) if "validation/error" in line] == [4, 8, 12, 14]
    assert [line["step"] for line in metrics(run) if "held_out/error" in line] == [8, 14]
    assert contents(run / "previews").items() >= pictures.items()
    rates = {line["step"]: line["learning_rate"] for line in metrics(run) if "loss" in line}
    for total, steps in ((8, (3, 6, 8)), (14, (9, 12, 14))):
        config = TrainConfig(steps=total, lr=1e-2, warmup_steps=2)
        assert [rates[step] for step in steps] == pytest.approx([learning_rate(config, s, s / total) for s in steps])
    assert [path.name for path in states(run)] == ["step-00000012", "step-00000014"]
    assert_refused(run, "train.steps", steps=8)


@pytest.mark.parametrize("end", [{"steps": 9, "minutes": 1e-9}, {"steps": 7}])
def test_an_end_that_is_already_past_is_refused(run, end):
    assert_refused(run, "train.steps", str(run), **end)


# Other settings


def test_other_intervals_change_no_weight(tmp_path, finished, capsys):
    with stopped_at(5):
        train_tiny(tmp_path / "run", **EVERY)
    other = {"log_every": 1, "evaluate_every": 3, "preview_every": 2, "save_every": 2}
    run = train_tiny(tmp_path / "run", **other, timeout=99.0)
    found, expected = (
        {name: value for name, value in read_checkpoint(states(each)[-1]).items() if not name.startswith("best.")}
        for each in (run, finished)
    )
    assert_same_tensors(found, expected)
    assert [line["step"] for line in metrics(run) if "loss" in line] == [3, 6, 7, 8]
    assert capsys.readouterr().out.count("->") == len(other)


FREE = {
    *(f"train.{name}" for name in ("steps", "minutes", "timeout", "checkpointing")),
    *(f"train.{name}_every" for name in ("log", "preview", "evaluate", "save")),
    *(f"track.{name}" for name in ("trackers", "wandb", "project", "name", "artifact")),
    "data.cache_mb",
    "out",
}


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_every_setting_is_free_or_refused_by_name(tmp_path, stage):
    """A new setting is refused until someone declares that it changes no weight."""
    run = tmp_path / "run"
    run.mkdir()
    if stage == "tokenizer":
        config = parse(TrainTokenizerConfig, tokenizer_arguments(run), verb="train_tokenizer", description=None)
    else:
        argv = prior_arguments(run, tmp_path / "tokens")
        config = parse(TrainPriorConfig, argv, verb="train_prior", description=None)
    for key in leaves(config.model_dump(mode="json")):
        saved = config.model_dump(mode="json")
        *folders, name = key.split(".")
        reduce(getitem, folders, saved)[name] = "another"
        (run / "config.json").write_text(json.dumps(saved))
        refused = nullcontext() if key in FREE else pytest.raises(UserError, match=rf"\n{re.escape(key)}\b.*->")
        with refused:
            check_run_folder(run, config)
    (run / "config.json").write_text(config.model_dump_json())  # which is also a file for `--config`
    argv = ["--config", str(run / "config.json")]
    assert parse(type(config), argv, verb="train", description=None) == config


def leaves(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all settings."""
    found = []
    for key, value in settings.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return found


# Output


def test_a_log_gets_lines_and_a_terminal_a_progress_bar(tmp_path, monkeypatch, capsys):
    """A notebook gets lines on stdout, because it shows stderr as errors."""
    train_tiny(tmp_path / "log", steps=4, log_every=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    expected = [f"step {line['step']}: loss {line['loss']:.4f}" for line in metrics(tmp_path / "log")]
    assert [line.partition(",")[0] for line in lines] == expected
    notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", notebook)
    train_tiny(tmp_path / "notebook", steps=2, log_every=2)
    assert "step 2: loss" in capsys.readouterr().out and not notebook.getvalue().strip()
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr(sys, "stderr", terminal)
    train_tiny(tmp_path / "terminal", steps=None, minutes=0.002, log_every=1)
    assert "of 0.002 min left" in terminal.getvalue() and "step 2: loss" not in terminal.getvalue()


def test_a_run_reports_after_ten_seconds_when_it_will_end(tmp_path, monkeypatch, capsys):
    """Each step takes six seconds but the first, which is not timed."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(reporting, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with trainer_of(tmp_path / "run", steps=100, minutes=0.5) as trainer:
        pace = Pace()
        for step, seconds in enumerate((4.0, 6.0, 6.0), start=1):
            pace.start_step()
            clock.now += seconds
            trainer.step, trainer.minutes = step, clock.now / 60
            pace.announce_once(trainer, SimpleNamespace(disable=True))
        found = capsys.readouterr().err
        assert found == "step 2 of 100; about 20 seconds left, until train.minutes=0.5\n"
