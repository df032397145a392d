"""The order of training rows, as functions of (seed, epoch, index)."""
