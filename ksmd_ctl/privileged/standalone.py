# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker where no systemd starts it: in a container beside the service's (docs/container.md).

What systemd does for it otherwise: make the state directory the service's, make the socket, and end it after the
service, which needs it to put the knobs back.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from pathlib import Path
from types import FrameType

from ksmd_ctl.errors import Denied, KsmdError, UsageError, errno_text
from ksmd_ctl.kernel.namespaces import hidden_from_container, join_host_cgroups
from ksmd_ctl.statefiles import LOCK, holder

#: So long after SIGTERM it goes on serving while the service runs; Kubernetes kills after 30 s, unless told otherwise.
LINGER_SECONDS = 25.0
_LOOK_SECONDS = 0.2


def prepare(state_directory: Path, runtime_directory: Path, uid: int, root: Path) -> None:
    """Let the service write where it has to, see the host's cgroups, and say what of the host is hidden.

    :raises Denied: a directory can't be given away
    """
    _give(state_directory, uid, uid, 0o755)
    # The socket of this process is made there as well, without CAP_DAC_OVERRIDE: it is root's. podman makes a volume
    # that of whoever takes it first, who may be the service.
    _give(runtime_directory, 0, uid, 0o775)
    problems: list[KsmdError] = [*hidden_from_container(root).values()]
    try:
        join_host_cgroups(root)
    except Denied as error:
        problems.append(error)
    for problem in problems:
        sys.stderr.write(f"ksmd-ctl-broker: {problem}\nhint: {problem.hint}\n")
    sys.stderr.flush()


def _give(directory: Path, uid: int, gid: int, mode: int) -> None:
    """A directory that a container runtime made is root's, and the service couldn't write there."""
    what, path = f"giving {directory} to the service", str(directory)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(directory, flags)
    except FileNotFoundError:
        # Not mounted here: it is somebody else's matter.
        return
    except OSError as error:
        hint = "it has to be a directory"
        raise Denied(what, errno_text(error.errno or 0), hint=hint, path=path, errno=error.errno) from error
    try:
        found = os.fstat(descriptor)
        # One that all may write (an emptyDir), or that is somebody else's, stays as it is.
        if found.st_uid in ((0,) if uid else (0, gid)) and not found.st_mode & 0o002:
            # Only of its own can root change the mode without CAP_FOWNER.
            if found.st_uid:
                os.fchown(descriptor, 0, gid)
            os.fchmod(descriptor, mode)
            os.fchown(descriptor, uid, gid)
    except OSError as error:
        hint = "the container takes CAP_CHOWN, or a directory that is the service's"
        raise Denied(what, errno_text(error.errno or 0), hint=hint, path=path, errno=error.errno) from error
    finally:
        os.close(descriptor)


def clear(path: Path) -> None:
    """Remove the socket that an earlier broker left: a container has one, and its runtime ends it before the next.

    :raises UsageError: something else is there
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"listening on {path}", "there is a file that is no socket", hint="remove it")
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"listening on {path}", errno_text(error.errno or 0), hint="choose another path") from error


def stop_after_service(runtime_directory: Path, stop: int) -> None:
    """Write to a descriptor after SIGTERM, once the service has ended; it ends at the same time, in any order.

    :param runtime_directory: the service's, which has its lock
    """
    until = 0.0

    def look(_number: int, _frame: FrameType | None) -> None:
        nonlocal until
        now = time.monotonic()
        until = until or now + LINGER_SECONDS
        if now < until and holder(runtime_directory / LOCK):
            signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS)
        else:
            os.write(stop, b"+")

    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, look)
