"""Decoding in a process of its own, where a crash, a hang or unbounded memory costs one image and nothing else.

`IsolatedDecoder` keeps one child process (`decoder_child`) and sends it one file after the other, the next ones while
it still works on the first. The kernel bounds the child's time and memory. When it dies, the image it was at gets the
blame and a new child takes the next; but only a death in a new child counts, because an earlier image may have damaged
an old one, or somebody may have killed it. Timers are the image's own and count at once.

What the child answers is not trusted: it has worked on hostile bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np

from lfm_scan.errors import ImageError
from lfm_scan.imaging import ImageInfo, ImageLimits, get_policy, recognise
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.scoring.decoder_child import (
    EXIT_OUT_OF_MEMORY,
    FACTS_BYTES,
    LENGTH,
    PIXEL_BYTES,
    READY,
    WALL_PER_CPU_SECOND,
    advance,
)
from lfm_scan.scoring.prepare import Prepared
from lfm_scan.status import Status

_MAX_AHEAD: Final = 4
"""Files handed over besides the one being decoded: on a busy machine the child need not wait until we get our turn."""
_MAX_AHEAD_BYTES: Final = 32 * 2**20
_PIPE_BYTES: Final = 2**20  # the most that an ordinary user may ask for
_BUFFERS_PER_FILE: Final = 2  # its length and itself
_START_ATTEMPTS: Final = 3
_START_PAUSE_S: Final = 0.5
_START_TIMEOUT_S: Final = 120
_GRACE_S: Final = 30
"""What a child may be silent beyond its own timers, before it is taken for stopped and killed."""
_END_TIMEOUT_S: Final = 5
_CPU_CLOCK: Final = 2
"""Linux numbers the clock of a process by its id and this, CPUCLOCK_SCHED: what clock_getcpuclockid(3) returns."""

_MAX_WORDS: Final = 2000
_FACT_TYPES: Final = {
    "format": str,
    "mode": str,
    "width": int,
    "height": int,
    "lossy": bool,
    "jpeg_quality": int,
    "exif_orientation": int,
    "num_frames": int,
    "lossy_evidence": str,
}
_MOST: Final = {"jpeg_quality": 100, "exif_orientation": 8}
"""Of facts that are small; others fit 32 bits."""
# Started by -c and not by -m, to import from where the parent does and never from the working directory. Site
# customisation and PYTHON* variables have had their say by then. One process is planned as one core, and the linear
# algebra of numpy would start a thread for each.
_BOOTSTRAP: Final = """\
import json, os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
setup = json.loads(sys.argv[1])
sys.path[:] = setup.pop("path")
from lfm_scan.scoring.decoder_child import main
main(setup)
"""

_logger: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A file to prepare.

    Attributes:
        name: What the log calls it: its URI.
        data: The whole file.
        sha256: Of the file, if it is known already.
        out: (256, 256, 3) uint8, C-contiguous: where the pixels go; zeros if it has none. Default: a new array.
    """

    name: str
    data: bytes
    sha256: str | None = None
    out: np.ndarray | None = None


class IsolatedDecoder:
    """Prepares files as `prepare_bytes` does, in a child process that is bounded in time and memory.

        with IsolatedDecoder("crop256", limits) as decoder:
            for prepared in decoder.prepare_all(EncodedImage(uri, data) for uri, data in files):
                ...

    The child starts with the first file, or with `start`, and stays until `close`, over any number of `prepare_all`. A
    killed parent leaves nothing: the child ends with its pipe, or by its timers if a decoder hangs. Not thread-safe.

    Args:
        policy_id: Of the preprocess policy.
        limits: What one image may cost.

    Raises:
        ConfigError: If there is no such policy.
    """

    def __init__(self, policy_id: str, limits: ImageLimits) -> None:
        self._policy_id = get_policy(policy_id).id
        self._limits = limits
        self._child: _Child | None = None
        self._failed_starts = 0

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the present child; None without one."""
        return None if self._child is None else self._child.pid

    @property
    def cpu_s(self) -> float:
        """Seconds of a core that the present child has used; 0 without one."""
        return 0.0 if self._child is None else self._child.cpu_s

    def start(self) -> None:
        """Start the child now and do not wait for it; without this, it starts with the first file.

        Raises:
            RuntimeError: If it cannot be started.
        """
        self._current_child()

    def close(self) -> None:
        """End the child. The next file would start another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def prepare_all(self, images: Iterable[EncodedImage]) -> Iterator[Prepared]:
        """Prepare files one after the other; the next few are taken from `images` while one is being decoded.

        Args:
            images: The files.

        Yields:
            One outcome each, in order. An image that took the child's life is timeout, too_large or crashed, and the
            log names it.

        Raises:
            RuntimeError: If no child can be started: no image is at fault.
        """
        waiting: deque[_Job] = deque()
        try:
            for image in images:
                waiting.append(self._begin(image))
                while len(waiting) > _MAX_AHEAD or (len(waiting) > 1 and _size(waiting) > _MAX_AHEAD_BYTES):
                    yield self._finish(waiting)
            while waiting:
                yield self._finish(waiting)
        finally:
            if waiting:
                self.close()  # its next answers would be taken for those of other files

    def _begin(self, image: EncodedImage) -> _Job:
        try:
            fmt = recognise(image.data, self._limits)
        except ImageError as exc:
            return _Job(image, _sha256(image), ImageInfo(), Prepared.failed(exc))
        self._current_child().send(image.data)
        return _Job(image, _sha256(image), ImageInfo(format=fmt), None)  # hashed while the child works

    def _finish(self, waiting: deque[_Job]) -> Prepared:
        job = waiting[0]
        prepared = job.refused or self._receive([each for each in waiting if each.refused is None])
        if prepared.pixels is None and job.image.out is not None:
            job.image.out.fill(0)
        waiting.popleft()
        return replace(prepared, sha256=job.sha256, size_bytes=len(job.image.data))

    def _receive(self, in_flight: list[_Job]) -> Prepared:
        """Return the outcome of the first job in flight."""
        job = in_flight[0]
        pixels = np.empty((SIDE_PX, SIDE_PX, 3), np.uint8) if job.image.out is None else job.image.out
        while True:
            child = self._current_child()
            is_new = child.num_answers == 0
            facts = child.receive(pixels)
            reason = ""
            if facts is not None:
                try:
                    prepared = _parse(facts, pixels)
                except (ValueError, RecursionError) as exc:
                    reason = f"gave an answer that makes no sense ({exc})"
                else:
                    self._failed_starts = 0
                    return prepared
            death = self._bury(child, reason)
            if death is not None and (is_new or death.status == Status.TIMEOUT):
                break
            self._resend(in_flight)
        wrote = f"; it wrote {child.last_words!r}" if child.last_words else ""
        _logger.warning("%s: %s: %s%s", job.image.name, death.status, death.message, wrote)
        self._resend(in_flight[1:])
        return Prepared.failed(ImageError(death.status, death.message, job.info))

    def _bury(self, child: _Child, reason: str) -> ImageError | None:
        """Return what the end of a child says of its image; None if it had not even started.

        Raises:
            RuntimeError: If that was one time too many.
        """
        self._child = None
        returncode = child.end(at_once=bool(reason))
        if child.is_ready:
            return _death(returncode, reason or child.reason_to_kill, self._limits)
        self._failed_starts += 1
        if self._failed_starts >= _START_ATTEMPTS:
            raise RuntimeError(
                f"the decoder process did not start, {_START_ATTEMPTS} times in a row (last {_describe(returncode)}): "
                f"check the Python environment and the memory of this machine. It wrote:\n{child.last_words}"
            )
        time.sleep(_START_PAUSE_S)
        return None

    def _resend(self, jobs: list[_Job]) -> None:
        for job in jobs:
            self._current_child().send(job.image.data)

    def _current_child(self) -> _Child:
        if self._child is None:
            try:
                self._child = _Child(self._policy_id, self._limits)
            except OSError as exc:
                raise RuntimeError(f"the decoder process cannot be started: {exc}") from exc
        return self._child


@dataclass(frozen=True, slots=True)
class _Job:
    """A file that was sent, or was refused without sending it; `info` is what is known of it if its decoder dies."""

    image: EncodedImage
    sha256: str
    info: ImageInfo
    refused: Prepared | None


class _Child:
    """A decoder process and its pipes.

    Attributes:
        is_ready: Whether it has said so.
        num_answers: Frames it has sent.
        last_words: After its end, what it had written to stdout and stderr.
        reason_to_kill: Why it had to be killed, if it had to.
    """

    def __init__(self, policy_id: str, limits: ImageLimits) -> None:
        self._patience_s = WALL_PER_CPU_SECOND * limits.max_decode_seconds + _GRACE_S
        self._outgoing: list[memoryview] = []
        self._num_sent = 0
        self.is_ready, self.num_answers, self.last_words, self.reason_to_kill = False, 0, "", ""
        with contextlib.ExitStack() as until_started, contextlib.ExitStack() as in_any_case:
            requests_fd, self._requests_fd = _pipe()
            in_any_case.callback(os.close, requests_fd)
            until_started.callback(os.close, self._requests_fd)
            self._answers_fd, answers_fd = _pipe()
            in_any_case.callback(os.close, answers_fd)
            until_started.callback(os.close, self._answers_fd)
            # C libraries print. Here it harms nobody, and is at hand if they print why they abort.
            self._output_fd = os.memfd_create("decoder-output")
            until_started.callback(os.close, self._output_fd)
            fcntl.fcntl(self._output_fd, fcntl.F_SETFL, os.O_APPEND)  # it is emptied after every image
            os.set_blocking(self._requests_fd, False)
            os.set_blocking(self._answers_fd, False)
            setup = {
                "path": [entry for entry in sys.path if isinstance(entry, str)],
                "policy_id": policy_id,
                "limits": asdict(limits),
                "requests_fd": requests_fd,
                "answers_fd": answers_fd,
            }
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-P", "-c", _BOOTSTRAP, json.dumps(setup)],
                stdin=subprocess.DEVNULL,
                stdout=self._output_fd,
                stderr=self._output_fd,
                pass_fds=(requests_fd, answers_fd),
                start_new_session=True,  # Ctrl-C is for the parent; this one ends with its pipe
            )
            # Also for a decoder that nobody closed.
            self._finish = weakref.finalize(self, _finish, self._process, until_started.pop_all())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """Seconds of a core that it has used; 0 once it has ended."""
        try:
            return time.clock_gettime(~self._process.pid << 3 | _CPU_CLOCK)
        except OSError:
            return 0.0

    def send(self, data: bytes) -> None:
        """Send a file; of one that comes while another is being decoded, as much as the pipe takes."""
        self._outgoing += [memoryview(LENGTH.pack(len(data))), memoryview(data)]
        self._num_sent += 1
        if self._num_sent - self.num_answers > 1:
            self._write()
        self._exchange([])

    def receive(self, pixels: np.ndarray) -> bytes | None:
        """Return the facts of the next answer, as JSON, and put its pixels there; None if the child ends before.

        The child has all of the next file then, to work on.
        """
        facts, view = bytearray(FACTS_BYTES), memoryview(pixels.data).cast("B")
        if len(view) != PIXEL_BYTES:
            raise ValueError(f"pixels go to an array of {PIXEL_BYTES:,} bytes, this one has {len(view):,}")
        if not self._exchange([memoryview(facts), view]):
            return None
        self.num_answers += 1
        os.ftruncate(self._output_fd, 0)
        return bytes(facts).rstrip()

    def end(self, *, at_once: bool) -> int:
        """Wait for a child that has closed its pipe, or kill one; return the exit status as subprocess has it."""
        if at_once:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        words = os.pread(self._output_fd, _MAX_WORDS, max(0, os.fstat(self._output_fd).st_size - _MAX_WORDS))
        self.last_words = words.decode("utf-8", "backslashreplace").strip()
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End the child at once."""
        self._finish()

    def _exchange(self, frame: list[memoryview]) -> bool:
        """Read the frame and write what is outgoing, both as it goes, so that neither side waits for the other.

        It ends when the frame is filled and the child has all of the file that it is to work on after that: until then
        it writes nothing that it would have to wait for us to read. Files behind that one may stay outgoing.

        Returns:
            Whether the frame was filled before the child's end.
        """
        num_behind = max(0, self._num_sent - self.num_answers - 1 - bool(frame))
        ready = bytearray(len(READY))
        if frame and not self.is_ready:
            frame.insert(0, memoryview(ready))
        while frame or len(self._outgoing) > _BUFFERS_PER_FILE * num_behind:
            can_read, can_write = self._wait(bool(frame))
            if can_write:
                self._write()
            if can_read:
                num_read = os.readv(self._answers_fd, frame)
                if num_read == 0:
                    return False
                advance(frame, num_read)
                self.is_ready = self.is_ready or ready == READY
        return True

    def _wait(self, for_answer: bool) -> tuple[bool, bool]:
        """Wait until the child has written or read something; kill one that never does."""
        poll = select.poll()
        if for_answer:
            poll.register(self._answers_fd, select.POLLIN)
        if self._outgoing:
            poll.register(self._requests_fd, select.POLLOUT)
        patience_s = self._patience_s if self.is_ready else _START_TIMEOUT_S
        events = dict(poll.poll(patience_s * 1000))
        if not events:
            self.reason_to_kill = f"was silent for {patience_s:g} s, past all its timers"
            self._process.kill()
        return self._answers_fd in events, self._requests_fd in events

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                advance(self._outgoing, os.writev(self._requests_fd, self._outgoing))
            except BrokenPipeError:
                self._outgoing.clear()  # its end is seen on the other pipe, after the answers it still gave


def _finish(process: subprocess.Popen[bytes], fds: contextlib.ExitStack) -> None:
    process.kill()
    process.wait()
    fds.close()


def _pipe() -> tuple[int, int]:
    read_fd, write_fd = os.pipe()
    with contextlib.suppress(OSError):  # a user may have only so many large pipes; a small one is slower
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return read_fd, write_fd


def _size(jobs: Iterable[_Job]) -> int:
    return sum(len(job.image.data) for job in jobs)


def _sha256(image: EncodedImage) -> str:
    return image.sha256 or hashlib.sha256(image.data).hexdigest()


def _parse(facts: bytes, pixels: np.ndarray) -> Prepared:
    """Return what a child answered.

    Raises:
        ValueError: If it is nothing that an honest child answers.
    """
    answer = json.loads(facts)
    if not isinstance(answer, dict) or answer.keys() != {"info", "status", "error"}:
        raise ValueError("not the three facts expected")
    status, info, error = Status(answer["status"]), answer["info"], answer["error"]
    if not isinstance(info, dict) or info.keys() != _FACT_TYPES.keys():
        raise ValueError("other facts of the file than expected")
    for name, value in info.items():
        _check(value, _FACT_TYPES[name], _MOST.get(name, 2**31 - 1))
    _check(error, str)
    if error is None and status != Status.OK:
        raise ValueError("a failure without a reason")
    return Prepared(ImageInfo(**info), status, error, pixels if status == Status.OK else None)


def _check(value: object, kind: type, most: int = 0) -> None:
    if value is None:
        return
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} for a {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # a lone surrogate is no Parquet string
    elif isinstance(value, int) and not 0 <= value <= most:
        raise ValueError(f"{value} is out of range")


def _death(returncode: int, reason: str, limits: ImageLimits) -> ImageError:
    """Return what the end of a child means for the image it was at."""
    if reason:
        return ImageError(Status.CRASHED, f"the decoder {reason}")
    if returncode == EXIT_OUT_OF_MEMORY:
        message = f"decoding it takes more than {limits.max_decode_bytes:,} bytes of memory (--max-decode-bytes)"
        return ImageError(Status.TOO_LARGE, message)
    if returncode == -signal.SIGPROF:
        message = f"decoding it takes more than {limits.max_decode_seconds:g} s of CPU time (--max-decode-seconds)"
        return ImageError(Status.TIMEOUT, message)
    if returncode == -signal.SIGALRM:
        wall_s = WALL_PER_CPU_SECOND * limits.max_decode_seconds
        message = f"decoding it hung for {wall_s:g} s, {WALL_PER_CPU_SECOND} times --max-decode-seconds"
        return ImageError(Status.TIMEOUT, message)
    if returncode == -signal.SIGKILL:
        cause = "the decoder was killed by SIGKILL from outside, probably because the machine ran out of memory"
        remedy = f"run fewer at a time, or allow each less than {limits.max_decode_bytes:,} bytes (--max-decode-bytes)"
        return ImageError(Status.CRASHED, f"{cause}: {remedy}")
    cause = f"a fault in it, or it needs more than {limits.max_decode_bytes:,} bytes of memory (--max-decode-bytes)"
    return ImageError(Status.CRASHED, f"the decoder {_describe(returncode)}: {cause}")


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        return f"died of {signal.Signals(-returncode).name}"
    except ValueError:
        return f"died of signal {-returncode}"
