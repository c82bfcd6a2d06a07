"""Training LFM: samples, augmentations, the step, and the run. Plain torch; only `lfm_scan.distributed` knows Ray."""
