# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of /proc/PID, and which process a pid is. Sources: proc(5), pidfd_open(2).

A process may call itself anything: bytes that are not UTF-8, terminal escapes, line feeds, 128 KiB of it. Its name
becomes text that is safe to show (`printable`) where it is read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, HostError, NoSuchProcess, ReadError, Unparsable, Unreadable, errno_text
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import readable
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, Closing, read_error, read_file
from ksmd_ctl.kernel.reading import read_whole

#: Of the fields that `parse_stat` gives: field 22 of proc(5) is the start time, and the third is the first here.
START_TIME = 22 - 3
_THREADS: Final = 20 - 3


# psutil is imported in these two functions only: 3.7 MB and 20 ms, which a child of the broker or a command that looks
# at every process can spare, and neither the service nor `status` can (docs/dependencies.md).


def running_pids(root: Path = Path("/")) -> list[int]:
    """Every process that psutil finds, by pid.

    :raises Absent: there is no /proc
    """
    import psutil

    # psutil has one root for all of a process's calls.
    psutil.PROCFS_PATH = str(root / "proc")
    try:
        return psutil.pids()
    except OSError as error:
        path = psutil.PROCFS_PATH
        raise Absent("processes", f"{path} can't be listed", path=path, errno=error.errno) from error


def effective_uid(pid: int, root: Path = Path("/")) -> int | None:
    """A process's effective user; None where it may not be known. Takes no lock of the process (fs/proc/array.c).

    :raises NoSuchProcess: it is gone
    """
    import psutil

    psutil.PROCFS_PATH = str(root / "proc")
    try:
        return int(psutil.Process(pid).uids().effective)
    except psutil.NoSuchProcess as error:
        raise NoSuchProcess(f"process {pid}", "it is gone") from error
    except (psutil.AccessDenied, OSError, IndexError):
        return None


def pids(proc: Path) -> list[int]:
    """As `running_pids`, without psutil: for the service and `status`.

    :raises OSError: it can't be listed
    """
    return sorted(int(name) for name in os.listdir(proc) if name.isascii() and name.isdigit())


@dataclass(slots=True)
class LeftOut:
    """Processes that could not be looked at, and why. One that is gone is not among them."""

    errors: dict[int, Denied | ReadError] = field(default_factory=dict)

    @contextmanager
    def looking_at(self, pid: int) -> Iterator[None]:
        """Go on after a process that is gone, not ours to look at, or keeps its readers waiting."""
        try:
            yield
        except NoSuchProcess:
            pass
        except (Denied, ReadError) as error:
            self.errors[pid] = error

    def need(self, found: object) -> None:
        """
        :raises Denied, Absent: nothing was found, and some were refused: why the last was, for init may be special
        """
        refusals = [error for error in self.errors.values() if isinstance(error, Denied | Absent)]
        if refusals and not found:
            raise refusals[-1]


# About 700 and 100 bytes a mapping, for as many as vm.max_map_count allows by default (65,530).
_MOST_BYTES: Final = {"smaps": 64 << 20, "numa_maps": 16 << 20, "cmdline": 64 << 10}
_MOST_OF_OTHERS: Final = 256 << 10


def own_resident_bytes() -> int | None:
    """Resident memory of this process; None where /proc is not there to tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * PAGE_SIZE
    except OSError:
        return None


def read_process_file(pid: int, name: str, root: Path = Path("/")) -> str:
    """A file of /proc/PID as text; what is not UTF-8 is replaced.

    :raises NoSuchProcess, Denied, Absent: as `read_process_bytes`
    """
    return read_process_bytes(pid, name, root).decode(errors="replace")


def read_process_bytes(pid: int, name: str, root: Path = Path("/")) -> bytes:
    """A file of /proc/PID.

    Of a long command line only the beginning: it may be of any length, and in memory that was never touched.

    :raises Unreadable: it is longer than such a file of any reasonable process, or could not be read in time
        (`ksmd_ctl.kernel.reading.TIMED_OUT`)
    :raises NoSuchProcess: the process is gone
    :raises Denied: it is not ours to look at
    :raises Absent: the process is there, and this kernel has no such file
    """
    path = root / "proc" / str(pid) / name
    most = _MOST_BYTES.get(name, _MOST_OF_OTHERS)
    try:
        data = read_whole(path, most)
        if len(data) <= most or name == "cmdline":
            return data[:most]
        raise Unreadable(f"reading {path}", f"it is longer than {most >> 10} KiB", path=str(path), errno=errno.EFBIG)
    except OSError as error:
        raise process_file_error(pid, path, error) from error


def command_words(text: str) -> list[str]:
    """The words of the text of /proc/PID/cmdline. A process may write over them; then they may be one with blanks."""
    return text.rstrip("\0").split("\0") if text else []


#: A process that is listed and has no memory.
NO_MEMORY: Final = "it has no memory: it is a kernel thread, or has just exited"


def process_file_error(pid: int, path: Path, error: OSError) -> HostError:
    """What it means that a file of /proc/PID can't be opened or read: `NoSuchProcess`, `Denied` or a `ReadError`."""
    # ESRCH is also what files of memory say of a kernel thread and of a zombie.
    if isinstance(error, ProcessLookupError) and path.parent.is_dir():
        return NoSuchProcess(f"process {pid}", NO_MEMORY, path=str(path), errno=error.errno)
    # ENOENT may mean the process or the file.
    if isinstance(error, ProcessLookupError) or (isinstance(error, FileNotFoundError) and not path.parent.is_dir()):
        return NoSuchProcess(f"process {pid}", "it is gone", path=str(path), errno=error.errno)
    if isinstance(error, PermissionError):
        hint = (
            "needs CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH for another user's process, and kernel.yama.ptrace_scope below 3"
        )
        why = f"{path} can't be read: {errno_text(error.errno or 0)}"
        return Denied(f"process {pid}", why, hint=hint, path=str(path), errno=error.errno)
    return read_error(str(path), error)


def parse_stat(data: bytes) -> tuple[str, list[bytes]]:
    """The name in /proc/PID/stat, and the fields after it: state, parent, ...

    The name may hold blanks and brackets, so it ends at the last bracket. It is fit to be shown.

    :raises ValueError: it does not look like that
    """
    head, bracket, rest = data.rpartition(b") ")
    _, opening, name = head.partition(b" (")
    fields = rest.split()
    if not bracket or not opening or len(fields) <= START_TIME:
        raise ValueError(f"{data[:40]!r} is not a stat line")
    return printable(name.decode(errors="replace")), fields


def read_stat(pid: int, root: Path = Path("/")) -> tuple[str, list[bytes]]:
    """A process's name, and the fields after it, as `parse_stat` gives them.

    :raises NoSuchProcess: there is none
    :raises Unparsable: it does not look as it should
    """
    path = root / "proc" / str(pid) / "stat"
    try:
        data = read_file(path)
    except ReadError as error:
        raise NoSuchProcess(f"process {pid}", "it is gone", path=str(path), errno=error.errno) from error
    try:
        return parse_stat(data)
    except ValueError as error:
        raise Unparsable(str(path), str(error), path=str(path)) from error


def memory_pid(pid: int, fields: Sequence[bytes], root: Path = Path("/")) -> int:
    """The pid, or of a process whose main thread has ended that of a thread that runs on.

    Files of the main thread show no memory then, and those of any other all (fs/proc/base.c finds each in /proc).

    :param fields: as `read_stat` gives them
    :raises Unparsable: as `read_stat`
    """
    if fields[0] != b"Z" or int(fields[_THREADS]) < 2:
        return pid
    with suppress(OSError):
        for thread in sorted(map(int, os.listdir(root / "proc" / str(pid) / "task"))):
            with suppress(NoSuchProcess):
                if read_stat(thread, root)[1][0] not in (b"Z", b"X"):
                    return thread
    return pid


def start_time_ticks(pid: int, root: Path = Path("/")) -> int:
    """When a process was started, in clock ticks since boot.

    :raises NoSuchProcess, Unparsable: as `read_stat`
    """
    return int(read_stat(pid, root)[1][START_TIME])


class Held(Closing):
    """A process that was found to be the one meant, and can be told from a later one with its pid.

    While a pidfd is open its number can still be taken by another once it has exited and been waited for; but
    the pidfd is readable from the moment of its exit on, so `verify` notices.
    """

    def __init__(self, process: ProcessId, root: Path = Path("/")) -> None:
        """
        :raises NoSuchProcess: it is gone, or its pid belongs to another process now
        """
        self.process = process
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            raise NoSuchProcess(f"process {process.pid}", "it is gone", errno=error.errno) from error
        try:
            # After the pidfd: what has this start time now is what the pidfd holds, or it has exited.
            found = start_time_ticks(process.pid, root)
            if found != process.start_time_ticks:
                raise NoSuchProcess(
                    f"process {process.pid}", "it is gone, and its pid belongs to another process now", value=found
                )
            self.verify()
        except BaseException:
            self.close()
            raise

    @property
    def pidfd(self) -> int:
        """A descriptor of the process, for system calls."""
        return self._pidfd

    def verify(self) -> None:
        """
        :raises NoSuchProcess: it has exited
        """
        if readable(self._pidfd, 0):
            raise NoSuchProcess(f"process {self.process.pid}", "it has exited")

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


# -- names ---------------------------------------------------------------------------------------------------

#: Characters of a name; what is longer ends with ``~`` and a digest, so that two long names stay two.
LONGEST_NAME = 100
_DIGEST_BYTES = 4


def printable(name: str, longest: int = LONGEST_NAME) -> str:
    r"""A name on one line: control, format and other invisible characters as ``\x1b`` or ``\u202e``, not too long."""
    shown = name if name.isprintable() else "".join(map(_shown, name))
    if len(shown) <= longest:
        return shown
    # Not imported otherwise: it loads OpenSSL's libcrypto, 3 MiB.
    import hashlib

    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{shown[: longest - len(digest) - 1]}~{digest}"


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def merging_pages_of(pid: int, root: Path = Path("/")) -> int | None:
    """ksm_merging_pages of a process (since 5.19, fs/proc/base.c:proc_pid_ksm_merging_pages), which takes no lock.

    :returns: None where the file is empty: a kernel thread has no memory, nor has a process that has ended
    :raises NoSuchProcess, Denied, ReadError: as `ksmd_ctl.kernel.proc_pid.read_process_file`
    """
    text = read_process_file(pid, "ksm_merging_pages", root).strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        path = str(root / "proc" / str(pid) / "ksm_merging_pages")
        raise Unparsable(path, f"{text[:40]!a} is not a number", path=path)
    return int(text)


def mapped_ksm_pages(root: Path = Path("/")) -> int | None:
    """How many KSM pages the processes map that have merged pages by the kernel's count (smaps_rollup, since 6.7).

    Their page tables are walked, so it is right also while ksmd is stopped and that count is not.

    :returns: None where this kernel doesn't tell, or not all processes' may be read
    """
    total = 0
    for pid in pids(root / "proc"):
        try:
            if not merging_pages_of(pid, root):
                continue
            rollup = read_process_file(pid, "smaps_rollup", root)
        except NoSuchProcess:
            continue
        except (Denied, ReadError):
            return None
        found = re.search(r"^KSM: +(\d+) kB$", rollup, re.MULTILINE | re.ASCII)
        if found is None:
            return None
        total += int(found[1]) * 1024 // PAGE_SIZE
    return total


def merging_pages(root: Path = Path("/")) -> int | None:
    """The sum of `merging_pages_of`. While ksmd is stopped the host's counters keep pages that went with a process.

    :returns: None where this kernel has no such file, or not all processes' may be read
    """
    total = 0
    for pid in pids(root / "proc"):
        try:
            total += merging_pages_of(pid, root) or 0
        except NoSuchProcess:
            # Its pages went with it.
            continue
        except (Denied, ReadError):
            return None
    return total
