"""Training data: one sample format for the six tasks, its shards, other people's layouts, and the order of batches."""
