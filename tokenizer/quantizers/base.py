"""The contract of quantizers: map vectors to ids, and ids to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ModelConfig, Node
from ..model import Registered
from ..precision import full_float32
from ..scales import Scales
from .price import Price
from .updates import one_training_forward


class Quantized(NamedTuple):
    """`z_q` (B, D, *spatial), which passes gradients to `z`; int64 `tokens` `(B, levels * rows, ...)`; unweighted
    scalar `losses`."""

    z_q: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


QuantizerNode = Annotated[ModelConfig, Node("tokenizer.quantizers:Quantizer")]
"""The type of a field that holds the configuration of a quantizer."""


class Quantizer(Registered, nn.Module, family="tokenizer.quantizers"):
    """Maps vectors to ids and back, always in full float32.

    `quantize` uses the codebook as it was before the training batch; self-updating codebooks are updated afterwards
    (see `updates.SelfUpdating`).
    """

    vocab_size: int
    dim: int
    levels: int = 1  # ids per position: level l of row r is row l * rows + r of the token grid, coarse levels first
    has_means: bool = False  # whether codes are means of their nearest vectors, so that `lloyd_step` can improve them
    searches_codes: bool = False  # whether ids are those of nearest codes, as `distances` requires
    price: Price | None  # of codes; None: the search ignores how frequent they are
    scales: Scales = ()
    """(height, width) of each map of ids, coarse to fine, if there are several; vectors form a map of the last size."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config: Any = config
        self.price = None

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of `quantize`'s losses in the training loss."""
        return {}

    @property
    def figures(self) -> dict[str, Tensor]:
        """Running statistics, logged with the training losses."""
        return {}

    def lloyd_step(self, batches: Sequence[Tensor]) -> None:
        """Move each code to the mean of its nearest vectors (Lloyd 1982) among `batches` of z `(B, dim, *spatial)`, on
        any device; a code without vectors stays. Raises `ValueError` unless `has_means`."""
        raise ValueError(f"the codes of a {self.name!r} quantizer are not means of vectors")

    def comparable(self, z: Tensor) -> Tensor:
        """Return vectors `(B, dim, ...)` in the form in which they are compared with codes."""
        return z

    @torch.no_grad()
    def cost(self, z: Tensor) -> float:
        """Return what a quantizer with a price minimises, |z - e|^2 plus the price of the code, averaged over vectors
        of `z` `(B, dim, *spatial)`."""
        assert self.price is not None
        tokens, vectors = self.encode(z), z.numel() // z.shape[1]
        return float(self.errors(z).sum() + self.price.total(tokens)) / vectors

    @torch.no_grad()
    def errors(self, z: Tensor) -> Tensor:
        """Return the squared distance of each vector of `z` `(B, dim, *spatial)` to its code, `(B, *spatial)`."""
        return (self.comparable(z.float()) - self.lookup(self.encode(z))).square().sum(1)

    @torch.no_grad()
    def distances(self, z: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Return the squared distances `(B, n, vocab_size)` of all codes to `z` `(B, dim, *spatial)` at the ids
        `places` `(n,)` of the flat grid, given the coarser ids among `tokens` `(B, N)`, in units of the final error.
        Raises `ValueError` unless `searches_codes`."""
        raise ValueError(f"a {self.name!r} quantizer does not search the nearest code")

    def grid_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the ids for `height` x `width` vectors. Raises `ConfigError` for an unsupported size."""
        return (self.levels * height, width)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the model's device, but stay float32 when its dtype changes."""

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            is_cast = tensor.is_floating_point() and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if is_cast else moved

        return super()._apply(move, recurse)

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` `(B, dim, *spatial)`. Raises `ValueError` for another number of channels."""
        self.check_channels(z)
        with full_float32(), torch.autocast(z.device.type, enabled=False):
            if not self.training:
                return self._quantize(z.float())
            with one_training_forward():
                return self._quantize(z.float())

    def _quantize(self, z: Tensor) -> Quantized:
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Return the tokens of `quantize`, without losses or updates. Raises as `quantize` does."""
        self.check_channels(z)
        with full_float32(), torch.autocast(z.device.type, enabled=False):
            return self._encode(z.float())

    def _encode(self, z: Tensor) -> Tensor:
        """Return the tokens. Overridden by quantizers whose losses are slow to compute."""
        return self._quantize(z).tokens

    def check_channels(self, z: Tensor) -> None:
        if z.shape[1] != self.dim:
            raise ValueError(f"z should have {self.dim} channels, got {z.shape[1]}")

    def lookup(self, tokens: Tensor) -> Tensor:
        """Look up the vectors `(B, dim, *spatial)` of `tokens`. Raises `ValueError` for ids out of range."""
        if tokens.numel():
            low, high = torch.stack(tokens.aminmax()).tolist()  # a single GPU sync
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"token ids should lie in [0, {self.vocab_size}), got {low} to {high}")
        with full_float32(), torch.autocast(tokens.device.type, enabled=False):
            return self.lookup_checked(tokens)

    def lookup_scales(self, tokens: Tensor, count: int) -> Tensor:
        """Look up only the first `count` of `scales`, `(B, dim, H, W)`. Raises `ValueError` if there are fewer."""
        raise ValueError(f"a {self.name!r} quantizer has no scales")

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        """Look up vectors without the range check; invalid ids give undefined vectors."""
        raise NotImplementedError
