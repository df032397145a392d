"""Sampling: the images of a request, and the loop that draws one block of tokens after another.

A token is a function of its logits and of its image's noise (`prior.noise`), so all ways of computing the same logits
draw the same tokens, unless two candidates tie within rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tokenizer.base import TokenGrid
from tokenizer.precision import at_least_float32, in_finest

from .arguments import check_count, is_integer, to_tensor
from .condition_encoder import Encoded
from .cuda_graph import Graph, compute_by_graph
from .given import Given
from .noise import ORDER_NOISE, Generators, TokenNoise, draw_keys, gumbel_noise
from .options import DecodingOptions, SamplingOptions
from .orders import Partition, blocks_after_known, known_first

if TYPE_CHECKING:
    from .base import Prior

T = TypeVar("T")

# A batch


@dataclass
class SampleBatch:
    """Images to draw, one per row: what is `given`, noise keys `(B,)`, and tokens to keep where bool `known` is True.
    `tokens` and `known` are `(B, N)` in the sequence of `order`, `(N,)` or `(B, N)`, which `blocks` cut. rows: indices
    of these images in the request; own_order: whether order and blocks are the model's; places: the number of each
    token's noise, `(B, N)` in the same sequence, if it is not its rank."""

    given: Given
    keys: Tensor
    tokens: Tensor
    known: Tensor
    order: Tensor
    blocks: tuple[int, ...]
    rows: Tensor
    own_order: bool = True
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, at: slice | Tensor) -> SampleBatch:
        return replace(
            self,
            given=self.given[at],
            keys=self.keys[at],
            tokens=self.tokens[at],
            known=self.known[at],
            order=self.order if self.order.ndim == 1 else self.order[at],
            rows=self.rows[at],
            places=None if self.places is None else self.places[at],
        )

    def in_order(self, partition: Partition | None, prior: Prior) -> SampleBatch:
        """Rearrange a batch from raster order to the order and blocks of `partition`; None selects the model's own."""
        order, blocks = (prior.order, prior.blocks) if partition is None else partition
        wide = order.expand(self.tokens.shape)
        tokens, known = self.tokens.gather(1, wide), self.known.gather(1, wide)
        places, own = None if self.places is None else self.places.gather(1, wide), partition is None
        return replace(self, tokens=tokens, known=known, order=order, blocks=blocks, own_order=own, places=places)

    def noise(self, grid: TokenGrid) -> TokenNoise:
        return TokenNoise(self.keys, len(grid), grid.vocab_size, self.places)

    def to_raster(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).scatter_(1, self.order.expand(values.shape), values)

    def partition(self, options: SamplingOptions) -> Partition | None:
        """Return order and blocks of all rows, unconditional ones among them; None for the model's own."""
        order = self.order if self.order.ndim == 1 else options.with_unconditional(self.order)
        return None if self.own_order else Partition(order, self.blocks)

    def group_by_blocks(self) -> Iterator[SampleBatch]:
        """Yield groups of images with equal blocks. If known tokens come first, they form a single block, so images
        with equally many known tokens form a group; otherwise there is one group."""
        if max(self.blocks) == 1 or self.own_order or not bool(self.known.any()):
            yield self
            return
        counts = self.known.sum(1)
        for count in counts.unique().tolist():
            group = self[torch.nonzero(counts == count)[:, 0]]
            yield replace(group, blocks=blocks_after_known(self.blocks, count))

    def split(self, size: int) -> Iterator[SampleBatch]:
        for start in range(0, len(self), size):
            yield self[start : start + size]


def make_batch(
    prior: Prior,
    given: Given,
    options: SamplingOptions,
    generator: Generators,
    tokens: Tensor | None,
    known: Tensor | None,
) -> SampleBatch:
    """Check a request and return its images in raster order. Raises `ValueError` for arguments out of range."""
    count = len(given)
    prior.check_sampling_options(options)
    options.check_guidance(given.names)
    tokens, known = check_known(prior, tokens, known, count)
    raster, rows = torch.arange(len(prior.grid), device=prior.device), torch.arange(count, device=prior.device)
    keys = draw_keys(generator, count).to(prior.device)
    return SampleBatch(given, keys, tokens, known, raster, prior.blocks, rows)


def encode_rows(prior: Prior, batch: SampleBatch, options: SamplingOptions) -> Encoded:
    """Encode what is given of each image and, with guidance, of as many rows without what guidance removes."""
    given, removed = batch.given, options.guidance_on
    encoded = prior.encode_given(given)
    if not options.guides:
        return encoded
    if removed is None:  # all unconditional rows are equal, so one is encoded
        return encoded.join(prior.encode_given(given[:1].without())[torch.zeros_like(encoded.labels)])
    return encoded.join(prior.encode_given(given.without(removed)))


def check_known(prior: Prior, tokens: Tensor | None, known: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Return the known tokens (0 elsewhere) and bool `known`, both `(count, N)`. Raises `ValueError` if only one is
    given, and for a wrong shape or type or ids out of range."""
    if (tokens is None) != (known is None):
        raise ValueError("give `tokens` and `known` together: `known` marks the tokens to keep")
    if tokens is None or known is None:
        empty = torch.zeros(count, len(prior.grid), dtype=torch.long, device=prior.device)
        return empty, empty.bool()
    one, shape, tokens, known = prior.grid.shape, (count, *prior.grid.shape), to_tensor(tokens), to_tensor(known)
    right = {"known": (known, known.dtype == torch.bool), "tokens": (tokens, is_integer(tokens.dtype))}
    for name, (values, is_type) in right.items():
        if not is_type or tuple(values.shape) not in (shape, one):
            what = "bool" if name == "known" else "whole numbers"
            found = f"{values.dtype} of {tuple(values.shape)}"
            raise ValueError(f"{name} should be {what} of shape {one} or {shape}, got {found}")
    known = known.to(prior.device).expand(shape).flatten(1)
    tokens = torch.where(known, tokens.to(prior.device).expand(shape).flatten(1).long(), 0)
    prior.grid.check(tokens.reshape(shape))
    return tokens, known


def choose_orders(prior: Prior, options: DecodingOptions, batch: SampleBatch) -> Partition | None:
    """Choose the order and blocks of each image; None means the model's own. batch: in raster order.

    A model with `any_order` decodes known tokens first. With several orders, each image's key selects one. With blocks
    of one token, the choice is in proportion to the probability that the order gives to the known tokens, which come
    first. Otherwise it is uniform, because known tokens form one block, whose probability is the same in all orders."""
    orders = [prior.check_order(one, len(batch)) for one in prior.orders(options.num_orders, options.order)]
    order, blocks = orders[0] or (prior.order, prior.blocks)
    if len(orders) > 1:
        each = [prior.order if one is None else one.order for one in orders]
        candidates = torch.stack([known_first(one, batch.known) for one in each])  # (orders, B, N)
        chosen = choose_by_known(prior, batch, candidates, blocks)
        order = candidates[chosen, torch.arange(len(batch), device=chosen.device)]
    elif prior.any_order and bool(batch.known.any()):
        order = known_first(order, batch.known)
    elif orders[0] is None:
        return None
    if order.ndim == 2 and bool((order == order[:1]).all()):
        order = order[0]
    return Partition(order, blocks)


def choose_by_known(prior: Prior, batch: SampleBatch, candidates: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Draw an order `(B,)` for each image from its `candidates` (orders, B, N), in which known tokens come first: in
    proportion to the probability of the known tokens, or uniformly if blocks hold several tokens."""
    scores = torch.zeros(len(batch), len(candidates), device=batch.keys.device)
    if max(blocks) == 1 and bool(batch.known.any()):
        tokens = batch.tokens.unflatten(1, prior.grid.shape)
        for number, order in enumerate(candidates):
            each = prior.chain_log_probs(tokens, batch.given, Partition(order, blocks)).flatten(1)
            scores[:, number] = in_finest(each).masked_fill(~batch.known, 0).sum(1).float()
    return (scores + gumbel_noise(batch.keys, ORDER_NOISE, 0, len(candidates))).argmax(1)


def equal_batches(count: int, at_most: int | None = None) -> list[slice]:
    """Cut `count` images into the fewest batches of nearly equal size, so that one CUDA graph suits all."""
    number = 1 if at_most is None else -(-count // check_count(at_most, "batch_size"))
    size, larger = divmod(count, number)
    starts = [k * size + min(k, larger) for k in range(number + 1)]
    return [slice(*ends) for ends in pairwise(starts)]


# Progress


class SamplingStep:
    """A decoding step, as passed to `on_step`. Nothing is copied, and no GPU sync happens, until a property is read.

    number: step index from 0, over all parts of a request."""

    def __init__(self, number: int, decided: int | Tensor, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.number, self._decided, self._read = number, decided, read

    @property
    def rank(self) -> int:
        """How many tokens of each image being drawn are decided or known, along its order."""
        return self._decided if isinstance(self._decided, int) else int(self._decided.sum(1).min())

    @cached_property
    def _state(self) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # the caller may train on copies
            return self._read()

    @property
    def tokens(self) -> Tensor:
        """A copy of all images' tokens so far, `(B, *grid.shape)`; 0 where undecided."""
        return self._state[0]

    @property
    def known(self) -> Tensor:
        """Whether each token is decided or was given, bool `(B, *grid.shape)`."""
        return self._state[1]


OnStep = Callable[[SamplingStep], Any]


class Monitor:
    """Reports the progress of one request: a bar (bar: True, or arguments of `tqdm`), and `on_step` after each step.
    batch: all images, in raster order."""

    def __init__(
        self, bar: bool | Mapping[str, Any], on_step: OnStep | None, batch: SampleBatch, grid: TokenGrid
    ) -> None:
        self.bar, self.on_step, self.shape = bar, on_step, grid.shape
        self.tokens, self.known = batch.tokens.clone(), batch.known.clone()
        self.num_steps = 0

    def iterate(self, steps: Sequence[T]) -> Iterable[T]:
        return show_progress(steps, self.bar, unit="pass")

    def report(self, batch: SampleBatch, sampled: Tensor, decided: int | Tensor) -> None:
        """Report a step. sampled: `(b, N)`, in the sequence of `batch`; decided: how many of the first tokens are
        decided, or which, bool `(b, N)`. An exception in `on_step` ends sampling."""
        if self.on_step is None:
            return

        def read() -> tuple[Tensor, Tensor]:
            ranks = torch.arange(sampled.shape[1], device=sampled.device)
            known = batch.known | (decided if isinstance(decided, Tensor) else ranks < decided)
            tokens, every = self.tokens.clone(), self.known.clone()
            tokens[batch.rows] = batch.to_raster(torch.where(known, sampled, 0))
            every[batch.rows] = batch.to_raster(known)
            return tokens.unflatten(1, self.shape), every.unflatten(1, self.shape)

        step = SamplingStep(self.num_steps, decided, read)
        self.num_steps += 1
        with torch.inference_mode(False), torch.no_grad():
            self.on_step(step)

    def finish(self, batch: SampleBatch, sampled: Tensor) -> None:
        self.tokens[batch.rows] = batch.to_raster(sampled)
        self.known[batch.rows] = True


def show_progress(steps: Sequence[T], bar: bool | Mapping[str, Any], unit: str = "token") -> Iterable[T]:
    """Iterate over `steps`, with a bar on a terminal if `bar` is True or holds arguments of `tqdm`."""
    if not bar and not isinstance(bar, Mapping):
        return steps
    from tqdm import tqdm

    own = {"desc": "sampling", "unit": unit, "leave": False, "disable": None}
    return tqdm(steps, **{**own, **(bar if isinstance(bar, Mapping) else {})})


# The loop


@dataclass
class UncachedState:
    """The state of uncached decoding: tokens so far `(B, N)`, raster order. inputs: other inputs of `forward`."""

    prior: Prior
    tokens: Tensor
    encoded: Encoded
    order: Tensor
    blocks: tuple[int, ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    block: int = 0
    rank: int = 0

    def advance(self, tokens: Tensor | None) -> Tensor:
        """Write the last block's `tokens` `(B, m)`; return the next block's raster indices `(B, n)`."""
        order = self.order.expand(self.tokens.shape)
        if tokens is not None:
            self.tokens.scatter_(1, order[:, self.rank - tokens.shape[1] : self.rank], tokens)
        begin, self.rank = self.rank, self.rank + self.blocks[self.block]
        self.block += 1
        return order[:, begin : self.rank]

    def step(self, tokens: Tensor | None) -> Tensor:
        """Return logits of the next block, from one pass over the whole grid; see `Prior.next_logits`."""
        at = self.advance(tokens)
        logits = self.prior(self.tokens.unflatten(1, self.prior.grid.shape), self.encoded, **self.inputs)
        return logits.take_along_dim(at[..., None], 1)


def sample_blocks(prior: Prior, batch: SampleBatch, options: SamplingOptions, cache: bool, monitor: Monitor) -> None:
    sampled = None
    if cache and monitor.on_step is None and prior.supports_cuda_graphs and can_capture(prior.device):
        names = ("keys", "tokens", "known", "order", *(("places",) if batch.places is not None else ()))
        inputs = {name: getattr(batch, name) for name in names}
        given = batch.given
        columns = {f"given.{name}": given.raw(name, prior.device) for name in given.columns}  # null ones, too
        inputs |= columns
        key = (options, batch.blocks, batch.own_order, *((name, part.shape[1:]) for name, part in inputs.items()))

        def draw(inputs: dict[str, Any]) -> Tensor:
            rows = {name.removeprefix("given."): inputs[name] for name in columns}
            every = Given(given.columns, rows, len(inputs["keys"]))
            there = {name: tensor for name, tensor in inputs.items() if name not in columns}
            return draw_blocks(prior, replace(batch, **there, given=every), options, cache)

        sampled = compute_by_graph(prior, key, len(batch), inputs, draw)
    if sampled is None:
        sampled = draw_blocks(prior, batch, options, cache, monitor)
    monitor.finish(batch, sampled)


def can_capture(device: torch.device) -> bool:
    """Return whether a CUDA graph can be captured on this device now. Before torch 2.12, a failed capture could abort
    the process later (pytorch#180395)."""
    if not Graph.allowed or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return torch.__version__ >= "2.12" and not torch.cuda.is_current_stream_capturing()


def draw_blocks(
    prior: Prior, batch: SampleBatch, options: SamplingOptions, cache: bool, monitor: Monitor | None = None
) -> Tensor:
    """Draw tokens `(B, N)` eagerly; without a monitor, no control flow reads tensors, as CUDA graphs require."""
    ends = list(accumulate(batch.blocks))
    cuts = list(zip([0, *ends], ends, strict=False))
    skipped, some_known = set[int](), True  # starts of blocks that are known in all images
    if monitor is not None:
        some_known = bool(batch.known.any())
        unknown = (~batch.known).any(0).tolist()
        last = max((rank for rank, is_unknown in enumerate(unknown) if is_unknown), default=-1)
        cuts = [(begin, end) for begin, end in cuts if begin <= last]
        skipped = {begin for begin, end in cuts if not any(unknown[begin:end])}
    encoded, partition = encode_rows(prior, batch, options), batch.partition(options)
    state = prior.start(encoded, partition, cache=cache)
    noise = batch.noise(prior.grid)
    sampled, tokens = batch.tokens.clone(), None
    steps = cuts if monitor is None else monitor.iterate(cuts)
    for (begin, end), scale in zip(steps, options.scale_by_block(batch.blocks), strict=False):
        if begin in skipped and isinstance(state, UncachedState):  # a cache would need the block's keys and values
            state.advance(tokens)
        else:
            logits = options.guide(at_least_float32(prior.next_logits(state, tokens)), scale)
            chosen = options.choose(logits, noise.of_ranks(begin, end))
            if some_known:
                chosen = torch.where(batch.known[:, begin:end], sampled[:, begin:end], chosen)
            sampled[:, begin:end] = chosen
        tokens = options.with_unconditional(sampled[:, begin:end])
        if monitor is not None:
            monitor.report(batch, sampled, end)
    return sampled
