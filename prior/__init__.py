"""Stage two: the distribution of a grid of ids, given a class. Torch and pydantic alone."""

from .base import Prior, PriorConfig
from .gpt import GPT
from .marginal import Marginal
from .orders import make_order

__all__ = ["GPT", "Marginal", "Prior", "PriorConfig", "make_order"]
