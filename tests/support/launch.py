"""Tiny runs of the real verbs, in this process or in others, and what they leave behind."""

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
from pipelines.images import tables
from pipelines.metrics.codebook import CodebookUse
from pipelines.tokens import TokenDataset, TokenSplit
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_prior import run as run_prior
from pipelines.train_tokenizer import TrainTokenizerConfig
from pipelines.train_tokenizer import run as run_tokenizer
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
DIGITS = functools.cache(tables.digits)  # parsed once, whatever the number of runs
CLOCK = {"images_per_second", "tokens_per_second", "minutes"}  # what no two runs have in common

MACHINE = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # as `accelerate launch` says it

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
    """`key=value` for each."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def tokenizer_arguments(out: Path, **more: Any) -> list[str]:
    """The command line of a tiny run of stage one; in `more`, `a__b` stands for `a.b`."""
    return arguments({"out": str(out), **COMMON, **TOKENIZER, **dotted(more)})


def prior_arguments(out: Path, tokens: Path, **more: Any) -> list[str]:
    """The command line of a tiny run of stage two."""
    return arguments({"out": str(out), "tokens": str(tokens), **COMMON, **PRIOR, **dotted(more)})


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    """`a__b` as `a.b`."""
    return {key.replace("__", "."): value for key, value in values.items()}


def train_tokenizer(out: Path, charts: bool = False, **more: Any) -> Path:
    """Train in this process, without the chart of the codebook unless `charts`; raises what the verb raises."""
    argv = tokenizer_arguments(out, **more)
    drawn = nullcontext() if charts else patch.object(CodebookUse, "picture", blank)
    with drawn, patch.object(tables, "digits", DIGITS):
        return run_tokenizer(parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description=None))


def train_prior(out: Path, tokens: Path, **more: Any) -> Path:
    """Train in this process; raises what the verb raises."""
    argv = prior_arguments(out, tokens, **more)
    return run_prior(parse(TrainPriorConfig, argv, verb="train_prior", description=None))


def blank(*_: object, **__: object) -> np.ndarray:
    """A picture on which nothing is drawn: drawing is a third of a tiny run, and has tests of its own."""
    return np.full((8, 8, 3), 255, dtype=np.uint8)


def train_stage(stage: str, out: Path, tokens: Path, **more: Any) -> Path:
    """Train one of the two stages, by the name of its verb."""
    return train_prior(out, tokens, **more) if stage == "train_prior" else train_tokenizer(out, **more)


def make_tokens(
    folder: Path, rows: int = 72, kind: str = "vqvae", classes: int = 3, quantizer: dict[str, Any] | None = None
) -> Path:
    """A token dataset with structure to learn: each class has its own pattern, and a tenth of the ids are noise."""
    config = {**VQVAE, **({"quantizer": quantizer} if quantizer else {})} if kind == "vqvae" else {"kind": kind}
    choices = {key: value for key, value in config.items() if key != "kind"}
    tokenizer = Tokenizer.create(kind, image_size=(28, 28), channels=1, **choices)
    grid, generator = tokenizer.grid, torch.Generator().manual_seed(0)

    def split(count: int) -> TokenSplit:
        labels = torch.arange(count) % max(1, classes)
        ids = (labels[:, None] * 5 + torch.arange(len(grid)) // 7) % grid.vocab_size
        noise = torch.randint(grid.vocab_size, ids.shape, generator=generator)
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.1, noise, ids)
        return TokenSplit(ids.reshape(count, *grid.shape), labels if classes else None)

    names = [f"class {number}" for number in range(classes)]
    splits = {"train": split(rows), "test": split(24), "validation": split(24)}
    TokenDataset(grid, names, splits, tokenizer, {}).save(folder)
    return folder


# Other processes


def environment(**more: str) -> dict[str, str]:
    """One thread, CPU, and this environment's commands first; no launcher's variables from outside."""
    outside = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in outside}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
    return {**clean, "PATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    """The command, started from the project's root with its output kept."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_of(process: subprocess.Popen[str], seconds: float = 200, code: int | None = 0) -> str:
    """What it prints until it ends; fails if it hangs or ends with another exit code."""
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"no end after {seconds} s: {' '.join(process.args)}") from None  # type: ignore[arg-type]
    assert code is None or process.returncode == code, f"exit code {process.returncode}:\n{printed}"
    return printed


def end(process: subprocess.Popen[str]) -> None:
    """Kill it and what it has started, if they still run."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.kill()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def verb(name: str, argv: list[str]) -> list[str]:
    """The command of one process."""
    return [sys.executable, "-m", f"pipelines.{name}", *argv]


def launched(options: list[str], *what: str) -> list[str]:
    """The command of several processes that `accelerate launch` starts, on a port that is free."""
    return ["accelerate", "launch", *options, "--main_process_port", str(free_port()), *what]


def two_processes(name: str, argv: list[str], count: int = 2) -> list[str]:
    """The documented command of two processes on the CPU, or of more."""
    return launched(["--multi_gpu", "--num_processes", str(count), *MACHINE], "-m", f"pipelines.{name}", *argv)


def one_launched(name: str, argv: list[str]) -> list[str]:
    """The command of one process that `accelerate launch` starts."""
    return ["accelerate", "launch", "--num_processes", "1", *MACHINE, "-m", f"pipelines.{name}", *argv]


def kill_the_second(process: subprocess.Popen[str], ready: Any) -> list[psutil.Process]:
    """Once `ready()`, kill the second of the processes that were launched; the others have to end too. All of them."""
    try:
        assert wait_for(ready, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        (second,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
        second.kill()
        output_of(process, 60, code=None)
    finally:
        end(process)
    assert process.returncode != 0
    return workers


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What a run leaves


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exact(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what a clock says."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(run)]


def losses(run: Path, name: str = "loss") -> list[float]:
    """One figure, step by step."""
    return [line[name] for line in metrics(run) if name in line]


def states(run: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted((run / "state").glob("step-*"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file below `folder`, and of every checkpoint of torch, by file and name."""
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
    """The tensors of a checkpoint of torch, whole, whichever number of processes has written it."""
    reader = dcp.FileSystemReader(folder)
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    found = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in sorted(described.items())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads alone
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, and the same bits."""
    assert list(found) == list(expected) and expected
    different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


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
    raise AssertionError(f"nothing happened in {seconds} s")
