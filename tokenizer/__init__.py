"""Stage one: images to a grid of ids and back; nothing to do with tokenizers of text. Needs torch and pydantic."""

from typing import TYPE_CHECKING

from .late import late

__all__ = ["Reconstruction", "TokenGrid", "Tokenizer"]

if TYPE_CHECKING:
    from .base import Reconstruction, TokenGrid, Tokenizer
else:  # a type checker would take any name for one of these
    __getattr__, __dir__ = late(__name__, dict.fromkeys(__all__, "base"))
