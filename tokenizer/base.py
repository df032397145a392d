"""The contract of stage one: a tokenizer maps images to grids of ids and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from .config import Fact, ModelConfig
from .files import ConfigError, quote
from .model import PretrainedModel
from .precision import in_finest
from .quantizers.updates import one_training_forward
from .scales import Resize as Resize
from .scales import Scales, areas, scales_problem
from .spec import BYTES, ImageSpec, ValueType, spec_problems


def smallest_type(vocab_size: int) -> torch.dtype:
    return torch.uint8 if vocab_size <= 1 << 8 else torch.uint16 if vocab_size <= 1 << 16 else torch.uint32


@dataclass(frozen=True)
class TokenGrid:
    """The shape of an image's tokens and the vocabulary size; `len(grid)` is the number of tokens.

    scales: (height, width) of each map, coarse to fine, if the tokens `(L,)` are several maps of one image. levels: ids
    per position; along the first axis, the first ids of all positions precede the second. channels: those of the image
    if ids are intensities (row `channels * i + c` holds channel c of image row i); 0 if ids are codes.
    """

    shape: tuple[int, ...]
    vocab_size: int
    scales: Scales = ()
    levels: int = 1
    channels: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "scales", tuple(map(tuple, self.scales)))
        whole = all(type(n) is int for n in (*self.shape, self.vocab_size, self.levels, self.channels))
        if not self.shape or not whole or min(*self.shape, self.vocab_size, self.levels, self.channels + 1) < 1:
            raise ConfigError(f"a grid needs positive whole sizes (got {self})")
        if math.prod(self.shape) > 1 << 20 or self.vocab_size > 1 << 20:
            raise ConfigError(f"a grid may have at most 2^20 tokens and 2^20 ids (got {self.shape}, {self.vocab_size})")
        if self.scales and (problem := scales_problem(self.scales, self.shape)):
            raise ConfigError(f"scales: {problem}")
        if self.levels > 1 and (self.channels or self.scales):
            raise ConfigError(f"levels: {self.levels} levels cannot be combined with channels or scales")
        if self.shape[0] % self.ids_per_position:
            raise ConfigError(f"{self.shape[0]} rows cannot hold {self.ids_per_position} ids for each position")

    @property
    def ids_per_position(self) -> int:
        """Number of ids per position: its levels, or a pixel's channels."""
        return max(self.levels, self.channels)

    @property
    def positions(self) -> TokenGrid:
        return TokenGrid((self.shape[0] // self.ids_per_position, *self.shape[1:]), self.vocab_size)

    @property
    def cells(self) -> Tensor:
        """Raster indices of each position's ids, int64 `(P, ids_per_position)`."""
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
        ids = tokens.long()  # token files store uint16, for which torch has no `min`
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(
                f"token ids should lie in [0, {self.vocab_size}), got {int(ids.min())} to {int(ids.max())}"
            )


def read_grid(value: Any) -> TokenGrid:
    """Parse the JSON form of a grid; return a `TokenGrid` unchanged. Raises `ValueError`."""
    if isinstance(value, TokenGrid):
        return value
    try:
        return TokenGrid(**value)
    except TypeError as error:
        raise ValueError(f"not a grid: {quote(value)} ({error})") from error


def grid_to_dict(grid: TokenGrid) -> dict[str, Any]:
    scales = {"scales": [list(sides) for sides in grid.scales]} if grid.scales else {}
    levels = {"levels": grid.levels} if grid.levels > 1 else {}
    channels = {"channels": grid.channels} if grid.channels else {}
    return {"shape": list(grid.shape), "vocab_size": grid.vocab_size, **scales, **levels, **channels}


Grid = Annotated[TokenGrid, PlainValidator(read_grid), PlainSerializer(grid_to_dict, return_type=dict)]


class LikelihoodError(ValueError):
    """Raised when a pixel density is requested from a tokenizer without a likelihood."""


class Reconstruction(NamedTuple):
    """Result of `Tokenizer.forward`: images `(B, *spec.shape)`, tokens `(B, *grid.shape)`, unweighted scalar losses."""

    images: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


FACTS = ("image_size", "channels", "dtype", "range", "show", "alpha")  # settings that describe the images
PLAIN = {"dtype": "uint8", "range": None, "show": None, "alpha": False, "local": False}  # defaults that files leave out


class TokenizerConfig(ModelConfig):
    image_size: Fact[tuple[Annotated[int, Field(ge=1, le=4096)], ...]] = Field(
        description="height and width of the images; a single number sets both"
    )
    channels: Fact[Annotated[int, Field(ge=1, le=16)]] = Field(description="1 for grey, 3 for RGB, or up to 16 others")
    dtype: Fact[ValueType] = Field("uint8", description="type of the images' values")
    range: Fact[tuple[float, float] | None] = Field(
        None, description="the values that become -1 and 1 inside; null: 0 and 255, of 8 bits"
    )
    show: Fact[tuple[int, int, int] | None] = Field(
        None, description="channels that pictures show as red, green and blue; null: the first three"
    )
    alpha: Fact[bool] = Field(False, description="the last of four channels is opacity: RGBA pictures")

    @model_serializer(mode="wrap")
    def _omit_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        return {key: value for key, value in found.items() if (key, value) not in PLAIN.items()}

    @property
    def spec(self) -> ImageSpec:
        height, width = self.image_size
        low, high = self.range or BYTES
        return ImageSpec(self.channels, height, width, 1, self.dtype, low, high, self.show, self.alpha)

    def check_picture(self, what: str, *, alpha: bool = False) -> Iterator[str]:
        """Yield a problem unless the images are grey or RGB pictures, or with `alpha`, RGBA pictures."""
        if not (spec := self.spec).is_picture or spec.alpha > alpha:
            got = spec.describe_values() if self.channels in (1, 3) else f"{self.channels} channels"
            also = ", or RGBA pictures with data.alpha=true" if alpha else ""
            yield f"channels: {what} takes 8-bit images with 1 or 3 channels{also} (got {got})"

    @field_validator("image_size", mode="before")
    @classmethod
    def _of_one_side(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a whole number or [height, width] (got {quote(value)})")
        return value

    def check(self) -> Iterator[str]:
        if len(self.image_size) != 2:
            yield f"image_size: expected [height, width] (got {list(self.image_size)})"
        yield from spec_problems(self.channels, self.dtype, self.range, self.show, alpha=self.alpha)


class OuterConfig(TokenizerConfig):
    """Settings of a tokenizer that uses another one, whose settings are the field `inner`. The facts of the images are
    those of both, and are stored once."""

    inner: ClassVar[str]
    default: ClassVar[str]
    """Kind of the inner tokenizer if none is given."""

    @model_validator(mode="before")
    @classmethod
    def _copy_facts(cls, values: dict[str, Any]) -> dict[str, Any]:
        node = cls.default if values.get(cls.inner) is None else values[cls.inner]
        node = {"kind": node} if isinstance(node, str) else node
        return {**values, cls.inner: {**cls.inner_facts(values), **node} if isinstance(node, dict) else node}

    @classmethod
    def inner_facts(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in FACTS if name in values}

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {**values, self.inner: {key: value for key, value in values[self.inner].items() if key not in FACTS}}

    def check(self) -> Iterator[str]:
        yield from super().check()
        ours = super().to_dict()
        theirs, wanted = ours[self.inner], {**ours, **self.inner_facts(ours)}
        for name in FACTS:
            if (found := theirs.get(name)) != (fact := wanted.get(name)):
                yield f"{self.inner}.{name}: is {found}, but should be {fact}, like the images"


class Tokenizer(PretrainedModel, family="tokenizer tokenizer.published"):
    """Maps images `(B, *spec.shape)` in [-1, 1], `(B, C, H, W)` or of clips `(B, T, C, H, W)`, to tokens
    `(B, *grid.shape)` and back.

    `encode`, `decode` and the likelihoods run in `full_float32`, so GPUs and CPUs agree up to rounding; `forward`
    computes in the precision that the user chose for training.

    A training loop calls `initialize` once, then the tokenizer itself, which runs `forward`. In training mode and with
    gradients enabled, a codebook that updates itself does so after each call (see `quantizers/updates.py`).
    """

    grid: TokenGrid
    spec: ImageSpec
    levels: int = 1  # ids per position; each row of positions takes this many rows of the grid
    resizable: bool = False
    """Whether the same weights encode and decode images of other sizes; see `resize`."""
    halo: int | None = None
    """How many tokens around its own a pixel depends on at most, if this does not depend on the image's size, so that
    parts with a halo are decoded like the whole, and encoded with as many pixels' tokens; None: on the whole image."""
    prefixes: tuple[int, ...] = ()
    """Prefix lengths to show in previews, ending with the full length; empty if prefixes cannot be decoded."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.spec = config.spec

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (T, C, H, W) of clips."""
        return self.spec.shape

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().__call__(*args, **kwargs)
        with one_training_forward():
            return super().__call__(*args, **kwargs)

    def encode(self, images: Tensor) -> Tensor:
        """Return tokens `(B, *grid.shape)`. Raises `ValueError` for images of another size."""
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images clamped to [-1, 1]. Raises `ValueError` for ids out of range."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruct `images`, with gradients and losses for training."""
        raise NotImplementedError

    def initialize(self, images: Tensor) -> None:  # noqa: B027 (most models need no images)
        """Initialize from training images `(B, *spec.shape)`, once before training. Raises `ConfigError` if they do not
        suit the configuration."""

    def start_from(self, other: Tokenizer) -> None:
        """Copy the weights of `other`. Raises a `ConfigError` that lists settings on which the two differ."""
        self.require_equal(self.config.to_dict(), other.config.to_dict())
        self.load_state_dict(other.state_dict())

    def require_equal(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Raise a `ConfigError` that lists the settings on which a tokenizer to start from differs."""
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
            raise ConfigError(f"{self.name}: cannot start from a tokenizer with another configuration: {pairs}")

    @property
    def has_likelihood(self) -> bool:
        """Whether the tokenizer defines p(image | tokens), as `pixel_log_probs` and `value_log_probs` require."""
        return False

    @property
    def reversible(self) -> bool:
        """Whether `decode(encode(images))` returns every 8-bit image unchanged."""
        return False

    def pixel_log_prob(self, images: Tensor, tokens: Tensor) -> Tensor | None:
        """Return log p(images | tokens) of 8-bit images, `(B,)` nats; None without a likelihood. Raises `ValueError` if
        the images do not match the tokens."""
        if not self.has_likelihood:
            return None
        if images.shape != (wanted := (len(tokens), *self.spec.shape)):
            raise ValueError(f"images should have shape {wanted} to match the tokens, got {tuple(images.shape)}")
        nats = in_finest(self.pixel_log_probs(images, tokens))
        return nats.movedim(-3, 1).flatten(1).sum(1).float()  # channels first, as in streams

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return log p of each pixel channel of 8-bit images, given the tokens and the channels before it:
        `(B, *spec.shape)` nats. Raises `LikelihoodError` without a likelihood."""
        raise LikelihoodError(f"a {self.name!r} tokenizer has no likelihood of pixels")

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        """Return log p of each of the 256 values of one channel, `(B, ..., 256, H, W)` nats, given the tokens and the
        channels before it of int64 `values` `(B, *spec.shape)`. Raises `LikelihoodError` without a likelihood."""
        raise LikelihoodError(f"a {self.name!r} tokenizer has no likelihood of pixels")

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the layer that computes the pixels. Raises `ValueError` for a tokenizer without a network."""
        raise ValueError(f"a {self.name!r} tokenizer has no network")

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of `forward`'s losses, which are added to the pixel losses."""
        return {}

    @property
    def figures(self) -> dict[str, Tensor]:
        """Running metrics, logged with the training losses."""
        return {}

    @property
    def parts(self) -> tuple[int, ...]:
        """The number of tokens of each level or scale, in the order of the flat grid."""
        return tuple(areas(self.grid.scales)) or (len(self.grid) // self.levels,) * self.levels

    @property
    def placed(self) -> bool:
        """Whether each token represents one region of the image, as `known_tokens` requires."""
        return len(self.grid.shape) > 1

    def resize(self, height: int, width: int) -> Tokenizer | None:
        """Return this tokenizer for images of another size, with the same weights; None unless it is `resizable`. The
        sides must be whole numbers of tokens. Layers that see the whole image, such as `GroupNorm`, see the larger
        one, so that pixels may differ slightly from those of parts."""
        if not self.resizable or not self.placed or self.grid.scales:
            return None
        found, sides = copy.copy(self), zip(self.grid.shape, (height, width), self.spec.size, strict=True)
        found.spec = self.spec.at(height, width)
        found.grid = replace(self.grid, shape=tuple(count * side // own for count, side, own in sides))
        return found

    def known_tokens(self, known: Tensor) -> Tensor:
        """Map known pixels, bool `(B, H, W)`, of clips `(B, T, H, W)`, to known tokens `(B, *grid.shape)`: a token is
        known if all pixels of its patch are. Tokens of a two-axis grid tile the image, once per level. Raises
        `ValueError` unless tokens are `placed`."""
        if not self.placed:
            raise ValueError("these tokens are not regions of the image, so pixels do not determine known tokens")
        height, width = self.spec.size
        rows, columns = self.grid.shape[0] // self.levels, self.grid.shape[1]
        patches = known.reshape(-1, rows, height // rows, columns, width // columns)
        return patches.all(dim=4).all(dim=2).repeat(1, self.levels, 1)


def codebook_usage(counts: Tensor) -> dict[str, Tensor]:
    """Return `usage`, the fraction of ids that occur, and `perplexity` (1 to vocab_size), exp of the entropy of the id
    frequencies. counts: occurrences of each id, `(vocab_size,)`."""
    p = in_finest(counts) / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()
    return {"usage": in_finest(counts > 0).mean(), "perplexity": entropy.exp()}
