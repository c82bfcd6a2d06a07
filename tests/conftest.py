"""Fixtures that several folders share. Whatever is slow to make is made once a session and never changed by a test."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from xdist.scheduler import LoadScopeScheduling

from lfm_scan.model import LFM, CheckpointMetadata, save_checkpoint
from lfm_scan.storage.s3_client import forget_clients
from tests.cluster.filled import scan_policies
from tests.servers import S3Server, run_s3_server
from tests.waiting import PATIENCE_S

_SHARED = Path(__file__).resolve().parents[2] / "shared"


# A shell that starts the tests in the background makes them, and the programs they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


class _RayByFile(LoadScopeScheduling):  # type: ignore[misc]  # has no types
    """Gives the tests of a file that start or share a Ray to one worker, and the files with most of them first."""

    def _split_scope(self, nodeid: str) -> str:
        has_ray = nodeid.startswith(("tests/cli/", "tests/distributed/"))
        return nodeid.partition("::")[0] if has_ray else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _RayByFile:
    """Tell pytest-xdist how to spread the tests."""
    return _RayByFile(config, log)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that refuses unsigned requests; besides the admin it knows the identities of `cluster/iam`."""
    with run_s3_server(tmp_path_factory.mktemp("seaweedfs"), scan_policies()) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, and the environment with which this process may use it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    forget_clients()  # clients keep the credentials they were made with
    bucket = f"test-{uuid.uuid4().hex[:16]}"
    s3_server.client().create_bucket(Bucket=bucket)
    yield bucket
    forget_clients()


@pytest.fixture(scope="session", autouse=True)
def _no_heartbeat_is_left() -> Iterator[None]:
    """Have runs wait for their last beats: those to a store that went away would be requests of the next test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lfm_scan.runs.heartbeat._LAST_BEAT_WAIT_S", PATIENCE_S)
        yield


@pytest.fixture(scope="session")
def local_ray(s3_server: S3Server) -> Iterator[None]:
    """A Ray of two CPUs for all tests of this process, whose workers, for whatever driver, may use the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)  # its processes keep the environment they were started with
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def joined_ray(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the drivers that a test starts join this Ray; one of their own costs each ten CPU seconds."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="session")
def dev_data() -> Path:
    """The folder with dev.csv and dev/."""
    return _existing(_SHARED / "data")


@pytest.fixture(scope="session")
def published_weights() -> Path:
    """The authors' checkpoint."""
    return _existing(_SHARED / "weights" / "lfm_official.pth")


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file with seeded random weights, the same in every session."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LFM()
        with torch.no_grad():
            model.head.weight.mul_(1e4)  # fresh weights score everything alike; these tell images apart
    metadata = CheckpointMetadata(model_id="lfm-test", preprocess="crop256")
    path = tmp_path_factory.mktemp("weights") / "lfm-test.safetensors"
    path.write_bytes(save_checkpoint(model, metadata))
    return path


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the repository")
    return path
