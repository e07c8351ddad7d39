# SPDX-License-Identifier: GPL-2.0-or-later
"""What belongs into the configuration of whoever starts a process, so that merging is on or off at its next start.

``MemoryKSM=`` came with systemd 254, which called prctl(2) with too few arguments until 255.5 (its pull
request 31683): a unit that has it does not start there, whatever its value. Before 254 it is ignored. And it only says
what systemd does: a program that calls madvise(MADV_MERGEABLE) itself, as QEMU does, is mergeable under MemoryKSM=no.
Where systemd lacks it, a drop-in has `ksmd-ctl merge` run when the unit has started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ksmd_ctl.host.memory import Process

#: The drop-in of a unit, below its folder in /etc/systemd/system.
DROP_IN: Final = "50-ksmd-ctl-merge.conf"
#: How long a command of a drop-in may take; as a rule it takes less than a second.
START_SECONDS: Final = 30
_PROXMOX: Final = re.compile(r"/qemu\.slice/(\d+)\.scope(?:/|$)", re.ASCII)
_LIBVIRT: Final = re.compile(r"/machine(?:\.slice)?/(?:machine-)?qemu")
_BY_ITSELF: Final = "what a program asks for itself later, with madvise, only [switch] keep = true takes back"
_VERSION: Final = re.compile(r"v?(\d+)(?:\.(\d+))?")


class Starter(StrEnum):
    """Who starts a process."""

    LIBVIRT = "libvirt"
    PROXMOX = "proxmox"
    KUBEVIRT = "kubevirt"
    SYSTEMD = "systemd"
    OTHER = "other"


class MemoryKsm(StrEnum):
    """What comes of ``MemoryKSM=`` in a unit on a host."""

    WORKS = "works"
    UNKNOWN = "unknown"
    FAILS = "fails"
    NO_PRCTL = "no-prctl"


def memory_ksm(version: str, *, prctl: bool) -> MemoryKsm:
    """What comes of ``MemoryKSM=``.

    :param version: of the systemd that runs, as in ``252.39-1~deb12u1``; empty where there is none
    :param prctl: the kernel knows PR_SET_MEMORY_MERGE (6.4, with CONFIG_KSM)
    """
    found = _VERSION.match(version)
    number = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    if number < (254, 0):
        return MemoryKsm.UNKNOWN
    if number < (255, 5):
        return MemoryKsm.FAILS
    return MemoryKsm.WORKS if prctl else MemoryKsm.NO_PRCTL


def memory_ksm_text(state: MemoryKsm, version: str) -> str:
    """Why ``MemoryKSM=`` does not help, as a sentence; empty where it does."""
    match state:
        case MemoryKsm.WORKS:
            return ""
        case MemoryKsm.UNKNOWN:
            return f"systemd {version or 'of this host'} does not know MemoryKSM= (it came with 254) and ignores it"
        case MemoryKsm.FAILS:
            return f"systemd {version} calls prctl wrongly (until 255.5): a unit with MemoryKSM= does not start"
        case MemoryKsm.NO_PRCTL:
            return "this kernel has no prctl(PR_SET_MEMORY_MERGE) (it came with 6.4)"


@dataclass(frozen=True, slots=True)
class MemoryKsmUnit:
    """A unit that has ``MemoryKSM=``.

    :ivar state: ``active``, ``failed``, ...; empty where systemd does not say
    :ivar pid: of its main process; 0 for none
    :ivar merge_any: that is mergeable by prctl (ksm_merge_any); None where the kernel doesn't tell (before 6.14)
    """

    unit: str
    on: bool
    state: str = ""
    pid: int = 0
    merge_any: bool | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Who starts a process, and what it is called there."""

    starter: Starter
    name: str


def start_of(process: Process) -> Start:
    """Who starts a process, by where it is."""
    if process.namespace and process.machine:
        return Start(Starter.KUBEVIRT, process.group)
    if match := _PROXMOX.match(process.cgroup):
        return Start(Starter.PROXMOX, match[1])
    if process.machine and _LIBVIRT.match(process.cgroup):
        return Start(Starter.LIBVIRT, process.group)
    if process.unit.endswith(".service") and not process.unit.startswith("user@"):
        return Start(Starter.SYSTEMD, process.unit)
    return Start(Starter.OTHER, process.group)


@dataclass(frozen=True, slots=True)
class Setting:
    """What belongs into a configuration.

    :ivar text: where, and why so, as sentences
    :ivar content: what, to copy: lines of a file, or a command
    :ivar path: the file that can be written; empty where somebody else has the configuration
    """

    start: Start
    text: str
    content: str
    path: str = ""


def setting_for(
    start: Start, *, on: bool, machine: bool, state: MemoryKsm, version: str, prctl: bool = True
) -> Setting:
    """What belongs into the configuration of who starts a process.

    :param machine: it is a virtual machine: QEMU asks for merging itself, with madvise
    :param state: what comes of ``MemoryKSM=``
    :param version: of the systemd that runs
    :param prctl: the kernel knows PR_SET_MEMORY_MERGE
    """
    name = start.name
    match start.starter:
        case Starter.LIBVIRT:
            text = f"In the domain ({'without' if on else 'with'} this element): virsh edit {name}"
            return Setting(start, text, "<memoryBacking><nosharepages/></memoryBacking>")
        case Starter.PROXMOX:
            text = "In the machine's configuration, since Proxmox VE 9; before it: args: -machine mem-merge=off"
            return Setting(start, text, f"qm set {name} --allow-ksm {int(on)}")
        case Starter.KUBEVIRT:
            word = "leave out" if on else "add"
            text = (
                "KubeVirt has no setting for one machine. A sidecar of the pod (annotation "
                f"hooks.kubevirt.io/hookSidecars of the VirtualMachineInstance) can {word} this element of the domain"
            )
            return Setting(start, text, "<memoryBacking><nosharepages/></memoryBacking>")
        case Starter.SYSTEMD if machine:
            word = "on" if on else "off"
            text = f"In the command line of {name} (ExecStart=): QEMU asks for merging itself, whatever MemoryKSM= says"
            return Setting(start, text, f"-machine mem-merge={word}")
        case Starter.SYSTEMD if state is MemoryKsm.WORKS:
            text = "systemd says so to the kernel when it starts the unit" + ("" if on else f"; {_BY_ITSELF}")
            return _drop_in(name, text, f"MemoryKSM={'yes' if on else 'no'}")
        case Starter.SYSTEMD:
            text = f"ksmd-ctl switches it once it has started: {memory_ksm_text(state, version)}"
            if not on:
                text += f"; {_BY_ITSELF}"
            elif not prctl:
                text += (
                    "; without prctl(PR_SET_MEMORY_MERGE), before Linux 6.4, it is only for memory that is there then"
                )
            # It counts to the time that the unit has for its start, and failing to start would be the greater harm.
            command = f"/usr/bin/ksmd-ctl merge {'on' if on else 'off'} --pid $MAINPID"
            return _drop_in(name, text, f"ExecStartPost=-+/usr/bin/timeout {START_SECONDS} {command}")
        case Starter.OTHER:
            if machine:
                word = "on" if on else "off"
                return Setting(start, "On QEMU's command line", f"-machine mem-merge={word}")
            text = "Nothing starts it that could be told: start it as a unit of systemd"
            return Setting(start, text, "")


def _drop_in(unit: str, why: str, line: str) -> Setting:
    path = f"/etc/systemd/system/{unit}.d/{DROP_IN}"
    return Setting(Start(Starter.SYSTEMD, unit), f"In {path}: {why}", f"[Service]\n{line}\n", path)
