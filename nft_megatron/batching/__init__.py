"""Mini-batches, packing by token budget, slices for context parallelism, and the denominator of the loss."""
