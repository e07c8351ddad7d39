# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock that keeps two programs from changing one host: flock(2) on a file that says who holds it."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

from ksmd_ctl.errors import Denied, Refused, UsageError, errno_text
from ksmd_ctl.regularfile import read_regular

# "PID WHO", and who is a command with its arguments.
_MOST_BYTES = 1 << 16

__all__ = ["HostLock", "give_to_owner_of", "holder", "make_directory"]


class HostLock:
    """Held from its creation until `release`, or until the process ends, however it ends.

    The file stays behind: who removed it could remove the one that somebody else has locked meanwhile.

    :param who: what the holder is, for the one that comes second
    :raises Refused: somebody else holds it; the text says who
    :raises Denied: no permission
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path = path
        what = "taking the lock of this host"
        make_directory(path.parent)
        try:
            self._descriptor = _lock(path)
        except BlockingIOError as error:
            raise Refused(
                what,
                f"{_holder(path)} holds {path}",
                hint="`ksmd-ctl status` shows what it does; stop it first",
            ) from error
        except PermissionError as error:
            raise Denied(what, f"{path}: {error.strerror}", hint="run as root", path=str(path)) from error
        except OSError as error:
            raise UsageError(what, f"{path}: {error.strerror}", hint="choose another runtime_directory") from error
        give_to_owner_of(path.parent, self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} {who}\n".encode(), 0)

    def touch(self) -> None:
        """Show that the holder is still at work: for whoever wants to know since when it isn't."""
        os.utime(self._descriptor)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> HostLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(path: Path) -> str:
    """Who holds a lock, for those who only look; empty for nobody.

    By what its file says, and whether that process is there: to try the lock would keep others from it meanwhile.
    """
    try:
        pid = int(_text(path).partition(" ")[0])
        os.kill(pid, 0)
    except PermissionError:
        return _holder(path)
    except (OSError, ValueError, OverflowError):
        return ""
    return _holder(path)


def make_directory(path: Path) -> None:
    """A directory that is there afterwards.

    :raises Denied: no permission
    :raises UsageError: something else is in the way
    """
    what = f"making the directory {path}"
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except PermissionError as error:
        raise Denied(
            what, errno_text(error.errno or 0), hint="run as root, or name another one", path=str(path)
        ) from error
    except OSError as error:
        raise UsageError(what, error.strerror or str(error), hint="name another one") from error


def give_to_owner_of(directory: Path, descriptor: int) -> None:
    """Let the service's user have a file that root makes in its directory, or the service couldn't open it later."""
    own = os.fstat(descriptor)
    if os.geteuid() != 0 or own.st_uid != 0 or own.st_nlink != 1:
        return
    owner = os.stat(directory)
    if owner.st_uid != 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _lock(path: Path) -> int:
    """A locked descriptor of the file that is at `path` now.

    :raises BlockingIOError: somebody else holds it
    :raises UsageError: it is not a regular file
    """
    while True:
        # O_NONBLOCK: neither a device nor a lease on the file is waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError("taking the lock of this host", f"{path} is not a regular file", hint="remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # systemd removes the runtime directory of a stopped service: then this is the lock of nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        pid, _, who = _text(path).strip().partition(" ")
    except (OSError, ValueError):
        pid, who = "", ""
    return f"{who} (pid {pid})" if pid.isdigit() and who and who.isprintable() else "another ksmd-ctl"


def _text(path: Path) -> str:
    # The service's user owns the folder, and root looks there: nothing in the file's place is waited for.
    return read_regular(path, _MOST_BYTES).decode()
