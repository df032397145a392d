"""The masked autoencoder: a perceptron whose connections are cut so that each output sees only earlier inputs.

MADE (Germain et al. 2015): of two ids, one number goes in and one logit comes out per token; of more ids, one-hot rows
and a softmax. Every hidden unit has a degree d in 1 .. N - 1: it sees the tokens of rank < d, and what is predicted at
rank r sees the units of degree <= r. Any choice of degrees and any order of the grid gives such masks for the same
weights, which is what the agnostic ways of training draw from, and ensembles at test time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior, PriorConfig
from .drawing import sent
from .masks import Connections, Sums, chosen_degrees, degrees_of, even_degrees, random_degrees, summed
from .orders import Partition, make_order
from .requests import Rows, Walk, check_order
from .sampling import Sampler
from .sampling.watching import Watch

DENSE_WIDTH = 32  # up to so many ids, multiplying one-hot rows is faster than picking rows of weights and adding them
MAX_DIRECT = 1 << 28  # weights of the direct connections: the square of what the hidden layers need per unit


class MADEConfig(PriorConfig):
    """Sizes and connections of the perceptron."""

    takes_heads = True

    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (512,), min_length=1, description="units of each hidden layer"
    )
    direct: bool = Field(False, description="connect every token straight to all later positions as well")
    embedding: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="width that ids are embedded in before the first layer and after the last; "
        "null: a row of weights for each position and id",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the hidden units")
    order_agnostic: bool = Field(False, description="train in a new random order at every step")
    connectivity_agnostic: bool = Field(
        False, description="train with new random degrees of the hidden units at every step"
    )
    masks: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="draw so many orders and degrees to train with once for all, not new ones at every step",
    )
    sigmoid: bool = Field(
        True, description="one logit per token where there are two ids; false: one-hot rows and a softmax"
    )

    @property
    def binary(self) -> bool:
        """Whether a token is one number, and so is what is predicted of it."""
        return self.sigmoid and self.grid.vocab_size == 2 and self.embedding is None

    def check(self) -> Iterator[str]:
        """The order has to exist, and direct connections have to be few enough."""
        yield from super().check()
        if self.masks and not (self.order_agnostic or self.connectivity_agnostic):
            yield "masks: needs order_agnostic or connectivity_agnostic, which draw them"
        outputs = len(self.grid) * (1 if self.binary else self.embedding or self.grid.vocab_size)
        if self.direct and outputs**2 > MAX_DIRECT:
            yield f"direct: needs {outputs} squared weights; set a smaller embedding"


@dataclass(frozen=True)
class MADESampler(Sampler):
    """num_masks: as for `log_prob`; each image is drawn in one of so many connectivities, all equally likely also where
    tokens are known: a completion is then not of the mixture's conditional, as that of `num_orders` is."""

    num_masks: int = 1


class ClassBias(nn.Module):
    """A bias and what each class (the last is the null class) adds to it: labels `(B,)` to `(B, size)`, or `(size,)`
    where there are no classes."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(size))
        self.own = nn.Parameter(torch.zeros(num_classes + 1, size)) if num_classes else None

    def forward(self, labels: Tensor) -> Tensor:
        # A copy, for torch's FLOP counter fails at modules that give a parameter.
        return self.shared.clone() if self.own is None else self.shared + F.embedding(labels, self.own)


class MADE(Prior, name="made"):
    """Masked hidden layers from all tokens to all logits at once, and running sums for sampling.

    An input (of two ids -1 or 1, of more a row of weights for each) is told apart from one that is masked, which is
    what the paper conditions on connectivity for. Every later position sees every earlier token, unless a hidden layer
    is so narrow that some degrees are missing and no direct connections make up for it: `receptive_field` says.
    """

    Config = MADEConfig
    Sampling = MADESampler
    captures = False  # the host knows which units are finished; a step takes about six kernels
    ranks: Tensor
    all_degrees: Tensor
    embedding: Tensor | None
    head: Tensor | None

    def __init__(self, config: MADEConfig) -> None:
        super().__init__(config)
        size, vocab, hidden = len(config.grid), config.grid.vocab_size, config.hidden
        self.any_order, self.any_connectivity = config.order_agnostic, config.connectivity_agnostic
        self.width = 1 if config.binary else config.embedding or vocab  # numbers that go in for a token
        self.width_out = 1 if config.binary else config.embedding or self.readout.size  # and that come out
        self.input = nn.Parameter(torch.empty(size, self.width, hidden[0]))
        self.hidden = nn.ParameterList(torch.empty(*sizes) for sizes in zip(hidden[1:], hidden, strict=False))
        self.output = nn.Parameter(torch.empty(size, self.width_out, hidden[-1]))
        sizes = [*hidden, size * self.width_out]
        self.biases: Any = nn.ModuleList(ClassBias(config.num_classes, units) for units in sizes)
        self.direct = nn.Parameter(torch.empty(size, self.width, size * self.width_out)) if config.direct else None
        if config.binary:  # -1 and 1 go in, and of z come the logits -z/2 and z/2
            self.register_buffer("embedding", torch.tensor([[-1.0], [1.0]]), persistent=False)
            self.register_buffer("head", torch.tensor([[-0.5], [0.5]]), persistent=False)
        else:
            self.embedding = nn.Parameter(torch.empty(vocab, self.width)) if config.embedding else None
            self.head = nn.Parameter(torch.empty(self.readout.size, self.width)) if config.embedding else None
        self.head_bias = nn.Parameter(torch.zeros(size, self.readout.size)) if config.embedding else None
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("ranks", torch.argsort(self.order), persistent=False)
        self.register_buffer("all_degrees", torch.cat(self.numbered_degrees(0)), persistent=False)
        self._connections = Connections()
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """He's variances (2015), for the half of the inputs that a unit sees on average."""
        active = len(self.grid) * (1 if self.embedding is None else self.width)  # a one-hot row counts once
        nn.init.normal_(self.input, std=(4 / active) ** 0.5)
        for weight in self.hidden:
            nn.init.normal_(weight, std=(4 / weight.shape[1]) ** 0.5)
        nn.init.normal_(self.output, std=(1 / self.output.shape[-1]) ** 0.5)
        if self.direct is not None:
            nn.init.normal_(self.direct, std=(1 / active) ** 0.5)
        if isinstance(self.embedding, nn.Parameter) and isinstance(self.head, nn.Parameter):
            nn.init.normal_(self.embedding)
            nn.init.normal_(self.head, std=self.width**-0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._connections = Connections()  # a move keeps the tensors, and changes what is in them
        return super()._apply(fn, recurse)

    def degrees(self) -> list[Tensor]:
        """The degrees `(units,)` of each hidden layer, ascending, unless `connected`: what all but training uses."""
        return list(degrees_of(self).split(self.config.hidden))

    @property
    def position_field(self) -> Tensor:
        """bool `(N, N)`, raster order: row i is True at the tokens that `logits[:, i]` sees."""
        if self.direct is not None:
            return super().position_field
        reach = torch.arange(len(self.grid), device=self.device)  # of what is predicted at each rank
        for degrees in self.degrees()[::-1]:
            below = torch.searchsorted(degrees, reach, right=True)
            reach = torch.where(below > 0, degrees[below - 1], 0)
        return self.ranks < reach[self.ranks][:, None]

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """A random order `(N,)` and random degrees, where the model is to be agnostic of them: new ones, or any of
        `masks` of each, which are those of a mixture of so many."""
        inputs: dict[str, Any] = {}
        if self.config.order_agnostic:
            inputs["order"] = sent(self._draw_order(), tokens.device)
        if self.config.connectivity_agnostic:
            inputs["degrees"] = [sent(each, tokens.device) for each in self._draw_degrees()]
        return inputs

    def _draw_order(self) -> Tensor:
        masks = self.config.masks
        if masks is None:
            return torch.randperm(len(self.grid), device="cpu")
        number = int(torch.randint(masks, ()))
        return make_order(f"random:{number}", self.grid.shape) if number else self.order

    def _draw_degrees(self) -> list[Tensor]:
        masks = self.config.masks
        if masks is None:
            return random_degrees(self.config.hidden, len(self.grid))
        return self.numbered_degrees(int(torch.randint(masks, ())))

    def numbered_degrees(self, number: int) -> list[Tensor]:
        """The degrees `(units,)` of each layer in connectivity `number`: the model's own, then random ones."""
        if not number:
            return [even_degrees(units, len(self.grid)) for units in self.config.hidden]
        return random_degrees(self.config.hidden, len(self.grid), torch.Generator().manual_seed(number))

    def connected(self, number: int) -> AbstractContextManager[None]:
        """Have the degrees of connectivity `number`, in this thread, while the block lasts; 0 leaves them."""
        if not number:
            return nullcontext()
        return chosen_degrees(self, torch.cat(self.numbered_degrees(number)).to(self.device))

    def outputs(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        order: Tensor | None = None,
        degrees: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """As in `Prior`.

        order: `(N,)`, None for the model's own, or `(B, N)`, which takes a pass per different order; degrees:
        `(units,)` of each hidden layer, in 1 .. N - 1.
        """
        labels = self.class_ids(labels, len(tokens))
        if order is not None and order.ndim == 2:
            return self._outputs_by_order(tokens, labels, order, degrees)
        first, *hidden, last = self._connections.weights(self, order, degrees)
        inputs = self._inputs(tokens.flatten(1))
        x = self._unit(self.biases[0](labels) + summed(inputs, first))
        direct = hidden.pop() if self.direct is not None else None
        for weight, bias in zip(hidden, self.biases[1:], strict=False):
            x = self._unit(torch.addmm(bias(labels), x, weight.t()))
        x = torch.addmm(self.biases[-1](labels), x, last.flatten(0, 1).t())
        if direct is not None:
            x = x + summed(inputs, direct)
        return self.read_out(x.unflatten(1, (-1, self.width_out)), self.head_bias)

    def _outputs_by_order(
        self, tokens: Tensor, labels: Tensor, order: Tensor, degrees: Sequence[Tensor] | None
    ) -> Tensor:
        """`outputs` for orders `(B, N)`: images of the same order share their masks."""
        distinct, which = torch.unique(order, dim=0, return_inverse=True)
        rows = [torch.nonzero(which == index)[:, 0] for index in range(len(distinct))]
        parts = [self.outputs(tokens[at], labels[at], one, degrees) for at, one in zip(rows, distinct, strict=True)]
        return torch.cat(parts)[torch.argsort(torch.cat(rows))]

    def loss(self, outputs: Tensor, tokens: Tensor, **inputs: Any) -> Tensor:
        """The mean negative log-likelihood in nats per token; of two ids by the sigmoid, which is faster."""
        if not self.config.binary:
            return super().loss(outputs, tokens, **inputs)
        zero, one = outputs.float().unbind(-1)
        return F.binary_cross_entropy_with_logits(one - zero, tokens.flatten(1).float())

    def _inputs(self, tokens: Tensor) -> Tensor:
        """What `summed` takes: embedded ids `(B, N, width)`, one-hot ones where there are few ids, else ids."""
        if self.embedding is not None:
            return F.embedding(tokens.long(), self.embedding)
        return F.one_hot(tokens.long(), self.width).to(self.input.dtype) if self.width <= DENSE_WIDTH else tokens.long()

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The hidden layers. Their units belong to no position: features are `(B, 1, units)`, and a unit of degree d
        sees the tokens of rank < d, in the model's own order."""
        return [self.dropout] * len(self.config.hidden)

    def _unit(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(x))

    def read_out(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What is put out of `x` (..., width_out): `x` itself, or by the table that all positions share."""
        logits = x if self.head is None else F.linear(x, self.head)
        return logits if bias is None else logits + bias

    def check_sampler(self, sampler: MADESampler) -> None:
        """As in `Prior`: other connectivities than its own are for a model that is made for them."""
        super().check_sampler(sampler)
        self.connectivities(sampler.num_masks)

    def draw(self, rows: Rows, sampler: MADESampler, walk: Walk, watch: Watch) -> Tensor:
        """As `Prior` does, each image in one of the connectivities, which its own generator draws."""
        numbers = self.connectivities(sampler.num_masks)
        if len(numbers) == 1:
            return super().draw(rows, sampler, walk, watch)
        walk = replace(walk, order=check_order(self, walk.order, len(rows)))
        chosen = [int(torch.randint(len(numbers), (), generator=g, device=g.device)) for g in rows.generators]
        drawn = torch.empty_like(rows.given)
        for number in sorted(set(chosen)):
            at = [row for row, one in enumerate(chosen) if one == number]
            with self.connected(number):
                drawn[at] = super().draw(rows[at], sampler, walk.of(at, len(rows)), watch)
        return drawn

    def make_cache(self, labels: Tensor, walk: Partition | None) -> Sums:
        """Running sums, to which each step adds a token, in the walk's order, or each image in its own."""
        return Sums(self, labels, self.order if walk is None else walk.order)
