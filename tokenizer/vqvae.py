"""VQ-VAE (van den Oord et al. 2017): a convolutional autoencoder with a quantizer. The default tokenizer."""

from __future__ import annotations

import torch

from .autoencoder import Autoencoder, AutoencoderConfig
from .layers import ConvolutionsConfig, build_decoder, build_encoder, find_halo


class VQVAEConfig(AutoencoderConfig, ConvolutionsConfig):
    """Sizes of the networks, and the quantizer."""


class VQVAE(Autoencoder, name="vqvae"):
    """The convolutional encoder and decoder of `layers.py` with a quantizer."""

    Config = VQVAEConfig
    resizable = True

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config, config.factor)
        self.encoder = build_encoder(config, self.quantizer.dim)
        self.decoder = build_decoder(config, self.quantizer.dim, self.outputs)
        self.halo = find_halo(self.decoder)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
