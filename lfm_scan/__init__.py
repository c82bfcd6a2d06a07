"""lfm_scan: find AI-generated images in object storage."""
