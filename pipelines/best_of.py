"""Best of N: draw several candidates for an image, and return the one that fits its condition best.

The score of a candidate x is log p(x | condition) - log p(x), under the prior itself. By Bayes' theorem it is
log p(condition | x), up to a constant of the condition, so it ranks as a classifier of the prior's own would."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from prior import Prior
from prior.conditions import Condition, select_rows
from prior.sampling import DecodingOptions, SamplingOptions, check_count, remove_condition


def check_best_of(prior: Prior, best_of: Any, sampler: SamplingOptions, given: Collection[str]) -> int:
    """Return the number of candidates per image as an int. given: see `SamplingOptions.check_guidance`. Raises
    `ValueError` unless it is a positive whole number; above 1, also if there is no condition to rank by, or no exact
    log p."""
    best_of = check_count(best_of, "best_of")
    if best_of > 1 and not sampler.can_guide(given):
        raise ValueError(f"best_of above 1 needs {sampler.describe_removed()}")
    if best_of > 1 and not prior.exact:
        raise ValueError(f"best_of ranks by log p, which this {prior.name!r} prior only estimates; set exact to True")
    return best_of


@torch.no_grad()
def choose_best(
    prior: Prior,
    tokens: Tensor,
    labels: Tensor | None,
    condition: Condition,
    sampler: SamplingOptions,
    decoding: DecodingOptions,
    best_of: int,
    batch_size: int,
) -> Tensor:
    """Return the index of the best candidate of each image, `(B,)`, the first among ties.

    tokens: `(B * best_of, *grid.shape)`, the candidates of an image in a row; labels, condition: one row per candidate.
    The second density lacks what guidance removes (`guidance_on`). Both are those of `Prior.log_prob` with the order or
    orders of `decoding`."""
    count, parts = len(tokens), list[Tensor]()
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        own, columns = None if labels is None else labels[rows], select_rows(condition, rows)
        less, rest = remove_condition(own, columns, sampler.guidance_on)
        order = decoding.select(rows, count).order
        with_it, without = (
            prior.log_prob(tokens[rows], ids, order, decoding.num_orders, condition=each)
            for ids, each in ((own, columns), (less, rest))
        )
        parts.append(with_it - without)
    best = torch.cat(parts).view(-1, best_of).argmax(1)
    return best + torch.arange(len(best), device=best.device) * best_of
