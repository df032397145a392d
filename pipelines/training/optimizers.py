"""AdamW (Loshchilov & Hutter 2017), or Muon for matrices and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates a matrix by the orthogonal matrix nearest
to its momentum, so that all directions move equally far. A convolution kernel is treated as a matrix (outputs, inputs x
k x k). In a layer that fuses several maps (such as queries, keys and values), each part is a separate matrix.

`torch.optim.Muon` accepts only 2-D parameters, supports neither DTensor nor `found_inf`, and orthogonalizes one matrix
at a time; for a single matrix our step equals it. Muon follows AdamW's schedule and has no weight decay.
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

from .schedule import TrainConfig

MIN_MATRIX_SIDE = 16  # minimum rows and columns of a matrix for Muon
MOMENTUM = 0.95
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5  # Newton-Schulz: Jordan's coefficients, iterations
TINY = 1e-7  # the norm below which a matrix counts as zero
MAX_NUMBERS = 1 << 26  # entries orthogonalized at once: 256 MiB
LAYERS = (nn.Linear, _ConvNd, CausalConv2d)
EXCLUDED = {"head", "quantizer"}
"""Modules left to AdamW: heads (a prior's output layer; the last layers of the encoder and decoder of `vit`, `titok`,
`vqgan` and similar tokenizers) and quantizers."""


def make_optimizer(
    parameters: list[nn.Parameter],
    matrices: dict[nn.Parameter, int],
    decaying: set[nn.Parameter],
    config: TrainConfig,
    betas: tuple[float, float],
    bf16: bool = False,
) -> AdamW:
    """Build the optimizer that `config` selects.

    matrices: the weights for Muon, see `hidden_matrices`; if empty, the optimizer is AdamW. decaying: the weights that
    decay under AdamW. bf16: orthogonalize in bfloat16, which is precise enough and takes a quarter of the time on
    hardware that supports it.
    """
    if config.optimizer == "adamw":
        matrices = {}
    rest = [p for p in parameters if p not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p in decaying], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p not in decaying], "weight_decay": 0.0},
    ]
    muon = {"weight_decay": 0.0, "momentum": MOMENTUM, "bf16": bf16, "factor": config.muon_lr / config.lr}
    for parts in sorted(set(matrices.values())):
        groups.append({"params": [p for p in parameters if matrices.get(p) == parts], "parts": parts, **muon})
    groups = [group for group in groups if group["params"]]
    kind = Muon if any("momentum" in group for group in groups) else AdamW
    return kind(groups, lr=config.lr, betas=betas, fused=True)


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the weights for Muon, each with the number of matrices stacked in it: the `parts` of its layer, or 1.

    These are the weights of linear layers and convolutions whose parts have at least 16 rows and columns, outside
    quantizers and heads. Embeddings, positions and codebooks are lookup tables, not maps.
    """
    found: dict[nn.Parameter, int] = {}
    for name, layer in model.named_modules():
        weight, parts = getattr(layer, "weight", None), getattr(layer, "parts", 1)
        if isinstance(layer, LAYERS) and EXCLUDED.isdisjoint(name.split(".")) and isinstance(weight, nn.Parameter):
            rows, columns = shape_as_matrix(weight)
            if min(rows // parts, columns) >= MIN_MATRIX_SIDE:
                found[weight] = parts
    return found


def decaying_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights that decay: matrices, kernels and tables.

    Vectors of any shape are excluded (the gain of a query-key norm is `(heads, 1)`, an embedding of one row `(1,
    dim)`), as are biases, including tables of biases per position, row or class: any weight with `bias` in its name or
    in the class name of its module.
    """
    found = set()
    for name, module in model.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            is_bias = "bias" in f"{name}.{key} {type(module).__name__}".lower()
            if weight.ndim > 1 and min(shape_as_matrix(weight)) > 1 and not is_bias:
                found.add(weight)
    return found


def shape_as_matrix(weight: Tensor) -> tuple[int, int]:
    """Return the numbers of rows and columns: (outputs, inputs x k x k) of a convolution."""
    return weight.shape[0], math.prod(weight.shape[1:])


def local_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Muon(AdamW):
    """AdamW, except that parameter groups with a `momentum` use Muon, at `factor` times the learning rate."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)  # AdamW's requires step counts, to support old versions of torch

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, unless `found_inf`, a tensor on the device, is not 0."""
        every_group = self.param_groups
        for group in every_group:
            for weights in group_by_shape(group["params"]) if "momentum" in group else ():
                self.update_matrices(weights, group)
        self.param_groups = [group for group in every_group if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = every_group

    def update_matrices(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update the momenta of weights of one shape, and step the weights along the nearest orthogonal matrices. Each
        process keeps the momenta of its own shards."""
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [local_shard(self.state[weight]["momentum"]) for weight in weights]
        grads = [local_shard(weight.grad) for weight in weights if weight.grad is not None]
        skip = getattr(self, "found_inf", None)
        if skip is not None:
            grads = [torch.where(skip > 0, momentum, grad) for momentum, grad in zip(momenta, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov momentum
        matrices = torch.stack([tensor.flatten(1) for tensor in ahead])
        matrices = matrices.bfloat16() if group["bf16"] else matrices
        directions = orthogonalize(matrices, group["parts"], like=weights[0]).to(ahead[0])
        if skip is not None:
            directions *= skip <= 0
        rows, columns = shape_as_matrix(weights[0])
        rate = group["lr"] * group["factor"] * math.sqrt(max(1.0, rows / group["parts"] / columns))
        for weight, direction in zip(weights, directions, strict=True):
            mine = local_shard(weight)
            mine.add_(direction.view(mine.shape), alpha=-rate)


def group_by_shape(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group the weights that have a gradient by shape; yield groups of at most `MAX_NUMBERS` entries."""
    found: dict[tuple[int, int], list[nn.Parameter]] = {}
    for weight in weights:
        if weight.grad is not None:
            found.setdefault(shape_as_matrix(weight), []).append(weight)
    for group in found.values():
        count = max(1, MAX_NUMBERS // max(1, local_shard(group[0]).numel()))
        yield from (group[start : start + count] for start in range(0, len(group), count))


def orthogonalize(matrices: Tensor, parts: int, like: Tensor) -> Tensor:
    """Apply `newton_schulz` to each of the `parts` of each matrix in `matrices` `(n, rows, columns)`.

    like: one of the weights. If it is sharded, the matrices are sharded by rows: each process then gathers its share of
    the n matrices, orthogonalizes them, and gets back its rows of all matrices.
    """
    if not isinstance(like, DTensor):
        return newton_schulz(matrices.unflatten(1, (parts, -1)).flatten(0, 1)).view_as(matrices)
    shape = torch.Size([len(matrices), *shape_as_matrix(like)])
    place: dict[str, Any] = {"device_mesh": like.device_mesh, "run_check": False}
    place |= {"shape": shape, "stride": (shape[1] * shape[2], shape[2], 1)}
    pieces = DTensor.from_local(matrices, placements=[Shard(1)], **place)
    share = pieces.redistribute(placements=[Shard(0)]).to_local()
    share = newton_schulz(share.unflatten(1, (parts, -1)).flatten(0, 1)).view_as(share)
    return DTensor.from_local(share, placements=[Shard(0)], **place).redistribute(placements=[Shard(1)]).to_local()


def newton_schulz(matrices: Tensor) -> Tensor:
    """Orthogonalize `(n, rows, columns)`, at any scale, by five Newton-Schulz iterations: all but the smallest singular
    values end up in [0.7, 1.2]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=TINY)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()
