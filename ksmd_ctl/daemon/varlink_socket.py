# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: its file, or the socket that systemd passed, and the authority of its clients.

The file gets its owner and mode before anybody can connect. Everybody who can connect may read; the mode and group of
the socket (`socket_group`) decide that. Only root, the service's own user and members of a second group
(`socket_write_group`) may change something. The kernel says who the client was when it connected (unix(7): SO_PEERCRED
and SO_PEERGROUPS); that can't be forged.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from systemd import daemon

from ksmd_ctl.errors import Denied, KsmdError, UsageError, errno_text

# The mode of the file is 0660 from the beginning, because chmod(2) would follow a symbolic link.
_UMASK = 0o777 & ~0o660


class ControlSocket:
    """A bound socket, and its file if the service made it."""

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        self.sock = sock
        self.path = path
        self._inode = os.lstat(path).st_ino if path is not None else 0

    def remove(self) -> None:
        """Remove the file, unless another service has replaced it."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                if os.lstat(self.path).st_ino == self._inode:
                    self.path.unlink()


def inherit() -> ControlSocket | None:
    """The socket that systemd passed (sd_listen_fds(3)), None if it passed none.

    :raises UsageError: what was passed is not one listening socket
    """
    descriptors = daemon.listen_fds()
    if not descriptors:
        return None
    what = "the control socket from systemd"
    if len(descriptors) > 1:
        raise UsageError(what, f"{len(descriptors)} were passed", hint="the .socket unit must have one ListenStream=")
    try:
        sock = socket.socket(fileno=descriptors[0])
        good = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
    except OSError as error:
        raise UsageError(what, f"descriptor {descriptors[0]} is no socket") from error
    if not good:
        sock.close()
        raise UsageError(what, "it is not a stream socket of the Unix domain", hint="use ListenStream=/PATH")
    return ControlSocket(sock)


def listen(path: Path, group: int | None = None) -> ControlSocket:
    """Make the socket; a file that no process listens on any more is replaced.

    :param group: the number of the group that may connect beside the owner, None for the group of the process
    :raises UsageError: another process listens there, or the file is not a socket
    :raises Denied: no permission
    """
    what = f"the control socket {path}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(exist_ok=True)
        _clear(path, what)
        old = os.umask(_UMASK)
        try:
            sock.bind(str(path))
        finally:
            os.umask(old)
        if group is not None:
            _give(path, group, what)
        sock.listen()
        return ControlSocket(sock, path)
    except KsmdError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        why = errno_text(error.errno) if error.errno else str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Denied(what, why, hint="run as root, or choose another path", path=str(path)) from error
        raise UsageError(what, why, hint="choose another path") from error


def _give(path: Path, group: int, what: str) -> None:
    try:
        os.chown(path, -1, group, follow_symlinks=False)
    except PermissionError as error:
        path.unlink()
        raise Denied(
            what,
            f"it can't be given to the group {group}, which this process is not in",
            hint="SupplementaryGroups= in the unit puts the service in it",
            path=str(path),
            errno=error.errno,
        ) from error


def _clear(path: Path, what: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(what, "there is a file that is no socket", hint="remove it, or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # EAGAIN: another process listens, and its queue is full. EACCES: it belongs to another user.
            raise UsageError(what, f"it is in use: {error}", hint="choose another path") from error
    raise UsageError(what, "somebody listens there", hint="stop the other service, or choose another path")


# asm-generic/socket.h; the socket module doesn't have it. Since Linux 4.13.
_SO_PEERGROUPS = 59

# The limit of getsockopt in the socket module: 256 groups.
_BUFFER_BYTES = 1024

_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """A client process; `groups` are its supplementary groups and its effective one."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(getsockopt: Callable[[int, int, int], bytes]) -> Peer:
    """The client of a socket.

    Of a client in more than 256 groups only the effective group counts.
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
    :ivar group_name: its name
    :ivar own_uid: the user of the service
    """

    group: int | None = None
    group_name: str = ""
    own_uid: int = os.geteuid()

    def may_change(self, peer: Peer) -> bool:
        return peer.uid in (0, self.own_uid) or (self.group is not None and self.group in peer.groups)


def group_number(name: str) -> int:
    """
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
