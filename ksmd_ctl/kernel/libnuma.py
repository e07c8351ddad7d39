# SPDX-License-Identifier: GPL-2.0-or-later
"""NUMA calls of libnuma, through ctypes. Sources: mbind(2), set_mempolicy(2), get_mempolicy(2), move_pages(2), numa(3).

glibc has no wrappers for these calls; libnuma exports them under the kernel's own names. A host without
libnuma.so.1, or a kernel without CONFIG_NUMA, makes every function here raise `Absent`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_int, c_uint, c_ulong, c_void_p
from dataclasses import dataclass
from enum import IntEnum

from ksmd_ctl.errors import Absent, Denied, HostError, NoSuchProcess, Rejected, errno_text

# include/uapi/linux/mempolicy.h
MPOL_MF_MOVE = 2
MPOL_MF_MOVE_ALL = 4
# MPOL_F_STATIC_NODES and its like, OR-ed into a mode.
_MODE_FLAGS = 0xE000

#: Nodes that a mask can name: 1 << CONFIG_NODES_SHIFT, which is 10 at most.
MASK_BITS = 1024

#: What a page's status reads where the kernel wrote none; no errno has this number.
NOT_ATTEMPTED = -1000

_WORD_BITS = 8 * ctypes.sizeof(c_ulong)

_c_ulong_p = ctypes.POINTER(c_ulong)


class PolicyMode(IntEnum):
    """MPOL_* of include/uapi/linux/mempolicy.h."""

    DEFAULT = 0
    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    LOCAL = 4
    PREFERRED_MANY = 5
    WEIGHTED_INTERLEAVE = 6


@dataclass(frozen=True, slots=True)
class Policy:
    """A memory policy: its mode, and the nodes that it names."""

    mode: PolicyMode
    nodes: frozenset[int] = frozenset()


@functools.cache
def library() -> ctypes.CDLL:
    # By soname: find_library() would run ldconfig or a compiler, and the unversioned name is for developers.
    try:
        library = ctypes.CDLL("libnuma.so.1", use_errno=True)
    except OSError as error:
        raise Absent(
            "NUMA",
            f"libnuma.so.1 can't be loaded ({error})",
            hint="install the package libnuma1",
            path="libnuma.so.1",
        ) from error
    library.numa_available.argtypes = []
    library.mbind.argtypes = [c_void_p, c_ulong, c_int, _c_ulong_p, c_ulong, c_uint]
    library.set_mempolicy.argtypes = [c_int, _c_ulong_p, c_ulong]
    library.get_mempolicy.argtypes = [ctypes.POINTER(c_int), _c_ulong_p, c_ulong, c_void_p, c_ulong]
    library.move_pages.argtypes = [c_int, c_ulong, c_void_p, c_void_p, c_void_p, c_int]
    for function in (library.mbind, library.set_mempolicy, library.get_mempolicy, library.move_pages):
        function.restype = ctypes.c_long
    return library


def available() -> bool:
    """Whether this host has libnuma and its kernel has NUMA."""
    try:
        # numa_available() is int and -1 for no; any other value means yes (numa(3)).
        return int(library().numa_available()) >= 0
    except Absent:
        return False


# -- masks ---------------------------------------------------------------------------------------------------


def mask_of(nodes: Iterable[int]) -> array[int]:
    """A node mask as the kernel takes it: MASK_BITS bits in words of unsigned long.

    :raises ValueError: a number that no node can have
    """
    words = array("L", bytes(MASK_BITS // 8))
    for node in nodes:
        if not 0 <= node < MASK_BITS:
            raise ValueError(f"{node} is not between 0 and {MASK_BITS - 1}")
        words[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    return words


def nodes_of(mask: array[int]) -> frozenset[int]:
    """The nodes that a mask names."""
    return frozenset(
        index * _WORD_BITS + bit
        for index, word in enumerate(mask)
        if word
        for bit in range(_WORD_BITS)
        if word >> bit & 1
    )


def _pointer(mask: array[int]) -> ctypes._Pointer[c_ulong]:
    return ctypes.cast(mask.buffer_info()[0], _c_ulong_p)


# The kernel takes one off before it counts bits (mm/mempolicy.c:get_nodes), since ever.
_MAXNODE = MASK_BITS + 1


# -- the errno funnel ----------------------------------------------------------------------------------------

_SECCOMP = "this kernel has no NUMA, or a filter forbids the call (seccomp: @resources holds it)"


def _failed(call: str, subject: str, causes: dict[int, tuple[type[HostError], str, str]]) -> HostError:
    # The one place where errno of a libnuma call becomes an error with a cause.
    number = ctypes.get_errno()
    kind, why, hint = causes.get(number, (Rejected, "", ""))
    if number == errno.ENOSYS:
        kind, why, hint = Absent, _SECCOMP, "see SystemCallFilter= of the unit"
    text = f"{why}: {errno_text(number)}" if why else errno_text(number)
    return kind(f"{call} {subject}".rstrip(), text, hint=hint, path=call, errno=number)


_Causes = dict[int, tuple[type[HostError], str, str]]

_POLICY_CAUSES: _Causes = {
    errno.EINVAL: (Rejected, "a node that has no memory or is not allowed by the cpuset, or a bad range", ""),
    errno.EFAULT: (Rejected, "part of the range is not mapped", ""),
}

_MOVE_CAUSES: _Causes = {
    errno.ESRCH: (NoSuchProcess, "it is gone", ""),
    errno.EPERM: (
        Denied,
        "needs CAP_SYS_PTRACE for another user's process, and CAP_SYS_NICE for MPOL_MF_MOVE_ALL",
        "run as root, or grant CAP_SYS_PTRACE and CAP_SYS_NICE",
    ),
    errno.EACCES: (Rejected, "the process's cpuset does not allow the target node", "see cpuset.mems of its cgroup"),
    errno.ENODEV: (Rejected, "the target node is not online or has no memory", "see `ksmd-ctl nodes`"),
    # Its memory goes before it does; who moves it half way must be told of the same thing as a moment later.
    errno.EINVAL: (NoSuchProcess, "it has no memory any more: it is exiting, or a kernel thread", ""),
}


# -- policies ------------------------------------------------------------------------------------------------


def mbind(start: int, length: int, policy: Policy) -> None:
    """Give a range of the caller's memory a policy; pages that are there stay where they are.

    :raises Rejected, Denied: with the cause
    """
    mask = mask_of(policy.nodes)
    pointer, bits = (_pointer(mask), _MAXNODE) if policy.nodes else (None, 0)
    if library().mbind(start, length, int(policy.mode), pointer, bits, 0) < 0:
        raise _failed("mbind", f"{start:#x}+{length:#x} to {_named(policy)}", _POLICY_CAUSES)


def set_mempolicy(policy: Policy) -> None:
    """Set the calling thread's policy. It decides where copies of other processes' pages go, too (findings F7).

    :raises Rejected: a node without memory, or one that the cpuset forbids
    """
    mask = mask_of(policy.nodes)
    pointer, bits = (_pointer(mask), _MAXNODE) if policy.nodes else (None, 0)
    if library().set_mempolicy(int(policy.mode), pointer, bits) < 0:
        raise _failed("set_mempolicy", f"to {_named(policy)}", _POLICY_CAUSES)


def get_mempolicy() -> Policy:
    """The calling thread's policy."""
    mode = c_int()
    mask = mask_of(())
    if library().get_mempolicy(ctypes.byref(mode), _pointer(mask), _MAXNODE, None, 0) < 0:
        raise _failed("get_mempolicy", "", _POLICY_CAUSES)
    return Policy(PolicyMode(mode.value & ~_MODE_FLAGS), nodes_of(mask))


def _named(policy: Policy) -> str:
    nodes = ",".join(map(str, sorted(policy.nodes)))
    return f"{policy.mode.name.lower()}{':' if nodes else ''}{nodes}"


# -- move_pages ----------------------------------------------------------------------------------------------

_STATUS_CAUSES = {
    errno.EACCES: "shared: mapped more than once, needs MPOL_MF_MOVE_ALL and CAP_SYS_NICE",
    errno.EBUSY: "busy: pinned, or being worked on by the kernel",
    errno.EAGAIN: "busy: the kernel tried and could not take it from all its users",
    errno.EFAULT: "not movable: the zero page, a special mapping, or nothing mapped there",
    errno.ENOENT: "gone: no page is present there",
    errno.ENOMEM: "no memory on the target node",
    errno.EIO: "not movable: it could not be written back",
    errno.EINVAL: "not movable: its kind of memory can't be moved",
    -NOT_ATTEMPTED: "not attempted: the call ended before it, or failed on it without saying why",
}


def status_cause(status: int) -> str:
    """Why a page has a negative status of move_pages, in words."""
    return _STATUS_CAUSES.get(-status, errno_text(-status))


class PageMover:
    """move_pages(2) with arrays that are kept from one batch to the next."""

    def __init__(self) -> None:
        self._statuses = array("i")
        self._nodes = array("i")
        self._unset = array("i")

    def query(self, pid: int, addresses: Sequence[int]) -> array[int]:
        """The node of each address, or a negative errno: -ENOENT where no page is present.

        :raises NoSuchProcess, Denied, Rejected: the call failed
        """
        return self._call(pid, addresses, None, 0)

    def move(self, pid: int, addresses: Sequence[int], node: int, *, shared: bool) -> array[int]:
        """Ask for pages to be moved to a node; with `shared`, pages mapped more than once too (MOVE_ALL).

        The statuses are what the kernel said, not what came of it: give one address a frame, for of two
        aliases the second reads -EBUSY and moves nevertheless; and query afterwards (findings F4).

        :raises NoSuchProcess, Denied, Rejected: the call failed; pages before that point may have moved
        """
        return self._call(pid, addresses, node, MPOL_MF_MOVE_ALL if shared else MPOL_MF_MOVE)

    def _call(self, pid: int, addresses: Sequence[int], node: int | None, flags: int) -> array[int]:
        count = len(addresses)
        if not count:
            return array("i")
        pages = addresses if isinstance(addresses, array) and addresses.typecode == "Q" else array("Q", addresses)
        if len(self._unset) < count:
            self._unset = array("i", [NOT_ATTEMPTED]) * count
            self._statuses = array("i", self._unset)
        else:
            # Statuses of an earlier batch would pass for answers where the kernel writes none.
            self._statuses[:count] = self._unset[:count]
        nodes = None
        if node is not None:
            if len(self._nodes) < count or self._nodes[0] != node:
                self._nodes = array("i", [node]) * count
            nodes = self._nodes.buffer_info()[0]
        # > 0 means that so many pages were not moved: the statuses and a query say which.
        if library().move_pages(pid, count, pages.buffer_info()[0], nodes, self._statuses.buffer_info()[0], flags) < 0:
            verb = "query" if node is None else f"to node {node}"
            raise _failed("move_pages", f"of process {pid}, {verb}", _MOVE_CAUSES)
        return self._statuses[:count]
