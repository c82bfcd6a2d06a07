"""Tests of lfm_scan.scoring."""
