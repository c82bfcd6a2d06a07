"""What a scan will take, from a sample of its inputs: without Ray, and without a run directory."""
