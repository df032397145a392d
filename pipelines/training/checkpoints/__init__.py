"""Resume states: exact, atomic, verified."""
