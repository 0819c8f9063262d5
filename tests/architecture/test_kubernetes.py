"""The manifests fit Kubernetes' own schemas, and say what docs/kubernetes.md promises."""

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

# Fields of a RayCluster that we use (KubeRay's CRD API reference, ray.io/v1); the templates are checked as pods.
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
    """Every document of every file that the kustomization lists, and no other."""
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in FOLDER.iterdir()}
    for name in listed:
        for manifest in yaml.safe_load_all((FOLDER / name).read_text()):
            yield f"{name}: {manifest['kind']}", manifest


ALL = dict(manifests())
BY_KIND = {manifest["kind"]: manifest for manifest in ALL.values()}


def templates() -> dict[str, Manifest]:
    """The pod templates."""
    cluster = BY_KIND["RayCluster"]["spec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], "server": BY_KIND["Deployment"]["spec"]["template"], **groups}


@pytest.mark.parametrize("name", [name for name in ALL if "RayCluster" not in name])
def test_a_manifest_fits_its_schema(name: str) -> None:
    """Strictly: an unknown field is an error."""
    kubernetes_validate.validate(ALL[name], VERSION, strict=True)


def test_the_ray_cluster_fits_its_fields() -> None:
    jsonschema.validate(BY_KIND["RayCluster"]["spec"], RAY_CLUSTER)


@pytest.mark.parametrize("name", templates())
def test_a_pod_template_fits_its_schema(name: str) -> None:
    """Also those inside the RayCluster, whose own schema leaves them open."""
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": templates()[name]}
    kubernetes_validate.validate(pod, VERSION, strict=True)


def test_an_unknown_field_is_seen() -> None:
    """The check is one."""
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": {"spec": {"contaners": []}}}
    with pytest.raises(jsonschema.ValidationError):
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("name", templates())
def test_a_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    spec = templates()[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    assert not spec["enableServiceLinks"], "variables of services would look like settings"
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
    """The operator labels its pods ray.io/cluster; the others carry what the Deployment gives them."""
    labels = templates()["server"]["metadata"]["labels"]
    for manifest in ALL.values():
        for selector in selectors(manifest.get("spec", {})):
            known = labels | {"ray.io/cluster": "shardloss", "ray.io/node-type": "worker", "shardloss-client": "true"}
            assert selector.items() <= known.items(), f"{manifest['kind']}: {selector}"


def selectors(value: Any) -> Iterator[dict[str, str]]:
    """Every selector of pods below a value."""
    if isinstance(value, list):
        for each in value:
            yield from selectors(each)
    elif isinstance(value, dict):
        for key, below in value.items():
            if key in ("podSelector", "selector", "labelSelector"):
                yield below.get("matchLabels", below)
            else:
                yield from selectors(below)
