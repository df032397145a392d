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
TIMEOUT = 1800.0  # seconds that processes wait for each other
PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
LAUNCHERS = (PRECISION, "WORLD_SIZE", "RANK", "MASTER_ADDR")  # set by launchers for each process
DEVICES = ("cpu", "cuda", "mps", "xpu")
FSDP2 = "use FSDP2, which shards weights, gradients and moments (--use_fsdp --fsdp_version 2)"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed is not supported: {FSDP2}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM is not supported: {FSDP2}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"parallelism_config is not supported: {FSDP2}",
}
"""Variables by which a launcher asks for unsupported features. Refused at the start, because accelerate would accept
them and train something else."""


def require_supported() -> None:
    """Raise `UserError` if the launcher asks for an unsupported feature."""
    for variable, problem in REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(problem)
    if os.environ.get(PRECISION, "").lower() == "fp8":
        raise UserError("fp8 is not supported: use --mixed_precision bf16, or no")
    if (steps := os.environ.get(ACCUMULATION, "1")) != "1":
        raise UserError(
            f"{ACCUMULATION}={steps}: accelerate would divide gradients by it; use train.accumulate instead"
        )


def build_accelerator(timeout: float = TIMEOUT, mixed_precision: str | None = None) -> Accelerator:
    """Return the `Accelerator` that `accelerate launch` asked for; processes wait `timeout` seconds for each other.

    mixed_precision: overrides the launcher's. Raises `UserError` if fewer processes were started than requested, and
    for unsupported features.
    """
    require_supported()
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
    if accelerator.device.type not in DEVICES:
        raise UserError(
            f"devices of type {accelerator.device.type} (a TPU is xla) are not supported: use a GPU, or the CPU with "
            "ACCELERATE_USE_CPU=true"
        )
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
    """Return the group of an accelerator's processes."""
    return ProcessGroup(accelerator.process_index, accelerator.num_processes)


def group_of_hosts(accelerator: Accelerator, timeout: float) -> Any:
    """Return a torch process group (gloo) that needs no GPU and times out after `timeout` seconds; None, the default
    group, if that is already one, or for a single process."""
    if accelerator.num_processes == 1 or accelerator.device.type == "cpu":
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


@contextmanager
def join_group(device: str) -> Iterator[tuple[ProcessGroup, torch.device]]:
    """Yield the processes that share a command's work, and this one's device. Without a launcher, that is this process
    alone on the requested device, and accelerate, whose import takes seconds, is not loaded. Raises `UserError` for an
    unavailable device, and as `build_accelerator` does."""
    if not any(name in os.environ for name in LAUNCHERS):
        yield ALONE, choose_device(device)
        return
    accelerator = build_accelerator()
    group = group_of(accelerator)
    with leave_after_refusal(accelerator):
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
def leave_after_refusal(accelerator: Accelerator) -> Iterator[None]:
    """Leave the process group after a user's mistake: gloo may abort a process that exits without doing so."""
    try:
        yield
    except (UserError, PipelineLoadError):
        accelerator.end_training()
        raise


# Precision -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """`mixed` is accelerate's `no` or `bf16`; `reason` explains it, unless the launcher chose."""

    mixed: str
    reason: str = ""


def choose_precision(asked: Literal["auto", "no", "bf16"] | None, before: str | None) -> Precision:
    """Choose the precision of a run. asked: `train.mixed_precision`; None: the launcher's choice, auto: the fastest of
    this machine.

    before: the precision so far of a resumed run, which auto keeps on any machine, because the other precision gives
    other weights. Raises `UserError`.
    """
    if asked is None:
        launched = os.environ.get(PRECISION, "no").lower()
        if launched not in ("no", "bf16"):
            raise UserError(f"{launched} is not supported: use --mixed_precision bf16, or no")
        return Precision(launched)
    if asked != "auto":
        return Precision(asked, "train.mixed_precision")
    found, reason = fast_precision()
    if before and before != found:
        return Precision(before, f"auto: as before; this machine would use {found}: {reason}")
    return Precision(found, f"auto: {reason}")


def fast_precision() -> tuple[str, str]:
    """Return the fastest precision of this machine, and the reason."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if torch.cuda.is_available() and not on_cpu:
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU supports it") if has else ("no", "this GPU has no bf16")
    on_mps = torch.backends.mps.is_available() and not on_cpu
    if feature := "" if on_mps else bf16_of_cpu():
        return "bf16", f"this CPU has {feature}"
    return "no", "no AMX or AVX512-BF16"


def bf16_of_cpu() -> str:
    """Return this CPU's bfloat16 instructions, AMX or AVX512-BF16; empty without them, or if ATEN_CPU_CAPABILITY rules
    them out."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def float32_advice(precision: str, has_bf16: bool) -> str:
    """Return advice to use bf16, for float32 on a GPU that supports bf16; otherwise empty."""
    if precision != "no" or not has_bf16:
        return ""
    return (
        "computing in float32: bf16, which this GPU supports, takes about a fifth of the time and half the memory for "
        "activations; set train.mixed_precision=auto, or use `accelerate launch --mixed_precision bf16`"
    )
