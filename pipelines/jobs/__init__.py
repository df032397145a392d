"""Long work in pieces: any number of processes share them, and what was killed goes on where it was."""

from .pieces import Job, Piece

__all__ = ["Job", "Piece"]
