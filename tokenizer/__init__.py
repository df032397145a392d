"""Stage one: images to a grid of ids and back; nothing to do with tokenizers of text. Needs torch and pydantic."""

from .base import Reconstruction, TokenGrid, Tokenizer

__all__ = ["Reconstruction", "TokenGrid", "Tokenizer"]
