"""Tests of lfm_scan.storage."""
