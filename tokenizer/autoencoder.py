"""Base class of neural tokenizers: encoder, quantizer and decoder (van den Oord et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import LikelihoodError, Reconstruction, TokenGrid, Tokenizer, TokenizerConfig
from .config import ModelConfig, Node
from .likelihoods import Likelihood, to_values
from .precision import at_least_float32, full_float32
from .quantizers import Quantizer
from .quantizers.base import QuantizerNode
from .quantizers.ema import EMAConfig


class DecoderConfig(TokenizerConfig):
    likelihood: Annotated[ModelConfig | None, Node("tokenizer.likelihoods:Likelihood")] = Field(
        None, description="distribution of a pixel's 256 values, for bits per dim and lossless compression; null: none"
    )

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.likelihood is not None:
            yield from self.check_picture(f"the likelihood {self.likelihood.kind}")


class AutoencoderConfig(DecoderConfig):
    quantizer: QuantizerNode = Field(EMAConfig(), description="maps vectors to ids")


class Autoencoder(Tokenizer):
    """Subclasses define `encoder`, which maps (B, C, H, W) to (B, quantizer.dim, H / f, W / f), and `decoder`, which
    maps that to (B, outputs, H, W).

    With a likelihood, `decode` returns its `mean`, and `forward` adds the loss `nll` in nats per pixel channel.
    """

    encoder: nn.Module
    decoder: nn.Module
    outputs: int  # the decoder's channels: those of the image, or the likelihood's parameters

    def __init__(self, config: Any, factor: int, quantizer: Quantizer | None = None) -> None:
        """factor: image pixels per position along each side. quantizer: replaces the configured one."""
        super().__init__(config)
        height, width = config.image_size
        self.quantizer = quantizer or Quantizer.find(config.quantizer.kind)(config.quantizer)
        self.levels = self.quantizer.levels
        shape = self.quantizer.grid_shape(height // factor, width // factor)
        self.grid = TokenGrid(shape, self.quantizer.vocab_size, self.quantizer.scales, levels=self.levels)
        self.likelihood: Likelihood | None = None
        if config.likelihood is not None:
            self.likelihood = Likelihood.find(config.likelihood.kind)(config.likelihood, config.channels)
        self.outputs = config.channels if self.likelihood is None else self.likelihood.num_parameters

    @torch.no_grad()
    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        self.spec.check(images)
        return self.quantizer.encode(self._embed(images))

    @torch.no_grad()
    @full_float32()
    def embed(self, images: Tensor) -> Tensor:
        """Return the vectors `(B, quantizer.dim, h, w)` that `encode` quantizes."""
        self.spec.check(images)
        return self._embed(images)

    @full_float32()
    def decode(self, tokens: Tensor) -> Tensor:
        self.check_tokens(tokens)
        return self._image(self._decode_tokens(tokens)).clamp(-1, 1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise `ValueError` for tokens that cannot be decoded."""
        self.grid.check(tokens)

    @full_float32()
    def decode_scales(self, tokens: Tensor, count: int) -> Tensor:
        """Decode only the `count` coarsest of `grid.scales`. Raises `ValueError`, also without scales."""
        self.grid.check(tokens)
        return self._image(self._decode_vectors(self.quantizer.lookup_scales(tokens.long(), count))).clamp(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        """Return reconstruction, tokens and losses; clamp images only in eval mode."""
        self.spec.check(images)
        z_q, tokens, losses = self.quantizer.quantize(self._embed(images))
        return self._reconstruction(images, z_q, tokens, losses)

    def _reconstruction(self, images: Tensor, z: Tensor, tokens: Tensor, losses: dict[str, Tensor]) -> Reconstruction:
        outputs = self._decode_vectors(z)
        if self.likelihood is not None:
            losses = {**losses, "nll": -self.likelihood.log_prob(outputs, to_values(images)).mean()}
        reconstruction = self._image(outputs)
        return Reconstruction(reconstruction if self.training else reconstruction.clamp(-1, 1), tokens, losses)

    @property
    def figures(self) -> dict[str, Tensor]:
        return self.quantizer.figures

    @property
    def has_likelihood(self) -> bool:
        return self.likelihood is not None

    @property
    def last_layer(self) -> nn.Parameter:
        return [parameter for parameter in self.decoder.parameters() if parameter.ndim > 1][-1]

    @full_float32()
    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self._likelihood().log_prob(self._decode_tokens(tokens), to_values(images))

    @full_float32()
    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        return self._likelihood().table(self._decode_tokens(tokens), values, channel)

    def _likelihood(self) -> Likelihood:
        if self.likelihood is None:
            raise LikelihoodError(f"this {self.name} has no likelihood; train it with model.likelihood")
        return self.likelihood

    @property
    def loss_weights(self) -> dict[str, float]:
        return {**self.quantizer.loss_weights, **({} if self.likelihood is None else {"nll": 1.0})}

    def _embed(self, images: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        return self.encoder(images.to(dtype=dtype, memory_format=torch.channels_last))

    def _decode_tokens(self, tokens: Tensor) -> Tensor:
        return self._decode_vectors(self.quantizer.lookup_checked(tokens.long()))

    def _decode_vectors(self, z_q: Tensor) -> Tensor:
        """Return images, or the likelihood's parameters, in float32 or float64."""
        return at_least_float32(self.decoder(z_q.to(next(self.decoder.parameters()).dtype)))

    def _image(self, outputs: Tensor) -> Tensor:
        return (outputs if self.likelihood is None else self.likelihood.mean(outputs)).float()
