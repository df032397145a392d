"""From logits to a token: temperature, top-k, top-p, guidance, and Gumbel noise that belongs to the image."""

from .generators import Generators, check_count, image_generators, image_seeds, whole_number
from .noise import GumbelNoise, gumbel
from .progress import progress_over
from .settings import GUIDANCE, Sampler

__all__ = [
    "GUIDANCE",
    "Generators",
    "GumbelNoise",
    "Sampler",
    "check_count",
    "gumbel",
    "image_generators",
    "image_seeds",
    "progress_over",
    "whole_number",
]
