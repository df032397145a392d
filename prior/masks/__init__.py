"""Masks: what a position may see, as windows of attention and as connections of a perceptron."""

from .connections import Connections, chosen_degrees, degrees_of, even_degrees, random_degrees
from .running_sums import Sums, summed
from .windows import Window, make_windows, window_problem

__all__ = [
    "Connections",
    "Sums",
    "Window",
    "chosen_degrees",
    "degrees_of",
    "even_degrees",
    "make_windows",
    "random_degrees",
    "summed",
    "window_problem",
]
