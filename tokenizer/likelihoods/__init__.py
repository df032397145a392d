"""What a decoder may say of a pixel's 256 values, one file per idea."""

from .base import Likelihood

__all__ = ["Likelihood"]
