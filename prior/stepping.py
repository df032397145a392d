"""A prior step by step: logits of a block at a time, from a cache or from whole passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .heads import PositionSteps, Softmax
from .orders import Partition
from .requests import Order, given_walk, partition_of
from .sampling.steps import State


class Stepping:
    """The steps of a `Prior`: `start` makes a state, which `next_logits` advances by a block."""

    def start(self: Any, num_images: int, labels: Tensor | None, order: Order = None) -> Any:
        """Begin an incremental pass over `num_images` rows; returns the state that `next_logits` advances. order: as
        for `chain_log_probs`; a model of one order is never given one."""
        walk = None if order is None else partition_of(self, order)
        with torch.no_grad():
            cache = self.make_cache(self.class_ids(labels, num_images), walk)
        if isinstance(self.readout, Softmax) or isinstance(cache, State):
            return cache
        return PositionSteps(self.readout, cache, self.config.takes_blocks)

    def next_logits(self: Any, state: Any, tokens: Tensor | None) -> Tensor:
        """Logits `(B, n, vocab_size)` of the n positions of the next block, in their order, given the last block's
        `tokens` `(B, m)`, or None at the first."""
        if isinstance(state, State):
            return self.next_logits_slow(state, tokens)
        if self.config.takes_blocks or isinstance(state, PositionSteps):
            return state.step(tokens)
        return state.step(None if tokens is None else tokens[:, 0]).unsqueeze(1)

    def make_cache(self: Any, labels: Tensor, walk: Partition | None) -> Any:
        """What a model's fast path remembers between steps, for labels `(B,)` and a walk other than its own: an object
        whose `step` gives what the network puts out at the next positions from the last ones' ids, as `PositionSteps`
        says: without a head logits `(B, vocab_size)`, given `(B,)`. Here there is no fast path."""
        return self.start_slow(len(labels), labels, walk)

    def start_slow(self: Any, num_images: int, labels: Tensor | None, order: Order = None) -> State:
        """`start` of the path that recomputes everything: right by construction."""
        walk = partition_of(self, order)
        tokens = torch.zeros(num_images, len(self.grid), dtype=torch.long, device=self.device)
        given = given_walk(self, None if order is None else walk)
        return State(tokens, self.class_ids(labels, num_images), walk.order, walk.blocks, given)

    def next_logits_slow(self: Any, state: State, tokens: Tensor | None) -> Tensor:
        """`next_logits` by one forward pass over the whole grid."""
        at = state.advance(tokens)
        logits = self(state.tokens.reshape(-1, *self.grid.shape), state.labels, **state.given)
        return logits[torch.arange(len(at), device=at.device)[:, None], at]

    def class_ids(self: Any, labels: Tensor | None, count: int) -> Tensor:
        """`labels` `(count,)`; without any, the null class for all."""
        return torch.full((count,), self.num_classes, device=self.device) if labels is None else labels
