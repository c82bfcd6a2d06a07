"""What this machine does with images: each stage of a scan alone, all of them together, and what to add."""
