"""One small Ray for all tests that scan in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from tests.servers import S3Server


@pytest.fixture(scope="session")
def local_ray(s3_server: S3Server) -> Iterator[None]:
    """A Ray of two CPUs whose workers, for whatever driver, may use the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)  # its processes keep the environment they were started with
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
