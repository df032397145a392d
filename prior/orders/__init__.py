"""Orders: in which blocks, and in which order, the cells of a grid are drawn."""

from .known import after_known, known_first
from .partitions import Partition, block_numbers, make_order, make_partition, order_of, order_problem
from .sizes import blocks_problem, even, growing

__all__ = [
    "Partition",
    "after_known",
    "block_numbers",
    "blocks_problem",
    "even",
    "growing",
    "known_first",
    "make_order",
    "make_partition",
    "order_of",
    "order_problem",
]
