"""VAE (Kingma & Welling 2014): Gaussian latents on a grid, as latent diffusion has them (Rombach et al. 2022).

Training decodes a sample of q(z | x) = N(mean, variance) and keeps q near N(0, 1). The tokens are the means, each
dimension in equally probable bins of N(0, 1); `posthoc` fits the bins to the trained latents.

The loss `kl` is in nats per pixel channel, like `nll`. With a likelihood and `beta` 1, nll + kl is the negative ELBO
(with `free_bits`, an upper bound of it). Against the squared error `l2`, beta = 2 sigma^2 makes it the ELBO of Gaussian
pixels of deviation sigma; the best sigma^2 is the squared error that remains (Rybkin et al. 2021).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from .autoencoder import Autoencoder, DecoderConfig
from .base import Reconstruction
from .bins import Bins
from .layers import ConvolutionsConfig, decoder, encoder
from .precision import at_least_float32

LOG_VARIANCES = (-30.0, 20.0)


class KLVAEConfig(DecoderConfig, ConvolutionsConfig):
    """Sizes of the networks and of the latents, and the weight of the KL."""

    latent: int = Field(4, ge=1, le=256, description="numbers in a latent vector, each of which becomes a token")
    beta: float = Field(
        0.02,
        ge=0,
        description="weight of the KL in nats per pixel channel; 1 beside a likelihood, twice the "
        "remaining squared error beside l2",
    )
    free_bits: float = Field(
        0.0,
        ge=0,
        description="nats of each latent dimension, on average over a batch, that cost nothing (Kingma et al. 2016), "
        "so that no dimension collapses",
    )
    bins: int = Field(16, ge=2, le=4096, description="ids of each number, equally probable under N(0, 1)")


class KLVAE(Autoencoder, name="klvae"):
    """Continuous Gaussian latents in training, their means in bins of N(0, 1) in use."""

    Config = KLVAEConfig
    quantizer: Bins

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__(config, config.factor, Bins(config.latent, config.bins))
        self.encoder = encoder(config.channels, config.sizes, 2 * config.latent)
        self.decoder = decoder(self.outputs, config.sizes, config.latent)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruction, tokens of the means, and losses `kl` and, with a likelihood, `nll`, both in nats per pixel
        channel. Training decodes a sample, with noise from torch's own generator; eval decodes the binned mean."""
        mean, log_variance = self.posterior(images)
        z_q, tokens, _ = self.quantizer.quantize(mean)
        z = sample(mean, log_variance) if self.training else z_q
        return self._reconstruction(images, z, tokens, {"kl": self.kl(mean, log_variance)})

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | images), `(B, latent, H / f, W / f)` each, at least in float32."""
        mean, log_variance = at_least_float32(super()._embed(images)).chunk(2, 1)
        return mean, log_variance.clamp(*LOG_VARIANCES)

    def kl(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """KL(q || N(0, 1)), a scalar in nats per pixel channel: each dimension's mean over images and positions, at
        least `free_bits`, summed over dimensions."""
        each = gaussian_kl(mean, log_variance).mean((0, 2, 3)).clamp(min=self.config.free_bits)
        return each.sum() / (self.config.channels * self.config.factor**2)

    @property
    def loss_weights(self) -> dict[str, float]:
        """`beta` for the KL, 1 for the likelihood."""
        return {"kl": self.config.beta, **super().loss_weights}

    def _embed(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each element, in nats (Kingma & Welling 2014, appendix B)."""
    return (mean.square() + torch.expm1(log_variance) - log_variance) / 2


def sample(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A differentiable draw from N(mean, variance); without a generator, the noise comes from torch's own."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + (log_variance / 2).exp() * noise
