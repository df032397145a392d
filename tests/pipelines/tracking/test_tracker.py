"""The local record is complete and has no step twice; W&B is written when it can be, and never in the way."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.tracking import TrackConfig, Tracker, mirror
from pipelines.tracking import tracker as tracking
from pipelines.tracking.wandb_run import wandb_mode

ROOT = Path(__file__).parents[3]
MAIN = SimpleNamespace(is_main_process=True)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No key, no settings of the user's; wandb is not touched unless a test asks for it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tracking, "stop_wandb", lambda: None)


def open_tracker(run: Path, resume_step: int = 0, mode: str = "disabled", accelerator=MAIN) -> Tracker:
    return Tracker(run, TrackConfig(wandb=mode), {"lr": 1e-3}, accelerator=accelerator, resume_step=resume_step)


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class FakeWandb:
    """Stands for a W&B run: remembers what it got, fails or sleeps on demand."""

    def __init__(
        self, monkeypatch, *, fail: tuple[str, ...] = (), gate: threading.Event | None = None, log_fails=False
    ):
        self.starts: list[dict] = []
        self.got: list[tuple] = []
        self.fail, self.gate, self.log_fails, self.finished = fail, gate, log_fails, False
        monkeypatch.setattr(tracking, "start_wandb", self.start)

    def start(self, project, run_config, *, held, **options):
        self.held = held
        self.starts.append({"project": project, **options})
        if self.gate:
            self.gate.wait(20)
        if options["mode"] in self.fail:
            raise ConnectionError(f"{options['mode']} is down")
        return self

    def log(self, step, values):
        if self.log_fails:
            raise RuntimeError("server gone")
        self.got.append((step, values))

    images = log

    def finish(self):
        self.finished = True


def test_lines_are_flushed_and_floats_come_back_to_the_bit(tmp_path):
    tracker = open_tracker(tmp_path)
    values = {"loss": 0.1 + 0.2, "tiny": 5e-324, "count": 3, "scalar": np.float32(0.1), "inf": float("inf")}
    tracker.log(1, values)
    (line,) = read(tmp_path)  # before close
    assert line == {"step": 1, **values} and list(line)[0] == "step"
    tracker.close()


def test_other_processes_write_nothing(tmp_path, capsys):
    tracker = open_tracker(tmp_path / "run", mode="offline", accelerator=SimpleNamespace(is_main_process=False))
    tracker.log(1, {"a": 1.0})
    tracker.images(1, {"a": np.zeros((2, 2, 3), np.uint8)})
    tracker.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_images_are_lossless_files(tmp_path):
    tracker = open_tracker(tmp_path)
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        tracker.images(12, {f"c{channels}": pixels})
        found = np.asarray(Image.open(tmp_path / "previews" / f"c{channels}-00000012.png")).reshape(pixels.shape)
        assert (found == pixels).all()
    tracker.close()


def test_no_step_stands_twice_after_kills_and_resumes(tmp_path):
    """Checkpoints every 5 steps, death at any step with a torn last line, five times over."""
    state = 0
    for death in (7, 8, 13, 14, 21):
        tracker = open_tracker(tmp_path, resume_step=state)
        for step in range(state + 1, death + 1):
            tracker.log(step, {"loss": step / 3})
            tracker.log(step, {"val": 1.0}) if step == 5 else None
        tracker.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {death + 1}, "lo')
        state = death // 5 * 5
    open_tracker(tmp_path, resume_step=state).close()
    lines = read(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, state + 1))
    assert sum("val" in line for line in lines) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"metrics.jsonl", "home"}


def test_a_complete_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    tracker = open_tracker(tmp_path, resume_step=2)
    tracker.log(3, {})
    tracker.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_a_new_start_begins_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    open_tracker(tmp_path, resume_step=0).close()
    assert read(tmp_path) == []


def test_mode_and_reason(tmp_path, monkeypatch):
    assert wandb_mode(None) == ("offline", "no API key found")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(None) == ("online", f"API key found in {tmp_path / 'netrc'}")
    monkeypatch.setenv("NETRC", "~/mine")
    assert wandb_mode(None)[0] == "offline"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").write_text((tmp_path / "netrc").read_text())
    assert wandb_mode(None) == ("online", f"API key found in {tmp_path / 'mine'}")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # the key of one server is none for another
    assert wandb_mode(None)[0] == "offline"
    (tmp_path / "netrc").write_text("machine {{{ nonsense")
    assert wandb_mode(None)[0] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(None) == ("online", "API key found in WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(None) == ("disabled", "WANDB_MODE")
    assert wandb_mode("offline") == ("offline", "track.wandb")


def test_the_line_that_is_printed(tmp_path, monkeypatch, capsys):
    FakeWandb(monkeypatch)
    Tracker(tmp_path, TrackConfig(), {}, accelerator=MAIN, resume_step=0).close()
    expected = f"W&B: offline (no API key found); sync later with: wandb sync {tmp_path}/wandb/offline-run-*\n"
    assert capsys.readouterr() == (expected, "")
    Tracker(tmp_path / "a b", TrackConfig(), {}, accelerator=MAIN, resume_step=0).close()
    assert f"wandb sync '{tmp_path}/a b'/wandb/offline-run-*\n" in capsys.readouterr().out


@pytest.mark.parametrize("config", [{}, {"project": None, "name": None}, {"project": "mine", "name": "first"}])
@pytest.mark.parametrize("environment", [{}, {"WANDB_PROJECT": "theirs", "WANDB_NAME": "x"}, {"WANDB_PROJECT": ""}])
def test_project_and_name_are_those_of_the_configuration_then_of_the_environment(
    tmp_path, monkeypatch, capsys, config, environment
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    fake = FakeWandb(monkeypatch)
    monkeypatch.setattr(tracking, "require_installed", lambda trackers: None)
    trackio = []
    monkeypatch.setattr(tracking, "start_trackio", lambda project, *_, name, **__: trackio.append((project, name)))
    settings = TrackConfig(wandb="offline", trackers=("wandb", "trackio"), **config)
    Tracker(tmp_path, settings, {}, accelerator=MAIN, resume_step=0).close()
    project = config.get("project") or environment.get("WANDB_PROJECT") or "smalti"
    name = config.get("name") or environment.get("WANDB_NAME") or tmp_path.name
    assert [(start["project"], start["name"]) for start in fake.starts] == [(project, name)]
    assert [found[0] for found in trackio] == [project] and trackio[0][1].startswith(f"{name}-")
    assert f"trackio show --project {project}\n" in capsys.readouterr().out


def test_the_configuration_of_an_older_run_loads():
    """In it the project's default was written out."""
    assert TrackConfig.model_validate({"wandb": None, "project": "smalti", "name": None}).project == "smalti"


def test_the_mirror_gets_everything_in_order(tmp_path, monkeypatch):
    fake = FakeWandb(monkeypatch)
    tracker = open_tracker(tmp_path, mode="online")
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5})
        tracker.images(step, {"sample": np.zeros((2, 2, 3), np.uint8)})
    tracker.close()
    assert [step for step, _ in fake.got] == [1, 1, 2, 2] and fake.finished
    assert fake.got[0][1] == {"loss": 0.5} and fake.got[1][1]["sample"].is_file()
    assert fake.starts == [
        {"project": "smalti", "mode": "online", "dir": str(tmp_path), "name": tmp_path.name, "id": fake.starts[0]["id"]}
    ]


def test_resumes_share_the_id_and_send_no_step_twice(tmp_path, monkeypatch):
    fake = FakeWandb(monkeypatch)
    for resume_step, death in ((0, 15), (10, 12), (10, 20), (20, 22)):
        tracker = open_tracker(tmp_path, resume_step=resume_step, mode="online")
        for step in range(resume_step + 1, death + 1):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    assert [step for step, _ in fake.got] == list(range(1, 23))
    assert len({start["id"] for start in fake.starts}) == 1
    open_tracker(tmp_path, resume_step=0, mode="online").close()
    assert fake.starts[-1]["id"] != fake.starts[0]["id"]  # another run, though in the same folder


@pytest.mark.parametrize(
    ("fail", "tried", "message"),
    [
        (("online",), ["online", "offline"], "online failed (online is down); going on offline"),
        (("online", "offline"), ["online", "offline"], "going on without it"),
    ],
)
def test_a_failing_start_falls_back_with_one_warning(tmp_path, monkeypatch, capsys, fail, tried, message):
    fake = FakeWandb(monkeypatch, fail=fail)
    tracker = open_tracker(tmp_path, mode="online")
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    warning = capsys.readouterr().err
    assert [start["mode"] for start in fake.starts] == tried
    assert message in warning and warning.count("\n") == 1
    assert fake.got == ([] if "offline" in fail else [(1, {"loss": 1.0})])
    assert read(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_start_that_hangs_is_abandoned(tmp_path, monkeypatch, capsys):
    gate = threading.Event()
    monkeypatch.setattr(mirror, "INIT_SECONDS", 0.2)
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 5.0)
    FakeWandb(monkeypatch, gate=gate)
    tracker = open_tracker(tmp_path, mode="online")
    tracker.close()
    gate.set()
    assert "no answer in" in capsys.readouterr().err


def test_a_blocked_mirror_delays_nothing_and_loses_nothing(tmp_path, monkeypatch, capsys):
    gate = threading.Event()
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.5)
    fake = FakeWandb(monkeypatch, gate=gate)
    began = time.monotonic()
    tracker = open_tracker(tmp_path, mode="online")
    for step in range(1, 501):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0 and len(read(tmp_path)) == 500
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 2.0 and not fake.got
    gate.set()
    assert "not done after" in capsys.readouterr().err
    tracker._mirrors["wandb"]._thread.join(20)
    assert [step for step, _ in fake.got] == list(range(1, 501)) and fake.finished


def test_a_server_that_dies_is_reported_once(tmp_path, monkeypatch, capsys):
    FakeWandb(monkeypatch, log_fails=True)
    tracker = open_tracker(tmp_path, mode="online")
    for step in range(1, 50):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert capsys.readouterr().err.count("\n") == 1 and len(read(tmp_path)) == 49
