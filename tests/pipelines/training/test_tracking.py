"""`metrics.jsonl` and `previews/` hold every step once; trackers mirror them and never end a run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from launch import metrics, train_prior, train_tokenizer
from PIL import Image
from servers.wandb_stand_ins import FakeWandb, WandbServer

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.training import tracking
from pipelines.training.tracking import TrackConfig, Tracker, wandb_mode
from tokenizer.files import PathError

PICTURE = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
KEY = "0123456789abcdef" * 2 + "secretly"
QUICK = {"train__steps": 4, "train__preview_every": 4, "train__evaluate_every": 2, "train__batch_size": 8}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, one_process, tmp_path):
    """Hide the user's keys, folders and servers."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def open_tracker(run: Path, resume_step: float = 0, active: bool = True, **config: Any) -> Tracker:
    settings = TrackConfig(**{"wandb": "disabled", **config})
    return Tracker(run, settings, {"model": {"depth": 2}}, active=active, resume_step=resume_step)


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run)]


# metrics.jsonl and previews


def test_lines_are_written_at_once_and_floats_round_trip(tmp_path):
    tracker = open_tracker(tmp_path)
    plain = {"loss": 0.1 + 0.2, "tiny": 5e-324, "count": 3, "inf": float("inf")}
    tracker.log(1, {**plain, "scalar": np.float32(0.1), "tensor": torch.tensor(0.5)})
    (line,) = metrics(tmp_path)
    assert line == {"step": 1, **plain, "scalar": float(np.float32(0.1)), "tensor": 0.5} and list(line)[0] == "step"
    tracker.close()


def test_pictures_are_lossless_and_replaced(tmp_path):
    """A resumed run may write one again."""
    tracker = open_tracker(tmp_path)
    for picture in (PICTURE, 255 - PICTURE[..., :1]):
        tracker.images(12, {"a": picture})
        found = np.asarray(Image.open(tmp_path / "previews" / "a-00000012.png"))
        assert (found.reshape(picture.shape) == picture).all()
    tracker.close()


def test_crashes_and_resumes_leave_each_step_once(tmp_path):
    """With a checkpoint every 5 steps, and a truncated last line at each crash."""
    state = 0
    for crash in (7, 8, 13, 14, 21):
        tracker = open_tracker(tmp_path, resume_step=state)
        assert steps_of(tmp_path) == list(range(1, state + 1))
        for step in range(state + 1, crash + 1):
            tracker.log(step, {"loss": step / 3})
        tracker.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {crash + 1}, "lo')
        state = crash // 5 * 5
    open_tracker(tmp_path, resume_step=state).close()
    assert steps_of(tmp_path) == list(range(1, state + 1))


def test_a_link_in_place_of_the_metrics_is_refused(tmp_path):
    (tmp_path / "theirs").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "theirs")
    with pytest.raises(PathError, match="metrics.jsonl"):
        open_tracker(tmp_path / "run")


def test_lines_on_a_full_disk_are_written_later_and_pictures_are_lost(tmp_path, monkeypatch, capsys):
    """With one warning each."""
    tracker, full, room = open_tracker(tmp_path), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), [10]
    file = tracker._metrics._file

    def write(data: bytes) -> int:
        if not room:
            raise full
        return file.write(data[: room.pop()])

    tracker.log(1, {"loss": 1.0})
    tracker._metrics._file = SimpleNamespace(write=write, fileno=file.fileno, close=file.close)
    for step in (2, 3, 4):
        tracker.log(step, {"loss": 1.0})
    assert steps_of(tmp_path) == [1] and capsys.readouterr().err.count("warning") == 1
    with pytest.raises(OSError, match="metrics.jsonl"):
        tracker.flush()  # a checkpoint must not be saved now
    tracker._metrics._file = file
    tracker.flush()
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    monkeypatch.setattr(tracking, "save_picture", Mock(side_effect=full))
    tracker.images(1, {"a": PICTURE})
    tracker.close()
    assert capsys.readouterr().err.count("warning: ") == 1


# Settings


def test_the_mode_of_wandb_and_its_reason(tmp_path, monkeypatch):
    assert wandb_mode(None) == ("offline", "no API key found")
    key = "machine api.wandb.ai login user password secret\n"
    monkeypatch.setenv("NETRC", "~/netrc")
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, mode in (("machine {{{ nonsense", "offline"), (key, "online")):
        (tmp_path / "netrc").write_text(text)
        assert wandb_mode(None)[0] == mode
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # another server needs another key
    assert wandb_mode(None)[0] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode(None) == ("online", "API key found in WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(None) == ("disabled", "WANDB_MODE")
    assert wandb_mode("offline") == ("offline", "track.wandb")


def test_project_and_name_come_from_the_configuration_then_the_environment(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    open_tracker(tmp_path / "run", wandb="offline").close()
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.setenv(variable, "theirs")
    open_tracker(tmp_path / "run", wandb="offline").close()
    open_tracker(tmp_path / "run", wandb="offline", project="mine", name="first").close()
    names = [(options["project"], options["name"]) for options in wandb.starts]
    assert names == [("smalti", "run"), ("theirs", "theirs"), ("mine", "first")]
    assert {options["reinit"] for options in wandb.starts} == {"create_new"}  # leaves the user's own run alone
    assert wandb.starts[0]["config"] == {"model": {"depth": 2}} and wandb.starts[0]["dir"] == str(tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_refused_on_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for active in (True, False):
        with pytest.raises(UserError, match=r"^track\.trackers: .*smalti\[trackers\]"):
            open_tracker(tmp_path, active=active, trackers=("tensorboard",))
    open_tracker(tmp_path, trackers=("wandb",)).close()


def test_resumed_runs_share_their_id_and_new_ones_have_their_own(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    for resume_step, mode in ((0, "offline"), (0.5, "offline"), (10, "disabled"), (20, "offline")):
        open_tracker(tmp_path, resume_step, wandb=mode).close()
    assert len({options["id"] for options in wandb.starts}) == 1 and len(wandb.starts) == 3
    (tmp_path / "trackers.json").write_text("{")
    for resume_step in (30, 0):
        open_tracker(tmp_path, resume_step, wandb="offline").close()
    assert len({options["id"] for options in wandb.starts}) == 3


# Failing trackers


def test_wandb_that_cannot_start_online_continues_offline(tmp_path, monkeypatch, capsys):
    wandb = FakeWandb(monkeypatch, {"init online": ConnectionError("no\nanswer")})
    tracker = open_tracker(tmp_path, wandb="online")
    tracker.log(1, {"loss": 1.0})
    assert tracker.run_url is None
    tracker.close()
    assert [options["mode"] for options in wandb.starts] == ["online", "offline"] and wandb.teardowns == 1
    assert wandb.starts[0]["id"] == wandb.starts[1]["id"] and wandb.history == [(1, {"loss": 1.0})]
    (warning,) = capsys.readouterr().err.splitlines()
    command = f"wandb sync {tmp_path}/wandb/offline-run-*-{wandb.starts[0]['id']}"
    assert "no answer" in warning and command in warning


def use(tracker: Tracker) -> None:
    """Call every method of a tracker."""
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
        tracker.images(step, {"a": PICTURE})
        tracker.flush()
    tracker.finish(2, {"steps": 2}, [["last", "held_out", "psnr", 20.0]], {"psnr": 20.0})
    tracker.close()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("W&B", call) for call in ("init offline", "log", "log_artifact", "finish")),
        *(("TensorBoard", call) for call in ("__init__", "add_scalar")),
    ],
)
def test_a_tracker_that_raises_is_switched_off(tmp_path, monkeypatch, capsys, name, call):
    error = OSError(errno.ESTALE, "server gone")
    if name == "W&B":
        FakeWandb(monkeypatch, {call: error})
        (tmp_path / "pipeline").mkdir()
        use(open_tracker(tmp_path, wandb="offline", artifact=call == "log_artifact"))
    else:
        monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{call}", Mock(side_effect=error))
        use(open_tracker(tmp_path, trackers=("tensorboard",)))
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {name}") and "server gone" in warning
    assert steps_of(tmp_path) == [1, 2] and len(list((tmp_path / "previews").iterdir())) == 2


# The real clients


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tokenizer's run with both trackers, W&B offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        choices = {"track__wandb": "offline", "track__trackers": ["wandb", "tensorboard"]}
        return train_tokenizer(tmp_path_factory.mktemp("tracked") / "digits", data__limit=72, **QUICK, **choices)


def test_an_offline_run_has_pictures_and_a_table(trained):
    assert list(trained.glob("wandb/offline-run-*/files/media/images/reconstructions_4_*.png"))
    (path,) = trained.glob("wandb/offline-run-*/files/media/table/evaluation_*.json")
    table, last = json.loads(path.read_text()), metrics(trained)[-1]
    assert table["columns"] == ["weights", "split", "figure", "value"]
    rows = {(weights, split, figure): value for weights, split, figure, value in table["data"]}
    assert rows["last", "validation", "psnr"] == pytest.approx(last["validation/psnr"])
    held_out = {figure: value for (_, split, figure), value in rows.items() if split == "held_out"}
    assert held_out == pytest.approx({key[9:]: value for key, value in last.items() if key.startswith("held_out/")})


def test_the_upload_of_an_artifact_is_awaited_or_there_is_a_warning(tmp_path, monkeypatch, capsys):
    wandb = FakeWandb(monkeypatch)
    (tmp_path / "pipeline").mkdir()
    for out, mode in ((tmp_path, "disabled"), (tmp_path / "without a snapshot", "offline")):
        use(open_tracker(out, wandb=mode, artifact=True))
        (warning,) = capsys.readouterr().err.splitlines()
        assert "track.artifact" in warning and not wandb.artifacts
    use(open_tracker(tmp_path, wandb="online", artifact=True, name="digits / first"))
    ((artifact, aliases),) = wandb.artifacts
    assert artifact.name == "digits-first-pipeline" and aliases == ["latest", "step-2"]
    assert artifact.folder == str(tmp_path / "pipeline") and artifact.waited > 0


def scalars_and_images(run: Path) -> tuple[list[tuple[int, str, float]], list[tuple[int, str]]]:
    """Scalars and images, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0})
    reader.Reload()
    tags = reader.Tags()
    scalars = [(event.step, tag, event.value) for tag in tags["scalars"] for event in reader.Scalars(tag)]
    return sorted(scalars), sorted((event.step, tag) for tag in tags["images"] for event in reader.Images(tag))


def test_tensorboard_mirrors_the_record(trained):
    scalars, images = scalars_and_images(trained)
    lines = [(line["step"], name, value) for line in metrics(trained) for name, value in line.items() if name != "step"]
    assert scalars == sorted((step, name, np.float32(value)) for step, name, value in lines)
    files = [(int(path.stem[-8:]), path.stem[:-9]) for path in (trained / "previews").iterdir()]
    assert images == sorted(files) and images


def test_an_online_run_is_linked_on_the_card_and_continues_after_a_resume(tmp_path, tokens, monkeypatch, capfd):
    """With the real client and a server: one run for both commands, every step, no output, and no key in any file."""
    wandb, run = pytest.importorskip("wandb"), tmp_path / "run"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()  # so that it reads the environment again
        for steps in (3, 6):
            train_prior(run, tokens, track__wandb="online", train__steps=steps)
        wandb.teardown()
        (history,) = server.history.values()
    printed = "".join(capfd.readouterr())
    assert "warning" not in printed and "wandb:" not in printed and KEY not in printed
    logged = [line["_step"] for line in history if "learning_rate" in line]
    assert logged == steps_of(run) == sorted(set(logged)) and logged[-1] == 6
    url = ImagePipeline.from_pretrained(run / "pipeline").provenance["prior"]["run_url"]
    assert url.startswith(f"{server.url}/someone/") and url in (run / "pipeline" / "README.md").read_text()
    for path in run.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
