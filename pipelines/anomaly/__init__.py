"""How unlike the normal images is an image, and where."""
