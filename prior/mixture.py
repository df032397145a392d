"""The density of images whose class is not known: the mixture over the classes of one column.

    p(tokens | others) = sum_c p(c | others) p(tokens | c, others)

A prior's null class is another density, which a network learns from the images whose label was dropped in training;
the mixture needs no such training, and costs a pass for each class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenizer.precision import finest, in_finest

from .columns import Column, find_column
from .options import Order

if TYPE_CHECKING:
    from .base import Prior
    from .given import Given

MOST_CLASSES = 1024
"""More classes are refused, because of the cost."""


def count_classes(columns: Mapping[str, Column], name: str, given: Collection[str] = (), passes: int = 1) -> int:
    """Return the number of classes of the column `name`, over which a mixture sums.

    given: the columns that are given. passes: passes of the prior for each image and class. Raises `ValueError` for a
    column that is no class, that the prior lacks or that is given, and for more than `MOST_CLASSES` classes."""
    column: Column = find_column(columns, name, "marginal")
    if not column.num_classes:
        raise ValueError(f"marginal: {name!r} is a {column.kind} column; it must be a column of classes")
    if name in given:
        raise ValueError(f"marginal: {name!r} is given; leave it out, or leave out marginal")
    if column.num_classes > MOST_CLASSES:
        raise ValueError(
            f"marginal: {name!r} has {column.num_classes:,} classes, that is {passes * column.num_classes:,} passes of "
            f"the prior for each image; at most {MOST_CLASSES:,} classes are possible"
        )
    return column.num_classes


def mixture_log_prob(
    prior: Prior,
    tokens: Tensor,
    given: Given,
    name: str,
    log_weights: Tensor | None = None,
    order: Order = None,
    num_orders: int = 1,
    num_masks: int = 1,
) -> Tensor:
    """Return log p of the mixture over the classes of the column `name`, `(B,)` nats.

    given: the other columns. log_weights: log p(c | others), `(B, C)` or `(C,)`; None means equal weights. Classes of
    weight 0 are skipped. order, num_orders, num_masks: see `Prior.log_prob`. Raises `ValueError` as `count_classes` and
    `Prior.log_prob` do, and for weights that do not sum to one.

    If the prior only estimates a bound (`exact` is False), so is the mixture of the estimates. Errors of the estimates
    of single classes raise it slightly; the classes share their masks, so that most of these cancel."""
    total = torch.full((len(tokens),), -torch.inf, device=prior.device)
    total, dtype = in_finest(total), total.dtype
    for log_weight, one in classes_of(prior, given, name, log_weights):
        nats = prior.log_prob(tokens, None, order, num_orders, num_masks, condition=one)
        total, dtype = torch.logaddexp(total, in_finest(nats) + log_weight), nats.dtype
    return total.to(dtype)


def mixture_token_log_probs(
    prior: Prior,
    tokens: Tensor,
    given: Given,
    name: str,
    log_weights: Tensor | None = None,
    order: Order = None,
) -> Tensor:
    """Return log p of each token under the mixture given the tokens before it, `(B, *grid.shape)` nats, which sum to
    `mixture_log_prob`. Tokens of one block, which are independent given the class, follow each other as in the order.

    With each token, those before it say more of the class: log p(tokens up to rank r) = logsumexp_c(log p(c) + log
    p(these tokens | c)), of which a token's part is the difference to the rank before. Arguments: see
    `mixture_log_prob`. Raises `ValueError`, too, for a prior that only estimates a bound."""
    if not prior.exact:
        raise ValueError(f"marginal: parts of tokens need an exact log p, but that of {prior.name!r} is an estimate")
    partition = prior.check_order(order, len(tokens))
    by_rank = (prior.order if partition is None else partition.order).expand(len(tokens), -1)
    total = in_finest(torch.full((len(tokens), len(prior.grid) + 1), -torch.inf, device=prior.device))
    dtype = torch.float32
    for log_weight, one in classes_of(prior, given, name, log_weights):
        nats = prior.token_log_probs(tokens, None, order, condition=one).flatten(1)
        ranked = in_finest(nats).gather(1, by_rank)
        joint = torch.cat([log_weight[:, None], log_weight[:, None] + ranked.cumsum(1)], 1)
        total, dtype = torch.logaddexp(total, joint), nats.dtype
    parts = total.diff(dim=1).masked_fill(total[:, :-1] == -torch.inf, 0.0)  # after an impossible token
    return torch.empty_like(parts).scatter_(1, by_rank, parts).to(dtype).reshape(tokens.shape)


def classes_of(prior: Prior, given: Given, name: str, log_weights: Tensor | None) -> Iterator[tuple[Tensor, Given]]:
    """Yield for each class that has a weight in any image its log weights `(B,)`, and what is given with this class."""
    shape = (len(given), count_classes(prior.columns, name, given.names, prior.likelihood_passes))
    if log_weights is None:
        weights = in_finest(torch.zeros(shape, device=prior.device)).log_softmax(1)
    elif tuple(log_weights.shape) not in (shape, shape[1:]):
        raise ValueError(f"log_weights must have the shape {shape} or {shape[1:]} (got {tuple(log_weights.shape)})")
    else:
        weights = log_weights.to(prior.device, finest(prior.device)).expand(shape)
    if not bool((weights.logsumexp(1).abs() < 1e-3).all()):
        raise ValueError("log_weights: the weights of an image must sum to one")
    for number in (weights > -torch.inf).any(0).nonzero().flatten().tolist():
        one = torch.full((len(given),), number, device=prior.device)
        yield weights[:, number], given.with_rows(**{name: one})
