"""diffusers' `VQModel`, as one of our tokenizers, so that the same loop trains it on the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import diffusers
from pydantic import Field
from torch import Tensor, nn

from tokenizer.base import Reconstruction, TokenGrid, Tokenizer, TokenizerConfig


class DiffusersConfig(TokenizerConfig):
    """Sizes of a `VQModel`, whose other settings are at their defaults."""

    widths: tuple[Annotated[int, Field(ge=8)], ...] = Field((16, 32, 64, 128), description="channels at each level")
    blocks: int = Field(1, ge=1, description="residual blocks at each level of the encoder")
    groups: int = Field(8, ge=1, description="groups of each group normalisation")
    codes: int = Field(512, ge=2, description="size of the codebook")
    dim: int = Field(64, ge=1, description="width of a code")

    @property
    def factor(self) -> int:
        """Image pixels per token along each side."""
        return 2 ** (len(self.widths) - 1)

    def check(self) -> Iterator[str]:
        """Sizes have to divide."""
        yield from super().check()
        if any(side % self.factor for side in self.image_size):
            yield f"widths: {len(self.widths)} levels need sides that {self.factor} divides"


class Diffusers(Tokenizer, name="diffusers"):
    """Its encoder, its quantizer, learned by gradients, and its decoder."""

    Config = DiffusersConfig

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__(config)
        height, width = config.image_size
        self.image_shape = (config.channels, height, width)
        self.grid = TokenGrid((height // config.factor, width // config.factor), config.codes)
        self.model = diffusers.VQModel(
            in_channels=config.channels,
            out_channels=config.channels,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            down_block_types=("DownEncoderBlock2D",) * len(config.widths),
            up_block_types=("UpDecoderBlock2D",) * len(config.widths),
            latent_channels=config.dim,
            vq_embed_dim=config.dim,
            num_vq_embeddings=config.codes,
            norm_num_groups=config.groups,
            sample_size=height,
            mid_block_add_attention=False,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Tokens `(B, h, w)`."""
        return self._quantize(images)[1]

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens, clamped."""
        shape = (len(tokens), *self.grid.shape, self.config.dim)
        return self._decoded(self.model.quantize.get_codebook_entry(tokens.flatten(), shape)).clamp(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        """The training path; its loss has the weights of the codebook's part and of the commitment in it."""
        z_q, tokens, loss = self._quantize(images)
        found = self._decoded(z_q)
        return Reconstruction(found if self.training else found.clamp(-1, 1), tokens, {"vq": loss})

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last convolution."""
        return self.model.decoder.conv_out.weight

    @property
    def loss_weights(self) -> dict[str, float]:
        """As diffusers adds it."""
        return {"vq": 1.0}

    def _quantize(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents = self.model.encode(images).latents.float()
        z_q, loss, (_, _, ids) = self.model.quantize(latents)
        return z_q, ids.reshape(len(images), *self.grid.shape), loss

    def _decoded(self, z_q: Tensor) -> Tensor:
        return self.model.decode(z_q, force_not_quantize=True).sample.float()
