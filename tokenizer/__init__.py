"""Stage one: images to a grid of ids and back; nothing to do with tokenizers of text. Needs torch and pydantic."""

from typing import TYPE_CHECKING

__all__ = ["Reconstruction", "TokenGrid", "Tokenizer"]

if TYPE_CHECKING:
    from .base import Reconstruction, TokenGrid, Tokenizer
else:  # `tokenizer.files` and `tokenizer.config` are used without torch, which takes seconds to import

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import base

        return getattr(base, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
