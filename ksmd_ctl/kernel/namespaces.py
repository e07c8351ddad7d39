# SPDX-License-Identifier: GPL-2.0-or-later
"""What a container hides from a program that is about its host.

Sources: cgroup_namespaces(7) (/proc/PID/cgroup shows paths as of the reader's namespace, with ``..`` for what is outside
of it), pid_namespaces(7), setns(2).
"""

from __future__ import annotations

import os
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, HostError, errno_text
from ksmd_ctl.kernel.procfs import find_ksmd

_MOUNT_HINT = "mount the host's {0} into the container at the same path: docs/container.md"


def join_host_cgroups(root: Path = Path("/")) -> None:
    """See the cgroups of all processes by the paths that they have on the host.

    In a cgroup namespace of its own a process sees those of others relative to its own: no unit, slice or pod can be
    told by them. It joins the namespace of process 1, which is the host's in the host's pid namespace.

    :raises Denied: it takes CAP_SYS_ADMIN, and CAP_SYS_PTRACE for process 1
    """
    what, path = "seeing the cgroups of this host", root / "proc/1/ns/cgroup"
    try:
        if os.readlink(path) == os.readlink(root / "proc/self/ns/cgroup"):
            return
        # ctypes takes its time, and nearly everybody is on the host.
        from ksmd_ctl.kernel.syscalls import CLONE_NEWCGROUP, setns

        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(descriptor, CLONE_NEWCGROUP)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        # A kernel without cgroups, or a folder of files in a test.
        return
    except OSError as error:
        hint = "the container takes CAP_SYS_ADMIN and CAP_SYS_PTRACE, or the host's cgroup namespace"
        raise Denied(what, errno_text(error.errno or 0), hint=hint, path=str(path), errno=error.errno) from error


def hidden_from_container(root: Path = Path("/")) -> list[HostError]:
    """What of the host can't be seen or written from here, each with what to do about it. For root."""
    found: list[HostError] = []
    try:
        find_ksmd(root / "proc")
    except Absent as error:
        found.append(
            Absent(
                "looking at the processes of this host",
                "its PID namespace is not this one: ksmd is not among the processes",
                hint="share the host's: hostPID: true, or --pid=host",
                path=error.path,
            )
        )
    knobs, cgroups = root / "sys/kernel/mm/ksm", root / "sys/fs/cgroup"
    # With the mode bits alone root may write everything, so access(2) tells of a read-only mount.
    if not os.access(knobs / "run", os.W_OK):
        there = knobs.is_dir()
        found.append(
            Denied(
                "writing the knobs of this host",
                f"{knobs} is {'mounted read-only' if there else 'not there'}",
                hint=_MOUNT_HINT.format(f"{knobs}{' writable' if there else ''}"),
                path=str(knobs),
            )
        )
    if not _is_host_cgroups(cgroups):
        found.append(
            Absent(
                "reading the memory limits of tenants",
                f"{cgroups} has not the cgroups of this host, so a change can't tell whose limit it would exceed",
                hint=_MOUNT_HINT.format(cgroups),
                path=str(cgroups),
            )
        )
    return found


def _is_host_cgroups(folder: Path) -> bool:
    """Whether a mount shows the root of the tree of version 2, or version 1's."""
    if (folder / "memory").is_dir():
        return True
    # The root of the tree has no type (kernel/cgroup/cgroup.c: cgroup.type is not on the root).
    return (folder / "cgroup.controllers").exists() and not (folder / "cgroup.type").exists()
