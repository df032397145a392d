"""What a run needs of GPUs and disks, from the sizes of its models and the costs of their turns (`planning.costs`).

Bytes are those that the training loop keeps: weights, gradients, moments (AdamW's two, or Muon's one) and the averaged
weights, all in float32, and what autocast and the backward pass need besides. One GB is 10^9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from .costs import Turn

FLOAT32, BF16 = 4, 2  # bytes
STATES = 2  # checkpoints that a run keeps; a third is there while it is written
LABEL = 8  # bytes of a row of a token dataset
MOMENTS, FROZEN = "moments of the optimizer", "the frozen copy"
FULL = 0.9  # share of a GPU's memory to plan with: CUDA's context, NCCL and gaps between tensors take some


EXPECTED = {False: 0.2, True: 0.3}
"""The share of a GPU's peak that training is expected to reach, as it is and with `train.compile`: estimated operation
by operation for the ImageNet presets, and not measured yet."""


class GPU(NamedTuple):
    """Dense bf16 peak in TFLOP/s (no sparsity), and memory in GB, as its vendor publishes them."""

    tflops: float
    memory: float


GPUS = {
    "a100": GPU(312, 80),  # NVIDIA A100 datasheet, SXM
    "a100_40": GPU(312, 40),
    "h100": GPU(989, 80),  # NVIDIA H100 datasheet, SXM: half of its 1,979 with sparsity
    "h100_pcie": GPU(756, 80),  # likewise, half of 1,513
    "h200": GPU(989, 141),  # NVIDIA H200 datasheet, SXM
    "b200": GPU(2250, 180),  # NVIDIA HGX B200 datasheet, an eighth of the board
    "mi300x": GPU(1307, 192),  # AMD Instinct MI300X data sheet
    "l40s": GPU(362, 48),  # NVIDIA L40S datasheet
    "l4": GPU(121, 24),  # NVIDIA L4 datasheet, half of its 242 with sparsity
    "rtx4090": GPU(165, 24),  # NVIDIA Ada whitepaper, accumulating in float32
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of what a run keeps: parameters by part, shapes of all parameters, how many each player trains, bytes
    of all buffers and of those that are saved, the shapes of the parameters of each block, whether its states hold the
    best weights so far, the shapes of the parameters that move by Muon, and bytes of a frozen copy."""

    parts: dict[str, int]
    shapes: list[tuple[int, ...]]
    trained: dict[str, int]
    buffers: int
    saved_buffers: int
    blocks: list[list[tuple[int, ...]]]
    keeps_best: bool
    matrices: list[tuple[int, ...]] = field(default_factory=list)
    frozen: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(map(math.prod, self.shapes))

    @property
    def weights(self) -> int:
        """Bytes of the parameters in float32, with the buffers."""
        return FLOAT32 * self.parameters + self.buffers

    @property
    def state(self) -> int:
        """Bytes of a checkpoint: the model, its average, maybe the best of these, and the moments."""
        saved = FLOAT32 * self.parameters + self.saved_buffers
        return (2 + self.keeps_best) * saved + self.moments

    @property
    def moments(self) -> int:
        """Bytes of AdamW's two of each trained weight, and of Muon's one."""
        return FLOAT32 * (2 * sum(self.trained.values()) - sum(map(math.prod, self.matrices)))


def sizes_of(
    parts: dict[str, int],
    model: nn.Module,
    players: dict[str, nn.Module],
    blocks: list[nn.Module],
    keeps_best: bool,
    matrices: Iterable[nn.Parameter] = (),
) -> Sizes:
    """The sizes of `model`, which holds the modules that are `players`; `matrices` move by Muon."""
    saved = set(model.state_dict())
    buffers = {name: buffer.numel() * buffer.itemsize for name, buffer in model.named_buffers()}
    return Sizes(
        parts,
        shapes_of(model),
        {name: sum(p.numel() for p in player.parameters() if p.requires_grad) for name, player in players.items()},
        sum(buffers.values()),
        sum(size for name, size in buffers.items() if name in saved),
        [shapes_of(block) for block in blocks],
        keeps_best,
        [tuple(matrix.shape) for matrix in matrices],
    )


def parts_of_prior(model: nn.Module) -> dict[str, int]:
    """Parameters of embeddings, head, and what is between."""
    parts = {"embeddings": 0, "blocks": 0, "head": 0}
    for name, parameter in model.named_parameters():
        first = name.partition(".")[0]
        part = "embeddings" if "embedding" in first else "head" if first in ("head", "norm", "out") else "blocks"
        parts[part] += parameter.numel()
    return parts


def parts_of_tokenizer(tokenizer: nn.Module, critic: nn.Module | None) -> dict[str, int]:
    """Parameters of encoder, quantizer, decoder, what else there is, and the critic."""
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in tokenizer.named_children()}
    if critic is not None:
        parts["critic"] = sum(p.numel() for p in critic.parameters())
    return {name: count for name, count in parts.items() if count}


def shapes_of(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of its parameters."""
    return [tuple(parameter.shape) for parameter in module.parameters()]


def sharded(shapes: Iterable[tuple[int, ...]], gpus: int) -> int:
    """Numbers that the fullest of `gpus` keeps of parameters of these shapes: FSDP2 cuts each along its first axis."""
    return sum(-(-shape[0] // gpus) * math.prod(shape[1:]) if shape else 1 for shape in shapes)


def memory(sizes: Sizes, turns: list[Turn], gpus: int, fsdp: bool = False, accumulate: int = 1) -> dict[str, int]:
    """Bytes on the fullest GPU by what they are for. The sum is what is needed at the worst moment of the worst turn,
    with every gradient there, as with several micro-batches; with one, the first gradients come as activations go."""
    trained, worst = sum(sizes.trained.values()), max(turns, key=lambda turn: sum(turn.parts.values()) + turn.working)
    player = max(sizes.trained.values(), default=0)
    if fsdp:
        own = sharded(sizes.shapes, gpus)
        blocks = [sum(map(math.prod, shapes)) for shapes in sizes.blocks]
        root, block = sizes.parameters - sum(blocks), max(blocks, default=0)
        kept = {
            "weights": FLOAT32 * own + sizes.buffers,
            "gradients": FLOAT32 * own,
            MOMENTS: FLOAT32 * (2 * own - sharded(sizes.matrices, gpus)),
            "averaged weights": FLOAT32 * own + sizes.buffers,
            # What is outside of blocks stays whole; one block is at work, one under way, and one copied from the other.
            "whole weights in bf16": BF16 * (root + 3 * block),
            # One unit's is summed up in float32, while the next one's comes.
            "whole gradients": max((FLOAT32 + BF16) * root, (FLOAT32 + 2 * BF16) * block),
        }
    else:
        kept = {
            "weights": sizes.weights,
            # DDP keeps those of all players, in the buckets from which they are sent; else a turn's go when it ends.
            "gradients": FLOAT32 * (trained if gpus > 1 else player),
            # Until the last micro-batch, whose are sent, they are added up elsewhere.
            "gradients not yet sent": FLOAT32 * player if gpus > 1 and accumulate > 1 else 0,
            MOMENTS: sizes.moments,
            "averaged weights": sizes.weights,
            "weights cast to bf16": worst.casts,
        }
    return {**kept, FROZEN: sizes.frozen, **worst.parts, "working memory": worst.working}


def at_evaluation(sizes: Sizes, parts: dict[str, int], evaluation: int, gpus: int, fsdp: bool = False) -> int:
    """Bytes on the main process, which evaluates: of `memory`'s parts those that stay, with FSDP the whole average,
    and the evaluation's own."""
    stay = parts["weights"] + parts[MOMENTS] + parts["averaged weights"] + parts[FROZEN]
    if fsdp:
        return stay + sizes.weights + evaluation
    return stay + (parts["gradients"] if gpus > 1 else 0) + evaluation


def seconds(flops: float, gpus: int, tflops: float, utilization: float) -> float:
    """How long so many FLOPs take `gpus` of this peak, of which a share is used."""
    return flops / (gpus * tflops * 1e12 * utilization)
