"""What this machine is."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Final

_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")
_CPU_INFO: Final = Path("/proc/cpuinfo")


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Return how many cores this process may keep busy: those it may run on, or fewer if its container has a quota.

    Args:
        cpu_max: The file in which Linux tells the quota (cgroup v2): microseconds of CPU, or "max", and of how many.
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = cpu_max.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def processor(cpu_info: Path = _CPU_INFO) -> str:
    """Return what the cores are called."""
    with contextlib.suppress(OSError):
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
