"""FSDP2: each process keeps a shard of every weight, its gradient, its moments and its average.

Enable it in accelerate's configuration, or with `accelerate launch --use_fsdp --fsdp_version 2`. torch's `fully_shard`
does the sharding, so the same command also shards on CPUs (gloo), where accelerate would silently replicate. Sources:
Zhao et al. 2023 (FSDP), Rajbhandari et al. 2020 (ZeRO).
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import UserError
from .blocks import repeated_blocks
from .task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def is_sharding(accelerator: Accelerator) -> bool:
    """Return whether to shard the weights. Raises `UserError` for unsupported requests: FSDP 1, a mixed precision other
    than bf16, and accelerate's own compilation and checkpointing."""
    if not is_set("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP 1 is not supported: use --fsdp_version 2, or fsdp_version: 2 in accelerate's settings")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"FSDP needs --mixed_precision no or bf16 (got {accelerator.mixed_precision})")
    if is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing: use train.checkpointing=true instead")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("--dynamo_backend: with FSDP use train.compile=true instead")
    return torch.distributed.is_initialized()  # one process has nothing to shard


def require_shardable(task: Task) -> None:
    if not task.shardable:
        raise UserError(
            "FSDP supports only priors: a tokenizer, with its codebook and critic, is replicated; launch this verb "
            "without FSDP, as configs/accelerate/eight_gpus.yaml does"
        )


def shard(task: Task, average: nn.Module, accelerator: Accelerator) -> nn.Module | None:
    """Shard the task's model and its average in place, onto the accelerator's device.

    Return an unsharded copy of the average on the CPU, to gather weights into, on the main process; None elsewhere.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    # The warning is about in-place changes of block outputs, which our models do not make.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    copied = copy.deepcopy(average) if accelerator.is_main_process else None
    options = _make_options(accelerator)
    _shard_blocks(task.model, options)
    _shard_blocks(average, {key: value for key, value in options.items() if key != "mp_policy"})
    for model, method in ((task.model, "encode_given"), (average, "encode_given"), (average, "log_prob")):
        register_fsdp_forward_method(model, method)
    found = dict(task.model.named_parameters())
    task.param_groups = {key: [found[names[p]] for p in parameters] for key, parameters in task.param_groups.items()}
    if accelerator.mixed_precision == "bf16":
        precise = torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
        task.model.forward, task.model.encode_given = precise(task.model.forward), precise(task.model.encode_given)
    return copied


def offloads_to_cpu() -> bool:
    return is_set("FSDP_OFFLOAD_PARAMS")


def is_set(variable: str, default: str = "false") -> bool:
    """Return whether an environment variable of accelerate's launcher is true."""
    return os.environ.get(variable, default).lower() == "true"


def _make_options(accelerator: Accelerator) -> dict[str, Any]:
    """Return the options of `fully_shard`. Weights are stored and gradients reduced in float32; with bf16, weights are
    gathered and used in bfloat16. Inputs, such as positions, keep their precision; autocast casts them where needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    options: dict[str, Any] = {"mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,))}
    if accelerator.mixed_precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if offloads_to_cpu():
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=accelerator.device.type != "cpu")
    return options


def _shard_blocks(model: nn.Module, options: dict[str, Any]) -> None:
    """Shard each block separately; weights outside blocks stay gathered until the backward pass."""
    from torch.distributed.fsdp import fully_shard

    reshard = is_set("FSDP_RESHARD_AFTER_FORWARD", "true")
    for block in repeated_blocks(model):
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
