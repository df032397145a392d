"""The tabs of the page, one per file, each with a function that builds it."""
