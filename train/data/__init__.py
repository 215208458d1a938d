"""Documents on disk to packed, planned batches: sources -> documents -> windows -> loader."""
