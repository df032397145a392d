"""Distributions over a pixel's 256 values that a decoder may have, one file per idea."""

from .base import Likelihood

__all__ = ["Likelihood"]
