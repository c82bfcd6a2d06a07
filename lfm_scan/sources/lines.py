"""Lines and CSV records of a text file that may be hostile: streamed in bounded memory, and a bad one costs itself."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from lfm_scan.errors import SourceError
from lfm_scan.storage import ObjectInfo, Store, open_object

MAX_LINE_BYTES: Final = 2**20
"""Of one line, and of one CSV record over all its lines. URIs have some hundred bytes, captions some thousand."""

_UTF8_MARK: Final = b"\xef\xbb\xbf"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_SKIP_BYTES: Final = 2**16


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line, record or value that cannot be used.

    Attributes:
        reason: What is wrong, and what to do.
    """

    reason: str


def open_lines(store: Store, found: ObjectInfo, *, compressed: bool) -> Iterator[tuple[int, str | BadLine]]:
    """Yield the numbered lines of a stored text file, as `read_lines` does.

    Args:
        store: It lies in.
        found: The file.
        compressed: By gzip.

    Raises:
        SourceError: As `read_lines`.
        StorageError: If it cannot be read.
    """
    stream = open_object(store, found)
    return read_lines(decompressed(stream) if compressed else stream, found.uri)


def decompressed(stream: BinaryIO) -> BinaryIO:
    """Return the bytes that a gzip stream holds, as a stream."""
    return io.BufferedReader(gzip.GzipFile(fileobj=stream), _SKIP_BYTES)


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str | BadLine]]:
    r"""Yield a file's lines with their numbers, from 1, and with their ends.

    Only \n ends a line. A line of more than `MAX_LINE_BYTES` is skipped in small pieces. One that is not UTF-8 is bad
    as a whole: with other characters put in, it would name another object.

    Args:
        stream: The text, with or without a byte order mark.
        name: Of the file, for error messages.

    Raises:
        SourceError: If it is UTF-16, or compressed and damaged: what it should have held is unknown.
        StorageError: If it cannot be read.
    """
    try:
        for number, line in enumerate(_raw_lines(stream), 1):
            if number == 1 and line is not None:
                if line.startswith(_UTF16_MARKS):
                    raise SourceError(f"{name}: is UTF-16; save it as UTF-8")
                line = line.removeprefix(_UTF8_MARK)  # noqa: PLW2901
            yield number, _decode(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise SourceError(f"{name}: is not a whole gzip file ({exc}): write or upload it again") from exc


def _raw_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield lines, None for one that is too long."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_SKIP_BYTES)
        yield None


def _decode(line: bytes | None) -> str | BadLine:
    if line is None:
        return BadLine(f"the line has more than {MAX_LINE_BYTES:,} bytes")
    try:
        return line.decode()
    except UnicodeDecodeError as exc:
        return BadLine(f"byte {exc.start + 1} of the line is not UTF-8: save the file as UTF-8")


def read_records(
    lines: Iterable[tuple[int, str | BadLine]], delimiter: str
) -> Iterator[tuple[int, list[str] | BadLine]]:
    """Yield CSV records with the numbers of their first lines; quoted cells may span lines.

    What is not CSV costs one line: if a quote is never closed, the lines after it are read as records of their own. An
    empty line is an empty record.

    Args:
        lines: As `read_lines` gives them.
        delimiter: Between the cells.
    """
    source = _Rereadable(lines)
    # csv's own bound on a cell is one setting for the whole process, so it is left alone: the lines are bounded here.
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _RefusedError as exc:
            yield source.give_back(), BadLine(str(exc))
        except csv.Error as exc:
            yield source.give_back(), BadLine(f"not CSV: {exc}")
        else:
            yield source.finish(), cells


class _RefusedError(Exception):
    """A record that must not be read on."""


class _Rereadable:
    """Feeds lines to csv's reader, and remembers those of the record in hand."""

    def __init__(self, lines: Iterable[tuple[int, str | BadLine]]) -> None:
        self._lines = iter(lines)
        self._again: deque[tuple[int, str | BadLine]] = deque()
        self._taken: list[tuple[int, str | BadLine]] = []
        self._num_chars = 0

    def __iter__(self) -> _Rereadable:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        text = line[1]
        if isinstance(text, BadLine):
            raise _RefusedError(text.reason)
        self._num_chars += len(text)
        if self._num_chars > MAX_LINE_BYTES:
            raise _RefusedError(f"the record has more than {MAX_LINE_BYTES:,} characters: is a quote not closed?")
        return text

    def finish(self) -> int:
        """Begin the next record; return the number of this one's first line."""
        number = self._taken[0][0]
        self._taken.clear()
        self._num_chars = 0
        return number

    def give_back(self) -> int:
        """Begin the next record at the second line of this one; return the number of its first."""
        self._again.extendleft(reversed(self._taken[1:]))
        return self.finish()
