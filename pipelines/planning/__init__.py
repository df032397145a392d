"""A run on paper: what it costs before it is started."""
