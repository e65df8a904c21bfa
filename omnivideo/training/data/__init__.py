"""Training data: one sample format for the six tasks, its shards, published layouts, and the order of batches."""
