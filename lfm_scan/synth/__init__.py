"""Aligned pairs: photographs and the same photographs drawn again by upsampling networks. Plain torch, no Ray."""
