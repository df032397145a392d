"""Images in shards, parquet or tar, here or on a server, read when they are due."""
