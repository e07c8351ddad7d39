# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket's file: made with the right owner and mode before anybody can connect, or systemd's."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from systemd import daemon

from ksmd_ctl.errors import Denied, KsmdError, UsageError, errno_text

__all__ = ["ControlSocket", "inherit", "listen"]

# The file's mode is 0660 from the beginning: chmod(2) would follow a link that somebody put there.
_UMASK = 0o777 & ~0o660


class ControlSocket:
    """A bound socket, and its file if that was made here."""

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        self.sock = sock
        self.path = path
        self._inode = os.lstat(path).st_ino if path is not None else 0

    def remove(self) -> None:
        """Remove the file, unless another service has put its own in this place."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                if os.lstat(self.path).st_ino == self._inode:
                    self.path.unlink()


def inherit() -> ControlSocket | None:
    """The socket that systemd passed (sd_listen_fds(3)), None where it passed none.

    :raises UsageError: what was passed is not one socket that listens
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
    """Make the socket's file; a file that nobody listens on any more is replaced.

    Until the socket listens, connecting is refused: owner, group and mode are right before that.

    :param group: the number of the group that may connect beside the owner, None for the process's own
    :raises UsageError: somebody listens there, or something else is in the way
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
            # EAGAIN is a full queue of a socket that somebody listens on; EACCES is somebody else's.
            raise UsageError(what, f"it is in use: {error}", hint="choose another path") from error
    raise UsageError(what, "somebody listens there", hint="stop the other service, or choose another path")
