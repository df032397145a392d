"""Repeated blocks of a model: the units of gradient checkpointing, `torch.compile` and FSDP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import UserError
from .schedule import TrainConfig


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated modules: members of `ModuleList`s, and members of `Sequential`s that share their
    class with another member.

    A block has parameters and submodules; a single layer is too small. Modules with statistics in buffers (a codebook,
    a batch norm) are excluded, because a second forward pass would change them.
    """
    blocks, kinds = list[nn.Module](), Counter(type(child) for child in model.children())
    for child in model.children():
        repeated = isinstance(model, nn.ModuleList) or (isinstance(model, nn.Sequential) and kinds[type(child)] > 1)
        blocks += [child] if repeated and _is_block(child) else repeated_blocks(child)
    return blocks


def prepare_blocks(nets: Iterable[nn.Module], config: TrainConfig) -> None:
    """Compile and checkpoint the blocks of `nets` according to `config`. Raises `UserError` if there are none."""
    blocks = [block for net in nets for block in repeated_blocks(net)]
    for name in ("checkpointing", "compile"):
        if getattr(config, name) and not blocks:
            raise UserError(f"train.{name}: this model has no repeated blocks; leave it false")
    if config.compile:
        compile_blocks(blocks)
    if config.checkpointing:
        checkpoint_blocks(blocks)


def compile_blocks(blocks: Sequence[nn.Module], backend: Any = "inductor") -> None:
    """Compile each block in place. Blocks of one shape share code, so only the first takes time to compile. Weights
    keep their names. Compiled dropout draws different numbers from eager dropout.

    This compiles the method instead of the module, so that FSDP's hooks are not traced.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False, backend=backend)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Recompute each block's forward pass in the backward pass (Chen et al. 2016). Dropout draws the same numbers
    again, and weights keep their names. Call this last."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _is_block(module: nn.Module) -> bool:
    made_of_modules = any(True for _ in module.children()) and not isinstance(module, (nn.ModuleList, nn.Sequential))
    statistics = set(module.state_dict()) - {name for name, _ in module.named_parameters()}
    return made_of_modules and any(True for _ in module.parameters()) and not statistics
