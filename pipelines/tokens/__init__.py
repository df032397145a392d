"""A token dataset: the ids of a data set's images, and the tokenizer that made them."""

from .dataset import TokenDataset, TokenSplit, load_tokens
from .meta import Meta

__all__ = ["Meta", "TokenDataset", "TokenSplit", "load_tokens"]
