"""A bidirectional transformer that fills in masked tokens: any order of them, or many at once.

MaskGIT (Chang et al. 2022), which trains BERT's objective at every share of masked tokens. With the shares drawn evenly
and an image's loss averaged over its masked tokens it is an order-agnostic model (Uria et al. 2014; ARDM, Hoogeboom et
al. 2021): the same network gives p(a token | any others), hence a density along each ordered partition, for a pass per
block.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenizer.base import full_float32

from .base import Prior
from .drawing import FEW_ROWS, State, sent
from .orders import Partition, block_numbers
from .parallel import parallel_rows
from .requests import Order, Rows, Walk, check_labels, partition_of
from .sampling.confidence import SCHEDULES, MaskedSampler, fill_in
from .sampling.watching import Watch
from .transformer import EPS, Block, Rotations, TransformerConfig, coordinates, deep_rounding, reset

MIDPOINTS = 1 << 12  # over which the schedules' mean is taken
CPU_TOKENS = 1 << 13  # of one pass on a CPU, in whose cache its activations then fit
GPU_TOKENS = 1 << 16


class MaskedConfig(TransformerConfig):
    """Sizes of the transformer, and how it is masked and scored."""

    takes_blocks = takes_heads = True

    schedule: Literal["linear", "cosine", "arccos", "square"] = Field(
        "linear",
        description="how the masked share is drawn in training: linear (all alike) maximises the "
        "likelihood; cosine, arccos and square mask more",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a target's mass that is spread over all ids in training"
    )
    exact: bool = Field(True, description="log_prob is exact along `order`, a pass per block; false: estimates a bound")
    bound_passes: int = Field(8, ge=1, le=65536, description="passes of that estimate; more is closer to the bound")

    def check(self) -> Iterator[str]:
        """Labels are smoothed over the ids of a softmax."""
        yield from super().check()
        if self.head is not None and self.label_smoothing:
            yield f"label_smoothing: must be 0 with head {self.head.kind!r} (got {self.label_smoothing})"


class Masked(Prior, name="masked"):
    """Every masked token from all visible ones. `exact` says what `log_prob` is, and may be set at any time."""

    Config = MaskedConfig
    Sampling = MaskedSampler
    any_order = recomputes = True
    coordinates: Tensor

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__(config)
        dim, shape = config.dim, config.grid.shape
        self.exact, self.mask = config.exact, config.grid.vocab_size
        self.rounding = deep_rounding(config.depth)
        self.token_embedding = nn.Embedding(config.grid.vocab_size + 1, dim)  # the last is the mask
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.axis_embeddings: Any = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in shape)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(Block(config, causal=False) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, self.readout.size, bias=False)
        self.register_buffer("coordinates", coordinates(shape).t().contiguous(), persistent=False)
        self.rotations = Rotations(config, coordinates(shape))
        reset(self.parameters(), self.layers)

    def predict(self, ids: Tensor, labels: Tensor, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits `(B, N, V)` from one pass over `ids` (B, N), where `self.mask` is a masked token; or only those `at`
        these rows and raster indices, `(..., V)` for two of `(...)`."""
        outputs = self.one_pass(ids, labels, at)
        return self.readout.next_logits(outputs, ids.new_zeros(*outputs.shape[:-1], 0))

    def one_pass(self, ids: Tensor, labels: Tensor, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the network puts out at the same places, `(B, N, size)` or `(..., size)`."""
        places = sum(table[index] for table, index in zip(self.axis_embeddings, self.coordinates, strict=True))
        x = self.dropout(self.token_embedding(ids) + self.class_embedding(labels)[:, None] + places)
        turns = self.rotations.table[:, None].expand(-1, 2, -1, -1)  # queries and keys stand at the same place
        for block in self.layers:
            x = block(x, turns)
        if at is not None:
            x = x[at]
        return self.head(self.norm(x))

    def outputs(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        order: Tensor | None = None,
        known: Tensor | None = None,
        block_of: Tensor | None = None,
    ) -> Tensor:
        """As in `Prior`. With bool `known`, `(B, N)` or `(B, *grid.shape)`: one pass that sees the tokens where it
        holds, and nothing of the others. Without: teacher-forced, which takes a pass per block. These are the model's
        own; or those that it cuts an `order` into; or given by number, `block_of` each token; `(N,)` or `(B, N)`,
        both."""
        tokens, (count, size) = tokens.flatten(1).long(), (len(tokens), len(self.grid))
        labels = self.class_ids(labels, count)
        if known is not None:
            return self.one_pass(torch.where(known.flatten(1), tokens, self.mask), labels)
        if block_of is None:
            block_of = self.block_of if order is None else block_numbers(order, self.blocks)
        block_of = block_of.expand(count, size)
        numbers, found, parts = torch.unique(block_of), [], []
        for part in numbers.split(max(1, self.rows_of_a_pass() // max(1, count))):
            ids = torch.where(block_of < part[:, None, None], tokens, self.mask).flatten(0, 1)  # per pass and image
            rows, cells = torch.nonzero((block_of == part[:, None, None]).flatten(0, 1), as_tuple=True)
            parts.append(self.one_pass(ids, labels.repeat(len(part)), (rows, cells)))
            found.append(rows % count * size + cells)
        return torch.cat(parts)[torch.cat(found).argsort()].unflatten(0, (count, size))

    def rows_of_a_pass(self) -> int:
        """How many rows go through the network together in many passes, and in sampling on a CPU."""
        return max(1, (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS) // len(self.grid))

    # Training

    def masked_counts(self, u: Tensor) -> Tensor:
        """How many tokens the schedule masks at `u` in [0, 1], `(...)` whole numbers from 1 to N."""
        return (SCHEDULES[self.config.schedule](u) * len(self.grid)).ceil().clamp(1, len(self.grid))

    @cached_property
    def mean_masked(self) -> Tensor:
        """How many tokens the schedule masks on average, `()`: no float, which tensors without data could not give."""
        midpoints = (torch.arange(MIDPOINTS, device="cpu") + 0.5) / MIDPOINTS
        return self.masked_counts(midpoints).mean()

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """`known` `(B, N)`: per image a share of tokens, drawn by the schedule, is masked; at least one token is."""
        masked = self.masked_counts(torch.rand(len(tokens), 1))
        ranks = torch.rand(len(tokens), len(self.grid)).argsort(1).argsort(1)
        return {"known": sent(ranks >= masked, tokens.device)}

    def loss(self, outputs: Tensor, tokens: Tensor, **inputs: Any) -> Tensor:
        """Cross-entropy over the masked positions (not `known`), in nats per token.

        Under the linear schedule the mean over each image's own, which is ARDM's objective: its expectation is the
        negative bound on the log-likelihood per token. Any other schedule gives up likelihood for samples, as MaskGIT
        does, and weighs all masked tokens alike: it divides by the number that the schedule masks on average. (Dividing
        by the number that happens to be masked would make another objective of a batch in parts.)
        """
        masked = ~inputs["known"].flatten(1)
        nats = self.readout.nats(outputs, self.ids_of(tokens), self.config.label_smoothing)[..., 0]
        counts = masked.sum(1, keepdim=True) if self.config.schedule == "linear" else self.mean_masked
        return (nats * masked / counts).sum(1).mean()

    # Likelihood

    @full_float32()
    def token_log_probs(self, tokens: Tensor, labels: Tensor | None = None, order: Order = None) -> Tensor:
        """As in `Prior` where `exact`. Else each token's share of an estimate of a bound, in `bound_passes` passes,
        `(B, *grid.shape)`.

        It sums to an unbiased estimate of E_order log p(tokens | order) <= log E_order p(tokens | order) (ARDM, eq. 4).
        An image's own may lie above the right side; the mean over many images bounds. Passes with n tokens visible, n
        spread evenly over 0 to N - 1, weigh each masked token N / (N - n). The masks follow from the image's tokens:
        its value is always the same, and errors average out over a data set. Raises `ValueError` for an order, as the
        bound is over all of them.
        """
        if self.exact:
            return super().token_log_probs(tokens, labels, order)
        if order is not None:
            raise ValueError("order: without `exact`, log_prob bounds the mean over all orders; no order can be given")
        self.grid.check(tokens)
        labels, ids = check_labels(self, labels, len(tokens)), tokens.flatten(1).long()
        total = torch.zeros(ids.shape, device=ids.device)
        for known in bound_masks(ids, self.config.bound_passes):
            found = self.readout.log_probs(self.put_out(tokens, labels, known=known), ids[..., None])[..., 0]
            weights = ~known / (~known).float().mean(1, keepdim=True) / self.config.bound_passes
            total += found * weights
        return total.reshape(tokens.shape)

    @property
    def likelihood_passes(self) -> int:
        """One for each block where `exact`, else those of the estimate."""
        return len(self.blocks) if self.exact else self.config.bound_passes

    def likelihood_pass(self, tokens: Tensor, labels: Tensor | None = None) -> None:
        """One of the passes of an estimate, whose masks would depend on the tokens."""
        self(tokens, labels, known=torch.ones_like(tokens, dtype=torch.bool)).log_softmax(-1)

    # Representations

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks: their residual stream, `(B, N, dim)`."""
        return list(self.layers)

    def layer_features(
        self, tokens: Tensor, labels: Tensor | None, layers: Sequence[int], **inputs: Any
    ) -> list[Tensor]:
        """One pass over the clean tokens, no mask among them: the features at every position see all tokens, its own
        included. (Teacher-forced ones would take N passes, and see half as much.)"""
        known = torch.ones_like(tokens, dtype=torch.bool)
        return super().layer_features(tokens, labels, layers, **{"known": known, **inputs})

    # Sampling

    def rows_at_once(self) -> int | None:
        """On a CPU, as many rows as have their activations in its cache."""
        return self.rows_of_a_pass() if self.device.type == "cpu" else None

    def stepwise(self, order: Order, steps: int, schedule: str = "cosine") -> Partition:
        """`order` in so many blocks, whose sizes follow the schedule: what `sample(order=order, steps=steps)` walks,
        and `log_prob` scores. Raises `ValueError` for an order that has larger blocks than of one token."""
        walk, blocks = partition_of(self, order)
        if max(blocks) > 1:
            raise ValueError("steps: the order has blocks of its own; give one of them, not both")
        sampler = MaskedSampler(steps=steps, schedule=schedule)
        sampler.check(self.grid)
        return Partition(walk, sampler.sizes(len(self.grid)))

    def start(self, num_images: int, labels: Tensor | None, order: Order = None) -> State:
        """All tokens masked. Each step is a pass over the whole grid: what all see of each other cannot be cached."""
        tokens = torch.full((num_images, len(self.grid)), self.mask, device=self.device)
        return State(tokens, self.class_ids(labels, num_images), *partition_of(self, order))

    def next_logits(self, state: State, tokens: Tensor | None) -> Tensor:
        """Reveal the last block's tokens, and predict the next."""
        at = state.advance(tokens)
        return self.predict(state.tokens, state.labels, (torch.arange(len(at), device=at.device)[:, None], at))

    def draw(self, rows: Rows, sampler: MaskedSampler, walk: Walk, watch: Watch) -> Tensor:
        """A block per pass, as `Prior` does, or in `steps`. (With `parallel` every pass of `Prior.sample` is one pass
        of the network per block, so that it is of no use for speed.) Raises `ValueError` for a walk that does not go
        with `steps`."""
        if sampler.steps is None:
            return super().draw(rows, sampler, walk, watch)
        if walk.order is not None:
            steps = self.stepwise(walk.order, sampler.steps, sampler.schedule)
            return super().draw(rows, sampler, replace(walk, order=steps), watch)
        if walk.is_chosen:
            raise ValueError(
                "steps without an order finds one of its own: num_orders, parallel and cache=False do not go with it"
            )
        most = min(self.rows_at_once() or len(rows) * sampler.copies, parallel_rows(self.grid, self.device))
        parts = rows.cut(max(FEW_ROWS, most // sampler.copies))
        return torch.cat([fill_in(self, part, sampler, watch) for part in parts])


def bound_masks(ids: Tensor, passes: int) -> Tensor:
    """What is known in each pass of the bound for `ids` (B, N), bool `(passes, B, N)`: counts spread evenly over 0 to
    N - 1 from a random start (stratified, and their mean unbiased), positions at random. An image's own tokens seed
    its masks: with the same ones for all, the mean over a data set was off by 4 % in 8 passes."""
    size, masks = ids.shape[1], torch.empty(passes, *ids.shape, dtype=torch.bool, device="cpu")
    for image, row in enumerate(ids.cpu().numpy()):
        generator = torch.Generator().manual_seed(zlib.crc32(row.tobytes()))
        start = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
        visible = ((torch.arange(passes, device="cpu") + start) * size / passes).long().clamp(max=size - 1)
        ranks = torch.rand(passes, size, generator=generator, device="cpu").argsort(1).argsort(1)
        masks[:, image] = ranks < visible[:, None]
    return masks.to(ids.device)
