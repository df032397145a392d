"""Nothing begins at zero over good work, no run goes on from a state of another, and a folder has one run at a time.

Covers: pipelines/training/checkpoints/counters.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from launch import (
    assert_equal_tensors,
    exact,
    make_tokens,
    metrics,
    output_of,
    start,
    states,
    tensors,
    tokenizer_arguments,
    train_prior,
    train_tokenizer,
    two_processes,
)
from one_process import begin_anew, one_process

import tokenizer.files
from pipelines.config import UserError
from pipelines.files import lock_folder
from pipelines.training.checkpoints import rotation
from pipelines.training.checkpoints.rotation import latest_state
from tokenizer.files import PipelineLoadError, UnreadableError, write_manifest

pytestmark = pytest.mark.usefixtures("one_process")


EVERY = {"train__steps": 8, "train__save_every": 4, "train__log_every": 4, "train__evaluate_every": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with the states 4 and 8."""
    with one_process():
        run = train_tokenizer(tmp_path_factory.mktemp("trained") / "run", **EVERY)
    assert [state.name for state in states(run)] == ["step-00000004", "step-00000008"]
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, but for its configuration, in which the place of a copied run is another."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.yaml"]
    return {str(path): path.read_bytes() for path in found}


def refused(run: Path, *needles: str, error: type[Exception] = UserError, **more: Any) -> bool:
    """Whether the run does not start, says why with all `needles`, and leaves everything as it was."""
    before = files(run)
    with pytest.raises((error, PipelineLoadError)) as caught:
        train_tokenizer(run, **{**EVERY, **more})
    assert all(needle in str(caught.value) for needle in needles), str(caught.value)
    return files(run) == before


def flip(path: Path) -> None:
    """Damage one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def folder_in_place_of(path: Path) -> None:
    """A folder where a file was."""
    path.unlink()
    path.mkdir()


# Never from zero over good work


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: flip(s / "model.safetensors"),
        lambda s: (s / "manifest.json").unlink(),
        lambda s: folder_in_place_of(s / "ema.safetensors"),
    ],
    ids=["flipped", "no manifest", "a folder"],
)
def test_states_of_which_none_is_whole_are_not_trained_over(run, damage):
    for state in states(run):
        damage(state)
    assert refused(run, str(run), "none of its 2 states is whole", "choose another out=")


def test_a_damaged_state_is_still_passed_over_for_the_one_before(run, capsys):
    flip(states(run)[-1] / "model.safetensors")
    train_tokenizer(run, **EVERY)
    assert "step-00000008 is passed over" in capsys.readouterr().err
    assert latest_state(run) == states(run)[-1] and states(run)[-1].name == "step-00000008"


@pytest.mark.parametrize("where", ["manifest", "stat", "read"])
def test_an_error_of_the_disk_is_not_damage(run, monkeypatch, where):
    """Whether it comes up when the newest state is opened, looked at or read: it may be a good one."""
    newest, before = str(states(run)[-1]), files(run)

    def broken(function: Any) -> Any:
        def refusing(path: Any, *rest: Any, **more: Any) -> Any:
            if str(path).startswith(newest) and (where != "stat" or str(path).endswith("model.safetensors")):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(path, *rest, **more)

        return refusing

    def unreadable(path: Path, hash_file: Any = tokenizer.files.hash_file) -> str:
        if str(path).startswith(newest):
            raise UnreadableError(f"{path}: cannot be read (Input/output error)")
        return hash_file(path)

    if where == "manifest":
        monkeypatch.setattr(rotation, "verify_manifest", broken(rotation.verify_manifest))
    elif where == "stat":
        monkeypatch.setattr(tokenizer.files.os, "stat", broken(os.stat))
    else:
        monkeypatch.setattr(tokenizer.files, "hash_file", unreadable)
    with pytest.raises(UnreadableError, match=r"step-00000008: cannot be read.*Input/output error"):
        latest_state(run)
    with pytest.raises((UserError, PipelineLoadError), match="cannot be read"):
        train_tokenizer(run, **EVERY)
    monkeypatch.undo()
    assert files(run) == before


def test_a_snapshot_without_the_states_that_led_to_it_is_not_trained_over(run):
    shutil.rmtree(run / "state")
    assert refused(run, "tokenizer/", "no state to continue from")


def test_a_run_killed_at_its_first_save_begins_again(run, tmp_path):
    """Its snapshot is there and its state is not yet: its `state` folder, which is empty, tells."""
    for state in states(run):
        shutil.rmtree(state)
    train_tokenizer(run, **EVERY)
    assert_equal_tensors(
        tensors(run / "tokenizer"), tensors(train_tokenizer(tmp_path / "whole", **EVERY) / "tokenizer")
    )


# A state of another run, or none


def edit(state: Path, **changes: Any) -> None:
    """Change what a state says, and seal it again."""
    document = json.loads((state / "state.json").read_text())
    for name, value in changes.items():
        (document["counters"] if name in document["counters"] or name == "strange" else document)[name] = value
    (state / "state.json").write_text(json.dumps(document))
    manifest = json.loads((state / "manifest.json").read_text())
    (state / "manifest.json").unlink()
    write_manifest(state, step=changes.get("step", manifest["step"]))


def test_a_state_of_another_run_is_refused(run, tmp_path):
    other = train_tokenizer(tmp_path / "other", **EVERY, train__seed=1)
    shutil.rmtree(states(run)[-1])
    shutil.copytree(states(other)[-1], run / "state" / "step-00000008")
    assert refused(run, "another configuration", "train.seed: 1 -> 0")


FORGED = [
    ({"step": True}, "step"),
    ({"step": 7}, "step"),
    ({"step": 10**12}, "another name"),
    ({"step": -8}, "step"),
    ({"format_version": 99}, "format_version"),
    ({"format_version": "2"}, "format_version"),
    ({"minutes": -5}, "minutes"),
    ({"minutes": "x"}, "minutes"),
    ({"skipped": None}, "skipped"),
    ({"skipped_in_a_row": True}, "skipped_in_a_row"),
    ({"evaluation": [1]}, "evaluation"),
    ({"window": {"loss": [1.0]}}, "window"),
    ({"pending": ["sing"]}, "pending"),
    ({"pending": 5}, "pending"),
    ({"strange": 1}, "'strange' is not known to this version"),
    ({"reported": ["psnr"]}, "reported"),
    ({"best": 3}, "best"),
    ({"best": {"step": 3, "score": None, "evaluation": {}}}, "best"),
    ({"best": {}}, "best.safetensors: unexpected"),
]
AT_ONCE = (0, 4, 6, 14, 17, 18)
"""Which of them are tried every time; the others are among the slow tests."""


@pytest.mark.parametrize(
    ("changes", "needle"),
    [pytest.param(*case, marks=() if k in AT_ONCE else pytest.mark.slow) for k, case in enumerate(FORGED)],
)
def test_a_state_that_says_what_cannot_be_is_refused(run, changes, needle):
    edit(states(run)[-1], **changes)
    assert refused(run, "step-", needle, error=PipelineLoadError)


def test_a_state_under_the_name_of_another_step_is_refused(run):
    states(run)[-1].rename(run / "state" / "step-00000099")
    assert refused(run, "step-00000099", "of step 8")


# One run at a time


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(run, monkeypatch):
    """Before any data is read; then the folder is free again."""
    with lock_folder(run):
        before = files(run)
        monkeypatch.setattr("launch.DIGITS", lambda: pytest.fail("data was read"))
        with pytest.raises(UserError, match=rf"^{run}: process {os.getpid()} on "):
            train_tokenizer(run, **EVERY)
        assert files(run) == before
        monkeypatch.undo()
    assert not (run / ".lock").exists()
    train_tokenizer(run, **EVERY)
    assert not (run / ".lock").exists()


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train_tokenizer(tmp_path / "new" / "run", **EVERY, data__source=str(tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_launched_processes_are_refused_together(run):
    with lock_folder(run):
        job = start(two_processes("train_tokenizer", tokenizer_arguments(run, **EVERY)))
        printed = output_of(job, 240, code=1)
    assert printed.count(f"process {os.getpid()} on ") == 1 and len(metrics(run)) == 2
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", printed), printed


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_of_two_commands_at_once_writes_each_step_once(tmp_path):
    """The other one says who is there; what is written is what one alone writes."""
    argv = tokenizer_arguments(tmp_path / "run", **{**EVERY, "train__steps": 40})
    command = [os.sys.executable, "-m", "pipelines.train_tokenizer", *argv]
    jobs = [start(command), start(command)]
    printed = [job.communicate(timeout=90)[0] for job in jobs]
    assert sorted(job.returncode for job in jobs) in ([0, 2], [0, 0])  # the second may find a finished run
    if 2 in [job.returncode for job in jobs]:
        assert f"{tmp_path / 'run'}: process " in "".join(printed)
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    begin_anew()
    alone = train_tokenizer(tmp_path / "alone", **{**EVERY, "train__steps": 40})
    assert exact(tmp_path / "run") == exact(alone)


def leave_lock(run: Path) -> None:
    """As a process did that is gone."""
    with lock_folder(run):
        whole = (run / ".lock").read_text()
    (run / ".lock").write_text(re.sub(r"start=\d+", "start=1", whole))
    (run / f".lock.break.1.{'a' * 32}").write_text(whole)


def test_a_lock_that_a_killed_process_left_is_nobodys(run):
    leave_lock(run)
    train_tokenizer(run, **EVERY)
    assert not (run / ".lock").exists()


def test_a_new_run_may_have_the_folder_that_a_killed_one_had_only_locked(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    leave_lock(run)
    train_tokenizer(run, train__steps=1)
    assert not (run / ".lock").exists()


def test_a_new_run_may_have_the_folder_that_a_killed_one_had_only_begun(tmp_path):
    """A configuration that is half written is nobody's; what only looks like one is somebody's."""
    run, half = tmp_path / "run", tmp_path / "run" / ".tmp-config.yaml-94ed41e8"
    run.mkdir()
    half.write_text("train:")
    train_tokenizer(run, train__steps=2)
    assert not half.exists() and (run / "tokenizer").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".tmp-config.yaml-mine").write_text("train:")
    with pytest.raises(UserError, match="not empty"):
        train_tokenizer(tmp_path / "other", train__steps=2)
    assert (tmp_path / "other" / ".tmp-config.yaml-mine").exists()


# Where a run may lie


def test_a_run_does_not_lie_in_its_data(tmp_path):
    """Its previews would be images to train on."""
    from PIL import Image

    for number in range(20):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (28, 28), number).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(PipelineLoadError, match="lies in what is read"):
        train_tokenizer(tmp_path / "images" / "run", data__source=str(tmp_path / "images"))
    tokens = make_tokens(tmp_path / "tokens")
    with pytest.raises(PipelineLoadError, match="lies in what is read"):
        train_prior(tokens / "run", tokens)
