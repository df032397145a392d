"""The real W&B client, and what can happen to its server and its disk: no run ends otherwise or later for it.

Covers: pipelines/tracking/wandb_run.py.
"""

from __future__ import annotations

import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from launch import (
    VQVAE,
    assert_equal_tensors,
    exact,
    free_port,
    metrics,
    output_of,
    start,
    tensors,
    tokenizer_arguments,
    train_tokenizer,
    wait_for,
)
from servers.wandb_server import WandbServer

STEPS, SIZE, ROUNDS = 1000, 64, 2
# The limits are constants, for nobody should need to set them: a program of the test's own makes them short.
PROGRAM = """
import sys
from pipelines.tracking import mirror, wandb_run
wandb_run.ANSWER_SECONDS, mirror.CLOSE_SECONDS = float(sys.argv[1]), float(sys.argv[2])
from pipelines.train_tokenizer import main
main(sys.argv[3:])
"""


Fault = Callable[[Path], AbstractContextManager[tuple[dict[str, str], Callable[[], None]]]]


class Run:
    """A training in another process."""

    def __init__(self, out: Path, choices: dict, limits: tuple[float, float], environment: dict[str, str]) -> None:
        self.out = out
        command = [sys.executable, "-c", PROGRAM, *map(str, limits), *tokenizer_arguments(out, **choices)]
        home = {"HOME": str(out.parent), "WANDB_API_KEY": "x" * 40}
        self.process = start(command, **home, **environment)

    def reached(self, step: int) -> bool:
        """Wait until the step is logged; False if the run is over."""
        return wait_for(lambda: last_step(self.out) >= step, self.process)


def last_step(run: Path) -> int:
    try:
        whole = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return -1
    return int(whole[-1].split(",")[0].split(":")[1].strip(" }")) if whole else -1


# The faults: what a run finds around itself, and what becomes of it


@contextmanager
def dead_port(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """Nobody listens."""
    yield {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}, lambda: None


@contextmanager
def black_hole(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """Connections are accepted, by the kernel, and never answered."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1000)
        yield {"WANDB_BASE_URL": f"http://127.0.0.1:{listening.getsockname()[1]}"}, lambda: None


@contextmanager
def killed_server(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """A server that takes what it gets, until it is killed: when the run has begun there."""
    with WandbServer() as server:

        def kill() -> None:
            until = time.monotonic() + 20
            while not server.started and time.monotonic() < until:
                time.sleep(0.01)
            server.kill()
            assert server.started, "it was killed before the run had begun"

        yield {"WANDB_BASE_URL": server.url}, kill


@contextmanager
def full_disk(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """A file system of 64 kB for W&B's folder, without a server."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield {"WANDB_DIR": str(disk), "WANDB_BASE_URL": "http://127.0.0.1:9"}, lambda: None
        assert os.statvfs(disk).f_bfree == 0, "the disk was not full"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def healthy_server(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """All is well: what a run online costs without a fault."""
    with WandbServer() as server:
        yield {"WANDB_BASE_URL": server.url}, lambda: None
        assert server.history


FAULTS = {
    dead_port: "online failed",
    black_hole: "online failed",
    killed_server: "the run was not finished|not done after",
    full_disk: "No space left on device",
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, one_process):
    """One process on the CPU, nothing of W&B from outside."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def start_and_strike(fault: Fault, folder: Path, choices: dict, limits: tuple[float, float], strike_at: int) -> str:
    """Train in `folder`/run while the fault lasts; returns what was printed. Fails if the run does, or hangs."""
    with fault(folder) as (environment, happen):
        mode = {"track__wandb": "offline"} if fault is full_disk else {"track__wandb": "online"}
        run = Run(folder / "run", {**choices, **mode}, limits, environment)
        if run.reached(strike_at):
            happen()
        return output_of(run.process, 200)


@pytest.mark.parametrize(
    "fault", [dead_port, *(pytest.param(other, marks=pytest.mark.slow) for other in FAULTS if other is not dead_port)]
)
def test_a_run_ends_well_and_the_same(tmp_path, fault):
    """Exit code 0 in bounded time; every figure and every bit of the weights as without W&B."""
    steps = 12 if fault is dead_port else 40  # the others need time to happen
    choices = {"train__steps": steps, "train__preview_every": steps // 2}
    plain = train_tokenizer(tmp_path / "plain", **choices)
    began = time.monotonic()
    limits = (20, 6) if fault is killed_server else (2, 30)  # those that the fault uses up are short
    printed = start_and_strike(fault, tmp_path, choices, limits, strike_at=steps // 2)
    assert time.monotonic() - began < 60  # 6 s on a quiet machine
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert all(line.startswith("warning: W&B: ") for line in warnings) and len(warnings) <= 3, printed
    assert "Traceback" not in printed and re.search(FAULTS[fault], "".join(warnings)), printed
    assert exact(tmp_path / "run") == exact(plain)
    assert_equal_tensors(tensors(tmp_path / "run" / "tokenizer"), tensors(plain / "tokenizer"))
    if fault in (dead_port, black_hole):
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


RESUMED = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from pipelines.tracking import TrackConfig, Tracker

run, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracker = Tracker(run, TrackConfig(wandb="online"), {}, accelerator=Accelerator(cpu=True), resume_step=first)
for step in range(first + 1, last + 1):
    tracker.log(step, {"loss": 1 / step})
tracker.close()
"""


@pytest.mark.slow
def test_what_the_server_lacks_is_sent_when_the_run_resumes(tmp_path):
    """Online, the server says what it has: that is not sent again, and no step of a killed process is lost."""
    record = tmp_path / "run" / "metrics.jsonl"
    with WandbServer() as server:
        for first, last, unsent in ((0, 10, (11, 12)), (5, 13, ()), (13, 15, ())):
            command = [sys.executable, "-c", RESUMED, str(record.parent), str(first), str(last)]
            printed = output_of(start(command, HOME=str(tmp_path), WANDB_API_KEY="x" * 40, WANDB_BASE_URL=server.url))
            assert printed == "W&B: online (track.wandb)\n"
            with record.open("a") as file:  # as if it had died after these, with the last in W&B's buffers
                file.writelines(f'{{"step": {step}, "loss": {1 / step}}}\n' for step in unsent)
        (history,) = server.history.values()
    assert [(line["_step"], line["loss"]) for line in history] == [(step, 1 / step) for step in range(1, 16)]


# Figures


def step_seconds(run: Path) -> tuple[float, float]:
    """Median over windows of ten steps, and mean over the whole run, of a step's seconds."""
    lines = [line for line in metrics(run) if "images_per_second" in line]
    windows = [SIZE / line["images_per_second"] for line in lines]
    return statistics.median(windows), 60 * lines[-1]["minutes"] / lines[-1]["step"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_step_time_with_every_fault(tmp_path):
    """With the limits as they are: a step takes less than 5 % longer than without W&B, and losses are the same."""
    choices = {
        "train__steps": STEPS,
        "train__log_every": 10,
        "train__preview_every": 250,
        "train__batch_size": SIZE,
        "model": {**VQVAE, "widths": [64]},
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for round_ in range(ROUNDS):
        for fault in (None, healthy_server, *FAULTS):
            name = fault.__name__ if fault else "disabled"
            folder = tmp_path / f"{name}-{round_}"
            folder.mkdir()
            if fault is None:
                output_of(Run(folder / "run", choices, (20, 15), {}).process, 200)
            else:
                start_and_strike(fault, folder, choices, (20, 15), strike_at=STEPS // 2)
            found.setdefault(name, []).append(step_seconds(folder / "run"))
            assert exact(folder / "run") == exact(tmp_path / "disabled-0" / "run"), name
    best = {name: [min(kind) for kind in zip(*rounds, strict=True)] for name, rounds in found.items()}
    plain = best.pop("disabled")
    print(f"disabled: median {1e3 * plain[0]:.2f} ms, mean {1e3 * plain[1]:.2f} ms a step")
    ratios = {
        name: [ours / theirs - 1 for ours, theirs in zip(times, plain, strict=True)] for name, times in best.items()
    }
    for name, (median, mean) in ratios.items():
        print(f"{name}: median {median:+.1%}, mean {mean:+.1%}")
    assert max(median for median, _ in ratios.values()) < 0.05
