"""The ways to turn a vector into an id, one file per idea."""

from .base import Quantized, Quantizer

__all__ = ["Quantized", "Quantizer"]
