"""Building blocks of models, unaware of parallelism."""
