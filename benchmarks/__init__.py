"""Measurements and searches for faults, each a command: `python -m benchmarks.FOLDER.NAME key=value ...`."""
