"""Stage one: images become a grid of ids and come back. Torch alone; `tokenizer` here means images, not text."""

from .base import Reconstruction, TokenGrid, Tokenizer

__all__ = ["Reconstruction", "TokenGrid", "Tokenizer"]
