"""The process that decodes for `IsolatedDecoder`: files in by one pipe, answers out by another, nothing else.

    parent -> child    8 bytes little-endian: length of the file; then the file
    child -> parent    READY once; then for each file a frame: JSON padded to FACTS_BYTES, and PIXEL_BYTES of RGB

Every frame has the same length, zeros for an image that has no pixels, so the parent reads it in one call and trusts
no length that a hijacked decoder could have written. The end of the first pipe, for whatever reason, ends the child.

The limits are the kernel's: they hold inside C code that never returns to Python, and when the parent is gone.
Nothing here may import more than numpy and Pillow: it is paid at every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

# Pillow would load a plugin at the first file of its kind, inside that image's time and memory.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from lfm_scan.imaging import ImageInfo, ImageLimits, PreprocessPolicy, get_policy
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.imaging.traces import measure_traces
from lfm_scan.scoring.prepare import Prepared, prepare_content
from lfm_scan.status import Status

LENGTH: Final = struct.Struct("<Q")
READY: Final = b"R"
FACTS_BYTES: Final = 4096
PIXEL_BYTES: Final = SIDE_PX * SIDE_PX * 3
WALL_PER_CPU_SECOND: Final = 4
"""max_decode_seconds counts CPU time; by the clock a decoder may take so many times as long."""
EXIT_OUT_OF_MEMORY: Final = 12
"""Exit status for a MemoryError: telling it any other way would take memory."""

_INFO_FIELDS: Final = tuple(ImageInfo.__dataclass_fields__)
_MAX_ERROR_CHARS: Final = 600  # in the longest encoding still well below FACTS_BYTES
_MAX_OUTPUT_BYTES: Final = 64 * 1024
_NO_PIXELS: Final = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)


def main(setup: dict[str, Any]) -> None:
    """Answer files until the parent closes its pipe.

    Args:
        setup: policy_id, limits (of `ImageLimits`, as a dict), requests_fd and answers_fd.
    """
    policy, limits = get_policy(setup["policy_id"]), ImageLimits(**setup["limits"])
    _reset_signals()
    # Linear algebra takes its buffers at the first use and keeps them: they are no image's.
    measure_traces(Image.new("RGB", (SIDE_PX, SIDE_PX)))
    AvifImagePlugin.DEFAULT_MAX_THREADS = (
        1  # one process is planned as one core, and each thread's stack counts as memory
    )
    _limit_resources(limits.max_decode_bytes)
    with open(setup["requests_fd"], "rb") as requests, contextlib.suppress(BrokenPipeError):
        os.write(setup["answers_fd"], READY)
        try:
            for prepared in _prepare_all(requests, policy, limits):
                _send(setup["answers_fd"], prepared)
        except MemoryError:
            os._exit(EXIT_OUT_OF_MEMORY)


def _prepare_all(requests: BinaryIO, policy: PreprocessPolicy, limits: ImageLimits) -> Iterator[Prepared]:
    """Yield an outcome for each file.

    Raises:
        MemoryError: If decoding one took more than it may.
    """
    errno_of_c = _errno_of_c()
    while len(header := requests.read(LENGTH.size)) == LENGTH.size:
        (size_bytes,) = LENGTH.unpack(header)
        data = requests.read(size_bytes)
        if len(data) < size_bytes:
            return
        signal.setitimer(signal.ITIMER_PROF, limits.max_decode_seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL_PER_CPU_SECOND * limits.max_decode_seconds)
        errno_of_c.value = 0
        prepared = prepare_content(data, policy, limits)
        if prepared.status != Status.OK and errno_of_c.value == errno.ENOMEM:
            raise MemoryError  # libwebp and libjpeg call it a broken file
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del data
        yield prepared


def _errno_of_c() -> ctypes.c_int:
    """Return this thread's errno itself: a malloc that failed leaves ENOMEM there, and success clears nothing."""
    location = ctypes.CDLL(None).__errno_location
    location.restype = ctypes.POINTER(ctypes.c_int)
    cell: ctypes.c_int = location().contents
    return cell


def _send(answers_fd: int, prepared: Prepared) -> None:
    error = None if prepared.error is None else prepared.error[:_MAX_ERROR_CHARS]
    info = {name: getattr(prepared.info, name) for name in _INFO_FIELDS}  # asdict takes five times as long
    facts = {"info": info, "status": prepared.status, "error": error}
    page = json.dumps(facts, ensure_ascii=False).encode().ljust(FACTS_BYTES)
    pixels = _NO_PIXELS if prepared.pixels is None else np.ascontiguousarray(prepared.pixels)
    frame = [memoryview(page), memoryview(pixels.data).cast("B")]
    while frame:
        sent = os.writev(answers_fd, frame)
        advance(frame, sent)


def advance(buffers: list[memoryview], num_bytes: int) -> None:
    """Drop the first bytes of a list of buffers that readv or writev has dealt with."""
    while num_bytes:
        first = buffers[0]
        if num_bytes < len(first):
            buffers[0] = first[num_bytes:]
            return
        num_bytes -= len(first)
        del buffers[0]


def _reset_signals() -> None:
    """Let timers and whoever asks end the process at once and in silence, whatever the parent ignored or blocked."""
    faulthandler.disable()
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _limit_resources(max_decode_bytes: int) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, _MAX_OUTPUT_BYTES)  # a decoder writes no files, and its messages go to one in memory
    _limit_memory(max_decode_bytes)
    with contextlib.suppress(OSError):
        # Where memory runs out all the same, the kernel should take the decoder and not the worker it serves.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit_memory(max_decode_bytes: int) -> None:
    """Make every allocation fail once the process has taken so much more private memory than now."""
    statm = [int(pages) * mmap.PAGESIZE for pages in Path("/proc/self/statm").read_text().split()]
    address_space_bytes, private_bytes = statm[0], statm[5]
    _lower(resource.RLIMIT_DATA, private_bytes + max_decode_bytes)
    try:
        mmap.mmap(-1, max_decode_bytes + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return
    # Some kernels count only the heap there; reserved addresses are a coarser measure.
    _lower(resource.RLIMIT_AS, address_space_bytes + max_decode_bytes)


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))
