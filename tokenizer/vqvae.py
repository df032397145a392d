"""VQ-VAE (van den Oord et al. 2017): encoder, quantizer, decoder. The default tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LikelihoodError, Reconstruction, TokenGrid, Tokenizer
from .layers import decoder, encoder
from .likelihoods import Likelihood
from .likelihoods.base import to_values
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

    likelihood: ModelConfig | None = setting(None, "what the decoder says of a pixel's 256 values, which bits per dim "
                                             "and lossless compression need; null: a point",
                                             family="tokenizer.likelihoods:Likelihood")  # fmt: skip

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
    """A convolutional autoencoder with a quantizer in the middle.

    With a likelihood, `decode` gives the expected image, and `forward` one more loss, `nll`: nats per pixel channel.
    """

    Config = VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        height, width = config.image_size
        self.image_shape = (config.channels, height, width)
        self.quantizer = Quantizer.find(config.quantizer.kind)(config.quantizer)
        rows = self.quantizer.levels * height // config.factor
        self.grid = TokenGrid((rows, width // config.factor), self.quantizer.vocab_size)
        self.likelihood: Likelihood | None = None
        if config.likelihood is not None:
            self.likelihood = Likelihood.find(config.likelihood.kind)(config.likelihood, config.channels)
        outputs = config.channels if self.likelihood is None else self.likelihood.num_parameters
        patch = config.factor // 2 ** (len(config.widths) - 1)
        sizes = (patch, config.widths, config.blocks, config.attention, self.quantizer.dim)
        self.encoder, self.decoder = encoder(config.channels, *sizes), decoder(outputs, *sizes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        """Tokens `(B, *grid.shape)` of `images`; raises `ValueError` for images of another size."""
        self.check_images(images)
        return self.quantizer.quantize(self._embed(images)).tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of `tokens`, clamped to [-1, 1]; raises `ValueError` for ids out of range."""
        self.grid.check(tokens)
        return self._image(self._paint(tokens)).clamp(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruction, tokens and losses; images are clamped in eval mode only."""
        z_q, tokens, losses = self.quantizer.quantize(self._embed(images))
        painted = self._decoded(z_q)
        if self.likelihood is not None:
            losses = {**losses, "nll": -self.likelihood.log_prob(painted, to_values(images)).mean()}
        reconstruction = self._image(painted)
        return Reconstruction(reconstruction if self.training else reconstruction.clamp(-1, 1), tokens, losses)

    @property
    def has_likelihood(self) -> bool:
        """Whether it was made with one."""
        return self.likelihood is not None

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        """log p of each pixel channel given the tokens, `(B, C, H, W)` nats. Raises `LikelihoodError` without a
        likelihood."""
        return self._likelihood().log_prob(self._paint(tokens), to_values(images))

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        """`(B, 256, H, W)` nats: the mixture's whole table."""
        return self._likelihood().table(self._paint(tokens), values, channel)

    def _likelihood(self) -> Likelihood:
        if self.likelihood is None:
            raise LikelihoodError("this vqvae was made without a likelihood (model.likelihood)")
        return self.likelihood

    @property
    def loss_weights(self) -> dict[str, float]:
        """The quantizer's, and 1 for the likelihood's."""
        return {**self.quantizer.loss_weights, **({} if self.likelihood is None else {"nll": 1.0})}

    def _embed(self, images: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        return self.encoder(images.to(dtype=dtype, memory_format=torch.channels_last))

    def _paint(self, tokens: Tensor) -> Tensor:
        return self._decoded(self.quantizer.lookup(tokens.long()))

    def _decoded(self, z_q: Tensor) -> Tensor:
        """What the decoder puts out, at least in float32: images, or the likelihood's parameters."""
        dtype = next(self.decoder.parameters()).dtype
        out = self.decoder(z_q.to(dtype))
        return out if dtype == torch.float64 else out.float()

    def _image(self, painted: Tensor) -> Tensor:
        return (painted if self.likelihood is None else self.likelihood.mean(painted)).float()
