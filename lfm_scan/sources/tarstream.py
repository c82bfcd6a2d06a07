"""Tar archives as streams: header after header, in bounded memory whatever a header or a compressor claims.

`tarfile` reads an extended header of any size into memory, follows what it holds, and decompresses without a bound on
what comes out; it only gets to see single 512-byte blocks here.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from lfm_scan.errors import ImageError
from lfm_scan.status import Status

_BLOCK: Final = tarfile.BLOCKSIZE
_CHUNK_BYTES: Final = 2**18
_MAX_EXTENDED_BYTES: Final = 2**20
_MAX_NAME_BYTES: Final = 4096
_GZIP_MAGIC: Final = b"\x1f\x8b\x08"
_GZIP_WBITS: Final = 31  # a gzip header before the data, length and CRC-32 after them: zlib checks all three
_GZIP_READ_BYTES: Final = 2**16
_MAX_RATIO: Final = 100
_RATIO_FREE_BYTES: Final = 2 * 2**30

_NO_DATA: Final = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
# Of GNU tar: a folder's list of names, the rest of a file from another volume, old long names, a volume's label.
_NOT_FILES: Final = (*_NO_DATA, b"D", b"M", b"N", b"V")
_SPARSE: Final = b"GNU.sparse."
_SPARSE_NAME: Final = b"GNU.sparse.name"
_UNDECODED: Final = re.compile("[\x00\udc80-\udcff]")


class Readable(Protocol):
    """What a stream is read from: `read` returns as many bytes as asked for, fewer only at the end."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive, without those that only describe another.

    Attributes:
        name: As stored, a label and never a path; bytes that are not UTF-8, and NUL, are percent-encoded.
        index: Among the entries.
        offset: Of its first byte in the unpacked archive.
        size_bytes: Of its data in the archive.
        is_file: Whether it is a regular file: no folder, link, device or pipe.
        problem: Why its data are not the file's, or None.
    """

    name: str
    index: int
    offset: int
    size_bytes: int
    is_file: bool
    problem: str | None


def is_gzip(file: io.BufferedReader) -> bool:
    """Tell, by its first bytes and without moving on, whether a file is gzip."""
    return file.peek(len(_GZIP_MAGIC))[: len(_GZIP_MAGIC)] == _GZIP_MAGIC


def inflate(file: Readable) -> io.BufferedReader:
    """Return what a gzip file unpacks to, one gzip member after the other, in bounded memory.

    Reading it raises ImageError: truncated if the file breaks off, corrupt if it is damaged (a wrong checksum shows
    only at the end), too_large if it grows a hundredfold.
    """
    return io.BufferedReader(_Inflated(file), _CHUNK_BYTES)


class _Inflated(io.RawIOBase):
    def __init__(self, file: Readable) -> None:
        super().__init__()
        self._file = file
        self._inflater = zlib.decompressobj(_GZIP_WBITS)
        self._pending = b""
        self._taken_bytes = 0
        self._given_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._inflater.eof or self._begin_next():
            data = self._decompress(len(buffer))
            if data:
                self._given_bytes += len(data)
                self._check_ratio()
                buffer[: len(data)] = data
                return len(data)
            if not self._inflater.eof and not self._take():
                raise ImageError(Status.TRUNCATED, f"cut short: its gzip data break off at byte {self._taken_bytes:,}")
        return 0

    def _decompress(self, max_bytes: int) -> bytes:
        """Return up to so many bytes, also without new input: what did not fit the last time waits in the inflater."""
        before = self._inflater.copy()
        try:
            data = self._inflater.decompress(self._pending, max_bytes)
            self._pending = self._inflater.unconsumed_tail
        except zlib.error as exc:
            data = self._decompress_up_to_damage(before, max_bytes)
            if not data:
                raise ImageError(
                    Status.CORRUPT, f"damaged before byte {self._taken_bytes:,} of its gzip data: {exc}"
                ) from exc
        return data

    def _decompress_up_to_damage(self, inflater: zlib._Decompress, max_bytes: int) -> bytes:
        """Return what comes before a fault: a call that fails drops what it has made, so make ever smaller steps."""
        data = b""
        while max_bytes:
            self._inflater = inflater.copy()
            try:
                piece = inflater.decompress(self._pending, max_bytes)
            except zlib.error:
                inflater = self._inflater
                max_bytes //= 2
            else:
                self._pending = inflater.unconsumed_tail
                data += piece
        return data

    def _take(self) -> bool:
        """Read the next compressed bytes; tell whether there were any."""
        self._pending = self._file.read(_GZIP_READ_BYTES)
        self._taken_bytes += len(self._pending)
        return bool(self._pending)

    def _begin_next(self) -> bool:
        """Go on to the next gzip member, past zeros that pad the last one; tell whether there is one."""
        self._pending = self._inflater.unused_data.lstrip(b"\0")
        while not self._pending:
            if not self._take():
                return False
            self._pending = self._pending.lstrip(b"\0")
        self._inflater = zlib.decompressobj(_GZIP_WBITS)
        return True

    def _check_ratio(self) -> None:
        if self._given_bytes > _RATIO_FREE_BYTES + _MAX_RATIO * self._taken_bytes:
            raise ImageError(
                Status.TOO_LARGE,
                f"its first {self._taken_bytes:,} bytes unpack to over {self._given_bytes:,}, the limit is "
                f"{_MAX_RATIO}-fold past {_RATIO_FREE_BYTES:,}: if it is no decompression bomb, scan it unpacked",
            )


class TarStream:
    """The members of an uncompressed archive, read once from front to back.

    `members` yields them; `chunks` gives the data of the one it yielded last, what is not read is passed over. Both
    raise ImageError with what is wrong and at which byte: truncated where the archive breaks off, corrupt where it is
    damaged, unsupported where it is no tar archive. What was yielded and read until then is good.

    Args:
        file: At its start.
    """

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._position = 0
        self._num_members = 0
        self._data_left = 0
        self._padding = 0
        self._global_fields: dict[bytes, bytes] = {}

    def members(self) -> Iterator[Member]:
        """Yield the entries up to the archive's end mark, or to its end if it has none."""
        while (member := self._next_member()) is not None:
            yield member

    def chunks(self) -> Iterator[bytes]:
        """Yield the data of the last member in pieces of at most 256 KiB."""
        while self._data_left:
            data = self._read(min(self._data_left, _CHUNK_BYTES), "a member")
            self._data_left -= len(data)
            yield data

    def _next_member(self) -> Member | None:
        for _ in self.chunks():
            pass
        self._read(self._padding, "the padding of a member")
        self._padding = 0
        fields: dict[bytes, bytes] = {}
        long_name = b""
        is_described = False
        while (block := self._read_header()) is not None:
            start = self._position - _BLOCK
            header = self._parse(block, start)
            match header.type:
                case tarfile.GNUTYPE_LONGNAME:
                    long_name = _up_to_nul(self._read_extended(header.size, start))
                case tarfile.GNUTYPE_LONGLINK:
                    self._read_extended(header.size, start)
                case tarfile.XHDTYPE | tarfile.SOLARIS_XHDTYPE:
                    fields.update(_parse_pax(self._read_extended(header.size, start), start))
                case tarfile.XGLTYPE:
                    self._global_fields.update(_parse_pax(self._read_extended(header.size, start), start))
                    continue
                case _:
                    return self._begin_member(block, header, {**self._global_fields, **fields}, long_name)
            is_described = True
        if is_described:
            raise self._cut_short("an extended header, no member follows")
        return None

    def _begin_member(
        self, block: bytes, header: tarfile.TarInfo, fields: dict[bytes, bytes], long_name: bytes
    ) -> Member:
        start = self._position - _BLOCK
        size_bytes = 0 if header.type in _NO_DATA else _size_of(header, fields, start)
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE or _SPARSE in fields
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map(block, start)
        raw_name = fields.get(_SPARSE_NAME) or fields.get(b"path") or long_name or _name_in(block)
        problem = None
        if is_sparse:
            problem = "a sparse file, stored without its holes: store it whole (tar without --sparse)"
        elif len(raw_name) > _MAX_NAME_BYTES:
            problem = f"its name has {len(raw_name):,} bytes, the limit is {_MAX_NAME_BYTES:,}: give it a shorter one"
        self._data_left, self._padding = size_bytes, -size_bytes % _BLOCK
        self._num_members += 1
        return Member(
            _to_label(raw_name[:_MAX_NAME_BYTES]),
            self._num_members - 1,
            self._position,
            size_bytes,
            header.type not in _NOT_FILES,
            problem,
        )

    def _read_header(self) -> bytes | None:
        """Return the next header block, or None at the end: two blocks of zeros or, as for GNU tar, nothing more."""
        block = self._file.read(_BLOCK)
        self._position += len(block)
        if not block.strip(b"\0"):
            rest = self._file.read(_BLOCK) if block else b""
            if rest.strip(b"\0"):
                raise _damaged(self._position, "data follow a single block of zeros, the end mark is two")
            return None
        if len(block) == _BLOCK:
            return block
        if self._num_members == 0 and self._position < _BLOCK and not _is_ustar(block):
            raise ImageError(Status.UNSUPPORTED, f"not a tar archive: {len(block)} bytes, a header alone has {_BLOCK}")
        raise self._cut_short("a header")

    def _parse(self, block: bytes, start: int) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as exc:
            if start == 0 and not _is_ustar(block):
                raise ImageError(Status.UNSUPPORTED, f"not a tar archive: {exc} in its first block") from exc
            raise _damaged(start, str(exc)) from exc
        if header.size < 0:
            raise _damaged(start, f"a header claims {header.size:,} bytes")
        return header

    def _read_extended(self, size_bytes: int, start: int) -> bytes:
        if size_bytes > _MAX_EXTENDED_BYTES:
            raise _damaged(
                start, f"an extended header claims {size_bytes:,} bytes, the limit is {_MAX_EXTENDED_BYTES:,}"
            )
        return self._read(size_bytes + -size_bytes % _BLOCK, "an extended header")[:size_bytes]

    def _skip_sparse_map(self, block: bytes, start: int) -> None:
        """Pass over the blocks that go on with the list of holes that an old GNU header began."""
        goes_on = block[482]
        while goes_on:
            if self._position - start > _MAX_EXTENDED_BYTES:
                raise _damaged(start, f"a sparse file's map has over {_MAX_EXTENDED_BYTES:,} bytes, the limit")
            goes_on = self._read(_BLOCK, "a sparse file's map")[504]

    def _read(self, num_bytes: int, what: str) -> bytes:
        data = self._file.read(num_bytes)
        self._position += len(data)
        if len(data) != num_bytes:
            raise self._cut_short(what)
        return data

    def _cut_short(self, where: str) -> ImageError:
        return ImageError(
            Status.TRUNCATED, f"cut short: it ends at byte {self._position:,} of its tar data, in {where}"
        )


def _size_of(header: tarfile.TarInfo, fields: dict[bytes, bytes], start: int) -> int:
    """Return the size of a member's data: that of an extended header, else of its own."""
    text = fields.get(b"size")
    if not text:
        return header.size
    if not text.isdigit() or len(text) > 20:
        raise _damaged(start, f"an extended header claims {text[:20]!r} bytes")
    return int(text)


def _parse_pax(body: bytes, start: int) -> dict[bytes, bytes]:
    """Return the fields of an extended header that we use: path, size, and whether the file is sparse.

    Each is "LENGTH KEY=VALUE" and a line feed, LENGTH counts all of it; an empty value takes a global one back.
    """
    fields = {}
    position = 0
    while position < len(body) and body[position]:
        space = body.find(b" ", position, position + 8)
        digits = body[position : max(space, position)]  # at most 7 digits: int() refuses thousands
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not position < space < end <= len(body) or not equals or body[end - 1] != 0x0A:
            raise _damaged(start, "an extended header cannot be taken apart")
        if key.startswith(_SPARSE):
            fields[_SPARSE] = b"1"
        if key in (b"path", b"size", _SPARSE_NAME):
            fields[key] = value
        position = end
    return fields


def _name_in(block: bytes) -> bytes:
    """Return the name in a header. Only POSIX headers have a prefix: GNU tar keeps times in that place."""
    name = _up_to_nul(block[:100])
    prefix = _up_to_nul(block[345:500]) if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _is_ustar(block: bytes) -> bool:
    return block[257:262] == b"ustar"


def _up_to_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _to_label(name: bytes) -> str:
    text = name.decode("utf-8", "surrogateescape")
    return _UNDECODED.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", text)


def _damaged(start: int, reason: str) -> ImageError:
    return ImageError(
        Status.CORRUPT, f"damaged from byte {start:,} of its tar data on: {reason}; what follows is not read"
    )
