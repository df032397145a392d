"""Stage one: encode images as grids of ids and decode them (unrelated to text tokenizers). Needs torch and pydantic."""

from typing import TYPE_CHECKING

__all__ = ["Reconstruction", "TokenGrid", "Tokenizer"]

if TYPE_CHECKING:
    from .base import Reconstruction, TokenGrid, Tokenizer
else:  # importing torch takes seconds, and `tokenizer.files` and `tokenizer.config` do not need it

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import base

        return getattr(base, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
