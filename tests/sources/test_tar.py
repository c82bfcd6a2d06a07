"""Tar archives: made by tarfile and GNU tar, made by an attacker, and damaged on the way."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import random
import shutil
import subprocess
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from lfm_scan.errors import AccessDeniedError, ChangedError, ImageError, OutageError, StorageError, UnreachableError
from lfm_scan.options import StorageConfig
from lfm_scan.sources import tar, tarstream
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.sources.tar import index_tar, read_members, read_span, spans
from lfm_scan.status import Status
from lfm_scan.storage import Fetched, LocalStore, S3Store, Store
from tests.servers import S3Server

_FORMATS: Final = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
_MAX_BYTES: Final = 2**26
_NUM_MUTATIONS: Final = 150
_NEEDS_GNU_TAR: Final = pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")

Entry = tarfile.TarInfo | tuple[str, bytes]


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def archive(*entries: Entry, mode: str = "w", fmt: int = tarfile.PAX_FORMAT) -> bytes:
    """Return an archive of files, or of entries without data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=fmt) as file:  # type: ignore[call-overload]
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                file.addfile(entry)
            else:
                header = tarfile.TarInfo(entry[0])
                header.size = len(entry[1])
                file.addfile(header, io.BytesIO(entry[1]))
    return buffer.getvalue()


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def header(
    name: bytes, size: bytes | int, kind: bytes = b"0", magic: bytes = b"ustar\x0000", prefix: bytes = b""
) -> bytes:
    """Return a header block with a right checksum around whatever it is given."""
    size = b"%011o\0" % size if isinstance(size, int) else size
    block = bytearray(name[:100].ljust(100, b"\0") + b"0000644\0" * 3 + size + b"00000000000\0" + b" " * 8 + kind)
    block = block.ljust(257, b"\0") + magic.ljust(88, b"\0") + prefix.ljust(167, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """Return an extended header."""
    body = b""
    for key, value in records:
        num_bytes = len(key) + len(value) + 3
        while len(b"%d" % num_bytes) + len(key) + len(value) + 3 != num_bytes:
            num_bytes = len(b"%d" % num_bytes) + len(key) + len(value) + 3
        body += b"%d %s=%s\n" % (num_bytes, key, value)
    return header(b"extended", len(body), kind) + padded(body)


END: Final = bytes(1024)


def index(path: Path, data: bytes, carry: Sequence[str] = (), store: Store | None = None) -> list[Input]:
    path.write_bytes(data)
    store = store or LocalStore()
    return index_tar(store, store.head(str(path)), carry)


def read(
    inputs: Sequence[Input], store: Store | None = None, max_bytes: int = _MAX_BYTES
) -> list[Fetched | ImageError]:
    return list(read_members(store or LocalStore(), inputs, max_bytes))


def names(inputs: Sequence[Input]) -> list[str]:
    """Return the members' labels, and the status of those without bytes."""
    labels = []
    for each in inputs:
        label = each.uri.partition("#")[2] if each.location else ""
        labels.append(label + (f" [{each.status}]" if each.status else ""))
    return labels


def bytes_of(outcomes: Sequence[Fetched | ImageError]) -> list[bytes | str]:
    """Return what was fetched, and the status where nothing was."""
    return [each.data if isinstance(each, Fetched) else str(each.status) for each in outcomes]


class Recording(LocalStore):
    """A local store that notes every stretch it is asked for, and lets a test damage or refuse it."""

    def __init__(self, answer: Callable[[int, bytes], bytes] = lambda _, data: data) -> None:
        self._answer = answer
        self.stretches: list[tuple[int, int]] = []

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        self.stretches.append((start, num_bytes))
        return self._answer(len(self.stretches), super().get_range(uri, start, num_bytes, etag, version_id))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]


def refuse(error: Exception) -> Callable[[int, bytes], bytes]:
    def answer(_: int, __: bytes) -> bytes:
        raise error

    return answer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shard.tar"


# --- What tarfile and GNU tar write ---


@pytest.mark.parametrize("fmt", list(_FORMATS))
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_format_gives_back_every_byte(path: Path, fmt: str, mode: str) -> None:
    long_name = "/".join(["folder" * 8] * (4 if fmt == "ustar" else 40))
    files = {"a.jpg": noise(1), f"{long_name}/b.png": noise(513), "empty.webp": b"", "c.gif": noise(70_000)}
    data = archive(*files.items(), mode=mode, fmt=_FORMATS[fmt])
    inputs = index(path, data)
    facts = LocalStore().head(str(path))
    assert [each.uri for each in inputs] == [f"{path}#{name}" for name in files]
    assert [each.size_bytes for each in inputs] == [1, 513, 0, 70_000]
    assert [each.crc32 for each in inputs] == [zlib.crc32(each) for each in files.values()]
    assert {(each.location, each.last_modified, each.status) for each in inputs} == {
        (str(path), facts.last_modified, None)
    }
    if mode == "w":
        assert {each.kind for each in inputs} == {Kind.TAR}
        for each, expected in zip(inputs, files.values(), strict=True):
            assert each.position is not None
            assert data[each.position : each.position + len(expected)] == expected
    else:
        assert [(each.kind, each.position) for each in inputs] == [(Kind.TAR_GZ, number) for number in range(4)]
    fetched = read(inputs)
    assert bytes_of(fetched) == list(files.values())
    infos = [each.info for each in fetched if isinstance(each, Fetched)]
    assert [(each.uri, each.size_bytes, each.last_modified) for each in infos] == [
        (each.uri, each.size_bytes, facts.last_modified) for each in inputs
    ]


@_NEEDS_GNU_TAR
@pytest.mark.parametrize("fmt", ["v7", "oldgnu", "gnu", "ustar", "posix"])
@pytest.mark.parametrize("flags", ["-c", "-cz"])
def test_what_gnu_tar_writes_gives_back_every_byte(tmp_path: Path, fmt: str, flags: str) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    files = {"0.jpg": noise(1000), "1.png": noise(0), "é.webp": noise(512), f"sub/{'n' * 80}.jpg": noise(9)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "link.jpg").symlink_to("0.jpg")
    (folder / "same.jpg").hardlink_to(folder / "0.jpg")
    path = tmp_path / "a.tar"
    listed = [*files, "link.jpg", "same.jpg", "sub"]
    subprocess.run(["tar", flags, "-f", str(path), f"--format={fmt}", "-C", str(folder), *listed], check=True)
    found = index_tar(LocalStore(), LocalStore().head(str(path)))
    assert names(found) == list(files)
    assert bytes_of(read(found)) == list(files.values())


@_NEEDS_GNU_TAR
@pytest.mark.parametrize("fmt", ["gnu", "posix"])
def test_times_in_an_incremental_archive_are_no_part_of_its_names(tmp_path: Path, fmt: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"data")
    path = tmp_path / "a.tar"
    command = ["tar", "-c", "-f", path, f"--format={fmt}", f"--listed-incremental={path}.snar", "-C", tmp_path, "in"]
    subprocess.run([str(each) for each in command], check=True)
    found = index_tar(LocalStore(), LocalStore().head(str(path)))
    assert names(found) == ["in/a.jpg"]
    assert bytes_of(read(found)) == [b"data"]


@_NEEDS_GNU_TAR
@pytest.mark.parametrize("fmt", ["gnu", "posix"])
@pytest.mark.parametrize("num_holes", [1, 100])
def test_a_sparse_file_is_unsupported_and_the_next_file_is_not(tmp_path: Path, fmt: str, num_holes: int) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        for hole in range(num_holes):
            file.seek((hole + 1) * 65536)
            file.write(b"data")
    (tmp_path / "next.jpg").write_bytes(b"whole")
    path = tmp_path / "a.tar"
    command = ["tar", "-c", "-f", path, f"--format={fmt}", "--sparse", "-C", tmp_path, "holes.jpg", "next.jpg"]
    subprocess.run([str(each) for each in command], check=True)
    found = index_tar(LocalStore(), LocalStore().head(str(path)))
    assert names(found) == ["holes.jpg [unsupported]", "next.jpg"]
    assert "sparse" in str(found[0].error)
    assert bytes_of(read(found)) == ["unsupported", b"whole"]


def test_five_thousand_members_take_a_request_for_every_eight_mib(path: Path) -> None:
    files = [(f"{number:05}.jpg", noise(number % 5000, number)) for number in range(5000)]
    found = index(path, archive(*files))
    store = Recording()
    assert bytes_of(read(found, store)) == [data for _, data in files]
    assert len(store.stretches) == len(spans(found)) == 2
    assert max(num_bytes for _, num_bytes in store.stretches) <= 8 * 2**20


def test_local_files_and_s3_give_the_same(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    remote = S3Store(StorageConfig(endpoint_url=s3_server.endpoint_url))
    whole = archive(("a.jpg", noise(300_000)), ("a.txt", b"a caption"), ("b/ü.png", noise(10)))
    contents = {"plain.tar": whole, "packed.tar.gz": gzip.compress(whole, mtime=0), "cut.tar": whole[:200_000]}
    for name, data in contents.items():
        s3_server.put(s3_bucket, name, data)
        (tmp_path / name).write_bytes(data)
        found = index_tar(remote, remote.head(f"s3://{s3_bucket}/{name}"), ["txt"])
        local = index_tar(LocalStore(), LocalStore().head(str(tmp_path / name)), ["txt"])
        assert names(found) == names(local)
        assert {each.etag for each in found} == {hashlib.md5(data).hexdigest()}
        facts = ("kind", "position", "size_bytes", "crc32", "error", "carried")
        assert [[getattr(each, fact) for fact in facts] for each in found] == [
            [getattr(each, fact) for fact in facts] for each in local
        ]
        assert bytes_of(read(found, remote)) == bytes_of(read(local))


def test_an_s3_archive_that_was_replaced_gives_error_rows(s3_server: S3Server, s3_bucket: str) -> None:
    remote = S3Store(StorageConfig(endpoint_url=s3_server.endpoint_url))
    packers: dict[str, Callable[[bytes], bytes]] = {"a.tar": bytes, "a.tgz": gzip.compress}
    for name, pack in packers.items():
        uri = f"s3://{s3_bucket}/{name}"
        s3_server.put(s3_bucket, name, pack(archive(("a.jpg", b"old"), ("b.jpg", b"kept"))))
        found = index_tar(remote, remote.head(uri))
        s3_server.put(s3_bucket, name, pack(archive(("a.jpg", b"new"), ("b.jpg", b"kept"))))
        outcomes = read(found, remote)
        assert bytes_of(outcomes) == ["error", "error"]
        assert "changed since it was planned" in str(outcomes[0])
        s3_server.client().delete_object(Bucket=s3_bucket, Key=name)
        assert bytes_of(read(found, remote)) == ["missing", "missing"]


# --- Which members are inputs ---


def test_links_folders_devices_and_pipes_are_no_inputs(path: Path) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    others = [entry(f"{number}.jpg", kind, "/etc/passwd") for number, kind in enumerate(kinds)]
    found = index(path, archive(*others, ("real.jpg", b"data"), ("real/x", b"more"), mode="w:gz"))
    assert [(each.uri, each.position) for each in found] == [(f"{path}#real.jpg", 6), (f"{path}#real/x", 7)]
    assert bytes_of(read(found)) == [b"data", b"more"]


def test_a_link_has_no_data_whatever_size_it_claims(path: Path) -> None:
    found = index(path, header(b"link.jpg", 1000, b"2") + header(b"a.jpg", 4) + padded(b"data") + END)
    assert names(found) == ["a.jpg"]
    assert bytes_of(read(found)) == [b"data"]


def test_a_name_is_a_label_and_never_a_path(path: Path) -> None:
    labels = ["../../etc/passwd", "/etc/shadow.jpg", "./a.jpg", "C:\\x.png", "a//b.jpg", "line\nfeed.jpg", "#?%41.jpg"]
    found = index(path, archive(*((label, label.encode()) for label in labels)))
    assert [each.uri for each in found] == [f"{path}#{label}" for label in labels]
    assert bytes_of(read(found)) == [label.encode() for label in labels]
    assert [each.name for each in path.parent.iterdir()] == ["shard.tar"]


def test_bytes_that_are_no_utf8_are_percent_encoded_and_so_is_nul(path: Path) -> None:
    data = (
        header(b"caf\xe9.png", 0)
        + header("café.png".encode(), 0)
        + pax((b"path", b"nul\0.png"))
        + header(b"x", 0)
        + pax((b"path", b"\xed\xa0\x80.png"))
        + header(b"x", 0)
    )
    assert names(index(path, data + END)) == ["caf%E9.png", "café.png", "nul%00.png", "%ED%A0%80.png"]


def test_every_uri_is_unique_whatever_the_names(path: Path) -> None:
    labels = ["a#2", "a", "a", "a", "a#2", "a#3", "caf%E9"]
    data = b"".join(header(label.encode(), 0) for label in labels) + header(b"caf\xe9", 0) + END
    found = index(path, data)
    assert names(found) == ["a#2", "a", "a#3", "a#4", "a#2#2", "a#3#2", "caf%E9", "caf%E9#2"]


def test_a_name_over_the_limit_is_cut_and_unsupported(path: Path) -> None:
    found = index(path, archive(("n" * 5000 + ".jpg", b"data"), ("b.jpg", b"more")))
    assert names(found) == ["n" * 4096 + " [unsupported]", "b.jpg"]
    assert "5,004 bytes, the limit is 4,096" in str(found[0].error)
    assert bytes_of(read(found)) == ["unsupported", b"more"]


def test_sizes_are_read_in_octal_in_base_256_and_from_extended_headers(path: Path) -> None:
    members = {
        header(b"v7.jpg", 2, b"\0", magic=b""): b"v7",
        header(b"octal.jpg", 5): b"octal",
        header(b"base-256.jpg", b"\x80" + (8).to_bytes(11, "big")): b"base-256",
        pax((b"size", b"3"), (b"mtime", b"1.5")) + header(b"pax.jpg", 0): b"pax",
        pax((b"size", b"6"), kind=b"g") + header(b"global.jpg", 0): b"global",
        pax((b"size", b"")) + header(b"own.jpg", 3): b"own",
        header(b"global-again.jpg", 0): b"global",
    }
    found = index(path, b"".join(head + padded(data) for head, data in members.items()) + END)
    assert names(found) == [
        f"{name}.jpg" for name in ("v7", "octal", "base-256", "pax", "global", "own", "global-again")
    ]
    assert bytes_of(read(found)) == list(members.values())


def test_a_prefix_belongs_to_the_name_in_posix_headers_only(path: Path) -> None:
    data = (
        header(b"a.jpg", 0, prefix=b"folder") + header(b"b.jpg", 0, magic=b"ustar  \0", prefix=b"14602304203\0") + END
    )
    assert names(index(path, data)) == ["folder/a.jpg", "b.jpg"]


def test_a_member_of_unknown_type_is_a_file(path: Path) -> None:
    found = index(path, header(b"a.jpg", 4, b"Z") + padded(b"data") + header(b"V", 0, b"V") + END)
    assert names(found) == ["a.jpg"]
    assert bytes_of(read(found)) == [b"data"]


# --- WebDataset samples ---


def test_side_data_of_a_sample_are_no_inputs_but_its_images_carry_them(path: Path) -> None:
    data = archive(
        ("s/0.jpg", b"image"),
        ("s/0.cls", b"7"),
        ("s/0.caption.txt", "ein Hündchen".encode()),
        ("s/0.mask.PNG", b"mask"),
        ("s/1.TXT", b"bad \xff"),
        ("s/1.WebP", b"image"),
        ("t/1.txt", b"not of s/1"),
        ("u/1.jpg", b"image"),
        mode="w:gz",
    )
    found = index(path, data, ["cls", "caption.txt", ".txt"])
    assert [(name, dict(each.carried)) for name, each in zip(names(found), found, strict=True)] == [
        ("s/0.jpg", {"cls": "7", "caption.txt": "ein Hündchen", ".txt": None}),
        ("s/0.mask.PNG", {"cls": "7", "caption.txt": "ein Hündchen", ".txt": None}),
        ("s/1.WebP", {"cls": None, "caption.txt": None, ".txt": "bad \ufffd"}),
        ("t/1.txt", {"cls": None, "caption.txt": None, ".txt": "not of s/1"}),
        ("u/1.jpg", {"cls": None, "caption.txt": None, ".txt": None}),
    ]
    assert bytes_of(read(found)) == [b"image", b"mask", b"image", b"not of s/1", b"image"]


def test_a_text_of_64_kib_is_carried_and_a_longer_one_is_not(path: Path) -> None:
    data = archive(("0.jpg", b""), ("0.txt", b"x" * 2**16), ("1.jpg", b""), ("1.txt", b"x" * (2**16 + 1)))
    assert [each.carried["txt"] for each in index(path, data, ["txt"])] == ["x" * 2**16, None]


def test_hidden_files_have_no_sample_in_common(path: Path) -> None:
    data = archive(
        ("d/.jpg", b""), ("d/.hidden", b""), ("d/._0.jpg", b""), ("d/0.jpg", b""), ("d/0", b""), ("d/1", b"")
    )
    assert names(index(path, data)) == ["d/.jpg", "d/.hidden", "d/._0.jpg", "d/0.jpg", "d/1"]


def test_side_data_before_an_image_that_is_cut_off_stay_side_data(path: Path) -> None:
    data = archive(("0.jpg", b"data"), ("1.cls", b"7"), ("1.jpg", noise(3000)))
    assert names(index(path, data[:3000])) == ["0.jpg", " [truncated]"]


# --- Broken archives ---


def test_an_archive_cut_short_in_a_member_gives_its_whole_members_and_one_row_for_the_rest(path: Path) -> None:
    data = archive(("a.jpg", noise(1000)), ("b.jpg", noise(2000)), ("c.jpg", b"never seen"))
    found = index(path, data[:3000])
    assert names(found) == ["a.jpg", " [truncated]"]
    assert found[1] == dataclasses.replace(
        Input.of(LocalStore().head(str(path))),
        status=Status.TRUNCATED,
        error="cut short: it ends at byte 3,000 of its tar data, in a member",
    )
    assert bytes_of(read(found[:1])) == [noise(1000)]


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, [" [empty]"]),
        (300, [" [truncated]"]),
        (512, [" [truncated]"]),
        (1512, ["a.jpg", " [truncated]"]),  # all data, no padding
        (1536, ["a.jpg"]),  # no end mark: GNU tar takes it
        (1600, ["a.jpg", " [truncated]"]),  # in a header
        (2048, ["a.jpg", " [truncated]"]),  # after an extended header's header
        (2560, ["a.jpg", " [truncated]"]),  # after an extended header
        (3584, ["a.jpg", "ü.jpg"]),
        (3600, ["a.jpg", "ü.jpg"]),  # in the end mark
        (4096, ["a.jpg", "ü.jpg"]),  # half an end mark
    ],
)
def test_wherever_an_archive_is_cut_its_whole_members_are_inputs(
    path: Path, num_bytes: int, expected: list[str]
) -> None:
    data = archive(("a.jpg", noise(1000)), ("ü.jpg", noise(512)))
    assert names(index(path, data[:num_bytes])) == expected


def test_a_damaged_header_ends_the_archive_there(path: Path) -> None:
    data = archive(("a.jpg", noise(1000)), ("b.jpg", noise(2000)))
    found = index(path, flipped(data, 1536 + 3))
    assert names(found) == ["a.jpg", " [corrupt]"]
    assert found[1].error == "damaged from byte 1,536 of its tar data on: bad checksum; what follows is not read"


def test_data_after_a_single_block_of_zeros_are_not_passed_over_in_silence(path: Path) -> None:
    whole = archive(("a.jpg", b"data"))
    assert names(index(path, header(b"b.jpg", 0) + bytes(512) + whole)) == ["b.jpg", " [corrupt]"]
    assert names(index(path, header(b"b.jpg", 0) + END + whole)) == ["b.jpg"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", Status.EMPTY),
        (END, Status.EMPTY),
        (archive(entry("folder", tarfile.DIRTYPE), entry("a.jpg", tarfile.SYMTYPE, "b.jpg")), Status.EMPTY),
        (gzip.compress(b"", mtime=0), Status.EMPTY),
        (b"a text", Status.UNSUPPORTED),
        (b"\x89PNG\r\n\x1a\n" + noise(5000), Status.UNSUPPORTED),
        (gzip.compress(noise(5000)), Status.UNSUPPORTED),
        (flipped(header(b"a.jpg", 0), 0), Status.CORRUPT),
        (b"\x1f\x8b\x08" + noise(5000), Status.CORRUPT),
        (b"\x1f\x8b\x08", Status.TRUNCATED),
        (header(b"a.jpg", b"\xff" * 12), Status.CORRUPT),
        (header(b"a.jpg", b"not a number"), Status.CORRUPT),
        (header(b"a.jpg", b"\x80" + b"\xff" * 11), Status.TRUNCATED),
        (pax((b"size", b"-1")) + header(b"a.jpg", 0), Status.CORRUPT),
        (pax((b"size", b"9" * 5000)) + header(b"a.jpg", 0), Status.CORRUPT),
        (header(b"x", 9, b"x") + padded(b"3 a=b\n---") + header(b"a.jpg", 0), Status.CORRUPT),
        (header(b"x", 9, b"x") + padded(b"999 a=b\n-") + header(b"a.jpg", 0), Status.CORRUPT),
        (header(b"x", 6, b"x") + padded(b"0 a=b\n") + header(b"a.jpg", 0), Status.CORRUPT),
        (header(b"x", 12, b"x") + padded(b"6 a=b\n0 a=b\n") + header(b"a.jpg", 0), Status.CORRUPT),
        (header(b"x", 12, b"x") + padded(b"6 a=b\n1 a=b\n") + header(b"a.jpg", 0), Status.CORRUPT),
        (header(b"x", 9000, b"x") + padded(b"9" * 9000) + header(b"a.jpg", 0), Status.CORRUPT),
        (header(b"L", 2**20 + 1, b"L") + bytes(2**21), Status.CORRUPT),
    ],
)
def test_what_holds_no_input_gives_one_row_for_itself(path: Path, data: bytes, status: Status) -> None:
    (found,) = index(path, data)
    assert (found.uri, found.status, found.size_bytes) == (str(path), status, len(data))
    assert found.error


def test_gzip_data_that_break_off_give_what_was_whole(path: Path) -> None:
    data = gzip.compress(archive(("a.jpg", noise(300_000)), ("b.jpg", noise(300_000, 1))))
    found = index(path, data[:400_000])
    assert names(found) == ["a.jpg", " [truncated]"]
    assert bytes_of(read(found[:1])) == [noise(300_000)]


def test_gzip_data_with_a_wrong_checksum_give_their_members_and_a_warning_row(path: Path) -> None:
    data = gzip.compress(archive(("a.jpg", noise(3000))))
    found = index(path, flipped(data, len(data) - 8))
    assert names(found) == ["a.jpg", " [corrupt]"]
    assert "incorrect data check" in str(found[1].error)
    assert bytes_of(read(found[:1])) == [noise(3000)]


def test_members_before_damage_in_gzip_data_are_kept(path: Path) -> None:
    files = [(f"{number}.jpg", noise(10_000, number)) for number in range(6)]
    packer = zlib.compressobj(wbits=31)
    no_block = b"\x07"  # a deflate block of a type that there is not
    packed = packer.compress(archive(*files)[: 6 * 10_752]) + packer.flush(zlib.Z_FULL_FLUSH) + no_block
    found = index(path, packed + noise(1000))
    assert names(found) == [*(f"{number}.jpg" for number in range(6)), " [corrupt]"]
    assert "invalid block type" in str(found[6].error)
    assert bytes_of(read(found[:6])) == [data for _, data in files]


def test_gzip_data_may_come_in_several_members_and_be_padded(path: Path) -> None:
    data = archive(("a.jpg", noise(3000)), ("b.jpg", noise(3000, 1)))
    packed = b"".join(gzip.compress(data[start : start + 700], mtime=0) for start in range(0, len(data), 700))
    found = index(path, packed + bytes(100_000))
    assert names(found) == ["a.jpg", "b.jpg"]
    assert bytes_of(read(found)) == [noise(3000), noise(3000, 1)]
    assert names(index(path, packed + b"trailing")) == ["a.jpg", "b.jpg", " [corrupt]"]


# --- Bounds ---


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that work took."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"X"])
def test_an_extended_header_is_not_read_into_memory_because_it_claims_a_gib(path: Path, kind: bytes) -> None:
    claim = header(b"a.jpg", 4) + padded(b"data") + header(b"huge", 2**30, kind)
    path.write_bytes(gzip.compress(claim + bytes(2**26)))
    found: list[Input] = []
    peak = peak_bytes(lambda: found.extend(index_tar(LocalStore(), LocalStore().head(str(path)))))
    assert names(found) == ["a.jpg", " [corrupt]"]
    assert "claims 1,073,741,824 bytes, the limit is 1,048,576" in str(found[1].error)
    assert peak < 2**24


def test_a_gib_of_zeros_is_indexed_and_passed_over_in_little_memory(path: Path) -> None:
    zeros = gzip.compress(bytes(2**20), 1)
    bomb = gzip.compress(header(b"bomb.jpg", 2**30)) + 1024 * zeros + gzip.compress(archive(("b.jpg", b"data")))
    path.write_bytes(bomb)
    assert len(bomb) < 2**23
    outcomes: list[Fetched | ImageError] = []

    def scan() -> None:
        found = index_tar(LocalStore(), LocalStore().head(str(path)))
        assert [each.size_bytes for each in found] == [2**30, 4]
        outcomes.extend(read(found))

    assert peak_bytes(scan) < 2**25
    assert bytes_of(outcomes) == ["too_large", b"data"]


def test_what_unpacks_a_hundredfold_is_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarstream, "_RATIO_FREE_BYTES", 2**20)
    data = archive(("a.jpg", noise(5000)), ("zeros.jpg", bytes(2**26)), mode="w:gz")
    found = index(path, data)
    assert names(found) == ["a.jpg", " [too_large]"]
    assert "the limit is 100-fold" in str(found[1].error)


def test_an_index_takes_only_so_much_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_MAX_INDEX_BYTES", 20_000)
    found = index(path, archive(*((f"{number}.jpg", b"") for number in range(100))))
    num_kept = len(found) - 1
    assert 10 < num_kept < 40
    assert names(found) == [f"{number}.jpg" for number in range(num_kept)] + [" [too_large]"]
    assert f"its first {num_kept} members takes 20,000 bytes" in str(found[-1].error)
    carried = index(path, archive(("0.jpg", b""), ("0.txt", b"x" * 20_000), ("1.jpg", b"")), ["txt"])
    assert names(carried) == ["0.jpg", " [too_large]"]


# --- Reading ---


def test_spans_bridge_small_gaps_and_end_at_eight_mib() -> None:
    def at(position: int, size_bytes: int) -> Input:
        return Input(uri=str(position), kind=Kind.TAR, position=position, size_bytes=size_bytes)

    mib = 2**20
    inputs = [
        *(at(512, 100), at(1024, 0), at(1024 + 65536, 10)),
        at(1024 + 65536 + 10 + 65537, 10),
        *(at(2 * mib, 5 * mib), at(7 * mib, 3 * mib)),
        at(10 * mib, 1),
        at(11 * mib, 20 * mib),
        at(31 * mib, 1),
        at(512, 100),
    ]
    assert [[int(each.uri) for each in span] for span in spans(inputs)] == [
        [512, 1024, 66560],
        [132107],
        [2 * mib, 7 * mib],
        [10 * mib],
        [11 * mib],
        [31 * mib],
        [512],
    ]
    assert spans([]) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_over_the_limit_is_too_large_and_not_fetched(path: Path, mode: str) -> None:
    found = index(path, archive(("a.jpg", noise(2000)), ("b.jpg", noise(5000)), mode=mode))
    outcomes = read(found, max_bytes=4999)
    assert bytes_of(outcomes) == [noise(2000), "too_large"]
    assert str(outcomes[1]) == "too_large: 5,000 bytes, the limit is 4,999 (--max-image-bytes)"
    store = Recording()
    assert bytes_of(read(found[1:], store, max_bytes=4999)) == ["too_large"]
    assert store.stretches == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_some_of_the_inputs_can_be_read_without_the_others(path: Path, mode: str) -> None:
    files = [(f"{number}.jpg", noise(100_000, number)) for number in range(10)]
    found = index(path, archive(*files, mode=mode))
    assert bytes_of(read(found[3:9:2])) == [data for _, data in files[3:9:2]]


def test_a_stretch_damaged_on_the_way_is_fetched_again_member_by_member(path: Path) -> None:
    files = [(f"{number}.jpg", noise(1000, number)) for number in range(3)]
    found = index(path, archive(*files))
    store = Recording(lambda call, data: flipped(data, 1800) if call == 1 else data)
    assert bytes_of(read_span(store, found, _MAX_BYTES)) == [data for _, data in files]
    assert store.stretches == [(512, 4072), (2048, 1000)]


def test_a_member_whose_bytes_stay_others_is_an_error(path: Path) -> None:
    found = index(path, archive(("a.jpg", noise(1000)), ("b.jpg", noise(1000, 1))))
    path.write_bytes(flipped(path.read_bytes(), 2100))
    store = Recording()
    outcomes = read(found, store)
    assert bytes_of(outcomes) == [noise(1000), "error"]
    assert "are not those that were planned" in str(outcomes[1])
    assert store.stretches == [(512, 2536), *[(2048, 1000)] * 3]


def test_a_stretch_that_cannot_be_read_is_tried_member_by_member(path: Path) -> None:
    def answer(call: int, data: bytes) -> bytes:
        if call in (1, 3):
            raise StorageError("bad sector")
        return data

    found = index(path, archive(("a.jpg", b"a"), ("b.jpg", b"b"), ("c.jpg", b"c")))
    assert bytes_of(read(found, Recording(answer))) == [b"a", "error", b"c"]


def test_a_file_cut_short_since_it_was_planned_still_gives_its_first_members(path: Path) -> None:
    found = index(path, archive(("a.jpg", noise(1000)), ("b.jpg", noise(1000, 1))))
    path.write_bytes(path.read_bytes()[:2500])
    outcomes = read(found)
    assert bytes_of(outcomes) == [noise(1000), "error"]
    assert "changed since it was planned" in str(outcomes[1])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AccessDeniedError("no"), "denied"),
        (UnreachableError("no answer"), "timeout"),
        (ChangedError("new"), "error"),
    ],
)
def test_what_the_store_refuses_gives_every_input_its_row(path: Path, mode: str, error: Exception, status: str) -> None:
    found = index(path, archive(("a.jpg", b"a"), ("b.jpg", b"b"), mode=mode))
    store = Recording(refuse(error))
    assert bytes_of(read(found, store)) == [status, status]
    # Only a file that is not what it was may still hold some of them: each is tried alone.
    assert len(store.stretches) == (3 if mode == "w" and isinstance(error, ChangedError) else 1)
    refused = index_tar(Recording(refuse(error)), LocalStore().head(str(path)))
    assert [(each.uri, each.status) for each in refused] == [(str(path), status)]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_that_is_gone_is_missing(path: Path, mode: str) -> None:
    found = index(path, archive(("a.jpg", b"a"), mode=mode))
    listed = LocalStore().head(str(path))
    path.unlink()
    assert bytes_of(read(found)) == ["missing"]
    for each in (listed, dataclasses.replace(listed, size_bytes=None)):
        assert names(index_tar(LocalStore(), each)) == [" [missing]"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_outage_is_nobodys_row(path: Path, mode: str) -> None:
    found = index(path, archive(("a.jpg", b"a"), mode=mode))
    silent = Recording(refuse(OutageError("silence")))
    with pytest.raises(OutageError):
        read(found, silent)
    with pytest.raises(OutageError):
        index_tar(silent, LocalStore().head(str(path)))


def test_a_failure_midway_keeps_the_members_before_it(path: Path) -> None:
    def answer(call: int, data: bytes) -> bytes:
        if call == 2:
            raise UnreachableError("no answer")
        return data

    found = index(path, archive(("a.jpg", noise(1000)), ("b.jpg", noise(9 * 2**20))), store=Recording(answer))
    assert names(found) == ["a.jpg", " [timeout]"]


def test_a_compressed_archive_damaged_on_the_way_is_unpacked_again(path: Path) -> None:
    files = [(f"{number}.jpg", noise(100_000, number)) for number in range(4)]
    found = index(path, archive(*files, mode="w:gz"))
    store = Recording(lambda call, data: flipped(data, 250_000) if call <= 2 else data)
    assert bytes_of(read(found, store)) == [data for _, data in files]
    assert len(store.stretches) == 3


def test_a_compressed_archive_damaged_for_good_gives_its_good_members_and_errors(path: Path) -> None:
    files = [(f"{number}.jpg", noise(100_000, number)) for number in range(4)]
    found = index(path, archive(*files, mode="w:gz"))
    path.write_bytes(path.read_bytes()[:250_000])
    outcomes = read(found)
    assert bytes_of(outcomes) == [files[0][1], files[1][1], "error", "error"]
    assert "not as it was planned: cut short" in str(outcomes[2])


def test_a_compressed_member_that_is_another_now_is_an_error_and_the_next_is_not(path: Path) -> None:
    found = index(path, archive(("a.jpg", b"same"), ("b.jpg", b"old"), ("c.jpg", b"1"), ("d.jpg", b"d"), mode="w:gz"))
    path.write_bytes(archive(("a.jpg", b"same"), ("b.jpg", b"new"), ("c.jpg", b"longer"), ("d.jpg", b"d"), mode="w:gz"))
    assert bytes_of(read(found)) == [b"same", "error", "error", b"d"]


def test_a_compressed_member_that_has_grown_is_not_read_into_memory(path: Path) -> None:
    found = index(path, archive(("a.jpg", b"small"), ("b.jpg", b"b"), mode="w:gz"))
    path.write_bytes(archive(("a.jpg", bytes(2**26)), ("b.jpg", b"b"), mode="w:gz"))
    outcomes: list[Fetched | ImageError] = []
    assert peak_bytes(lambda: outcomes.extend(read(found))) < 2**24
    assert bytes_of(outcomes) == ["error", b"b"]


# --- Verification of the index itself ---


def test_an_index_of_bytes_damaged_on_the_way_is_made_again(path: Path) -> None:
    data = archive(("a.jpg", noise(1000)), ("b.jpg", noise(1000, 1)))
    expected = index(path, data)
    etag = hashlib.md5(data).hexdigest()
    listed = dataclasses.replace(LocalStore().head(str(path)), etag=etag)
    for position in (3, 600, len(data) - 1):
        store = Recording(lambda call, data, at=position: flipped(data, at) if call == 1 else data)  # type: ignore[misc]
        assert index_tar(store, listed) == [dataclasses.replace(each, etag=etag) for each in expected]
        assert len(store.stretches) == 2


def test_an_etag_that_only_looks_like_an_md5_is_trusted_once_two_reads_agree(path: Path) -> None:
    path.write_bytes(archive(("a.jpg", noise(1000))))
    store = Recording()
    found = index_tar(store, dataclasses.replace(LocalStore().head(str(path)), etag="0" * 32))
    assert names(found) == ["a.jpg"]
    assert len(store.stretches) == 2


def test_three_reads_that_all_differ_are_an_error(path: Path) -> None:
    path.write_bytes(archive(("a.jpg", noise(1000))))
    store = Recording(lambda call, data: flipped(data, 600 + call))
    found = index_tar(store, dataclasses.replace(LocalStore().head(str(path)), etag="0" * 32))
    assert names(found) == [" [error]"]


# --- Fuzz ---


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return a damaged copy: bytes changed anywhere or in headers, a part cut out, doubled, or the end lost."""
    damaged = bytearray(data)
    match chance.randrange(5):
        case 0:
            for _ in range(chance.choice((1, 5, 50))):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            for _ in range(chance.choice((0, 40))):
                position = chance.randrange(len(damaged))
                if chr(damaged[position]).isdigit():
                    damaged[position] = chance.choice(b"0129")
        case 1:  # with a right checksum, so that the damage gets past it
            start = 512 * chance.randrange(len(damaged) // 512)
            for _ in range(chance.choice((1, 3))):
                damaged[start + chance.choice((*range(100), *range(124, 136), 156, *range(257, 512)))] = chance.choice(
                    (0, 0x30, 0x37, 0x53, 0x78, 0x80, 0xFF)
                )
            damaged[start + 148 : start + 156] = b" " * 8
            damaged[start + 148 : start + 156] = b"%06o\0 " % sum(damaged[start : start + 512])
        case 2:
            start = chance.randrange(len(damaged))
            del damaged[start : start + chance.choice((1, 512, 700))]
        case 3:
            start = 512 * chance.randrange(len(damaged) // 512)
            damaged[start:start] = damaged[start : start + 1024]
        case 4:
            del damaged[chance.randrange(len(damaged)) :]
    return bytes(damaged)


@pytest.mark.parametrize("fmt", list(_FORMATS))
@pytest.mark.parametrize("is_packed", [False, True])
def test_whatever_the_damage_an_index_is_made_and_what_it_promises_can_be_read(
    path: Path, fmt: str, is_packed: bool
) -> None:
    name = "long/" * 20 + "name"
    whole = archive(
        (f"{name}.jpg", noise(700)),
        (f"{name}.txt", b"text"),
        entry("link.jpg", tarfile.SYMTYPE, "x" * 90),
        ("ünïcode.png", noise(100)),
        ("c.webp", noise(0)),
        fmt=_FORMATS[fmt],
    )[:-8192]
    chance = random.Random(f"{fmt} {is_packed}")
    statuses = set()
    for number in range(_NUM_MUTATIONS):
        # Every other time the archive is damaged before it is packed, so that the damage is inside.
        data = mutate(whole, chance)
        if is_packed:
            data = gzip.compress(data, mtime=0) if number % 2 else mutate(gzip.compress(whole), chance)
        found = index(path, data, ["txt"])
        assert found
        assert len({each.uri for each in found}) == len(found)
        assert all(each.error for each in found if each.status)
        for each, outcome in zip(found, read(found), strict=True):
            if each.status is None:
                assert isinstance(outcome, Fetched), outcome
                assert (len(outcome.data), zlib.crc32(outcome.data)) == (each.size_bytes, each.crc32)
            else:
                assert isinstance(outcome, ImageError)
                assert outcome.status == each.status
            statuses.add(each.status)
    assert {None, Status.CORRUPT, Status.TRUNCATED} <= statuses
