"""Tiny runs of the real commands, in this process or in others, and helpers that read their results."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from pipelines.config.command import parse
from pipelines.images import loading
from pipelines.metrics.codebook import CodebookUse
from pipelines.tokens import TokenDataset, TokenSplit
from pipelines.tokens.meta import label_column
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_prior import run as run_prior
from pipelines.train_tokenizer import TrainTokenizerConfig
from pipelines.train_tokenizer import run as run_tokenizer
from prior.given import Given
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
DIGITS = functools.cache(loading.open_digits)  # parsed once for all runs
CLOCK = {"images_per_second", "tokens_per_second", "minutes"}  # metrics that differ between equal runs

MACHINE = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # options of `accelerate launch`

COMMON = {
    "track.wandb": "disabled",
    "train.steps": 12,
    "train.batch_size": 16,
    "train.warmup_steps": 4,
    "train.log_every": 1,
    "train.save_every": 1000,
    "train.evaluate_every": 1000,
    "train.preview_every": 1000,
}
EMA = {"kind": "ema", "codes": 16, "dim": 8}
VQVAE = {"kind": "vqvae", "widths": [16], "blocks": [1], "quantizer": EMA}
GPT = {"kind": "gpt", "dim": 32, "depth": 2, "heads": 2}
TOKENIZER = {"data.limit": 72, "model": VQVAE, "train.lr": 2e-3}
PRIOR = {"model": GPT, "train.lr": 4e-3}


def arguments(values: dict[str, Any]) -> list[str]:
    """Command-line arguments `key=value`."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def tokenizer_arguments(out: Path, **more: Any) -> list[str]:
    """The command line of a tiny run of stage one; `a__b` in `more` means `a.b`."""
    return arguments({"out": str(out), **COMMON, **TOKENIZER, **dotted(more)})


def prior_arguments(out: Path, tokens: Path, **more: Any) -> list[str]:
    """The command line of a tiny run of stage two."""
    return arguments({"out": str(out), "tokens": str(tokens), **COMMON, **PRIOR, **dotted(more)})


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `__` in keys by dots."""
    return {key.replace("__", "."): value for key, value in values.items()}


def train_tokenizer(out: Path, charts: bool = False, **more: Any) -> Path:
    """Train in this process. `charts`: draw the chart of the codebook, which is slow."""
    argv = tokenizer_arguments(out, **more)
    drawn = nullcontext() if charts else patch.object(CodebookUse, "picture", blank)
    with drawn, patch.object(loading, "open_digits", DIGITS):
        return run_tokenizer(parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description=None))


def train_prior(out: Path, tokens: Path, **more: Any) -> Path:
    """Train in this process."""
    argv = prior_arguments(out, tokens, **more)
    return run_prior(parse(TrainPriorConfig, argv, verb="train_prior", description=None))


def blank(*_: object, **__: object) -> np.ndarray:
    """An empty picture: drawing takes a third of a tiny run, and is tested elsewhere."""
    return np.full((8, 8, 3), 255, dtype=np.uint8)


def train_stage(stage: str, out: Path, tokens: Path, **more: Any) -> Path:
    """Train one of the two stages, by the name of its command."""
    return train_prior(out, tokens, **more) if stage == "train_prior" else train_tokenizer(out, **more)


def make_tokens(
    folder: Path, rows: int = 72, kind: str = "vqvae", classes: int = 3, quantizer: dict[str, Any] | None = None
) -> Path:
    """Write a token dataset with a pattern per class, in which a tenth of the ids are noise."""
    config = {**VQVAE, **({"quantizer": quantizer} if quantizer else {})} if kind == "vqvae" else {"kind": kind}
    choices = {key: value for key, value in config.items() if key != "kind"}
    tokenizer = Tokenizer.create(kind, image_size=(28, 28), channels=1, **choices)
    grid, generator = tokenizer.grid, torch.Generator().manual_seed(0)

    def split(count: int) -> TokenSplit:
        labels = torch.arange(count) % max(1, classes)
        ids = (labels[:, None] * 5 + torch.arange(len(grid)) // 7) % grid.vocab_size
        noise = torch.randint(grid.vocab_size, ids.shape, generator=generator)
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.1, noise, ids)
        given = Given(columns, {"label": labels} if classes else {}, count)
        return TokenSplit(ids.reshape(count, *grid.shape), given)

    columns = label_column([f"class {number}" for number in range(classes)])
    splits = {"train": split(rows), "test": split(24), "validation": split(24)}
    TokenDataset(grid, columns, splits, tokenizer, {}).save(folder)
    return folder


# Child processes


def environment(**more: str) -> dict[str, str]:
    """The environment of child processes: one thread, CPU, this interpreter's commands first, no launcher variables."""
    outside = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in outside}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
    return {**clean, "PATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    """Start a command in the repository root and capture its output."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_of(process: subprocess.Popen[str], seconds: float = 200, code: int | None = 0) -> str:
    """Wait for a process and return its output; fails on a timeout or another exit code."""
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"still running after {seconds} s: {' '.join(process.args)}") from None  # type: ignore[arg-type]
    assert code is None or process.returncode == code, f"exit code {process.returncode}:\n{printed}"
    return printed


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, if they still run."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.kill()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def verb(name: str, argv: list[str]) -> list[str]:
    """The command that runs a verb in one process."""
    return [sys.executable, "-m", f"pipelines.{name}", *argv]


def launched(options: list[str], *what: str) -> list[str]:
    """An `accelerate launch` command on a free port."""
    return ["accelerate", "launch", *options, "--main_process_port", str(free_port()), *what]


def two_processes(name: str, argv: list[str], count: int = 2) -> list[str]:
    """The documented command for two or more processes on the CPU."""
    return launched(["--multi_gpu", "--num_processes", str(count), *MACHINE], "-m", f"pipelines.{name}", *argv)


def free_port() -> int:
    """Find a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Results of a run


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exact(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without timings."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(run)]


def losses(run: Path, name: str = "loss") -> list[float]:
    """One metric of each step."""
    return [line[name] for line in metrics(run) if name in line]


def states(run: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted((run / "state").glob("step-*"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files and torch checkpoints below `folder`, by file and name."""
    found = {
        f"{path.relative_to(folder)}:{key}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }
    for index in sorted(folder.rglob(".metadata")):
        place = index.parent.relative_to(folder)
        found |= {f"{place}:{key}": value for key, value in checkpoint_tensors(index.parent).items()}
    return found


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The unsharded tensors of a torch checkpoint."""
    reader = dcp.FileSystemReader(folder)
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    found = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in sorted(described.items())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading without a process group
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert equal names and bits."""
    assert sorted(found) == sorted(expected) and expected
    different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    """Assert equal names and nearly equal values."""
    assert list(found) == list(expected) and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 200) -> bool:
    """Poll until `condition()` holds (True) or the process has ended (False); fails after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    end(process)
    raise AssertionError(f"the condition did not hold within {seconds} s")
