"""Contract checks for priors defined outside this package.

A prior that sees the token it predicts reaches a loss of zero, so its likelihood means nothing. `require_causal` is
cheap enough to run before training; `check_prior` tests every promise on a grid that is small enough to enumerate."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenizer.base import TokenGrid
from tokenizer.checks import NOT_HIDDEN, describe_hidden_methods, expect, problem_of

from .base import Prior
from .columns import LABEL, Column, GridColumn, NumberColumn
from .given import Given

MOST_CHANGED = 16  # tokens that `require_causal` changes, one at a time
MOST_GRIDS = 4096  # that `check_prior` enumerates
TOLERANCE = 1e-4  # for rounding of float32 logits, relative to the largest |logit|


class NotCausalError(ValueError):
    """The logits of a token depend on itself or another token of its block or a later block."""


def is_built_in(prior: Prior) -> bool:
    """Return whether the model is part of this package, whose tests include these checks."""
    return type(prior).__module__.startswith("prior.")


def with_random_weights(prior: Prior) -> Prior:
    """Return a copy on the CPU, in eval mode, with random weights: an output layer may start at zero."""
    model = copy.deepcopy(prior).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * (weight.shape[0] / weight.numel()) ** 0.5)
            else:
                weight.add_(0.3 * noise)
    return model


def example_columns(grid: TokenGrid) -> dict[str, Column]:
    number = NumberColumn(mean=[3.0], std=[2.0], low=[-3.0], high=[9.0])
    return {"number": number, "grid": GridColumn(grid=TokenGrid(tuple(2 * side for side in grid.shape), 3))}


def draw_given(prior: Prior, labels: Tensor) -> Given:
    """Draw random rows of all columns but the class, beside the classes `labels`, of which -1 is null."""
    rows = {name: column.draw(len(labels)) for name, column in prior.config.conditions.items()}
    return Given(prior.columns, {**({LABEL: labels} if prior.num_classes else {}), **rows}, len(labels))


@torch.no_grad()
def require_causal(prior: Prior, tokens: Tensor, given: Given | None = None) -> None:
    """Raise `NotCausalError` if changing one token changes logits of its own block or an earlier one.

    tokens: one grid, `grid.shape` or `(1, *grid.shape)`; given: what is known of it, one row. Up to 16 of its tokens
    are changed one at a time, including the first and the last in the order. The prior runs in eval mode with its own
    weights."""
    size, vocab_size, order = len(prior.grid), prior.grid.vocab_size, prior.order.tolist()
    if vocab_size == 1:
        return
    ranks = torch.linspace(0, size - 1, min(size, MOST_CHANGED)).round().long().tolist()
    rows = tokens.to(prior.device).flatten().repeat(len(ranks) + 1, 1)
    for row, rank in enumerate(ranks, start=1):
        rows[row, order[rank]] = (rows[row, order[rank]] + 1 + rank % (vocab_size - 1)) % vocab_size
    given = Given(prior.columns, {}, 1) if given is None else given.to(prior.device)
    was_training = prior.training
    prior.eval()
    try:
        encoded = prior.encode_given(given.expand(len(rows)))
        logits = prior(rows.reshape(-1, *prior.grid.shape), encoded).float()
    finally:
        prior.train(was_training)
    if logits.shape != (len(rows), size, vocab_size):
        raise ValueError(
            f"forward of the prior {prior.name!r} should return logits of shape {(len(rows), size, vocab_size)}, "
            f"got {tuple(logits.shape)}"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError(f"forward of the prior {prior.name!r} should return finite logits")
    limit = TOLERANCE * max(1.0, float(logits.abs().max()))
    moved = (logits[1:] - logits[:1]).abs().amax(-1) > limit
    for rank, seen in zip(ranks, moved, strict=True):
        changed = order[rank]
        later = prior.block_of[changed] >= prior.block_of
        if bool((seen & later).any()):
            where = int(torch.nonzero(seen & later)[0])
            what = "the token that they predict" if where == changed else "which is not yet known there"
            raise NotCausalError(
                f"the prior {prior.name!r} looks ahead: its logits at position {where} depend on the token at position "
                f"{changed}, {what}; logits may depend on tokens of earlier blocks only"
            )


def check_prior(prior: Prior) -> Iterator[tuple[str, str | None]]:
    """Yield (promise, problem or None) for each promise of a prior, tested with random weights.

    Promises about the distribution are tested by enumeration, and skipped for grids with more than 4,096 values."""
    if hidden := describe_hidden_methods(prior, Prior):
        yield NOT_HIDDEN, hidden
        return
    torch.manual_seed(0)
    model = with_random_weights(prior)
    grid, classes = model.grid, model.num_classes
    tokens = torch.randint(grid.vocab_size, (8, *grid.shape))
    given = draw_given(model, (torch.arange(8) + 1) % (classes + 1) - 1)
    others = given.without([LABEL])

    def logits(given: Given) -> Tensor:
        found: Tensor = model(tokens[: len(given)], model.encode_given(given))
        return found

    def causality() -> None:
        for k in range(len(tokens)):
            require_causal(model, tokens[k], given[k : k + 1])

    def columns() -> None:
        nulls = others.with_rows(**{name: column.null(8) for name, column in model.config.conditions.items()})
        expect_close(logits(nulls), logits(given.without()), "logits without columns and of null columns")
        for name in others.names:
            expect(
                not torch.equal(logits(given.without([name])), logits(given)),
                f"logits do not depend on the column {name!r}",
            )

    def null_class() -> None:
        expect_close(model(tokens), logits(given.without()), "logits without labels and of the null class")

    def steps() -> None:
        encoded = model.encode_given(given)
        whole, state, last, begin = model(tokens, encoded), model.start(encoded), None, 0
        for block in model.blocks:
            at = model.order[begin : begin + block]
            expect_close(model.next_logits(state, last), whole[:, at], f"cached and whole logits at rank {begin}")
            begin, last = begin + block, tokens.flatten(1)[:, at]

    def batches() -> None:
        expect_close(logits(given[:1]), logits(given)[:1], "logits of an image alone and in a batch")
        together = model.sample(4, condition=others[:4], generator=generators(range(4)))
        alone = model.sample(1, condition=others[2:3], generator=generators([2]))
        expect(torch.equal(together[2:3], alone), "an image differs when drawn alone")

    def saved() -> None:
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        again = type(model)(model.config)
        again.load_state_dict(weights)
        rebuilt = again.eval()(tokens, again.encode_given(given))
        expect_close(rebuilt, logits(given), "logits of a model rebuilt from its weights")

    def known_tokens() -> None:
        known = torch.rand(8, *grid.shape) < 0.5
        sampled = model.sample(8, condition=given, tokens=tokens, known=known, generator=generators(range(8)))
        expect(torch.equal(sampled[known], tokens[known]), "a known token was replaced")

    promises: dict[str, Callable[[], None]] = {
        "logits see earlier blocks only": causality,
        "no label is the null class": null_class,
        "cached steps equal forward": steps,
        "an image does not depend on its batch": batches,
        "known tokens do not change": known_tokens,
        "configuration and weights are the whole model": saved,
    }
    if others.names:
        promises["columns matter, and missing ones are null"] = columns
    if grid.vocab_size ** len(grid) <= MOST_GRIDS:
        every = torch.tensor(list(itertools.product(range(grid.vocab_size), repeat=len(grid))))
        every = every.reshape(-1, *grid.shape)

        @cache
        @torch.no_grad()
        def density() -> Tensor:
            parts = [model.log_prob(part, condition=others[:1].expand(len(part))) for part in every.split(256)]
            return torch.cat(parts).double().exp()

        def sums_to_one() -> None:
            total = float(density().sum())
            expect(not model.exact or abs(total - 1) < 1e-3, f"the probabilities of all grids sum to {total:.4g}")

        def frequencies() -> None:
            generator = torch.Generator().manual_seed(1)
            sampled = model.sample(4000, condition=others[:1].expand(4000), generator=generator).flatten(1)
            place = torch.tensor([grid.vocab_size**k for k in reversed(range(len(grid)))])
            found = torch.bincount((sampled * place).sum(1), minlength=len(every)).double()
            expect(
                not model.exact or frequencies_agree(found, density() * 4000),
                "samples do not have the frequencies of log_prob",
            )

        promises |= {"probabilities sum to one": sums_to_one, "samples follow log_prob": frequencies}
    for promise, check in promises.items():
        yield promise, problem_of(check)


def expect_close(one: Tensor, other: Tensor, what: str) -> None:
    expect(one.shape == other.shape, f"{what} have shapes {tuple(one.shape)} and {tuple(other.shape)}")
    apart = float((one - other).abs().max())
    expect(apart <= TOLERANCE * max(1.0, float(other.abs().max())), f"{what} differ by up to {apart:.3g}")


def frequencies_agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether counts are as expected: chi-squared at six standard deviations, rare outcomes pooled."""
    rare = expected < 5
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-3)
    free = max(1, len(found) - 1)
    return float(((found - expected).square() / expected).sum()) < free + 6 * math.sqrt(2 * free)


def generators(seeds: Any) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
