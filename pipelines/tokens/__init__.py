"""Token datasets: the token ids of images, with the tokenizer that made them."""

from .dataset import TokenDataset, TokenSplit, load_tokens
from .meta import Meta

__all__ = ["Meta", "TokenDataset", "TokenSplit", "load_tokens"]
