"""The processes that `accelerate launch` started, and whether they are those that were asked for."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from .config import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

TWO_PROCESSES = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no -m ..."
)


def build_accelerator() -> Accelerator:
    """The `Accelerator` that `accelerate launch` asked for. Raises `UserError` if fewer processes were started."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    # Buffers (an EMA codebook) are kept equal by the models themselves; broadcasting them would undo nothing but time.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    asked = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "MASTER_ADDR" in os.environ
    if accelerator.num_processes == 1 and asked:
        raise UserError(
            "several processes were asked for, but only one was started (accelerate's --cpu does that); "
            f"on CPU use: {TWO_PROCESSES}"
        )
    if accelerator.mixed_precision == "fp16":
        raise UserError("fp16 is not supported (its loss scaling hides non-finite steps); use --mixed_precision bf16")
    return accelerator
