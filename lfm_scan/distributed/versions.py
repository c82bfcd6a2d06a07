"""Driver and workers must run the same code: another decoder or runtime could score the same image otherwise."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import socket
from collections.abc import Mapping
from typing import Final

from lfm_scan.errors import RunError
from lfm_scan.version import __version__

_COMPARED: Final = ("ray", "torch", "openvino", "pyarrow", "pillow")
"""What carries the work, decodes, scores and writes."""


@functools.cache
def versions_here() -> Mapping[str, str]:
    """Return what this process runs: package to version, for those that are installed.

    Python counts by its minor version, and a package without its build: 2.13.0+cpu and 2.13.0+cu129 are one version.
    """
    found = {"lfm-scan": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for package in _COMPARED:
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_versions(drivers: Mapping[str, str]) -> None:
    """Make sure that this worker runs what the driver does.

    A package that only one of them has is no difference: torch scores where OpenVINO is missing, and a GPU needs none.

    Args:
        drivers: As `versions_here` gave it in the driver.

    Raises:
        RunError: If it does not.
    """
    here = versions_here()
    differing = [
        f"{package} {here[package]}, the driver {version}"
        for package, version in drivers.items()
        if package in here and here[package] != version
    ]
    if differing:
        raise RunError(
            f"node {socket.gethostname()} has {'; '.join(differing)}: scores could differ from node to node. Give all "
            "nodes the same environment or image, and repeat the command to go on"
        )
