"""VQ-VAE (van den Oord et al. 2017): encoder, quantizer, decoder. The default tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Reconstruction, TokenGrid, Tokenizer
from .layers import decoder, encoder
from .pretrained import ModelConfig, setting
from .quantizers import Quantizer
from .quantizers.ema import EMAConfig


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(ModelConfig):
    """Sizes of the autoencoder, and its quantizer."""

    image_size: tuple[int, ...] = setting(help="height and width of the images", ge=1, le=4096, fact=True)
    channels: int = setting(help="1 for grey, 3 for RGB", choices=(1, 3), fact=True)
    factor: int = setting(4, "image pixels per token along each side", choices=(2, 4, 8, 16))
    widths: tuple[int, ...] = setting((128,), "channels at each resolution, finest first; one more resolution halves "
                                      "the patch that the first layer folds", ge=8, le=4096)  # fmt: skip
    blocks: tuple[int, ...] = setting((2,), "residual blocks at each resolution", ge=0, le=64)
    attention: bool = setting(False, "self-attention at the token resolution")
    quantizer: ModelConfig = setting(EMAConfig(), "how vectors become ids", family="tokenizer.quantizers:Quantizer")

    def check(self) -> Iterator[str]:
        """Sizes have to divide."""
        if len(self.image_size) != 2:
            yield f"image_size: expected [height, width] (got {list(self.image_size)})"
        elif any(side % self.factor for side in self.image_size):
            height, width = self.image_size
            yield f"factor: {self.factor} does not divide the image size {height}x{width}"
        if len(self.blocks) != len(self.widths):
            yield f"blocks: one number per width is needed (got {len(self.blocks)} for {len(self.widths)} widths)"
        if 2 ** (len(self.widths) - 1) > self.factor:
            yield f"widths: {len(self.widths)} resolutions need a factor of {2 ** (len(self.widths) - 1)} or more"
        if any(width % 8 for width in self.widths):
            yield f"widths: must be multiples of 8 (got {list(self.widths)})"


class VQVAE(Tokenizer, name="vqvae"):
    """A convolutional autoencoder with a quantizer in the middle."""

    Config = VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        height, width = config.image_size
        self.image_shape = (config.channels, height, width)
        self.quantizer = Quantizer.find(config.quantizer.kind)(config.quantizer)
        rows = self.quantizer.levels * height // config.factor
        self.grid = TokenGrid((rows, width // config.factor), self.quantizer.vocab_size)
        patch = config.factor // 2 ** (len(config.widths) - 1)
        sizes = (config.channels, patch, config.widths, config.blocks, config.attention, self.quantizer.dim)
        self.encoder, self.decoder = encoder(*sizes), decoder(*sizes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        """Tokens `(B, *grid.shape)` of `images`; raises `ValueError` for images of another size."""
        self.check_images(images)
        return self.quantizer.quantize(self._embed(images)).tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of `tokens`, clamped to [-1, 1]; raises `ValueError` for ids out of range."""
        self.grid.check(tokens)
        return self._paint(self.quantizer.lookup(tokens.long())).clamp(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruction, tokens and the quantizer's losses; images are clamped in eval mode only."""
        z_q, tokens, losses = self.quantizer.quantize(self._embed(images))
        painted = self._paint(z_q)
        return Reconstruction(painted if self.training else painted.clamp(-1, 1), tokens, losses)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The quantizer's."""
        return self.quantizer.loss_weights

    def _embed(self, images: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        return self.encoder(images.to(dtype=dtype, memory_format=torch.channels_last))

    def _paint(self, z_q: Tensor) -> Tensor:
        return self.decoder(z_q.to(next(self.decoder.parameters()).dtype)).float()
