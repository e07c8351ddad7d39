# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is on the other end of the control socket, and what they may do.

Whoever can connect may read: the socket's mode and group (`socket_group`) decide that. Changing anything takes root,
the service's own user, or a member of a second group (`socket_write_group`). The kernel says who it is (unix(7),
SO_PEERCRED and SO_PEERGROUPS); both are as they were when the client connected, and can't be forged.
"""

from __future__ import annotations

import grp
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ksmd_ctl.errors import UsageError

__all__ = ["Authority", "Peer", "group_number", "peer_of"]

# asm-generic/socket.h; the socket module doesn't have it. Since Linux 4.13.
_SO_PEERGROUPS = 59

# The most that getsockopt of the socket module takes: 256 groups.
_BUFFER_BYTES = 1024

_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected; `groups` holds its supplementary groups and its effective one."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(getsockopt: Callable[[int, int, int], bytes]) -> Peer:
    """Who connected to a socket, from the socket's ``getsockopt``.

    A client in more than 256 groups counts as in its effective group only: it is denied rather than guessed at.
    """
    pid, uid, gid = _UCRED.unpack(getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        packed = getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _BUFFER_BYTES)
    except OSError:
        packed = b""
    return Peer(pid, uid, frozenset({gid, *struct.unpack(f"{len(packed) // 4}I", packed)}))


@dataclass(frozen=True, slots=True)
class Authority:
    """Who may change something.

    :ivar group: the number of the group whose members may, None for none
    :ivar group_name: what it is called
    :ivar own_uid: the service's own user
    """

    group: int | None = None
    group_name: str = ""
    own_uid: int = os.geteuid()

    def may_change(self, peer: Peer) -> bool:
        return peer.uid in (0, self.own_uid) or (self.group is not None and self.group in peer.groups)


def group_number(name: str) -> int:
    """The number of a group.

    :raises UsageError: there is no such group
    """
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise UsageError(
            f"the group {name} of the control socket",
            "there is no such group",
            hint=f"create it (groupadd --system {name}) or name another one",
        ) from error
