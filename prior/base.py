"""The contract of stage two: an ordered partition, logits for every position, hence `log_prob` and `sample`.

    p(tokens | labels) = prod_b prod_{i in block b} p(tokens[i] | tokens of the blocks before b, labels)

Blocks of one token are the chain rule; larger ones are parallel decoding by definition of the model. The base class
owns the slow, obviously right algorithms; a model writes `forward`, and may have a `make_cache` that gives the same
logits, block by block, for less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenizer.base import Grid, TokenGrid, full_float32, in_finest
from tokenizer.config import Fact, ModelConfig, Node
from tokenizer.model import PretrainedModel

from .drawing import draw, evaluating
from .features import Features
from .heads import head_problem, make_head
from .heads.tokens import Positions
from .mixtures import Mixtures
from .orders import Partition, blocks_problem, make_partition, order_problem
from .requests import Order, Rows, Walk, check_labels, check_order, given_walk, make_rows
from .sampling import Generators, Sampler
from .sampling.graphs import Graphs
from .sampling.stepping import Stepping
from .sampling.watching import OnStep, Watch


class PriorConfig(ModelConfig):
    """What every prior is told."""

    grid: Fact[Grid] = Field(description="shape and vocabulary of the tokens")
    num_classes: Fact[int] = Field(0, ge=0, le=1 << 20, description="number of classes; 0 is unconditional")
    tokenizer: Fact[str] = Field("", description="fingerprint of the tokenizer whose tokens it was trained on")
    order: str = Field(
        "raster",
        description="how the grid is walked: raster, column, snake, spiral_in, spiral_out, z_curve, hilbert, "
        "subsample, halton, spread or random:SEED; several tokens at once, where the model takes them: diagonal, "
        "wave:S, rows, dyadic, regions:K, halton:K, spread:K, random:SEED:K (K blocks) or NAME/K (blocks of K)",
    )
    blocks: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="sizes that cut the order into blocks, whose tokens are drawn at once; null: the order's own"
    )

    head: Annotated[ModelConfig | None, Node("prior.heads:Head")] = Field(
        None,
        description="what is made of the numbers that the network puts out: null, a logit for each id; depth, for "
        "grids of levels, whose ids at a position are then drawn one after the other from one pass; logistic, for "
        "pixels",
    )

    takes_blocks: ClassVar[bool] = False
    """Whether the model draws blocks of several tokens."""
    takes_heads: ClassVar[bool] = False
    """Whether the model writes `outputs`, of which a head makes logits."""
    takes_positions: ClassVar[bool] = False
    """Whether it sees positions, of several ids each, where a head draws these together."""

    def check(self) -> Iterator[str]:
        """The head has to fit the grid; the order has to exist for it, and its blocks have to sum to it."""
        if problem := head_problem(self):
            yield f"head: {problem}"
        elif problem := order_problem(self.order, self.positions.shape):
            yield f"order: {problem}"
        elif self.blocks is not None and (problem := blocks_problem(self.blocks, len(self.positions))):
            yield problem
        elif max(self.partition().blocks) > 1 and not self.takes_blocks:
            kinds: list[Any] = [Prior.find(name) for name in Prior.available()]
            takers = ", ".join(kind.name for kind in kinds if kind.Config.takes_blocks)
            named = "order" if self.blocks is None else "blocks"
            yield f"{named}: this kind draws one token at a time; kinds that draw blocks of several are {takers}"

    @property
    def positions(self) -> TokenGrid:
        """The grid that the network sees: of positions, where the head draws the ids of each; else of tokens."""
        return self.grid if self.head is None or self.grid.together == 1 else self.grid.positions

    def partition(self) -> Partition:
        """The ordered partition of `positions`, which `order` and `blocks` name."""
        partition = make_partition(self.order, self.positions.shape)
        return partition if self.blocks is None else Partition(partition.order, self.blocks)


class Prior(Positions, Features, Mixtures, Stepping, PretrainedModel, family="prior"):
    """A distribution over grids of ids; `forward` is the only method that trains."""

    Sampling: ClassVar[type[Sampler]] = Sampler
    """The settings that `sample` takes, of which a model may declare more."""
    exact: bool = True
    """False where `log_prob` of an image is an unbiased estimate of a lower bound: the mean over images is a bound."""
    captures: bool = True
    """Whether a graph can hold `start` and the cached steps: the host decides nothing in them."""
    recomputes: bool = False
    """Whether `start` returns a `State`, which has nothing to compute for tokens that all images keep."""
    order: Tensor
    """(N,) int64; `order[r]` is the raster index of the r-th token."""
    blocks: tuple[int, ...]
    """The sizes that cut `order` into blocks; they sum to N."""
    block_of: Tensor
    """(N,) int64: the number of each token's block, raster order."""
    rounding: float = 4e-6
    """How far apart two computations of the same float32 logits may be, as a multiple of the image's largest |logit| so
    far (at least 1: a row's own may be tiny). Well above what `python -m benchmarks.trust.rounding` measures."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.grid, self.num_classes = config.grid, config.num_classes
        self.readout = make_head(config)
        self.graphs = Graphs()
        self.set_walk(config.partition())

    def outputs(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the network puts out, teacher-forced: `(B, P, readout.size)` at positions in raster order; at i it sees
        only tokens of positions in earlier blocks. What a model writes; the arguments are those of `forward`."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, *walk: Any, raw: bool = False, **inputs: Any
    ) -> Tensor:
        """Teacher-forced logits `(B, N, vocab_size)`, raster order; `logits[:, i]` sees only tokens of earlier blocks.

        tokens: `(B, *grid.shape)`; labels: `(B,)`, where `num_classes` is the null class; None is the null class.
        A model with `any_order` has a third argument, None for its own: `order`, `(N,)` or `(B, N)`; or, if it takes
        blocks, `block_of`, the number of each token's block in raster order, `(N,)` or `(B, N)`. raw: return `outputs`,
        which `loss` takes; without a head they are the logits.
        """
        outputs = self.outputs(tokens, labels, *walk, **inputs)
        return outputs if raw else self.to_raster(self.readout.logits(outputs, self.ids_of(tokens)))

    @property
    def likelihood_passes(self) -> int:
        """How many passes over the grid `log_prob` of an image takes."""
        return 1

    # Training

    def initialize(self, tokens: Tensor, labels: Tensor | None) -> None:  # noqa: B027 (most models need not look)
        """Called once before training with the whole training set, for models that start from its statistics."""

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """Further arguments of `forward` and `loss` in a training step on `tokens`: a model may draw orders or masks.

        Randomness comes from torch's global generator, which the loop seeds by (seed, rank, step). progress: the share
        of training that is done, in [0, 1].
        """
        return {}

    def loss(self, outputs: Tensor, tokens: Tensor, **inputs: Any) -> Tensor:
        """What training minimises, in nats per token: the mean negative log-likelihood. outputs: `put_out`;
        inputs: `training_inputs`."""
        return self.readout.mean_nats(outputs, self.ids_of(tokens))

    # Likelihood

    def token_log_probs(self, tokens: Tensor, labels: Tensor | None = None, order: Order = None) -> Tensor:
        """log p of each token, `(B, *grid.shape)` nats in float32, or in float64 for float64 weights: what
        `chain_log_probs` returns, unless a model estimates a bound instead. Raises `ValueError` as that does."""
        return self.chain_log_probs(tokens, labels, order)

    @full_float32()
    def chain_log_probs(
        self, tokens: Tensor, labels: Tensor | None = None, order: Order = None, known: Tensor | None = None
    ) -> Tensor:
        """log p of each token given the blocks before its own, `(B, *grid.shape)` nats. The likelihood, written once.

        order: a name, `(N,)` or `(B, N)` (cut into the model's own blocks), or a `Partition`, for a model with
        `any_order`; None is its own. known: bool `(B, N)`, raster order: such a model takes these tokens first, as
        `sample` does. Raises `ValueError` for tokens, labels or an order out of range.
        """
        self.grid.check(tokens)
        walk, labels = check_order(self, order, len(tokens)), check_labels(self, labels, len(tokens))
        outputs = self.put_out(tokens, labels, **given_walk(self, walk, known))
        return self.to_raster(self.readout.log_probs(outputs, self.ids_of(tokens))).reshape(tokens.shape)

    def log_prob(
        self, tokens: Tensor, labels: Tensor | None = None, order: Order = None, num_orders: int = 1, num_masks: int = 1
    ) -> Tensor:
        """log p(tokens | labels), `(B,)` nats.

        num_orders, num_masks: K and M > 1 are the density of a mixture, log (1/KM) sum_km p(tokens | order_k, mask_m):
        of `order` and K - 1 random ones (`orders`), which needs `any_order`, times the model's own connectivity and
        M - 1 random ones (`connected`), which needs `any_connectivity` (Germain et al. 2015, section 4.2). Raises
        `ValueError` for tokens, labels, orders or masks out of range.
        """
        orders, each = self.orders(num_orders, order), list[Tensor]()
        for number in self.connectivities(num_masks):
            with self.connected(number):
                each += [self.token_log_probs(tokens, labels, one).flatten(1) for one in orders]
        members = torch.stack([in_finest(nats).sum(1) for nats in each])
        return (members.logsumexp(0) - math.log(len(each))).to(each[0].dtype)

    def likelihood_pass(self, tokens: Tensor, labels: Tensor | None = None) -> None:
        """One pass of those that `log_prob` takes, for a plan that counts what it costs. Here there is only one."""
        self.log_prob(tokens, labels)

    # Sampling

    @classmethod
    def make_sampler(cls, **settings: Any) -> Sampler:
        """`Sampling` of these settings. Raises `TypeError` for one that it does not have, `ValueError` out of range."""
        if unknown := sorted(set(settings) - set(cls.Sampling.names())):
            raise TypeError(f"{unknown[0]!r} is no argument of sampling from a {cls.name!r} prior")
        return cls.Sampling(**settings)

    def check_sampler(self, sampler: Any) -> None:
        """Raise `ValueError` for settings of `Sampling` that do not fit this very prior."""
        sampler.check(self.grid)

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
        order: Order = None,
        num_orders: int = 1,
        cache: bool = True,
        parallel: bool = False,
        guess: Prior | None = None,
        capture: bool = True,
        progress: bool | Mapping[str, Any] = False,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw tokens `(num_images, *grid.shape)`, one block of the order at a time.

        temperature, top_k, top_p, guidance_scale, settings: those of this prior's `Sampling`, by name. generator: one,
        or a list with one per image; image k depends on its own generator alone, not on its batch. tokens, known: where
        bool `known` (`grid.shape` or `(B, *grid.shape)`) holds, `tokens` is kept. A model with `any_order` walks the
        known tokens first, so that all others are conditioned on all of them, and the rest keeps its cuts; any other
        model conditions a drawn token on the known ones of earlier blocks. order, num_orders: as for `log_prob`; each
        image is drawn in one of the orders, all equally likely; where tokens are known, each as likely as it makes
        these when they come first (at temperature 1, without guidance), which costs a pass per image: then images are
        of the mixture of these walks given what is known. cache: False recomputes everything at every step; capture:
        False launches cached steps on a GPU kernel by kernel, not as graphs. parallel: the same tokens from fewer
        passes over the whole grid (`prior.parallel`), and fewer still with a `guess`, a cheap prior over the same
        tokens. progress: a bar, or `tqdm`'s arguments for one. on_step: called with a `Step` (`sampling.watching`)
        after each; what it raises ends sampling.

        That all these agree, in any batch, is promised for float32 and float64 weights as far as computations differ by
        no more than `rounding`; lower precision may draw other images in another way. Raises `ValueError` for arguments
        out of range, `TypeError` for a setting that this prior does not have.
        """
        common = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        sampler = self.make_sampler(**common, **settings)
        self.check_sampler(sampler)
        walk = Walk(order, num_orders, cache, parallel, guess, capture)
        walk.check(self)
        rows = make_rows(self, num_images, labels, sampler, generator, tokens, known)
        watch = Watch(progress, on_step, rows, self.grid.shape)
        with torch.inference_mode(), evaluating(self), evaluating(self if guess is None else guess):
            drawn = self.draw(rows, sampler, walk, watch)
        return drawn.reshape(num_images, *self.grid.shape).clone()  # no inference tensor: it may be trained on

    def draw(self, rows: Rows, sampler: Any, walk: Walk, watch: Watch) -> Tensor:
        """`sample` of what has been checked: tokens `(B, N)` for `rows`, both in raster order, by a `Sampling`."""
        return draw(self, rows, sampler, walk, watch)

    def rows_at_once(self) -> int | None:
        """The number of rows to sample together, where that is faster than all at once; None is all at once."""
        return None
