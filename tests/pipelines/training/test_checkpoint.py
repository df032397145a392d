"""Checkpoints: written atomically, the two newest kept, and the newest usable one loaded."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from folders import contents
from launch import states
from one_process import one_process
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_task import Net, TinyTask, assert_same_run, assert_same_tensors, copy_run, read_checkpoint, train_tiny

from pipelines.config import UserError
from pipelines.training import checkpoint, trainer
from pipelines.training.checkpoint import (
    collect_tensors,
    list_checkpoints,
    load_newest,
    read_newest_record,
    step_of,
    write_checkpoint,
)

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"save_every": 2, "evaluate_every": 2, "log_every": 3}
SCORES = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0, 9: 5.0, 10: 6.0}
Objects = tuple[torch.nn.Module, torch.nn.Module, dict[str, torch.optim.Optimizer]]


def make_objects(seed: int, steps: int = 0, late: bool = True) -> Objects:
    """Make a net, its average and its optimizer, after some steps."""
    torch.manual_seed(seed)
    net, average = Net(), Net()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(steps):
        net(torch.arange(8), late=late).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, average, {"model": optimizer}


def write(run: Path, step: int, objects: Objects, **record: Any) -> Path:
    """Write a checkpoint of these objects, and return its folder."""
    write_checkpoint(run, step, collect_tensors(*objects), record, None, main=True, sharded=False)
    return run / "state" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with the checkpoints 6 and 8, whose best weights are those of step 2."""
    with one_process():
        return train_tiny(tmp_path_factory.mktemp("finished") / "run", partial(TinyTask, scores=SCORES), **EVERY)


def train(run: Path, **more: Any) -> Path:
    """Train as the finished run, or continue it."""
    return train_tiny(run, partial(TinyTask, scores=SCORES), **EVERY, **more)


# Writing and reading


def test_the_two_newest_checkpoints_are_kept_and_other_names_ignored(tmp_path):
    assert list_checkpoints(tmp_path / "nowhere") == [] and read_newest_record(tmp_path / "nowhere") == {}
    for name in ("step-7", ".tmp-step-00000008-01234567", "notes"):
        (tmp_path / "state" / name).mkdir(parents=True)
    for step in (99_999_998, 99_999_999, 100_000_000):
        write(tmp_path, step, make_objects(0))
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]


def test_the_newest_checkpoint_is_usable_at_every_moment_of_a_save(tmp_path, monkeypatch):
    """A process may be killed before each rename, sync and deletion."""
    write(tmp_path, 1, make_objects(1, 1))
    seen = []

    def load() -> None:
        target = make_objects(9)
        record, _ = load_newest(list_checkpoints(tmp_path), *target)
        expected = make_objects(record["made"], 1) if "made" in record else make_objects(1, 1)
        assert_same_tensors(collect_tensors(*target), collect_tensors(*expected))
        seen.append(record.get("made", 1))

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def before(*given: Any, **more: Any) -> Any:
            load()
            return call(*given, **more)

        return before

    for owner, name in ((Path, "rename"), (checkpoint, "fsync"), (checkpoint.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    for step, made in ((2, 2), (3, 3), (3, 4)):  # a step may be written twice
        write(tmp_path, step, make_objects(made, 1), made=made)
    load()
    assert set(seen) == {1, 2, 3, 4}


# Damage


def largest(folder: Path) -> Path:
    """The file with the tensors."""
    return max((folder / "tensors").glob("*.distcp"), key=lambda path: path.stat().st_size)


def edit_record(folder: Path, **changes: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated tensors": lambda state: os.truncate(largest(state), largest(state).stat().st_size // 2),
    "half a record": lambda state: os.truncate(state / "state.json", 30),
    "another version": lambda state: edit_record(state, format_version=2),
    "other best weights": lambda state: save_file({"net.x": torch.zeros(2)}, state / "best.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, finished, capsys, name):
    """The run continues from the one before, to the same bits."""
    run = copy_run(finished, tmp_path / "run")
    DAMAGES[name](states(run)[-1])
    train(run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "is skipped" in line]
    assert len(warnings) == 1 and "step-00000008" in warnings[0]
    assert_same_run(run, finished)


def test_a_run_without_a_usable_checkpoint_is_refused_and_unchanged(tmp_path, finished, monkeypatch, capsys):
    """The refused process leaves its process group; otherwise it may abort at exit."""
    monkeypatch.setattr(Accelerator, "end_training", left := Mock())
    run = copy_run(finished, tmp_path / "run")
    for state in states(run):
        os.truncate(largest(state), 100)
    before = contents(run)
    with pytest.raises(UserError, match="none of its 2 checkpoints"):
        train(run, steps=20)
    assert contents(run) == before and capsys.readouterr().err.count("is skipped") == 2
    left.assert_called_once()


def test_all_processes_load_the_same_checkpoint(tmp_path):
    """Nothing remains of one that another process could not load."""
    one, two = make_objects(0, steps=1, late=False), make_objects(0, steps=2)
    write(tmp_path, 1, one)
    write(tmp_path, 2, two)
    answers, target = iter([False, True]), make_objects(5)
    record, _ = load_newest(list_checkpoints(tmp_path), *target, lambda mine: mine and next(answers))
    assert record["step"] == 1
    assert_same_tensors(collect_tensors(*target), collect_tensors(*one))


# Failing saves


def unsaved_steps(capsys: pytest.CaptureFixture[str]) -> list[int]:
    """The steps that warnings name, each once: a checkpoint and a snapshot of one step may both fail."""
    found = re.findall(r"^warning: not saved: step (\d+):", capsys.readouterr().err, re.MULTILINE)
    return sorted({int(step) for step in found})


def test_a_full_disk_is_a_warning_and_at_the_end_an_error(tmp_path, finished, monkeypatch, capsys):
    """Older checkpoints are kept, and the same command completes the run."""
    written, limits = trainer.write_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_on_full_disk(run: Path, step: int, *rest: Any, **more: Any) -> None:
        if step > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            written(run, step, *rest, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(trainer, "write_checkpoint", write_on_full_disk)
    with pytest.raises(UserError, match="step 8"):
        train(tmp_path / "run")
    assert unsaved_steps(capsys) == [4, 6, 8]
    assert sorted(path.name for path in (tmp_path / "run" / "state").iterdir()) == ["step-00000002"]
    monkeypatch.undo()
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_snapshot_that_could_not_be_saved_is_saved_by_the_same_command(tmp_path, finished, monkeypatch, capsys):
    """safetensors raises its own error for a full disk."""
    save, errors = TinyTask.save, {4: OSError(errno.ENOSPC, "full"), 8: SafetensorError("No space left on device")}

    def save_on_full_disk(task: TinyTask, model: Any, run: Path, facts: dict[str, Any], pictures: Any) -> None:
        if facts["steps"] in errors:
            raise errors[facts["steps"]]
        save(task, model, run, facts, pictures)

    monkeypatch.setattr(TinyTask, "save", save_on_full_disk)
    with pytest.raises(UserError, match="not saved: step 8"):
        train(tmp_path / "run")
    assert unsaved_steps(capsys) == [4, 8]
    assert states(tmp_path / "run")[-1].name == "step-00000008"
    monkeypatch.undo()
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_non_finite_state_is_not_saved(tmp_path, monkeypatch, capsys):
    """It is an error only at the end of the run."""
    save, bad_steps = trainer.Trainer.save_checkpoint, {4, 10}

    def save_spoiled(run: trainer.Trainer) -> None:
        momentum = run.optimizers["model"].state[run.task.model.net.table.weight]["exp_avg"]
        before = momentum.clone()
        momentum += math.nan if run.step in bad_steps else 0
        save(run)
        momentum.copy_(before)

    monkeypatch.setattr(trainer.Trainer, "save_checkpoint", save_spoiled)
    run = train(tmp_path / "run")
    assert [step_of(path) for path in states(run)] == [6, 8] and unsaved_steps(capsys) == [4]
    with pytest.raises(UserError, match="not saved: step 10"):
        train(run, steps=10)
    assert [step_of(path) for path in states(run)] == [6, 8]


def test_training_continues_while_a_copy_is_written(tmp_path, finished, monkeypatch):
    """Each copy is of the step at which it was saved; one is written at a time."""
    progress, written, weights = threading.Condition(), [], dict[int, dict[str, torch.Tensor]]()
    write, take_step = trainer.write_checkpoint, trainer.Trainer.take_step

    def write_slowly(run: Path, step: int, *rest: Any, **more: Any) -> None:
        with progress:
            assert progress.wait_for(lambda: min(8, step + 2) in weights, timeout=60)
        write(run, step, *rest, **more)
        written.append((step, max(weights)))

    def watched(run: Any, *given: Any) -> None:
        take_step(run, *given)
        with progress:
            weights[run.step] = {f"model.{key}": value.clone() for key, value in run.task.model.state_dict().items()}
            progress.notify_all()

    monkeypatch.setattr(trainer, "write_checkpoint", write_slowly)
    monkeypatch.setattr(trainer.Trainer, "take_step", watched)
    run = train(tmp_path / "run")
    assert written == [(2, 4), (4, 6), (6, 8), (8, 8)]
    assert_same_run(run, finished)
    for state in states(run):
        found = {name: value for name, value in read_checkpoint(state).items() if name.startswith("model.")}
        assert_same_tensors(found, weights[step_of(state)])


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match="only 10,000 are free"):
        train_tiny(tmp_path / "run", steps=1)
