"""Objectives: what turns a batch into a loss, for any prior."""

from .alignment import Alignment, alignment_problem
from .likelihood import Likelihood, mean_nats, token_nats

__all__ = ["Alignment", "Likelihood", "alignment_problem", "mean_nats", "token_nats"]
