"""VQ-VAE (van den Oord et al. 2017): a convolutional autoencoder with a quantizer in the middle. The default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .autoencoder import Autoencoder, AutoencoderConfig
from .layers import decoder, encoder
from .pretrained import setting


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(AutoencoderConfig):
    """Sizes of the networks."""

    factor: int = setting(4, "image pixels per token along each side", choices=(2, 4, 8, 16))
    widths: tuple[int, ...] = setting((128,), "channels at each resolution, finest first; one more resolution halves "
                                      "the patch that the first layer folds", ge=8, le=4096)  # fmt: skip
    blocks: tuple[int, ...] = setting((2,), "residual blocks at each resolution", ge=0, le=64)
    attention: bool = setting(False, "self-attention at the token resolution")

    def check(self) -> Iterator[str]:
        """Sizes have to divide."""
        yield from super().check()
        if any(side % self.factor for side in self.image_size):
            yield f"factor: {self.factor} does not divide the image size {'x'.join(map(str, self.image_size))}"
        if len(self.blocks) != len(self.widths):
            yield f"blocks: one number per width is needed (got {len(self.blocks)} for {len(self.widths)} widths)"
        if 2 ** (len(self.widths) - 1) > self.factor:
            yield f"widths: {len(self.widths)} resolutions need a factor of {2 ** (len(self.widths) - 1)} or more"
        if any(width % 8 for width in self.widths):
            yield f"widths: must be multiples of 8 (got {list(self.widths)})"


class VQVAE(Autoencoder, name="vqvae"):
    """Encoder and decoder of `layers.py`."""

    Config = VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config, config.factor)
        patch = config.factor // 2 ** (len(config.widths) - 1)
        sizes = (patch, config.widths, config.blocks, config.attention, self.quantizer.dim)
        self.encoder, self.decoder = encoder(config.channels, *sizes), decoder(self.outputs, *sizes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
