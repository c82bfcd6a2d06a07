"""Aligned pairs: photographs and the same photographs drawn again by upsampling networks. Plain torch, no Ray."""

from lfm_scan.synth.config import SynthConfig
from lfm_scan.synth.generate import Listener, SynthOutcome, synthesise

__all__ = ["Listener", "SynthConfig", "SynthOutcome", "synthesise"]
