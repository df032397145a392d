"""Positions, which a network sees, and the tokens that they are made of: one each, or several, which a head draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenizer.base import TokenGrid

from ..orders import Partition, block_numbers
from .base import Head, Softmax


def by_level(walk: Partition, grid: TokenGrid) -> Partition:
    """The order of the ids, given that of positions: a block's first ids are a block, then its second ones, ..."""
    parts = grid.cells[walk.order].split(walk.blocks)
    blocks = tuple(size for size in walk.blocks for _ in range(grid.together))
    return Partition(torch.cat([part.t().flatten() for part in parts]), blocks)


class Positions:
    """What a `Prior` says of its positions. P is their number, N that of tokens."""

    grid: TokenGrid
    config: Any
    readout: Head
    """What makes logits of what the network puts out: `config.head`, or a softmax."""
    position_order: Tensor
    """(P,) int64: the order of positions, which is the network's own. Where a position has one id, this is `order`."""
    position_blocks: tuple[int, ...]
    """The sizes that cut it into blocks."""
    position_block_of: Tensor
    """(P,) int64: the number of each position's block, raster order."""
    cells_of_positions: Tensor
    """(P, together) int64: the raster indices of each position's ids, where there are several."""
    places_of_tokens: Tensor
    """(N,) int64: where each token, in raster order, stands among the ids of all positions, one after the other."""

    def set_walk(self: Any, walk: Partition) -> None:
        """Have this order and these blocks of positions, and what they make of tokens."""
        order, self.blocks = by_level(walk, self.grid) if self.readout.together > 1 else walk
        self.position_blocks = walk.blocks
        for name, cells in (("order", order), ("position_order", walk.order)):
            self.register_buffer(name, cells, persistent=False)
        self.register_buffer("block_of", block_numbers(order, self.blocks), persistent=False)
        self.register_buffer("position_block_of", block_numbers(*walk), persistent=False)
        if self.readout.together > 1:
            self.register_buffer("cells_of_positions", self.grid.cells, persistent=False)
            self.register_buffer("places_of_tokens", self.grid.cells.flatten().argsort(), persistent=False)

    def put_out(self: Any, tokens: Tensor, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """What `loss_from_outputs` takes: `forward`, raw. Without a head these are the logits, of a model too that
        writes `forward` in place of `outputs`."""
        return self(tokens, labels, **inputs, **({} if isinstance(self.readout, Softmax) else {"raw": True}))

    def ids_of(self, tokens: Tensor) -> Tensor:
        """The ids of each position that the network sees, `(B, P, readout.together)`, of tokens `(B, ...)`."""
        flat = tokens.flatten(1).long()
        return flat[..., None] if self.readout.together == 1 else flat[:, self.cells_of_positions]

    def map_of_ids(self, tokens: Tensor) -> Tensor:
        """`ids_of`, `(B, *positions.shape, readout.together)`."""
        return self.ids_of(tokens).unflatten(1, self.config.positions.shape)

    def to_raster(self, found: Tensor) -> Tensor:
        """What was found of each id, `(B, P, together, ...)`, as `(B, N, ...)` in raster order."""
        flat = found.flatten(1, 2)
        return flat if self.readout.together == 1 else flat[:, self.places_of_tokens]

    @property
    def receptive_field(self) -> Tensor:
        """bool `(N, N)`, raster order: row i is True at the tokens that `logits[:, i]` sees, in the model's own order:
        those of the positions of `position_field`, and the ids before it at its own."""
        field, together = self.position_field, self.readout.together
        if together == 1:
            return field
        own = torch.eye(len(field), dtype=torch.bool, device=field.device)[:, None, :, None]
        before = torch.ones(together, together, dtype=torch.bool, device=field.device).tril(-1)[:, None]
        places = self.places_of_tokens.to(field.device)
        return (field[:, None, :, None] | own & before).flatten(0, 1).flatten(1, 2)[places[:, None], places]

    @property
    def position_field(self) -> Tensor:
        """bool `(P, P)`, raster order: the positions whose tokens the network sees at each. Here these are all of
        earlier blocks."""
        return self.position_block_of < self.position_block_of[:, None]
