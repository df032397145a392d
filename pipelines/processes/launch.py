"""Set-up of processes started by `accelerate launch`: supported options, devices and precision."""

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
TIMEOUT = 7 * 86400.0  # seconds: shares of a long command end hours apart, and torchrun stops those of a dead process
PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
LAUNCHERS = (PRECISION, "WORLD_SIZE", "RANK", "MASTER_ADDR")  # set by launchers for each process
FSDP2 = "use FSDP2, which shards weights, gradients and moments (--use_fsdp --fsdp_version 2)"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed is not supported: {FSDP2}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM is not supported: {FSDP2}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"parallelism_config is not supported: {FSDP2}",
}
"""Variables with which a launcher requests unsupported features. They are refused at the start, because accelerate
would accept them silently and train differently."""


def build_accelerator(timeout: float = TIMEOUT, mixed_precision: str | None = None) -> Accelerator:
    """Build the `Accelerator` that `accelerate launch` requested. timeout: seconds that processes wait for each other.

    mixed_precision: overrides the launcher's setting. Raises `UserError` for unsupported features, and if fewer
    processes started than were requested.
    """
    for variable, problem in REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(problem)
    if (steps := os.environ.get(ACCUMULATION, "1")) != "1":
        raise UserError(f"{ACCUMULATION}={steps}: accelerate would divide gradients by it; use train.accumulate")
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|accelerate")
    # Models keep their buffers (an EMA codebook) equal themselves, so broadcasting them is wasted time. Gradients as
    # views of DDP's buckets are stored once instead of twice.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    if mixed_precision and AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state()  # an earlier run in this process used another precision
    accelerator = Accelerator(kwargs_handlers=[ddp, waiting], mixed_precision=mixed_precision)
    if accelerator.device.type == "xla":
        raise UserError("TPUs are not supported: use a GPU, or the CPU with ACCELERATE_USE_CPU=true")
    world = os.environ.get("WORLD_SIZE")
    # If accelerate's launcher starts one process although several were requested, it still sets an address.
    several = int(world) > 1 if world else {"MASTER_ADDR", PRECISION} <= set(os.environ)
    if accelerator.num_processes == 1 and several:
        raise UserError(
            "several processes were requested, but only one was started (as accelerate does with --cpu, or without "
            f"GPUs); on CPUs use: {TWO_PROCESSES}"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"{accelerator.mixed_precision} is not supported: use --mixed_precision bf16, or no")
    return accelerator


def group_of(accelerator: Accelerator) -> ProcessGroup:
    return ProcessGroup(accelerator.process_index, accelerator.num_processes)


def make_cpu_group(accelerator: Accelerator, timeout: float) -> Any:
    """Create a torch process group (gloo) that communicates between CPUs and times out after `timeout` seconds. Return
    None, the default group, for a single process, or if the default group already uses CPUs."""
    if accelerator.num_processes == 1 or accelerator.device.type == "cpu":
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


@contextmanager
def join_group(device: str) -> Iterator[tuple[ProcessGroup, torch.device]]:
    """Yield the group of processes that share a command's work, and this process's device.

    Without a launcher, yield a single process on the requested device, and do not import accelerate, which takes
    seconds. Raises `UserError` for an unavailable device, and like `build_accelerator`."""
    if not any(name in os.environ for name in LAUNCHERS):
        yield ALONE, choose_device(device)
        return
    accelerator = build_accelerator()
    group = group_of(accelerator)
    with leave_group_on_error(accelerator):
        yield group, group.main_first(lambda: own_device(device, accelerator.device, group))
    accelerator.end_training()


def own_device(name: str, given: torch.device, group: ProcessGroup) -> torch.device:
    """Return the device that accelerate chose; for a single process, the requested one. Raises `UserError` if several
    processes request another device."""
    if name in ("auto", given.type):
        return torch.device("cpu") if given.type == "cpu" else given  # accelerate calls it `cpu:0`
    if group.world > 1:
        raise UserError(f"device: {name!r}: accelerate chose {given.type} for its processes; leave it auto")
    return choose_device(name)


@contextmanager
def leave_group_on_error(accelerator: Accelerator) -> Iterator[None]:
    """Leave the process group if the block raises a user's mistake: gloo may abort a process that exits inside a
    group."""
    try:
        yield
    except (UserError, PipelineLoadError):
        accelerator.end_training()
        raise


# Precision -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """mixed: accelerate's `no` or `bf16`. reason: why; empty if the launcher chose it."""

    mixed: str
    reason: str = ""


def choose_precision(asked: Literal["auto", "no", "bf16"] | None, before: str | None) -> Precision:
    """Choose the precision of a run. asked: `train.mixed_precision`; None keeps the launcher's choice, auto picks the
    fastest precision of this machine.

    before: the previous precision of a resumed run. auto keeps it on any machine, because another precision would give
    other weights. Raises `UserError`.
    """
    if asked is None:
        launched = os.environ.get(PRECISION, "no").lower()
        if launched not in ("no", "bf16"):
            raise UserError(f"{launched} is not supported: use --mixed_precision bf16, or no")
        return Precision(launched)
    if asked != "auto":
        return Precision(asked, "train.mixed_precision")
    found, reason = find_fastest_precision()
    if before and before != found:
        return Precision(before, f"auto: as before; this machine would use {found}: {reason}")
    return Precision(found, f"auto: {reason}")


def find_fastest_precision() -> tuple[str, str]:
    """Return the fastest precision of this machine, and the reason."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if torch.cuda.is_available() and not on_cpu:
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU supports it") if has else ("no", "this GPU has no bf16")
    on_mps = torch.backends.mps.is_available() and not on_cpu
    if feature := "" if on_mps else detect_cpu_bf16():
        return "bf16", f"this CPU has {feature}"
    return "no", "no AMX or AVX512-BF16"


def detect_cpu_bf16() -> str:
    """Return this CPU's bfloat16 instructions, AMX or AVX512-BF16; empty if it has neither, or if ATEN_CPU_CAPABILITY
    disables them."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def recommend_bf16(precision: str, has_bf16: bool) -> str:
    """Recommend bf16 for a float32 run on a GPU that supports bf16; otherwise return an empty string."""
    if precision != "no" or not has_bf16:
        return ""
    return (
        "computing in float32: bf16, which this GPU supports, takes about a fifth of the time and half the memory for "
        "activations; set train.mixed_precision=auto, or use `accelerate launch --mixed_precision bf16`"
    )
