"""Tests of the GPU's networks. Where there is a GPU they run on it:

    python -m pytest --noconftest tests/scoring/cuda

needs torch, Triton, numpy, safetensors and pytest with its timeouts, and nothing else of the package's dependencies.
"""
