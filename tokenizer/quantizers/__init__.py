"""Quantizers, which turn vectors into ids, one idea a file."""

from .base import Quantized, Quantizer

__all__ = ["Quantized", "Quantizer"]
