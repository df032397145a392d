"""A GPU, or the CPU in a rehearsal, and what is measured of it."""
