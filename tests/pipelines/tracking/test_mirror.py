"""What goes to each tracker, and when: once, in order, with what came before it; and never in the run's way."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch import metrics, tokenizer_arguments, train_tokenizer

from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.tracking import TrackConfig, Tracker, mirror
from pipelines.tracking import tracker as tracking
from pipelines.tracking.mirror import Mirror
from pipelines.tracking.record import Record
from pipelines.tracking.trackio_run import flat
from pipelines.train_tokenizer import TrainTokenizerConfig

MAIN = SimpleNamespace(is_main_process=True)
ALL = ["wandb", "tensorboard", "trackio"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, one_process):
    """One process on the CPU; nobody's folders or servers."""
    for name in ("WANDB_MODE", "WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)


class Remembering:
    """A target that keeps its calls."""

    def __init__(self, held: int = -1) -> None:
        self.held, self.calls = held, []

    def log(self, step, values):
        self.calls.append((step, values))

    images = log

    def artifact(self, step, folder, name, metadata):
        self.calls.append((step, folder, name, metadata))

    def conclude(self, step, summary, rows):
        self.concluded = step, summary, rows

    @property
    def online(self):
        return False

    @property
    def run(self):
        return SimpleNamespace(log_artifact=lambda mark: None, _log_artifact=lambda mark, **_: None)

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def targets(monkeypatch) -> dict[str, Remembering]:
    """Remembering targets for all three trackers, which are made as they are started."""
    made: dict[str, Remembering] = {}

    def wandb(*args, held, **options):
        made["wandb"] = Remembering(held)
        return made["wandb"]

    def board(*args, **options):
        return made.setdefault("tensorboard", Remembering())

    def trackio(*args, **options):
        return made.setdefault("trackio", Remembering())

    monkeypatch.setattr(tracking, "start_wandb", wandb)
    monkeypatch.setattr(tracking, "start_tensorboard", board)
    monkeypatch.setattr(tracking, "start_trackio", trackio)
    return made


def steps_of(target: Remembering) -> list[int]:
    return [call[0] for call in target.calls if call != "finish"]


def follow(run: Path, config: TrackConfig, first: int, last: int, picture: int = -1) -> None:
    """A process that resumes after `first` and logs up to `last`, with a preview at step `picture`."""
    tracker = Tracker(run, config, {}, accelerator=MAIN, resume_step=first)
    for step in range(first + 1, last + 1):
        tracker.log(step, {"loss": step / 3})
        if step == picture:
            tracker.images(step, {"a": np.zeros((2, 2, 3), np.uint8)})
    tracker.close()


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path, targets):
    """Numbers and pictures of the record, in the order of their steps; those who had them do not get them again."""
    follow(tmp_path, TrackConfig(wandb="disabled", trackers=["trackio"]), 0, 12, picture=4)
    targets["trackio"].held = 12
    targets["trackio"].calls.clear()
    follow(tmp_path, TrackConfig(wandb="offline", trackers=ALL), 12, 15)
    assert steps_of(targets["tensorboard"]) == [1, 2, 3, 4, 4, *range(5, 16)]
    shown = {"a": tmp_path / "previews" / "a-00000004.png"}
    assert targets["tensorboard"].calls[2:5] == [(3, {"loss": 1.0}), (4, {"loss": 4 / 3}), (4, shown)]
    assert steps_of(targets["wandb"]) == steps_of(targets["tensorboard"])
    assert steps_of(targets["trackio"]) == [13, 14, 15]


def test_wandb_gets_what_was_logged_while_it_was_off(tmp_path, targets):
    """On, off, on: steps that it may have are not sent again, those of the time between are."""
    follow(tmp_path, TrackConfig(wandb="offline"), 0, 14)
    follow(tmp_path, TrackConfig(wandb="disabled"), 10, 22)
    follow(tmp_path, TrackConfig(wandb="offline"), 20, 25)
    assert steps_of(targets["wandb"]) == list(range(15, 26))


def test_a_damaged_note_is_a_warning(tmp_path, targets, capsys):
    follow(tmp_path, TrackConfig(wandb="offline"), 0, 5)
    for text in (
        "{",
        "[]",
        '{"id": "x", "sent": 3, "active": []}',
        '{"id": "x", "sent": {"wandb": null}, "active": []}',
    ):
        (tmp_path / "trackers.json").write_text(text)
        follow(tmp_path, TrackConfig(wandb="offline"), 5, 6)
        assert capsys.readouterr().err.count("warning: trackers begin anew") == 1, text


def test_what_is_printed(tmp_path, targets, capsys):
    follow(tmp_path, TrackConfig(trackers=["tensorboard", "trackio"], project="p"), 0, 1)
    assert capsys.readouterr().out.splitlines() == [
        "W&B: disabled (not in track.trackers)",
        f"TensorBoard: tensorboard --logdir {tmp_path}/tensorboard",
        f"trackio: TRACKIO_DIR={tmp_path}/trackio trackio show --project p",
    ]


def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for active in (True, False):  # on every process, or the others would wait
        with pytest.raises(
            UserError, match=r'^track.trackers: trackio is not installed: pip install "smalti\[trackers\]"$'
        ) as error:
            Tracker(
                tmp_path,
                TrackConfig(trackers=["wandb", "trackio"]),
                {},
                accelerator=SimpleNamespace(is_main_process=active),
                resume_step=0,
            )
        assert str(error.value) == 'track.trackers: trackio is not installed: pip install "smalti[trackers]"'
    with pytest.raises(UserError, match="tensorboard and trackio are not installed"):
        train_tokenizer(tmp_path / "run", track__trackers=["tensorboard", "trackio"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_trackers_by_the_command_line(tmp_path):
    argv = tokenizer_arguments(tmp_path, track__trackers=["trackio", "wandb"])
    config = parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description=None)
    assert config.track.trackers == ("trackio", "wandb") and config.model_dump(mode="json")
    with pytest.raises(UserError, match="track.trackers: must be one of 'wandb', 'tensorboard', 'trackio'"):
        parse(TrainTokenizerConfig, [*argv, "track.trackers=[mlflow]"], verb="train_tokenizer", description=None)


def test_training_ends_with_an_artifact(tmp_path, targets):
    """The tokenizer that was trained, with the evaluation of its last step."""
    run = train_tokenizer(tmp_path / "run", track__wandb="offline", track__artifact=True)
    step, folder, name, evaluation = targets["wandb"].calls[-2]
    last = metrics(run)[-1]
    assert (step, folder, name) == (last["step"], run / "tokenizer", "run")
    assert evaluation["psnr"] == last["held_out/psnr"] and targets["wandb"].calls[-1] == "finish"


@pytest.mark.parametrize("snapshot", ["tokenizer", "pipeline"])
def test_an_artifact_is_the_last_thing_sent(tmp_path, targets, snapshot):
    """Once, after all numbers, with what was asked for; not at all where it was not."""
    for name in dict.fromkeys(("tokenizer", snapshot)):  # a prior's run has no tokenizer of its own; if, it is the part
        (tmp_path / name).mkdir(parents=True)
    for asked in (True, False):
        config = TrackConfig(wandb="offline", trackers=["wandb", "trackio"], artifact=asked, name="n")
        tracker = Tracker(tmp_path, config, {}, accelerator=MAIN, resume_step=0)
        tracker.log(3, {"loss": 1.0})
        tracker.artifact(3, {"psnr": np.float32(2)})
        tracker.close()
        sent = [(3, tmp_path / snapshot, "n", {"psnr": 2.0})] if asked else []
        assert targets["wandb"].calls == [(3, {"loss": 1.0}), *sent, "finish"]
        assert targets["trackio"].calls == [(3, {"loss": 1.0}), "finish"]
        targets["trackio"].calls.clear()


def test_an_artifact_that_can_not_be_made_is_a_warning(tmp_path, targets, monkeypatch, capsys):
    def fail(self, *arguments):
        raise OSError("quota\nexceeded")

    def end_of_run(mode: str) -> str:
        tracker = Tracker(tmp_path, TrackConfig(wandb=mode, artifact=True), {}, accelerator=MAIN, resume_step=0)
        tracker.artifact(1, {})
        tracker.close()
        return capsys.readouterr().err

    assert end_of_run("offline") == "warning: W&B: track.artifact: there is no snapshot, no artifact is made\n"
    (tmp_path / "tokenizer").mkdir()
    assert end_of_run("disabled") == "warning: W&B: track.artifact: W&B is disabled, no artifact is made\n"
    monkeypatch.setattr(Remembering, "artifact", fail)
    assert end_of_run("offline").startswith("warning: W&B: the artifact was not made (quota exceeded)")
    assert targets["wandb"].calls == ["finish"]


def test_an_upload_that_hangs_is_given_up(tmp_path, targets, monkeypatch, capsys):
    gate = threading.Event()
    monkeypatch.setattr(mirror, "LAST_SECONDS", 0.3)
    monkeypatch.setattr(Remembering, "artifact", lambda self, *arguments: gate.wait(20))
    (tmp_path / "tokenizer").mkdir()
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline", artifact=True), {}, accelerator=MAIN, resume_step=0)
    tracker.artifact(1, {})
    tracker.close()
    gate.set()
    assert "not done after 0 s; `wandb sync` the newest folder" in capsys.readouterr().err


def test_slow_trackers_are_waited_for_together(tmp_path, targets, monkeypatch, capsys):
    """Three that hang cost one limit, not three."""
    gate = threading.Event()
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.4)
    monkeypatch.setattr(Remembering, "finish", lambda self: gate.wait(20))
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline", trackers=ALL), {}, accelerator=MAIN, resume_step=0)
    began = threading.Event()
    timer = threading.Timer(1.0, began.set)
    timer.start()
    tracker.close()
    assert not began.is_set(), "they were waited for one after the other"
    timer.cancel()
    gate.set()
    assert capsys.readouterr().err.count("not done after") == 3


def test_one_that_never_starts_is_reported_once(tmp_path, capsys):
    """And holds nothing, so that the next process copies all."""

    def fail() -> Remembering:
        raise ConnectionError("no\nway")

    record = Record(tmp_path, 0)
    copy = Mirror("it", record, {"starting": fail})
    copy._thread.join()
    for step in range(100):
        record.log(step, {})
        copy.wake()
    copy.end()
    copy.join(0.0)
    expected = "warning: it: starting failed (no way); going on without it, metrics.jsonl has every number\n"
    assert copy.copied == -1 and capsys.readouterr().err == expected


def test_a_record_that_cannot_be_read_is_a_warning(tmp_path, monkeypatch, capsys):
    """And is read on once it can."""
    broken, opened, tried = [True], Path.open, threading.Event()

    def fail(self, *how, **more):
        if broken and how == ("rb",):
            tried.set()
            raise OSError("gone")
        return opened(self, *how, **more)

    monkeypatch.setattr(Path, "open", fail)
    target, record = Remembering(), Record(tmp_path, 0)
    record.log(1, {})
    copy = Mirror("it", record, {"it": lambda: target})
    assert tried.wait(10)
    record.log(2, {})
    broken.clear()
    copy.end()
    copy.join(1e9)
    assert steps_of(target) == [1, 2] and copy.copied == 2
    assert capsys.readouterr().err == ("warning: it: the record was not read (gone); later failures are not reported\n")


def test_what_a_tracker_has_not_got_is_copied_by_the_next_process(tmp_path, targets, monkeypatch, capsys):
    """It was given up at the end of the run, or did not start at all; nothing is lost, and nothing is there twice."""
    gate = threading.Event()
    config = TrackConfig(wandb="offline")
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(Remembering, "log", lambda self, step, values: (self.calls.append((step,)), gate.wait(20)))
        follow(tmp_path, config, 0, 6)
    assert steps_of(targets["wandb"]) == [1] and "not done after" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "start_wandb", lambda *args, **options: 1 // 0)
        patch.setattr(tracking, "stop_wandb", lambda: None)
        follow(tmp_path, config, 6, 8)
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 15.0)
    follow(tmp_path, config, 8, 9)
    assert steps_of(targets["wandb"]) == list(range(2, 10))
    gate.set()


def test_flat():
    node = {"a": 1, "b": {"c": None, "d": {"e": True}, "f": {}}, "g": (1, 2), "h": "x"}
    assert flat(node) == {"a": 1, "b.c": "null", "b.d.e": True, "b.f": "{}", "g": "[1, 2]", "h": "x"}
