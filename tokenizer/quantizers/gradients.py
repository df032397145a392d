"""How a gradient passes a code: two estimators with the same value.

Straight-through (Bengio et al. 2013) hands the code's gradient to the vector as it is. The rotation trick (Fifty et al.
2024, arXiv:2410.06424, section 4.2) turns and scales it as the vector would have to be turned and scaled to become its
code, so that vectors of one cell are pushed apart or together and not all alike.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gradient = Literal["straight_through", "rotation"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        return codes.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        u, v = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        scale = codes.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        ctx.save_for_backward(u, v, F.normalize(u + v, dim=-1), scale)
        return codes.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        u, v, w, scale = ctx.saved_tensors
        along_w = 2 * (gradient * w).sum(-1, keepdim=True) * w
        along_u = 2 * (gradient * v).sum(-1, keepdim=True) * u
        return scale * (gradient - along_w + along_u), None


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes`, to the bit, with the gradient passed on to `z` of the same shape."""
    return _StraightThrough.apply(z, codes)


def rotate_through(z: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` `(n, dim)`, to the bit; the gradient reaches `z` `(n, dim)` through the transpose of
    |e| / |z| (I - 2 w w' + 2 e^ z^'), the scaled rotation of z onto e, which counts as constant. w = (z^ + e^) /
    |z^ + e^|."""
    return _Rotation.apply(z, codes)


def pass_gradient(kind: str, z: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` with the gradient of the estimator called `kind`, a `Gradient`."""
    return {"straight_through": straight_through, "rotation": rotate_through}[kind](z, codes)
