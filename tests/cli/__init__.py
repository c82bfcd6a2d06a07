"""Tests of lfm_scan.cli."""
