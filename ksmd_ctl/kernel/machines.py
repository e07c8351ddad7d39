# SPDX-License-Identifier: GPL-2.0-or-later
"""Stable names for what processes belong to: a virtual machine's name, else its systemd unit's, normalised.

No name here changes when a thing is started again: a label that did would grow with time. And no name is taken on the
word of whoever would be counted under another's: a command line, a process's name and a delegated cgroup say what their
owner wants them to. So

- the cgroups that libvirt, Proxmox VE, the kubelet and systemd made are believed, and of those only what lies above
  the first unit: what is below it is delegated;
- a pod has the name that the kubelet gave its log folder (`ksmd_ctl.kernel.pods`), and without that its UID;
- a container of Docker or Podman has the name that root's files say (`ksmd_ctl.kernel.containers`), else its
  identifier, which does change;
- a command line is believed of root's processes outside of containers, and where the cgroup says the same;
- what any other process says of itself stands behind what it is certain to belong to: ``user-1000/web``,
  ``microvm@.service/web``.

Sources: libvirt's src/hypervisor/domain_driver.c (virDomainDriverGenerateMachineName), src/util/virsystemd.c
(machine-qemu scopes), src/util/vircgroup.c (virCgroupNewDomainPartition) and src/qemu/qemu_command.c (-name),
Proxmox's PVE/QemuServer.pm (-id, qemu.slice/VMID.scope) and pve-container (lxc/VMID), KubeVirt's pkg/virt-launcher
(domain name NAMESPACE_NAME), systemd.unit(5) on escaping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ksmd_ctl.kernel.containers import ContainerNames, container_of, short_label
from ksmd_ctl.kernel.pods import Pod, place_of
from ksmd_ctl.kernel.proc_pid import printable

# A unit's name is a file's in the cgroup tree.
_LONGEST_UNIT = 255
# PATH_MAX.
_LONGEST_PATH = 4096


@dataclass(frozen=True, slots=True)
class Origin:
    """What a process's membership is told from.

    :ivar cgroup: the text of /proc/PID/cgroup
    :ivar command: its command line, which it may write itself
    :ivar name: from /proc/PID/stat, which it may write itself
    :ivar uid: its effective user, None where that isn't known
    :ivar contained: it is in another pid or user namespace than this process
    :ivar machine: it is a virtual machine's monitor
    """

    cgroup: str
    command: Sequence[str]
    name: str
    uid: int | None = None
    contained: bool = False
    machine: bool = False

    @property
    def root(self) -> bool:
        """Root's, of this host and not of a container."""
        return self.uid == 0 and not self.contained


@dataclass(frozen=True, slots=True)
class Membership:
    """What a process belongs to; both names are fit to be shown.

    :ivar group: the name that figures are kept under
    :ivar unit: its unit as this host's systemd calls it, empty outside of any
    :ivar unsure: the group is what a pod says of itself, and this is what it is called otherwise; empty for all else
    :ivar uid: its effective user, None where that is not known
    :ivar cgroup: where systemd put it
    :ivar machine: the group is a virtual machine's name
    :ivar namespace: that of its pod, by the kubelet or, of a virtual machine, by what that says of itself
    """

    group: str
    unit: str
    unsure: str = ""
    uid: int | None = None
    cgroup: str = ""
    machine: bool = False
    namespace: str = ""


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


def systemd_path(text: str) -> str:
    """Where systemd put a process, of the text of /proc/PID/cgroup."""
    paths = cgroup_paths(text)
    # In systemd's hybrid layout version 2 is there too; where it isn't used all processes are at its root.
    unified = paths.get("", "/")
    return unified if unified != "/" else paths.get("name=systemd", "/")


def runtime_paths(text: str) -> tuple[str, ...]:
    """Where a container runtime may have put a process, of the text of /proc/PID/cgroup.

    In the hybrid layout runc before 1.0 leaves version 2 alone: there the process stays in the runtime's own service.
    """
    paths = cgroup_paths(text)
    # Version 1 on a host without systemd (Alpine with k3s) has no hierarchy of that name.
    return tuple(dict.fromkeys((systemd_path(text), paths.get("name=systemd", paths.get("memory", "/")))))


def unescape(name: str) -> str:
    r"""A name with systemd's ``\x2d`` escapes undone; what is no escape stays."""
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), name.encode(errors="surrogateescape"))
    return data.decode(errors="replace")


def unit_of(path: str) -> str:
    """The service or scope that this host's systemd put a cgroup in, empty where there is none.

    systemd puts units into slices only: what is below the first unit, or below anything that is no slice, was made by
    whoever that part of the tree was delegated to (a container, a user), and may have any name.
    """
    for part in path.strip("/").split("/"):
        if part.endswith((".service", ".scope")):
            return part
        if not part.endswith(".slice"):
            return ""
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
_LIBVIRT = re.compile(r"/machine\.slice/machine-(?:qemu|lxc)-\d+-([^/]+)\.scope(?:/|$)")
# libvirt without systemd-machined.
_LIBVIRT_PLAIN = re.compile(r"/machine(?:\.slice)?/(?:qemu|lxc)-\d+-([^/]+)\.libvirt-(?:qemu|lxc)(?:/|$)")
# virDomainDriverGenerateMachineName cuts qemu-ID-NAME to 64 characters: a shorter name than this is whole.
_LIBVIRT_CUT = 48
_PROXMOX = re.compile(r"/qemu\.slice/(\d+)\.scope(?:/|$)", re.ASCII)
_LXC = re.compile(r"/lxc(?:/|\.payload\.)([^/]+)(?:/|$)")
_USER_MANAGER = re.compile(r"/user\.slice/user-(\d+)\.slice/user@\1\.service(?:/(.*))?$", re.ASCII | re.DOTALL)


def is_machine(program: str) -> bool:
    """Whether a program is a virtual machine's monitor: by /proc/PID/exe, or a command's first word."""
    name = program.removesuffix(" (deleted)").rpartition("/")[2]
    # Nix wraps programs: .qemu-system-x86_64-wrapped.
    return _MONITORS.fullmatch(name.removeprefix(".").removesuffix("-wrapped")) is not None


def _option(command: Sequence[str], *names: str) -> str:
    for index, word in enumerate(command[:-1]):
        if word in names:
            return command[index + 1]
    return ""


def guest_name(command: Sequence[str]) -> str:
    """What a QEMU's command line calls its machine; empty where it has no name."""
    # -name [guest=]NAME[,key=value...]; QEMU doubles a comma that belongs to a value.
    text = _option(command, "-name", "--name").replace(",,", "\0")
    for index, part in enumerate(text.split(",")):
        key, equals, value = part.partition("=")
        if key == "guest" or (index == 0 and not equals):
            return (value if equals else part).replace("\0", ",")
    return ""


def _libvirt_name(path: str, command: Sequence[str]) -> str:
    """The domain's name: of a long or odd one the cgroup has a part, and the command line all of it."""
    match = _LIBVIRT.match(unescape(path)) or _LIBVIRT_PLAIN.match(path)
    if match is None:
        return ""
    guest, known = guest_name(command), match[1]
    valid = re.sub(r"([.-])[.-]+", r"\1", re.sub(r"[^a-zA-Z0-9.-]", "", guest)).strip("-.")
    agrees = known in (guest, valid) or (len(known) >= _LIBVIRT_CUT and valid.startswith(known))
    return guest if agrees else known


def membership(
    origin: Origin, pods: Mapping[str, Pod] | None = None, containers: ContainerNames | None = None
) -> Membership:
    """What a process belongs to.

    :param pods: this host's by UID
    :param containers: what this host's are called; None for not known
    """
    path = systemd_path(origin.cgroup)
    unit = unit_of(path)

    def found(group: str, unsure: str = "", *, machine: bool = True, namespace: str = "") -> Membership:
        return Membership(
            printable(group),
            printable(unit, _LONGEST_UNIT),
            printable(unsure),
            origin.uid,
            printable(path, _LONGEST_PATH),
            machine,
            printable(namespace),
        )

    if match := _PROXMOX.match(path):
        return found(match[1])
    if name := _libvirt_name(path, origin.command):
        return found(name)
    guest = guest_name(origin.command) if origin.machine else ""
    paths = runtime_paths(origin.cgroup)
    place = next((place for place in map(place_of, paths) if place), None)
    # A pod in a container that is a node is of another kubelet's.
    pod = (pods or {}).get(place.uid) if place and not place.node else None
    if pod is not None:
        machine = origin.machine and pod.launches
        return found(f"{pod.namespace}/{pod.stable_name(guest)}", machine=machine, namespace=pod.namespace)
    if place and place.uid:
        otherwise = f"{_place(path, unit, origin)}/pod/{place.uid}" if place.node else f"pod/{place.uid}"
    else:
        container = next(filter(None, (_container(one, containers) for one in paths)), "")
        otherwise = container or _without_machines(path, unit, origin)
    # A namespace is a DNS label: no underscore in it.
    namespace, under, name = guest.partition("_")
    if place and under and namespace and name:
        return found(f"{namespace}/{name}", otherwise, namespace=namespace)
    if not origin.machine or (place and place.uid):
        return found(otherwise, machine=False)
    number = _option(origin.command, "-id")
    if origin.root and number.isascii() and number.isdigit():
        return found(number)
    # Without a name there is the UUID, which stays with a machine too.
    label = guest or _option(origin.command, "-uuid", "--uuid", "--id")
    if not label:
        return found(otherwise, machine=False)
    return found(label if origin.root else f"{_place(path, unit, origin)}/{label}")


def _container(path: str, names: ContainerNames | None) -> str:
    """The group of a container outside of pods; empty where there is none."""
    if match := _USER_MANAGER.match(path):
        place = container_of(f"/{match[2] or ''}")
        return f"user-{match[1]}/{short_label(place)}" if place else ""
    place = container_of(path)
    return (names.label(place) if names else short_label(place)) if place else ""


def _without_machines(path: str, unit: str, origin: Origin) -> str:
    """The group of what is no machine, or has no name as one."""
    if match := _USER_MANAGER.match(path):
        own = unit_of(match[2] or "")
        return f"user-{match[1]}/{normalised_unit(own)}" if own else normalised_unit(unit)
    if unit:
        return normalised_unit(unit)
    if match := _LXC.match(path):
        return f"lxc/{match[1]}"
    return origin.name if origin.root else f"{_place(path, unit, origin)}/{origin.name}"


def _place(path: str, unit: str, origin: Origin) -> str:
    """What a process is certain to belong to, whatever it says of itself."""
    if unit and not path.startswith("/user.slice/"):
        return normalised_unit(unit)
    if match := _LXC.match(path):
        return f"lxc/{match[1]}"
    if origin.contained:
        return "container"
    return "user-unknown" if origin.uid is None else f"user-{origin.uid}"
