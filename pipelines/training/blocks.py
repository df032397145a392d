"""The repeated blocks of a model: what gradient checkpointing recomputes, `torch.compile` compiles and FSDP shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import UserError
from .schedule import TrainConfig


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of the model's `ModuleList`s, and those of its `Sequential`s whose class comes there twice.

    A block has parameters and is made of other modules: a single layer is not worth a call of its own. One that keeps
    statistics in buffers (a codebook's, a batch norm's) is left out, as a forward pass changes it.
    """
    return list(_blocks(model))


def prepare_blocks(nets: Iterable[nn.Module], config: TrainConfig) -> None:
    """Compile and checkpoint the blocks of `nets`, as `config` asks. Raises `UserError` if there are none."""
    blocks = [block for net in nets for block in repeated_blocks(net)]
    for name in ("checkpointing", "compile"):
        if getattr(config, name) and not blocks:
            raise UserError(f"train.{name}: this model has no repeated blocks; leave it false")
    if config.compile:
        compile_blocks(blocks)
    if config.checkpointing:
        checkpoint_blocks(blocks)


def compile_blocks(blocks: Sequence[nn.Module], backend: Any = "inductor") -> None:
    """Compile each block in place: blocks of one shape share their code, so compiling takes as long as for one. The
    names of the weights stay as they are. Compiled dropout draws other numbers than it does otherwise.

    It is the method that is compiled, not the module: what FSDP does before and after a block is not to be traced.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False, backend=backend)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Keep only the inputs of each block for the backward pass, which runs its forward pass again (Chen et al. 2016).
    Dropout draws the same numbers again; the names of the weights stay as they are. To be called last."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Go down until a block is found; nothing inside a block is one."""
    kinds = Counter(type(child) for child in module.children())
    for child in module.children():
        repeated = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and kinds[type(child)] > 1)
        if repeated and _is_block(child):
            yield child
        else:
            yield from _blocks(child)


def _is_block(module: nn.Module) -> bool:
    made_of_modules = any(True for _ in module.children()) and not isinstance(module, (nn.ModuleList, nn.Sequential))
    statistics = set(module.state_dict()) - {name for name, _ in module.named_parameters()}
    return made_of_modules and any(True for _ in module.parameters()) and not statistics
