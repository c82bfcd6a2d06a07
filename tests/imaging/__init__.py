"""Tests of lfm_scan.imaging."""
