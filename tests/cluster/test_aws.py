"""The cluster of `cluster/aws.yaml` in the eyes of Ray: its schema, its defaults, and what its autoscaler decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import botocore.session
import jsonschema
import pytest
from botocore.client import BaseClient
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent  # type: ignore[attr-defined]

from tests.cluster.filled import VALUES, documents, policy

_TYPES: Final = ["decode-on-demand", "decode-spot", "head", "score-on-demand", "score-spot"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The file as `ray up` reads it, with a key and a token where it looks for them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f".ssh/{VALUES['KEY_NAME']}.pem", ".ray/auth_token"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("a secret")
    (found,) = documents("aws.yaml")
    prepared: dict[str, Any] = prepare_config(found)
    return prepared


def test_ray_takes_the_cluster_with_nothing_missing(config: dict[str, Any]) -> None:
    validate_config(config)

    assert sorted(config["available_node_types"]) == _TYPES
    assert config["docker"]["image"] == VALUES["IMAGE_CPU"]


def test_rays_schema_finds_a_misspelt_field(config: dict[str, Any]) -> None:
    config["available_node_types"]["score-spot"]["max_worker"] = 3

    with pytest.raises(jsonschema.ValidationError, match="'max_worker' was unexpected"):
        validate_config(config)


@pytest.mark.parametrize("node_type", _TYPES)
def test_aws_takes_every_machine(config: dict[str, Any], node_type: str) -> None:
    """Its own model of RunInstances knows all fields and their types."""
    request = dict(config["available_node_types"][node_type]["node_config"])
    (request["SubnetId"], _) = request.pop("SubnetIds")  # as Ray does
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape

    report = botocore.validate.ParamValidator().validate({**request, "MinCount": 1, "MaxCount": 1}, shape)

    assert not report.has_errors(), report.generate_report()


def test_machines_are_private_and_closed(config: dict[str, Any]) -> None:
    assert config["provider"]["use_internal_ips"] is True
    for node_type in config["available_node_types"].values():
        machine = node_type["node_config"]
        assert machine["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert machine["SubnetIds"] == [VALUES["SUBNET_A"], VALUES["SUBNET_B"]]
        assert machine["SecurityGroupIds"] == [VALUES["SECURITY_GROUP"]]  # Ray's own would open ssh to the world
        assert [disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"]] == [True]


def test_only_the_head_may_start_machines(config: dict[str, Any]) -> None:
    roles = {name: each["node_config"]["IamInstanceProfile"] for name, each in config["available_node_types"].items()}

    assert roles.pop("head") == {"Name": VALUES["HEAD_ROLE"]}
    assert list(roles.values()) == 4 * [{"Name": VALUES["WORKER_ROLE"]}]


def test_nobody_gets_in_without_a_token_or_sees_the_dashboard(config: dict[str, Any]) -> None:
    (_, start), (_, join) = config["head_start_ray_commands"], config["worker_start_ray_commands"]

    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--num-cpus=0" in start.split()
    assert "--address=$RAY_HEAD_IP:6379" in join.split()


def test_spot_and_on_demand_differ_in_nothing_but_the_market(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    for work in ("decode", "score"):
        spot, on_demand = types[f"{work}-spot"], types[f"{work}-on-demand"]
        market = spot["node_config"].pop("InstanceMarketOptions")

        assert market["MarketType"] == "spot"
        assert spot["node_config"] == on_demand["node_config"]
        assert spot["resources"] == on_demand["resources"]
        assert spot["priority"] > on_demand["priority"]


def test_no_machine_runs_for_nothing(config: dict[str, Any]) -> None:
    types = config["available_node_types"]

    assert {name: each["min_workers"] for name, each in types.items()} == dict.fromkeys(_TYPES, 0)
    assert config["max_workers"] == sum(each["max_workers"] for each in types.values()) == 15
    assert config["idle_timeout_minutes"] == 5
    assert config["provider"]["cache_stopped_nodes"] is False


def test_the_autoscaler_takes_spot_machines_first(config: dict[str, Any]) -> None:
    assert _launched(config, cpus=32, gpus=2) == {"decode-spot": 2, "score-spot": 2}


def test_the_autoscaler_goes_on_demand_where_spot_has_all_it_may(config: dict[str, Any]) -> None:
    assert _launched(config, gpus=6) == {"score-spot": 4, "score-on-demand": 1}


def test_the_autoscaler_stays_with_spot_when_aws_has_none(config: dict[str, Any]) -> None:
    """What docs/deploy.md says of Ray. Once this fails, Ray has learned to fall back, and the page can say so."""
    refused, never_ready = Instance.ALLOCATION_FAILED, Instance.ALLOCATION_TIMEOUT

    assert _launched(config, gpus=1, failed=("score-spot", refused)) == {"score-spot": 1}
    assert _launched(config, gpus=1, failed=("score-spot", never_ready)) == {"score-on-demand": 1}


def test_the_autoscaler_goes_on_demand_once_spot_is_switched_off(config: dict[str, Any]) -> None:
    for name in ("decode-spot", "score-spot"):
        config["available_node_types"][name]["max_workers"] = 0

    assert _launched(config, cpus=16, gpus=1) == {"decode-on-demand": 1, "score-on-demand": 1}


def test_the_head_may_start_these_machines_and_no_others(config: dict[str, Any]) -> None:
    statements = {each["Sid"]: each for each in policy("autoscaler")["Statement"]}
    machine = config["available_node_types"]["score-spot"]["node_config"]
    named = statements["OutOfTheseParts"]["Resource"]

    assert {arn.partition("/")[2] for arn in named} - {"*"} == {
        machine["ImageId"],
        machine["KeyName"],
        *machine["SubnetIds"],
        *machine["SecurityGroupIds"],
    }
    tag = statements["StartMachinesOfThisCluster"]["Condition"]["StringEquals"]["aws:RequestTag/ray-cluster-name"]
    assert tag == config["cluster_name"]
    passed = statements["GiveWorkersTheirRole"]["Resource"]
    assert passed == f"arn:aws:iam::{VALUES['ACCOUNT']}:role/{machine['IamInstanceProfile']['Name']}"


def test_the_head_may_call_what_rays_provider_calls_and_nothing_else(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()
    machine = {"InstanceId": "i-1", "State": {"Name": "running"}, "Tags": []}

    def answer(client: BaseClient, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        called.add(f"{client.meta.service_model.service_name}:{operation}")
        found = [machine]
        return {"Instances": found} if operation == "RunInstances" else {"Reservations": [{"Instances": found}]}

    monkeypatch.setattr(BaseClient, "_make_api_call", answer)
    monkeypatch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
    provider: Any = AWSNodeProvider(config["provider"], config["cluster_name"])  # type: ignore[no-untyped-call]
    for node_type in config["available_node_types"].values():
        provider.create_node(node_type["node_config"], {"ray-node-kind": "worker"}, 1)
    (node,) = provider.non_terminated_nodes({})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    provider.terminate_nodes([node])

    allowed = {action for each in policy("autoscaler")["Statement"] for action in _as_list(each["Action"])}
    assert allowed == called | {"iam:PassRole"}  # which AWS asks for when a machine gets its role


def _as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _launched(
    config: Mapping[str, Any], *, cpus: int = 0, gpus: int = 0, failed: tuple[str, int] | None = None
) -> dict[str, int]:
    """Return which machines Ray's autoscaler starts for tasks that wait for so many CPUs and GPUs, one each."""
    autoscaling = AutoscalingConfig(dict(config), skip_content_hash=True)
    monitor = CloudResourceMonitor()
    if failed is not None:
        name, status = failed
        monitor.notify([InstanceUpdateEvent(instance_id="1", instance_type=name, new_instance_status=status)])
    waiting = cpus * [ResourceRequestUtil.make({"CPU": 1})] + gpus * [ResourceRequestUtil.make({"CPU": 1, "GPU": 1})]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=autoscaling.get_node_type_configs(),
        max_num_nodes=autoscaling.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(waiting),
        cloud_resource_availabilities=monitor.get_resource_availabilities(),
        recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
    )
    started: Counter[str] = Counter()
    for launch in ResourceDemandScheduler().schedule(request).to_launch:
        started[launch.instance_type] += launch.count
    started.pop("head", None)  # there is one already
    return dict(started)
