"""TensorBoard and trackio (`tensorboard_run`, `trackio_run`) hold what `metrics.jsonl` holds, each step once; models go
to W&B as artifacts.

Covers: pipelines/tracking/tensorboard_run.py, pipelines/tracking/trackio_run.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from launch import CLOCK, exact, metrics, output_of, start, tokenizer_arguments, train_tokenizer, verb, wait_for
from PIL import Image
from servers.wandb_log import wandb_records
from servers.wandb_server import WandbServer

from pipelines.tracking.tensorboard_run import last_step, start_tensorboard

MAIN = SimpleNamespace(is_main_process=True)
ROOT = Path(__file__).parents[3]
ALL = ["wandb", "tensorboard", "trackio"]
Numbers = list[tuple[int, str, float]]
Pictures = list[tuple[int, str, np.ndarray]]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, one_process):
    """One process on the CPU; nobody's folders or servers."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)


# What the trackers hold: by step, numbers and pictures


def in_tensorboard(run: Path) -> tuple[Numbers, Pictures]:
    """Every scalar and image that TensorBoard shows, by its own reader: a step that was written again counts once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0})
    reader.Reload()
    tags = reader.Tags()
    scalars = [(event.step, tag, event.value) for tag in tags["scalars"] for event in reader.Scalars(tag)]
    images = [
        (event.step, tag, pixels(event.encoded_image_string)) for tag in tags["images"] for event in reader.Images(tag)
    ]
    return scalars, images


def in_trackio(run: Path, project: str = "smalti") -> tuple[Numbers, Pictures]:
    """Every number and image of the one run in trackio's database."""
    with sqlite3.connect(run / "trackio" / f"{project}.db") as database:
        rows = database.execute("SELECT step, metrics, run_id FROM metrics ORDER BY id").fetchall()
    assert len({identity for _, _, identity in rows}) == 1
    values = [(step, name, value) for step, text, _ in rows for name, value in json.loads(text).items()]
    media = run / "trackio" / "media"
    images = [(s, n, pixels((media / v["file_path"]).read_bytes())) for s, n, v in values if isinstance(v, dict)]
    return [(step, name, value) for step, name, value in values if not isinstance(value, dict)], images


def pixels(data: bytes) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(data)))


def in_record(run: Path) -> Numbers:
    """The numbers of `metrics.jsonl`."""
    return [(line["step"], name, value) for line in metrics(run) for name, value in line.items() if name != "step"]


def assert_the_same(run: Path, found: tuple[Numbers, Pictures], number: Any = float) -> None:
    """Each step's numbers and pictures once, as they are in the run folder; `number` is what a value is kept as.

    What a clock says is there too, but the steps that a resumed run repeats took another time.
    """
    scalars, images = found
    recorded = in_record(run)
    assert sorted((step, name) for step, name, _ in scalars) == sorted((step, name) for step, name, _ in recorded)
    values = {(step, name): number(value) for step, name, value in recorded if name not in CLOCK}
    assert {(step, name): value for step, name, value in scalars if name not in CLOCK} == values
    files = {(int(path.stem[-8:]), path.stem[:-9]): path for path in (run / "previews").glob("*.png")}
    assert sorted((step, name) for step, name, _ in images) == sorted(files)
    for step, name, picture in images:
        assert (picture == np.asarray(Image.open(files[step, name]))).all()


def kill_and_resume(out: Path, kills: list[int], **choices: Any) -> None:
    """Start the run, kill it once it has logged each step of `kills`, then let it end."""
    command = verb("train_tokenizer", tokenizer_arguments(out, **choices))
    for step in kills:
        process = start(command, HOME=str(out.parent))
        assert wait_for(lambda: logged(out) >= step, process), f"it ended before step {step}"  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    printed = output_of(start(command, HOME=str(out.parent)), 120)
    assert "warning" not in printed and "\n* " not in printed, printed  # trackio's own lines begin with a star


def logged(run: Path) -> int:
    """The last step in `metrics.jsonl`; -1 while there is none, or another process's lines are not yet removed."""
    try:
        whole = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return -1
    return json.loads(whole[-1])["step"] if whole else -1


@pytest.mark.slow
def test_a_killed_run_is_whole_in_tensorboard_and_trackio(tmp_path):
    """Killed and resumed, both hold each step's numbers once, to the bit, and each preview to the pixel."""
    choices = {"train__steps": 80, "train__save_every": 15, "train__preview_every": 30}
    kill_and_resume(tmp_path / "run", [40], **choices, track__trackers=["tensorboard", "trackio"])
    assert logged(tmp_path / "run") == 80
    assert_the_same(tmp_path / "run", in_tensorboard(tmp_path / "run"), number=np.float32)
    assert_the_same(tmp_path / "run", in_trackio(tmp_path / "run"))
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.slow
def test_a_run_killed_before_its_trackers_had_started_is_whole(tmp_path):
    """A tracker may take seconds to start, and a step less: what it had no time to get, the next process gives it."""
    choices = {"train__steps": 30, "train__save_every": 10, "track__trackers": ["tensorboard", "trackio"]}
    command, run = verb("train_tokenizer", tokenizer_arguments(tmp_path / "run", **choices)), tmp_path / "run"
    process = start(command, HOME=str(tmp_path))
    assert wait_for(lambda: logged(run) >= 15, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for name in ("tensorboard", "trackio"):
        shutil.rmtree(run / name, ignore_errors=True)
    output_of(start(command, HOME=str(tmp_path)), 120)
    assert_the_same(run, in_tensorboard(run), number=np.float32)
    assert_the_same(run, in_trackio(run))


@pytest.mark.slow
def test_a_finished_run_that_goes_on_is_whole_in_all_trackers(tmp_path):
    """Its old last step, with numbers and pictures, is nowhere twice, and the same runs go on."""
    run, choices = tmp_path / "run", {"train__preview_every": 8, "track__trackers": ALL, "track__wandb": "online"}
    with WandbServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.setenv("WANDB_API_KEY", "x" * 40)
        for steps in (12, 20):
            argv = tokenizer_arguments(run, **choices, train__steps=steps)
            printed = output_of(start(verb("train_tokenizer", argv), HOME=str(tmp_path)), 120)
            assert "warning" not in printed, printed
        (history,) = server.history.values()
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))
    assert_the_same(run, in_tensorboard(run), number=np.float32)
    assert_the_same(run, in_trackio(run))
    assert [line["_step"] for line in history] == list(range(21))


@pytest.mark.slow
def test_five_kills_and_all_trackers(tmp_path):
    """At random points: no step twice anywhere, W&B's server included; and the figures of a run without any of it."""
    choices = {"train__steps": 300, "train__save_every": 20, "train__preview_every": 40}
    whole = train_tokenizer(tmp_path / "whole", **choices)
    kills = sorted(random.Random(0).sample(range(30, 280), 5))
    with WandbServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.setenv("WANDB_API_KEY", "x" * 40)
        run = tmp_path / "run"
        kill_and_resume(run, kills, **choices, track__trackers=ALL, track__wandb="online")
        assert exact(run) == exact(whole)
        assert [line["step"] for line in metrics(run)] == list(range(1, 301))
        assert_the_same(run, in_tensorboard(run), number=np.float32)
        assert_the_same(run, in_trackio(run))
        (history,) = server.history.values()
    assert [line["_step"] for line in history] == list(range(301))
    numbers = {(step, name): value for step, name, value in in_record(run)}
    assert all(numbers[line["_step"], "loss"] == line["loss"] for line in history[1:])


# TensorBoard's files


def test_tensorboard_goes_on_after_a_torn_file(tmp_path):
    """What a killed process had half written is passed over; a new start replaces the folder."""
    Accelerator(cpu=True)
    board = start_tensorboard(tmp_path, {"train": {"lr": 0.1}}, resumed=False)
    assert board.held == -2
    for step in (0, 1, 2):
        board.log(step, {"loss": 0.5})
    board.finish()
    (path,) = (tmp_path / "tensorboard").iterdir()
    whole = path.read_bytes()
    for cut in (1, 5, 20, 40):
        path.write_bytes(whole[:-cut])
        assert last_step(tmp_path / "tensorboard") == 1
    path.write_bytes(whole + struct.pack("<Q", 100) + b"torn")
    again = start_tensorboard(tmp_path, {}, resumed=True)
    assert again.held == 1
    again.log(2, {"loss": 0.5, "late": 2.0})  # killed in the middle of a step, it lacked a part
    again.log(3, {"loss": 0.25})
    again.finish()
    found = [(step, value) for step, _, value in in_tensorboard(tmp_path)[0]]
    assert found == [(0, 0.5), (1, 0.5), (2, 0.5), (3, 0.25), (2, 2.0)]
    assert last_step(tmp_path / "tensorboard") == 3
    assert b"lr: 0.1" in whole
    start_tensorboard(tmp_path, {}, resumed=False).finish()
    assert last_step(tmp_path / "tensorboard") == 0 and not in_tensorboard(tmp_path)[0]


# W&B's log


OFFLINE_RUN = """
import sys, time
from pathlib import Path
import numpy as np
from pipelines.tracking import TrackConfig, Tracker

assert not {"wandb", "accelerate", "trackio", "tensorboard"} & set(sys.modules)
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
began = time.monotonic()
tracker = Tracker(Path("run"), TrackConfig(wandb="offline", artifact=True, name="digits / first"),
                  {"lr": 1e-3, "model": {"depth": 2}}, accelerator=accelerator, resume_step=0)
for step in range(1, 8):
    tracker.log(step, {"loss": 1 / step})
tracker.images(7, {"sample": np.zeros((8, 8, 3), np.uint8)})
tracker.artifact(7, {"psnr": 21.5})
assert time.monotonic() - began < 1.0, "the mirror held up the run"
tracker.close()
"""


def test_numbers_pictures_and_the_snapshot_are_in_the_offline_log(tmp_path):
    """What `wandb sync` will send; the pipeline as an artifact with an alias by step, and its evaluation."""
    folder = tmp_path / "run" / "pipeline"
    (folder / "prior").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "prior" / "model.safetensors").write_bytes(b"x" * 100_000)
    program = f"import os; os.chdir({str(tmp_path)!r})\n{OFFLINE_RUN}"
    printed = output_of(start([sys.executable, "-c", program], HOME=str(tmp_path), PYTHONPATH=os.environ["PYTHONPATH"]))
    assert printed.splitlines() == [
        "W&B: offline (track.wandb); sync later with: wandb sync run/wandb/offline-run-*",
        "W&B: run/pipeline as an artifact, which may take up to 300 s",
    ]
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = [(record.WhichOneof("record_type"), record) for record in wandb_records(log)]
    history = [record.history for kind, record in records if kind == "history"]
    assert [line.step.num for line in history] == [1, 2, 3, 4, 5, 6, 7]
    losses = [item.value_json for line in history for item in line.item if item.nested_key == ["loss"]]
    assert [float(loss) for loss in losses] == [1 / step for step in range(1, 8)]
    assert any("depth" in str(record.config) for kind, record in records if kind == "config")
    assert list(log.parent.glob("files/media/images/sample_7_*.png"))
    (artifact,) = [record.artifact for kind, record in records if kind == "artifact"]
    assert (artifact.type, artifact.name) == ("model", "digits-first-pipeline")
    assert set(artifact.aliases) == {"latest", "step-7"}
    assert json.loads(artifact.metadata) == {"step": 7, "psnr": 21.5}
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    sizes = {name: entry.size for name, entry in entries.items()}
    assert sizes == {"model_index.json": 2, "prior/model.safetensors": 100_000}
    assert entries["model_index.json"].local_path == str(folder / "model_index.json")  # not a copy, nor relative
