"""What `accelerate launch`, or the file that `accelerate config` writes, asks of a run and no run here does.

Each is refused before any image is read, in a line that says what to use in its place: accelerate would begin, and end
hours later with something else than was asked for, or in a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from ..config import UserError

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"  # also of `accelerate launch --gradient_accumulation_steps`
PRECISION = "ACCELERATE_MIXED_PRECISION"
SHARDING = "use FSDP2, which shards weights, gradients and moments (`--use_fsdp --fsdp_version 2`)"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", SHARDING),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", SHARDING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config (of tensors, contexts, experts)", SHARDING),
}
"""Variables by which the launcher tells its processes; what they ask for; and what to do."""
DEVICES = ("cpu", "cuda", "mps", "xpu")


def require_supported(environment: Mapping[str, str] | None = None) -> None:
    """Raise `UserError` for what the launcher asked for and the loop does not do.

    environment: that of this process unless given. It is looked up at each call: after a map in several processes,
    `datasets` puts another object in the place of `os.environ`.
    """
    environment = os.environ if environment is None else environment
    for variable, (name, instead) in REFUSED.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(f"{name} is not supported: {instead}")
    if environment.get(PRECISION, "").lower() == "fp8":
        raise UserError("fp8 is not supported (no run was tested in it): use --mixed_precision bf16")
    steps = environment.get(ACCUMULATION, "1")
    if steps != "1":
        raise UserError(
            f"{ACCUMULATION}={steps}: accelerate would divide gradients by it; unset it, and use train.accumulate="
        )


def require_known(device: torch.device) -> None:
    """Raise `UserError` for a device that accelerate finds and no code here was written for, as a TPU is."""
    if device.type not in DEVICES:
        raise UserError(
            f"a device of type {device.type} (a TPU is xla) is not supported: use a GPU, or the CPU by "
            "ACCELERATE_USE_CPU=true"
        )
