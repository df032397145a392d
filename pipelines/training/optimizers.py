"""What moves the weights: AdamW (Loshchilov & Hutter 2017), or Muon on matrices and AdamW on the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): a matrix moves by the orthogonal matrix nearest to
its momentum, so that all directions move alike. A convolution's kernel is the matrix (outputs, inputs x k x k).
`torch.optim.Muon` takes neither kernels nor weights in pieces, computes one matrix after the other, and has the host
wait to learn whether to step; on a matrix ours takes the same step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from .checkpoints.sharded import whole
from .schedule import TrainConfig

LEAST = 16  # rows and columns of a matrix that is worth it
MOMENTUM = 0.95
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5  # of Newton and Schulz, as by Jordan
HEAD = "head"  # what the layer to logits is called


def make_optimizer(
    parameters: list[nn.Parameter], matrices: set[nn.Parameter], config: TrainConfig, betas: tuple[float, float]
) -> AdamW:
    """The optimizer that `config` asks for; biases, norms and other vectors do not decay. matrices: see
    `hidden_matrices`."""
    muon = config.optimizer == "muon"
    hidden = [p for p in parameters if muon and p in matrices]
    rest = [p for p in parameters if not (muon and p in matrices)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": hidden, "weight_decay": 0.0, "momentum": MOMENTUM, "factor": config.muon_lr / config.lr},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    kind = Muon if hidden else AdamW
    return kind([g for g in groups if g["params"]], lr=config.lr, betas=betas, fused=fused)


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers and convolutions of at least 16 x 16, but for the last layer before logits."""
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] != HEAD]
    weights = [getattr(layer, "weight", None) for layer in layers if not isinstance(layer, nn.Embedding)]
    found = [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim > 1]
    return {weight for weight in found if min(rows_and_columns(weight)) >= LEAST}


def rows_and_columns(weight: Tensor) -> tuple[int, int]:
    """Of the matrix that it is."""
    return weight.shape[0], math.prod(weight.shape[1:])


class Muon(AdamW):
    """AdamW, but Muon for the groups of parameters that have a `momentum`, with `factor` times the learning rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient; none if `found_inf`, on the device, is not 0."""
        everything = self.param_groups
        for group in everything:
            if "momentum" in group:
                self.move_matrices(group)
        self.param_groups = [group for group in everything if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = everything

    def move_matrices(self, group: dict[str, Any]) -> None:
        """Add up gradients, and go along the orthogonal matrices."""
        moving = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in moving]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in moving]
        skip = getattr(self, "found_inf", None)
        if skip is not None:
            grads = [torch.where(skip > 0, momentum, grad) for momentum, grad in zip(momenta, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
        rate = group["lr"] * group["factor"]
        for weight, direction in zip(moving, orthogonal(list(ahead)), strict=True):
            rows, columns = rows_and_columns(weight)
            step = -rate * math.sqrt(max(1.0, rows / columns))
            weight.add_(direction if skip is None else direction * (skip <= 0), alpha=step)


def orthogonal(tensors: list[Tensor]) -> list[Tensor]:
    """What is nearest to each as a matrix, of those whose singular values are about 1; in the same shapes. Those of one
    shape are computed together."""
    found: dict[tuple[int, int], list[int]] = {}
    complete = [whole(tensor) for tensor in tensors]
    for index, tensor in enumerate(complete):
        found.setdefault(rows_and_columns(tensor), []).append(index)
    results = list(tensors)
    for indices in found.values():
        together = newton_schulz(torch.stack([complete[index].flatten(1) for index in indices]))
        for index, matrix in zip(indices, together, strict=True):
            results[index] = laid_out_like(matrix.view(complete[index].shape), tensors[index])
    return results


def newton_schulz(matrices: Tensor) -> Tensor:
    """Five rounds of an iteration for `(n, rows, columns)`, at any scale: singular values in [0.7, 1.2] come out. In
    bfloat16 on a GPU, where it is precise enough, and float32 elsewhere."""
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """In pieces, where `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
