"""What should never fail: tests, runs, parsers and bits, tried until something does."""
