"""What the package promises as a whole: who imports what, and how its exceptions behave."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys

import pytest

import lfm_scan
from lfm_scan import errors
from lfm_scan.imaging import ImageInfo
from lfm_scan.status import Status
from tests.waiting import PATIENCE_S

_EXCEPTIONS = [member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, Exception)]


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh Python has loaded after a statement."""
    code = (
        f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import lfm_scan; dir(lfm_scan)")
    assert "lfm_scan" in loaded
    assert not loaded & {"ray", "torch", "numpy", "pyarrow", "pandas", "PIL", "boto3"}


def test_everything_below_the_distributed_layer_works_without_ray() -> None:
    loaded = modules_after("import lfm_scan.scoring.scorer, lfm_scan.storage, lfm_scan.runs.finalize")
    assert {"PIL", "boto3"} <= loaded
    assert not loaded & {"ray", "torch"}


@pytest.mark.parametrize(
    ("module", "needs", "forbidden"),
    [
        ("lfm_scan.model.network", "torch", {"pyarrow", "boto3", "PIL", "ray", "pandas"}),
        ("lfm_scan.model.checkpoint", "numpy", {"torch", "pyarrow", "boto3", "PIL", "ray", "pandas"}),
        ("lfm_scan.distributed.pipeline", "ray", {"torch"}),  # actors that score with OpenVINO
        ("lfm_scan.imaging", "PIL", {"pyarrow", "boto3", "torch", "ray", "pandas"}),
        ("lfm_scan.distributed.tasks", "ray", {"torch", "pandas"}),  # decoding workers
        ("lfm_scan.storage", "boto3", {"pyarrow", "torch", "PIL", "ray", "pandas"}),
    ],
)
def test_each_layer_loads_only_what_it_needs(module: str, needs: str, forbidden: set[str]) -> None:
    loaded = modules_after(f"import {module}")
    assert needs in loaded
    assert not loaded & forbidden


def test_using_the_scorer_by_its_public_name_loads_no_ray() -> None:
    assert "ray" not in modules_after("import lfm_scan; lfm_scan.Scorer; lfm_scan.read_results; lfm_scan.ScanConfig")


def test_every_public_name_can_be_had() -> None:
    for name in lfm_scan.__all__:
        assert getattr(lfm_scan, name) is not None
    assert dir(lfm_scan) == sorted(lfm_scan.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Scroer'"):
        lfm_scan.Scroer  # noqa: B018


def instance_of(kind: type[Exception]) -> Exception:
    if kind is errors.ImageError:
        return errors.ImageError(Status.CORRUPT, "cannot be decoded: x", ImageInfo(format="PNG", width=7))
    return kind("s3://bucket/a: what is wrong")


@pytest.mark.parametrize("kind", _EXCEPTIONS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_exception_crosses_processes_with_its_message(kind: type[Exception], protocol: int) -> None:
    sent = instance_of(kind)
    received = pickle.loads(pickle.dumps(sent, protocol))
    assert type(received) is kind
    assert str(received) == str(sent) != ""
    assert received.args == sent.args
    assert received.__dict__ == sent.__dict__


def test_an_image_error_tells_status_and_message() -> None:
    error = instance_of(errors.ImageError)
    assert str(error) == "corrupt: cannot be decoded: x"


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if not name.endswith("Error"):
            continue
        depth = (len(line) - len(line.lstrip(" │├└─"))) // 4 - 1
        path[depth:] = [name]
        drawn[name] = path[-2] if len(path) > 1 else "Exception"
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in _EXCEPTIONS if kind.__base__ is not None}
