"""From text in parquet shards to rows of tokens, the same for every run."""
