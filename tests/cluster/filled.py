"""The files of `cluster/` as a user has them: with values in the places of their placeholders."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Final

import yaml

from cluster.fill import fill, parse_values
from tests.scanning import REPOSITORY
from tests.servers import S3Server

CLUSTER: Final = REPOSITORY / "cluster"
INPUT_BUCKET: Final = "least-privilege-photos"
RUN_BUCKET: Final = "least-privilege-audits"
VALUES: Final = {
    **parse_values((CLUSTER / "values.example.env").read_text()),
    "INPUT_BUCKET": INPUT_BUCKET,
    "RUN_BUCKET": RUN_BUCKET,
}
SCAN: Final = "scan"
"""The identity of the tests' S3 server that has the policy of a scan, and nothing else."""


def filled(name: str) -> str:
    """Return a file of `cluster/` with all values filled in."""
    return fill((CLUSTER / name).read_text(), VALUES)


def documents(name: str) -> list[Any]:
    """Return the documents of a YAML file of `cluster/`."""
    return list(yaml.safe_load_all(filled(name)))


def policy(name: str) -> dict[str, Any]:
    """Return a policy of `cluster/iam`."""
    parsed: dict[str, Any] = json.loads(filled(f"iam/{name}.json"))
    return parsed


def without(sid: str) -> str:
    """Return the name of the identity that has the policy of a scan without one of its statements."""
    return f"{SCAN}-without-{sid}"


def scan_policies() -> dict[str, str]:
    """Return the policy of a scan, and what is left of it without each of its statements, by the identity's name."""
    whole = policy("scan")
    return {SCAN: json.dumps(whole)} | {
        without(left_out["Sid"]): json.dumps(
            {**whole, "Statement": [statement for statement in whole["Statement"] if statement is not left_out]}
        )
        for left_out in whole["Statement"]
    }


def make_buckets(server: S3Server) -> None:
    """Make the buckets that the policy of a scan speaks of, if they are not there."""
    client = server.client()
    for bucket in (INPUT_BUCKET, RUN_BUCKET):
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
