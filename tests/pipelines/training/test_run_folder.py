"""The folder of a run: what is refused before anything is changed there, and what may change when a run goes on."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
from folders import contents, half_written
from givens.image_files import write_pictures
from launch import (
    VQVAE,
    arguments,
    make_tokens,
    metrics,
    prior_arguments,
    states,
    tensors,
    tokenizer_arguments,
    train_prior,
    train_tokenizer,
)
from one_process import one_process
from tiny_task import (
    Killed,
    TinyTask,
    assert_same_run,
    assert_same_tensors,
    copy_run,
    killed_at,
    read_checkpoint,
    stopped_at,
    train_tiny,
)

from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.images import DataConfig
from pipelines.processes.group import ProcessGroup
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_tokenizer import TrainTokenizerConfig
from pipelines.training.run_folder import check_run_folder, write_config
from pipelines.training.schedule import TrainConfig, learning_rate
from tokenizer.files import PathError, PipelineLoadError

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"log_every": 3, "evaluate_every": 4, "preview_every": 6, "save_every": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of eight steps."""
    with one_process():
        return train_tiny(tmp_path_factory.mktemp("finished") / "run", **EVERY)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return copy_run(finished, tmp_path / "run")


def refused(run: Path, *needles: str, error: type[Exception] | tuple[type[Exception], ...] = UserError, **more: Any):
    """Assert that a run does not start, names all `needles`, and leaves everything as it was."""
    before = contents(run) if run.is_dir() else run.read_bytes()
    with pytest.raises(error) as caught:
        train_tiny(run, **{**EVERY, **more})
    assert [needle for needle in needles if needle not in str(caught.value)] == [], caught.value
    assert before == (contents(run) if run.is_dir() else run.read_bytes())


# What is not this run's


@pytest.mark.parametrize(
    "name", ["notes.txt", "config.yaml", ".tmp-config.json-mine", "state/step-00000001/state.json"]
)
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    refused(tmp_path / "run", str(tmp_path / "run"), "out=")


def test_a_file_and_a_link_are_refused(tmp_path, run):
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", str(tmp_path / "file"), "a file")
    (tmp_path / "link").symlink_to(run)
    refused(tmp_path / "link", str(tmp_path / "link"), "a link")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a link"):
        train_tiny(tmp_path / "lost")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("text", ["", '{"out": [1', "[1]"])
def test_a_damaged_configuration_is_refused(run, text):
    (run / "config.json").write_text(text)
    refused(run, "config.json", error=PipelineLoadError)


def test_another_configuration_is_refused_with_what_differs(run):
    refused(run, "train.lr: 0.01 -> 0.02", "train.seed: 0 -> 5", "out=", lr=0.02, seed=5)
    refused(run, "train.betas", betas=(0.8, 0.9))


def test_the_other_stage_is_refused(run, tmp_path, tokens):
    before = contents(run)
    for train in (train_tokenizer, partial(train_prior, tokens=tokens)):
        with pytest.raises(UserError, match="another configuration"):
            train(run)
    assert contents(run) == before


def test_what_to_do_instead_is_named(tmp_path):
    """To begin with its weights, where they would fit; else from the start."""
    run = train_tokenizer(tmp_path / "run", train__steps=1)
    with pytest.raises(UserError, match=re.escape(f"init={run}/tokenizer")):
        train_tokenizer(run, train__steps=1, train__lr=1e-4)
    more = train_tokenizer(tmp_path / "more", train__steps=1, train__lr=1e-12, init=str(run / "tokenizer"))
    ours, theirs = (tensors(folder / "tokenizer") for folder in (more, run))
    assert all(ours[key].allclose(theirs[key], atol=1e-5) for key in theirs if "quantizer" not in key)
    for change in ({"model": {**VQVAE, "widths": [8]}}, {"data__image_size": 32}):
        with pytest.raises(UserError, match="another configuration") as caught:
            train_tokenizer(run, train__steps=1, **change)
        assert "init=" not in str(caught.value)


def test_a_snapshot_without_checkpoints_is_not_trained_over(tmp_path):
    """An empty folder of checkpoints is that of a run that was killed in its first save, which begins again."""
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


def test_a_folder_in_the_place_of_the_snapshot_is_refused(tmp_path):
    """Before an hour of training, not after it."""
    with killed_at(1):
        train_tokenizer(tmp_path / "run", train__steps=2)
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "thesis.txt").write_text("mine")
    with pytest.raises(PathError, match="tokenizer"):
        train_tokenizer(tmp_path / "run", train__steps=2)
    assert (tmp_path / "run" / "tokenizer" / "thesis.txt").read_text() == "mine"


def test_a_run_does_not_lie_in_what_it_reads(tmp_path):
    write_pictures(tmp_path / "images", 20)
    with pytest.raises(PipelineLoadError, match=re.escape(str(tmp_path / "images" / "run"))):
        train_tokenizer(tmp_path / "images" / "run", data__source=str(tmp_path / "images"))
    tokens = make_tokens(tmp_path / "tokens")
    with pytest.raises(PipelineLoadError, match=re.escape(str(tokens / "run"))):
        train_prior(tokens / "run", tokens)
    assert not (tmp_path / "images" / "run").exists() and not (tokens / "run").exists()


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    for settings, key in (({"steps": None}, "train.steps"), ({"accumulate": 3}, "train.batch_size")):
        with pytest.raises(UserError, match=f"^{key}"):
            train_tiny(tmp_path / "new" / "run", **settings)

    def broken() -> TinyTask:
        raise UserError("data.source: nowhere")

    with pytest.raises(UserError, match="nowhere"):
        train_tiny(tmp_path / "new" / "run", broken)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", range(4))
def test_a_run_that_is_lost_as_it_begins_begins_again(tmp_path, monkeypatch, call):
    """Whatever folder or file it was about to make there."""
    run, calls = tmp_path / "run", iter(range(100))

    def lost(path: Path, *rest: Any, real: Any, **more: Any) -> Any:
        if run in path.parents and next(calls) == call:
            raise Killed
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        for name in ("mkdir", "replace"):
            patch.setattr(Path, name, partialmethod(lost, real=getattr(Path, name)))
        with pytest.raises(Killed):
            train_tiny(run, steps=1)
    train_tiny(run, steps=1)
    assert states(run)


def test_a_new_run_may_have_the_folder_that_a_killed_one_had_only_begun(tmp_path):
    half = half_written(tmp_path / "run" / "config.json")
    half.write_text("{")
    train_tiny(tmp_path / "run", steps=1)
    assert not half.exists() and states(tmp_path / "run")


# The model that a run began with


def test_a_run_goes_on_with_the_model_it_began_with(tmp_path):
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


def test_processes_begin_with_one_model(tmp_path, monkeypatch):
    """Of the frozen copy, which each reads by itself, nothing is sent between them."""
    gather = ProcessGroup.gather

    def gather_another(group: ProcessGroup, act: Any) -> list[Any]:
        found = gather(group, act)
        return (
            [*found, {**found[0], "fingerprint": "b"}] if isinstance(found[0], dict) and "source" in found[0] else found
        )

    monkeypatch.setattr(ProcessGroup, "gather", gather_another)
    with pytest.raises(UserError, match="^init"):
        train_tiny(tmp_path / "run", lambda: TinyTask(init={"source": "there", "fingerprint": "a"}), init="there")


# Its end


def test_a_finished_run_does_nothing(run, finished, capsys):
    before = contents(run)
    train_tiny(run, **EVERY)  # `out` is another one now, and of no matter
    after = contents(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"config.json"} and json.loads((run / "config.json").read_text())["out"] == str(run)
    before = contents(run)
    train_tiny(run, **EVERY)
    assert contents(run) == before and set(before) == set(contents(finished))
    printed = capsys.readouterr().out
    assert printed.count("already finished: 8 steps") == 2 and "continuing" not in printed


def test_a_finished_run_goes_on_to_another_end(run, capsys):
    """What stands in the record stays; the old last step is looked at once; the new schedule holds from there."""
    before, pictures = metrics(run), contents(run / "previews")
    train_tiny(run, **EVERY, steps=14)
    assert "train.steps: 8 -> 14" in capsys.readouterr().out
    assert metrics(run)[: len(before)] == before
    assert [line["step"] for line in metrics(run) if "loss" in line] == [3, 6, 8, 9, 12, 14]
    assert [line["step"] for line in metrics(run) if "validation/error" in line] == [4, 8, 12, 14]
    assert [line["step"] for line in metrics(run) if "held_out/error" in line] == [8, 14]
    assert len(metrics(run)) == len({line["step"] for line in metrics(run)})
    assert contents(run / "previews").items() >= pictures.items()
    rates = {line["step"]: line["learning_rate"] for line in metrics(run) if "loss" in line}
    for total, steps in ((8, (3, 6, 8)), (14, (9, 12, 14))):
        config = TrainConfig(steps=total, lr=1e-2, warmup_steps=2)
        assert [rates[step] for step in steps] == pytest.approx([learning_rate(config, s, s / total) for s in steps])
    assert [path.name for path in states(run)] == ["step-00000012", "step-00000014"]
    after = contents(run)
    train_tiny(run, **EVERY, steps=14)
    assert contents(run) == after
    refused(run, "train.steps", steps=8)


@pytest.mark.parametrize(
    "end", [{"steps": 8, "minutes": 1e-9}, {"steps": 7}, {"steps": 1}, {"steps": 3, "minutes": 9.0}]
)
def test_an_end_that_is_not_ahead_is_refused(run, end):
    refused(run, "train.steps", str(run), **end)


def test_a_run_that_was_stopped_may_have_a_nearer_end(tmp_path):
    with stopped_at(4):
        train_tiny(tmp_path / "run", **EVERY)
    train_tiny(tmp_path / "run", **EVERY, steps=6)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [3, 6]


def test_a_run_without_a_checkpoint_begins_with_the_new_end(tmp_path, capsys):
    whole = train_tiny(tmp_path / "whole", steps=6)
    with killed_at(2):
        train_tiny(tmp_path / "run", steps=8)
    train_tiny(tmp_path / "run", steps=6)
    assert_same_run(tmp_path / "run", whole)
    assert "->" not in capsys.readouterr().out


def test_minutes_may_grow(tmp_path):
    run, minutes = tmp_path / "run", partial(train_tiny, tmp_path / "run", steps=None)
    minutes(minutes=0.002)
    done = metrics(run)[-1]
    minutes(minutes=done["minutes"] + 0.003)
    last = metrics(run)[-1]
    assert last["step"] > done["step"] and last["minutes"] >= done["minutes"] + 0.003
    with pytest.raises(UserError, match="train.minutes"):
        minutes(minutes=0.002)
    train_tiny(run, steps=last["step"] + 3)  # another kind of end
    assert [line["step"] for line in metrics(run)] == list(range(1, last["step"] + 4))


# What else may change


def test_another_rhythm_changes_no_weight(tmp_path, capsys):
    whole = train_tiny(tmp_path / "whole", **EVERY)
    with stopped_at(5):
        train_tiny(tmp_path / "run", **EVERY)
    other = {"log_every": 1, "evaluate_every": 3, "preview_every": 2, "save_every": 2, "timeout": 99.0}
    run = train_tiny(tmp_path / "run", **other)
    found, expected = (read_checkpoint(states(folder)[-1]) for folder in (run, whole))
    assert_same_tensors(
        {name: value for name, value in found.items() if not name.startswith("best.")},
        {name: value for name, value in expected.items() if not name.startswith("best.")},
    )
    assert [line["step"] for line in metrics(run) if "loss" in line] == [3, 6, 7, 8]
    assert capsys.readouterr().out.count("->") == len(other) - 1


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
FREE = {
    *(f"train.{name}" for name in ("steps", "minutes", "timeout", "checkpointing")),
    *(f"train.{name}_every" for name in ("log", "preview", "evaluate", "save")),
    "data.cache_mb",
    "track.name",
    "track.wandb",
    "track.trackers",
    "out",
}
CHANGES = {
    **{f"train.{name}": CHANGED.get(name) for name in TrainConfig.model_fields},
    **{f"data.{name}": DATA.get(name) for name in DataConfig.model_fields},
    "track.name": "another",
    "track.wandb": "offline",
    "track.trackers": [],
    "out": "elsewhere",
    "loss.l1": 0.7,
    "critic.weight": 0.5,
    "model.widths": [8],
    "augmented": False,
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_setting_is_free_or_refused_by_its_name(tmp_path, key):
    """A new one is refused, until somebody says that it makes no difference."""
    run = tmp_path / "run"
    run.mkdir()
    old, new = (
        parse(
            TrainTokenizerConfig,
            [*tokenizer_arguments(run), *arguments(more)],
            verb="train_tokenizer",
            description=None,
        )
        for more in ({}, {key: CHANGES[key]})
    )
    assert old.model_dump() != new.model_dump()
    write_config(run, old)
    if key in FREE:
        check_run_folder(run, new)
    else:
        with pytest.raises(UserError, match=rf"\n{re.escape(key)}\b.*->"):
            check_run_folder(run, new)


@pytest.mark.parametrize("key", ["tokens", "label_dropout", "sampler.top_k", "model.depth", "perturb", "objective"])
def test_no_setting_of_a_prior_may_change(tmp_path, key):
    run, values = tmp_path / "run", {"tokens": "other", "sampler.top_k": 3, "model.depth": 1, "objective": "likelihood"}
    run.mkdir()
    old, new = (
        parse(
            TrainPriorConfig,
            [*prior_arguments(run, tmp_path / "t"), *arguments(more)],
            verb="train_prior",
            description=None,
        )
        for more in ({}, {key: values.get(key, 0.3)})
    )
    write_config(run, old)
    with pytest.raises(UserError, match=rf"\n{key}\b.*->"):
        check_run_folder(run, new)


def test_a_configuration_is_also_a_file_for_a_run(tmp_path, capsys):
    """Also for one of a version that had fewer settings, whose defaults it then has."""
    run = train_tokenizer(tmp_path / "run", train__steps=1)
    argv = ["--config", str(run / "config.json")]
    config = parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description=None)
    assert config.model_dump(mode="json") == json.loads((run / "config.json").read_text())
    older = json.loads((run / "config.json").read_text())
    del older["train"]["keep_best"]
    (run / "config.json").write_text(json.dumps(older))
    train_tokenizer(run, train__steps=1)
    assert "keep_best" in (run / "config.json").read_text() and "already finished" in capsys.readouterr().out


# What a run says


def test_a_run_says_what_it_has_made_and_what_comes_next(tmp_path, tokens, capsys):
    """Also when there is nothing left to do; a name with a space can be copied to a shell."""
    one, two = tmp_path / "my run", tmp_path / "prior"
    for begin in ("done", "already finished"):
        train_tokenizer(one, train__steps=2)
        train_prior(two, tokens, train__steps=2)
        psnr, bits = metrics(one)[-1]["held_out/psnr"], metrics(two)[-1]["held_out/bits_per_token"]
        first, second = [line for line in capsys.readouterr().out.splitlines() if f": {begin}: 2 steps" in line]
        assert f"PSNR {psnr:.2f} dB" in first and f"smalti encode tokenizer='{one}/tokenizer'" in first
        assert f"{bits:.3f} bits per token" in second and f"smalti generate pipeline={two}/pipeline" in second
    bound = {"kind": "masked", "dim": 16, "depth": 1, "heads": 2, "exact": False}
    train_prior(tmp_path / "bound", tokens, model=bound, train__steps=1)
    assert re.search(r"at most \d\.\d{3} bits", capsys.readouterr().out)


def test_a_log_is_lines_and_a_terminal_has_a_bar(tmp_path, monkeypatch, capsys):
    """Which of the two is not for a notebook to guess: there lines come on stdout, as they are no errors."""
    train_tiny(tmp_path / "log", steps=4, log_every=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    losses = [line["loss"] for line in metrics(tmp_path / "log")]
    assert [line.partition(",")[0] for line in lines] == [
        f"step {step}: loss {loss:.4f}" for step, loss in zip((2, 4), losses, strict=True)
    ]
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", stream)
    train_tiny(tmp_path / "notebook", steps=2, log_every=2)
    assert "step 2: loss" in capsys.readouterr().out and not stream.getvalue().strip()
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr(sys, "stderr", terminal)
    train_tiny(tmp_path / "terminal", steps=None, minutes=0.005, log_every=1)
    shown = terminal.getvalue()
    assert "loss" in shown and "of 0.005 min left" in shown and "step 2: loss" not in shown


def test_lines_of_a_closed_terminal_do_not_end_a_run(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(sys, "stderr", Full())
    assert states(train_tiny(tmp_path / "run", steps=2))
