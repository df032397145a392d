"""Comparisons of tokenizers."""
