"""Training losses of tokenizers: pixel losses and the quantizer's terms."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Reconstruction
from .files import ConfigError


def pixel_losses(reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Return `l1` and `l2`, averaged over elements of images in [-1, 1]."""
    return {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images)}


def gradient_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the mean absolute error of vertical and horizontal pixel differences, a scalar (Mathieu et al. 2016,
    arXiv:1511.05440, equation 6, with alpha 1 and signed differences). A constant error is free; a checkerboard error
    is penalised at every pixel."""
    error = (reconstruction - images).float()
    return (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2


def total_loss(output: Reconstruction, images: Tensor, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum, a scalar, and the unweighted terms. Raises `ConfigError` for terms without a weight."""
    terms = {**pixel_losses(output.images, images), **output.losses}
    if weights.get("gradient"):
        terms["gradient"] = gradient_loss(output.images, images)
    if missing := [name for name in terms if name not in weights]:
        raise ConfigError(f"loss_weights: no weight for the loss {', '.join(missing)}; a weight of 0 ignores it")
    total = sum((weights[name] * term for name, term in terms.items()), start=images.new_zeros(()))
    return total, terms


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, `(B,)`: 10 log10(2^2 / MSE) on [-1, 1]."""
    error = (reconstruction - images).square().flatten(1).mean(1)
    return 10 * (4 / error.clamp(min=1e-10)).log10()
