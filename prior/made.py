"""A masked autoencoder: a perceptron whose connections are masked so that each output sees only earlier inputs.

MADE (Germain et al. 2015). With two ids, a token is one input number and one output logit; with more ids, one-hot rows
and a softmax are used. Every hidden unit has a degree d in 1 .. N - 1: it sees tokens of rank < d, and the output at
rank r sees units of degree <= r. The same weights work with the masks of any degrees and any order. Order- and
connectivity-agnostic training and test-time ensembles draw from these masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Prior, to_device_async
from .condition_encoder import ColumnProjection, Encoded
from .config import PriorConfig
from .noise import MASK_NOISE, draw_numbers
from .options import DecodingOptions, SamplingOptions
from .orders import Partition, make_order
from .sampling import Monitor, SampleBatch

DENSE_WIDTH = 32  # up to this many ids, multiplying one-hot rows is faster than adding rows of weights
MAX_DIRECT = 1 << 28  # weights of the direct connections


class MADEConfig(PriorConfig):
    takes_heads = takes_conditions = True

    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (512,), min_length=1, description="units of each hidden layer"
    )
    direct: bool = Field(False, description="also connect every token directly to all later positions")
    embedding: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="embedding width of ids, before the first layer and after the last; null: separate weights for "
        "each position and id",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the hidden units")
    order_agnostic: bool = Field(False, description="train with a new random order at every step")
    connectivity_agnostic: bool = Field(False, description="train with new random hidden-unit degrees at every step")
    masks: int | None = Field(
        None, ge=1, le=1 << 20, description="number of orders and degrees to train with; null: new ones at every step"
    )
    sigmoid: bool = Field(True, description="with two ids, use one logit per token; false: one-hot rows and a softmax")

    @property
    def binary(self) -> bool:
        """Whether a token is one number and its prediction one logit."""
        return self.sigmoid and self.grid.vocab_size == 2 and self.embedding is None

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.masks and not (self.order_agnostic or self.connectivity_agnostic):
            yield "masks: needs order_agnostic or connectivity_agnostic"
        outputs = len(self.grid) * (1 if self.binary else self.embedding or self.grid.vocab_size)
        if self.direct and outputs**2 > MAX_DIRECT:
            yield f"direct: needs {outputs}^2 weights; set a smaller embedding"


@dataclass(frozen=True)
class MADEOptions(SamplingOptions):
    """num_masks: as for `log_prob`; each image is drawn with one of this many connectivities, all equally likely even
    if tokens are known. Unlike with `num_orders`, completions therefore do not follow the mixture's conditional."""

    num_masks: int = 1


class ClassBias(nn.Module):
    """A bias for each class (the last is the null class), plus a projection of encoded columns: `(B, size)`, or
    `(size,)` without classes and columns. With `positions`, the bias belongs to as many positions, each of which has
    the same projection of its own vector; otherwise the image's vector is projected."""

    def __init__(self, config: PriorConfig, size: int, positions: int | None = None) -> None:
        super().__init__()
        self.shared, self.positions = nn.Parameter(torch.zeros(size)), positions
        self.own = nn.Parameter(torch.zeros(config.num_classes + 1, size)) if config.num_classes else None
        self.columns = ColumnProjection(config, size // (positions or 1)) if config.conditions else None

    def forward(self, encoded: Encoded) -> Tensor:
        # A copy, because torch's FLOP counter fails for modules that return a parameter.
        bias = self.shared.clone() if self.own is None else self.shared + F.embedding(encoded.labels, self.own)
        if self.columns is None:
            return bias
        if self.positions is None:
            return bias + self.columns(encoded.vector)
        return bias + self.columns(encoded.positions).expand(-1, self.positions, -1).flatten(1)


class MADE(Prior, name="made"):
    """Masked hidden layers that map all tokens to all logits at once, with running sums for sampling.

    A masked input (zero) differs from every id (-1 and 1 for two ids, else one row of weights per id); the paper
    instead conditions on the connectivity. Every position sees all earlier tokens, unless there are no direct
    connections and a hidden layer is too narrow for all degrees: see `receptive_field`."""

    Config = MADEConfig
    Sampling = MADEOptions
    supports_cuda_graphs = False  # the host decides which units are complete; a step takes about six kernels
    ranks: Tensor
    all_degrees: Tensor
    embedding: Tensor | None
    head: Tensor | None

    def __init__(self, config: MADEConfig) -> None:
        super().__init__(config)
        size, vocab, hidden = len(config.grid), config.grid.vocab_size, config.hidden
        self.any_order, self.any_connectivity = config.order_agnostic, config.connectivity_agnostic
        self.width = 1 if config.binary else config.embedding or vocab  # numbers per token at the input
        self.width_out = 1 if config.binary else config.embedding or self.output_head.size  # and at the output
        self.input = nn.Parameter(torch.empty(size, self.width, hidden[0]))
        self.hidden = nn.ParameterList(torch.empty(*sizes) for sizes in zip(hidden[1:], hidden, strict=False))
        self.output = nn.Parameter(torch.empty(size, self.width_out, hidden[-1]))
        outputs = ClassBias(config, size * self.width_out, positions=size)
        self.biases: Any = nn.ModuleList([*(ClassBias(config, units) for units in hidden), outputs])
        self.direct = nn.Parameter(torch.empty(size, self.width, size * self.width_out)) if config.direct else None
        if config.binary:  # inputs are -1 and 1, and z maps to the logits -z/2 and z/2
            self.register_buffer("embedding", torch.tensor([[-1.0], [1.0]]), persistent=False)
            self.register_buffer("head", torch.tensor([[-0.5], [0.5]]), persistent=False)
        else:
            self.embedding = nn.Parameter(torch.empty(vocab, self.width)) if config.embedding else None
            self.head = nn.Parameter(torch.empty(self.output_head.size, self.width)) if config.embedding else None
        self.head_bias = nn.Parameter(torch.zeros(size, self.output_head.size)) if config.embedding else None
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("ranks", torch.argsort(self.order), persistent=False)
        self.register_buffer("all_degrees", torch.cat(self.numbered_degrees(0)), persistent=False)
        self.chosen_degrees: Tensor | None = None  # set by `connected`
        self._masks: tuple[list[Tensor], list[Tensor]] = [], []  # what the last masks were made of, and these
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Use He's variances (2015), given that a unit sees half of its inputs on average."""
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

    @property
    def current_degrees(self) -> Tensor:
        """The degrees of all hidden layers: the model's own, ascending, or those of `connected`."""
        return self.all_degrees if self.chosen_degrees is None else self.chosen_degrees

    def degrees(self) -> list[Tensor]:
        return list(self.current_degrees.split(self.config.hidden))  # (units,) of each layer

    @property
    def position_field(self) -> Tensor:
        if self.direct is not None:
            return super().position_field
        reach = torch.arange(len(self.grid), device=self.device)  # of the output at each rank
        for degrees in self.degrees()[::-1]:
            below = torch.searchsorted(degrees, reach, right=True)
            reach = torch.where(below > 0, degrees[below - 1], 0)
        return self.ranks < reach[self.ranks][:, None]

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """Draw what training is agnostic to, an order `(N,)` and degrees: new ones, or some of the first `masks`."""
        inputs: dict[str, Any] = {}
        masks, size = self.config.masks, len(self.grid)
        if self.config.order_agnostic:
            if masks is None:
                order = torch.randperm(size, device="cpu")
            else:
                number = int(torch.randint(masks, ()))
                order = make_order(f"random:{number}", self.grid.shape) if number else self.order
            inputs["order"] = to_device_async(order, tokens.device)
        if self.config.connectivity_agnostic:
            if masks is None:
                degrees = random_degrees(self.config.hidden, size)
            else:
                degrees = self.numbered_degrees(int(torch.randint(masks, ())))
            inputs["degrees"] = [to_device_async(each, tokens.device) for each in degrees]
        return inputs

    def numbered_degrees(self, number: int) -> list[Tensor]:
        """Return the degrees `(units,)` of each layer in connectivity `number`; 0 is the model's own."""
        if not number:
            return [even_degrees(units, len(self.grid)) for units in self.config.hidden]
        return random_degrees(self.config.hidden, len(self.grid), torch.Generator().manual_seed(number))

    @contextmanager
    def connected(self, number: int) -> Iterator[None]:
        """Use the degrees of connectivity `number` inside the context."""
        before = self.chosen_degrees
        self.chosen_degrees = torch.cat(self.numbered_degrees(number)).to(self.device) if number else None
        try:
            yield
        finally:
            self.chosen_degrees = before

    def outputs(
        self, tokens: Tensor, encoded: Encoded, order: Tensor | None = None, degrees: Sequence[Tensor] | None = None
    ) -> Tensor:
        """See `Prior.outputs`. order: `(N,)`, or `(B, N)`, which takes one pass per distinct order; None means the
        model's own. degrees: `(units,)` for each hidden layer, in 1 .. N - 1."""
        if order is not None and order.ndim == 2:
            return self._outputs_by_order(tokens, encoded, order, degrees)
        first, *hidden, last = self._masked_weights(order, degrees)
        inputs = self._inputs(tokens.flatten(1))
        x = self.dropout(F.relu(self.biases[0](encoded) + sum_inputs(inputs, first)))
        direct = hidden.pop() if self.direct is not None else None
        for weight, bias in zip(hidden, self.biases[1:], strict=False):
            x = self.dropout(F.relu(torch.addmm(bias(encoded), x, weight.t())))
        x = torch.addmm(self.biases[-1](encoded), x, last.flatten(0, 1).t())
        if direct is not None:
            x = x + sum_inputs(inputs, direct)
        return self.to_outputs(x.unflatten(1, (-1, self.width_out)), self.head_bias)

    def _masked_weights(self, order: Tensor | None, degrees: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the masked weights of input, hidden layers, direct connections (if any) and output."""
        direct = [] if self.direct is None else [self.direct]
        weights, dtype = [self.input, *self.hidden, *direct, self.output], self.input.dtype
        chosen = [self.order if order is None else order, *(degrees or [self.current_degrees])]
        last, masks = self._masks
        if list(map(id, last)) != list(map(id, chosen)) or masks[0].dtype != dtype:
            ranks, outputs = self.ranks if order is None else torch.argsort(order), self.width_out if direct else None
            masks = build_masks(ranks, degrees or self.degrees(), outputs, dtype)
            self._masks = chosen, masks
        return [weight * mask for weight, mask in zip(weights, masks, strict=True)]

    def _outputs_by_order(
        self, tokens: Tensor, encoded: Encoded, order: Tensor, degrees: Sequence[Tensor] | None
    ) -> Tensor:
        """Return `outputs` for orders `(B, N)`; images with the same order share masks."""
        distinct, which = torch.unique(order, dim=0, return_inverse=True)
        rows = [torch.nonzero(which == index)[:, 0] for index in range(len(distinct))]
        parts = [self.outputs(tokens[at], encoded[at], one, degrees) for at, one in zip(rows, distinct, strict=True)]
        return torch.cat(parts)[torch.argsort(torch.cat(rows))]

    def loss_from_outputs(self, outputs: Tensor, tokens: Tensor, **inputs: Any) -> Tensor:
        if not self.config.binary:  # for which the sigmoid is faster
            return super().loss_from_outputs(outputs, tokens, **inputs)
        zero, one = outputs.float().unbind(-1)
        return F.binary_cross_entropy_with_logits(one - zero, tokens.flatten(1).float())

    def _inputs(self, tokens: Tensor) -> Tensor:
        """Return the input of `sum_inputs`: embedded ids `(B, N, width)`, one-hot ids if they are few, else ids."""
        if self.embedding is not None:
            return F.embedding(tokens.long(), self.embedding)
        return F.one_hot(tokens.long(), self.width).to(self.input.dtype) if self.width <= DENSE_WIDTH else tokens.long()

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The hidden layers. Units have no position, so features are `(B, 1, units)`; a unit of degree d sees tokens of
        rank < d in the model's own order."""
        return [self.dropout] * len(self.config.hidden)

    def to_outputs(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map `x` (..., width_out) to the outputs, by the output embedding if there is one."""
        logits = x if self.head is None else F.linear(x, self.head)
        return logits if bias is None else logits + bias

    def check_sampling_options(self, options: MADEOptions) -> None:
        super().check_sampling_options(options)
        self.connectivities(options.num_masks)

    def draw(self, batch: SampleBatch, options: MADEOptions, decoding: DecodingOptions, monitor: Monitor) -> None:
        """Draw each image with one connectivity, chosen by its key."""
        if options.num_masks == 1:
            return super().draw(batch, options, decoding, monitor)
        chosen = draw_numbers(batch.keys, MASK_NOISE, options.num_masks)
        for number in chosen.unique().tolist():
            at = torch.nonzero(chosen == number)[:, 0]
            with self.connected(number):
                super().draw(batch[at], options, decoding.select(at.tolist(), len(batch)), monitor)

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> RunningSums:
        return RunningSums(self, encoded, self.order if partition is None else partition.order)


# Masks


def even_degrees(units: int, num_tokens: int) -> Tensor:
    """Return ascending degrees `(units,)`, each of 1 .. N - 1 equally often; the last unit has N - 1."""
    steps = torch.arange(1, units + 1, device="cpu") * (num_tokens - 1)
    return ((steps + units - 1) // units).clamp(min=1)


def random_degrees(hidden: Sequence[int], num_tokens: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Draw uniform degrees of each layer, from the last layer's smallest on: every unit sees some unit."""
    degrees, smallest = [], 1
    for units in hidden:
        degrees.append(torch.randint(smallest, max(2, num_tokens), (units,), generator=generator, device="cpu"))
        smallest = int(degrees[-1].min())
    return degrees


@torch.inference_mode(False)
@torch.no_grad()
def build_masks(ranks: Tensor, degrees: Sequence[Tensor], direct: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Return the masks of the weights of input, hidden layers, direct connections (if any) and output: 1 where a
    connection is allowed, else 0; masks have the weights' type, which is fastest.

    ranks: the rank of each raster index, `(N,)`; direct: number of outputs per token of direct connections, or None."""
    seen = ranks[:, None]
    masks = [(seen < degrees[0])[:, None]]
    masks += [below <= own[:, None] for below, own in zip(degrees, degrees[1:], strict=False)]
    if direct is not None:
        masks.append((seen < ranks.repeat_interleave(direct))[:, None])
    masks.append((degrees[-1] <= seen)[:, None])
    return [mask.to(dtype) for mask in masks]


# Decoding


def sum_inputs(inputs: Tensor, weight: Tensor) -> Tensor:
    """Sum the inputs of units over all positions: `(B, U)`.

    inputs: features `(B, N, width)`, or ids `(B, N)`, which represent one-hot features; weight: `(N, width, U)`."""
    if inputs.is_floating_point():
        return inputs.flatten(1) @ weight.flatten(0, 1)
    first_rows = torch.arange(len(weight), device=weight.device) * weight.shape[1]
    return F.embedding_bag(inputs + first_rows, weight.flatten(0, 1), mode="sum")


class RunningSums:
    """The first layer's sums over the tokens so far, and the units that have received all of their tokens.

    Units are sorted by degree, so all masks are prefixes: the token of rank r is added to units of degree > r, which
    completes the units of degree r + 1, and the next position reads all complete units. Each unmasked weight is used
    once, and masked weights never."""

    def __init__(self, model: Any, encoded: Encoded, order: Tensor) -> None:
        """model: a `MADE`; order: `(N,)`, or `(B, N)` for per-image orders."""
        self.model = model
        self.rank = 0
        # The position at each rank, of all images or of each.
        self.order = order.tolist() if order.ndim == 1 else order.t()
        ranks = torch.arange(len(model.grid), device="cpu")
        degrees = [each.cpu().sort(stable=True) for each in model.degrees()]
        units = [each.indices for each in degrees]
        finished = [torch.searchsorted(each.values, ranks, right=True) for each in degrees]
        self.ends = [each.tolist() for each in finished]  # number of complete units of each layer at each rank
        self.input = select_units(model.input, -1, units[0])
        self.output = select_units(model.output, -1, units[-1])
        layers_below = zip(model.hidden, units, units[1:], strict=False)
        self.hidden = [select_units(select_units(weight, 0, own), 1, below) for weight, below, own in layers_below]
        *layers, outputs = [bias(encoded).expand(len(encoded), -1).clone() for bias in model.biases]
        # Sums, which become activations.
        self.layers = [select_units(sums, 1, own) for sums, own in zip(layers, units, strict=True)]
        self.outputs = outputs.unflatten(1, (-1, model.width_out))
        self.images = torch.arange(len(encoded), device=encoded.device)

    def step(self, token: Tensor | None) -> Tensor:
        model, rank, layers = self.model, self.rank, self.layers
        if token is not None:
            self._add(token, self.order[rank - 1])
            self._finish(rank)
        at, end = self.order[rank], self.ends[-1][rank]
        outputs = self.outputs[slice(None) if isinstance(at, int) else self.images, at]
        outputs = outputs + multiply(layers[-1][:, :end], at_position(self.output[..., :end], at).mT)
        self.rank += 1
        return model.to_outputs(outputs, None if model.head_bias is None else model.head_bias[at])

    def _add(self, token: Tensor, at: Any) -> None:
        model, begin = self.model, self.ends[0][self.rank - 1]
        weights = [(self.layers[0][:, begin:], self.input[..., begin:])]
        if model.direct is not None:
            weights.append((self.outputs.flatten(1), model.direct))
        for sums, weight in weights:
            if model.embedding is None:
                sums += weight.flatten(0, 1).index_select(0, at * model.width + token)
            else:
                sums += multiply(model.embedding.index_select(0, token), at_position(weight, at))

    def _finish(self, rank: int) -> None:
        for depth, (layer, ends) in enumerate(zip(self.layers, self.ends, strict=True)):
            begin, end = ends[rank - 1], ends[rank]
            if begin == end:
                continue
            if depth:
                below = self.ends[depth - 1][rank]
                weight = self.hidden[depth - 1][begin:end, :below]
                layer[:, begin:end].add_(multiply(self.layers[depth - 1][:, :below], weight.t()))
            layer[:, begin:end].relu_()


def select_units(weight: Tensor, axis: int, units: Tensor) -> Tensor:
    """Reorder `units` of `weight` along `axis`, without a copy if they are already in order."""
    return weight if bool((units.diff() > 0).all()) else weight.index_select(axis, units.to(weight.device))


def at_position(weight: Tensor, at: int | Tensor) -> Tensor:
    """Return the weights `(...)` of one position, or `(B, ...)` of per-image positions."""
    return weight[at] if isinstance(at, int) else weight.index_select(0, at)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply `x` (B, in) by `weight`, (in, out) for all rows or (B, in, out) for each."""
    return torch.bmm(x[:, None], weight)[:, 0] if weight.ndim == 3 else x @ weight
