"""The critic's part in training a tokenizer (VQGAN, Esser et al. 2021): when it learns, and when its loss counts.

A critic that has learned nothing gives gradients without meaning, and runs fail most often at the step at which it is
switched on. So it first learns alone for `warmup` steps, and its weight in the tokenizer's loss then grows over `ramp`
steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenizer.critic import CRITIC_LOSSES, GENERATOR_LOSSES, PatchCritic, adaptive_weight, lecam

from ..config import Config, UserError
from .augmentation import augment
from .schedule import Decay


class CriticConfig(Config):
    """A critic that learns to tell reconstructions from images, patch by patch."""

    weight: float = Field(0.0, ge=0, description="weight of its loss on the tokenizer; 0: no critic is made")
    adaptive: bool = Field(
        False,
        description="scale that weight, step by step, so that at the decoder's last layer the gradient is as large as "
        "that of the other losses (VQGAN, equation 7)",
    )
    loss: Literal["hinge", "non_saturating"] = Field("hinge", description="of critic and tokenizer")
    start: int = Field(0, ge=0, description="step from which the critic learns")
    warmup: int = Field(500, ge=0, description="steps for which it learns alone, before its loss reaches the tokenizer")
    ramp: int = Field(500, ge=0, description="steps over which its weight then grows from nothing")
    lecam: float = Field(
        0.0,
        ge=0,
        description="weight of LeCam's regulariser of the critic, for few images: 0.001 to 0.05 are published",
    )
    augment: tuple[Literal["color", "translation", "cutout"], ...] | None = Field(
        None,
        description="random changes of all that it sees, for few images (DiffAugment): color, translation, cutout",
    )
    lr: float = Field(1.0, gt=0, description="the critic's learning rate as a share of train.lr")
    betas: tuple[Decay, Decay] = Field(
        (0.5, 0.9), description="AdamW's decays for the critic; with slower ones it lags behind the tokenizer"
    )
    width: int = Field(64, ge=8, le=1024, description="channels of its first layer; they double with each")
    layers: int = Field(3, ge=1, le=6, description="strided layers; each doubles the size of a patch")
    norm: Literal["spectral", "batch", "none"] = Field(
        "spectral", description="of its layers; batch: over images and reconstructions of one process together"
    )


class Adversary:
    """The losses that involve the critic. `critic` is the module itself, which the tokenizer's loss calls; in its own
    turn the critic may be wrapped, by DDP."""

    def __init__(self, config: CriticConfig, critic: PatchCritic) -> None:
        self.config, self.critic = config, critic

    def plays(self, step: int) -> bool:
        """Whether the critic learns in this step."""
        return step >= self.config.start

    def share(self, step: int) -> float:
        """The share of `weight` that applies in this step, in [0, 1]: 0 until the critic was trained for `warmup`
        steps; then it grows evenly and is 1 from the `ramp`-th step on."""
        since = step - self.config.start - self.config.warmup
        return min(1.0, (since + 1) / max(1, self.config.ramp)) if since >= 0 else 0.0

    def augment(self, images: Tensor) -> Tensor:
        """Return what the critic sees of images or reconstructions `(B, C, H, W)`, in both turns."""
        return augment(images, self.config.augment or ())

    def tokenizer_term(
        self, reconstruction: Tensor, other_losses: Tensor, last_layer: nn.Parameter, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's term in the tokenizer's loss, a scalar, of a reconstruction `(B, C, H, W)`; and its parts to
        log."""
        share = self.share(step)
        if share == 0:
            return other_losses.new_zeros(()), {}
        adversarial = GENERATOR_LOSSES[self.config.loss](self.critic(self.augment(reconstruction)))
        weight = other_losses.new_full((), self.config.weight * share)
        if self.config.adaptive:
            weight = weight * adaptive_weight(other_losses, adversarial, last_layer)
        return weight * adversarial, {"adversarial": adversarial, "adversarial_weight": weight}

    def critic_term(
        self, critic: nn.Module, images: Tensor, reconstructions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's own loss, a scalar, and its parts to log, on images `(B, C, H, W)` and the reconstructions that
        the tokenizer's turn made of them. One pass for both: DDP may not be called twice before a backward pass."""
        both = torch.cat([images.to(reconstructions.dtype), reconstructions])
        real, fake = critic(self.augment(both)).float().chunk(2)
        loss = CRITIC_LOSSES[self.config.loss](real, fake)
        terms = {
            "critic": loss,
            "real_logits": real.mean(),
            "fake_logits": fake.mean(),
            "accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2,
        }
        if self.config.lecam:
            means = self.critic.track(real.detach(), fake.detach())  # includes these logits: the means begin at 0
            terms["lecam"] = lecam(real, fake, *means)
            loss = loss + self.config.lecam * terms["lecam"]
        return loss, terms


def make_adversary(config: CriticConfig, image_shape: tuple[int, int, int]) -> Adversary:
    """A new critic of images (C, H, W), and its losses. Raises `UserError` for images too small for it."""
    channels, height, width = image_shape
    critic = PatchCritic(channels, config.width, config.layers, config.norm)
    try:
        critic.map_size(height, width)
    except ValueError as error:
        raise UserError(f"critic.layers: {error}") from error
    return Adversary(config, critic)
