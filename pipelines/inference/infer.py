"""Compute posteriors: log p(image | value) for each value of a column, or at points of a range that is refined where
the mass lies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prior.columns import Column, find_column
from prior.given import Given
from tokenizer.precision import in_finest

from ..columns import format_of
from ..images.pictures import find_user_stacklevel
from .posterior import ListPosterior, Posterior, RangePosterior, Scale

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

FIRST, ADDED, ROUNDS = 32, 12, 3
"""Cells of a range at first, points that a refinement adds, and refinements."""
POINTS = FIRST + 1 + ADDED * ROUNDS
UNIFORM = "uniform"
PriorOf = str | Sequence[float] | Mapping[Any, float] | Callable[[Tensor], Any] | None
"""p(value): None for that of the training split, "uniform", probabilities of the values in their order or by value, or
of a range a function that returns the density of numbers."""


def infer(
    pipeline: ImagePipeline,
    images: Any,
    column: str,
    *,
    condition: Any = None,
    prior: PriorOf = None,
    groups: Sequence[Any] | None = None,
    candidates: Any = None,
    batch_size: int = 256,
) -> Posterior:
    """Return what images say of a column: p(value | images), by Bayes' rule from log p(image | value).

    column: of classes; of flags, all subsets of at most 8, or with a warning each flag alone while the others are null;
    or of a number or an angle. condition: values of other columns, as in `read_given`. prior: p(value), which the
    result names: by default that of the training split given the condition, or uniform for files of 0.3. groups: names
    of objects, one for each image; the images of an object are taken together. candidates: the values to compare,
    needed for vectors, grids and several numbers. batch_size: pairs of image and value evaluated at a time.

    A likelihood is overconfident, and images of one object are not independent: `smalti calibrate column=NAME` fits a
    temperature, and the levels of `Posterior.conformal`. Raises `ValueError` for a column that the prior lacks or that
    is given, for values that cannot be listed without candidates, for groups of another length, and for a prior that is
    no distribution."""
    find_column(pipeline.columns, column, "column")
    batch = pipeline.to_images(images)
    given = pipeline.read_given(None, condition, len(batch))
    if column in given.rows:
        raise ValueError(f"column: {column!r} is given; leave it out of the condition")
    number_groups(groups, len(batch))  # which raises errors
    list_candidates(pipeline, column, candidates)
    tokens = pipeline.encode_batch(batch, batch_size=batch_size)
    return infer_tokens(
        pipeline, tokens, given, column, prior=prior, groups=groups, candidates=candidates, batch_size=batch_size
    )


def infer_tokens(
    pipeline: ImagePipeline,
    tokens: Tensor,
    given: Given,
    column: str,
    *,
    prior: PriorOf = None,
    groups: Sequence[Any] | None = None,
    candidates: Any = None,
    batch_size: int = 256,
) -> Posterior:
    """Like `infer`, for the tokens of images `(B, *grid.shape)` and what is given of them."""
    kind: Column = pipeline.columns[column]
    rows, members = number_groups(groups, len(tokens))
    evidence = Evidence(pipeline, tokens, given, column, members, len(rows), batch_size)
    firsts = given[evidence.firsts].to(torch.device("cpu"))
    sizes = members.bincount(minlength=len(rows)).tolist()
    scales = [pipeline.inference.scale(column, given.names, size) for size in sizes]
    if prior is not None:  # levels hold for the prior that they were fitted with
        scales = [scale._replace(denser=()) for scale in scales]
    values = list_candidates(pipeline, column, candidates)
    if values is not None:
        format_ = format_of(column, kind, pipeline.condition_tokenizers.get(column))
        names = format_.to_values(values) if candidates is None else list(range(len(values)))
        log_prior, words = weigh_values(pipeline, column, firsts, values, names, prior, candidates is not None)
        log_likelihood = evidence.evaluate(values.expand(len(rows), *values.shape))
        return ListPosterior(column, rows, log_likelihood, log_prior, words, scales, names)
    if kind.span is not None:
        return infer_range(pipeline, column, evidence, rows, firsts, scales, prior)
    pairs = kind.list_parts()
    if not pairs:
        raise ValueError(f"column: the values of {column!r} ({kind.kind}) cannot be listed; give candidates")
    if prior is not None and prior != UNIFORM:
        raise ValueError(f"prior: that of single flags is {UNIFORM!r}, or None for their frequencies")
    warnings.warn(
        f"column: {column!r} has {len(pairs)} flags; each is inferred alone, with the others unknown",
        stacklevel=find_user_stacklevel(),
    )
    parts = []
    for pair in pairs.values():
        log_prior, words = weigh_values(pipeline, column, firsts, pair, ["no", "yes"], prior, False)
        parts.append((evidence.evaluate(pair.expand(len(rows), *pair.shape)), log_prior))
    likelihoods, priors = (torch.stack(each, 1).flatten(0, 1) for each in zip(*parts, strict=True))
    each = [f"{row}: {flag}" for row in rows for flag in pairs]
    several = [scale for scale in scales for _ in pairs]
    return ListPosterior(column, each, likelihoods, priors, words, several, ["no", "yes"])


@dataclass(frozen=True)
class Evidence:
    """The tokens of images, what is given of them, and of which row each is a member."""

    pipeline: ImagePipeline
    tokens: Tensor
    given: Given
    column: str
    members: Tensor
    count: int
    batch_size: int

    @property
    def firsts(self) -> Tensor:
        """The first image of each row."""
        images = torch.arange(len(self.members) - 1, -1, -1)
        return torch.zeros(self.count, dtype=torch.long).scatter_(0, self.members.flip(0), images)

    def evaluate(self, values: Tensor) -> Tensor:
        """Return log p(images of a row | value), float64 `(rows, V)`, of raw values `(rows, V, *shape)`: the sum over
        its images, as if they were independent given the value."""
        images, places = len(self.tokens), values.shape[1]
        pairs, parts = torch.arange(images * places), list[Tensor]()
        for part in self.pipeline.with_bar(pairs.split(self.batch_size), "inferring"):
            image, place = part // places, part % places
            raw = values[self.members[image], place].to(self.pipeline.device)
            given = self.given[image].with_rows(**{self.column: raw})
            nats = self.pipeline.prior.log_prob(self.tokens[image.to(self.tokens.device)], condition=given)
            parts.append(in_finest(nats).cpu().double())
        each = torch.cat(parts).reshape(images, places) if parts else torch.zeros(0, places, dtype=torch.float64)
        return torch.zeros(self.count, places, dtype=torch.float64).index_add(0, self.members, each)


def infer_range(
    pipeline: ImagePipeline,
    column: str,
    evidence: Evidence,
    rows: Sequence[str],
    given: Given,
    scales: Sequence[Scale],
    prior: PriorOf,
) -> RangePosterior:
    """Infer a number or an angle: evaluate points of the whole range, then between those that hold the most mass."""
    kind = pipeline.columns[column]
    assert kind.span is not None
    low, high = kind.span
    if high <= low:
        raise ValueError(f"column: {column!r} has a single value in the training data, {low:g}")
    even = torch.linspace(low, high, FIRST + 1, dtype=torch.float64)
    points = (even if kind.period is None else even[:-1]).expand(len(rows), -1)

    def make(points: Tensor, log_likelihood: Tensor, error: Tensor) -> RangePosterior:
        log_prior, words = weigh_range(pipeline, column, given, points, prior)
        return RangePosterior(
            column, rows, log_likelihood, log_prior, words, scales, points, (low, high), kind.period, error
        )

    found = make(points, evidence.evaluate(points[..., None].float()), torch.ones(len(rows)))
    for _ in range(ROUNDS):
        mass = found.probabilities
        nats, turn = found.log_likelihood, kind.period
        between = middles(mass, turn).topk(ADDED, 1).indices
        new, guess = middles(found.points, turn, turn).gather(1, between), middles(nats, turn).gather(1, between)
        points, order = torch.cat([found.points, new], 1).sort(1)
        guessed = make(points, torch.cat([nats, guess], 1).gather(1, order), found.error)
        exact = torch.cat([nats, evidence.evaluate(new[..., None].float())], 1).gather(1, order)
        found = make(points, exact, found.error)
        moved = (found.probabilities - guessed.probabilities).abs().sum(1) / 2
        found = make(points, exact, moved)
    return found


def middles(values: Tensor, period: float | None, more: float | None = None) -> Tensor:
    """Return the means of neighbours along the last axis; on a circle also that of the last and the first, which is
    `more` larger there."""
    if period is not None:
        values = torch.cat([values, values[:, :1] + (more or 0)], 1)
    return (values[:, 1:] + values[:, :-1]) / 2


def number_groups(groups: Sequence[Any] | None, count: int) -> tuple[list[str], Tensor]:
    """Return the names of rows, and the row of each image `(count,)`. Raises `ValueError`."""
    if groups is None:
        return [str(number) for number in range(count)], torch.arange(count)
    names = [str(name) for name in groups]
    if len(names) != count:
        raise ValueError(f"groups: got {len(names)} names for {count} images; give one for each")
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return list(places), torch.tensor([places[name] for name in names], dtype=torch.long)


def list_candidates(pipeline: ImagePipeline, column: str, candidates: Any) -> Tensor | None:
    """Return the raw values to compare `(V, *shape)`; None if they cannot be listed. Raises `ValueError`."""
    kind: Column = pipeline.columns[column]
    if candidates is None:
        return kind.list_values()
    try:
        format_ = format_of(column, kind, pipeline.condition_tokenizers.get(column))
        values = kind.parse(format_.convert(candidates)).cpu()
    except (ValueError, TypeError) as error:
        raise ValueError(f"candidates: {error}") from error
    if values.ndim == len(kind.shape) or len(values) < 2:
        raise ValueError("candidates: give a list of at least two values")
    if bool(kind.is_null(values).any()):
        raise ValueError("candidates: null is not a value")
    return values


# p(value)


def weigh_values(
    pipeline: ImagePipeline,
    column: str,
    given: Given,
    values: Tensor,
    names: Sequence[Any],
    prior: PriorOf,
    chosen: bool,
) -> tuple[Tensor, str]:
    """Return log p(value | given) of listed values, `(B, V)`, and what it is in words. chosen: whether the user chose
    the values, which then are equally likely by default. Raises `ValueError`."""
    shape = len(given), len(values)
    if prior is None and not chosen:
        return pipeline.frequencies.log_prob_of(column, given, values)
    if prior is None or prior == UNIFORM:
        return torch.zeros(shape, dtype=torch.float64).log_softmax(1), UNIFORM
    if isinstance(prior, Mapping):
        unknown = [name for name in prior if name not in names]
        if unknown:
            raise ValueError(f"prior: {unknown[0]!r} is not a value; allowed are {', '.join(map(str, names[:20]))}")
        prior = [prior.get(name, 0.0) for name in names]
    if callable(prior) or isinstance(prior, str):
        raise ValueError(f"prior: expected {UNIFORM!r} or {len(values)} probabilities (got {prior!r})")
    weights = torch.as_tensor(prior, dtype=torch.float64)
    if weights.shape != shape[1:] or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-3:
        raise ValueError(f"prior: expected {len(values)} probabilities that sum to one")
    return weights.log().expand(shape), "given"


def weigh_range(
    pipeline: ImagePipeline, column: str, given: Given, points: Tensor, prior: PriorOf
) -> tuple[Tensor, str]:
    """Return log p(number | given) at points `(B, V)`, up to a constant, and what it is in words."""
    if prior is None:
        return pipeline.frequencies.log_density(column, given, points)
    if prior == UNIFORM:
        return torch.zeros_like(points), UNIFORM
    if not callable(prior):
        raise ValueError(f"prior: expected {UNIFORM!r} or a function that returns the density of numbers")
    density = torch.as_tensor(prior(points), dtype=torch.float64)
    positive = bool((density >= 0).all() and density.isfinite().all() and (density > 0).any(-1).all())
    if density.shape != points.shape or not positive:
        raise ValueError("prior: the density of each number must be finite, not negative, and somewhere positive")
    return density.log(), "given"
