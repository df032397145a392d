"""Stage two: models of the distribution of id grids, optionally given a class. Needs only torch, pydantic and
safetensors."""

from .base import Prior
from .config import PriorConfig
from .orders import make_order

__all__ = ["Prior", "PriorConfig", "make_order"]
