"""Tests of lfm_scan.model."""
