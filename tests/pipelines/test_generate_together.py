"""`smalti generate` in processes that really run: the same bytes, said once; killed, others go on.

The processes are forked from one that has imported everything (`python test_generate_together.py FOLDER`).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from failures.forked import Attempt, Hook, import_once, log_of, start_verb
from folders import written
from launch import kill_the_second, output_of, start, two_processes
from prepared import run_file
from small_pipelines import make_pipeline

from pipelines.generate import GenerateConfig, run
from pipelines.jobs import Job

FORMS = ["images", "grid.png", "set.npz", "set.parquet", "set.tar"]
FEW, MANY = 20, 300


# In the processes


def noting(path: Path, pause: float = 0.0) -> Hook:
    """Each piece that is made is written down, and by whom, as it is entered."""

    def hook(rank: int) -> None:
        enter = Job.enter

        def noted(job: Job, piece: Any, entry: Any) -> None:
            time.sleep(pause)
            enter(job, piece, entry)
            with path.open("a") as file:
                file.write(json.dumps([rank, piece.name]) + "\n")

        Job.enter = noted  # type: ignore[method-assign]

    return hook


def noted_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(folder: Path) -> None:
    import_once("accelerate", "torchvision.utils")

    def begin(name: str, world: int, *more: str, pause: float = 0.0, notes: str = "") -> Attempt:
        argv = [f"pipeline={folder}/pipeline", f"out={folder}/{name}", "batch_size=3", *more]
        return start_verb("generate", world, folder / name, argv, noting(folder / (notes or f"{name}.notes"), pause))

    codes = {"two": begin("two.npz", 2, f"num_images={FEW}").end()}
    process = begin("killed.tar", 1, f"num_images={MANY}", pause=0.02, notes="first")
    while len(noted_in(folder / "first")) < 3:
        process.wait(0.002)
    process.send(signal.SIGKILL)
    codes["killed"] = process.end()
    codes["others"] = begin("killed.tar", 2, f"num_images={MANY}", notes="others").end()
    codes["order"] = begin("order.npz", 2, "order=snake").end()
    codes["device"] = begin("device.npz", 2, "device=cuda").end()
    (folder / "codes.json").write_text(json.dumps(codes))


# From outside


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A small pipeline of three classes; tests do not write into it."""
    folder = tmp_path_factory.mktemp("together") / "pipeline"
    torch.manual_seed(0)
    make_pipeline(size=(8, 8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(pipeline) -> tuple[Path, dict[str, list[int]]]:
    folder = pipeline.parent
    run_file(__file__, folder)
    return folder, json.loads((folder / "codes.json").read_text())


def alone(pipeline: Path, out: Path, count: int) -> dict[str, bytes] | bytes:
    """What one process writes, to the bit."""
    run(GenerateConfig(pipeline=str(pipeline), out=str(out), num_images=count))
    return written(out)


def test_two_write_the_same_bytes_and_one_says_so(found, tmp_path):
    folder, codes = found
    assert codes["two"] == [0, 0]
    assert (folder / "two.npz").read_bytes() == alone(folder / "pipeline", tmp_path / "one.npz", FEW)
    assert {rank for rank, _ in noted_in(folder / "two.npz.notes")} == {0, 1}
    assert log_of(folder / "two.npz").read_text().count("images per second") == 1
    assert not list(folder.glob(".tmp-*"))


def test_one_is_killed_and_others_go_on(found, tmp_path):
    """kill -9 while it makes images; two processes end it, and make no piece again."""
    folder, codes = found
    first, others = noted_in(folder / "first"), noted_in(folder / "others")
    assert codes["killed"] == [-signal.SIGKILL] and codes["others"] == [0, 0]
    names = [name for _, name in [*first, *others]]
    assert len(first) >= 3 and {rank for rank, _ in others} == {0, 1}
    assert len(names) - len(set(names)) == 0 and len(names) >= MANY // 5 - 1  # one may be entered and not noted
    assert "continuing, " in log_of(folder / "killed.tar").read_text()
    assert (folder / "killed.tar").read_bytes() == alone(folder / "pipeline", tmp_path / "whole.tar", MANY)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("order", "error: order: this gpt prior"),
        ("device", "error: device: 'cuda': accelerate chose cpu for its processes; leave it auto"),
    ],
)
def test_one_tells_what_is_wrong(found, name, told):
    folder, codes = found
    lines = [line for line in log_of(folder / f"{name}.npz").read_text().splitlines() if "error" in line]
    assert codes[name][0] == 2 and codes[name][1] != 0
    assert len(lines) == 1 and lines[0].startswith(told)
    assert not (folder / f"{name}.npz").exists() and not (folder / f".tmp-{name}.npz-generate").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_processes_that_are_launched_write_the_same_bytes(pipeline, tmp_path, count, form):
    argv = [f"pipeline={pipeline}", "num_images=40", f"out={tmp_path / 'several' / form}"]
    output_of(start(two_processes("generate", argv, count)))
    assert written(tmp_path / "several" / form) == alone(pipeline, tmp_path / "one" / form, 40)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 12, 30, 50])
def test_one_of_two_is_killed_the_other_ends_and_the_same_command_goes_on(pipeline, tmp_path, moment):
    argv = [f"pipeline={pipeline}", f"out={tmp_path}/set.npz", "num_images=3000", "batch_size=4"]
    work = tmp_path / ".tmp-set.npz-generate"
    kill_the_second(
        start(two_processes("generate", argv)), lambda: len(list(work.glob("*[0-9].json"))) >= min(moment, 40)
    )
    assert work.is_dir() and not (tmp_path / "set.npz").exists()
    printed = output_of(start(two_processes("generate", argv)))
    assert "set.npz: continuing, " in printed
    assert (tmp_path / "set.npz").read_bytes() == alone(pipeline, tmp_path / "whole.npz", 3000)


@pytest.mark.parametrize("argv", [["out={out}.gif"], ["pipeline=nowhere"], ["order=snake"]])
@pytest.mark.slow
def test_of_two_processes_that_are_launched_one_tells_what_is_wrong(pipeline, tmp_path, argv):
    filled = [part.format(out=tmp_path / "set") for part in argv]
    command = two_processes("generate", [f"pipeline={pipeline}", f"out={tmp_path}/set.npz", *filled])
    printed = output_of(start(command), code=1)
    assert [line for line in printed.splitlines() if line.startswith("error")].__len__() == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
