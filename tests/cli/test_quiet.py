from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.scanning import REPOSITORY

_PROGRAM = """
import os, sys
from lfm_scan.cli.quiet import stderr_in_log
with stderr_in_log(enabled=True) as terminal:
    print("a worker died")
    sys.stderr.write("it had its reasons\\n")
    sys.stderr.flush()
    os.write(2, b"the core agrees\\n")
    print("12 of 40 images", file=terminal)
    if "fail" in sys.argv:
        sys.exit(1) if "quietly" in sys.argv else 1 / 0
print("the summary")
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", _PROGRAM, *arguments]
    return subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)


def test_what_ray_says_stays_off_the_terminal() -> None:
    done = _run()

    assert (done.stdout, done.stderr) == ("the summary\n", "12 of 40 images\n")


def test_what_ray_said_is_kept_and_named_if_the_scan_fails() -> None:
    done = _run("fail")

    assert done.stdout == ""
    named = re.search(r"^What Ray said is in (\S+)$", done.stderr, re.MULTILINE)
    assert named is not None
    log = Path(named[1])
    assert log.read_text() == "a worker died\nit had its reasons\nthe core agrees\n"
    log.unlink()


def test_an_interruption_keeps_no_log() -> None:
    done = _run("fail", "quietly")

    assert (done.stdout, done.stderr) == ("", "12 of 40 images\n")
