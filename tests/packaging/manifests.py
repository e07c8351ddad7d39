# SPDX-License-Identifier: GPL-2.0-or-later
"""What Kustomize makes of packaging/kubernetes, and a policy for it.

python -m tests.packaging.manifests stores what it makes now in tests/packaging/kubernetes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.packaging.building import ROOT

__all__ = ["CREATED", "FOLDER", "NAMES", "STORED", "containers", "documents", "kubectl", "kustomized", "violations"]

FOLDER = ROOT / "packaging/kubernetes"
STORED = ROOT / "tests/packaging/kubernetes"
#: By name, the folder that `kubectl apply -k` takes.
CREATED = {"base": FOLDER / "base", **{path.name: path for path in sorted((FOLDER / "overlays").iterdir())}}
NAMES = tuple(CREATED)

Document = dict[str, Any]


@cache
def kubectl() -> str:
    """A kubectl that is new enough; raises CalledProcessError where none can be had."""
    done = subprocess.run([ROOT / "tools/kubectl"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def kustomized(folder: Path) -> str:
    """The manifests that a folder gives. Nothing is asked of a network."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Kustomize warns of what it will not take any more.
    assert not done.stderr, done.stderr
    return done.stdout


def documents(text: str) -> list[Document]:
    """The objects of some manifests."""
    return [document for document in yaml.safe_load_all(text) if document]


def containers(pod: Document) -> Iterator[Document]:
    """All containers of a pod's spec."""
    yield from pod.get("initContainers", [])
    yield from pod["containers"]


def violations(found: list[Document]) -> Iterator[str]:
    """What some manifests have that they must not, or lack."""
    for document in found:
        if document["kind"].endswith("Role") or document["kind"].endswith("RoleBinding"):
            yield f"{document['kind']}: it asks the API server for nothing"
        if document["kind"] not in ("DaemonSet", "Deployment", "StatefulSet", "Job"):
            continue
        pod = document["spec"]["template"]["spec"]
        for key in ("hostNetwork", "hostIPC"):
            if pod.get(key):
                yield f"{key}: it needs none"
        if pod.get("automountServiceAccountToken") is not False:
            yield "a token of the API server is mounted"
        if not pod.get("priorityClassName"):
            yield "it has no priority"
        writable = {"/sys/kernel/mm/ksm", "/var/lib/ksmd-ctl"}
        paths = {one["name"]: one["hostPath"]["path"] for one in pod["volumes"] if "hostPath" in one}
        for container in containers(pod):
            for problem in _container(container):
                yield f"{container['name']}: {problem}"
            for mount in container["volumeMounts"]:
                path = paths.get(mount["name"])
                if path and not mount.get("readOnly") and path not in writable:
                    yield f"{container['name']}: {path} of the host is writable"


def _container(container: Document) -> Iterator[str]:
    security = container["securityContext"]
    image, _, tag = container["image"].partition(":")
    if tag in ("", "latest"):
        yield f"{image} has no version"
    for kind in ("requests", "limits"):
        if {"cpu", "memory"} - container["resources"].get(kind, {}).keys():
            yield f"{kind} are missing"
    if security.get("privileged") is not False:
        yield "it is privileged"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "its root file system is writable"
    if security["capabilities"]["drop"] != ["ALL"]:
        yield "capabilities are not dropped"
    if security.get("runAsNonRoot") and (security["capabilities"].get("add") or security["allowPrivilegeEscalation"]):
        yield "it has privilege"
    if not {"startupProbe", "livenessProbe"} <= container.keys():
        yield "probes are missing"


if __name__ == "__main__":
    STORED.mkdir(exist_ok=True)
    for name, folder in CREATED.items():
        (STORED / f"{name}.yaml").write_text(kustomized(folder))
