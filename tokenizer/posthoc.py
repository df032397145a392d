"""Post-training quantization of a VAE (TokenBridge, Wang et al. 2025): each latent dimension is divided into bins that
are equally probable under the aggregate posterior, q(z) = mean of q(z | x) over training images.

The VAE is frozen; only the bins are fitted, once, to samples of q(z | x). Encoding quantizes the means, but bins are
not fitted to the means: those of a collapsed dimension hardly vary and carry no information, so equally filled bins
would turn them into random ids, which a prior cannot compress. With bins fitted to samples, such means share a few ids.
On the digits (8 dimensions in 16 bins), samples give 22.7 dB at 26.3 bits per vector, and means 22.4 dB at 32 bits.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import FACTS, OuterConfig, Reconstruction, Tokenizer
from .config import ModelConfig, Node
from .files import ConfigError
from .klvae import KLVAE, KLVAEConfig, sample_gaussian
from .quantizers.codebook import rows_of

IMAGES_AT_A_TIME = 64
SIZES = (*FACTS, "factor", "widths", "blocks", "attention", "upsampling", "tail", "latent", "likelihood")


class PosthocConfig(OuterConfig):
    inner = "vae"
    default = "klvae"

    bins: int = Field(16, ge=2, le=4096, description="ids per latent dimension, equally probable over training images")
    vae: Annotated[ModelConfig | None, Node("tokenizer:Tokenizer", only=("klvae",))] = Field(
        None, description="the VAE; null: default sizes"
    )


class Posthoc(Tokenizer, name="posthoc"):
    """A frozen `klvae` with fitted bins.

    Call `start_from(vae)`, then `initialize(images)`. The VAE provides the likelihood, if any.
    """

    Config = PosthocConfig
    started: Tensor

    def __init__(self, config: PosthocConfig) -> None:
        super().__init__(config)
        assert isinstance(config.vae, KLVAEConfig)
        self.vae = KLVAE(config.vae.model_copy(update={"bins": config.bins})).requires_grad_(False).eval()
        self.grid, self.levels = self.vae.grid, self.vae.levels
        self.register_buffer("started", torch.zeros((), dtype=torch.long))  # 1 if the VAE is trained

    def start_from(self, other: Tokenizer) -> None:
        """Copy the weights of `other`, a trained `klvae` or `posthoc` tokenizer of the same sizes."""
        vae = other.vae if isinstance(other, Posthoc) else other
        if not isinstance(vae, KLVAE):
            raise ConfigError(f"posthoc: needs a trained {KLVAE.name} to start from, got a {other.name!r} tokenizer")
        both = (self.vae.config.to_dict(), vae.config.to_dict())
        self.require_equal(*({f"vae.{name}": settings.get(name) for name in SIZES} for settings in both))
        bins = {f"quantizer.{key}": value for key, value in self.vae.quantizer.state_dict().items()}
        self.vae.load_state_dict({**vae.state_dict(), **bins})
        self.started.fill_(1)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fit the bins to posterior samples of `images`, with a fixed seed. Raises `ConfigError`."""
        self.spec.check(images)
        if not self.started:
            raise ConfigError(
                f"posthoc: the VAE is untrained; set init=FOLDER to the folder of a trained {KLVAE.name} tokenizer"
            )
        generator = torch.Generator(self.device).manual_seed(0)
        rows = [
            rows_of(sample_gaussian(*self.vae.posterior(part.to(self.device)), generator=generator))
            for part in images.split(IMAGES_AT_A_TIME)
        ]
        try:
            self.vae.quantizer.fit(torch.cat(rows))
        except ValueError as error:
            raise ConfigError(f"posthoc: bins: {error} from {len(images)} training images") from error

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.vae.decode(tokens)

    def forward(self, images: Tensor) -> Reconstruction:
        """Return `decode(encode(images))`, without losses, because nothing is trained."""
        return self.vae(images)._replace(losses={})

    def train(self, mode: bool = True) -> Posthoc:
        """Set the mode, but keep the VAE in eval mode so that latents are binned, not sampled."""
        super().train(mode)
        self.vae.eval()
        return self

    @property
    def has_likelihood(self) -> bool:
        return self.vae.has_likelihood

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.last_layer

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.vae.pixel_log_probs(images, tokens)

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        return self.vae.value_log_probs(tokens, values, channel)
