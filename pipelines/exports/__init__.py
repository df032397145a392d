"""Tokenizers as files that other programs run: ONNX, or `torch.export`'s programs, each checked by running it."""

from .writing import EXPORT, export_tokenizer

__all__ = ["EXPORT", "export_tokenizer"]
