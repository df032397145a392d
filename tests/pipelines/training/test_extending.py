"""A run goes on with another end, or another rhythm; each step comes once, and what else differs is refused."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents
from launch import (
    VQVAE,
    assert_equal_tensors,
    exact,
    losses,
    make_tokens,
    metrics,
    prior_arguments,
    states,
    tensors,
    tokenizer_arguments,
    train_prior,
    train_stage,
    verb,
)
from two_processes import run_together

from pipelines.config import UserError
from pipelines.config.arguments import read_file
from pipelines.config.command import Interrupted, RunError, parse
from pipelines.config.schema import to_yaml
from pipelines.images import DataConfig
from pipelines.train_tokenizer import TrainTokenizerConfig
from pipelines.training import loop as training
from pipelines.training.run_folder import check_folder
from pipelines.training.schedule import TrainConfig, learning_rate
from tokenizer import Tokenizer

EVERY = {"train__log_every": 3, "train__evaluate_every": 4, "train__preview_every": 6, "train__save_every": 5}
LR = {"train_tokenizer": 2e-3, "train_prior": 4e-3}
EACH = pytest.mark.parametrize("stage", LR)
OF_ONE = pytest.mark.parametrize("stage", ["train_tokenizer", pytest.param("train_prior", marks=pytest.mark.slow)])
"""Both stages have one loop, which knows nothing of either."""


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def train(tokens) -> Any:
    """Train a stage in this process: `train(stage, folder)`."""

    def call(stage: str, out: Path, **more: Any) -> Path:
        return train_stage(stage, out, tokens, **{**EVERY, **more})

    return call


def stop_at(monkeypatch: Any, step: int) -> None:
    """Ctrl-C, while this step is taken."""
    take_step = training.take_step

    def told(run: Any, *rest: Any) -> None:
        if run.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(run, *rest)

    monkeypatch.setattr(training, "take_step", told)


def steps(run: Path, key: str = "loss") -> list[int]:
    """At which steps the record has a figure, in its order."""
    return [line["step"] for line in metrics(run) if key in line]


# Another end


@EACH
def test_a_finished_run_goes_on(tmp_path, train, capsys, stage):
    """What stands in the record stays, the old last step comes once, and the new schedule holds from there."""
    run = train(stage, tmp_path / "run")
    before, pictures = metrics(run), contents(run / "previews")
    capsys.readouterr()
    train(stage, run, train__steps=20)
    printed = capsys.readouterr().out
    assert f"{run}: continuing from step 12; " in printed and f"{run}: done: 20 steps in " in printed
    (line,) = [line for line in printed.splitlines() if "train.steps" in line]
    assert line == (
        f"{run}: train.steps 12 -> 20: the learning rate follows the new schedule from here on; not the same to the "
        "bit as a run that began that way"
    )
    assert metrics(run)[: len(before)] == before and steps(run) == [3, 6, 9, 12, 15, 18, 20]
    figure = {"train_tokenizer": "psnr", "train_prior": "bits_per_token"}[stage]
    assert steps(run, f"validation/{figure}") == [4, 8, 12, 16, 20]
    assert steps(run, f"held_out/{figure}") == [12, 20]  # at each end
    assert len(metrics(run)) == len({line["step"] for line in metrics(run)})
    assert contents(run / "previews").items() >= pictures.items()
    assert sorted({path.stem[-2:] for path in (run / "previews").iterdir()}) == ["00", "06", "12", "18", "20"]
    rates = {line["step"]: line["learning_rate"] for line in metrics(run) if "loss" in line}
    for total, at in ((12, (3, 6, 9, 12)), (20, (15, 18, 20))):
        config = TrainConfig(steps=total, lr=LR[stage], warmup_steps=4)
        assert [rates[step] for step in at] == pytest.approx([learning_rate(config, s, s / total) for s in at])
    assert read_file(str(run / "config.yaml"))["train"]["steps"] == 20
    assert [path.name for path in states(run)] == ["step-00000015", "step-00000020"]
    after = contents(run)
    train(stage, run, train__steps=20)  # from now on this is the run
    assert "already finished: 20 steps" in capsys.readouterr().out and contents(run) == after


@OF_ONE
def test_a_run_that_was_told_to_end_goes_on_to_another_end(tmp_path, train, monkeypatch, capsys, stage):
    """Told to end at a step where much was due, which is done once; a nearer end will do, too."""
    for name, total in (("longer", 16), ("shorter", 10)):
        run = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_at(patch, 8)
            train(stage, run, train__log_every=4)
        train(stage, run, train__log_every=4, train__steps=total)
        assert steps(run) == [4, 8, *range(12, total, 4), total]
        assert len(metrics(run)) == len({line["step"] for line in metrics(run)})
        config = TrainConfig(steps=total, lr=LR[stage], warmup_steps=4)
        assert metrics(run)[-1]["learning_rate"] == pytest.approx(learning_rate(config, total, 1.0))
        printed = capsys.readouterr().out
        assert f"train.steps 12 -> {total}: the learning rate" in printed and f"done: {total} steps" in printed


def test_a_run_without_a_state_begins_with_the_new_end(tmp_path, train, monkeypatch, capsys):
    """Nothing of the old schedule is in it, so it is what it would have been, and nothing needs to be said."""
    whole = train("train_tokenizer", tmp_path / "whole", train__steps=8)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="ZeroDivisionError"):
        patch.setattr(training, "take_step", lambda *_: 1 // 0)
        train("train_tokenizer", tmp_path / "run")
    run = train("train_tokenizer", tmp_path / "run", train__steps=8)
    assert exact(run) == exact(whole) and "->" not in capsys.readouterr().out


def test_minutes_may_grow(tmp_path, train, capsys):
    minutes = {"train__steps": None, "train__log_every": 1}
    run = train("train_tokenizer", tmp_path / "run", **minutes, train__minutes=0.005)
    more = round(metrics(run)[-1]["minutes"] + 0.01, 3)
    train("train_tokenizer", run, **minutes, train__minutes=more)
    last = metrics(run)[-1]
    assert last["minutes"] >= more and steps(run) == list(range(1, last["step"] + 1))
    assert f"train.minutes 0.005 -> {more}: the learning rate follows" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"train.minutes: {more} -> 0.005: .* its end may move, but has to lie ahead"):
        train("train_tokenizer", run, **minutes, train__minutes=0.005)
    train("train_tokenizer", run, train__log_every=1, train__steps=last["step"] + 3)  # another kind of end
    assert steps(run) == list(range(1, last["step"] + 4))


def test_an_end_that_is_not_ahead_is_refused(tmp_path, train):
    run = train("train_tokenizer", tmp_path / "run", train__steps=14)
    with pytest.raises(UserError, match="lie ahead") as caught:
        train("train_tokenizer", run, train__steps=14, train__minutes=1e-6)
    before = contents(run)
    for total in (12, 9, 3):
        with pytest.raises(UserError) as caught:
            train("train_tokenizer", run, train__steps=total)
        assert re.sub(r"\d\.\d minutes", "0.0 minutes", str(caught.value)) == (
            f"train.steps: 14 -> {total}: {run} has done 14 steps in 0.0 minutes; its end may move, but has to lie "
            "ahead of that; nothing was changed"
        )
        assert contents(run) == before


@OF_ONE
def test_another_rhythm_changes_no_weight(tmp_path, train, monkeypatch, capsys, stage):
    whole = train(stage, tmp_path / "whole")
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 7)
        train(stage, run)
    other = {"train__log_every": 1, "train__evaluate_every": 3, "train__preview_every": 2, "train__save_every": 2}
    train(stage, run, **other, train__timeout=99.0)
    assert_equal_tensors(tensors(states(run)[-1]), tensors(states(whole)[-1]))
    assert losses(run)[-1] == losses(tmp_path / "run")[-1] and steps(run) == [3, 6, 8, 9, 10, 11, 12]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert line == (
        f"{run}: train.log_every 3 -> 1, train.preview_every 6 -> 2, train.evaluate_every 4 -> 3, "
        "train.save_every 5 -> 2 from here on"
    )


# The end


def test_the_end_says_what_there_is_and_what_comes_next(tmp_path, train, capsys):
    """In one line, and again when nothing is left to be done; a name with a space can be copied to a shell."""
    one, two = tmp_path / "my run", tmp_path / "prior"
    for begin, nothing in (("done", ""), ("already finished", "; nothing to do")):
        train("train_tokenizer", one)
        train("train_prior", two)
        psnr, bits = metrics(one)[-1]["held_out/psnr"], metrics(two)[-1]["held_out/bits_per_token"]
        printed = re.sub(r"\d\.\d min,", "0.0 min,", capsys.readouterr().out)
        lines = [line for line in printed.splitlines() if begin in line]
        assert lines == [
            f"{one}: {begin}: 12 steps in 0.0 min, PSNR {psnr:.2f} dB{nothing}; tokenizer: '{one}/tokenizer'; next: "
            f"smalti encode tokenizer='{one}/tokenizer' out='{one}_tokens'",
            f"{two}: {begin}: 12 steps in 0.0 min, {bits:.3f} bits per token{nothing}; pipeline: {two}/pipeline; next: "
            f"smalti generate pipeline={two}/pipeline",
        ]


def test_a_bound_is_called_a_bound(tmp_path, train, capsys):
    model = {"kind": "masked", "dim": 16, "depth": 1, "heads": 2, "exact": False}
    train("train_prior", tmp_path / "run", model=model, train__steps=2)
    assert re.search(r"done: 2 steps in \d\.\d min, at most \d\.\d{3} bits per token; ", capsys.readouterr().out)


def test_a_tokenizer_without_parameters_is_done_at_once(tmp_path, train, capsys):
    train("train_tokenizer", tmp_path / "run", model={"kind": "pixels", "levels": 5})
    assert f"{tmp_path / 'run'}: done: nothing to train, PSNR " in capsys.readouterr().out


# What else may differ

CHANGED: dict[str, Any] = {
    "steps": 99,
    "minutes": 5.0,
    "batch_size": 8,
    "accumulate": 2,
    "optimizer": "muon",
    "muon_lr": 0.05,
    "mixed_precision": "auto",
    "lr": 0.1,
    "final_lr": 0.1,
    "warmup_steps": 1,
    "betas": [0.8, 0.9],
    "weight_decay": 0.3,
    "clip": 2.0,
    "ema_decay": 0.5,
    "seed": 1,
    "log_every": 7,
    "preview_every": 7,
    "evaluate_every": 7,
    "save_every": 7,
    "checkpointing": True,
    "compile": True,
    "timeout": 5.0,
    "keep_best": False,
}
DATA: dict[str, Any] = {
    "source": "elsewhere",
    "streaming": True,
    "shuffle_window": 5,
    "split": "some",
    "held_out": "others",
    "held_out_fraction": 0.2,
    "image_size": 14,
    "channels": 3,
    "image_column": "picture",
    "label_column": None,
    "augment": {"shift": 2},
    "on_error": "skip",
    "max_bad_fraction": 0.5,
    "limit": 60,
    "cache_mb": 1,
    "validation_fraction": 0.1,
}


FREE = {"steps", "minutes", "log_every", "preview_every", "evaluate_every", "save_every", "timeout", "checkpointing"}


def config_of(run: Path, **more: Any) -> TrainTokenizerConfig:
    argv = tokenizer_arguments(run, **more)
    return parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description=None)


def refused(run: Path, old: TrainTokenizerConfig, **more: Any) -> bool:
    """Whether a run may not go on with this change."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(old))
    try:
        check_folder(run, config_of(run, **more))
    except UserError as error:
        assert "belongs to a run with another configuration" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_setting_of_training_is_free_or_refused(tmp_path, name):
    """A new one is refused, until somebody says that it makes no difference."""
    old, new = config_of(tmp_path / "run"), config_of(tmp_path / "run", **{f"train__{name}": CHANGED[name]})
    assert getattr(new.train, name) != getattr(old.train, name)
    assert refused(tmp_path / "run", old, **{f"train__{name}": CHANGED[name]}) == (name not in FREE)


@pytest.mark.parametrize("name", DataConfig.model_fields)
def test_what_may_differ_in_the_data(tmp_path, name):
    """How much of it is kept in memory; and, where images are read when they are due, what becomes of bad ones."""
    for streaming in (False, True):
        base = {"data__streaming": streaming}
        change = {**base, f"data__{name}": DATA[name] if name != "streaming" else not streaming}
        free = name == "cache_mb" or (streaming and name in ("on_error", "max_bad_fraction"))
        assert refused(tmp_path / "run", config_of(tmp_path / "run", **base), **change) == (not free)


def test_a_refused_change_names_the_way_that_there_is(tmp_path, train):
    run = train("train_tokenizer", tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train("train_tokenizer", run, train__lr=1e-4)
    first, *differing = str(caught.value).splitlines()
    assert first == (
        f"{run}: belongs to a run with another configuration; nothing was overwritten. Choose another out=, with "
        f"init={run}/tokenizer to begin with its weights (optimizer and schedule begin anew). What differs:"
    )
    assert differing == ["train.lr: 0.002 -> 0.0001"]
    more = train("train_tokenizer", tmp_path / "more", train__lr=1e-4, init=str(run / "tokenizer"), train__steps=1)
    ours, theirs = (dict(Tokenizer.from_pretrained(at / "tokenizer").named_parameters()) for at in (more, run))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in theirs)
    for change in ({"model": {**VQVAE, "widths": [8]}}, {"data__image_size": 32}):  # what `init` would not take
        with pytest.raises(UserError, match="with such changes a run begins anew"):
            train("train_tokenizer", run, **change)
    run = train("train_prior", tmp_path / "prior")
    with pytest.raises(UserError, match=r"Choose another out=, where a run begins anew\. What differs"):
        train("train_prior", run, train__lr=1e-4)


# Several processes


def two(folder: Path, *more: dict[str, Any]) -> list[tuple[int, str]]:
    """The exit codes and outputs of two processes without a launcher, each with arguments of its own."""
    commands = [
        verb("train_prior", prior_arguments(folder / "run", folder / "tokens", **arguments)) for arguments in more
    ]
    return run_together(commands, code=None)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_go_on_together_or_not_at_all(tmp_path):
    run, tokens = tmp_path / "run", make_tokens(tmp_path / "tokens")
    train_prior(run, tokens, train__steps=6)
    (code, printed), (other, _) = two(tmp_path, *2 * [{"train__steps": 9}])
    assert (code, other) == (0, 0) and ", 2 processes on cpu" in printed, printed
    assert f"{run}: train.steps 6 -> 9: " in printed and steps(run) == list(range(1, 10))
    before = contents(run)
    for code, printed in two(tmp_path, {"train__steps": 9}, {"train__steps": 12, "train__log_every": 2}):
        assert code == 2 and printed.splitlines()[-1].endswith(
            ": process 1 was started with other settings than process 0: train.steps: 9 -> 12, train.log_every: 1 -> 2"
        )
    assert contents(run) == before
