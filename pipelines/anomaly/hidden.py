"""The surprisal of tokens while their block of the grid is hidden.

A token inside a defect is likely given its neighbours, which are defective, too. If a whole block of tokens is hidden,
only what is outside of it can explain a token. Some ids are always surprising, whatever surrounds them; the mean of
each id over normal images is therefore subtracted.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from prior.base import Prior
from prior.given import Given

from .conformal import Floats
from .distances import round_digits

BLOCK = 4
"""Side of a hidden block in tokens, at most three quarters of the side of the grid."""
SHRINK = 20.0
"""Number of tokens of the mean surprisal that are added to those of each id."""


def can_hide(prior: Prior) -> bool:
    """Whether the prior predicts all tokens of a block given those outside: given any others, and all at once. Others
    predict hidden tokens one after the other, so that a defect explains itself."""
    return takes_any(prior) and prior.config.takes_blocks


def takes_any(prior: Prior) -> bool:
    """Whether the prior predicts tokens given any others, on a grid of rows and columns."""
    return prior.any_order and len(prior.grid.shape) == 2 and prior.grid.ids_per_position == 1


def hidden_masks(rows: int, columns: int, size: int = BLOCK) -> Tensor:
    """Return which tokens each pass hides, bool `(4 or fewer, rows, columns)`: every second block along both axes, so
    that each token is hidden once. Blocks are smaller on small grids, so that some tokens stay visible."""
    row, column = (torch.arange(side, device="cpu") // min(size, -(-3 * side // 4)) % 2 for side in (rows, columns))
    passes = [(row == a)[:, None] & (column == b) for a, b in itertools.product((0, 1), repeat=2)]
    return torch.stack([mask for mask in passes if mask.any()])


def hidden_bits(prior: Prior, tokens: Tensor, given: Given, size: int = BLOCK) -> Tensor:
    """Return the bits of each token given the tokens outside its block, `(B, *grid.shape)`; for a prior that cannot
    hide blocks, given also those in the block before it; and for one of a single order, given the tokens before it.
    Calibrations of 0.3 need the second, too. A class that is left open is null, because how likely each is given the
    visible tokens would take further passes."""
    given = given.without(given.weights.keys()).to(tokens.device)
    if not takes_any(prior):
        return -prior.token_log_probs(tokens, condition=given) / math.log(2)
    found = torch.zeros(tokens.shape, device=tokens.device)
    rows, columns = prior.grid.shape
    for mask in hidden_masks(rows, columns, size).to(tokens.device):
        nats = prior.hidden_log_probs(tokens, (~mask).flatten().expand(len(tokens), -1), given)
        found = torch.where(mask, -nats.to(found) / math.log(2), found)
    return found


def mean_of_codes(bits: Tensor, tokens: Tensor, vocab_size: int) -> Floats:
    """Return the mean bits of each id, `(vocab_size,)`; those of rare ids are drawn towards the mean of all."""
    ids, values = tokens.flatten().cpu().numpy(), bits.flatten().double().cpu().numpy()
    counts, sums = np.bincount(ids, minlength=vocab_size), np.bincount(ids, values, vocab_size)
    return round_digits((sums + SHRINK * values.mean()) / (counts + SHRINK))
