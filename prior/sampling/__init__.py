"""From logits to a token: temperature, top-k, top-p, guidance, and Gumbel noise that belongs to the image."""

from .generators import Generators, image_generators, image_seeds
from .noise import GumbelNoise, gumbel
from .progress import progress_over
from .settings import GUIDANCE, Sampler

__all__ = [
    "GUIDANCE",
    "Generators",
    "GumbelNoise",
    "Sampler",
    "gumbel",
    "image_generators",
    "image_seeds",
    "progress_over",
]
