"""Tests of lfm_scan.distributed."""
