"""Tests of lfm_scan.runs."""
