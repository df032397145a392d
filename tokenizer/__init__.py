"""Stage one: turns images into a grid of ids and back. Needs torch alone; `tokenizer` here means images, not text."""

from .base import Reconstruction, TokenGrid, Tokenizer

__all__ = ["Reconstruction", "TokenGrid", "Tokenizer"]
