"""A trained VAE made discrete (TokenBridge, Wang et al. 2025): each number of its latent vectors falls into one of some
bins that are equally probable under the aggregate posterior, q(z) = mean of q(z | x) over training images.

The VAE stays what it is; only the bins are fitted, once, to samples of q(z | x). Not to the means, though these are
what is encoded: those of a dimension that the VAE has given up hardly differ and do not matter, and bins that hold
equally many of them turn them into random ids, which a prior pays for in full; beside samples they share a few bins.
On the digits (8 numbers in 16 bins) samples give 22.7 dB for 26.3 bits per vector, means 22.4 dB for 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .base import Reconstruction, Tokenizer, TokenizerConfig
from .files.errors import ConfigError
from .klvae import KLVAE, KLVAEConfig, sample
from .quantizers.codebook import rows_of
from .settings import ModelConfig, Node

IMAGES_AT_A_TIME = 64
FACTS = ("image_size", "channels")
SIZES = (*FACTS, "factor", "widths", "blocks", "attention", "latent", "likelihood")


class PosthocConfig(TokenizerConfig):
    """The VAE, and how finely its latents are binned."""

    bins: int = Field(
        16,
        ge=2,
        le=4096,
        description="ids of each number of a latent vector, equally probable over training images, in place of the "
        "VAE's own",
    )
    vae: Annotated[ModelConfig | None, Node("tokenizer:Tokenizer", only=("klvae",))] = Field(
        None, description="the VAE; null: of its default sizes"
    )

    @model_validator(mode="before")
    @classmethod
    def _sees_the_same_images(cls, values: dict[str, Any]) -> dict[str, Any]:
        node = {"kind": KLVAE.name} if values.get("vae") is None else values["vae"]
        facts = {name: values[name] for name in FACTS if name in values}
        return {**values, "vae": {**facts, **node} if isinstance(node, dict) else node}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; what is known of the images stands in it once."""
        values = super().to_dict()
        return {**values, "vae": {key: value for key, value in values["vae"].items() if key not in FACTS}}

    def check(self) -> Iterator[str]:
        """Both see the same images."""
        yield from super().check()
        ours = super().to_dict()
        theirs = ours["vae"]
        for name in FACTS:
            if ours[name] != theirs[name]:
                yield f"vae.{name}: {theirs[name]}, but the images have {ours[name]}"


class Posthoc(Tokenizer, name="posthoc"):
    """A trained `klvae` with bins of its own; nothing in it is trained any more.

    Made by `start_from(vae)`, then `initialize(images)`. Has a likelihood if the VAE has.
    """

    Config = PosthocConfig
    started: Tensor

    def __init__(self, config: PosthocConfig) -> None:
        super().__init__(config)
        assert isinstance(config.vae, KLVAEConfig)
        self.vae = KLVAE(config.vae.model_copy(update={"bins": config.bins})).requires_grad_(False).eval()
        self.grid, self.levels, self.image_shape = self.vae.grid, self.vae.levels, self.vae.image_shape
        self.register_buffer("started", torch.zeros((), dtype=torch.long))  # whether the VAE is a trained one

    def start_from(self, other: Tokenizer) -> None:
        """Take over the weights of `other`, a trained `klvae` or what has one inside. Raises `ConfigError` for another
        kind or other sizes."""
        vae = other.vae if isinstance(other, Posthoc) else other
        if not isinstance(vae, KLVAE):
            raise ConfigError(f"posthoc: starts from a trained {KLVAE.name}, not from a {other.name!r} tokenizer")
        theirs, ours = vae.config.to_dict(), self.vae.config.to_dict()
        differing = [
            f"vae.{name} {theirs[name]} there, {ours[name]} here" for name in SIZES if theirs[name] != ours[name]
        ]
        if differing:
            raise ConfigError(f"posthoc: cannot start from a {KLVAE.name} of other sizes: {', '.join(differing)}")
        bins = {f"quantizer.{key}": value for key, value in self.vae.quantizer.state_dict().items()}
        self.vae.load_state_dict({**vae.state_dict(), **bins})
        self.started.fill_(1)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fit the bins to the latents of `images` `(B, C, H, W)`; the noise of the samples is always the same. Raises
        `ConfigError` for a VAE that was not started from a trained one, and for more bins than latent vectors."""
        self.check_images(images)
        if not self.started:
            raise ConfigError(
                f"posthoc: its VAE is untrained; pass init=FOLDER with the folder of a trained {KLVAE.name} tokenizer"
            )
        generator = torch.Generator(self.device).manual_seed(0)
        rows = [
            rows_of(sample(*self.vae.posterior(part.to(self.device)), generator=generator))
            for part in images.split(IMAGES_AT_A_TIME)
        ]
        try:
            self.vae.quantizer.fit(torch.cat(rows))
        except ValueError as error:
            raise ConfigError(f"posthoc: bins: {error} in the {len(images)} training images looked at") from error

    def encode(self, images: Tensor) -> Tensor:
        """Tokens `(B, *grid.shape)` of the means; raises `ValueError` for images of another size."""
        return self.vae.encode(images)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of `tokens`, clamped to [-1, 1]; raises `ValueError` for ids out of range."""
        return self.vae.decode(tokens)

    def forward(self, images: Tensor) -> Reconstruction:
        """`decode(encode(images))`; nothing is left to train, so there are no losses."""
        return self.vae(images)._replace(losses={})

    def train(self, mode: bool = True) -> Posthoc:
        """Also in training mode, latents are binned and not sampled."""
        super().train(mode)
        self.vae.eval()
        return self

    @property
    def has_likelihood(self) -> bool:
        """Whether the VAE has one."""
        return self.vae.has_likelihood

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last matrix."""
        return self.vae.last_layer

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        """log p of each pixel channel given the tokens, `(B, C, H, W)` nats. Raises `LikelihoodError` without a
        likelihood."""
        return self.vae.pixel_log_probs(images, tokens)

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        """`(B, 256, H, W)` nats: the likelihood's whole table."""
        return self.vae.value_log_probs(tokens, values, channel)
