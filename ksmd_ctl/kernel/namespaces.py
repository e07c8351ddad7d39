# SPDX-License-Identifier: GPL-2.0-or-later
"""What a container hides from a program that is about its host.

Sources: cgroup_namespaces(7) (/proc/PID/cgroup shows paths as of the reader's namespace, with ``..`` for what is
outside of it), pid_namespaces(7), setns(2), statvfs(3), systemd.io/CONTAINER_INTERFACE (the variable "container").
"""

from __future__ import annotations

import os
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, HostError, errno_text
from ksmd_ctl.host.container import Container, Hidden
from ksmd_ctl.kernel.procfs import find_ksmd

# include/linux/proc_ns.h: PROC_CGROUP_INIT_INO, PROC_PID_INIT_INO.
_INITIAL_CGROUPS = "cgroup:[4026531835]"
_INITIAL_PIDS = "pid:[4026531836]"
# Container managers set the first, as the image does, and Kubernetes the second in each pod.
_VARIABLES = ("container", "KUBERNETES_SERVICE_HOST")
_MOUNT_HINT = "mount the host's {0} into the container at the same path: docs/container.md"


def join_host_cgroups(root: Path = Path("/")) -> None:
    """See the cgroups of all processes by the paths that they have on the host.

    In a cgroup namespace of its own a process sees those of others relative to its own: no unit, slice or pod can be
    told by them. It joins that of ksmd, which is the initial one, as of all kernel threads. Without a view of the
    host's processes there is none to join, nor anything to tell.

    :raises Denied: it takes CAP_SYS_ADMIN, and CAP_SYS_PTRACE
    """
    try:
        if os.readlink(root / "proc/self/ns/cgroup") == _INITIAL_CGROUPS:
            return
        path = root / "proc" / str(find_ksmd(root / "proc")) / "ns/cgroup"
    except (FileNotFoundError, Absent):
        return
    # ctypes takes its time, and nearly everybody is on the host.
    from ksmd_ctl.kernel.syscalls import CLONE_NEWCGROUP, setns

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(descriptor, CLONE_NEWCGROUP)
        finally:
            os.close(descriptor)
    except OSError as error:
        hint = "the container takes CAP_SYS_ADMIN and CAP_SYS_PTRACE, or the host's cgroup namespace"
        what = "seeing the cgroups of this host"
        raise Denied(what, errno_text(error.errno or 0), hint=hint, path=str(path), errno=error.errno) from error


def container(root: Path = Path("/")) -> Container | None:
    """The container that this process is in, None outside of any."""
    try:
        own = os.readlink(root / "proc/self/ns/pid") != _INITIAL_PIDS
    except OSError:
        own = False
    if not own and not any(name in os.environ for name in _VARIABLES):
        return None
    return Container(hidden_from_container(root), (root / "run/systemd/system").is_dir())


def hidden_from_container(root: Path = Path("/")) -> dict[Hidden, HostError]:
    """What of the host can't be seen or written from here, each with what to do about it."""
    found: dict[Hidden, HostError] = {}
    try:
        find_ksmd(root / "proc")
    except Absent as error:
        found[Hidden.PROCESSES] = Absent(
            "looking at the processes of this host",
            "its PID namespace is not this one: ksmd is not among the processes",
            hint="share the host's: hostPID: true, or --pid=host",
            path=error.path,
        )
    knobs, cgroups = root / "sys/kernel/mm/ksm", root / "sys/fs/cgroup"
    if why := _unwritable(knobs):
        found[Hidden.KNOBS] = Denied(
            "writing the knobs of this host",
            f"{knobs} is {why}",
            hint=_MOUNT_HINT.format(f"{knobs}{' writable' if knobs.is_dir() else ''}"),
            path=str(knobs),
        )
    if not _is_host_cgroups(cgroups):
        found[Hidden.LIMITS] = Absent(
            "reading the memory limits of tenants",
            f"{cgroups} has not the cgroups of this host, so a change can't tell whose limit it would exceed",
            hint=_MOUNT_HINT.format(cgroups),
            path=str(cgroups),
        )
    return found


def _unwritable(knobs: Path) -> str:
    """Why nobody may write the knobs here; empty where root may, whoever asks."""
    try:
        flags = os.statvfs(knobs).f_flag
    except OSError:
        return "not there"
    return "mounted read-only" if flags & os.ST_RDONLY else ""


def _is_host_cgroups(folder: Path) -> bool:
    """Whether a mount shows the root of the tree of version 2, or of version 1's for memory."""
    # Only the root of a tree has it (kernel/cgroup/cgroup-v1.c: release_agent).
    if (folder / "memory/release_agent").exists():
        return True
    # The root of the tree has no type (kernel/cgroup/cgroup.c: cgroup.type is not on the root).
    return (folder / "cgroup.controllers").exists() and not (folder / "cgroup.type").exists()
