"""Documents on disk to packed batches, and the loop that trains a model on them."""
