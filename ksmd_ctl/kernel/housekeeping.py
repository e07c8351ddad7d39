# SPDX-License-Identifier: GPL-2.0-or-later
"""Which CPUs are left to the host: those that are not isolated, and to which no virtual CPU is pinned.

A name proves nothing: whoever calls a process like QEMU and pins its threads keeps ksmd off CPUs, and nothing more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, HostError, ReadError
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.kernel.machines import is_machine
from ksmd_ctl.kernel.proc_pid import pids
from ksmd_ctl.kernel.pseudofile import parse_list, read_text

_CPU: Final = "sys/devices/system/cpu"
#: isolcpus=, nohz_full=, and isolated partitions of cgroup v2 (6.8).
_ISOLATED: Final = (f"{_CPU}/isolated", f"{_CPU}/nohz_full", "sys/fs/cgroup/cpuset.cpus.isolated")

# QEMU with debug-threads=on, as libvirt starts it; cloud-hypervisor and libkrun; Firecracker; crosvm.
_VCPU: Final = re.compile(r"CPU \d+/(KVM|TCG)|(crosvm_)?vcpu\d+|fc_vcpu \d+", re.ASCII)
_STATUS: Final = re.compile(r"^Name:\t(.*)\n(?:.*\n)*?Cpus_allowed_list:\t([\d,-]*)$", re.MULTILINE)
# /proc/PID/comm has the first 15 characters.
_CUT: Final = "cloud-hyperviso"


def housekeeping_cpus(root: Path = Path("/")) -> str:
    """These CPUs, as a list. A virtual CPU is pinned if it may run on less than all CPUs of any node.

    :raises HostError: there are none
    :raises ReadError: the CPUs that are online can't be had
    """
    online = _list(root / _CPU / "online")
    isolated: set[int] = set()
    for name in _ISOLATED:
        with suppress(ReadError):
            isolated |= _list(root / name)
    nodes = [cpus & online for cpus in _nodes(root)]
    nodes = [cpus for cpus in nodes if cpus] or [online]
    pinned: set[int] = set()
    for allowed in _virtual_cpus(root):
        if not any(cpus <= allowed for cpus in nodes):
            pinned |= allowed & online
    left = online - isolated - pinned
    if not left:
        taken = (("isolated", isolated & online), ("those of pinned virtual CPUs", pinned))
        why = " and ".join(f"{ranges_text(cpus)} are {name}" for name, cpus in taken if cpus)
        hint = 'name the CPUs in [ksmd] cpus, or leave it out and set scheduling = "idle"'
        raise HostError("looking for housekeeping CPUs", f"no CPU is left: {why}", hint=hint)
    return ranges_text(left)


def _list(path: Path) -> frozenset[int]:
    text = read_text(path).strip()
    try:
        # The kernel prints this for a mask that was never set up.
        return frozenset() if text == "(null)" else parse_list(text)
    except ValueError as error:
        raise Absent(f"reading {path.name}", str(error), path=str(path)) from error


def _nodes(root: Path) -> Iterator[frozenset[int]]:
    for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*/cpulist")):
        with suppress(ReadError):
            yield _list(path)


def _virtual_cpus(root: Path) -> Iterator[frozenset[int]]:
    """Where each virtual CPU may run."""
    proc = root / "proc"
    for pid in pids(proc):
        with suppress(ReadError, OSError):
            name = read_text(proc / str(pid) / "comm").strip()
            if not (is_machine(name) or name.startswith("qemu") or name == _CUT):
                continue
            others: list[tuple[int, frozenset[int]]] = []
            named: list[tuple[int, frozenset[int]]] = []
            for thread in os.listdir(proc / str(pid) / "task"):
                with suppress(ReadError, ValueError):
                    match = _STATUS.search(read_text(proc / str(pid) / "task" / thread / "status"))
                    if match is not None:
                        (named if _VCPU.fullmatch(match[1]) else others).append((int(thread), parse_list(match[2])))
            # Without names all threads are called like the program; the first one is no virtual CPU.
            yield from (allowed for thread, allowed in named or others if thread != pid)
