"""Weights of a tokenizer's losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenizer import Tokenizer

from ..config import Config


class LossConfig(Config):
    """Loss weights of a tokenizer."""

    l1: float = Field(0.0, ge=0, description="weight of the mean absolute error of pixels in [-1, 1]")
    l2: float = Field(1.0, ge=0, description="weight of the mean squared error of pixels in [-1, 1]")
    gradient: float = Field(
        0.0,
        ge=0,
        description="weight of the mean absolute error of differences between neighbouring pixels; suppresses false "
        "texture in smooth areas",
    )
    nll: float = Field(
        1.0,
        ge=0,
        description="weight of the model's negative log likelihood, if it has one, in nats per pixel channel; 1 with "
        "l1=0 and l2=0 gives the fewest bits per dim",
    )
    quantizer: float = Field(1.0, ge=0, description="factor on the quantizer's own losses, which include its beta")
    perceptual: float = Field(
        0.0, ge=0, description="weight of LPIPS, a distance between features of a pretrained network"
    )
    perceptual_net: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="the pretrained network of LPIPS")


def combine_loss_weights(loss: LossConfig, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the weights of the pixel losses and of the tokenizer's own losses, the latter multiplied by `loss.nll` or
    `loss.quantizer`."""
    own = {
        name: weight * (loss.nll if name == "nll" else loss.quantizer)
        for name, weight in tokenizer.loss_weights.items()
    }
    return {"l1": loss.l1, "l2": loss.l2, "gradient": loss.gradient, **own}
