"""The contract of stage two: an order, logits for every position, hence `log_prob` and `sample`.

    p(tokens | labels) = prod_r p(tokens[order[r]] | tokens[order[:r]], labels)

The base class owns the slow, obviously right algorithms; a model writes `forward`, and may override `start` and
`next_logits` with a path that gives the same logits for less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizer.base import TokenGrid
from tokenizer.pretrained import ModelConfig, PretrainedModel, setting

from .orders import make_order, order_problem
from .sampling import Generators, GumbelNoise, Sampler, image_generators

FEW_ROWS = 4
"""From so many rows on, a row's matrix products are the same whatever the other rows (measured on CPU)."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig(ModelConfig):
    """What every prior is told."""

    grid: TokenGrid = setting(help="shape and vocabulary of the tokens", fact=True)
    num_classes: int = setting(0, "number of classes; 0 is unconditional", ge=0, le=1 << 20, fact=True)
    tokenizer: str = setting("", "fingerprint of the tokenizer whose tokens it was trained on", fact=True)
    order: str = setting("raster", "how the grid is walked: raster, column, snake, spiral_in, spiral_out, z_curve, "
                                   "hilbert, subsample or random:SEED")  # fmt: skip

    def check(self) -> Iterator[str]:
        """The order has to exist for this grid."""
        if problem := order_problem(self.order, len(self.grid.shape)):
            yield f"order: {problem}"


@dataclass
class State:
    """What a half-sampled batch remembers. This one serves the slow path: the tokens so far."""

    tokens: Tensor
    labels: Tensor
    rank: int = 0


class Prior(PretrainedModel, family="prior"):
    """A distribution over grids of ids; `forward` is the only method that trains."""

    exact: bool = True
    """False where `log_prob` is only a bound."""
    order: Tensor
    """(N,) int64; `order[r]` is the raster index of the r-th token."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.grid = config.grid
        self.num_classes = config.num_classes
        self.register_buffer("order", make_order(config.order, config.grid.shape), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Teacher-forced logits `(B, N, vocab_size)`, raster order; `logits[:, i]` sees only tokens ranked before i.

        tokens: `(B, *grid.shape)`; labels: `(B,)`, where `num_classes` is the null class; None is the null class.
        """
        raise NotImplementedError

    def initialize(self, tokens: Tensor, labels: Tensor | None) -> None:  # noqa: B027 (most models need not look)
        """Called once with the whole training set before training, for models that start from its statistics."""

    def token_log_probs(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p of each token given those before it, `(B, *grid.shape)` float32 nats. The likelihood, written once.

        Raises `ValueError` for tokens or labels out of range.
        """
        self.grid.check(tokens)
        logits = self(tokens, self.check_labels(labels, len(tokens))).float()
        ids = tokens.reshape(len(tokens), -1, 1).long()
        return logits.log_softmax(-1).gather(-1, ids).reshape(tokens.shape)

    def log_prob(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(tokens | labels), `(B,)` nats. Raises `ValueError` for tokens or labels out of range."""
        return self.token_log_probs(tokens, labels).flatten(1).double().sum(1).float()

    def sample(
        self,
        num_images: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        tokens: Tensor | None = None,
        known: Tensor | None = None,
        cache: bool = True,
        progress: bool = False,
    ) -> Tensor:
        """Draw tokens `(num_images, *grid.shape)`, one position of the order at a time.

        generator: one, or a list with one per image; image k depends on its own generator alone, not on its batch.
        tokens, known: where bool `known` (`grid.shape` or `(B, *grid.shape)`) holds, `tokens` is kept; a drawn token
        is conditioned on the known ones before it in the order. cache: False recomputes everything at every step.
        Raises `ValueError` for arguments out of range.
        """
        sampler = Sampler(temperature, top_k, top_p, guidance_scale)
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1 (got {num_images})")
        labels = self.check_labels(labels, num_images)
        if guidance_scale != 1 and (labels is None or bool((labels == self.num_classes).all())):
            raise ValueError("guidance_scale other than 1 needs labels to guide towards")
        if labels is None:
            labels = torch.full((num_images,), self.num_classes, device=self.device)
        given, keep = self._known(tokens, known, num_images)
        generators = image_generators(generator, num_images)
        images = max(FEW_ROWS, (self.rows_at_once() or num_images) // (1 if guidance_scale == 1 else 2))
        shares = torch.arange(num_images).chunk(-(-num_images // images))
        with torch.inference_mode(), self._evaluating():
            parts = []
            for share in shares:
                part = slice(int(share[0]), int(share[-1]) + 1)
                draw = self._sample_few if len(share) * (1 if guidance_scale == 1 else 2) < FEW_ROWS else self._sample
                parts.append(draw(labels[part], sampler, generators[part], given[part], keep[part], cache, progress)[0])
        return (
            torch.cat(parts).reshape(num_images, *self.grid.shape).clone()
        )  # no inference tensor: it may be trained on

    def rows_at_once(self) -> int | None:
        """How many rows to sample together, where that is faster than all at once; None is all at once."""
        return None

    def _sample_few(self, labels: Tensor, sampler: Sampler, generators: list[torch.Generator], given: Tensor,
                    keep: Tensor, cache: bool, progress: bool) -> tuple[Tensor, float]:  # fmt: skip
        """Fewer than `FEW_ROWS` rows are multiplied by other kernels, whose last bits differ from a large batch's. So
        that image k does not depend on its batch, a draw that was a close call is made again, padded to `FEW_ROWS`."""
        count, padding = len(labels), FEW_ROWS
        if not sampler.filters:
            states = [generator.get_state() for generator in generators]
            drawn, lead = self._sample(labels, sampler, generators, given, keep, cache, progress)
            if lead > sampler.tolerance:
                return drawn, lead
            for generator, generator_state in zip(generators, states, strict=True):
                generator.set_state(generator_state)
        labels, given, keep = (torch.cat([x, x[:1].expand(padding, *x.shape[1:])]) for x in (labels, given, keep))
        generators = generators + [torch.Generator(generators[0].device).manual_seed(0) for _ in range(padding)]
        drawn, lead = self._sample(labels, sampler, generators, given, keep, cache, progress)
        return drawn[:count], lead

    def _sample(self, labels: Tensor, sampler: Sampler, generators: list[torch.Generator], given: Tensor, keep: Tensor,
                cache: bool, progress: bool) -> tuple[Tensor, float]:  # fmt: skip
        """Tokens `(B, N)`, and (for few rows) by how much the closest decision was won."""
        guided = sampler.guidance_scale != 1
        noise = GumbelNoise(generators, len(self.grid), self.grid.vocab_size, self.device)
        rows = torch.cat([labels, torch.full_like(labels, self.num_classes)]) if guided else labels
        start, next_logits = (self.start, self.next_logits) if cache else (self.start_slow, self.next_logits_slow)
        state: Any = start(len(rows), rows)
        drawn, token, leads = given.clone(), None, []
        kept = keep.any(0).tolist()
        for rank, at in enumerate(_progress(self.order.tolist(), progress)):
            scores = sampler.scores(sampler.guide(next_logits(state, token).float()), noise.at(rank))
            if len(rows) < FEW_ROWS and scores.shape[-1] > 1:
                best, ids = scores.topk(2)
                chosen = ids[:, 0]
                leads.append(best[:, 0] - best[:, 1])
            else:
                chosen = scores.argmax(-1)
            if kept[at]:
                chosen = torch.where(keep[:, at], drawn[:, at], chosen)
            drawn[:, at] = chosen
            token = torch.cat([chosen, chosen]) if guided else chosen
        return drawn, float(torch.stack(leads).min()) if leads else float("inf")

    def start(self, num_images: int, labels: Tensor | None) -> Any:
        """Begin an incremental pass over `num_images` rows; returns the state that `next_logits` advances."""
        return self.start_slow(num_images, labels)

    def next_logits(self, state: Any, token: Tensor | None) -> Tensor:
        """Logits `(B, vocab_size)` of the next position in the order, given the last position's `token` `(B,)` (None
        at the first)."""
        return self.next_logits_slow(state, token)

    def start_slow(self, num_images: int, labels: Tensor | None) -> State:
        """`start` of the path that recomputes everything: right by construction."""
        if labels is None:
            labels = torch.full((num_images,), self.num_classes, device=self.device)
        return State(torch.zeros(num_images, len(self.grid), dtype=torch.long, device=self.device), labels)

    def next_logits_slow(self, state: State, token: Tensor | None) -> Tensor:
        """`next_logits` by one forward pass over the whole grid."""
        if token is not None:
            state.tokens[:, self.order[state.rank - 1]] = token
        logits = self(state.tokens.reshape(-1, *self.grid.shape), state.labels)[:, self.order[state.rank]]
        state.rank += 1
        return logits

    def check_labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        """`labels` as int64 `(count,)` on the model's device. Raises `ValueError` out of `[0, num_classes]`."""
        if labels is None:
            return None
        labels = torch.as_tensor(labels, device=self.device)
        if labels.shape != (count,) or labels.dtype.is_floating_point:
            raise ValueError(f"labels should be {count} whole numbers, got {labels.dtype} of {tuple(labels.shape)}")
        if count and (int(labels.min()) < 0 or int(labels.max()) > self.num_classes):
            raise ValueError(
                f"labels should lie in [0, {self.num_classes}) (and {self.num_classes} is the null class), "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.long()

    def _known(self, tokens: Tensor | None, known: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Tokens to start from and which of them to keep, both `(count, N)`."""
        if (tokens is None) != (known is None):
            raise ValueError("`tokens` and `known` go together: known says which of the tokens to keep")
        if tokens is None or known is None:
            empty = torch.zeros(count, len(self.grid), dtype=torch.long, device=self.device)
            return empty, empty.bool()
        shape = (count, *self.grid.shape)
        if known.dtype != torch.bool or tuple(known.shape) not in (shape, self.grid.shape):
            raise ValueError(
                f"known should be bool of shape {self.grid.shape} or {shape}, got {known.dtype} of {tuple(known.shape)}"
            )
        if tuple(tokens.shape) not in (shape, self.grid.shape):
            raise ValueError(f"tokens should have shape {self.grid.shape} or {shape}, got {tuple(tokens.shape)}")
        known = known.to(self.device).expand(shape).reshape(count, -1)
        tokens = tokens.to(self.device).expand(shape).reshape(count, -1).long()
        self.grid.check(torch.where(known, tokens, 0).reshape(shape))
        return torch.where(known, tokens, 0), known

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)


def _progress(positions: list[int], shown: bool) -> Any:
    if not shown:
        return positions
    from tqdm import tqdm

    return tqdm(positions, desc="sampling", unit="token", leave=False, disable=None)
