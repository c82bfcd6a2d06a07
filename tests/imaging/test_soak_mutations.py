"""Thousands of damaged files through one decoder process: each has an outcome, and the process outlives them all."""

from __future__ import annotations

import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lfm_scan.imaging import ImageLimits
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.status import Status
from tests.imaging.test_fuzz import mutate, seeds

_LIMITS: Final = ImageLimits(max_decode_seconds=5, max_decode_bytes=2**30)
"""Past these the kernel would end the process, and the test would find another in its place."""


def damaged(num_files: int) -> Iterator[EncodedImage]:
    """Yield copies of good files of every kind by turns: bits flipped, parts cut out, or parts of others put in."""
    good, chance = seeds(), random.Random(2024)
    names, contents = list(good), list(good.values())
    for number in range(num_files):
        which = number % len(names)
        yield EncodedImage(f"{names[which]} #{number}", mutate(contents[which], contents, chance))


def only_child() -> int:
    """Return the one decoder process that this one has."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    [pid] = [int(pid) for pid in pids if b"decoder_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def peak_bytes(pid: int) -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024


@pytest.mark.parametrize(
    "num_files", [300, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)], id="soak")]
)
def test_damaged_files_have_an_outcome_each_and_harm_nobody(num_files: int, caplog: pytest.LogCaptureFixture) -> None:
    statuses: Counter[Status] = Counter()
    with IsolatedDecoder("resize256", _LIMITS) as decoder, caplog.at_level(logging.WARNING, "lfm_scan"):
        [good] = decoder.prepare_all([EncodedImage("good", seeds()["png"])])
        child = only_child()
        for prepared in decoder.prepare_all(damaged(num_files)):
            assert (prepared.pixels is not None) == (prepared.status == Status.OK) == (prepared.error is None)
            statuses[prepared.status] += 1
        assert only_child() == child
        assert peak_bytes(child) < 2**30
    print(f"{num_files} files: {dict(statuses)}")
    assert caplog.records == []
    assert good.status == Status.OK
    assert statuses.total() == num_files
    assert statuses.keys() >= {Status.OK, Status.CORRUPT, Status.TRUNCATED, Status.UNSUPPORTED}
    assert not statuses.keys() & {Status.CRASHED, Status.TIMEOUT, Status.ERROR}
