"""The manifests of `cluster/kuberay` against KubeRay's own definitions."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from lfm_scan.version import __version__
from tests.cluster.crd import Definition, definition
from tests.cluster.filled import CLUSTER, VALUES, documents
from tests.scanning import REPOSITORY

_SCHEMAS: Final = REPOSITORY.parent / "shared" / "schemas"
_GIB: Final = re.compile(r"(\d+)Gi")


def _definition(name: str) -> Definition:
    path = _SCHEMAS / f"ray.io_{name}s.yaml"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the repository")
    return definition(path)


@pytest.fixture
def cluster() -> Any:  # noqa: ANN401 - whatever the manifest is
    (manifest,) = documents("kuberay/raycluster.yaml")
    return copy.deepcopy(manifest)


@pytest.fixture
def job() -> Any:  # noqa: ANN401
    (manifest,) = documents("kuberay/rayjob.yaml")
    return copy.deepcopy(manifest)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_the_manifest_is_what_the_definition_asks_for(name: str) -> None:
    (manifest,) = documents(f"kuberay/{name}.yaml")
    found = _definition(name)

    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", found.kind)
    assert found.errors(manifest) == []


def _misspell(spec: dict[str, Any]) -> None:
    spec["enableInTreeAutoScaling"] = spec.pop("enableInTreeAutoscaling")


def _misplace(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["template"]["spec"]["lifecycle"] = {}


def _mistype(spec: dict[str, Any]) -> None:
    spec["workerGroupSpecs"][0]["minReplicas"] = "0"


def _misname(spec: dict[str, Any]) -> None:
    spec["authOptions"]["mode"] = "tokens"


def _forget(spec: dict[str, Any]) -> None:
    del spec["workerGroupSpecs"][1]["groupName"]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_misspell, "spec: Additional properties are not allowed ('enableInTreeAutoScaling' was unexpected)"),
        (
            _misplace,
            "spec.headGroupSpec.template.spec: Additional properties are not allowed ('lifecycle' was unexpected)",
        ),
        (_mistype, "spec.workerGroupSpecs.0.minReplicas: '0' is not of type 'integer'"),
        (_misname, "spec.authOptions.mode: 'tokens' is not one of ['disabled', 'token']"),
        (_forget, "spec.workerGroupSpecs.1: 'groupName' is a required property"),
    ],
)
def test_a_spoiled_manifest_is_found_out(
    cluster: dict[str, Any], spoil: Callable[[dict[str, Any]], None], error: str
) -> None:
    spoil(cluster["spec"])

    assert _definition("raycluster").errors(cluster) == [error]


def test_the_job_brings_the_very_cluster_of_the_other_manifest(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["metadata"]["namespace"] == cluster["metadata"]["namespace"] == VALUES["NAMESPACE"]


def test_the_job_goes_on_after_a_failure_and_leaves_nothing_running(job: dict[str, Any]) -> None:
    spec = job["spec"]

    assert spec["entrypoint"].startswith("python /home/ray/jobs/scan.py s3://")
    assert spec["backoffLimit"] == 2
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 3600


def test_nodes_come_and_go_and_the_head_does_no_work(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]

    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert {group["groupName"]: (group["minReplicas"], group["maxReplicas"]) for group in spec["workerGroupSpecs"]} == {
        "decode": (0, 8),
        "score": (0, 4),
    }
    # A pod that came back under its old name would be another node of Ray's: the autoscaler counts pods.
    assert {pod["restartPolicy"] for pod in _pods(spec)} == {"Never"}


def test_every_pod_has_what_it_asks_for_and_room_for_rays_object_store(cluster: dict[str, Any]) -> None:
    for pod in _pods(cluster["spec"]):
        (container,) = pod["containers"]
        (volume,) = pod["volumes"]
        requests = container["resources"]["requests"]

        assert requests == container["resources"]["limits"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm"]
        assert volume["emptyDir"]["medium"] == "Memory"
        # Ray takes 30 % of the memory for it, and goes to the disk if the folder is smaller.
        assert 0.3 * _gib(requests["memory"]) <= _gib(volume["emptyDir"]["sizeLimit"]) < 0.5 * _gib(requests["memory"])


def test_only_scoring_pods_have_a_gpu_and_its_image(cluster: dict[str, Any]) -> None:
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        scores = group["groupName"] == "score"

        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == scores
        assert container["image"] == VALUES["IMAGE_CUDA" if scores else "IMAGE_CPU"]
        assert container["image"].endswith(f":{__version__}-{'cuda' if scores else 'cpu'}")


def test_pods_have_no_rights_and_a_token_but_no_secret(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]

    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in _pods(spec):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert "env" not in container
        assert "envFrom" not in container
    for group in spec["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_namespace_lets_in_the_operator_and_prometheus_alone() -> None:
    namespace, *accounts, network = documents("kuberay/namespace.yaml")
    inside, *others = network["spec"]["ingress"]

    assert namespace["metadata"]["name"] == VALUES["NAMESPACE"]
    role = f"arn:aws:iam::{VALUES['ACCOUNT']}:role/{VALUES['POD_ROLE']}"
    assert [account["metadata"]["annotations"] for account in accounts] == 2 * [{"eks.amazonaws.com/role-arn": role}]
    assert network["spec"]["podSelector"] == {}
    assert inside == {"from": [{"podSelector": {}}]}
    allowed = [
        (source["podSelector"]["matchLabels"], [port["port"] for port in each["ports"]])
        for each in others
        for source in each["from"]
    ]
    assert allowed == [
        ({"app.kubernetes.io/name": "kuberay-operator"}, [8265]),
        ({"app.kubernetes.io/name": "prometheus"}, [8080]),
    ]


def test_accounts_of_pods_are_those_of_the_namespace(cluster: dict[str, Any]) -> None:
    accounts = {
        each["metadata"]["name"] for each in documents("kuberay/namespace.yaml") if each["kind"] == "ServiceAccount"
    }

    assert {pod["serviceAccountName"] for pod in _pods(cluster["spec"])} == accounts


def test_rays_version_is_that_of_the_locks(cluster: dict[str, Any]) -> None:
    for lock in (CLUSTER / "lock").glob("*.txt"):
        assert f"\nray=={cluster['spec']['rayVersion']} " in lock.read_text()


def _pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def _gib(quantity: str) -> int:
    match = _GIB.fullmatch(quantity)
    assert match is not None, quantity
    return int(match[1])
