"""Which row comes when, as functions of (seed, epoch, index)."""
