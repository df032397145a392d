"""Adversarial training of a tokenizer (VQGAN, Esser et al. 2021): the critic's losses and their schedule.

The gradients of an untrained critic are meaningless, and runs fail most often at the step that switches it on. So it
first trains alone for `warmup` steps, and its weight in the tokenizer's loss then grows over `ramp` steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenizer.critic import CRITIC_LOSSES, GENERATOR_LOSSES, PatchCritic, adaptive_weight, lecam
from tokenizer.spec import ImageSpec

from ..config import Config, user_errors
from .augmentation import augment
from .schedule import Decay


class CriticConfig(Config):
    """A critic that learns to distinguish reconstructions from images, patch by patch."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial loss; 0: no critic")
    adaptive: bool = Field(
        False,
        description="scale the weight at each step so that the gradient at the decoder's last layer is as large as "
        "that of the other losses (VQGAN, equation 7)",
    )
    loss: Literal["hinge", "non_saturating"] = Field("hinge", description="adversarial loss of critic and tokenizer")
    start: int = Field(0, ge=0, description="first step at which the critic trains")
    warmup: int = Field(
        500, ge=0, description="steps for which the critic trains alone, before its loss reaches the tokenizer"
    )
    ramp: int = Field(
        500, ge=0, description="steps over which the adversarial loss then grows from 0 to its full weight"
    )
    lecam: float = Field(
        0.0,
        ge=0,
        description="weight of the critic's LeCam regulariser, for small data sets; papers use 0.001 to 0.05",
    )
    augment: tuple[Literal["color", "translation", "cutout"], ...] | None = Field(
        None,
        description="DiffAugment of the critic's inputs, for small data sets: color, translation, cutout",
    )
    lr: float = Field(1.0, gt=0, description="the critic's learning rate, relative to train.lr")
    betas: tuple[Decay, Decay] = Field(
        (0.5, 0.9), description="AdamW's decay rates for the critic; slower decay lets it lag behind the tokenizer"
    )
    width: int = Field(64, ge=8, le=1024, description="channels of the first layer; each layer doubles them")
    layers: int = Field(3, ge=1, le=6, description="strided layers; each doubles the patch size")
    norm: Literal["spectral", "batch", "none"] = Field(
        "spectral", description="normalization; batch: batch norm over all images and reconstructions of a process"
    )


class Adversary:
    """The adversarial losses of tokenizer and critic."""

    def __init__(self, config: CriticConfig, critic: PatchCritic) -> None:
        self.config, self.critic = config, critic

    def is_active(self, step: int) -> bool:
        return step >= self.config.start

    def share(self, step: int) -> float:
        """Return the fraction of `weight` that applies in this step: 0 until the critic has trained for `warmup` steps,
        then rising linearly to 1 over `ramp` steps."""
        since = step - self.config.start - self.config.warmup
        return min(1.0, (since + 1) / max(1, self.config.ramp)) if since >= 0 else 0.0

    def tokenizer_term(
        self, reconstruction: Tensor, other_losses: Tensor, last_layer: nn.Parameter, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the adversarial term of the tokenizer's loss for a reconstruction `(B, C, H, W)`, and scalars to
        log."""
        share = self.share(step)
        if share == 0:
            return other_losses.new_zeros(()), {}
        logits = self.critic(augment(reconstruction, self.config.augment or ()))
        adversarial = GENERATOR_LOSSES[self.config.loss](logits)
        weight = other_losses.new_full((), self.config.weight * share)
        if self.config.adaptive:
            weight = weight * adaptive_weight(other_losses, adversarial, last_layer)
        return weight * adversarial, {"adversarial": adversarial, "adversarial_weight": weight}

    def critic_term(
        self, critic: nn.Module, images: Tensor, reconstructions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the critic's loss on images `(B, C, H, W)` and their reconstructions, and scalars to log. critic: the
        module, perhaps wrapped in DDP. A single forward pass takes both kinds of images, because DDP must not be called
        twice before a backward pass."""
        both = torch.cat([images.to(reconstructions.dtype), reconstructions])
        real, fake = critic(augment(both, self.config.augment or ())).float().chunk(2)
        loss = CRITIC_LOSSES[self.config.loss](real, fake)
        terms = {
            "critic": loss,
            "real_logits": real.mean(),
            "fake_logits": fake.mean(),
            "accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2,
        }
        if self.config.lecam:
            # The means start at 0, so update them with these logits first.
            means = self.critic.track(real.detach(), fake.detach())
            terms["lecam"] = lecam(real, fake, *means)
            loss = loss + self.config.lecam * terms["lecam"]
        return loss, terms


def make_adversary(config: CriticConfig, spec: ImageSpec) -> Adversary:
    """Build a critic of images and its losses. Raises `UserError` for images too small for it."""
    critic = PatchCritic(spec.channels, config.width, config.layers, config.norm)
    with user_errors(ValueError, prefix="critic.layers: "):
        critic.map_size(*spec.size)
    return Adversary(config, critic)
