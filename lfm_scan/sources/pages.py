"""What the pages of a Parquet file claim to hold, checked before anything makes room for it.

A page's header says how many bytes it has unpacked, up to 2 GiB, and a few kilobytes unpack to as many. pyarrow takes
its word and has no limit, so the file that it reads from looks at each header as it passes by.
"""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Final

_FIRST_HEADER_BYTES: Final = 2**12
_MAX_HEADER_BYTES: Final = 2**20

# Types of Thrift's compact protocol, as far as they matter here.
_BOOLEANS: Final = (1, 2)
_BYTE: Final = 3
_INTEGERS: Final = (4, 5, 6)
_DOUBLE: Final = 7
_BINARY: Final = 8
_LISTS: Final = (9, 10)
_MAP: Final = 11
_STRUCT: Final = 12
_UUID: Final = 13


class PageError(ValueError):
    """Pages that do not lie where, or are not what, the file says."""


class PageTooLargeError(Exception):
    """A page that would be larger than allowed, packed or unpacked.

    Attributes:
        num_bytes: That it claims.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


class GuardedFile(io.RawIOBase):
    """The column chunks of a Parquet file, each to be read from its start on, as often as needed.

    Attributes:
        max_page_bytes: Reading the header of a larger page raises PageTooLargeError.

    Args:
        file: The whole file.
        chunks: First and last offset of each column chunk, as `column_chunks` gives them.
    """

    def __init__(self, file: BinaryIO, chunks: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.max_page_bytes = 0
        self._file = file
        self._position = 0
        self._starts = [start for start, _ in chunks]
        self._ends = [end for _, end in chunks]
        self._next_headers = list(self._starts)

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can seek."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to where the next read shall begin."""
        if whence == io.SEEK_SET:
            self._position = offset
        elif whence == io.SEEK_CUR:
            self._position += offset
        else:
            self._position = self._file.seek(0, io.SEEK_END) + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read what is there, once the headers in it are known to be harmless.

        Raises:
            PageTooLargeError: If one of them claims more than `max_page_bytes`.
            PageError: If this is not where the next bytes of a column lie.
        """
        self._check(self._position, self._position + len(buffer))
        self._file.seek(self._position)
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _check(self, start: int, end: int) -> None:
        """Look at each header that begins in this stretch."""
        chunk = bisect.bisect_right(self._starts, start) - 1
        if chunk < 0 or start >= self._ends[chunk]:
            raise PageError(f"a read at {start:,}, where no column is")
        if start == self._starts[chunk]:
            self._next_headers[chunk] = start
        if start > self._next_headers[chunk]:
            raise PageError(f"a read at {start:,} that skips a page")
        while self._next_headers[chunk] < min(end, self._ends[chunk]):
            at = self._next_headers[chunk]
            header_bytes, unpacked, packed = self._header(at)
            if max(unpacked, packed) > self.max_page_bytes:
                raise PageTooLargeError(max(unpacked, packed))
            self._next_headers[chunk] = at + header_bytes + packed

    def _header(self, at: int) -> tuple[int, int, int]:
        num_bytes = _FIRST_HEADER_BYTES
        while num_bytes <= _MAX_HEADER_BYTES:
            self._file.seek(at)
            data = self._file.read(num_bytes)
            try:
                return _parse_header(data)
            except IndexError:
                num_bytes = 2 * num_bytes if len(data) == num_bytes else _MAX_HEADER_BYTES + 1
        raise PageError(f"a page header at {at:,} has no end")


def column_chunks(footer: bytes) -> list[tuple[int, int]]:
    """Return first and last offset of each column chunk of a Parquet file, in the order they lie in it.

    Args:
        footer: Its metadata in Thrift's compact protocol.

    Raises:
        PageError: If it cannot be read, or two chunks overlap.
    """
    try:
        found = sorted(chunk for chunk in _chunks(_Thrift(footer)) if chunk[0] < chunk[1])
    except (IndexError, RecursionError) as exc:
        raise PageError("the metadata cannot be read") from exc
    for (_, end), (start, _) in itertools.pairwise(found):
        if start < end:
            raise PageError("column chunks overlap")
    return found


def _chunks(footer: _Thrift) -> Iterator[tuple[int, int]]:
    """Yield FileMetaData.row_groups[].columns[].meta_data, of each where it lies."""
    for _ in footer.structs_in(4):
        for _ in footer.structs_in(1):
            for _ in footer.struct_in(3):
                sizes = footer.integers({7, 9, 11})
                start, dictionary = sizes.get(9, [0])[-1], sizes.get(11, [0])[-1]
                if 0 < dictionary < start:
                    start = dictionary
                yield start, start + sizes.get(7, [0])[-1]


def _parse_header(data: bytes) -> tuple[int, int, int]:
    """Return how many bytes a page header has, and the page after it unpacked and packed.

    Raises:
        IndexError: If the data end before the header.
    """
    header = _Thrift(data)
    sizes = header.integers({2, 3})
    unpacked, packed = max(sizes.get(2, [-1])), sizes.get(3, [-1])[-1]
    if min(unpacked, packed) < 0:
        raise PageError("a page without a size")
    return header.position, unpacked, packed


class _Thrift:
    """Reads Thrift's compact protocol, and skips what nobody asks for without building it.

    Running past the end raises IndexError.
    """

    def __init__(self, data: bytes) -> None:
        self.position = 0
        self._data = data

    def integers(self, wanted: set[int]) -> dict[int, list[int]]:
        """Read a struct; return the values of its integer fields with these ids, each as often as it comes."""
        found: dict[int, list[int]] = {}
        for field, kind in self._fields():
            if field in wanted and kind in _INTEGERS:
                found.setdefault(field, []).append(self._integer())
            else:
                self._skip(kind)
        return found

    def structs_in(self, wanted: int) -> Iterator[None]:
        """Read a struct; stop at each element of its list of structs with this id, which the caller then reads."""
        for field, kind in self._fields():
            if field == wanted and kind in _LISTS:
                num_elements, element = self._list()
                for _ in range(num_elements):
                    if element == _STRUCT:
                        yield
                    else:
                        self._skip(element, in_list=True)
            else:
                self._skip(kind)

    def struct_in(self, wanted: int) -> Iterator[None]:
        """Read a struct; stop at its struct with this id, which the caller then reads."""
        for field, kind in self._fields():
            if field == wanted and kind == _STRUCT:
                yield
            else:
                self._skip(kind)

    def _fields(self) -> Iterator[tuple[int, int]]:
        field = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            field = field + delta if delta else self._integer()
            yield field, kind

    def _skip(self, kind: int, *, in_list: bool = False) -> None:
        if kind in _BOOLEANS:
            self._advance(int(in_list))  # a field's value is its type
        elif kind == _BYTE:
            self._advance(1)
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _DOUBLE:
            self._advance(8)
        elif kind == _BINARY:
            self._advance(self._varint())
        elif kind in _LISTS:
            num_elements, element = self._list()
            for _ in range(num_elements):
                self._skip(element, in_list=True)
        elif kind == _MAP:
            num_elements = self._varint()
            kinds = self._byte() if num_elements else 0
            for _ in range(num_elements):
                self._skip(kinds >> 4, in_list=True)
                self._skip(kinds & 15, in_list=True)
        elif kind == _STRUCT:
            for _, member in self._fields():
                self._skip(member)
        elif kind == _UUID:
            self._advance(16)
        else:
            raise IndexError(f"no type {kind}")

    def _list(self) -> tuple[int, int]:
        head = self._byte()
        num_elements = head >> 4
        return (self._varint() if num_elements == 15 else num_elements), head & 15

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise IndexError("a number without end")

    def _byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _advance(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self._data):
            raise IndexError("past the end")
