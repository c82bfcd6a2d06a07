"""One small Ray for all tests that scan in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from tests.servers import S3Server


@pytest.fixture(scope="session")
def local_ray(s3_server: S3Server) -> Iterator[None]:
    """A Ray of two CPUs whose workers may use the S3 server."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(s3_server.env)})
    yield
    ray.shutdown()
