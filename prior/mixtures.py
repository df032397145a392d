"""A prior of any order, or of any connectivity, is as many densities, which can be mixed (Germain et al. 2015)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenizer.base import TokenGrid, in_finest

from .orders import Partition, make_order
from .requests import Order, partition_of
from .sampling import whole_number


class Mixtures:
    """The members of a prior's mixtures, and how far apart they are."""

    name: ClassVar[str]
    grid: TokenGrid
    chain_log_probs: Any
    any_order: bool = False
    """Whether `forward`, `log_prob` and `sample` take any other `order` than the model's own."""
    any_connectivity: bool = False
    """Whether the model is one of many of the same weights, which `connected` chooses from (MADE's masks)."""

    def orders(self: Any, num_orders: int, order: Order = None) -> list[Order]:
        """The orders of a mixture: the given one (None is the model's own); random:1, random:2, ... in its blocks."""
        check_mixture("num_orders", num_orders, self.any_order, f"{self.name} as it was made has one order")
        others = [f"random:{index}" for index in range(1, num_orders)]
        blocks = partition_of(self, order).blocks
        walks = (Partition(make_order(name, self.grid.shape), blocks) for name in others)
        return [order, *(others if max(blocks) == 1 else walks)]

    def connectivities(self, num_masks: int) -> range:
        """The numbers of a mixture's connectivities; 0 is the model's own."""
        check_mixture("num_masks", num_masks, self.any_connectivity, f"{self.name} as it was made has one connectivity")
        return range(num_masks)

    def connected(self, number: int) -> AbstractContextManager[None]:
        """Be the model of this connectivity, in this thread, while the block lasts. Here there is none but the model's
        own."""
        return nullcontext()

    def order_spread(self, tokens: Tensor, labels: Tensor | None = None, num_orders: int = 8) -> Tensor:
        """How much log p(tokens | labels) depends on the order, `(B,)` nats: its standard deviation over `orders`.

        It is 0 where all orders' conditionals come from one joint distribution. The larger it is, the less a statement
        about one order holds for another: `conditional_log_prob` and completions walk the known tokens first,
        `log_prob` walks the model's own order. It is exact even where `log_prob` is a bound. Raises `ValueError` for a
        model of one order, for fewer than two orders, and for tokens or labels out of range.
        """
        if num_orders < 2:
            raise ValueError(f"num_orders must be at least 2 to see a spread (got {num_orders})")
        orders = self.orders(num_orders)
        each = [in_finest(self.chain_log_probs(tokens, labels, order).flatten(1)).sum(1) for order in orders]
        return torch.stack(each).std(0).float()


def check_mixture(name: str, count: int, allowed: bool, otherwise: str) -> None:
    """Raise `ValueError` unless `count`, the argument `name`, is 1, or more where that is `allowed`. otherwise: why it
    is not."""
    count = whole_number(name, count)
    if count < 1:
        raise ValueError(f"{name} must be at least 1 (got {count})")
    if count > 1 and not allowed:
        raise ValueError(f"{name}: {otherwise}")
