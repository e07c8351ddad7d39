# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock that keeps two programs from changing one host: flock(2) on a file that only its owner may open.

Whoever may open a file may lock it. So who holds the lock is in another file beside it, which everybody may read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

from ksmd_ctl.errors import Denied, KsmdError, NotRecorded, Refused, UsageError, errno_text
from ksmd_ctl.regularfile import read_regular

# "PID WHO", and who is a command with its arguments.
_MOST_BYTES = 1 << 16

# What is wrong with the disk then, and not with the configuration that names the folder.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

#: The name of the lock in the runtime directory.
LOCK = "lock"


class HostLock:
    """Held from its creation until `release`, or until the process ends, however it ends.

    The file stays behind: who removed it could remove the one that somebody else has locked meanwhile.

    :param who: what the holder is, for the one that comes second
    :raises Refused: somebody else holds it; the text says who
    :raises NotRecorded: the disk is full or read-only
    :raises Denied: no permission
    :raises UsageError: something else is in the way
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
        except OSError as error:
            raise _write_error(what, path, error, "choose another runtime_directory") from error
        try:
            self.touch()
            _say(path, who)
        except OSError as error:
            os.close(self._descriptor)
            raise _write_error(what, _holder_path(path), error, "choose another runtime_directory") from error

    def touch(self) -> None:
        """Show that the holder is still at work: for whoever wants to know since when it isn't."""
        os.utime(self._descriptor)

    def release(self) -> None:
        if self._descriptor >= 0:
            # Its process may have lost the permission since, and one that has ended is nobody's holder anyway.
            with contextlib.suppress(OSError):
                _holder_path(self.path).unlink()
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

    By what the file beside it says, and whether that process is there: to try the lock would keep others from it
    meanwhile.
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
    :raises NotRecorded: the disk is full or read-only
    :raises UsageError: something else is in the way
    """
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error("making the directory", path, error, "name another one") from error


def _write_error(what: str, path: Path, error: OSError, otherwise: str) -> KsmdError:
    """The error for a file or folder that can't be made.

    :param otherwise: what to do where something else is in the way
    """
    why = f"{path}: {errno_text(error.errno or 0)}"
    if isinstance(error, PermissionError):
        return Denied(what, why, hint=f"run as root, or {otherwise}", path=str(path), errno=error.errno)
    if error.errno in _DISK:
        hint = f"make room there, or {otherwise}; nothing was changed"
        return NotRecorded(what, why, hint=hint, path=str(path), errno=error.errno)
    return UsageError(what, why, hint=otherwise)


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
    # Nothing in its place is waited for, and no device is opened for good.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError("taking the lock of this host", f"{path} is not a regular file", hint="remove it")
            give_to_owner_of(path.parent, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not found.st_mode & 0o077 or holder(path):
                    raise
                # In earlier versions others could open it, and who has it open can lock it for ever: such a file is
                # replaced, unless a ksmd-ctl says that it is the holder.
                path.unlink(missing_ok=True)
                os.close(descriptor)
                continue
            if found.st_mode & 0o077:
                os.fchmod(descriptor, 0o600)
            # systemd removes the runtime directory of a stopped service: then this is the lock of nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _say(path: Path, who: str) -> None:
    """Tell everybody who holds the lock."""
    holder_path = _holder_path(path)
    holder_path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(holder_path, flags, 0o644)
    try:
        give_to_owner_of(path.parent, descriptor)
        # The service's umask takes the permission from all others.
        os.fchmod(descriptor, 0o644)
        os.write(descriptor, f"{os.getpid()} {who}\n".encode())
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        pid, _, who = _text(path).strip().partition(" ")
    except (OSError, ValueError):
        pid, who = "", ""
    return f"{who} (pid {pid})" if pid.isdigit() and who and who.isprintable() else "another ksmd-ctl"


def _text(path: Path) -> str:
    # The service's user owns the folder, and root looks there: nothing in the file's place is waited for.
    try:
        return read_regular(_holder_path(path), _MOST_BYTES).decode()
    except FileNotFoundError:
        # A holder of an earlier version says it in the lock itself.
        return read_regular(path, _MOST_BYTES).decode()
