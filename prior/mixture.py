"""The density of images whose class is not known: the mixture over the classes of one column (`Given.over`).

    p(tokens | others) = sum_c p(c | others) p(tokens | c, others)

A prior's null class is another density, which a network learns from the images whose label was dropped in training;
the mixture needs no such training, and costs a pass for each class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenizer.precision import finest, in_finest

from .given import Given
from .options import Order

if TYPE_CHECKING:
    from .base import Prior


def mixture_log_prob(
    prior: Prior, tokens: Tensor, given: Given, order: Order = None, num_orders: int = 1, num_masks: int = 1
) -> Tensor:
    """Return log p of the mixture over the classes that `given` leaves open, `(B,)` nats. Classes of weight 0 are
    skipped. The other arguments are those of `Prior.log_prob`.

    If the prior only estimates a bound (`exact` is False), so is the mixture of the estimates. Errors of the estimates
    of single classes raise it slightly; the classes share their masks, so that most of these cancel."""
    members = []
    for log_weights, one in classes_of(given, prior.device):
        nats = prior.log_prob(tokens, None, order, num_orders, num_masks, condition=one)
        members.append(in_finest(nats) + log_weights)
    return torch.stack(members).logsumexp(0).to(nats.dtype)


def mixture_token_log_probs(prior: Prior, tokens: Tensor, given: Given, order: Order = None) -> Tensor:
    """Return log p of each token under the mixture given the tokens before it, `(B, *grid.shape)` nats, which sum to
    `mixture_log_prob`. Tokens of one block, which are independent given the class, follow each other as in the order.

    With each token, those before it say more of the class: log p(tokens up to rank r) = logsumexp_c(log p(c) + log
    p(these tokens | c)), of which a token's part is the difference to the rank before. Raises `ValueError` for a prior
    that only estimates a bound."""
    if not prior.exact:
        raise ValueError(f"marginal: parts of tokens need an exact log p, but that of {prior.name!r} is an estimate")
    partition = prior.check_order(order, len(tokens))
    by_rank = (prior.order if partition is None else partition.order).expand(len(tokens), -1)
    total = in_finest(torch.full((len(tokens), len(prior.grid) + 1), -torch.inf, device=prior.device))
    for log_weights, one in classes_of(given, prior.device):
        nats = prior.token_log_probs(tokens, None, order, condition=one).flatten(1)
        before = torch.cat([log_weights[:, None], in_finest(nats).gather(1, by_rank)], 1)
        total = torch.logaddexp(total, before.cumsum(1))  # of one class after another, to save memory
    parts = total.diff(dim=1).masked_fill(total[:, :-1] == -torch.inf, 0.0)  # after an impossible token
    return torch.empty_like(parts).scatter_(1, by_rank, parts).to(nats.dtype).reshape(tokens.shape)


def classes_of(given: Given, device: torch.device) -> Iterator[tuple[Tensor, Given]]:
    """Yield for each class that has a weight in any image its log weights `(B,)`, and what is given with this class."""
    (name, weights), *_ = given.weights.items()
    possible = (weights > -torch.inf).any(0)
    for number in possible.nonzero().flatten().tolist() if len(given) else [0]:
        label = torch.full((len(given),), number, device=device)
        yield weights[:, number].to(device, finest(device)), given.with_rows(**{name: label})
