"""Checkpoints: whole or not there, two of them, and the newest that can be loaded is the one that is used."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
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
from launch import ROOT, metrics, states
from one_process import one_process
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_task import (
    Net,
    TinyTask,
    assert_same_run,
    assert_same_tensors,
    copy_run,
    killed_at,
    read_checkpoint,
    stopped_at,
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
    remove_leftovers,
    step_of,
    write_checkpoint,
)
from pipelines.training.trainer import Trainer
from tokenizer import Tokenizer
from tokenizer.files import PathError

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"save_every": 2, "evaluate_every": 2, "log_every": 3}
SCORES = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0, 9: 5.0, 10: 6.0}
Objects = tuple[torch.nn.Module, torch.nn.Module, dict[str, torch.optim.Optimizer]]


def make_objects(seed: int, steps: int = 0, late: bool = True) -> Objects:
    """A net, its average and its optimizer, after some steps."""
    torch.manual_seed(seed)
    net, average = Net(), Net()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(steps):
        net(torch.arange(8), late=late).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, average, {"model": optimizer}


def write(run: Path, step: int, objects: Objects, **record: Any) -> Path:
    """Write a checkpoint of these objects."""
    write_checkpoint(run, step, collect_tensors(*objects), record, None, main=True, sharded=False)
    return run / "state" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, whose best weights are those of the second; with the checkpoints 6 and 8."""
    with one_process():
        return train_tiny(tmp_path_factory.mktemp("finished") / "run", partial(TinyTask, scores=SCORES), **EVERY)


def go_on(run: Path, **more: Any) -> Path:
    """Start that run again."""
    return train_tiny(run, partial(TinyTask, scores=SCORES), **EVERY, **more)


# Writing and reading


@pytest.mark.parametrize("late", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, late):
    """Also for a layer that has had no gradient: nothing is made up for it. What was there before is gone."""
    one, other = make_objects(0, steps=3, late=late), make_objects(1, steps=1)
    folder = write(tmp_path, 3, one, minutes=0.5)
    assert load_newest(list_checkpoints(tmp_path), *other) == ({"format_version": 1, "step": 3, "minutes": 0.5}, None)
    assert_same_tensors(collect_tensors(*other), collect_tensors(*one))
    assert_same_tensors(read_checkpoint(folder), dict(sorted(collect_tensors(*one).items())))
    assert any("late" in name for name in collect_tensors(*other) if name.startswith("optimizer.")) == late
    for net, _, optimizers in (one, other):  # and it goes on in the same way
        torch.manual_seed(5)
        net(torch.arange(8)).square().mean().backward()
        optimizers["model"].step()
    assert_same_tensors(collect_tensors(*other), collect_tensors(*one))


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """Which is not that of their names once a step has nine digits; other names are not theirs."""
    for name in ("step-100000000", "step-99999999", "step-00000007", "step-7", ".tmp-step-00000008-01234567", "notes"):
        (tmp_path / "state" / name).mkdir(parents=True)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [7, 99999999, 100000000]
    assert list_checkpoints(tmp_path / "nowhere") == [] and read_newest_record(tmp_path / "nowhere") == {}


def test_the_two_newest_stay(tmp_path):
    objects = make_objects(0)
    for step in (1, 2, 3):
        write(tmp_path, step, objects)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 3]
    (tmp_path / "state" / "step-00000009").mkdir()  # later than what is written, so it could not be loaded
    write(tmp_path, 4, objects)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 4, 9]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [p.name for p in list_checkpoints(tmp_path)]


def test_a_checkpoint_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    """Whatever has been done so far, the newest can be loaded; so a process may be killed at any time."""
    write(tmp_path, 1, make_objects(1, 1))
    seen = []

    def look(*_: Any, **__: Any) -> None:
        target = make_objects(9)
        record, _ = load_newest(list_checkpoints(tmp_path), *target)
        expected = make_objects(record["made"], 1) if "made" in record else make_objects(1, 1)
        assert_same_tensors(collect_tensors(*target), collect_tensors(*expected))
        seen.append(record.get("made", 1))

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def before(*given: Any, **more: Any) -> Any:
            look()
            return call(*given, **more)

        return before

    writes = {2: [2], 3: [3, 4]}  # the last is written a second time, as when a run is stopped and goes on
    for owner, name in ((Path, "rename"), (checkpoint, "fsync"), (checkpoint.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    for step, numbers in writes.items():
        for made in numbers:
            write(tmp_path, step, make_objects(made, 1), made=made)
    look()
    assert set(seen) == {1, 2, 3, 4}


KILLED = """
    import os, random, signal, sys
    from pathlib import Path
    import torch
    from torch import nn
    torch.set_num_threads(1)
    from pipelines.training import checkpoint

    run, model = Path(sys.argv[1]), nn.Linear(64, 64)

    def save(step):
        with torch.no_grad():
            model.weight.fill_(step), model.bias.fill_(step)
        tensors = checkpoint.collect_tensors(model, model, {})
        checkpoint.write_checkpoint(run, step, tensors, {}, None, main=True, sharded=False)

    def killed(after):
        calls = iter(range(10**9))
        def traced(frame, event, argument):
            if event == "call" and next(calls) == after:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.settrace(traced)
        step = last
        while True:
            step += 1
            save(step)

    save(1)
    last, inside = 1, 0
    random.seed(0)
    for _ in range(25):
        pid = os.fork()
        if pid == 0:
            killed(random.randrange(1, 6000))
        os.waitpid(pid, 0)
        inside += any(path.name.startswith(".") for path in (run / "state").iterdir())
        record, _ = checkpoint.load_newest(checkpoint.list_checkpoints(run), model, model, {})
        assert record["step"] >= last and all((p == record["step"]).all() for p in model.parameters())
        last = record["step"]
        checkpoint.remove_leftovers(run)
        assert not [path for path in (run / "state").iterdir() if path.name.startswith(".")]
    assert inside > 5 and last > 1, (inside, last)
"""


def test_a_killed_process_leaves_a_checkpoint_that_loads(tmp_path):
    """At any line of what is called to save."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_killed_processes_left_is_deleted_and_nothing_else(tmp_path, finished):
    run = copy_run(finished, tmp_path / "run")
    ours = [".tmp-step-00000002-0123abcd", ".del-step-123456789-0123abcd"]
    others = [".tmp-step-0002-0123abcd", ".tmp-step-00000002-0123ABCD", ".tmp-notes", "notes", ".trash"]
    for name in [*ours, *others]:
        (run / "state" / name).mkdir()
        (run / "state" / name / "file").touch()
    go_on(run, steps=9)
    assert not [name for name in ours if (run / "state" / name).exists()]
    assert all((run / "state" / name / "file").exists() for name in others)
    remove_leftovers(tmp_path / "nowhere")


# A newest one that cannot be loaded


def largest(folder: Path) -> Path:
    return max((folder / "tensors").glob("*.distcp"), key=lambda path: path.stat().st_size)


def edit_record(folder: Path, **changes: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Write the tensors anew, some of them others (`model.net.head.bias` as `model__net__head__bias`)."""
    tensors = {name: value for name, value in read_checkpoint(folder).items() if not name.startswith("best.")}
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    whole = {name: value for name, value in tensors.items() if value is not None}
    shutil.rmtree(folder / "tensors")
    writer = checkpoint.dcp.FileSystemWriter(folder / "tensors")
    checkpoint.dcp.save(whole, storage_writer=writer, no_dist=True)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda state: os.truncate(largest(state), largest(state).stat().st_size // 2),
    "emptied": lambda state: os.truncate(largest(state), 0),
    "no tensors": lambda state: largest(state).unlink(),
    "no index": lambda state: (state / "tensors" / ".metadata").unlink(),
    "an emptied index": lambda state: os.truncate(state / "tensors" / ".metadata", 0),
    "no folder of tensors": lambda state: shutil.rmtree(state / "tensors"),
    "no record": lambda state: (state / "state.json").unlink(),
    "half a record": lambda state: os.truncate(state / "state.json", 30),
    "of another step": lambda state: edit_record(state, step=7),
    "of another version": lambda state: edit_record(state, format_version=2),
    "no best weights": lambda state: (state / "best.safetensors").unlink(),
    "other best weights": lambda state: save_file({"net.x": torch.zeros(2)}, state / "best.safetensors"),
    "a tensor too many": lambda state: replace_tensors(state, model__net__more=torch.zeros(3)),
    "a tensor too few": lambda state: replace_tensors(state, average__net__head__bias=None),
    "another shape": lambda state: replace_tensors(state, model__net__head__weight=torch.zeros(2, 32)),
    "moments of something else": lambda state: replace_tensors(
        state, **{"optimizer__critic/x/exp_avg": torch.zeros(2)}
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, finished, capsys, name):
    """With a warning that names it; what the run then makes is what it had made."""
    run = copy_run(finished, tmp_path / "run")
    DAMAGES[name](states(run)[-1])
    go_on(run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(warnings) == 1 and "step-00000008" in warnings[0]
    assert_same_run(run, finished)


def test_where_none_can_be_loaded_nothing_is_changed(tmp_path, finished, capsys):
    run = copy_run(finished, tmp_path / "run")
    for state in states(run):
        os.truncate(largest(state), 100)
    before = {name: data for name, data in contents(run).items()}
    with pytest.raises(UserError, match="none of its 2 checkpoints"):
        go_on(run, steps=20)
    assert contents(run) == before and capsys.readouterr().err.count("passed over") == 2


@pytest.mark.parametrize("what", ["checkpoints", "snapshot", "room"])
def test_a_run_that_is_refused_leaves_its_process_group(tmp_path, finished, monkeypatch, what):
    """One that still has it when the interpreter ends may abort."""
    run = copy_run(finished, tmp_path / "run")
    if what == "checkpoints":
        for state in states(run):
            (state / "state.json").unlink()
    elif what == "snapshot":
        (run / "tokenizer").mkdir()
        (run / "tokenizer" / "mine.txt").write_text("mine")
        monkeypatch.setattr(TinyTask, "snapshots", {"tokenizer": Tokenizer.folder_kind()})
    else:
        monkeypatch.setattr(Trainer, "require_room", Mock(side_effect=UserError("no room")))
    left = Mock()
    monkeypatch.setattr(Accelerator, "end_training", left)
    with pytest.raises((UserError, PathError)):
        go_on(run, steps=20)
    left.assert_called_once()


def test_all_processes_use_the_same_one(tmp_path):
    """One that could be loaded here and not elsewhere leaves nothing of itself."""
    one, two = make_objects(0, steps=1, late=False), make_objects(0, steps=2)
    write(tmp_path, 1, one)
    write(tmp_path, 2, two)
    answers, target = iter([False, True]), make_objects(5)
    record, _ = load_newest(list_checkpoints(tmp_path), *target, lambda mine: mine and next(answers))
    assert record["step"] == 1
    assert_same_tensors(collect_tensors(*target), collect_tensors(*one))


# What cannot be saved


@contextmanager
def small_files(size: int = 2000) -> Any:
    """Files cannot grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk is full whenever the checkpoints of these steps are written."""
    written = trainer.write_checkpoint

    def writing(run: Path, step: int, *rest: Any, **more: Any) -> None:
        if step not in steps:
            return written(run, step, *rest, **more)
        with small_files():
            return written(run, step, *rest, **more)

    monkeypatch.setattr(trainer, "write_checkpoint", writing)


def test_a_full_disk_costs_a_warning_and_what_was_saved_stays(tmp_path, finished, monkeypatch, capsys):
    full_at(monkeypatch, 4, 6)
    with killed_at(7):
        go_on(tmp_path / "run")
    errors = capsys.readouterr().err
    assert [step for step in (2, 4, 6) if f"not saved: step {step}:" in errors] == [4, 6]
    assert sorted(path.name for path in (tmp_path / "run" / "state").iterdir()) == ["step-00000002"]
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_last_checkpoint_that_is_not_saved_is_an_error(tmp_path, finished, monkeypatch):
    full_at(monkeypatch, 8)
    with pytest.raises(UserError, match="not saved: step 8"):
        go_on(tmp_path / "run")
    assert [step_of(path) for path in states(tmp_path / "run")] == [4, 6]
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_best_weights_on_a_full_disk_are_a_full_disk(tmp_path, monkeypatch, capsys):
    """For which safetensors has an error of its own."""

    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="not saved: step 8"):
        go_on(tmp_path / "run")
    assert not list((tmp_path / "run" / "state").iterdir()) and capsys.readouterr().err.count("not saved") == 4


def test_a_snapshot_that_is_not_saved_is_saved_by_the_same_command(tmp_path, finished, monkeypatch, capsys):
    save = TinyTask.save

    def full(task: TinyTask, model: Any, run: Path, facts: dict[str, Any], pictures: Any) -> None:
        if facts["steps"] in (4, 8):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(task, model, run, facts, pictures)

    monkeypatch.setattr(TinyTask, "save", full)
    with pytest.raises(UserError, match="not saved: step 8"):
        go_on(tmp_path / "run")
    errors = capsys.readouterr().err
    assert [step for step in (2, 4, 6, 8) if f"not saved: step {step}:" in errors] == [4, 8]
    assert states(tmp_path / "run")[-1].name == "step-00000008"
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_run_that_is_stopped_after_a_full_disk_is_saved(tmp_path, monkeypatch, capsys):
    """What could not be saved before is no matter then, whatever else is due at that step."""
    full_at(monkeypatch, 4)
    with stopped_at(6):
        go_on(tmp_path / "run")
    printed = capsys.readouterr()
    assert "not saved: step 4" in printed.err and "stopped at step 6" in printed.out
    assert states(tmp_path / "run")[-1].name == "step-00000006"


@pytest.mark.parametrize("where", ["weight", "average", "moment"])
def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch, capsys, where):
    """The run goes on; only if it ends so is that an error."""
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
    run = go_on(tmp_path / "run")
    assert [step_of(path) for path in states(run)] == [6, 8] and metrics(run)[-1]["step"] == 8
    assert capsys.readouterr().err.count("not saved: step 4") == 1
    steps = {8, 10}
    with pytest.raises(UserError, match="not saved: step 10"):
        go_on(run, steps=10)
    assert [step_of(path) for path in states(run)] == [6, 8]


def test_a_bug_in_the_thread_that_writes_ends_the_run(tmp_path, monkeypatch):
    def wrong(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checkpoint, "write_json", wrong)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        go_on(tmp_path / "run")
    assert not list((tmp_path / "run" / "state").iterdir())


def test_training_goes_on_while_a_copy_is_written(tmp_path, finished, monkeypatch):
    """What is written is of the step at which it was saved, and one is written at a time."""
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
    run = go_on(tmp_path / "run")
    assert done == [(2, 4), (4, 6), (6, 8), (8, 8)]
    assert_same_run(run, finished)
    for state in states(run):
        found = {name: value for name, value in read_checkpoint(state).items() if name.startswith("model.")}
        assert_same_tensors(found, weights[step_of(state)])


def test_a_run_that_fails_waits_for_what_is_being_written(tmp_path, monkeypatch):
    write_checkpoint = trainer.write_checkpoint

    def slow(*given: Any, **more: Any) -> None:
        time.sleep(0.2)
        write_checkpoint(*given, **more)

    monkeypatch.setattr(trainer, "write_checkpoint", slow)
    with killed_at(5):
        go_on(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "state").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_disk_too_small_is_told_before_training(tmp_path, monkeypatch):
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


def test_best_weights_are_in_the_checkpoint(finished):
    best = load_file(states(finished)[-1] / "best.safetensors")
    assert_same_tensors(best, load_file(finished / "net.safetensors"))
