"""Runs of two processes that share the weights out, and what they note of them after every step.

`accelerate launch` starts this file in each of the two, once (`sharded_runs.py basic FOLDER`).
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from launch import GPT, MACHINE, states, train_prior
from small import PRIORS, node_of
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from two_processes import digest, gathered, leave_group

from pipelines import ImagePipeline
from pipelines.config.command import RunError
from pipelines.train_prior import PriorTask
from pipelines.training import loop as training
from pipelines.training.checkpoints.sharded import piece

STEPS = 12
RUN = {"train__steps": STEPS, "train__save_every": 4, "train__evaluate_every": 6}
MUON = {**RUN, "train__optimizer": "muon"}
BUSY = {**RUN, "train__accumulate": 2, "model": {**GPT, "dropout": 0.2, "any_order": True}}
OTHERS = [name for name in PRIORS if name not in ("gpt", "marginal", "next_scale")]  # the last wants other tokens
TWO = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", *MACHINE]


class Interrupted(Exception):
    """The end of a run that is to be continued."""


def until(step: int, run: Any) -> None:
    """Run something that trains, and interrupt it before this step."""
    take_step = training.take_step

    def interrupted(now: Any, *rest: Any) -> None:
        if now.step == step:
            raise Interrupted
        take_step(now, *rest)

    training.take_step = interrupted
    try:
        run()
    except RunError as error:
        assert isinstance(error.__cause__, Interrupted)
    finally:
        training.take_step = take_step


def share(values: list[Any]) -> float:
    """The part of all numbers that this process holds, if all are in pieces."""
    held = sum(piece(value).numel() for value in values) / sum(value.numel() for value in values)
    return held if all(isinstance(value, DTensor) for value in values) else -1.0


class Watch:
    """Notes what both processes have after every step."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.take_step, self.batch = training.take_step, PriorTask.batch
        self.rows: list[int] = []

        def watched(run: Any, *rest: Any) -> None:
            self.take_step(run, *rest)
            weights, average = list(run.task.model.parameters()), list(run.averaged.module.parameters())
            moments = [
                o.state[parameter][name]
                for o in run.optimizers.values()
                for parameter in weights
                for name in ("exp_avg", "exp_avg_sq", "momentum")
                if name in o.state[parameter]
            ]
            wrapped = any(isinstance(net, nn.parallel.DistributedDataParallel) for net in run.task.nets.values())
            self.log.append(
                gathered(
                    {
                        "weights": digest(weights),
                        "average": digest(average),
                        "moments": digest(moments),
                        "shares": [share(part) for part in (weights, average, moments)],
                        "wrapped": wrapped,
                        "units": [
                            sum(isinstance(m, FSDPModule) for m in model.modules())
                            for model in (run.task.model, run.averaged.module)
                        ],
                    }
                )
            )

        def listed(task: Any, indices: Any, *rest: Any) -> Any:
            self.rows += indices.tolist()
            return self.batch(task, indices, *rest)

        training.take_step, PriorTask.batch = watched, listed  # type: ignore[method-assign]

    def take(self) -> dict[str, Any]:
        """What was noted since the last time; the rows of the first two steps, as both of them saw them."""
        log, rows = list(self.log), gathered(self.rows[:16])
        self.log.clear()
        self.rows.clear()
        return {"steps": log, "rows": rows}


def with_prior(name: str) -> dict[str, Any]:
    """A short run of a small prior of another kind."""
    return {"train__steps": 3, "model": node_of(name)}


def replicated(run: Any) -> None:
    """Run something that trains without sharding."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    try:
        run()
    finally:
        os.environ["ACCELERATE_USE_FSDP"] = "true"


def full_disk(folder: Path, tokens: Path) -> None:
    """A run during which the disk of the second process is full at step 4, and the main one's at step 8."""
    write, save = HuggingFaceStorageWriter.write_data, PriorTask.save

    def no_room(writer: Any, *rest: Any) -> Any:
        if dist.get_rank() == 1 and "step-00000004" in str(writer.path):
            raise OSError(errno.ENOSPC, "no room for shards")
        return write(writer, *rest)

    def no_snapshot(task: Any, model: Any, run: Path, facts: dict[str, Any]) -> None:
        if facts["steps"] == 8:
            raise OSError(errno.ENOSPC, "no room for a snapshot")
        save(task, model, run, facts)

    HuggingFaceStorageWriter.write_data, PriorTask.save = no_room, no_snapshot  # type: ignore[method-assign]
    try:
        train_prior(folder, tokens, **RUN)
    finally:
        HuggingFaceStorageWriter.write_data, PriorTask.save = write, save  # type: ignore[method-assign]


def corrupt(state: Path) -> str:
    """Change one byte of the second process's shard; its name."""
    (path,) = state.glob("ema/shard-00002*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path.name


class Runs:
    """Runs in one process group, below a folder, and what was noted of them."""

    def __init__(self, folder: Path) -> None:
        Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
        ImagePipeline.sample_picture = lambda *_, **__: np.zeros((8, 8, 3), np.uint8)  # type: ignore[method-assign]
        self.folder, self.watch = folder, Watch()
        self.found: dict[str, Any] = {}

    def run(self, name: str, of: dict[str, Any] = RUN, stop: int = -1) -> None:
        until(stop, lambda: train_prior(self.folder / name, self.folder / "tokens", **of))
        self.found[name] = self.watch.take()

    def basic(self) -> None:
        self.run("sharded")
        replicated(lambda: self.run("copied"))
        self.run("again", stop=10)
        before = self.found["again"]["steps"]
        if dist.get_rank() == 0:
            self.found["corrupt shard"] = corrupt(states(self.folder / "again")[-1])
        self.run("again")
        self.found["again"]["steps"] = before + self.found["again"]["steps"]
        self.run("muon", MUON, stop=10)
        before = self.found["muon"]["steps"]
        self.run("muon", MUON)
        self.found["muon"]["steps"] = before + self.found["muon"]["steps"]
        self.run("two to one", stop=10)
        self.run("one to two")

    def more(self) -> None:
        self.run("busy", BUSY)
        self.run("checkpointing", {**BUSY, "train__checkpointing": True})
        for name in OTHERS:
            self.run(name, with_prior(name))
        self.run("two to four", stop=10)
        self.run("sharded to copied", stop=10)
        replicated(lambda: self.run("sharded to copied"))
        replicated(lambda: self.run("copied to sharded", stop=10))
        self.run("copied to sharded")
        full_disk(self.folder / "full", self.folder / "tokens")
        compiled = {**RUN, "train__compile": True, "train__checkpointing": True}
        self.run("compiled", compiled)
        replicated(lambda: self.run("copied compiled", compiled))
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        AcceleratorState._reset_state()
        self.watch.take()
        self.run("bf16")
        replicated(lambda: self.run("copied bf16"))


def trainings(name: str, folder: Path) -> None:
    """The runs of one of the methods of `Runs`."""
    runs = Runs(folder)
    getattr(runs, name)()
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps({"world": dist.get_world_size(), **runs.found}))
    del runs
    gc.collect()  # as at the end of `train`: what still holds the group when the interpreter ends may abort it
    leave_group()


if __name__ == "__main__":
    trainings(sys.argv[1], Path(sys.argv[2]))
