"""Clips as tokens of their frames: an image tokenizer encodes each frame on its own, and a prior over the grid
(frames, rows, columns) models how they follow each other. VideoGPT (Yan et al. 2021) has the same two stages, with a
tokenizer that also compresses in time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from .base import FACTS, OuterConfig, Reconstruction, TokenGrid, Tokenizer
from .config import Fact, ModelConfig, Node
from .files import ConfigError
from .spec import ImageSpec


class FrameByFrameConfig(OuterConfig):
    inner = "tokenizer"
    default = "vqvae"

    image_size: Fact[tuple[Annotated[int, Field(ge=1, le=1 << 16)], ...]] = Field(
        description="height of all frames of a clip below one another, and width"
    )
    frames: Fact[Annotated[int, Field(ge=2, le=4096)]] = Field(description="frames of a clip")
    tokenizer: Annotated[ModelConfig | None, Node("tokenizer:Tokenizer")] = Field(
        None, description=f"the tokenizer of a frame; null: {default} with default sizes"
    )

    @classmethod
    def inner_facts(cls, values: dict[str, Any]) -> dict[str, Any]:
        facts: dict[str, Any] = super().inner_facts(values)
        size: Any = values.get("image_size")
        frames: Any = values.get("frames")
        with suppress(TypeError, ValueError, ZeroDivisionError):  # of invalid settings, which pydantic reports
            height, width = [size, size] if isinstance(size, int) else size
            facts["image_size"] = [height // frames, width]
        return facts

    @property
    def spec(self) -> ImageSpec:
        one = super().spec
        return replace(one, height=one.height // self.frames, frames=self.frames)

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.image_size[0] % self.frames:
            yield f"image_size: {self.frames} frames below one another cannot be {self.image_size[0]} pixels high"


class FrameByFrame(Tokenizer, name="frame_by_frame"):
    """Encodes clips `(B, T, C, H, W)` as tokens `(B, T, h, w)`.

    The tokenizer of a frame needs a grid of two axes with one id for each position. It provides the likelihood, if any.
    """

    Config = FrameByFrameConfig

    def __init__(self, config: FrameByFrameConfig, tokenizer: Tokenizer | None = None) -> None:
        """tokenizer: that of a frame; None makes an untrained one."""
        super().__init__(config)
        assert config.tokenizer is not None
        self.tokenizer = Tokenizer.find(config.tokenizer.kind)(config.tokenizer) if tokenizer is None else tokenizer
        grid = self.tokenizer.grid
        if len(grid.shape) != 2 or grid.scales or grid.ids_per_position > 1:
            raise ConfigError(
                f"frame_by_frame: tokenizer: a {self.tokenizer.name!r} tokenizer does not give a grid of two axes with "
                "one id for each position"
            )
        self.grid = TokenGrid((config.frames, *grid.shape), grid.vocab_size, channels=grid.channels)

    @classmethod
    def wrap(cls, tokenizer: Tokenizer, frames: int) -> Tokenizer:
        """Return a tokenizer of clips of this many frames that shares the weights of `tokenizer`; return `tokenizer` if
        it encodes clips already, or for a single frame. Raises `ConfigError` for another kind of grid."""
        if frames == 1 or tokenizer.spec.frames > 1:
            return tokenizer
        facts = {name: getattr(tokenizer.config, name) for name in FACTS}
        height, width = facts.pop("image_size")
        facts["image_size"] = (frames * height, width)
        made = cls(FrameByFrameConfig(**facts, frames=frames, tokenizer=tokenizer.config), tokenizer)
        return made.train(tokenizer.training)

    def encode(self, images: Tensor) -> Tensor:
        self.spec.check(images)
        return self.join(self.tokenizer.encode(images.flatten(0, 1)))

    @property
    def quantizer(self) -> Any:
        """The quantizer of a frame, if its tokenizer has one."""
        return self.tokenizer.quantizer

    def embed(self, images: Tensor) -> Tensor:
        """Return the vectors `(B, dim, T, h, w)` that `encode` quantizes."""
        self.spec.check(images)
        frames: Any = self.tokenizer
        return self.join(frames.embed(images.flatten(0, 1))).movedim(2, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        self.grid.check(tokens)
        return self.join(self.tokenizer.decode(tokens.flatten(0, 1)))

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruct clips; the losses are those of all frames."""
        self.spec.check(images)
        frames, tokens, losses = self.tokenizer(images.flatten(0, 1))
        return Reconstruction(self.join(frames), self.join(tokens), losses)

    def initialize(self, images: Tensor) -> None:
        self.spec.check(images)
        self.tokenizer.initialize(images.flatten(0, 1))

    def join(self, frames: Tensor) -> Tensor:
        """Reshape `(B * T, ...)` to `(B, T, ...)`."""
        return frames.reshape(len(frames) // self.spec.frames, self.spec.frames, *frames.shape[1:])

    @property
    def has_likelihood(self) -> bool:
        return self.tokenizer.has_likelihood

    @property
    def reversible(self) -> bool:
        return self.tokenizer.reversible

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.join(self.tokenizer.pixel_log_probs(images.flatten(0, 1), tokens.flatten(0, 1)))

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        return self.join(self.tokenizer.value_log_probs(tokens.flatten(0, 1), values.flatten(0, 1), channel))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.tokenizer.last_layer

    @property
    def loss_weights(self) -> dict[str, float]:
        return self.tokenizer.loss_weights

    @property
    def figures(self) -> dict[str, Tensor]:
        return self.tokenizer.figures

    def known_tokens(self, known: Tensor) -> Tensor:
        return self.join(self.tokenizer.known_tokens(known.flatten(0, 1)))
