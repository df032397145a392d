"""How files are written whole and read with suspicion."""
