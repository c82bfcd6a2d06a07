from __future__ import annotations

import csv
import gzip
import io
import itertools
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm_scan.errors import NotFoundError, SourceError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources.inputs import Input, Kind, input_schema, to_table
from lfm_scan.sources.lines import MAX_LINE_BYTES
from lfm_scan.sources.manifest import read_manifest
from lfm_scan.status import Status
from lfm_scan.storage import LocalStore, ObjectInfo, S3Store
from tests.servers import S3Server


def _read(path: Path, data: str | bytes, **config: object) -> list[Input]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(_open(path, **config))


def _open(path: Path, **config: object) -> Iterator[Input]:
    (found,) = LocalStore().list(str(path))
    return read_manifest(LocalStore(), found, InputConfig(**config))  # type: ignore[arg-type]


def _uris(inputs: list[Input]) -> list[str]:
    assert all(each.status is None and each.kind is Kind.OBJECT for each in inputs)
    return [each.uri for each in inputs]


def _errors(inputs: list[Input], manifest: Path) -> dict[int, str]:
    """Return the errors by the number of the line, of inputs that have one."""
    bad = [each for each in inputs if each.status is not None]
    assert {each.status for each in bad} <= {Status.ERROR}
    return {int(each.uri.removeprefix(f"{manifest}#line=")): each.error or "" for each in bad}


FORMATS = {
    "m.csv": "id,uri\n1,s3://b/1.png\n2,/data/2.png\n",
    "m.tsv": "id\turi\n1\ts3://b/1.png\n2\t/data/2.png\n",
    "m.jsonl": '{"id": 1, "uri": "s3://b/1.png"}\n{"id": 2, "uri": "/data/2.png"}\n',
    "m.ndjson": '{"uri": "s3://b/1.png"}\n\n{"uri": "/data/2.png"}',
    "m.txt": "# two images\ns3://b/1.png\n\n  \n/data/2.png",
    "M.LIST": "s3://b/1.png\r\n/data/2.png\r\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_the_same_inputs_plain_and_compressed(tmp_path: Path, name: str) -> None:
    expected = ["s3://b/1.png", "/data/2.png"]

    assert _uris(_read(tmp_path / name, FORMATS[name])) == expected
    assert _uris(_read(tmp_path / f"{name}.gz", gzip.compress(FORMATS[name].encode()))) == expected
    assert _uris(_read(tmp_path / name, b"\xef\xbb\xbf" + FORMATS[name].encode())) == expected


def test_values_are_taken_as_they_are_and_relative_ones_from_the_manifests_folder(tmp_path: Path) -> None:
    values = [
        "https://example.org/a.png?x=1#y",
        "gs://b/k",
        "s3://b/k?versionId=1",
        "file:///data/a%20b.png",
        "/data/a%20b.png",
        "a/b.png",
        "./a//b #1.png",
        "../c.png",
        "s3:/typo",
        "/data/a.png ",
    ]
    folder = tmp_path / "deep"
    folder.mkdir()

    inputs = _read(folder / "m.txt", "\n".join(values))

    assert _uris(inputs) == [
        *values[:5],
        f"{folder}/a/b.png",
        f"{folder}/a//b #1.png",
        f"{tmp_path}/c.png",
        f"{folder}/s3:/typo",
        "/data/a.png ",
    ]


def test_a_path_that_leads_out_of_everything_is_a_bad_row(tmp_path: Path) -> None:
    (error,) = _errors(_read(tmp_path / "m.txt", "../" * 50 + "x.png"), tmp_path / "m.txt").values()

    assert error.endswith("leads out of /")


def test_a_manifest_whose_path_is_not_utf_8_names_files_beside_it_percent_encoded(tmp_path: Path) -> None:
    folder = tmp_path.as_posix().encode() + b"/caf\xe9"
    Path(folder.decode("utf-8", "surrogateescape")).mkdir()
    with open(folder + b"/m.txt", "w") as file:
        file.write("a b.png")
    (found,) = LocalStore().list(str(tmp_path))

    (planned,) = read_manifest(LocalStore(), found, InputConfig())

    assert planned.uri == f"file://{tmp_path}/caf%E9/a%20b.png"


def test_the_first_known_column_holds_the_uris_whatever_its_case_and_place(tmp_path: Path) -> None:
    assert _uris(_read(tmp_path / "m.csv", "Key, URL ,Path\nk,u://1,p\n")) == ["u://1"]
    assert _uris(_read(tmp_path / "m.jsonl", '{"Key": "/k", "image": "/i"}')) == ["/i"]
    assert _uris(_read(tmp_path / "m.csv", "url,mine\nu,/m\n", uri_column="mine")) == ["/m"]


@pytest.mark.parametrize(
    ("name", "data", "config", "message"),
    [
        ("m.csv", "id,label\n1,cat\n", {}, r"no column is named uri, url, .*it has 'id', 'label'.*--uri-column"),
        ("m.csv", "id,url\n1,cat\n", {"uri_column": "link"}, r"no column 'link' \(--uri-column\); it has 'id', 'url'"),
        ("m.jsonl", '{"id": 1}\n', {}, r"no column is named.*'id'"),
        ("m.jsonl", '{"id": 1}\n', {"uri_column": "link"}, r"no column 'link'"),
        ("m.csv", "url\n/1\n", {"carry": ("id",)}, r"no column 'id' to carry \(--carry\); it has 'url'"),
        ("m.txt", "/1\n", {"carry": ("id",)}, r"no column 'id' to carry \(--carry\); a list of URIs has no columns"),
        ("m.csv", "", {}, r"m.csv: is empty; its first line must name the columns"),
        ("m.csv", "\xff\xfeu".encode("latin-1"), {}, r"m.csv: is UTF-16; save it as UTF-8"),
        ("m.csv", b"\xff", {}, r"m.csv: its first line must name the columns: byte 1 of the line is not UTF-8"),
        ("m.csv", "url,id\r/1,1\r", {}, r"m.csv: its first line must name the columns: not CSV: new-line"),
        ("m.csv", b"u" * (MAX_LINE_BYTES + 1), {}, r"m.csv: its first line .* has more than 1,048,576 bytes"),
        ("m.csv.gz", "url\n/1\n", {}, r"m.csv.gz: is not a whole gzip file"),
        ("m.txt.gz", gzip.compress(b"/1\n" * 1000, mtime=0)[:-12], {}, r"m.txt.gz: is not a whole gzip file"),
        ("m.xls", "url\n/1\n", {}, r"m.xls: not a manifest by its name; known are .csv, .tsv, .jsonl"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named_with_the_remedy(
    tmp_path: Path, name: str, data: str | bytes, config: dict[str, object], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        _read(tmp_path / name, data, **config)


def test_an_error_shows_some_of_a_thousand_columns_with_endless_names(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        _read(tmp_path / "m.csv", ",".join(f"{n}{'x' * 500}" for n in range(1000)))

    assert len(str(caught.value)) < 2000
    assert "and 980 more" in str(caught.value)


def test_manifests_without_lines_name_nothing(tmp_path: Path) -> None:
    assert _read(tmp_path / "m.txt", "") == []
    assert _read(tmp_path / "m.jsonl", "\n\n") == []
    assert _read(tmp_path / "m.csv", "url\n\n") == []


def test_one_line_is_one_input_also_if_two_name_the_same_object(tmp_path: Path) -> None:
    inputs = _read(tmp_path / "m.csv", "url,id\n/b\n/b,1\n/a,2\n/b,3\n", carry=("id",))

    assert [(each.uri, each.carried.get("id")) for each in inputs[1:]] == [("/b", "1"), ("/a", "2"), ("/b", "3")]


def test_a_bad_csv_line_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    lines = [b"url,id", b"/1,a", b"/2", b",b", b"/3,c,d", b"/4\xff,e", b"/5\0,f", b'"/6"x,g', b"/7,h"]

    inputs = _read(path, b"\n".join(lines), carry=("id",))

    assert [each.uri for each in inputs if each.status is None] == ["/1", "/7"]
    assert _errors(inputs, path) == {
        3: "1 cells, the header names 2: quote cells with delimiters",
        4: "no URI",
        5: "3 cells, the header names 2: quote cells with delimiters",
        6: "byte 3 of the line is not UTF-8: save the file as UTF-8",
        7: "the URI has a zero byte, which no name has",
        8: "not CSV: ',' expected after '\"'",
    }
    assert inputs[2].carried == {"id": "b"}


def test_a_bad_json_line_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [
        "[1]",
        "{}",
        '{"url": "/1"}',
        '{"url": null}',
        '{"url": 5}',
        '{"url": {"bytes": "x"}}',
        '{"url": " "}',
        '{"uri": "/2"}',
        '{"url": "/3"',
        "[" * 100_000,
        '{"url": "\\ud800"}',
        '{"url": "file://etc/passwd"}',
        '{"url": "file:///a%00b"}',
        '{"url": ' + "1" * 5000 + "}",
        '"/4"',
        '{"url": "/5"}',
    ]

    inputs = _read(path, "\n".join(lines))

    assert [each.uri for each in inputs if each.status is None] == ["/1", "/5"]
    errors = _errors(inputs, path)
    assert sorted(errors) == [1, 2, *range(4, 16)]
    assert errors[1] == "a JSON object is needed, this is a list"
    assert errors[5] == "the URI should be text, this is a number"
    assert errors[6] == "the URI should be text, this is an object"
    assert errors[9].startswith("not JSON: Expecting")
    assert errors[10].startswith("not JSON: maximum recursion depth")
    assert errors[12].endswith("a file:// URI has three slashes and a whole path: file:///folder/name")
    to_table(inputs, input_schema({}))  # every error is valid text


def test_quoted_cells_may_hold_delimiters_quotes_and_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    rows = [["/a,b.png", 'a "b"\r\nc'], ["/new\nline.png", ""], ["/c.png", "\0"]]
    text = io.StringIO()
    csv.writer(text).writerows([["url", "text"], *rows, ["", ""]])

    inputs = _read(path, text.getvalue(), carry=("text",))

    assert [[each.uri, each.carried["text"]] for each in inputs[:3]] == rows
    assert _errors(inputs, path) == {7: "no URI"}  # counted in lines, not in records


@pytest.mark.parametrize("num_lines", [3, 40_000])
def test_a_quote_that_is_never_closed_costs_its_own_line(tmp_path: Path, num_lines: int) -> None:
    path = tmp_path / "m.csv"
    lines = [f"/{n}.png" for n in range(num_lines)]

    inputs = _read(path, "\n".join(["url", '"/x.png', *lines, ""]))

    assert list(_errors(inputs, path)) == [2]
    assert [each.uri for each in inputs[1:]] == lines


def test_carried_json_is_text_or_compact_json(tmp_path: Path) -> None:
    line = r'{"url": "/1", "a": "x\u00e9", "b": [1, {"c": null}], "d": 1.5, "e": null, "f": true, "g": "\ud800"}'

    (planned,) = _read(tmp_path / "m.jsonl", line, carry=("a", "b", "d", "e", "f", "g", "nowhere"))

    assert planned.carried == {
        "a": "xé",
        "b": '[1,{"c":null}]',
        "d": "1.5",
        "e": None,
        "f": "true",
        "g": "\\ud800",
        "nowhere": None,
    }


def test_a_manifest_on_s3_names_objects_beside_it(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "lists/m.csv", b"url\na b+c/%41.png\n../d.png\n../../e.png\n/local.png\n")
    store = S3Store(StorageConfig(endpoint_url=s3_server.endpoint_url))
    (found,) = store.list(f"s3://{s3_bucket}/lists/m.csv")

    inputs = list(read_manifest(store, found, InputConfig()))

    assert [each.uri for each in inputs] == [
        f"s3://{s3_bucket}/lists/a b+c/%41.png",
        f"s3://{s3_bucket}/d.png",
        f"s3://{s3_bucket}/lists/m.csv#line=4",
        "/local.png",
    ]
    assert inputs[2].error == f"'../../e.png': leads out of s3://{s3_bucket}"


def test_a_manifest_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    gone = ObjectInfo(f"{tmp_path}/m.csv", 10, None, None)

    with pytest.raises(NotFoundError):
        list(read_manifest(LocalStore(), gone, InputConfig()))


def test_a_web_manifest_is_known_by_its_path_and_names_files_beside_it() -> None:
    uri = "https://example.org/lists/m.txt?signature=a.b/c"

    class Web(LocalStore):
        def get_range(
            self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
        ) -> bytes:
            return b"a.png\n"[start : start + num_bytes]

    (planned,) = read_manifest(Web(), ObjectInfo(uri, 6, None, None), InputConfig())

    assert planned.uri == "https://example.org/lists/a.png"


def test_200_000_lines_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "m.csv.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("id,url\n")
        file.writelines(f"{n},s3://bucket/{'x' * 200}/{n}.png\n" for n in range(200_000))

    tracemalloc.start()
    try:
        num_inputs = sum(each.status is None for each in _open(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert num_inputs == 200_000
    assert peak < 24 * 2**20  # of 45 MB; one request alone is 8 MiB


@pytest.mark.parametrize(
    ("name", "head", "line"),
    [("m.csv", b"url\n", b"/x.png\n"), ("m.jsonl", b"", b'{"url":"/x.png"}\n'), ("m.txt", b"", b"/x.png\n")],
)
def test_the_first_inputs_come_before_the_manifest_is_read_to_its_end(
    tmp_path: Path, name: str, head: bytes, line: bytes
) -> None:
    (tmp_path / name).write_bytes(head + line * 4_000_000)
    num_bytes = 0

    class Counting(LocalStore):
        def get_range(
            self, uri: str, start: int, size: int, etag: str | None = None, version_id: str | None = None
        ) -> bytes:
            nonlocal num_bytes
            num_bytes += size
            return super().get_range(uri, start, size, etag, version_id)

    (found,) = LocalStore().list(f"{tmp_path}/{name}")

    assert len(list(itertools.islice(read_manifest(Counting(), found, InputConfig()), 1000))) == 1000
    assert num_bytes <= 8 * 2**20 < (found.size_bytes or 0)


@pytest.mark.parametrize("name", ["m.csv.gz", "m.jsonl.gz", "m.txt.gz"])
def test_a_compressed_line_without_end_takes_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    head = b"url\n" if "csv" in name else b""
    last = b'{"url": "/last"}' if "json" in name else b"/last"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        file.write(b'"')
        for _ in range(128):
            file.write(b"x" * 2**20)
        file.write(b"\n" + last)

    tracemalloc.start()
    try:
        inputs = list(_open(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert list(_errors(inputs, path).values()) == ["the line has more than 1,048,576 bytes"]
    assert inputs[-1].uri == "/last"
    assert peak < 24 * 2**20


def test_a_quoted_cell_of_many_lines_without_end_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b'url\n"' + (b"x" * 100_000 + b"\n") * 300)

    tracemalloc.start()
    try:
        inputs = list(_open(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(inputs) == 300  # the first is bad; the others, read on their own, name a file each
    assert "field larger than field limit" in _errors(inputs, path)[2]
    assert peak < 64 * 2**20


def test_a_record_is_bounded_also_where_csv_has_no_bound(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    before = csv.field_size_limit(2**31)
    try:
        inputs = _read(path, b'url\n"' + (b"x" * 100_000 + b"\n") * 12)
    finally:
        csv.field_size_limit(before)

    assert _errors(inputs, path) == {2: "the record has more than 1,048,576 characters: is a quote not closed?"}


def test_random_bytes_never_raise_anything_but_a_source_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    seeds = {name: data.encode() for name, data in FORMATS.items()}
    pieces = [b'"', b"\n", b"\r", b",", b"\t", b"\0", b"\xff", b"{", b"\\ud800", b"../", b"file://", b"#", b"[" * 2000]
    outcomes: set[str | None] = set()
    for turn in range(1500):
        name = chance.choice(list(seeds))
        data = bytearray(seeds[name])
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.randrange(3)] = chance.choice(pieces)
        packed = turn % 3 == 0
        text = bytearray(gzip.compress(bytes(data)) if packed else data)
        if packed and turn % 2:
            text[chance.randrange(len(text))] ^= 1 << chance.randrange(8)
        try:
            inputs = _read(tmp_path / (name + ".gz" * packed), bytes(text), carry=("id",) if "csv" in name else ())
        except SourceError:
            outcomes.add("refused")
        else:
            outcomes.update(each.status for each in inputs)
            to_table(inputs, input_schema({}))
    assert outcomes == {"refused", None, Status.ERROR}
