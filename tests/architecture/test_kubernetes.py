"""The manifests match Kubernetes' own schemas and the description in docs/kubernetes.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy/kubernetes"
VERSION = "1.34"
Manifest = dict[str, Any]

# The RayCluster fields that we use (KubeRay's CRD API reference, ray.io/v1); pod templates are checked separately.
GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
    "template": {"type": "object"},
}
NUMBER = {"type": "integer", "minimum": 0}
RAY_CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec", "workerGroupSpecs", "rayVersion", "authOptions"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {"properties": {"mode": {"enum": ["token"]}}, "required": ["mode"]},
        "headGroupSpec": {"properties": GROUP, "required": list(GROUP), "additionalProperties": False},
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "properties": {
                    **GROUP,
                    "groupName": {"type": "string"},
                    "replicas": NUMBER,
                    "minReplicas": NUMBER,
                    "maxReplicas": NUMBER,
                },
                "required": [*GROUP, "groupName", "replicas"],
                "additionalProperties": False,
            },
        },
    },
}


def manifests() -> Iterator[tuple[str, Manifest]]:
    """Return (name, manifest) of each document in the kustomization's files; the folder must contain no others."""
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in FOLDER.iterdir()}
    for name in listed:
        for manifest in yaml.safe_load_all((FOLDER / name).read_text()):
            yield f"{name}: {manifest['kind']} {manifest['metadata']['name']}", manifest


ALL = dict(manifests())
BY_KIND = {manifest["kind"]: manifest for manifest in ALL.values()}


def every(kind: str) -> list[Manifest]:
    """Return all manifests of a kind."""
    return [manifest for manifest in ALL.values() if manifest["kind"] == kind]


def templates() -> dict[str, Manifest]:
    """Return the pod templates by name: head, server and each worker group."""
    cluster = BY_KIND["RayCluster"]["spec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], "server": BY_KIND["Deployment"]["spec"]["template"], **groups}


@pytest.mark.parametrize("name", [name for name in ALL if "RayCluster" not in name])
def test_a_manifest_fits_its_schema(name: str) -> None:
    """Validation is strict: an unknown field is an error."""
    kubernetes_validate.validate(ALL[name], VERSION, strict=True)


def test_the_ray_cluster_fits_its_fields() -> None:
    jsonschema.validate(BY_KIND["RayCluster"]["spec"], RAY_CLUSTER)


@pytest.mark.parametrize("name", templates())
def test_a_pod_template_fits_its_schema(name: str) -> None:
    """The pod templates inside the RayCluster are valid as well, although the RayCluster schema does not check them."""
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": templates()[name]}
    kubernetes_validate.validate(pod, VERSION, strict=True)


def test_an_unknown_field_is_seen() -> None:
    """Strict validation rejects a misspelled field."""
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": {"spec": {"contaners": []}}}
    with pytest.raises(jsonschema.ValidationError):
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("name", templates())
def test_a_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    spec = templates()[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    assert not spec["enableServiceLinks"], "variables injected for services could be mistaken for settings"
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        assert "memory" in container["resources"]["limits"]


def test_there_are_as_many_nodes_as_the_server_asks_for() -> None:
    environment = {each["name"]: each.get("value") for each in templates()["server"]["spec"]["containers"][0]["env"]}
    (group,) = BY_KIND["RayCluster"]["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    assert int(environment["SHARDLOSS_SERVER_WORKERS"]) == group["replicas"] * int(group["rayStartParams"]["num-cpus"])


def test_every_selector_finds_the_pods_it_means() -> None:
    """Each selector uses only labels that the Ray operator, the Deployment or a client's pods set."""
    labels = templates()["server"]["metadata"]["labels"]
    for manifest in ALL.values():
        for selector in selectors(manifest.get("spec", {})):
            known = labels | {"ray.io/cluster": "shardloss", "ray.io/node-type": "worker", "shardloss-client": "true"}
            assert selector.items() <= known.items(), f"{manifest['kind']}: {selector}"


def selectors(value: Any) -> Iterator[dict[str, str]]:
    """Return the label selectors of pods anywhere in a manifest."""
    if isinstance(value, list):
        for each in value:
            yield from selectors(each)
    elif isinstance(value, dict):
        for key, below in value.items():
            if key in ("podSelector", "selector", "labelSelector"):
                yield below.get("matchLabels", below)
            else:
                yield from selectors(below)


def test_a_disruption_budget_is_one_that_its_pods_owner_allows() -> None:
    """Only an owner with a scale subresource, such as a Deployment, may have maxUnavailable or a percentage.

    For a RayCluster, Kubernetes accepts only an integer minAvailable, which must count its head and all workers. No two
    budgets select the same pod, because such a pod could never be evicted.
    """
    budgets = {each["metadata"]["name"]: each["spec"] for each in every("PodDisruptionBudget")}
    (group,) = BY_KIND["RayCluster"]["spec"]["workerGroupSpecs"]
    of_ray = {"ray.io/cluster": BY_KIND["RayCluster"]["metadata"]["name"]}
    of_server = templates()["server"]["metadata"]["labels"]
    assert budgets == {
        "shardloss-ray": {"minAvailable": 1 + group["replicas"], "selector": {"matchLabels": of_ray}},
        "shardloss-server": {"maxUnavailable": 0, "selector": {"matchLabels": of_server}},
    }


@pytest.mark.parametrize("name", templates())
def test_a_pod_names_only_volumes_and_ports_that_it_has(name: str) -> None:
    """Schemas do not check references: a mount's volume, a gRPC probe's port, a stop that outlasts the drain."""
    spec = templates()[name]["spec"]
    (container,) = spec["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in spec["volumes"]}
    ports = {port["containerPort"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if "grpc" in container.get(probe, {}):
            assert container[probe]["grpc"]["port"] in ports
    environment = {each["name"]: each.get("value") for each in container.get("env", [])}
    if "SHARDLOSS_SERVER_DRAIN_S" in environment:
        drain_s, liveness = float(environment["SHARDLOSS_SERVER_DRAIN_S"]), container["livenessProbe"]
        assert spec["terminationGracePeriodSeconds"] > drain_s
        assert liveness["periodSeconds"] * liveness["failureThreshold"] > drain_s


def test_services_and_policies_name_ports_that_the_server_has() -> None:
    (container,) = templates()["server"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for port in BY_KIND["Service"]["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]
    for policy in every("NetworkPolicy"):
        allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
        assert allowed <= set(ports.values())
