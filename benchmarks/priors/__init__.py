"""Comparisons of priors on the same tokens."""
