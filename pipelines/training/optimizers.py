"""What moves the weights: AdamW (Loshchilov & Hutter 2017), or Muon on matrices and AdamW on the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): a matrix moves by the orthogonal matrix nearest to
its momentum, so that all directions move alike. A convolution's kernel is the matrix (outputs, inputs x k x k).
`torch.optim.Muon` takes neither kernels nor weights in pieces, computes one matrix after the other, and has the host
wait to learn whether to step; on a matrix ours takes the same step. It has the schedule of AdamW, and no decay; that
gradients were clipped changes what later momenta are made of, not the length of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Optimizer

from prior.layers import CausalConv2d

from .checkpoints.sharded import piece
from .schedule import TrainConfig

LEAST = 16  # rows and columns of a matrix that is worth it
MOMENTUM = 0.95
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5  # of Newton and Schulz, as by Jordan
TINY = 1e-7  # the norm below which a matrix counts as zero
MOST = 1 << 26  # numbers that are orthogonalized together: a quarter of a GB
LAYERS = (nn.Linear, _ConvNd, CausalConv2d)
APART = {"head", "quantizer"}
"""Modules whose weights stay with AdamW: what a model calls its head (a prior's layer to logits; the last layers of the
encoder and decoder of `vit`, `titok`, `vqgan` and the kinds that are built like it), and what chooses codes."""


def make_optimizer(
    parameters: list[nn.Parameter],
    matrices: set[nn.Parameter],
    decaying: set[nn.Parameter],
    config: TrainConfig,
    betas: tuple[float, float],
    bf16: bool = False,
) -> AdamW:
    """The optimizer that `config` asks for. Of what AdamW moves, only `decaying` (see `decaying_weights`) decays. Where
    none of `matrices` (see `hidden_matrices`) is among the parameters, that is AdamW. bf16: whether matrices are made
    orthogonal in bfloat16, which is precise enough, and, where it is fast, takes a fourth of the time."""
    muon = config.optimizer == "muon"
    hidden = [p for p in parameters if muon and p in matrices]
    rest = [p for p in parameters if not (muon and p in matrices)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p in decaying], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p not in decaying], "weight_decay": 0.0},
        {"params": hidden, "weight_decay": 0.0, "momentum": MOMENTUM, "bf16": bf16},
    ]
    groups[-1]["factor"] = config.muon_lr / config.lr  # of the learning rate, which all have in common
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    kind = Muon if hidden else AdamW
    return kind([g for g in groups if g["params"]], lr=config.lr, betas=betas, fused=fused)


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers and convolutions that are matrices of at least 16 x 16, but for those of quantizers
    and of what is called a head. Embeddings, positions and codebooks are tables: a row moves when it is looked up."""
    layers = [module for name, module in model.named_modules() if APART.isdisjoint(name.split("."))]
    weights = [getattr(layer, "weight", None) for layer in layers if isinstance(layer, LAYERS)]
    return {weight for weight in weights if isinstance(weight, nn.Parameter) and is_matrix(weight)}


def decaying_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights that decay: matrices, kernels and tables. Not vectors, of whatever shape (the gain of a norm of
    queries and keys is `(heads, 1)`, an embedding of one row `(1, dim)`), and not biases, also where there is a table
    of them, one for each position, row or class: what has `bias` in its name, or in that of its module's class."""
    found = set()
    for name, module in model.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            is_bias = "bias" in f"{name}.{key} {type(module).__name__}".lower()
            if weight.ndim > 1 and min(rows_and_columns(weight)) > 1 and not is_bias:
                found.add(weight)
    return found


def is_matrix(weight: Tensor) -> bool:
    """Of a size that is worth it."""
    return min(rows_and_columns(weight)) >= LEAST


def rows_and_columns(weight: Tensor) -> tuple[int, int]:
    """Of the matrix that it is."""
    return weight.shape[0], math.prod(weight.shape[1:])


class Muon(AdamW):
    """AdamW, but Muon for the groups of parameters that have a `momentum`, with `factor` times the learning rate."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of any optimizer: AdamW's own looks for counts of steps, for the sake of old versions of torch."""
        Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient; none if `found_inf`, on the device, is not 0."""
        everything = self.param_groups
        for group in everything:
            if "momentum" in group:
                for weights in alike(group["params"]):
                    self.move(weights, group)
        self.param_groups = [group for group in everything if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = everything

    def move(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Add the gradients of these, which are of one shape, to their momenta, and go along the orthogonal matrices.

        Of weights in pieces, each process has its pieces of momenta, too.
        """
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [piece(self.state[weight]["momentum"]) for weight in weights]
        grads = [piece(weight.grad) for weight in weights if weight.grad is not None]
        skip = getattr(self, "found_inf", None)
        if skip is not None:
            grads = [torch.where(skip > 0, momentum, grad) for momentum, grad in zip(momenta, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
        matrices = torch.stack([tensor.flatten(1) for tensor in ahead])
        directions = orthogonal(matrices.bfloat16() if group["bf16"] else matrices, like=weights[0]).to(ahead[0])
        if skip is not None:
            directions *= skip <= 0
        rows, columns = rows_and_columns(weights[0])
        rate = group["lr"] * group["factor"] * math.sqrt(max(1.0, rows / columns))
        for weight, direction in zip(weights, directions, strict=True):
            mine = piece(weight)
            mine.add_(direction.view(mine.shape), alpha=-rate)


def alike(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those that have a gradient, by the shape of their matrix; of large ones only a few at a time."""
    found: dict[tuple[int, int], list[nn.Parameter]] = {}
    for weight in weights:
        if weight.grad is not None:
            found.setdefault(rows_and_columns(weight), []).append(weight)
    for several in found.values():
        count = max(1, MOST // max(1, piece(several[0]).numel()))
        yield from (several[start : start + count] for start in range(0, len(several), count))


def orthogonal(matrices: Tensor, like: Tensor) -> Tensor:
    """What `newton_schulz` makes of `matrices`, `(n, rows, columns)`, which lie in pieces if `like`, one of the
    weights, does: each process then does its share of the n, whole, and gets its pieces of all."""
    if not isinstance(like, DTensor):
        return newton_schulz(matrices)
    shape = torch.Size([len(matrices), *rows_and_columns(like)])
    place: dict[str, Any] = {"device_mesh": like.device_mesh, "run_check": False}
    place |= {"shape": shape, "stride": (shape[1] * shape[2], shape[2], 1)}
    pieces = DTensor.from_local(matrices, placements=[Shard(1)], **place)
    share = newton_schulz(pieces.redistribute(placements=[Shard(0)]).to_local())
    return DTensor.from_local(share, placements=[Shard(0)], **place).redistribute(placements=[Shard(1)]).to_local()


def newton_schulz(matrices: Tensor) -> Tensor:
    """Five rounds of an iteration for `(n, rows, columns)`, at any scale: singular values in [0.7, 1.2] come out, but
    for the least."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=TINY)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()
