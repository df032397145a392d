"""The critic of VQGAN training (Esser et al. 2021): PatchGAN (Isola et al. 2017) and the losses of critic and
generator.

High logits mark patches that look real. Statistics over images (running means, the adaptive weight) are averaged over
ranks, so results do not depend on the number of processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .quantizers.updates import mean_over_ranks, updates_now

KERNEL = 4  # of every convolution, with zero padding of 1
DECAY = 0.999  # of the running means of logits
LARGEST_WEIGHT = 1e4


class Convolution(nn.Conv2d):
    """A 4x4 convolution from `(B, width_in, H, W)` to `(B, width_out, h, w)`. Spectral normalisation runs in float32
    even under autocast, so the power iteration does not depend on the precision."""

    def __init__(self, width_in: int, width_out: int, stride: int, bias: bool = True) -> None:
        super().__init__(width_in, width_out, KERNEL, stride=stride, padding=1, bias=bias)
        # As in pix2pix. Spectral normalisation keeps only the direction of a weight, so no layer amplifies the signal,
        # and non-zero initial biases would drown it.
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class PatchCritic(nn.Module):
    """Maps images `(B, channels, H, W)` in [-1, 1] to float32 logits `(B, 1, h, w)`, one per overlapping patch,
    whose side is 16, 34, 70 or 142 pixels for 1 to 4 layers.

    The network has `layers` convolutions of stride 2, then two of stride 1. `norm`: "spectral" (Miyato et al. 2018) on
    every convolution; "batch" on the inner ones, without running statistics, which would differ between ranks; or
    "none".
    """

    real_mean: Tensor
    fake_mean: Tensor
    tracked: Tensor

    def __init__(self, channels: int, width: int = 64, layers: int = 3, norm: str = "spectral") -> None:
        super().__init__()
        self.strides = (2,) * layers + (1, 1)
        widths = [channels, *(width * min(2**level, 8) for level in range(layers + 1)), 1]
        body: list[nn.Module] = []
        for level, stride in enumerate(self.strides):
            normalised = norm == "batch" and 0 < level < len(self.strides) - 1
            convolution = Convolution(widths[level], widths[level + 1], stride, bias=not normalised)
            body.append(spectral_norm(convolution) if norm == "spectral" else convolution)
            if normalised:
                body.append(nn.BatchNorm2d(widths[level + 1], track_running_stats=False))
            body.append(nn.LeakyReLU(0.2, inplace=True))
        self.body = nn.Sequential(*body[:-1])
        for name in ("real_mean", "fake_mean"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("tracked", torch.zeros((), dtype=torch.long))  # number of updates of the means

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits. Raises `ValueError` for images smaller than one patch."""
        self.map_size(*images.shape[2:])
        return self.body(images).float()

    @property
    def smallest(self) -> int:
        """The smallest supported image side, which yields one logit."""
        side = 1
        for stride in reversed(self.strides):
            side = (side - 1) * stride + KERNEL - 2
        return side

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < self.smallest:
            raise ValueError(
                f"a critic with {len(self.strides) - 2} layers needs at least {self.smallest} pixels per side "
                f"(got {height} x {width}); use fewer layers"
            )
        for stride in self.strides:
            height, width = ((side + 2 - KERNEL) // stride + 1 for side in (height, width))
        return height, width

    def track(self, real: Tensor, fake: Tensor) -> Tensor:
        """Update the running means of real and fake logits with these logits of all ranks, and return them `(2,)`. They
        are stored only in training with gradients enabled, and only if finite."""
        stores = updates_now(self)
        with torch.no_grad():
            means = mean_over_ranks(torch.stack([real.float().mean(), fake.float().mean()]))
            share = torch.where(self.tracked == 0, 1.0, 1 - DECAY)  # on the device, to avoid a GPU sync
            moved = torch.stack([self.real_mean, self.fake_mean]).lerp(means, share)
            if stores:
                finite = torch.isfinite(moved).all()
                self.real_mean.copy_(torch.where(finite, moved[0], self.real_mean))
                self.fake_mean.copy_(torch.where(finite, moved[1], self.fake_mean))
                self.tracked += finite
        return moved


# Losses ---------------------------------------------------------------------------------------------


def hinge_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half of E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Lim & Ye 2017). VQGAN's code halves it too, so published
    regulariser weights apply."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    return -fake.mean()


def non_saturating_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half of -E[log s(D(x))] - E[log(1 - s(D(G(z))))], s the logistic function (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    return F.softplus(-fake).mean()


CRITIC_LOSSES = {"hinge": hinge_critic_loss, "non_saturating": non_saturating_critic_loss}
GENERATOR_LOSSES = {"hinge": hinge_generator_loss, "non_saturating": non_saturating_generator_loss}


def lecam(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """E[|D(x) - a_F|^2] + E[|D(G(z)) - a_R|^2] with running means a of the logits (Tseng et al. 2021, equation 5):
    regularises the critic on small data sets."""
    return (real - fake_mean).square().mean() + (fake - real_mean).square().mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
    """|grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-6) at the last layer, clamped to [0,
    1e4] and detached (Esser et al. 2021, equation 7). Gradients are averaged over ranks first, so the weight is that of
    the global batch. Both graphs are retained."""
    losses = (reconstruction_loss, adversarial_loss)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in losses]
    norms = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, LARGEST_WEIGHT).detach()
