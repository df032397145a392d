"""Variants of MADE, and a reference implementation of the paper's equations."""

import pytest
import torch
from small import make_prior

from prior import Prior
from prior.made import DENSE_WIDTH

ROWS = DENSE_WIDTH + 3  # vocabulary above which rows of weights are gathered
VARIANTS = {
    "one layer": {"hidden": (99,)},
    "three layers": {"hidden": (99, 132, 88)},
    "direct": {"hidden": (99,), "direct": True},
    "two ids": {"hidden": (99, 88), "vocab_size": 2},
    "two ids, direct": {"hidden": (99,), "direct": True, "vocab_size": 2},
    "two ids, one-hot": {"hidden": (99,), "direct": True, "vocab_size": 2, "sigmoid": False},
    "rows": {"hidden": (99, 88), "vocab_size": ROWS},
    "rows, direct": {"hidden": (99,), "direct": True, "vocab_size": ROWS},
    "embedded": {"hidden": (99, 88), "embedding": 4},
    "embedded, direct": {"hidden": (99,), "embedding": 4, "direct": True},
    "width one": {"hidden": (99,), "embedding": 1, "direct": True},
    "narrow": {"hidden": (7, 5)},
    "narrow, direct": {"hidden": (7, 5), "direct": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
some_orders = pytest.mark.parametrize("order", ["raster", "snake", "random:3"])


def make_made(variant, **config):
    return make_prior("made", **{**VARIANTS[variant], **config})


def keep_awake(model):
    """Make all weights positive, so that no unit is ever zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()


def earlier(order):
    """bool `(N, N)`: [i, j] if j comes before i."""
    ranks = torch.argsort(order)
    return ranks < ranks[:, None]


def by_the_paper(model, tokens, labels, order, degrees):
    """Logits of one image by the paper's equations, position by position and unit by unit."""
    ranks, config = torch.argsort(order).tolist(), model.config
    table = torch.eye(config.grid.vocab_size).double() if model.embedding is None else model.embedding
    inputs = [table[token] for token in tokens.flatten()]
    bias = [b.shared + (0 if b.own is None else b.own[labels]) for b in model.biases]
    # Eq. 12 has m(k) >= d with inputs numbered from 1: here ranks count from 0.
    below = []
    for k, degree in enumerate(degrees[0].tolist()):
        seen = [x @ model.input[n, :, k] for n, x in enumerate(inputs) if degree >= ranks[n] + 1]
        below.append((bias[0][k] + sum(seen)).clamp(min=0))
    for depth, weight in enumerate(model.hidden, 1):
        sums = []
        for k, degree in enumerate(degrees[depth].tolist()):
            seen = [weight[k, j] * h for j, h in enumerate(below) if degree >= degrees[depth - 1][j]]
            sums.append((bias[depth][k] + sum(seen)).clamp(min=0))
        below = sums
    rows = []
    for n, rank in enumerate(ranks):  # eq. 13: d > m(k)
        x = bias[-1].view(len(ranks), -1)[n]
        x = x + sum(model.output[n, :, k] * h for k, h in enumerate(below) if rank + 1 > degrees[-1][k])
        if model.direct is not None:  # section 4.2: strictly lower triangular
            x = x + sum(
                y @ model.direct[j].view(len(y), len(ranks), -1)[:, n] for j, y in enumerate(inputs) if ranks[j] < rank
            )
        x = x if model.head is None else model.head @ x
        rows.append(x if model.head_bias is None else x + model.head_bias[n])
    return torch.stack(rows)


def make_same(model, **config):
    """A model with the same weights and another configuration."""
    same = Prior.create("made", **{**model.config.__dict__, "dropout": 0.0, **config})
    same.load_state_dict(model.state_dict())
    return same.eval()
