"""Networks of others whose weights `smalti import` reads, one a file, and how each project names them."""

from .conversion import TOLD, build, prefix_of, recognise
from .layouts import Layout, Shapes

__all__ = ["TOLD", "Layout", "Shapes", "build", "prefix_of", "recognise"]
