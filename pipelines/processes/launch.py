"""What `accelerate launch` started: whether it is supported, this process's device, and the precision of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch

from tokenizer.files import PipelineLoadError

from ..config import UserError, choose_device
from .group import ALONE, ProcessGroup

if TYPE_CHECKING:
    from accelerate import Accelerator

TWO_PROCESSES = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no -m ..."
)
TIMEOUT = 1800.0  # seconds that processes wait for each other
PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
LAUNCHERS = (PRECISION, "WORLD_SIZE", "RANK", "MASTER_ADDR")  # what launchers set for each process
DEVICES = ("cpu", "cuda", "mps", "xpu")
FSDP2 = "use FSDP2, which shards weights, gradients and moments (--use_fsdp --fsdp_version 2)"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed is not supported: {FSDP2}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM is not supported: {FSDP2}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"parallelism_config is not supported: {FSDP2}",
}
"""Variables by which the launcher asks for what no run here does: refused before any image is read, as accelerate would
begin, and end hours later with something else than was asked for."""


def require_supported() -> None:
    """Raise `UserError` for what the launcher asked for and no run here does."""
    for variable, problem in REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(problem)
    if os.environ.get(PRECISION, "").lower() == "fp8":
        raise UserError("fp8 is not supported: use --mixed_precision bf16, or no")
    if (steps := os.environ.get(ACCUMULATION, "1")) != "1":
        raise UserError(f"{ACCUMULATION}={steps}: accelerate would divide gradients by it; use train.accumulate=")


def build_accelerator(timeout: float = TIMEOUT, mixed_precision: str | None = None) -> Accelerator:
    """Return the `Accelerator` that `accelerate launch` asked for; processes wait `timeout` seconds for each other.

    mixed_precision: in the place of what was asked for. Raises `UserError` if fewer processes were started than were
    asked for, and for what is not supported.
    """
    require_supported()
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|accelerate")
    # Buffers (an EMA codebook) are kept equal by the models themselves; broadcasting them would undo nothing but time.
    # Gradients that are views of the buckets from which they are sent are there once, not twice.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    if mixed_precision and AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state()  # of an earlier run in this process, in another precision
    accelerator = Accelerator(kwargs_handlers=[ddp, waiting], mixed_precision=mixed_precision)
    if accelerator.device.type not in DEVICES:
        raise UserError(
            f"a device of type {accelerator.device.type} (a TPU is xla) is not supported: use a GPU, or the CPU by "
            "ACCELERATE_USE_CPU=true"
        )
    world = os.environ.get("WORLD_SIZE")
    # The launcher of accelerate that starts one process shows by an address that several were asked for.
    several = int(world) > 1 if world else {"MASTER_ADDR", PRECISION} <= set(os.environ)
    if accelerator.num_processes == 1 and several:
        raise UserError(
            "several processes were asked for, but only one was started (accelerate's --cpu does that, and a machine "
            f"without GPUs); on CPU use: {TWO_PROCESSES}"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"{accelerator.mixed_precision} is not supported: use --mixed_precision bf16, or no")
    return accelerator


def group_of(accelerator: Accelerator) -> ProcessGroup:
    """Return its processes."""
    return ProcessGroup(accelerator.process_index, accelerator.num_processes)


def group_of_hosts(accelerator: Accelerator, timeout: float) -> Any:
    """Return torch's group of its processes in which no GPU takes part and which wait `timeout` seconds for each other;
    None, which is the group of all, where that is such a group, and for one process."""
    if accelerator.num_processes == 1 or accelerator.device.type == "cpu":
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


@contextmanager
def join_group(device: str) -> Iterator[tuple[ProcessGroup, torch.device]]:
    """Yield the processes that share a command's work, and this one's device: those of a launcher, each on its own
    device; or this process alone, on the one that was asked for, without the seconds that importing accelerate takes.
    Raises `UserError` for a device that is not there, and as `build_accelerator` does."""
    if not any(name in os.environ for name in LAUNCHERS):
        yield ALONE, choose_device(device)
        return
    accelerator = build_accelerator()
    group = group_of(accelerator)
    with leave_after_refusal(accelerator):
        yield group, group.main_first(lambda: own_device(device, accelerator.device, group))
    accelerator.end_training()


def own_device(name: str, given: torch.device, group: ProcessGroup) -> torch.device:
    """Return the device that accelerate gave this process; for one process alone, the one that was asked for. Raises
    `UserError` for another one for several processes."""
    if name in ("auto", given.type):
        return torch.device("cpu") if given.type == "cpu" else given  # and not `cpu:0`, as accelerate calls it
    if group.world > 1:
        raise UserError(f"device: {name!r}: accelerate chose {given.type} for its processes; leave it auto")
    return choose_device(name)


@contextmanager
def leave_after_refusal(accelerator: Accelerator) -> Iterator[None]:
    """Leave the process group after a user's mistake: a process that still has one when the interpreter ends may abort
    (gloo)."""
    try:
        yield
    except (UserError, PipelineLoadError):
        accelerator.end_training()
        raise


# Precision -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """`mixed` is accelerate's word for it, `no` or `bf16`; `reason` says why, where it is not the launcher's choice."""

    mixed: str
    reason: str = ""


def choose_precision(asked: Literal["auto", "no", "bf16"] | None, before: str | None) -> Precision:
    """Return what a run computes in. asked: `train.mixed_precision`; None leaves it to the launcher, auto to what the
    machine is fast in.

    before: what the run has computed in until now, if it has begun: with auto it keeps to that wherever it goes on, as
    the other precision gives other weights. Raises `UserError`.
    """
    if asked is None:
        launched = os.environ.get(PRECISION, "no").lower()
        if launched not in ("no", "bf16"):
            raise UserError(f"{launched} is not supported: use --mixed_precision bf16, or no")
        return Precision(launched)
    if asked != "auto":
        return Precision(asked, "as train.mixed_precision says")
    found, reason = fast_precision()
    if before and before != found:
        return Precision(before, f"auto: as it began; here it would be {found}, as {reason}")
    return Precision(found, f"auto: {reason}")


def fast_precision() -> tuple[str, str]:
    """Return the precision that this machine is fast in, and why."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if torch.cuda.is_available() and not on_cpu:
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has it") if has else ("no", "this GPU has no bf16")
    on_mps = torch.backends.mps.is_available() and not on_cpu
    if feature := "" if on_mps else bf16_of_cpu():
        return "bf16", f"this CPU has {feature}"
    return "no", "neither AMX nor AVX512-BF16 is there"


def bf16_of_cpu() -> str:
    """Return what of this CPU multiplies bfloat16, AMX or AVX512-BF16; empty where it has neither, or where
    ATEN_CPU_CAPABILITY forbids it."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def float32_advice(precision: str, has_bf16: bool) -> str:
    """Return what it costs to compute in float32 on a GPU that has bf16, and the option to give; empty otherwise."""
    if precision != "no" or not has_bf16:
        return ""
    return (
        "computing in float32: in bf16, which this GPU has, steps take about a fifth of the time and activations half "
        "the memory; train.mixed_precision=auto, or `accelerate launch --mixed_precision bf16`, asks for it"
    )
