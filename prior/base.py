"""The contract of stage two: an ordered partition of the grid and logits for every position, which define `log_prob`
and `sample`.

    p(tokens | condition) = prod_b prod_{i in block b} p(tokens[i] | tokens of the blocks before b, condition)

Blocks of one token give the chain rule; tokens within a larger block are independent by definition of the model and are
decoded in parallel. The base class implements slow, obviously correct algorithms. A model implements `forward` (or
`outputs`, which an output head maps to logits), and optionally `make_cache`, which computes the same logits block by
block at lower cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenizer.model import PretrainedModel
from tokenizer.precision import full_float32, in_finest

from .arguments import check_count, is_integer, to_tensor, whole_number
from .columns import LABEL, ClassColumn, Column, find_column
from .condition_encoder import ConditionEncoder, Encoded
from .config import PriorConfig
from .cuda_graph import release_graph
from .given import Given
from .heads import Head, PositionSteps, Softmax, make_head
from .mixture import mixture_log_prob, mixture_token_log_probs
from .noise import Generators
from .options import DecodingOptions, Order, SamplingOptions
from .orders import Partition, block_numbers, blocks_problem, known_first, make_order, make_partition
from .parallel import rows_per_pass, sample_parallel
from .sampling import (
    Monitor,
    OnStep,
    SampleBatch,
    UncachedState,
    choose_orders,
    equal_batches,
    make_batch,
    sample_blocks,
    show_progress,
)


class Prior(PretrainedModel, family="prior"):
    """A distribution over grids of ids. Gradients flow only through `forward`.

    N is the number of tokens, and P the number of positions that the network sees: P < N if an output head draws
    several ids per position. The methods share these arguments, and raise `ValueError` for values out of range:

    tokens: `(B, *grid.shape)` ids, in any form that torch converts to whole numbers.
    labels: `(B,)`, or one class for all images; `num_classes` is the null class, as is None.
    condition: values of columns by name, one for all images or one per image, or a `Given`; missing columns are null
    (see `prior.columns`). `Given.over` makes a density the mixture over the classes of one column.
    order: a name, raster indices `(N,)` or `(B, N)` (cut into the model's own blocks), or a `Partition`, if the model
    has `any_order`; None is the model's own order."""

    Sampling: ClassVar[type[SamplingOptions]] = SamplingOptions
    """The class of `sample`'s settings; a model may declare a subclass with more."""
    exact: bool = True
    """False if `log_prob` is an unbiased estimate of a lower bound, so that only its mean over images is a bound."""
    any_order: bool = False
    """Whether `forward`, `log_prob` and `sample` accept any `order`, not only the model's own."""
    any_connectivity: bool = False
    """Whether `connected` can select other connections for the same weights (MADE's masks)."""
    supports_cuda_graphs: bool = True
    """Whether cached decoding can be captured in a CUDA graph (no control flow on the host)."""

    order: Tensor  # (N,) int64; order[r] is the raster index of the r-th token
    blocks: tuple[int, ...]  # the sizes that cut `order` into blocks; they sum to N
    block_of: Tensor  # (N,) int64: the block number of each token, in raster order
    # The same of positions, `(P,)`, which equal those of tokens if a position has one id:
    position_order: Tensor
    position_blocks: tuple[int, ...]
    position_block_of: Tensor
    # Only set if positions have several ids:
    position_cells: Tensor  # (P, ids_per_position) int64: the raster indices of each position's ids
    token_places: Tensor  # (N,) int64: for each token in raster order, its index in the ids of all positions

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.grid, self.num_classes = config.grid, config.num_classes
        self._label = {LABEL: ClassColumn.numbered(config.num_classes)} if config.num_classes else {}
        self.output_head: Head = make_head(config)
        partition, several = config.partition(), self.output_head.ids_per_position
        order, self.blocks = partition
        self.position_blocks = partition.blocks
        if several > 1:  # of each block the first ids, then the second ids, and so on
            cells = self.grid.cells
            order = torch.cat([part.t().flatten() for part in cells[partition.order].split(partition.blocks)])
            self.blocks = tuple(size for size in partition.blocks for _ in range(several))
            self.register_buffer("position_cells", cells, persistent=False)
            self.register_buffer("token_places", cells.flatten().argsort(), persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("block_of", block_numbers(order, self.blocks), persistent=False)
        self.register_buffer("position_order", partition.order, persistent=False)
        self.register_buffer("position_block_of", block_numbers(*partition), persistent=False)
        self.condition_encoder = ConditionEncoder(config) if config.conditions else None

    def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        """Return the network's teacher-forced outputs `(B, P, output_head.size)`, in raster order; the outputs at
        position i depend only on tokens in earlier blocks. A model implements this or `forward`."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, encoded: Encoded | None = None, *order: Any, raw: bool = False, **inputs: Any
    ) -> Tensor:
        """Return teacher-forced logits `(B, N, vocab_size)`, in raster order; `logits[:, i]` depends only on tokens in
        earlier blocks.

        encoded: what is given, from `encode_given`; None means nothing. A model with `any_order` has a third argument,
        by default its own order: `order`, `(N,)` or `(B, N)`; or, if it supports blocks, `block_of`, the block number
        of each token in raster order, `(N,)` or `(B, N)`. raw: return `outputs`, the input of `loss_from_outputs`."""
        encoded = self.encode_nothing(len(tokens)) if encoded is None else encoded
        outputs = self.outputs(tokens, encoded, *order, **inputs)
        return outputs if raw else self.to_raster(self.output_head.logits(outputs, self.position_ids(tokens)))

    def forward_outputs(self, tokens: Tensor, encoded: Encoded, **inputs: Any) -> Tensor:
        """Compute the input of `loss_from_outputs`: the raw outputs, or the logits if the head is `Softmax`."""
        raw = {} if isinstance(self.output_head, Softmax) else {"raw": True}
        return self(tokens, encoded, **inputs, **raw)

    # What is given

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that images are conditioned on: `label`, if there are classes, and those of `conditions`."""
        return {**self._label, **self.config.conditions}

    def read_tokens(self, tokens: Any, labels: Any, condition: Any) -> tuple[Tensor, Given]:
        """Check tokens, move them to the model's device, and read what is given of their images."""
        tokens = to_tensor(tokens, self.device)
        self.grid.check(tokens)
        return tokens, self.read_given(labels, condition, len(tokens))

    def read_given(self, labels: Any, condition: Any, count: int) -> Given:
        null = self.num_classes
        if isinstance(labels, (list, tuple)):
            scalars = [one.item() if getattr(one, "ndim", None) == 0 else one for one in labels]
            labels = [None if type(one) is int and one == null else one for one in scalars]
        elif labels is not None:
            labels = to_tensor(labels)
            labels = torch.where(labels == null, -1, labels.long()) if is_integer(labels.dtype) else labels
            labels = None if not null and bool((labels == -1).all()) else labels
        return Given.read(self.columns, labels, condition, count=count, device=self.device)

    def encode_given(self, given: Given) -> Encoded:
        """Encode what is given, as `forward` receives it."""
        labels = torch.full((len(given),), self.num_classes, device=self.device)
        if LABEL in given.rows:
            labels = torch.where(given.rows[LABEL] < 0, self.num_classes, given.rows[LABEL])
        if self.condition_encoder is None:
            return Encoded(labels)
        return Encoded(labels, *self.condition_encoder(given))

    def encode_nothing(self, count: int) -> Encoded:
        return self.encode_given(Given(self.columns, {}, count))

    # Training

    def initialize(self, tokens: Tensor, given: Given) -> None:
        """Initialize from the whole training set; called once before training. By default, set the output layer of a
        softmax to zero, so that training begins with all ids equally likely."""
        head = getattr(self, "head", None)
        if isinstance(head, nn.Linear) and isinstance(self.output_head, Softmax):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """Draw further arguments of `forward` for a training step on `tokens`, such as orders or masks.

        Uses torch's global generator, which the training loop seeds by (seed, rank, step). progress: the completed
        fraction of training, in [0, 1]."""
        return {}

    def loss(
        self, tokens: Tensor, labels: Any = None, *, condition: Any = None, progress: float = 0.0, **inputs: Any
    ) -> Tensor:
        """Return the training loss, a scalar in nats per token, from one forward pass: the mean negative log-likelihood
        of `tokens` given `labels` and `condition`.

        inputs: further arguments of `forward`, by default drawn by `training_inputs`. The loss of a model that draws
        orders or masks is therefore random, and may depend on `progress`, the completed fraction of training."""
        tokens, given = self.read_tokens(tokens, labels, condition)
        inputs = inputs or self.training_inputs(tokens, progress)
        outputs = self.forward_outputs(tokens, self.encode_given(given), **inputs)
        return self.loss_from_outputs(outputs, tokens, **inputs)

    def loss_from_outputs(self, outputs: Tensor, tokens: Tensor, **inputs: Any) -> Tensor:
        """Return `loss`, given `forward_outputs` for `tokens` and `inputs`."""
        return self.output_head.mean_nats(outputs, self.position_ids(tokens))

    @property
    def loss_is_likelihood(self) -> bool:
        """Whether `loss` is the negative log-likelihood per token, or a bound on it."""
        return True

    # Likelihood

    @property
    def likelihood_passes(self) -> int:
        """Number of passes over the grid that `log_prob` needs per image."""
        return 1

    def likelihood_pass(self, tokens: Tensor) -> None:
        self.log_prob(tokens)

    def token_log_probs(
        self, tokens: Tensor, labels: Any = None, order: Order = None, *, condition: Any = None
    ) -> Tensor:
        """Return log p of each token given the blocks before its own, `(B, *grid.shape)` nats in float32 (float64 for
        float64 weights)."""
        tokens, given = self.read_tokens(tokens, labels, condition)
        if given.weights:
            return mixture_token_log_probs(self, tokens, given, order)
        return self.estimate_log_probs(tokens, given, order)

    def estimate_log_probs(self, tokens: Tensor, given: Given, order: Order) -> Tensor:
        """Compute `token_log_probs`: `chain_log_probs`, unless a model estimates a bound."""
        return self.chain_log_probs(tokens, given, order)

    @full_float32()
    def chain_log_probs(self, tokens: Tensor, given: Given, order: Order = None, known: Tensor | None = None) -> Tensor:
        """Return log p of each token of checked `tokens` given the blocks before its own, `(B, *grid.shape)` nats.

        known: bool `(B, N)`, in raster order; a model with `any_order` decodes these tokens first, as in `sample`."""
        partition = self.check_order(order, len(tokens))
        if known is not None and self.any_order:
            partition = partition or Partition(self.order, self.blocks)
            partition = Partition(known_first(partition.order, known), partition.blocks)
        inputs: dict[str, Any] = {} if partition is None else self.order_inputs(partition, known)
        outputs = self.forward_outputs(tokens, self.encode_given(given), **inputs)
        return self.to_raster(self.output_head.log_probs(outputs, self.position_ids(tokens))).reshape(tokens.shape)

    @full_float32()
    def hidden_log_probs(self, tokens: Tensor, known: Tensor, given: Given) -> Tensor:
        """Return log p of each token that is not known given those that are, `(B, *grid.shape)` nats; the values of
        known tokens have no meaning. known: bool `(B, N)`, as many in each row.

        A model that draws blocks predicts all hidden tokens at once; any other with `any_order` conditions each on the
        hidden tokens before it, too. Raises `ValueError` for a model with one order."""
        order, count = known_first(self.order, known), int(known[0].sum())
        parts = [count, known.shape[1] - count]
        partition = Partition(order, tuple(size for size in parts if size) if self.config.takes_blocks else self.blocks)
        return self.chain_log_probs(tokens, given, partition)

    def log_prob(
        self,
        tokens: Tensor,
        labels: Any = None,
        order: Order = None,
        num_orders: int = 1,
        num_masks: int = 1,
        *,
        condition: Any = None,
    ) -> Tensor:
        """Return log p(tokens | labels, condition), `(B,)` nats.

        num_orders, num_masks: with K orders and M masks, return the density of a mixture, log (1/KM) sum_km p(tokens |
        order_k, mask_m) (Germain et al. 2015, section 4.2). K > 1 adds K - 1 random orders to `order` (see `orders`),
        and requires `any_order`. M > 1 adds M - 1 random connectivities to the model's own (see `connected`), and
        requires `any_connectivity`."""
        orders, each = self.orders(num_orders, order), list[Tensor]()
        tokens, given = self.read_tokens(tokens, labels, condition)
        if given.weights:
            return mixture_log_prob(self, tokens, given, order, num_orders, num_masks)
        for number in self.connectivities(num_masks):
            with self.connected(number):
                each += [self.estimate_log_probs(tokens, given, one).flatten(1) for one in orders]
        members = torch.stack([in_finest(nats).sum(1) for nats in each])
        return (members.logsumexp(0) - math.log(len(each))).to(each[0].dtype)

    # Orders, and mixtures of them

    def to_partition(self, order: Order) -> Partition:
        """Convert `order` to a `Partition` on the model's device."""
        found: Any = make_partition(order, self.grid.shape) if isinstance(order, str) else order
        if not isinstance(found, Partition):
            found = Partition(self.order if found is None else found, self.blocks)
        blocks = tuple(whole_number("order: blocks", size) for size in found.blocks)
        return Partition(to_tensor(found.order, self.device), blocks)

    def check_order(self, order: Order, count: int) -> Partition | None:
        """Return `order`, int64 `(N,)` or `(count, N)`, and its blocks, or None for the model's own. Raises
        `ValueError` unless it is an ordered partition of this grid that the model supports."""
        is_own_name = isinstance(order, str) and order == self.config.order and self.config.blocks is None
        if order is None or (is_own_name and not self.any_order):  # the name may refer to positions or scales
            return None
        indices, blocks = self.to_partition(order)
        size = len(self.grid)
        fits = is_integer(indices.dtype) and tuple(indices.shape) in ((size,), (count, size))
        indices = indices.long() if fits else indices  # torch cannot sort uint16
        if not fits or not bool((indices.sort(-1).values == torch.arange(size, device=indices.device)).all()):
            raise ValueError(
                f"order should contain each of 0 to {size - 1} once, for all images or for each of {count}"
            )
        if problem := blocks_problem(blocks, size):
            raise ValueError(f"order: {problem}")
        if blocks == self.blocks and bool((indices == self.order).all()):
            return None
        if not self.any_order:
            raise ValueError(f"order: this {self.name} prior supports only its own order, {self.config.order!r}")
        if max(blocks) > 1 and not self.config.takes_blocks:
            raise ValueError(f"order: a {self.name} prior draws one token at a time and does not support blocks")
        return Partition(indices, blocks)

    def order_inputs(self, partition: Partition, known: Tensor | None = None) -> dict[str, Tensor]:
        """Return the arguments of `forward` for an order other than the model's own. known: tokens that come first,
        bool `(B, N)` in raster order; they form a single block if blocks hold several tokens."""
        if not self.config.takes_blocks:
            return {"order": partition.order}
        block_of = block_numbers(*partition)
        if known is not None and max(partition.blocks) > 1:
            block_of = block_of.masked_fill(known, -1)
        return {"block_of": block_of}

    def orders(self, num_orders: int, order: Order = None) -> list[Order]:
        """Return the orders of a mixture: `order`, then random:1, random:2, ... with the same blocks."""
        if check_count(num_orders, "num_orders") > 1 and not self.any_order:
            raise ValueError(f"num_orders: this {self.name} prior has one order")
        blocks = self.to_partition(order).blocks
        others = [make_order(f"random:{index}", self.grid.shape) for index in range(1, num_orders)]
        return [order, *(Partition(other, blocks) for other in others)]

    def connectivities(self, num_masks: int) -> range:
        """Return the numbers of a mixture's connectivities; 0 is the model's own."""
        if check_count(num_masks, "num_masks") > 1 and not self.any_connectivity:
            raise ValueError(f"num_masks: this {self.name} prior has one connectivity")
        return range(num_masks)

    def connected(self, number: int) -> AbstractContextManager[None]:
        """Use connectivity `number` inside the context."""
        return nullcontext()

    # Positions

    def position_ids(self, tokens: Tensor) -> Tensor:
        """Return the ids of each position, `(B, P, ids_per_position)`, of tokens `(B, ...)`."""
        flat = tokens.flatten(1).long()
        return flat[..., None] if self.output_head.ids_per_position == 1 else flat[:, self.position_cells]

    def position_id_map(self, tokens: Tensor) -> Tensor:
        """Return `position_ids` on the grid, `(B, *positions.shape, ids_per_position)`."""
        return self.position_ids(tokens).unflatten(1, self.config.positions.shape)

    def to_raster(self, values: Tensor) -> Tensor:
        """Return values of each position's ids, `(B, P, ids_per_position, ...)`, as `(B, N, ...)` in raster order."""
        flat = values.flatten(1, 2)
        return flat if self.output_head.ids_per_position == 1 else flat[:, self.token_places]

    @property
    def receptive_field(self) -> Tensor:
        """bool `(N, N)`, in raster order: row i marks the tokens on which `logits[:, i]` depends in the model's own
        order, namely all ids of the positions in `position_field` and the earlier ids of the same position."""
        field, several = self.position_field, self.output_head.ids_per_position
        if several == 1:
            return field
        own = torch.eye(len(field), dtype=torch.bool, device=field.device)[:, None, :, None]
        earlier = torch.ones(several, several, dtype=torch.bool, device=field.device).tril(-1)[:, None]
        places = self.token_places.to(field.device)
        return (field[:, None, :, None] | own & earlier).flatten(0, 1).flatten(1, 2)[places[:, None], places]

    @property
    def position_field(self) -> Tensor:
        """bool `(P, P)`, in raster order: row i marks the positions seen at i, by default those of earlier blocks."""
        return self.position_block_of < self.position_block_of[:, None]

    def sees_all_known(self, known: Tensor) -> Tensor:
        """Return whether hidden tokens are drawn from the exact conditional given all `known` tokens, bool `(B,)`.

        known: bool `(B, N)`, in raster order. Always True for an any-order prior. For a prior with one order it is True
        if no known token depends on a hidden one: then p(known) is the product of the known tokens' factors, and
        p(hidden | known) is the product of the others."""
        if self.any_order:
            return known.new_ones(len(known))
        hidden_seen = (~known).float() @ self.receptive_field.to(known.device).float().t()
        return ~(known & (hidden_seen > 0)).any(1)

    # Features

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The modules whose outputs `features` returns, in the order of calls; a module that is called twice is listed
        twice. Empty for a model without features."""
        return []

    @property
    def feature_layers(self) -> int:
        return len(self.feature_modules)

    def arrange_features(self, output: Any) -> Tensor:
        """Reshape the output of one of `feature_modules` to `(B, N, dim)`, in raster order. By default the output is a
        channels-last map or sequence in this order, or `(B, dim)` for the whole grid, which becomes `(B, 1, dim)`."""
        return output.flatten(1, -2) if output.ndim > 2 else output[:, None]

    def features(
        self, tokens: Tensor, labels: Any = None, layer: int | None = None, *, condition: Any = None
    ) -> Tensor:
        """Return activations after a layer in the teacher-forced pass, `(B, N, dim)` in raster order.

        Like `logits[:, i]`, the features at i depend only on tokens of earlier blocks (in early layers, on fewer than
        `receptive_field` marks). Models that differ document it. layer: 0 to `feature_layers` - 1; None selects the
        middle layer."""
        layer = self.feature_layers // 2 if layer is None else layer
        return self.layer_features(*self.read_tokens(tokens, labels, condition), [layer])[0]

    @full_float32()
    def layer_features(self, tokens: Tensor, given: Given, layers: Sequence[int], **inputs: Any) -> list[Tensor]:
        """Return `features` of each of `layers`, from one pass. inputs: further arguments of `forward`."""
        modules, calls = self.feature_modules, list[Tensor | None]()
        for layer in layers:
            if not modules:
                raise ValueError(f"layer: a {self.name} prior has no layers, hence no features")
            if type(layer) is not int or not 0 <= layer < len(modules):
                last = len(modules) - 1
                raise ValueError(f"layer must be a whole number from 0 to {last} of this {self.name} (got {layer!r})")

        def store(module: nn.Module, args: Any, output: Any) -> None:
            calls.append(self.arrange_features(output) if len(calls) in layers else None)

        hooks = [module.register_forward_hook(store) for module in dict.fromkeys(modules)]
        try:
            self._call_impl(tokens, self.encode_given(given), **inputs)  # a compiled pass ignores hooks
        finally:
            for hook in hooks:
                hook.remove()
        return [output for layer in layers if (output := calls[layer]) is not None]

    # Decoding, one block a step

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        release_graph()  # the graph reads weights at their old addresses
        return super()._apply(fn, recurse)

    def start(self, encoded: Encoded, order: Order = None, *, cache: bool = True) -> Any:
        """Start decoding the rows of `encoded`; return the state that `next_logits` advances. order: must come from
        `check_order`, because a check syncs with the GPU, which a CUDA graph cannot capture. cache: False recomputes
        the whole grid at each step, which is correct by construction."""
        partition = None if order is None else self.to_partition(order)
        with torch.no_grad():
            state = self.make_cache(encoded, partition) if cache else None
        if state is None:
            inputs = {} if partition is None else self.order_inputs(partition)
            tokens = torch.zeros(len(encoded), len(self.grid), dtype=torch.long, device=self.device)
            return UncachedState(self, tokens, encoded, *self.to_partition(partition), inputs)
        if isinstance(self.output_head, Softmax) or isinstance(state, UncachedState):
            return state
        return PositionSteps(self.output_head, state, self.config.takes_blocks)

    def next_logits(self, state: Any, tokens: Tensor | None) -> Tensor:
        """Return logits `(B, n, vocab_size)` of the next block, in order, given the `tokens` `(B, m)` of the last
        block; None at the first block."""
        if self.config.takes_blocks or isinstance(state, (UncachedState, PositionSteps)):
            return state.step(tokens)
        return state.step(None if tokens is None else tokens[:, 0]).unsqueeze(1)

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Any:
        """Create the cache of a model's fast path, for what is given and a partition (None means the model's own). The
        cache's `step` maps the ids of the last positions to the outputs at the next ones (see `PositionSteps`); without
        a head it maps `(B,)` ids to logits `(B, vocab_size)`. Returns None (the default) if there is no fast path."""
        return None

    # Sampling

    @classmethod
    def make_sampling_options(cls, **settings: Any) -> SamplingOptions:
        """Build the `Sampling` options. Raises `TypeError` for a setting that this kind does not support, and
        `ValueError` for a value out of range."""
        if unknown := sorted(set(settings) - set(cls.Sampling.names())):
            raise TypeError(f"sampling from a {cls.name!r} prior has no setting {unknown[0]!r}")
        return cls.Sampling(**settings)

    def check_sampling_options(self, options: Any) -> None:
        """Raise `ValueError` for settings that this prior does not support."""
        options.check(self.grid)
        for name in options.guidance_on or ():
            find_column(self.columns, name, "guidance_on")

    def sample(
        self,
        num_images: int,
        labels: Any = None,
        *,
        condition: Any = None,
        sampling: SamplingOptions | None = None,
        decoding: DecodingOptions | None = None,
        generator: Generators = None,
        tokens: Tensor | None = None,
        known: Tensor | None = None,
        batch_size: int | None = None,
        progress: bool | Mapping[str, Any] = False,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw tokens `(num_images, *grid.shape)`, one block of the order at a time.

        sampling, decoding: an instance of this prior's `Sampling`, and `DecodingOptions`; or, in their place, settings:
        their fields (`temperature`, `top_k`, `guidance_scale`, `order`, `parallel`, ...). generator: one generator, or
        a list with one per image; image k depends on the key drawn from its generator, not on its batch. batch_size:
        images drawn at a time, None for all. progress: True shows a bar; a mapping holds arguments of `tqdm`. on_step:
        called with a `SamplingStep` after each step; an exception ends sampling.

        tokens, known: the result equals `tokens` where bool `known` (`grid.shape` or `(B, *grid.shape)`) is True. A
        model with `any_order` decodes known tokens first, so all other tokens are conditioned on them, and keeps the
        remaining block boundaries; other models condition a token only on known tokens of earlier blocks.

        All modes and batch sizes give the same tokens unless two candidates tie within rounding. Raises `TypeError` for
        a setting that this prior does not support."""
        given = self.read_given(labels, condition, check_count(num_images))
        of_decoding = {each.name: settings.pop(each.name) for each in fields(DecodingOptions) if each.name in settings}
        for options, others in ((sampling, settings), (decoding, of_decoding)):
            if options is not None and others:
                raise TypeError(f"give {next(iter(others))} or {type(options).__name__}, not both")
        sampling = sampling or self.make_sampling_options(**settings)
        if not isinstance(sampling, self.Sampling):
            expected = self.Sampling.__name__
            raise TypeError(f"sampling: a {self.name} prior takes {expected} (got {type(sampling).__name__})")
        decoding, parts = decoding or DecodingOptions(**of_decoding), equal_batches(len(given), batch_size)
        with torch.inference_mode(), evaluation_mode(self):
            batch = make_batch(self, given, sampling, generator, tokens, known)
            monitor = Monitor(progress if len(parts) == 1 else False, on_step, batch, self.grid)
            for rows in show_progress(parts, progress if len(parts) > 1 else False, unit="batch"):
                self.draw(batch[rows], sampling, decoding.select(rows, len(given)), monitor)
        return monitor.tokens.reshape(num_images, *self.grid.shape).clone()  # a normal tensor, for training

    def draw(self, batch: SampleBatch, options: Any, decoding: DecodingOptions, monitor: Monitor) -> None:
        """Draw the images of a checked request, given in raster order; `monitor` collects their tokens."""
        batch = batch.in_order(choose_orders(self, decoding, batch), self)
        rows = rows_per_pass(self.grid, self.device) if decoding.parallel else self.rows_at_once()
        at_once = len(batch) if rows is None else max(1, rows // options.rows_per_image)
        for group in batch.group_by_blocks():
            for part in group.split(at_once):
                if decoding.parallel:
                    sample_parallel(self, part, options, monitor)
                else:
                    sample_blocks(self, part, options, decoding.cache, monitor)

    def rows_at_once(self) -> int | None:
        """Return how many rows to sample together; None samples all at once."""
        return None


@contextmanager
def evaluation_mode(model: PretrainedModel) -> Iterator[None]:
    """Run a model in eval mode, in full float32 precision and without autocast; afterwards restore each module's mode.

    cuDNN attention is disabled: it re-plans (tens of milliseconds) each time the number of keys grows."""
    in_training = [module for module in model.modules() if module.training]
    uses_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    model.eval()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with full_float32(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
        for module in in_training:
            module.training = True


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """Move `x` to `device`; copy from the CPU to a GPU asynchronously, through pinned memory."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)
