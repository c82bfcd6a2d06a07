"""Scripts that measure, and can be repeated; their results are in `results`."""
