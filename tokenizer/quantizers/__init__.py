"""Quantizers, which map vectors to ids; one idea per file."""

from .base import Quantized, Quantizer

__all__ = ["Quantized", "Quantizer"]
