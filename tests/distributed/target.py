"""Something to scan with drivers that are processes of their own, and to check whatever becomes of them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

import lfm_scan
from lfm_scan.options import StorageConfig
from tests.images import encoded
from tests.scanning import REPOSITORY, command
from tests.servers import S3Server
from tests.waiting import PATIENCE_S, wait_until


@dataclass(frozen=True)
class Target:
    """A bucket with images, and how to scan it.

    Attributes:
        server: The store.
        bucket: In it.
        weights: Of the model.
        num_pictures: In it.
        shard_size: Of each scan.
    """

    server: S3Server
    bucket: str
    weights: Path
    num_pictures: int
    shard_size: int

    def arguments(self, output: str, endpoint_url: str, *more: object) -> list[str]:
        return command(
            *("scan", f"s3://{self.bucket}/in/", "--output", self.uri(output), "--weights", self.weights),
            *("--endpoint-url", endpoint_url, "--shard-size", self.shard_size, *more),
        )

    def uri(self, output: str) -> str:
        return f"s3://{self.bucket}/{output}"

    def start(self, *arguments: object, endpoint_url: str, output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.arguments(output, endpoint_url, *arguments),
            env={**os.environ, **self.server.env},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self, *arguments: object, output: str, endpoint_url: str | None = None, timeout_s: float = PATIENCE_S
    ) -> str:
        """Run a driver to its good end; return what it said."""
        driver = self.start(*arguments, endpoint_url=endpoint_url or self.server.endpoint_url, output=output)
        _, stderr = driver.communicate(timeout=timeout_s)
        assert driver.returncode == 0, stderr.decode()
        return stderr.decode()

    def frame(self, output: str) -> pd.DataFrame:
        return lfm_scan.read_results(self.uri(output), storage=StorageConfig(endpoint_url=self.server.endpoint_url))

    def num_parts(self, output: str) -> int:
        listed = self.server.client().list_objects_v2(Bucket=self.bucket, Prefix=f"{output}/parts/")
        return int(listed["KeyCount"])

    def wait_for_parts(self, output: str, driver: subprocess.Popen[bytes], num_parts: int) -> None:
        """Return once so many parts are committed, or the driver has ended."""
        wait_until(lambda: self.num_parts(output) >= num_parts or driver.poll() is not None)

    def expected_logits(self) -> dict[str, float]:
        """Return what each image must get."""
        results = lfm_scan.Scorer(self.weights).score(encoded(seed=index) for index in range(self.num_pictures))
        logits = [result.logit for result in results if result.logit is not None]
        return {f"s3://{self.bucket}/in/{index:04}.png": logit for index, logit in enumerate(logits)}

    def check(self, output: str, expected: dict[str, float]) -> None:
        """Every row is there once, with its score."""
        frame = self.frame(output)
        assert frame["uri"].is_unique
        assert dict(zip(frame["uri"], frame["logit"], strict=True)) == pytest.approx(expected, abs=1e-3)


def make_target(server: S3Server, bucket: str, weights: Path, num_pictures: int, shard_size: int) -> Target:
    """Fill a bucket with images."""
    for index in range(num_pictures):
        server.put(bucket, f"in/{index:04}.png", encoded(seed=index))
    return Target(server, bucket, weights, num_pictures, shard_size)
