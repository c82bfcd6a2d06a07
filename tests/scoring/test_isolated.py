"""Decoders that crash, hang, print, lie or eat memory cost the one image that made them; nothing survives its parent.

The bad decoders are planted from outside, as a real one would be: a sitecustomize on PYTHONPATH, which only the child
process reads, patches Pillow's PNG plugin to misbehave on files that carry a mark.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image

from lfm_scan.errors import ConfigError
from lfm_scan.imaging import POLICIES, ImageInfo, ImageLimits, get_policy
from lfm_scan.scoring import isolated
from lfm_scan.scoring.decoder_child import FACTS_BYTES
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.scoring.prepare import Prepared, prepare_bytes
from lfm_scan.status import Status
from tests.awkward import awkward_files, encode
from tests.planted import PLANTS, marked
from tests.waiting import wait_until

_LIMITS: Final = ImageLimits(max_decode_seconds=60, max_decode_bytes=128 * 2**20)
"""Its seconds are for machines that let a process wait; images that use them up are decoded with `_BRIEF`."""
_BRIEF: Final = replace(_LIMITS, max_decode_seconds=2)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sitecustomize for child processes."""
    (tmp_path / "sitecustomize.py").write_text(PLANTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def prepare(decoder: IsolatedDecoder, *files: bytes) -> list[Prepared]:
    return list(decoder.prepare_all(EncodedImage(f"s3://b/{number}", data) for number, data in enumerate(files)))


def facts_of(prepared: Prepared) -> tuple[object, ...]:
    """Return what can be compared by =="""
    pixels = None if prepared.pixels is None else prepared.pixels.tobytes()
    return prepared.info, prepared.status, prepared.error, pixels, prepared.sha256, prepared.size_bytes


def in_process(data: bytes, policy: str = "crop256", limits: ImageLimits = _LIMITS) -> tuple[object, ...]:
    return facts_of(prepare_bytes(data, get_policy(policy), limits))


def children() -> set[int]:
    """Return the decoder processes of this one."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in pids if b"decoder_child" in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.fixture
def child_of() -> Iterator[Callable[[IsolatedDecoder], int]]:
    """What starts a decoder's child by a good image, and returns its process id; whose end is checked."""
    before = children()

    def start(decoder: IsolatedDecoder) -> int:
        assert [each.status for each in prepare(decoder, marked(""))] == [Status.OK]
        [pid] = children() - before
        return pid

    yield start
    assert children() == before


# --- The same as in process ---


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_awkward_file_is_prepared_as_in_process(policy: str) -> None:
    files = [file.data for file in awkward_files().values()]
    with IsolatedDecoder(policy, ImageLimits()) as decoder:
        found = prepare(decoder, *files)
    assert [facts_of(each) for each in found] == [in_process(data, policy, ImageLimits()) for data in files]


def test_a_file_without_its_end_is_scored_as_in_process() -> None:
    limits = ImageLimits(score_truncated=True)
    files = [awkward_files()[name].data for name in ("cut-at-half.jpg", "cut-at-half.webp", "picture.bmp")]
    with IsolatedDecoder("crop256", limits) as decoder:
        found = prepare(decoder, *files)
    assert [facts_of(each) for each in found] == [in_process(data, limits=limits) for data in files]
    assert [each.truncated for each in found] == [True, False, False]


def test_files_larger_than_any_pipe_pass_in_both_directions_at_once() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    files = [encode(Image.fromarray(np.roll(noise, shift, axis=0)), "BMP") for shift in range(7)]
    assert len(files[0]) > 8 * 2**20
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert [facts_of(each) for each in prepare(decoder, *files)] == [in_process(data) for data in files]


def test_pipes_smaller_than_an_answer_do_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_PIPE_BYTES", 4096)
    files = [marked("", seed) for seed in range(8)]
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert [facts_of(each) for each in prepare(decoder, *files)] == [in_process(data) for data in files]


def test_pixels_go_where_the_caller_wants_them_and_zeros_where_there_are_none() -> None:
    files = [marked("", 1), b"no image", awkward_files()["cut-at-half.png"].data, marked("", 2)]
    out = np.full((4, 256, 256, 3), 7, np.uint8)
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        found = list(decoder.prepare_all(EncodedImage("", data, out=row) for data, row in zip(files, out, strict=True)))
    for prepared, data, row in zip(found, files, out, strict=True):
        expected = prepare_bytes(data, get_policy("crop256"), _LIMITS)
        np.testing.assert_array_equal(row, 0 if expected.pixels is None else expected.pixels)
        assert (prepared.pixels is None) == (expected.pixels is None)
        assert prepared.pixels is None or np.shares_memory(prepared.pixels, row)


def test_a_known_sha256_is_not_computed_again() -> None:
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        [prepared] = decoder.prepare_all([EncodedImage("", marked(""), "5ha256")])
    assert prepared.sha256 == "5ha256"


def test_a_place_of_the_wrong_size_is_the_callers_mistake() -> None:
    with (
        IsolatedDecoder("crop256", _LIMITS) as decoder,
        pytest.raises(ValueError, match="to an array of 196,608 bytes, this one has 12"),
    ):
        list(decoder.prepare_all([EncodedImage("", marked(""), out=np.zeros((2, 2, 3), np.uint8))]))


def test_no_files_start_no_process_and_an_unknown_policy_no_decoder() -> None:
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert prepare(decoder) == []
        assert prepare(decoder, b"", b"text")[1].status == Status.UNSUPPORTED
        assert children() == set()
    with pytest.raises(ConfigError, match="no preprocess policy 'crop1'"):
        IsolatedDecoder("crop1", _LIMITS)


def test_one_process_serves_one_list_after_the_other(child_of: Callable[[IsolatedDecoder], int]) -> None:
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert child_of(decoder) == child_of(decoder)


def test_the_childs_time_is_that_which_its_own_clock_counted(child_of: Callable[[IsolatedDecoder], int]) -> None:
    image = awkward_files()["png-inside.jpg"].data
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert decoder.cpu_s == 0
        prepare(decoder, *[image] * 30)
        ticks = Path(f"/proc/{child_of(decoder)}/stat").read_text().rpartition(")")[2].split()[11:13]
        told = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        assert decoder.cpu_s == pytest.approx(told, abs=0.1)
        assert decoder.cpu_s > 0
    assert decoder.cpu_s == 0


def test_a_list_that_was_given_up_does_not_disturb_the_next() -> None:
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        first = decoder.prepare_all(EncodedImage("", marked("", seed)) for seed in range(5))
        assert facts_of(next(first)) == in_process(marked("", 0))
        first.close()  # type: ignore[attr-defined]
        files = [marked("", seed) for seed in (7, 8)]
        assert [facts_of(each) for each in prepare(decoder, *files)] == [in_process(data) for data in files]


# --- One image each ---


@pytest.mark.parametrize(
    ("mark", "status", "message"),
    [
        (
            "segfault",
            Status.CRASHED,
            "the decoder died of SIGSEGV: a fault in it, or it needs more than 134,217,728 bytes",
        ),
        (
            "abort",
            Status.CRASHED,
            "the decoder died of SIGABRT: a fault in it, or it needs more than 134,217,728 bytes",
        ),
        ("exit", Status.CRASHED, "the decoder ended with exit status 3: a fault in it"),
        (
            "killed",
            Status.CRASHED,
            "the decoder was killed by SIGKILL from outside, probably because the machine ran out",
        ),
        ("lie", Status.CRASHED, "the decoder gave an answer that makes no sense"),
        ("sleep", Status.TIMEOUT, "decoding it hung for 8 s, 4 times --max-decode-seconds"),
        ("hog", Status.TOO_LARGE, "decoding it takes more than 134,217,728 bytes of memory (--max-decode-bytes)"),
        ("hog-in-c", Status.CRASHED, "the decoder died of SIGSEGV"),
    ],
)
@pytest.mark.usefixtures("planted")
def test_a_bad_decoder_costs_one_image_that_is_named(
    mark: str, status: Status, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = [marked("", 0), marked(mark, 1), marked("", 2), b"no image", marked("", 3)]
    limits = _BRIEF if status == Status.TIMEOUT else _LIMITS
    with IsolatedDecoder("crop256", limits) as decoder, caplog.at_level(logging.WARNING, "lfm_scan"):
        found = prepare(decoder, *files)
    bad = found.pop(1)
    assert (bad.status, bad.pixels, bad.info) == (status, None, ImageInfo(format="PNG"))
    assert bad.error is not None
    assert bad.error.startswith(message)
    assert (bad.sha256, bad.size_bytes) == (in_process(files[1])[4], len(files[1]))
    assert [facts_of(each) for each in found] == [in_process(data) for number, data in enumerate(files) if number != 1]
    [record] = caplog.records
    assert record.getMessage().startswith(f"s3://b/1: {status}: {message}")
    assert ("double free or corruption" in record.getMessage()) == (mark == "abort")


@pytest.mark.usefixtures("planted")
def test_a_decoder_that_spins_in_c_is_ended_by_its_cpu_time() -> None:
    with IsolatedDecoder("crop256", _BRIEF) as decoder:
        bad, good = prepare(decoder, marked("spin-regardless-of-the-clock"), marked(""))
    assert (bad.status, good.status) == (Status.TIMEOUT, Status.OK)
    assert bad.error == "decoding it takes more than 2 s of CPU time (--max-decode-seconds)"


@pytest.mark.usefixtures("planted")
def test_bad_images_in_a_row_cost_one_each() -> None:
    marks = ["segfault", "exit", "", "hog", "lie", "spin", "", "abort"]
    with IsolatedDecoder("crop256", _BRIEF) as decoder:
        found = prepare(decoder, *(marked(mark) for mark in marks))
    assert [each.status for each in found] == [
        Status.CRASHED,
        Status.CRASHED,
        Status.OK,
        Status.TOO_LARGE,
        Status.CRASHED,
        Status.TIMEOUT,
        Status.OK,
        Status.CRASHED,
    ]


@pytest.mark.usefixtures("planted")
def test_what_one_image_did_to_the_process_is_not_blamed_on_the_next(caplog: pytest.LogCaptureFixture) -> None:
    files = [marked("poison"), marked("", 1), marked("", 2)]
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert [facts_of(each) for each in prepare(decoder, *files)] == [in_process(data) for data in files]
    assert caplog.records == []


@pytest.mark.usefixtures("planted")
def test_what_a_decoder_prints_reaches_neither_the_answers_nor_our_output(capfd: pytest.CaptureFixture[str]) -> None:
    files = [marked("print", 1), marked("", 2)] * 2
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert [facts_of(each) for each in prepare(decoder, *files)] == [in_process(data) for data in files]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("planted")
def test_the_decoder_process_loads_neither_torch_nor_ray_nor_arrow() -> None:
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert [each.status for each in prepare(decoder, marked("heavy"))] == [Status.OK]


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {"compress_level": 1}),
        ("WEBP", {"method": 0}),
        ("WEBP", {"lossless": True, "method": 0, "quality": 0}),
        ("AVIF", {"speed": 10}),
        ("GIF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
    ],
)
def test_an_image_that_needs_more_memory_than_allowed_is_too_large_in_every_format(
    fmt: str, options: dict[str, Any]
) -> None:
    # Libraries report it in their own ways, some as a broken file.
    data = encode(Image.new("RGB", (4500, 4500), "teal"), fmt, **options)
    with IsolatedDecoder("crop256", ImageLimits(max_decode_bytes=64 * 2**20)) as decoder:
        [found] = prepare(decoder, data)
    assert (found.status, found.error) == (
        Status.TOO_LARGE,
        "decoding it takes more than 67,108,864 bytes of memory (--max-decode-bytes)",
    )


@pytest.mark.parametrize(
    "facts",
    [
        b"",
        b"[" * FACTS_BYTES,
        b"7",
        b"{}",
        b'{"info": {}, "status": "ok", "error": null}',
        b"\xff",
        *(
            json.dumps({"info": {**dict.fromkeys(isolated._FACT_TYPES), **info}, "status": status, "error": error})
            for info, status, error in (
                ({}, "fine", None),
                ({}, ["ok"], None),
                ({}, "corrupt", None),
                ({}, "corrupt", 7),
                ({}, "corrupt", "\udcff"),
                ({"width": 2**31}, "ok", None),
                ({"width": -1}, "ok", None),
                ({"width": True}, "ok", None),
                ({"jpeg_quality": 101}, "ok", None),
                ({"exif_orientation": 2**15}, "ok", None),
                ({"lossy": 1}, "ok", None),
                ({"mode": ["RGB"]}, "ok", None),
                ({"more": 1}, "ok", None),
            )
        ),
    ],
)
def test_an_answer_that_no_honest_decoder_gives_is_refused(facts: bytes | str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        isolated._parse(facts.encode() if isinstance(facts, str) else facts, np.zeros((256, 256, 3), np.uint8))


# --- The process ---


def test_a_process_killed_while_it_was_idle_blames_no_image(
    child_of: Callable[[IsolatedDecoder], int], caplog: pytest.LogCaptureFixture
) -> None:
    files = [marked("", seed) for seed in (1, 2)]
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        first = child_of(decoder)
        os.kill(first, signal.SIGKILL)
        assert [facts_of(each) for each in prepare(decoder, *files)] == [in_process(data) for data in files]
        assert child_of(decoder) != first
    assert caplog.records == []


def test_a_process_that_somebody_has_stopped_is_replaced(
    child_of: Callable[[IsolatedDecoder], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_GRACE_S", 0.1)
    with IsolatedDecoder("crop256", _BRIEF) as decoder:
        os.kill(child_of(decoder), signal.SIGSTOP)
        assert [each.status for each in prepare(decoder, marked("", 1), marked("", 2))] == [Status.OK, Status.OK]


def test_a_process_that_cannot_start_is_nobodys_fault_but_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_START_PAUSE_S", 0)
    plant = "import os, sys\nprint('no such library', file=sys.stderr, flush=True)\nos._exit(9)"
    (tmp_path / "sitecustomize.py").write_text(plant)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    expected = r"did not start, 3 times in a row \(last ended with exit status 9\)(?s:.*)no such library"
    with IsolatedDecoder("crop256", _LIMITS) as decoder, pytest.raises(RuntimeError, match=expected):
        prepare(decoder, marked(""), marked(""))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with (
        IsolatedDecoder("crop256", _LIMITS) as decoder,
        pytest.raises(RuntimeError, match=r"cannot be started: .*nowhere"),
    ):
        prepare(decoder, marked(""))


def test_a_start_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_START_PAUSE_S", 0)
    plant = (
        f"import os\ntry:\n    os.mkdir({str(tmp_path / 'seen')!r})\nexcept OSError:\n    pass\nelse:\n    os._exit(9)"
    )
    (tmp_path / "sitecustomize.py").write_text(plant)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert [each.status for each in prepare(decoder, marked(""), marked(""))] == [Status.OK, Status.OK]
    assert (tmp_path / "seen").is_dir()


def test_nothing_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "numpy", "PIL"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(9)")
    monkeypatch.chdir(tmp_path)
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        assert [each.status for each in prepare(decoder, marked(""))] == [Status.OK]


def test_the_process_is_bounded_by_the_kernel(child_of: Callable[[IsolatedDecoder], int]) -> None:
    with IsolatedDecoder("crop256", _LIMITS) as decoder:
        pid = child_of(decoder)
        limits = Path(f"/proc/{pid}/limits").read_text()
        soft = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()[1:]}
        assert soft["Max core file size"] == ["0", "0"]
        assert soft["Max file size"] == ["65536", "65536"]
        data_bytes = int(soft["Max data size"][0])
        assert _LIMITS.max_decode_bytes < data_bytes < _LIMITS.max_decode_bytes + 2**30
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


def test_a_decoder_that_nobody_closed_leaves_no_process(child_of: Callable[[IsolatedDecoder], int]) -> None:
    decoder = IsolatedDecoder("crop256", _LIMITS)
    child_of(decoder)
    del decoder
    gc.collect()


_PARENT: Final = """
import os, sys
from lfm_scan.imaging import ImageLimits
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder

def images():
    for path in sys.argv[1:]:
        with open(path, "rb") as file:
            yield EncodedImage(path, file.read())
    # The last file is with the decoder, and its child has been told to begin.
    print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
    if len(sys.argv) == 2:
        sys.stdin.read()  # so that the child becomes idle

with IsolatedDecoder("crop256", ImageLimits(max_decode_seconds=60)) as decoder:
    try:
        for prepared in decoder.prepare_all(images()):
            print(prepared.status, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@contextlib.contextmanager
def parent(folder: Path, *marks: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a process that decodes such images; yield it and the id of its child once the child has the last one."""
    paths = [folder / f"{number}.png" for number in range(len(marks))]
    for path, mark in zip(paths, marks, strict=True):
        path.write_bytes(marked(mark))
    command = [sys.executable, "-c", _PARENT, *map(str, paths)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.strip().isdigit())
            yield process, int(line)
        finally:
            process.kill()


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"  # whoever adopted it has yet to read its exit status


@pytest.mark.parametrize("marks", [("",), ("", "spin"), ("", "sleep")])
@pytest.mark.usefixtures("planted")
def test_a_killed_parent_leaves_no_process(marks: tuple[str, ...], tmp_path: Path) -> None:
    with parent(tmp_path, *marks) as (process, child):
        os.kill(child, 0)
        process.kill()
        process.wait(100)
        wait_until(lambda: is_gone(child))
        assert is_gone(child)


@pytest.mark.usefixtures("planted")
def test_ctrl_c_ends_the_parent_and_its_decoder_without_a_word_from_it(tmp_path: Path) -> None:
    with parent(tmp_path, "", "sleep") as (process, child):
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=100)
        assert (out.split()[-1], err, process.returncode) == ("interrupted", "", 0)
        wait_until(lambda: is_gone(child))
        assert is_gone(child)
