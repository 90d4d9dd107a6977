"""The samples: their order, the cut of each batch, micro-batches, workers, randomness."""
