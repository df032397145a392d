"""The contract of stage one: a tokenizer turns images into a grid of ids and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, PlainSerializer, PlainValidator, field_validator
from torch import Tensor, nn

from .config import MAX_ITEMS, Fact, ModelConfig
from .files import ConfigError, quote
from .model import PretrainedModel
from .precision import in_finest
from .quantizers.updates import one_training_forward
from .scales import Resize as Resize
from .scales import Scales, areas, scales_problem


@dataclass(frozen=True)
class TokenGrid:
    """The shape of an image's tokens and the number of ids; `len(grid)` is the number of tokens.

    scales: (height, width) of each map of ids, coarse to fine, where the tokens `(L,)` are several maps of an image.
    levels: number of ids of each position; the first ids of all positions come before the second ones along the first
    axis. channels: number of channels if the ids are intensities of pixels: row `channels * i + c` holds channel c of
    image row i; 0 if the ids are codes.
    """

    shape: tuple[int, ...]
    vocab_size: int
    scales: Scales = ()
    levels: int = 1
    channels: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "scales", tuple(map(tuple, self.scales)))
        whole = [*self.shape, self.vocab_size]
        if not self.shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in whole):
            raise ConfigError(
                f"a grid needs positive whole sizes (got shape {self.shape}, vocab_size {self.vocab_size})"
            )
        if math.prod(self.shape) > 1 << 20 or self.vocab_size > 1 << 20:
            raise ConfigError(f"a grid holds at most 2^20 tokens of 2^20 ids (got {self.shape}, {self.vocab_size})")
        if self.scales and (problem := scales_problem(self.scales, self.shape)):
            raise ConfigError(f"scales: {problem}")
        if problem := positions_problem(self):
            raise ConfigError(problem)

    @property
    def ids_per_position(self) -> int:
        """The number of ids of a position: its levels, or the channels of a pixel."""
        return max(self.levels, self.channels)

    @property
    def positions(self) -> TokenGrid:
        """The grid of positions, with one id for each."""
        return TokenGrid((self.shape[0] // self.ids_per_position, *self.shape[1:]), self.vocab_size)

    @property
    def cells(self) -> Tensor:
        """The raster indices of each position's ids, int64 `(P, ids_per_position)`."""
        indices = torch.arange(len(self), device="cpu")
        if not self.channels:
            return indices.view(self.levels, -1).t().contiguous()
        return indices.view(-1, self.channels, math.prod(self.shape[1:])).mT.flatten(0, 1)

    def __len__(self) -> int:
        return math.prod(self.shape)

    def check(self, tokens: Tensor) -> None:
        """Raise `ValueError` unless `tokens` is an integer `(B, *shape)` with ids in `[0, vocab_size)`."""
        whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        if not whole or tuple(tokens.shape[1:]) != self.shape:
            raise ValueError(
                f"tokens should be whole numbers of shape (B, {', '.join(map(str, self.shape))}), "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        ids = tokens.long()  # torch has no minimum of uint16, the type in token files
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(
                f"token ids should lie in [0, {self.vocab_size}), got {int(ids.min())} to {int(ids.max())}"
            )


def positions_problem(grid: TokenGrid) -> str | None:
    """Return what is wrong with a grid's levels or channels, in one line, or None."""
    counts = {"levels": grid.levels, "channels": grid.channels}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < (name == "levels"):
            return f"{name}: expected a whole number (got {count!r})"
    if grid.levels > 1 and (grid.channels or grid.scales):
        return f"levels: ids of {grid.levels} levels are neither pixels nor maps of scales"
    if grid.shape[0] % grid.ids_per_position:
        return f"a grid of {grid.shape[0]} rows cannot hold {grid.ids_per_position} ids for each position"
    return None


def read_grid(value: Any) -> TokenGrid:
    """Parse the JSON form of a grid; a grid is returned unchanged. Raises `ValueError`."""
    if isinstance(value, TokenGrid):
        return value
    if not isinstance(value, dict) or set(value) - {"scales", "levels", "channels"} != {"shape", "vocab_size"}:
        raise ValueError(f"expected the keys shape, vocab_size (got {quote(value)})")
    shape, scales = value["shape"], value.get("scales", [])
    for name, items in (("shape", shape), ("scales", scales)):
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{name}: expected a list (got {quote(items)})")
        if len(items) > MAX_ITEMS:
            raise ValueError(f"expected at most {MAX_ITEMS} values in a list")
    if not all(isinstance(sides, (list, tuple)) for sides in scales):
        raise ValueError(f"scales: expected pairs (got {quote(scales)})")
    facts = {name: value[name] for name in ("levels", "channels") if name in value}
    return TokenGrid(tuple(shape), value["vocab_size"], tuple(map(tuple, scales)), **facts)


def grid_to_dict(grid: TokenGrid) -> dict[str, Any]:
    """Return the JSON form of a grid, without defaults."""
    scales = {"scales": [list(sides) for sides in grid.scales]} if grid.scales else {}
    levels = {"levels": grid.levels} if grid.levels > 1 else {}
    channels = {"channels": grid.channels} if grid.channels else {}
    return {"shape": list(grid.shape), "vocab_size": grid.vocab_size, **scales, **levels, **channels}


Grid = Annotated[TokenGrid, PlainValidator(read_grid), PlainSerializer(grid_to_dict, return_type=dict)]
"""A grid as a field of a configuration."""


class LikelihoodError(ValueError):
    """A density of pixels was asked for, but the tokenizer has no likelihood."""


class Reconstruction(NamedTuple):
    """The result of `Tokenizer.forward`: images `(B, C, H, W)`, tokens `(B, *grid.shape)`, unweighted scalar losses."""

    images: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


class TokenizerConfig(ModelConfig):
    """Settings shared by all tokenizers."""

    image_size: Fact[tuple[Annotated[int, Field(ge=1, le=4096)], ...]] = Field(
        description="height and width of the images; a single number is both"
    )
    channels: Fact[Literal[1, 3]] = Field(description="1 for grey, 3 for RGB")

    @field_validator("image_size", mode="before")
    @classmethod
    def _of_one_side(cls, value: Any) -> Any:
        """Read a single number as the side of square images."""
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a whole number or [height, width] (got {quote(value)})")
        return value

    def check(self) -> Iterator[str]:
        """Check that the image size has two sides."""
        if len(self.image_size) != 2:
            yield f"image_size: expected [height, width] (got {list(self.image_size)})"


class Tokenizer(PretrainedModel, family="tokenizer tokenizer.published"):
    """Images `(B, C, H, W)` in [-1, 1] to tokens `(B, *grid.shape)` and back.

    `encode`, `decode` and the likelihoods compute in `full_float32`, so that GPUs and CPUs agree up to rounding.
    `forward` computes in the precision that the user chose for training.

    A training loop calls `initialize` once, then the tokenizer itself, which runs `forward`. In training mode and with
    gradients enabled, a codebook that updates itself does so after each call (see `quantizers/updates.py`).
    """

    grid: TokenGrid
    image_shape: tuple[int, int, int]
    """(C, H, W), from the configuration."""
    levels: int = 1
    """Number of ids per position; the grid has this many rows for each row of positions."""
    prefixes: tuple[int, ...] = ()
    """Prefix lengths to show in previews, the last being all tokens; empty if prefixes do not decode."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().__call__(*args, **kwargs)
        with one_training_forward():
            return super().__call__(*args, **kwargs)

    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens `(B, *grid.shape)` of `images`."""
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of `tokens`, clamped to [-1, 1]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruct `images` for training: the result has gradients and losses."""
        raise NotImplementedError

    def initialize(self, images: Tensor) -> None:  # noqa: B027 (most models need no images)
        """Prepare for training; called once, with training images `(B, C, H, W)` in [-1, 1], for tokenizers that start
        from their statistics or consist of them. Raises `ConfigError` if the images do not suit the configuration."""

    def start_from(self, other: Tokenizer) -> None:
        """Copy the weights of `other`, which has the same configuration. Raises `ConfigError` naming what differs."""
        mine, theirs = self.config.to_dict(), other.config.to_dict()
        differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {theirs.get(key)!r} there, {mine.get(key)!r} here" for key in differing)
            raise ConfigError(f"{self.name}: cannot start from a tokenizer of another configuration: {pairs}")
        self.load_state_dict(other.state_dict())

    @property
    def has_likelihood(self) -> bool:
        """Whether the tokenizer has p(image | tokens), which `pixel_log_probs` and `value_log_probs` need."""
        return False

    @property
    def reversible(self) -> bool:
        """Whether `decode(encode(images))` returns every 8-bit image unchanged."""
        return False

    def pixel_log_prob(self, images: Tensor, tokens: Tensor) -> Tensor | None:
        """Return log p(images | tokens) of 8-bit images, `(B,)` nats; None without a likelihood. Raises `ValueError`
        for other numbers or shapes of images."""
        if not self.has_likelihood:
            return None
        if images.shape != (wanted := (len(tokens), *self.image_shape)):
            raise ValueError(f"images should have shape {wanted}, to match the tokens, got {tuple(images.shape)}")
        return in_finest(self.pixel_log_probs(images, tokens)).flatten(1).sum(1).float()

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return log p of each pixel channel of 8-bit images, given the tokens and the channels before it:
        `(B, C, H, W)` nats. Raises `LikelihoodError` without a likelihood."""
        raise LikelihoodError(f"a {self.name!r} tokenizer has no likelihood of pixels")

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        """Return log p of each of the 256 values of one channel, `(B, 256, H, W)` nats, given the tokens and the
        channels before it of int64 `values` (B, C, H, W). Raises `LikelihoodError` without a likelihood."""
        raise LikelihoodError(f"a {self.name!r} tokenizer has no likelihood of pixels")

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the layer that computes the pixels. Raises `ValueError` for a tokenizer without a network."""
        raise ValueError(f"a {self.name!r} tokenizer has no network")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of `forward`'s losses in the training loss, beside the pixel losses."""
        return {}

    @property
    def figures(self) -> dict[str, Tensor]:
        """Metrics of the last steps, logged in training beside the losses."""
        return {}

    @property
    def parts(self) -> tuple[int, ...]:
        """The number of tokens of each level or scale, in the order of the flat grid."""
        return tuple(areas(self.grid.scales)) or (len(self.grid) // self.levels,) * self.levels

    @property
    def placed(self) -> bool:
        """Whether each token represents a part of the image, so that `known_tokens` works."""
        return len(self.grid.shape) > 1

    def known_tokens(self, known: Tensor) -> Tensor:
        """Return which tokens are known, `(B, *grid.shape)`, given the known pixels, bool `(B, H, W)`: a token is known
        if its whole patch is. The tokens of a two-axis grid tile the image; a taller grid holds several levels. Raises
        `ValueError` unless tokens are `placed`."""
        if self.grid.scales:
            raise ValueError(
                "a coarse scale's token belongs to no part of the image, so known pixels make no token known"
            )
        _, height, width = self.image_shape
        rows, columns = self.grid.shape[0] // self.levels, self.grid.shape[1]
        patches = known.reshape(-1, rows, height // rows, columns, width // columns)
        return patches.all(dim=4).all(dim=2).repeat(1, self.levels, 1)

    def check_images(self, images: Tensor) -> None:
        """Raise `ValueError` unless `images` is float `(B, C, H, W)` of this tokenizer's size."""
        if not images.dtype.is_floating_point or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images should be floats of shape (B, {', '.join(map(str, self.image_shape))}), "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )


def codebook_usage(counts: Tensor) -> dict[str, Tensor]:
    """Return `usage`, the share of ids that occur, and `perplexity` (1 to vocab_size), exp of the entropy of their
    frequencies.

    counts: how often each id occurred, `(vocab_size,)`.
    """
    p = in_finest(counts) / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()
    return {"usage": in_finest(counts > 0).mean(), "perplexity": entropy.exp()}
