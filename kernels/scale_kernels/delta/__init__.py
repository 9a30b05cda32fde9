"""A step along up to four directions, coefficients by parameter group, in one pass over all shards."""
