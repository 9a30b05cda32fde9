"""Statistics of a model by parameter group in one pass over its shards."""
