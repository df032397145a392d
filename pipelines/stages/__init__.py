"""Both models as one folder, and what is asked of them together."""
