# SPDX-License-Identifier: GPL-2.0-or-later
"""Pods of Kubernetes: which one a process is in by its cgroup, and what that is called by the kubelet's log folders.

Nothing is asked of the API server. The cgroup has the pod's UID, and /var/log/pods, which only root writes, a folder
NAMESPACE_NAME_UID for each pod of this node.

Sources: Kubernetes' pkg/kubelet/cm/cgroup_manager_linux.go (names of cgroups under both drivers),
pkg/kubelet/kuberuntime/helpers.go (BuildPodLogsDirectory) and apiserver/pkg/storage/names/generate.go (random letters),
containerd's internal/cri, CRI-O's internal/config/cgmgr, kind's pkg/cluster/internal/kubeadm/config.go (cgroupRoot),
KubeVirt's pkg/virt-controller/services/template.go (GenerateName: virt-launcher-NAME-).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LOG_FOLDER: Final = "var/log/pods"
# A digest, or what a static pod's manifest says: the API server's validation lets any text pass there.
_UID: Final = r"pod(?P<uid>[0-9A-Za-z][0-9A-Za-z_-]*)"
# kind, k3d and minikube run a kubelet inside of a container, whose cgroups are below that container's.
_NODE: Final = (
    r"(?P<node>/docker/[0-9a-f]+|/system\.slice/docker-[0-9a-f]+\.scope"
    r"|/machine\.slice/libpod-[0-9a-f]+\.scope(?:/container)?)"
)
_QOS: Final = r"(?:{0}(?:besteffort|burstable))?"
# Under the systemd driver each slice has the name of the one that it is in before its own.
_SLICE: Final = rf"(?:[\w.]+-)*?kubepods{_QOS.format('-')}-{_UID}\.slice"
# Where a container runtime with its own cgroups is given a slice's name by the kubelet.
_SERVICES: Final = (
    *("containerd", "crio", "k3s", "k3s-agent", "rke2-server", "rke2-agent", "k0scontroller", "k0sworker"),
    *(r"snap\.microk8s\.daemon-containerd", r"snap\.microk8s\.daemon-kubelite", r"snap\.k8s\.containerd"),
)
_RUNTIME: Final = rf"(?:/system\.slice(?:/(?:{'|'.join(_SERVICES)})\.service)?)?"
# The kubelet's --cgroup-root under the cgroupfs driver: beside systemd's own, where only root makes any.
_CGROUP_ROOT: Final = r"(?:/(?!docker/|lxc/|libpod_parent/|user/|init/)[a-z][a-z0-9_-]*)?"
_PLACE: Final = re.compile(
    # Outside of this process's cgroup namespace the kernel leaves out what both have in common (cgroup_namespaces(7)).
    rf"(?:{_NODE})?(?:(?:/[^/]+\.slice)*/{_SLICE}(?:/|$)"
    rf"|{_CGROUP_ROOT}(?:/[^/]+\.slice)?/kubepods{_QOS.format('/')}/{_UID.replace('uid', 'plain')}(?:/|$)"
    rf"|{_RUNTIME}/{_SLICE.replace('uid', 'named')}:)"
    rf"|(?:/\.\.)+(?:(?:/[^/.][^/]*\.slice)*/{_SLICE.replace('uid', 'beside')}"
    rf"|(?:/kubepods)?{_QOS.format('/')}/{_UID.replace('uid', 'bare')})(?:/|$)",
    re.ASCII,
)
_ANY: Final = re.compile(rf"(?:{_NODE})?(?:/kubelet(?:\.slice)?)?/(?:kubelet-)?kubepods[.\-/]", re.ASCII)
_FOLDER: Final = re.compile(r"([a-z0-9-]{1,63})_([a-z0-9.-]{1,253})_([0-9A-Za-z][0-9A-Za-z-]*)", re.ASCII)

# What Kubernetes adds to a name is drawn from letters that make no words.
_RANDOM: Final = "[bcdfghjklmnpqrstvwxz2456789]"
_CONTROLLED: Final = re.compile(rf"(.+?)-(?:{_RANDOM}{{6,10}}-|\d{{8,10}}-)?{_RANDOM}{{5}}", re.ASCII)
_LAUNCHER: Final = "virt-launcher-"
# maxGeneratedNameLength, and with the random letters.
_KEPT: Final = 58
_LONGEST_GENERATED: Final = 63


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as the kubelet calls it."""

    namespace: str
    name: str

    @property
    def launches(self) -> bool:
        """Whether it is that of a virtual machine of KubeVirt's."""
        return self.name.startswith(_LAUNCHER)

    def stable_name(self, guest: str = "") -> str:
        """Its name without what differs from one start to the next; of a virtual machine that one's name.

        :param guest: what a machine's command line calls it. It is believed where Kubernetes has cut the pod's name
        """
        match = _CONTROLLED.fullmatch(self.name)
        if not self.launches:
            return f"{match[1]}-*" if match else self.name
        machine = (match[1] if match else self.name).removeprefix(_LAUNCHER)
        if len(self.name) < _LONGEST_GENERATED:
            return machine
        begin = self.name[:_KEPT].removeprefix(_LAUNCHER).removesuffix("-")
        namespace, _, whole = guest.partition("_")
        return whole if namespace == self.namespace and whole.startswith(begin) else begin


@dataclass(frozen=True, slots=True)
class PodPlace:
    """Where a pod is.

    :ivar uid: as the API server has it, with hyphens; of a static pod a digest. Empty where the cgroup is the kubelet's
        and no pod's
    :ivar node: the cgroup of the container in which its kubelet runs; empty for this host's own kubelet
    """

    uid: str
    node: str = ""


def place_of(cgroup: str) -> PodPlace | None:
    """The pod that a cgroup is in, None where the kubelet has not made it."""
    if match := _PLACE.match(cgroup):
        uid = next(match[name] for name in ("uid", "plain", "named", "beside", "bare") if match[name])
        return PodPlace(uid.replace("_", "-"), match["node"] or "")
    if match := _ANY.match(cgroup):
        return PodPlace("", match["node"] or "")
    return None


def running_pods(root: Path = Path("/")) -> Mapping[str, Pod]:
    """The pods of this host's kubelet by UID; none where it can't be read or there is no kubelet."""
    try:
        names = os.listdir(root / _LOG_FOLDER)
    except OSError:
        return {}
    found = (_FOLDER.fullmatch(name) for name in names)
    return {match[3]: Pod(match[1], match[2]) for match in found if match}
