"""Both models as one folder, and what is asked of them together."""

from .base import Images, Label, Stages

__all__ = ["Images", "Label", "Stages"]
