"""Gradient estimators for the nearest code; all have the same forward value.

Straight-through (Bengio et al. 2013) copies the code's gradient to the vector. The rotation trick (Fifty et al. 2024,
arXiv:2410.06424, section 4.2) applies the rotation and scaling that map the vector to its code, so vectors in one cell
are pushed apart or together rather than all in the same direction.
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
        reflected = 2 * (gradient * w).sum(-1, keepdim=True) * w
        rotated = 2 * (gradient * v).sum(-1, keepdim=True) * u
        return scale * (gradient - reflected + rotated), None


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Return exactly `codes`, copying the gradient to `z` of the same shape."""
    return _StraightThrough.apply(z, codes)


def rotate_through(z: Tensor, codes: Tensor) -> Tensor:
    """Return exactly `codes` `(n, dim)`. The gradient reaches `z` `(n, dim)` through the transpose of |e| / |z| (I - 2
    w w' + 2 e^ z^'), the scaled rotation of z onto e, treated as constant. w = (z^ + e^) / |z^ + e^|."""
    return _Rotation.apply(z, codes)


def pass_gradient(kind: str, z: Tensor, codes: Tensor) -> Tensor:
    return {"straight_through": straight_through, "rotation": rotate_through}[kind](z, codes)
