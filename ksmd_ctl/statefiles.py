# SPDX-License-Identifier: GPL-2.0-or-later
"""What is kept on disk: journals, each one JSON document that is replaced as a whole, and the lock of a host.

Whoever may open a file may lock it. So only its owner may open the lock (flock(2)), and who holds it is in another file
beside it, which everybody may read.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from ksmd_ctl.codec import JSON, decode, dump, encode_fields, load
from ksmd_ctl.errors import Denied, HostError, KsmdError, NotRecorded, Refused, Unreadable, UsageError, errno_text
from ksmd_ctl.regularfile import read_regular

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# "PID WHO", and who is a command with its arguments.
_MOST_BYTES = 1 << 16

# What is wrong with the disk then, and not with the configuration that names the folder.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

#: The name of the lock in the runtime directory, and in the state directory.
LOCK = "lock"


class HostLock:
    """Held from its creation until `release`, or until the process ends, however it ends.

    The file stays behind: who removed it could remove the one that somebody else has locked meanwhile.

    :param who: what the holder is, for the one that comes second
    :param hint: what that one is told to do
    :raises Refused: somebody else holds it; the text says who
    :raises NotRecorded: the disk is full or read-only
    :raises Denied: no permission
    :raises UsageError: something else is in the way
    """

    def __init__(self, path: Path, who: str, hint: str = "`ksmd-ctl status` shows what it does; stop it first") -> None:
        self.path = path
        what = "taking the lock of this host"
        make_directory(path.parent)
        try:
            self._descriptor = _lock(path)
        except BlockingIOError as error:
            raise Refused(what, f"{_holder(path)} holds {path}", hint=hint) from error
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
            with suppress(OSError):
                _holder_path(self.path).unlink()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> HostLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def host_locked(runtime_directory: str, state_directory: str, who: str) -> Iterator[HostLock]:
    """Be the only one who changes the knobs of this host; the lock that a service touches.

    A pod or container has a runtime directory of its own, and the state directory in common with all others. Whoever
    can't have a lock there changes no knob either: the first value of each is recorded in that directory before.

    :raises KsmdError: as `HostLock`
    """
    with HostLock(Path(runtime_directory) / LOCK, who) as lock, ExitStack() as stack:
        hint = "it has another runtime directory, as in a pod or a container: stop it there first"
        with suppress(NotRecorded, Denied, UsageError):
            stack.enter_context(HostLock(Path(state_directory) / LOCK, who, hint))
        yield lock


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


#: What is raised while a document of a wrong form is read.
MALFORMED: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError)


def read_file(path: Path, what: str, most_bytes: int) -> bytes | None:
    """The content, None where there is no such file.

    The service's user owns the directory, and root reads there at a stop: nothing in the file's place is waited for.

    :param what: what is being done, for people
    :raises Unreadable: there is one, and it can't be read
    :raises ValueError: it is not a regular file, or longer than `most_bytes`
    """
    try:
        return read_regular(path, most_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        cause = f"{path}: {errno_text(error.errno or 0)}"
        raise Unreadable(what, cause, path=str(path), errno=error.errno) from error


def parse_json(content: bytes) -> JSON:
    """The value of a JSON document that can be given on to others as it is.

    :raises ValueError: it is none, or it holds a number that is not finite, or text that is not Unicode
    """
    found = load(content)
    # Python reads 1e400 and lone surrogates, and nobody can write them.
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    return found


def put_aside(path: Path) -> str:
    """Move a damaged file out of the way, if that is possible; where it is now."""
    aside = f"{path}.damaged"
    try:
        os.replace(path, aside)
    except OSError:
        return str(path)
    return aside


def became_of(path: Path, damaged: str) -> str:
    """Where a damaged file is now, as a phrase.

    :param damaged: where it is now
    """
    return f"stays at {path}" if damaged == str(path) else f"was put aside as {damaged}"


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file as a whole; it is on disk afterwards, or as it was."""
    temporary = path.with_name(f"{path.name}.new")
    # What a crash left behind. O_EXCL: a link that somebody put there is not followed.
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(descriptor, "wb") as stream:
            give_to_owner_of(path.parent, descriptor)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


D = TypeVar("D", bound="DataclassInstance")
T = TypeVar("T")


class JournalFile(Generic[D]):
    """One document on disk: after a crash it is as it was before a write, or after it.

    :param form: the dataclass of the document; the file has `FORMAT` beside its fields
    :param name: what it holds, as a phrase
    :ivar damaged: where the file is now if it could not be understood, empty otherwise
    """

    FORMAT: Final = 1

    def __init__(self, path: Path, form: type[D], name: str, most_bytes: int = 1 << 20) -> None:
        self.path = path
        self.damaged = ""
        self._form = form
        self._name = name
        self._most_bytes = most_bytes

    def read(self, check: Callable[[D], T], *, keep: bool, upgrade: Callable[[JSON], JSON] = lambda it: it) -> T | None:
        """What `check` makes of the document; None where there is no file, or none that can be understood.

        :param check: raises ValueError where a value is impossible
        :param keep: leave a damaged file where it is: for those who only look
        :param upgrade: turns a document of an older version into one of this
        :raises Unreadable: the file is there and can't be read
        """
        try:
            content = read_file(self.path, f"reading {self._name}", self._most_bytes)
            if content is None:
                return None
            document = parse_json(content)
            if not isinstance(document, dict) or document.pop("format") != self.FORMAT:
                raise ValueError("its format is unknown")
            return check(decode(self._form, upgrade(document), "the file"))
        except MALFORMED:
            self.damaged = str(self.path) if keep else put_aside(self.path)
            return None

    def write(self, document: D | None) -> None:
        """Replace the file, or remove it; that is on disk afterwards.

        :raises Denied, NotRecorded, UsageError: it can't be written, and what was there before is
        """
        try:
            if document is None:
                self.path.unlink(missing_ok=True)
                return
            content = dump({"format": self.FORMAT, **encode_fields(document)})
            if len(content) > self._most_bytes:
                raise self._error(NotRecorded, f"it would be longer than {self._most_bytes} bytes")
            make_directory(self.path.parent)
            replace_file(self.path, content)
        except OSError as error:
            kind = Denied if isinstance(error, PermissionError) else NotRecorded
            raise self._error(kind, errno_text(error.errno or 0), error.errno) from error

    def _error(self, kind: type[HostError], why: str, number: int | None = None) -> HostError:
        hint = "make room there, or set another [service] state_directory; nothing is changed before that is on disk"
        return kind(f"keeping {self._name}", f"{self.path}: {why}", hint=hint, path=str(self.path), errno=number)
