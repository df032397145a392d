"""Heads: what is made of the numbers that a network puts out at a position. One idea per file, headed by its paper."""

from .base import Head, Softmax, head_problem, make_head
from .positions import IdEmbedding, PositionSteps

__all__ = ["Head", "IdEmbedding", "PositionSteps", "Softmax", "head_problem", "make_head"]
