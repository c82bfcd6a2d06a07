"""A scan with the policy of `cluster/iam/scan.json` and nothing more, enforced by a real store."""

from __future__ import annotations

import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import botocore.exceptions
import pytest

import lfm_scan
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.scan import Listener
from lfm_scan.options import ComputeConfig, StorageConfig
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import Receipt
from lfm_scan.runs.state import read_state
from lfm_scan.storage.s3_client import forget_clients
from tests.cluster.filled import INPUT_BUCKET, RUN_BUCKET, SCAN, VALUES, make_buckets, without
from tests.faults import FaultProxy, Record
from tests.images import encoded
from tests.servers import S3Server

_NUM_PICTURES: Final = 40

_NEEDED: Final = {
    "ListInput": {("list", INPUT_BUCKET)},
    "ReadInput": {("get", INPUT_BUCKET)},
    "ListRuns": {("list", RUN_BUCKET)},
    "ReadAndWriteRuns": {("get", RUN_BUCKET), ("put", RUN_BUCKET)},
}
"""What a scan could not do without each statement of its policy."""


class _InterruptOnce(Listener):
    def shard_done(self, receipt: Receipt) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def in_role(s3_server: S3Server, s3_bucket: str, local_ray: None) -> Iterator[FaultProxy]:
    """A proxy that notes what is asked of the store; nobody in this test is the admin unless it says so."""
    make_buckets(s3_server)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy
    forget_clients()


def test_a_scan_stopped_resumed_and_finished_needs_its_policy_and_every_statement_of_it(
    in_role: FaultProxy, s3_server: S3Server, tiny_weights: Path
) -> None:
    folder = f"{VALUES['INPUT_PREFIX']}{uuid.uuid4().hex}/"
    for index in range(_NUM_PICTURES):
        s3_server.put(INPUT_BUCKET, f"{folder}{index:03}.png", encoded(seed=index))
    config = ScanConfig(
        (f"s3://{INPUT_BUCKET}/{folder}",),
        output=f"s3://{RUN_BUCKET}/{VALUES['RUN_PREFIX']}{uuid.uuid4().hex}",
        weights=str(tiny_weights),
        compute=ComputeConfig(shard_size=1),
        storage=StorageConfig(endpoint_url=in_role.endpoint_url, profile=SCAN),
    )

    with pytest.raises(KeyboardInterrupt):
        lfm_scan.scan(config, _InterruptOnce())
    outcome = lfm_scan.scan(config)
    again = lfm_scan.scan(config)
    state = read_state(RunDirectory.at(config.output, config.storage))

    assert 0 < outcome.num_rows_resumed < _NUM_PICTURES
    assert dict(outcome.summary.by_status) == {"ok": _NUM_PICTURES}
    assert again.already_finished
    assert state.num_rows == _NUM_PICTURES
    journal = in_role.journal
    assert not [record for record in journal if record.status in (401, 403)]
    asked = {_call_of(record) for record in journal}
    assert not _denied(s3_server, SCAN, asked)
    for sid, needed in _NEEDED.items():
        assert {(operation, bucket) for operation, bucket, _ in _denied(s3_server, without(sid), asked)} == needed, sid
    # AWS says 404 to those who may list the key, and 403 to others: a run that is not there yet must look like one.
    missing = [_call_of(record) for record in journal if record.status == 404]
    assert missing
    assert not _denied(s3_server, SCAN, [("list", bucket, key) for _, bucket, key in missing])


_Call = tuple[str, str, str]
"""An operation, a bucket, and a key or the prefix of keys."""


def _call_of(record: Record) -> _Call:
    """Return what a request means to S3. A HEAD of an object is allowed by whatever allows to get it."""
    bucket, _, key = urllib.parse.unquote(record.path).removeprefix("/").partition("/")
    query = urllib.parse.parse_qs(record.query)
    operations = {"GET": "get", "HEAD": "get", "PUT": "put"}
    if key:
        return operations[record.method], bucket, key
    assert (record.method, query["list-type"]) == ("GET", ["2"])
    return "list", bucket, query["prefix"][0]


def _denied(server: S3Server, identity: str, calls: Iterable[_Call]) -> set[_Call]:
    """Return the calls that the store refuses an identity."""
    client = server.client_of(identity)
    do: dict[str, Callable[[str, str], Any]] = {
        "list": lambda bucket, prefix: client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1),
        "get": lambda bucket, key: client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0"),
        "put": lambda bucket, key: client.put_object(Bucket=bucket, Key=key, Body=b"", IfNoneMatch="*"),
    }
    denied = set()
    for operation, bucket, key in calls:
        try:
            do[operation](bucket, key)
        except botocore.exceptions.ClientError as exc:
            if exc.response["ResponseMetadata"]["HTTPStatusCode"] == 403:
                denied.add((operation, bucket, key))
    return denied
