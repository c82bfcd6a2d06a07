"""Decoders that misbehave on files that carry a mark.

They are planted from outside: a sitecustomize on PYTHONPATH that patches Pillow's PNG plugin.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.awkward import encode

PLANTS: Final = """
import ctypes, os, re, signal, sys, time
from PIL import PngImagePlugin

poisoned = False
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def misbehave(mark):
    global poisoned
    if poisoned and mark != "poison":
        os.abort()
    match mark:
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            print("double free or corruption", file=sys.stderr, flush=True)
            os.abort()
        case "exit":
            os._exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep":
            ctypes.PyDLL(None).pause()  # with the GIL
        case "spin":
            re.match("(a+)+$", "a" * 64 + "b")  # in C, with the GIL
        case "spin-regardless-of-the-clock":
            signal.setitimer(signal.ITIMER_REAL, 0)  # by the clock a busy machine may be the first
            re.match("(a+)+$", "a" * 64 + "b")
        case "hog":
            hoard = []
            while True:
                hoard.append(bytearray(2**23))
        case "hog-in-c":
            while True:
                libc.memset(libc.malloc(2**20), 1, 2**20)
        case "print":
            libc.puts(b"out")
            libc.fflush(None)
            for fd in (0, 1, 2):
                try:
                    os.write(fd, b"rubbish" * 100_000)
                except OSError:
                    pass
        case "lie":
            for fd in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
                try:
                    os.write(fd, b"[" * 4096 + bytes(256 * 256 * 3))
                except OSError:
                    pass
        case "poison":
            poisoned = True
        case "heavy":
            heavy = {"torch", "ray", "pyarrow", "pandas", "boto3", "lfm_scan.runs"} & sys.modules.keys()
            assert not heavy, heavy

load = PngImagePlugin.PngImageFile.load

def load_and_misbehave(self):
    misbehave(self.info.get("mark"))
    return load(self)

PngImagePlugin.PngImageFile.load = load_and_misbehave
"""


def marked(mark: str, seed: int = 0) -> bytes:
    """Return a good PNG on which a planted decoder does what the mark says."""
    info = PngInfo()
    info.add_text("mark", mark)
    noise = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8)
    return encode(Image.fromarray(noise), "PNG", pnginfo=info)
