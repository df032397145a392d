"""Metrics of reconstructions, likelihoods, samples and codebooks."""
