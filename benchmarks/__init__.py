"""Measurements and stress tests, each a command: `python -m benchmarks.FOLDER.NAME key=value ...`."""
