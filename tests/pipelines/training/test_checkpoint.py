"""Checkpoints: written atomically, the two newest kept, and the newest usable one loaded."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from folders import contents
from launch import metrics, states
from one_process import one_process
from safetensors.torch import save_file
from tiny_task import (
    Net,
    TinyTask,
    assert_same_run,
    assert_same_tensors,
    copy_run,
    read_checkpoint,
    train_tiny,
    trainer_of,
)

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


def test_checkpoints_are_ordered_by_step_and_other_names_ignored(tmp_path):
    for name in ("step-100000000", "step-99999999", "step-00000007", "step-7", ".tmp-step-00000008-01234567", "notes"):
        (tmp_path / "state" / name).mkdir(parents=True)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [7, 99999999, 100000000]
    assert list_checkpoints(tmp_path / "nowhere") == [] and read_newest_record(tmp_path / "nowhere") == {}


def test_the_two_newest_are_kept(tmp_path):
    objects = make_objects(0)
    for step in (1, 2, 3):
        write(tmp_path, step, objects)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 3]
    (tmp_path / "state" / "step-00000009").mkdir()  # later than the one written, so it was unusable
    write(tmp_path, 4, objects)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 4, 9]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [p.name for p in list_checkpoints(tmp_path)]


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

    writes = {2: [2], 3: [3, 4]}  # a step may be written twice
    for owner, name in ((Path, "rename"), (checkpoint, "fsync"), (checkpoint.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    for step, numbers in writes.items():
        for made in numbers:
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


def add_tensor(folder: Path) -> None:
    """Write the tensors again, with one that the model does not have."""
    tensors = {name: value for name, value in read_checkpoint(folder).items() if not name.startswith("best.")}
    shutil.rmtree(folder / "tensors")
    writer = checkpoint.dcp.FileSystemWriter(folder / "tensors")
    checkpoint.dcp.save({**tensors, "model.net.more": torch.zeros(3)}, storage_writer=writer, no_dist=True)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated tensors": lambda state: os.truncate(largest(state), largest(state).stat().st_size // 2),
    "no tensors": lambda state: largest(state).unlink(),
    "an empty index": lambda state: os.truncate(state / "tensors" / ".metadata", 0),
    "an unexpected tensor": add_tensor,
    "no record": lambda state: (state / "state.json").unlink(),
    "half a record": lambda state: os.truncate(state / "state.json", 30),
    "another step": lambda state: edit_record(state, step=7),
    "another version": lambda state: edit_record(state, format_version=2),
    "no best weights": lambda state: (state / "best.safetensors").unlink(),
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


@contextmanager
def small_files(size: int = 2000) -> Any:
    """Limit the size of files, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the disk be full whenever the checkpoints of these steps are written."""
    written = trainer.write_checkpoint

    def writing(run: Path, step: int, *rest: Any, **more: Any) -> None:
        if step not in steps:
            return written(run, step, *rest, **more)
        with small_files():
            return written(run, step, *rest, **more)

    monkeypatch.setattr(trainer, "write_checkpoint", writing)


def test_a_full_disk_is_a_warning_and_at_the_end_an_error(tmp_path, finished, monkeypatch, capsys):
    """Older checkpoints are kept, and the same command completes the run."""
    full_at(monkeypatch, 4, 6, 8)
    with pytest.raises(UserError, match="step 8"):
        train(tmp_path / "run")
    errors = capsys.readouterr().err
    assert [step for step in (2, 4, 6, 8) if f"not saved: step {step}:" in errors] == [4, 6, 8]
    assert sorted(path.name for path in (tmp_path / "run" / "state").iterdir()) == ["step-00000002"]
    monkeypatch.undo()
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_snapshot_that_could_not_be_saved_is_saved_by_the_same_command(tmp_path, finished, monkeypatch, capsys):
    save = TinyTask.save

    def full(task: TinyTask, model: Any, run: Path, facts: dict[str, Any], pictures: Any) -> None:
        if facts["steps"] in (4, 8):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(task, model, run, facts, pictures)

    monkeypatch.setattr(TinyTask, "save", full)
    with pytest.raises(UserError, match="not saved: step 8"):
        train(tmp_path / "run")
    errors = capsys.readouterr().err
    assert [step for step in (2, 4, 6, 8) if f"not saved: step {step}:" in errors] == [4, 8]
    assert states(tmp_path / "run")[-1].name == "step-00000008"
    monkeypatch.undo()
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("where", ["weight", "average", "moment"])
def test_non_finite_state_is_not_saved(tmp_path, monkeypatch, capsys, where):
    """It is an error only at the end of the run."""
    save = trainer.Trainer.save_checkpoint

    def spoil(run: Any, value: float) -> None:
        moments = next(iter(run.optimizers["model"].state.values()))
        target = {"weight": run.task.model.net.table.weight, "average": run.average.net.table.weight}
        with torch.no_grad():
            target.get(where, moments["exp_avg"]).view(-1)[0] = value

    def spoilt(run: Any) -> None:
        if run.step in steps:
            spoil(run, float("nan"))
        save(run)
        if run.step in steps:
            spoil(run, 0.0)

    monkeypatch.setattr(trainer.Trainer, "save_checkpoint", spoilt)
    steps = {4}
    run = train(tmp_path / "run")
    assert [step_of(path) for path in states(run)] == [6, 8] and metrics(run)[-1]["step"] == 8
    assert capsys.readouterr().err.count("not saved: step 4") == 1
    steps = {8, 10}
    with pytest.raises(UserError, match="not saved: step 10"):
        train(run, steps=10)
    assert [step_of(path) for path in states(run)] == [6, 8]


def test_training_continues_while_a_copy_is_written(tmp_path, finished, monkeypatch):
    """Copies are of the step at which they were saved, and written one at a time."""
    moved, taken, done = threading.Condition(), [0], []
    weights: dict[int, dict[str, torch.Tensor]] = {}
    write_slowly, take_step = trainer.write_checkpoint, trainer.Trainer.take_step

    def writing(run: Path, step: int, *rest: Any, **more: Any) -> None:
        with moved:
            assert moved.wait_for(lambda: taken[-1] >= min(8, step + 2), timeout=60)
        write_slowly(run, step, *rest, **more)
        done.append((step, taken[-1]))

    def stepping(run: Any, *given: Any) -> None:
        take_step(run, *given)
        weights[run.step] = {f"model.{name}": value.clone() for name, value in run.task.model.state_dict().items()}
        with moved:
            taken.append(run.step)
            moved.notify_all()

    monkeypatch.setattr(trainer, "write_checkpoint", writing)
    monkeypatch.setattr(trainer.Trainer, "take_step", stepping)
    run = train(tmp_path / "run")
    assert done == [(2, 4), (4, 6), (6, 8), (8, 8)]
    assert_same_run(run, finished)
    for state in states(run):
        found = {name: value for name, value in read_checkpoint(state).items() if name.startswith("model.")}
        assert_same_tensors(found, weights[step_of(state)])


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with trainer_of(tmp_path / "a") as made:
        weights = sum(value.nbytes for value in made.task.model.state_dict().values())
        moments = 2 * sum(parameter.nbytes for parameter in made.task.model.parameters())
    need = int(1.2 * (4 * weights + moments))
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            train_tiny(tmp_path / "b", steps=1)
        else:
            with pytest.raises(UserError, match=f"{need:,} bytes"):
                train_tiny(tmp_path / "c", steps=1)
