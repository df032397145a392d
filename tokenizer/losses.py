"""What a tokenizer minimises: pixel losses and the quantizer's own terms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Reconstruction


def pixel_losses(reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
    """`l1` and `l2`, means over elements of images in [-1, 1]."""
    return {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images)}


def spectral_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """The mean magnitude of the error's Fourier coefficients, a scalar, in the units of `l1`: a pattern that the
    decoder weaves into the whole image is a few large ones, which it is cheap to remove (as by Jiang et al. 2021, focal
    frequency loss, without its weights)."""
    return torch.fft.rfft2((reconstruction - images).float(), norm="ortho").abs().mean()


def total_loss(output: Reconstruction, images: Tensor, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, a scalar, and its unweighted terms. Raises `KeyError` for a term without a weight."""
    terms = {**pixel_losses(output.images, images), **output.losses}
    if weights.get("spectral"):
        terms["spectral"] = spectral_loss(output.images, images)
    total = sum((weights[name] * term for name, term in terms.items()), start=images.new_zeros(()))
    return total, terms


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal to noise ratio of each image in dB, `(B,)`: 10 log10(2^2 / mean squared error) on [-1, 1]."""
    error = (reconstruction - images).square().flatten(1).mean(1)
    return 10 * (4 / error.clamp(min=1e-10)).log10()
