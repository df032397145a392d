"""Published networks of other projects, one a file, and how each project names its weights for `smalti import`."""

from .conversion import build, prefix_of, recognise
from .layouts import Layout, Shapes

__all__ = ["Layout", "Shapes", "build", "prefix_of", "recognise"]
