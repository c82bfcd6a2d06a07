"""The policies of `cluster/iam`, enforced by a real store: SeaweedFS evaluates IAM policies, conditions included."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import botocore.exceptions
import pytest

from tests.cluster.filled import (
    CLUSTER,
    INPUT_BUCKET,
    RUN_BUCKET,
    SCAN,
    VALUES,
    filled,
    make_buckets,
    policy,
    scan_policies,
)
from tests.servers import S3Server

_POLICIES: Final = sorted(path.stem for path in (CLUSTER / "iam").glob("*.json"))


@pytest.fixture(scope="session")
def client(s3_server: S3Server) -> Any:  # noqa: ANN401 - boto3 makes its client classes at run time
    """Of the identity that may do what a scan does, in buckets that hold more than a scan should see."""
    make_buckets(s3_server)
    s3_server.client().create_bucket(Bucket="least-privilege-other")
    for bucket in (INPUT_BUCKET, RUN_BUCKET, "least-privilege-other"):
        for key in ("2026/a.png", "2025/a.png", "2026", "runs/1/config.json", "runs-of-others/1/config.json"):
            s3_server.put(bucket, key, b"here")
    return s3_server.client_of(SCAN)


def _status(call: Callable[..., Any], bucket: str, **arguments: object) -> int:
    try:
        return int(call(Bucket=bucket, **arguments)["ResponseMetadata"]["HTTPStatusCode"])
    except botocore.exceptions.ClientError as exc:
        return int(exc.response["ResponseMetadata"]["HTTPStatusCode"])


def test_a_scan_may_list_and_read_its_input_and_write_its_runs(client: Any) -> None:  # noqa: ANN401
    assert _status(client.list_objects_v2, INPUT_BUCKET, Prefix="2026/") == 200
    assert _status(client.list_objects_v2, INPUT_BUCKET, Prefix="2026/folder/", Delimiter="/") == 200
    assert _status(client.get_object, INPUT_BUCKET, Key="2026/a.png") == 200
    assert _status(client.get_object, INPUT_BUCKET, Key="2026/missing.png") == 404
    assert _status(client.list_objects_v2, RUN_BUCKET, Prefix="runs/1/parts/") == 200
    assert _status(client.get_object, RUN_BUCKET, Key="runs/1/config.json") == 200
    assert _status(client.put_object, RUN_BUCKET, Key="runs/1/part", Body=b"1", IfNoneMatch="*") == 200
    assert _status(client.put_object, RUN_BUCKET, Key="runs/1/part", Body=b"2", IfNoneMatch="*") == 412


def test_a_scan_may_not_delete(client: Any) -> None:  # noqa: ANN401
    assert _status(client.delete_object, RUN_BUCKET, Key="runs/1/config.json") == 403
    assert _status(client.delete_object, INPUT_BUCKET, Key="2026/a.png") == 403
    assert _status(client.delete_bucket, RUN_BUCKET) == 403


@pytest.mark.parametrize(
    ("bucket", "prefix"),
    [
        (INPUT_BUCKET, "2025/"),
        (INPUT_BUCKET, "2026"),
        (INPUT_BUCKET, "runs/"),
        (INPUT_BUCKET, ""),
        (RUN_BUCKET, "runs-of-others/"),
        (RUN_BUCKET, "2026/"),
        (RUN_BUCKET, ""),
        ("least-privilege-other", "2026/"),
        ("least-privilege-other", "runs/"),
    ],
)
def test_a_scan_may_not_look_elsewhere(client: Any, bucket: str, prefix: str) -> None:  # noqa: ANN401
    assert _status(client.list_objects_v2, bucket, Prefix=prefix) == 403
    assert _status(client.get_object, bucket, Key=f"{prefix}a.png") == 403


@pytest.mark.parametrize(
    ("bucket", "key"),
    [
        (INPUT_BUCKET, "2026/a.png"),
        (INPUT_BUCKET, "runs/1/config.json"),
        (RUN_BUCKET, "2026/a.png"),
        (RUN_BUCKET, "runs-of-others/1/config.json"),
        ("least-privilege-other", "runs/1/config.json"),
    ],
)
def test_a_scan_may_not_write_elsewhere(client: Any, bucket: str, key: str) -> None:  # noqa: ANN401
    assert _status(client.put_object, bucket, Key=key, Body=b"1") == 403
    assert _status(client.put_object, bucket, Key=f"{key}-new", Body=b"1", IfNoneMatch="*") == 403


def test_each_statement_of_a_scan_has_an_identity_without_it() -> None:
    sids = [statement["Sid"] for statement in policy("scan")["Statement"]]

    assert len(scan_policies()) == 1 + len(sids) == 5


@pytest.mark.parametrize("name", _POLICIES)
def test_every_policy_allows_single_actions_and_names_no_other_account(name: str) -> None:
    document = policy(name)
    actions = [action for each in document["Statement"] for action in _as_list(each["Action"])]

    assert document["Version"] == "2012-10-17"
    assert {each["Effect"] for each in document["Statement"]} == {"Allow"}
    assert not [action for action in actions if "*" in action]
    assert not [action for action in actions if "Delete" in action]
    assert len({each["Sid"] for each in document["Statement"]}) == len(document["Statement"])
    assert all(account in ("", "aws", VALUES["ACCOUNT"]) for account in _accounts(document))


def test_only_describing_machines_names_no_resource() -> None:
    statements = [statement for name in _POLICIES for statement in policy(name)["Statement"]]

    anywhere = [each["Action"] for each in statements if "*" in _as_list(each.get("Resource"))]

    assert anywhere == ["ec2:DescribeInstances"]  # for which AWS knows none


def test_the_pods_role_is_taken_by_the_service_accounts_of_the_manifests_alone() -> None:
    (statement,) = policy("trust-pods")["Statement"]
    equal = statement["Condition"]["StringEquals"]
    accounts = equal[f"{VALUES['OIDC_PROVIDER']}:sub"]

    assert equal[f"{VALUES['OIDC_PROVIDER']}:aud"] == "sts.amazonaws.com"
    assert accounts == ["system:serviceaccount:lfm-scan:lfm-scan-head", "system:serviceaccount:lfm-scan:lfm-scan"]
    for account in accounts:
        assert f"name: {account.rpartition(':')[2]}\n" in filled("kuberay/namespace.yaml")


def _accounts(document: dict[str, Any]) -> set[str]:
    arns = [text for text in json.dumps(document).split('"') if text.startswith("arn:")]
    return {arn.split(":")[4] for arn in arns}


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]
