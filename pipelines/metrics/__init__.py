"""What is measured of reconstructions, likelihoods, samples and codebooks."""
