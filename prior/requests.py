"""What a caller asks of a prior, checked: classes, orders, tokens to keep; and the rows that they become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tokenizer.base import TokenGrid, in_finest

from .orders import Partition, after_known, block_numbers, blocks_problem, known_first, make_partition, order_of
from .orders.partitions import as_tensor
from .sampling import Generators, Sampler, check_count, gumbel, image_generators, whole_number

Order = Tensor | str | Partition | None
"""A name; `(N,)` or `(B, N)` raster indices, cut into the model's own blocks; such an order and its blocks; None is the
model's own."""


class Model(Protocol):
    """What is asked of a `Prior` here, in `parallel` and in `drawing`, all of which `base` imports."""

    name: ClassVar[str]
    config: Any
    grid: TokenGrid
    num_classes: int
    order: Tensor
    blocks: tuple[int, ...]
    readout: Any
    any_order: bool
    captures: bool
    recomputes: bool
    rounding: float

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *inputs: Any, **options: Any) -> Any: ...

    def class_ids(self, labels: Tensor | None, count: int) -> Tensor: ...

    def orders(self, num_orders: int, order: Order = None) -> Sequence[Order]: ...

    def chain_log_probs(
        self, tokens: Tensor, labels: Tensor | None = None, order: Order = None, known: Tensor | None = None
    ) -> Tensor: ...

    def start(self, num_images: int, labels: Tensor | None, order: Order = None) -> Any: ...

    def next_logits(self, state: Any, tokens: Tensor | None) -> Tensor: ...

    def start_slow(self, num_images: int, labels: Tensor | None, order: Order = None) -> Any: ...

    def next_logits_slow(self, state: Any, tokens: Tensor | None) -> Tensor: ...

    def rows_at_once(self) -> int | None: ...


@dataclass(frozen=True)
class Walk:
    """How the grid is walked: in an `order`, or each image in one of `num_orders`; step by step, with or without a
    `cache` or graphs (`capture`); or in `parallel` passes, perhaps with a `guess`. See `Prior.sample`."""

    order: Order = None
    num_orders: int = 1
    cache: bool = True
    parallel: bool = False
    guess: Model | None = None
    capture: bool = True

    @classmethod
    def names(cls) -> list[str]:
        """The arguments of `Prior.sample` that say how the grid is walked."""
        return [field.name for field in fields(cls)]

    @property
    def is_chosen(self) -> bool:
        """Whether the caller says anything of it."""
        return self.order is not None or self.num_orders != 1 or self.parallel or not self.cache

    def of(self, rows: slice | Sequence[int], count: int) -> Walk:
        """That of some of `count` images. Raises `ValueError` as `order_of` does."""
        return replace(self, order=order_of(self.order, rows, count))

    def check(self, prior: Model) -> None:
        """Raise `ValueError` for what does not go together."""
        guess = self.guess
        if guess is not None:
            grid, classes = getattr(guess, "grid", None), getattr(guess, "num_classes", None)
            alike = (grid, classes) == (prior.grid, prior.num_classes)
            if not alike or not self.parallel:
                raise ValueError("guess should be a prior over the same grid and classes, and goes with parallel=True")
        if self.parallel and not self.cache:
            raise ValueError("cache=False does not go with parallel=True: whole passes have no cache")


@dataclass
class Rows:
    """What is to be drawn, a row per image: labels `(B,)`, generators, and the tokens to keep (`given` where bool
    `keep`), both `(B, N)` along `path`, `(N,)` or `(B, N)`, which sizes `blocks` cut. images: which of the
    request's they are; own: path and blocks are the model's."""

    labels: Tensor
    generators: list[torch.Generator]
    given: Tensor
    keep: Tensor
    path: Tensor
    blocks: tuple[int, ...]
    images: list[int]
    own: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: slice | Sequence[int]) -> Rows:
        path = self.path if self.path.ndim == 1 else self.path[at]
        numbers = list(range(len(self)))[at] if isinstance(at, slice) else at
        generators, images = [self.generators[k] for k in numbers], [self.images[k] for k in numbers]
        given, keep = self.given[at], self.keep[at]
        return replace(
            self, labels=self.labels[at], generators=generators, given=given, keep=keep, path=path, images=images
        )

    def along(self, walk: Partition | None, prior: Model) -> Rows:
        """In the order and blocks of `walk` (None: of the model's own), given that they are in raster order."""
        path, blocks = (prior.order, prior.blocks) if walk is None else walk
        wide = path.expand(self.given.shape)
        given, keep = self.given.gather(1, wide), self.keep.gather(1, wide)
        return replace(self, given=given, keep=keep, path=path, blocks=blocks, own=walk is None)

    def walk(self, copies: int = 1) -> Partition | None:
        """Order and blocks, of `copies` rows for each row; None for the model's own."""
        if self.own:
            return None
        return Partition(self.path.repeat(copies, 1) if self.path.ndim == 2 else self.path, self.blocks)

    def alike(self, prior: Model) -> Iterator[tuple[slice | list[int], Rows]]:
        """The rows that walk in the same blocks, and which they are: all of them, unless known tokens come first. These
        are then a block, so that images with as many of them go together."""
        if max(self.blocks) == 1 or self.own or not bool(self.keep.any()):
            yield slice(None), self
            return
        counts = self.keep.sum(1).tolist()
        for count in sorted(set(counts)):
            at = [row for row, number in enumerate(counts) if number == count]
            yield at, replace(self[at], blocks=after_known(self.blocks, count))

    def cut(self, most: int) -> list[Rows]:
        """In parts of at most `most` rows, as alike in size as can be."""
        parts = -(-len(self) // most)
        ends = [len(self) * part // parts for part in range(parts + 1)]
        return [self[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def make_rows(
    prior: Model,
    num_images: int,
    labels: Tensor | None,
    sampler: Sampler,
    generator: Generators,
    tokens: Tensor | None,
    known: Tensor | None,
) -> Rows:
    """The rows of a request, in raster order. Raises `ValueError` for what is out of range."""
    num_images = check_count(num_images)
    labels = check_labels(prior, labels, num_images)
    sampler.check_guidance(labels is not None)  # some of a larger request's images may all be of the null class
    given, keep = known_tokens(prior, tokens, known, num_images)
    raster = torch.arange(len(prior.grid), device=prior.device)
    generators = image_generators(generator, num_images)
    images = list(range(num_images))
    return Rows(prior.class_ids(labels, num_images), generators, given, keep, raster, prior.blocks, images)


def given_walk(prior: Model, walk: Partition | None, known: Tensor | None = None) -> dict[str, Tensor]:
    """What `forward` is told of a walk other than the model's own (None), in which bool `known` (B, N), raster order,
    comes first."""
    if known is not None and prior.any_order:
        order, blocks = (prior.order, prior.blocks) if walk is None else walk
        walk = Partition(known_first(order, known), blocks)
    if walk is None:
        return {}
    if not prior.config.takes_blocks:
        return {"order": walk.order}
    block_of = block_numbers(*walk)
    if known is not None and max(walk.blocks) > 1:  # they are one block, as in `Rows.alike`
        block_of = block_of.masked_fill(known, -1)
    return {"block_of": block_of}


def partition_of(prior: Model, order: Order) -> Partition:
    """`order` and how it is cut, on the model's device. Raises `ValueError` for sizes that are no whole numbers."""
    walk: Any = make_partition(order, prior.grid.shape) if isinstance(order, str) else order
    if not isinstance(walk, Partition):
        walk = Partition(prior.order if walk is None else walk, prior.blocks)
    order = as_tensor(walk.order, prior.device)
    return Partition(order, tuple(whole_number("order: blocks", size) for size in walk.blocks))


def check_labels(prior: Model, labels: Tensor | None, count: int) -> Tensor | None:
    """`labels` as int64 `(count,)` on the model's device. Raises `ValueError` out of `[0, num_classes]`."""
    if labels is None:
        return None
    labels = as_tensor(labels, prior.device)
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != (count,):
        raise ValueError(f"labels should be {count} whole numbers, got {labels.dtype} of {tuple(labels.shape)}")
    labels = labels.long()  # torch finds no smallest one of uint16
    if count and (int(labels.min()) < 0 or int(labels.max()) > prior.num_classes):
        raise ValueError(
            f"labels should lie in [0, {prior.num_classes}) (and {prior.num_classes} is the null class), "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def check_order(prior: Model, order: Order, count: int) -> Partition | None:
    """`order`, int64 `(N,)` or `(count, N)`, and its blocks, or None for the model's own. Raises `ValueError` for what
    is no ordered partition of this grid, or one that the model does not take."""
    names_own = isinstance(order, str) and order == prior.config.order and prior.config.blocks is None
    if order is None or (names_own and not prior.any_order):  # the name may be of positions, or of scales
        return None
    walk, blocks = partition_of(prior, order)
    size = len(prior.grid)
    is_whole = not walk.dtype.is_floating_point and walk.dtype != torch.bool
    fits = is_whole and tuple(walk.shape) in ((size,), (count, size))
    walk = walk.long() if fits else walk  # torch sorts no uint16
    if not fits or not bool((walk.sort(-1).values == torch.arange(size, device=walk.device)).all()):
        raise ValueError(f"order should hold each of 0 to {size - 1} once, for all images or for each of {count}")
    if problem := blocks_problem(blocks, size):
        raise ValueError(f"order: {problem}")
    if blocks == prior.blocks and bool((walk == prior.order).all()):
        return None
    if not prior.any_order:
        raise ValueError(f"order: this {prior.name} prior goes in one order, {prior.config.order!r}, as it was made")
    if max(blocks) > 1 and not prior.config.takes_blocks:
        raise ValueError(f"order: this {prior.name} draws one token at a time; blocks are for kinds that take them")
    return Partition(walk, blocks)


def choose_walk(prior: Model, order: Order, num_orders: int, rows: Rows) -> Partition | None:
    """The order of each image and its blocks, None for the model's own: one of several, known tokens first. rows: in
    raster order. Of several orders an image goes in one that its own generator draws, with the probability that the
    mixture's known tokens have come from it (`draw_order`)."""
    orders = [check_order(prior, one, len(rows)) for one in prior.orders(num_orders, order)]
    walk, blocks = orders[0] or (prior.order, prior.blocks)
    if len(orders) > 1:
        each = [prior.order if one is None else one.order for one in orders]
        ways = torch.stack([known_first(one, rows.keep) for one in each])
        chosen = [draw_order(prior, rows[[k]], Partition(ways[:, k], blocks)) for k in range(len(rows))]
        walk = ways[chosen, range(len(chosen))]
    elif prior.any_order and bool(rows.keep.any()):
        walk = known_first(walk, rows.keep)
    elif orders[0] is None:
        return None
    if walk.ndim == 2 and bool((walk == walk[:1]).all()):
        walk = walk[0]
    return Partition(walk, blocks)


def draw_order(prior: Model, row: Rows, ways: Partition) -> int:
    """Which of `ways`, orders (K, N), one image goes: each as probable as it makes the known tokens, which come first
    in it. One pass over the image in K orders, so that its batch has no say.

    All orders are equally probable where nothing is known, and where blocks hold several tokens: known tokens are then
    one block (`after_known`), which sees nothing, so their probability does not depend on the order.
    """
    (generator,), (keep,), count = row.generators, row.keep, len(ways.order)
    if not bool(keep.any()) or max(ways.blocks) > 1:
        return int(torch.randint(count, (), generator=generator, device=generator.device))
    tokens = row.given.expand(count, -1).reshape(count, *prior.grid.shape)
    each = prior.chain_log_probs(tokens, row.labels.expand(count), ways)
    scores = in_finest(each.flatten(1)[:, keep]).sum(1).float()
    return int((scores + gumbel((count,), generator).to(scores.device)).argmax())


def known_tokens(prior: Model, tokens: Tensor | None, known: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Tokens to start from, 0 where they are not known, and which of them to keep, both `(count, N)`. Raises
    `ValueError` for one without the other, another shape or type, and for ids out of range."""
    if (tokens is None) != (known is None):
        raise ValueError("`tokens` and `known` go together: known says which of the tokens to keep")
    if tokens is None or known is None:
        empty = torch.zeros(count, len(prior.grid), dtype=torch.long, device=prior.device)
        return empty, empty.bool()
    shape, tokens, known = (count, *prior.grid.shape), as_tensor(tokens), as_tensor(known)
    if known.dtype != torch.bool or tuple(known.shape) not in (shape, prior.grid.shape):
        raise ValueError(
            f"known should be bool of shape {prior.grid.shape} or {shape}, got {known.dtype} of {tuple(known.shape)}"
        )
    if tokens.dtype.is_floating_point or tuple(tokens.shape) not in (shape, prior.grid.shape):
        found = f"{tokens.dtype} of {tuple(tokens.shape)}"
        raise ValueError(f"tokens should be whole numbers of shape {prior.grid.shape} or {shape}, got {found}")
    known = known.to(prior.device).expand(shape).flatten(1)
    tokens = torch.where(known, tokens.to(prior.device).expand(shape).flatten(1).long(), 0)
    prior.grid.check(tokens.reshape(shape))
    return tokens, known
