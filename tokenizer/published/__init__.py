"""Published networks of other projects, one per file, with the weight names that `smalti import` reads."""

from .conversion import build_published, prefix_of, recognise
from .layouts import Layout, Shapes

__all__ = ["Layout", "Shapes", "build_published", "prefix_of", "recognise"]
