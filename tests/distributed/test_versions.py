"""Workers that run something else than their driver."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from pathlib import Path
from typing import cast

import pytest

import lfm_scan
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.versions import check_versions, versions_here
from lfm_scan.errors import RunError
from tests.images import write_pictures


def test_a_process_knows_what_it_runs() -> None:
    here = versions_here()

    assert here["lfm-scan"] == lfm_scan.__version__
    assert here["python"] == ".".join(platform.python_version().split(".")[:2])
    assert here["pillow"] == importlib.metadata.version("pillow")
    assert {"ray", "torch", "pyarrow"} <= set(here)
    check_versions(here)


def test_a_worker_that_differs_says_in_what_and_what_to_do() -> None:
    drivers = {**versions_here(), "pillow": "1.7.8", "python": "2.7"}

    with pytest.raises(RunError) as refusal:
        check_versions(drivers)

    here = versions_here()
    assert str(refusal.value) == (
        f"node {socket.gethostname()} has python {here['python']}, the driver 2.7; pillow {here['pillow']}, the driver "
        "1.7.8: scores could differ from node to node. Give all nodes the same environment or image, and repeat the "
        "command to go on"
    )


def test_what_one_of_them_lacks_and_how_it_was_built_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    check_versions({**versions_here(), "a package of GPUs": "1.0"})
    without_openvino = {name: version for name, version in versions_here().items() if name != "openvino"}
    check_versions(without_openvino)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cu129")

    assert versions_here.__wrapped__()["torch"] == "2.13.0"


@pytest.mark.usefixtures("local_ray")
def test_a_scan_ends_with_one_line_if_a_node_has_another_decoder(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "in", 4)
    config = ScanConfig((str(tmp_path / "in"),), output=str(tmp_path / "run"), weights=str(tiny_weights))
    here = versions_here()["pillow"]

    with monkeypatch.context() as patch:
        patch.setitem(cast("dict[str, str]", versions_here()), "pillow", "1.7.8")
        with pytest.raises(
            RunError, match=rf"^node {socket.gethostname()} has pillow {here}, the driver 1.7.8: [^\n]+$"
        ):
            lfm_scan.scan(config)

    assert not (tmp_path / "run" / "parts").exists()
    assert lfm_scan.scan(config).summary.by_status == {"ok": 4}
