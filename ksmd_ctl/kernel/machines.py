# SPDX-License-Identifier: GPL-2.0-or-later
"""Stable names for what processes belong to: a virtual machine's name, else its systemd unit's, normalised.

No name here changes when a thing is started again: a label that did would grow with time. Sources: libvirt's
src/util/virsystemd.c (machine-qemu scopes) and src/qemu/qemu_command.c (-name), Proxmox's PVE/QemuServer.pm
(-id, qemu.slice/VMID.scope), KubeVirt's pkg/virt-launcher (domain name NAMESPACE_NAME) and Kubernetes'
pkg/kubelet/cm (kubepods slices), systemd.unit(5) on escaping.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Membership", "Owner", "cgroup_paths", "is_machine", "membership", "normalised_unit", "unescape", "unit_of"]


class Owner(StrEnum):
    """Who runs a process's virtual machine."""

    NONE = "none"
    LIBVIRT = "libvirt"
    PROXMOX = "proxmox"
    KUBEVIRT = "kubevirt"
    #: a virtual machine that somebody started by hand, or by something unknown
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Membership:
    """What a process belongs to.

    :ivar group: the name that figures are kept under
    :ivar unit: its innermost systemd unit as systemd calls it, empty outside of any
    :ivar owner: who runs it, if it is a virtual machine
    """

    group: str
    unit: str
    owner: Owner

    @property
    def machine(self) -> bool:
        return self.owner is not Owner.NONE


def cgroup_paths(text: str) -> dict[str, str]:
    """The cgroups in /proc/PID/cgroup by hierarchy: "" for version 2, else ``name=systemd``, ``memory``, ...

    Lines of another form are left out; a path may hold colons.
    """
    found = {}
    for line in text.split("\n"):
        parts = line.split(":", 2)
        if len(parts) == 3 and parts[2].startswith("/"):
            for controller in parts[1].split(","):
                found[controller] = parts[2]
    return found


def _systemd_path(text: str) -> str:
    paths = cgroup_paths(text)
    # In systemd's hybrid layout version 2 is there too; where it isn't used all processes are at its root.
    unified = paths.get("", "/")
    return unified if unified != "/" else paths.get("name=systemd", "/")


def unescape(name: str) -> str:
    r"""A name with systemd's ``\x2d`` escapes undone; what is no escape stays."""
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), name.encode(errors="surrogateescape"))
    return data.decode(errors="replace")


def unit_of(path: str) -> str:
    """The innermost service or scope in a cgroup's path, empty where there is none."""
    for part in reversed(path.split("/")):
        if part.endswith((".service", ".scope")):
            return part
    return ""


_CONTAINER = re.compile(r"((?:[a-z]+-)+)[0-9a-f]{12,64}((?:\.scope|\.service)?)", re.ASCII)
_SESSION = re.compile(r"session-c?\d+\.scope", re.ASCII)
# systemd-run's names: run-r<32 hex>, run-u<number>, run-p<pid>-i<number>.
_RUN = re.compile(r"run-(?:r[0-9a-f]+|u\d+|p\d+-i\d+|\d+)\.(service|scope)", re.ASCII)
_APP = re.compile(r"app-(.+?)-(?:\d+|[0-9a-f]{8,})\.scope", re.ASCII)


def normalised_unit(unit: str) -> str:
    """A unit's name without what differs from one start to the next: instances, sessions, container identifiers."""
    if _SESSION.fullmatch(unit):
        return "session-*.scope"
    if match := _RUN.fullmatch(unit):
        return f"run-*.{match[1]}"
    if match := _CONTAINER.fullmatch(unit):
        return f"{match[1]}*{match[2]}"
    if match := _APP.fullmatch(unit):
        return unescape(f"app-{match[1]}-*.scope")
    name, at, _ = unit.partition("@")
    if at and name:
        return f"{name}@.{unit.rpartition('.')[2]}"
    return unescape(unit)


# -- virtual machines ----------------------------------------------------------------------------------------

_MONITORS = re.compile(
    r"(?:qemu(?:-system-[\w.-]+|-kvm)?|kvm|cloud-hypervisor|firecracker|crosvm|libkrun\S*|kvmtool|lkvm|vz)", re.ASCII
)
_LIBVIRT = re.compile(r"machine-(?:qemu|lxc)-\d+-(.+)\.scope")
_PROXMOX = re.compile(r"/qemu\.slice/(\d+)\.scope(?:/|$)", re.ASCII)


def is_machine(command: Sequence[str]) -> bool:
    """Whether a command line is that of a virtual machine's monitor."""
    if not command:
        return False
    return _MONITORS.fullmatch(command[0].rpartition("/")[2]) is not None


def _option(command: Sequence[str], *names: str) -> str:
    for index, word in enumerate(command[:-1]):
        if word in names:
            return command[index + 1]
    return ""


def _guest_name(command: Sequence[str]) -> str:
    # -name [guest=]NAME[,key=value...]; QEMU doubles a comma that belongs to a value.
    text = _option(command, "-name", "--name").replace(",,", "\0")
    for index, part in enumerate(text.split(",")):
        key, equals, value = part.partition("=")
        if key == "guest" or (index == 0 and not equals):
            return (value if equals else part).replace("\0", ",")
    return ""


def membership(cgroup: str, command: Sequence[str], name: str) -> Membership:
    """What a process belongs to, from /proc/PID/cgroup, its command line and its name.

    :param name: from /proc/PID/stat: the group where nothing better is known
    """
    path = _systemd_path(cgroup)
    unit = unit_of(path)
    guest = _guest_name(command)
    if re.search(r"/(?:kubepods|kubelet-kubepods)[.\-/]", path) and is_machine(command):
        # A namespace is a DNS label: no underscore in it.
        namespace, under, pod = guest.partition("_")
        if under and namespace and pod:
            return Membership(f"{namespace}/{pod}", unit, Owner.KUBEVIRT)
    if match := _PROXMOX.search(path):
        return Membership(match[1], unit, Owner.PROXMOX)
    if is_machine(command) and _option(command, "-id").isdigit():
        return Membership(_option(command, "-id"), unit, Owner.PROXMOX)
    # libvirt puts a part of a long or odd name into the scope; the command line has all of it.
    for part in path.split("/"):
        if match := _LIBVIRT.fullmatch(unescape(part)):
            return Membership(guest or match[1], unit, Owner.LIBVIRT)
    if is_machine(command):
        # Without a name there is the UUID, which stays with a machine too.
        label = guest or _option(command, "-uuid", "--uuid", "--id") or normalised_unit(unit) or name
        return Membership(label, unit, Owner.OTHER)
    return Membership(normalised_unit(unit) or name, unit, Owner.NONE)
