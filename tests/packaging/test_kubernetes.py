# SPDX-License-Identifier: GPL-2.0-or-later
"""Manifests: what Kustomize makes of them is valid in the newest releases, and asks for no more than it needs."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

import ksmd_ctl
from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import PolicyName
from tests.packaging.building import ROOT
from tests.packaging.manifests import (
    CREATED,
    FOLDER,
    NAMES,
    STORED,
    Document,
    containers,
    documents,
    kubectl,
    kustomized,
    violations,
)
from tests.packaging.test_fleet_rules import LEVELS, ZONE
from tests.packaging.test_monitoring import check

#: The three newest.
RELEASES = ("1.35", "1.36", "1.37")
CRDS = {"PrometheusRule": "prometheusrules", "ServiceMonitor": "servicemonitors"}


def stored(name: str) -> list[Document]:
    return documents((STORED / f"{name}.yaml").read_text())


def only(found: list[Document], kind: str) -> Document:
    (one,) = (document for document in found if document["kind"] == kind)
    return one


def pod_of(found: list[Document]) -> Document:
    pod: Document = only(found, "DaemonSet")["spec"]["template"]["spec"]
    return pod


def strict(schema: Any) -> Any:
    """A CRD's schema; the API server drops fields that it has not, and here they are mistakes."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found


def crd(kind: str) -> Any:
    """The schema of a custom resource's spec; Go's expressions may have their flags anywhere."""
    text = (ROOT / f"tests/packaging/crds/{CRDS[kind]}.json").read_text().replace('"^(?i)', '"(?i)^')
    return strict(json.loads(text)["properties"]["spec"])


@pytest.mark.parametrize("name", NAMES)
def test_kustomize_makes_what_is_stored(name: str) -> None:
    try:
        kubectl()
    except subprocess.CalledProcessError as error:
        pytest.skip(error.stderr)
    made = kustomized(CREATED[name])
    assert made == (STORED / f"{name}.yaml").read_text(), "python -m tests.packaging.manifests stores it"


def test_nothing_stored_is_left_over() -> None:
    assert {path.stem for path in STORED.iterdir()} == set(NAMES)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", NAMES)
def test_manifests_are_valid(name: str, release: str) -> None:
    for document in stored(name):
        if document["kind"] in CRDS:
            jsonschema.validate(document["spec"], crd(document["kind"]))
        else:
            assert kubernetes_validate.validate(document, release, strict=True) == release


def test_a_mistake_in_a_manifest_is_found() -> None:
    found = copy.deepcopy(stored("prometheus-operator"))
    pod_of(found)["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(only(found, "DaemonSet"), RELEASES[-1], strict=True)
    spec = only(found, "ServiceMonitor")["spec"]
    for wrong in ({"endpoints": [{"ports": "metrics"}]}, {"endpoints": [{"interval": "often"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spec | wrong, crd("ServiceMonitor"))


@pytest.mark.parametrize("name", NAMES)
def test_manifests_ask_for_no_more_than_they_need(name: str) -> None:
    assert list(violations(stored(name))) == []


def _set(key: str, value: object) -> Callable[[Document], None]:
    return lambda pod: pod.__setitem__(key, value)


def _change(*keys: str, value: object) -> Callable[[Document], None]:
    def change(pod: Document) -> None:
        found = pod["containers"][0]
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("hostNetwork", True), "hostNetwork: it needs none"),
        (_set("automountServiceAccountToken", True), "a token of the API server is mounted"),
        (_set("priorityClassName", ""), "it has no priority"),
        (_change("image", value="ksmd-ctl:latest"), "service: ksmd-ctl has no version"),
        (_change("image", value="ksmd-ctl"), "service: ksmd-ctl has no version"),
        (_change("resources", "limits", value={"cpu": 1}), "service: limits are missing"),
        (_change("securityContext", "privileged", value=True), "service: it is privileged"),
        (
            _change("securityContext", "readOnlyRootFilesystem", value=False),
            "service: its root file system is writable",
        ),
        (_change("securityContext", "capabilities", value={"drop": []}), "service: capabilities are not dropped"),
        (_change("securityContext", "allowPrivilegeEscalation", value=True), "service: it has privilege"),
        (_change("livenessProbe", value=None), None),
        (
            _change("volumeMounts", value=[{"name": "cgroup", "mountPath": "/x"}]),
            "service: /sys/fs/cgroup of the host is writable",
        ),
    ],
)
def test_the_policy_finds_what_is_too_much(change: Callable[[Document], None], said: str | None) -> None:
    found = copy.deepcopy(stored("base"))
    pod = pod_of(found)
    change(pod)
    if said is None:
        del pod["containers"][0]["livenessProbe"]
        said = "service: probes are missing"
    assert list(violations(found)) == [said]
    assert list(violations([{"kind": "ClusterRole"}])) == ["ClusterRole: it asks the API server for nothing"]


def test_the_containers_are_as_the_image_wants_them() -> None:
    pod = pod_of(stored("base"))
    broker, service = containers(pod)
    told = (ROOT / "docs/container.md").read_text()
    assert f"`{' '.join(broker['command'])}`" in told
    assert f"`{' '.join(service['command'])}`" in told
    unit = (ROOT / "systemd/ksmd-ctl-broker.service").read_text()
    (line,) = re.findall(r"^CapabilityBoundingSet=(.+)$", unit, re.MULTILINE)
    assert set(broker["securityContext"]["capabilities"]["add"]) - {"CHOWN"} == set(line.replace("CAP_", "").split())
    assert {one["image"] for one in (broker, service)} == {f"ksmd-ctl:{ksmd_ctl.__version__}"}
    shared = {mount["mountPath"] for mount in service["volumeMounts"]}
    assert shared <= set(re.findall(r"^\| `(/[^`]+)` \|", told, re.MULTILINE))
    assert shared < {mount["mountPath"] for mount in broker["volumeMounts"]}


@pytest.mark.parametrize(
    ("name", "policy", "unmatched"),
    [
        ("base", PolicyName.OBSERVE, None),
        ("prometheus-operator", PolicyName.OBSERVE, None),
        ("kubevirt", PolicyName.KUBEVIRT, None),
        ("domains-by-namespace", PolicyName.OBSERVE, "each namespace"),
        ("all", PolicyName.KUBEVIRT, "each namespace"),
    ],
)
def test_the_configuration_of_each_is_right(
    name: str, policy: PolicyName, unmatched: str | None, tmp_path: Path
) -> None:
    found = only(stored(name), "ConfigMap")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "ksmd-ctl.toml").write_text("")
    for file, text in found["data"].items():
        (tmp_path / "conf.d" / file).write_text(text)
    config = load(str(tmp_path / "ksmd-ctl.toml"))
    assert config.policy is policy
    assert (config.domains.unmatched if config.domains else None) == unmatched
    # Its name is that of its contents, and the pods take that.
    volumes = pod_of(stored(name))["volumes"]
    assert [one["configMap"]["name"] for one in volumes if "configMap" in one] == [found["metadata"]["name"]]


def test_the_rules_are_those_of_prometheus() -> None:
    spec = importlib.util.spec_from_file_location("rules", FOLDER / "rules.py")
    assert spec
    assert spec.loader
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    assert rules.TARGET.read_text() == rules.prometheus_rule(rules.SOURCE.read_text()), (
        "python3 packaging/kubernetes/rules.py makes it, and python -m tests.packaging.manifests stores the rest"
    )
    made = documents(rules.TARGET.read_text())[0]["spec"]
    assert made == documents(rules.SOURCE.read_text())[0]


def overlay_of_the_documentation(folder: Path) -> Path:
    """The overlay of docs/kubernetes.md, with the folder beside it."""
    text = re.sub(r"^   ", "", (ROOT / "docs/kubernetes.md").read_text(), flags=re.MULTILINE)
    (overlay,) = re.findall(r"^```yaml\n(# kustomization\.yaml\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    shutil.copytree(FOLDER, folder / "kubernetes")
    (folder / "overlay").mkdir()
    beside = overlay.replace("/path/to/packaging/kubernetes", "../kubernetes")
    (folder / "overlay/kustomization.yaml").write_text(beside)
    return folder / "overlay"


def relabelled(spec: Document, nodes: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """The labels that Prometheus gives the targets of a ServiceMonitor on some nodes, by their labels."""
    targets = [
        {
            "targets": [f"192.0.2.{number}:19753"],
            "labels": {f"__meta_kubernetes_node_label_{re.sub('[^a-zA-Z0-9]', '_', key)}": node[key] for key in node}
            | {"__meta_kubernetes_pod_node_name": f"worker-{number}"},
        }
        for number, node in enumerate(nodes, start=1)
    ]
    rules = [
        {re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", key): value for key, value in rule.items()}
        for rule in spec["endpoints"][0]["relabelings"]
    ]
    job = {"job_name": "ksmd-ctl", "static_configs": targets, "relabel_configs": rules}
    (folder / "prometheus.json").write_text(json.dumps({"scrape_configs": [job]}))
    said = check("check", "service-discovery", folder / "prometheus.json", "ksmd-ctl")
    # Each twice: as an entry of its own, and a line before all.
    found = [one["labels"] for one in json.loads(said[said.index("[") :])]
    return sorted(({k: v for k, v in one.items() if k[:2] != "__"} for one in found), key=lambda one: one["node"])


def test_the_labels_of_targets_are_those_that_the_rules_sum_by(tmp_path: Path) -> None:
    try:
        kubectl()
    except subprocess.CalledProcessError as error:
        pytest.skip(error.stderr)
    made = documents(kustomized(overlay_of_the_documentation(tmp_path)))
    assert {one["image"] for one in containers(pod_of(made))} == {f"registry.example/ksmd-ctl:{ksmd_ctl.__version__}"}
    spec = only(made, "ServiceMonitor")["spec"]
    jsonschema.validate(spec, crd("ServiceMonitor"))
    assert spec["attachMetadata"] == {"node": True}
    zone = {"topology.kubernetes.io/zone": "z1"}
    pools = [
        {"cloud.google.com/gke-nodepool": "general"},
        {"eks.amazonaws.com/nodegroup": "general"},
        {"kubernetes.azure.com/agentpool": "general"},
        {"karpenter.sh/nodepool": "general", "eks.amazonaws.com/nodegroup": "older"},
    ]
    found = relabelled(spec, [*(zone | pool for pool in pools), {}], tmp_path)
    always = [
        {"job": "ksmd-ctl", "cluster": "east", "node": f"worker-{n}", "instance": f"worker-{n}"} for n in range(1, 6)
    ]
    assert found[:4] == [one | {ZONE: "z1", "node_pool": "general"} for one in always[:4]]
    assert found[4] == always[4]
    assert {label for level in LEVELS.values() for label in level} == {"cluster", ZONE, "node_pool"}
