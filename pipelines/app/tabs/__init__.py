"""The tabs of the page, one a file: each has a function that builds it."""
