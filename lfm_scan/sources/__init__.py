"""Sources: from what the user names to planned inputs, and from planned inputs to their bytes."""
