"""Killed or stopped, and started again, a run ends where it would have ended: every logged figure, all its bits. When a
process is lost, or a disk fills up, the job says so, ends in time, and goes on from where it was."""

from __future__ import annotations

import signal
from contextlib import suppress

import psutil
import pytest
from failures.mishaps import can_mount
from launch import (
    faults,
    metrics,
    one_launched,
    output_of,
    start,
    states,
    tokenizer_arguments,
    two_processes,
    wait_for,
)

CELLS = 4  # which have every fault, phase and rank


def broken(rows: list[dict]) -> list[str]:
    """What was not as promised, in all cases."""
    return [f"{row['case']}: {text}" for row in rows for text in row["broken"]]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """One kill of each kind in runs of 24 steps; two processes without a launcher; a full disk. All by one command, as
    it takes longer to start than to try any of it."""
    disks = {"disks": 2} if can_mount() else {}
    folder = tmp_path_factory.mktemp("faults")
    return faults(folder, kills=1, saves=1, steps=24, matrix=CELLS, launched="false", **disks)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["kills", "saves"])
def test_interrupted_equals_uninterrupted(found, what):
    """kill -9 at any moment, or within a save, after which a state always verifies. (SIGTERM and Ctrl-C, which save and
    end, are in test_stopping.py.)"""
    assert all(row["tried"] and row["runs compared"] for row in found[what])
    assert not broken(found[what])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", range(CELLS))
def test_a_lost_process_is_named_by_those_left(found, place):
    """Killed, raising, ending early or frozen: within seconds, with rank, step, phase and cause as the last line."""
    cell = found["matrix"][place]
    assert not cell["broken"] and cell["exit code"] == 1


@pytest.mark.timeout(300)
def test_the_cells_are_of_every_fault_phase_and_rank(found):
    for column, values in {"fault": 4, "while": 3, "on rank": 2}.items():
        assert len({cell[column] for cell in found["matrix"]}) == values


@pytest.mark.timeout(300)
@pytest.mark.skipif(not can_mount(), reason="no file system of a given size can be mounted here")
def test_a_full_disk_costs_lines_and_at_most_the_end_of_the_run(found):
    """The last good state is whole; with room again the run, or else the same command, ends as if nothing had been."""
    rows = found["disks"]
    assert sum(row["tried"] for row in rows) == 2 and sum(row["ended with 0"] for row in rows) == 1
    assert not [text for row in rows for text in row["broken"]]


@pytest.mark.timeout(120)
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher_saves_and_ends(tmp_path, processes):
    """It passes it on to two processes, and only dies where there is one."""
    run = tmp_path / "run"
    argv = tokenizer_arguments(run, train__steps=20000, train__log_every=1)
    job = start(one_launched("train_tokenizer", argv) if processes == 1 else two_processes("train_tokenizer", argv))
    workers = []
    try:
        assert wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 5, job)
        workers = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGTERM)
        printed = output_of(job, 30, code=None)
        psutil.wait_procs(workers, timeout=5)
        assert len(workers) == processes and not any(worker.is_running() for worker in workers)
    finally:
        for process in [*workers, job]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    step = int(states(run)[-1].name[5:])
    assert f"told to end at step {step}; the same command continues" in printed
    assert metrics(run)[-1]["step"] in (step - 1, step)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "what", ["kills=200", "saves=200", "sharded=200", "threads=100", "stops=80", "ctrl_c=80", "resumes=40"]
)
def test_two_hundred_times(tmp_path, what):
    name, count = what.split("=")
    rows = faults(tmp_path, **{name: count})[name]
    print(*rows, sep="\n")
    assert not broken(rows)
    assert sum(row["tried"] for row in rows) >= int(count)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "what", ["matrix=24", "disks=20", "sick=20", "uneven=3", "encodes=100", "generates=100", "power=600"]
)
def test_dozens_of_faults(tmp_path, what):
    """All under `accelerate launch`, all levels of free space, losses that are not finite, images that are none, killed
    encodes and sets of images, power loss."""
    name, count = what.split("=")
    rows = faults(tmp_path, **{name: count})[name]
    print(*rows, sep="\n")
    assert rows and not [text for row in rows for text in row["broken"]]
