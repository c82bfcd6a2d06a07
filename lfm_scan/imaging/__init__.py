"""Bytes to pixels: type by content, limits before decoding, one written rule for every colour mode."""

from lfm_scan.imaging.decode import decode_bytes, decode_image, recognise
from lfm_scan.imaging.info import DecodedImage, ImageInfo
from lfm_scan.imaging.preprocess import POLICIES, PreprocessPolicy, get_policy
from lfm_scan.options import ImageLimits

__all__ = [
    "POLICIES",
    "DecodedImage",
    "ImageInfo",
    "ImageLimits",
    "PreprocessPolicy",
    "decode_bytes",
    "decode_image",
    "get_policy",
    "recognise",
]
