"""The processes that `accelerate launch` started: whether they are those asked for, and what one does for all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ..config import UserError, choose_device
from .asked import require_known, require_supported
from .precision import VARIABLE
from .sharing import ALONE, Team

if TYPE_CHECKING:
    from accelerate import Accelerator

TWO_PROCESSES = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no -m ..."
)
TIMEOUT = 1800.0
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK", "MASTER_ADDR")  # what they say to each process


def build_accelerator(timeout: float = TIMEOUT, mixed_precision: str | None = None) -> Accelerator:
    """The `Accelerator` that `accelerate launch` asked for, whose processes wait `timeout` seconds for each other.

    mixed_precision: in the place of what was asked for. Raises `UserError` if fewer processes were started, or for what
    the loop does not do as accelerate would.
    """
    require_supported()
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|accelerate")
    # Buffers (an EMA codebook) are kept equal by the models themselves; broadcasting them would undo nothing but time.
    # Gradients that are views of the buckets from which they are sent are there once, not twice.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    if mixed_precision and AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state()  # of an earlier run in this process, in another precision
    accelerator = Accelerator(kwargs_handlers=[ddp, group], mixed_precision=mixed_precision)
    require_known(accelerator.device)
    world = os.environ.get("WORLD_SIZE")
    # The launcher of accelerate that starts one process says by an address that several were asked for.
    asked = int(world) > 1 if world else {"MASTER_ADDR", VARIABLE} <= set(os.environ)
    if accelerator.num_processes == 1 and asked:
        raise UserError(
            "several processes were asked for, but only one was started (accelerate's --cpu does that, and a machine "
            f"without GPUs); on CPU use: {TWO_PROCESSES}"
        )
    if accelerator.mixed_precision == "fp16":
        raise UserError("fp16 is not supported (its loss scaling hides non-finite steps); use --mixed_precision bf16")
    return accelerator


def team_of(accelerator: Accelerator) -> Team:
    """Its processes."""
    return Team(accelerator.process_index, accelerator.num_processes)


@contextmanager
def joined(device: str) -> Iterator[tuple[Team, torch.device]]:
    """The processes that share a command's work, and this one's device: those of a launcher, each on its own device; or
    this process alone, on the one that was asked for, without the seconds that it takes to import accelerate. Raises
    `UserError` for a device that is not there, and see `build_accelerator`."""
    if not any(name in os.environ for name in LAUNCHERS):
        yield ALONE, choose_device(device)
        return
    accelerator = build_accelerator()
    team = team_of(accelerator)
    with apart(accelerator):
        yield team, team.first_alone(lambda: own_device(device, accelerator.device, team))
    accelerator.end_training()


def own_device(name: str, given: torch.device, team: Team) -> torch.device:
    """The device that accelerate gave this process; for one process alone, the one that was asked for. Raises
    `UserError` for another one for several processes."""
    if name in ("auto", given.type):
        return torch.device("cpu") if given.type == "cpu" else given  # and not `cpu:0`, as accelerate calls it
    if team.world > 1:
        raise UserError(f"device: {name!r}: accelerate chose {given.type} for its processes; leave it auto")
    return choose_device(name)


@contextmanager
def apart(accelerator: Accelerator) -> Iterator[None]:
    """After a refusal processes part: one that still has a group of them when the interpreter ends may abort (gloo)."""
    try:
        yield
    except UserError:
        accelerator.end_training()
        raise
