"""VAE (Kingma & Welling 2014) with Gaussian latents on a grid, as in latent diffusion (Rombach et al. 2022).

Training decodes a sample of q(z | x) = N(mean, variance) and keeps q near N(0, 1). Tokens quantize the mean: each
dimension is divided into equally probable bins of N(0, 1). `posthoc` instead fits the bins to the trained latents.

The loss `kl` is in nats per pixel channel, like `nll`. With a likelihood and `beta` 1, nll + kl is the negative ELBO
(an upper bound of it with `free_bits`). With the squared error `l2` and beta = 2 sigma^2, the loss is proportional to
the negative ELBO of Gaussian pixels with standard deviation sigma; the optimal sigma^2 equals the final squared error
(Rybkin et al. 2021).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from .autoencoder import Autoencoder, DecoderConfig
from .base import Reconstruction
from .config import ModelConfig
from .layers import ConvolutionsConfig, build_decoder, build_encoder
from .precision import at_least_float32, in_finest
from .quantizers import Quantized, Quantizer
from .quantizers.gradients import straight_through

LOG_VARIANCES = (-30.0, 20.0)


class KLVAEConfig(DecoderConfig, ConvolutionsConfig):
    latent: int = Field(4, ge=1, le=256, description="dimensions of a latent vector; each becomes one token")
    beta: float = Field(
        0.02,
        ge=0,
        description="weight of the KL in nats per pixel channel: 1 with a likelihood, else twice the final l2",
    )
    free_bits: float = Field(
        0.0, ge=0, description="nats per latent dimension that cost nothing, against collapse (Kingma et al. 2016)"
    )
    bins: int = Field(16, ge=2, le=4096, description="ids per dimension, equally probable under N(0, 1)")


class KLVAE(Autoencoder, name="klvae"):
    """Decodes sampled latents in training, and binned means otherwise."""

    Config = KLVAEConfig
    quantizer: Bins

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__(config, config.factor, Bins(config.latent, config.bins))
        self.encoder = build_encoder(config, 2 * config.latent)
        self.decoder = build_decoder(config, config.latent, self.outputs)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Reconstruction:
        """Training decodes a sample of the posterior, drawn by torch's global generator; eval mode the binned mean."""
        self.spec.check(images)
        mean, log_variance = self.posterior(images)
        z_q, tokens, _ = self.quantizer.quantize(mean)
        z = sample_gaussian(mean, log_variance) if self.training else z_q
        return self._reconstruction(images, z, tokens, {"kl": self.kl(mean, log_variance)})

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | images), `(B, latent, H / f, W / f)` each, in float32 or float64."""
        mean, log_variance = at_least_float32(super()._embed(images)).chunk(2, 1)
        return mean, log_variance.clamp(*LOG_VARIANCES)

    def kl(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Return KL(q || N(0, 1)) in nats per pixel channel; each dimension costs at least `free_bits`."""
        each = gaussian_kl(mean, log_variance).mean((0, 2, 3)).clamp(min=self.config.free_bits)
        return each.sum() / (self.config.channels * self.config.factor**2)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"kl": self.config.beta, **super().loss_weights}

    def _embed(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]


class Bins(Quantizer):
    """Scalar quantization into bins of equal probability (TokenBridge, Wang et al. 2025), `bins` ids per dimension.

    Id k of dimension d covers edges[d, k - 1] <= z < edges[d, k]. It decodes to centres[d, k], the mean of the values
    in the bin, which minimises the squared error. Bins are initialised for the standard normal; `fit` sets them to
    quantiles of given vectors. Dimension d of row r is row `d * rows + r` of the tokens.
    """

    edges: Tensor
    centres: Tensor

    def __init__(self, dim: int, bins: int) -> None:
        super().__init__(ModelConfig())
        self.dim = self.levels = dim
        self.vocab_size = bins
        edges, centres = gaussian_bins(bins)
        self.register_buffer("edges", edges.float().repeat(dim, 1))  # (dim, bins - 1)
        self.register_buffer("centres", centres.float().repeat(dim, 1))  # (dim, bins)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Set each dimension's bin edges to quantiles of the vectors `rows` (n, dim), and the centres to the means of
        the bins. Raises `ValueError` for fewer vectors than bins.

        Equal values share one bin, and the bins that they would also have filled stay empty, with their edge as centre.
        Equal centres are separated by one floating-point step to keep ids distinct.
        """
        count, bins = len(rows), self.vocab_size
        if count < bins:
            raise ValueError(f"{bins} bins need at least {bins} vectors (got {count})")
        ordered = rows.to(self.edges).t().contiguous().sort(1).values
        edges = ordered[:, torch.arange(1, bins, device=ordered.device) * count // bins]
        self.edges.copy_(edges)
        ids, values = self._ids(ordered), in_finest(ordered)
        totals = values.new_zeros(self.dim, bins)
        sums, counts = totals.scatter_add(1, ids, values), totals.scatter_add(1, ids, torch.ones_like(values))
        empty = in_finest(torch.cat([edges[:, :1], edges], 1))
        self.centres.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), empty))
        for before, centre in zip(self.centres.t(), self.centres.t()[1:], strict=False):
            torch.maximum(centre, before.nextafter(torch.full_like(before, math.inf)), out=centre)

    def _quantize(self, z: Tensor) -> Quantized:
        rows = z.detach().transpose(0, 1)
        ids = self._ids(rows.reshape(self.dim, -1)).reshape(rows.shape)
        tokens = ids.transpose(0, 1).flatten(1, 2)
        return Quantized(straight_through(z, self.lookup_checked(tokens)), tokens, {})

    def _ids(self, rows: Tensor) -> Tensor:
        return torch.searchsorted(self.edges, rows.contiguous(), right=True)

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        ids = tokens.unflatten(1, (self.dim, -1)).transpose(0, 1)
        return self.centres.gather(1, ids.flatten(1)).reshape(ids.shape).transpose(0, 1).contiguous()


def gaussian_bins(bins: int) -> tuple[Tensor, Tensor]:
    """Return the edges `(bins - 1,)` of equally probable bins of N(0, 1), and the mean of each bin `(bins,)`, float64:
    E[z | a < z < b] = (phi(a) - phi(b)) / P(a < z < b), where phi is the density."""
    edges = torch.special.ndtri(torch.arange(1, bins, dtype=torch.float64) / bins)
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    ends = density.new_zeros(1)
    return edges, bins * (torch.cat([ends, density]) - torch.cat([density, ends]))


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) per element, in nats (Kingma & Welling 2014, appendix B)."""
    return (mean.square() + torch.expm1(log_variance) - log_variance) / 2


def sample_gaussian(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a reparametrised sample from N(mean, variance), by default with torch's global generator."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + (log_variance / 2).exp() * noise
