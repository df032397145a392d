"""The contract of heads: p(the ids of a position | what the network puts out there), one id after the other.

    p(ids | outputs) = prod_l p(ids[l] | ids[:l], outputs)

A network sees positions: of an id each, or, where a head draws the ids of a position together, of a grid's levels or of
a pixel's channels. It puts out `size` numbers at each; a head makes logits of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.base import TokenGrid, at_least_float32
from tokenizer.config import ModelConfig
from tokenizer.model import Registered

from ..objectives import mean_nats, token_nats


class Head(Registered, nn.Module, family="prior.heads"):
    """The ids of a position, each given those before it."""

    size: int
    """How many numbers the network puts out at each position."""

    def __init__(self, config: Any, grid: TokenGrid) -> None:
        nn.Module.__init__(self)
        self.config, self.vocab_size, self.together = config, grid.vocab_size, grid.together

    @classmethod
    def problem(cls, config: Any, grid: TokenGrid) -> str | None:
        """Why this grid has no such head, in one line that says which have, or None."""
        return None

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """Logits `(..., vocab_size)` of the next id of positions whose first `ids` `(..., l)` are known, l from 0 on.

        outputs: `(..., size)`, what the network puts out at these positions.
        """
        raise NotImplementedError

    def logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """Logits `(..., together, vocab_size)` of all ids of positions, of `ids` `(..., together)`."""
        return torch.stack([self.next_logits(outputs, ids[..., :level]) for level in range(self.together)], -2)

    def log_probs(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """log p of each id of positions, `(..., together)` nats, at least in float32."""
        found = at_least_float32(self.logits(outputs, ids)).log_softmax(-1)
        return found.gather(-1, ids[..., None])[..., 0]

    def steepness(self, logits: Tensor) -> Tensor | None:
        """How much more than numbers of their own size logits `(..., V)` change with what the network puts out, each
        of them: what rounding does to the one, it does so many times to the other. None: not more."""
        return None

    def nats(self, outputs: Tensor, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """-log p of each id, float32 `(B, P, together)`, for outputs `(B, P, size)` of any type, in training.
        label_smoothing: the share of the target that is spread over all ids, where a head is a softmax."""
        return -self.log_probs(outputs, ids).float()

    def mean_nats(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """The mean of `nats`, a scalar."""
        return self.nats(outputs, ids).mean()


class Softmax(Head):
    """A logit for each id is what the network puts out; a position has one id. What a prior without a head has."""

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__(ModelConfig(), grid)
        self.size, self.together = grid.vocab_size, 1

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """`outputs`."""
        return outputs

    def logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """`outputs`, `(..., 1, vocab_size)`."""
        return outputs.unsqueeze(-2)

    def nats(self, outputs: Tensor, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """As in `Head`, without copies of all logits."""
        return token_nats(outputs, ids[..., 0], label_smoothing)[..., None]

    def mean_nats(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """As in `Head`, in one call."""
        return mean_nats(outputs, ids)


def head_problem(config: Any) -> str | None:
    """Why the kind of a prior with this configuration, or its grid, does not take its head, if so."""
    if config.head is None:
        return None
    if not config.takes_heads:
        return f"{config.kind} has none but a logit for each id; leave it null (got {config.head.kind!r})"
    if problem := Head.find(config.head.kind).problem(config.head, config.grid):
        return problem
    if config.grid.together > 1 and not config.takes_positions:
        return f"{config.kind} takes none for several ids at a position, of which this grid has {config.grid.together}"
    return None


def make_head(config: Any) -> Head:
    """The head of a prior with this configuration, new."""
    return Softmax(config.grid) if config.head is None else Head.find(config.head.kind)(config.head, config.grid)
