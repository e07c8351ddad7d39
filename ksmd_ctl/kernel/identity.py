# SPDX-License-Identifier: GPL-2.0-or-later
"""Which process it is: pid and start time, held by a pidfd while one works on it. Source: proc(5), pidfd_open(2)."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import TracebackType

from ksmd_ctl.errors import NoSuchProcess, ReadError, Unparsable
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.printable import printable
from ksmd_ctl.kernel.pseudofile import read_file

__all__ = ["START_TIME", "Held", "parse_stat", "pids", "read_stat", "start_time_ticks"]

#: Of the fields that `parse_stat` gives: field 22 of proc(5) is the start time, and the third is the first here.
START_TIME = 22 - 3


def pids(proc: Path) -> list[int]:
    """Every process that /proc shows, by pid.

    :raises OSError: it can't be listed
    """
    return sorted(int(name) for name in os.listdir(proc) if name.isascii() and name.isdigit())


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


def start_time_ticks(pid: int, root: Path = Path("/")) -> int:
    """When a process was started, in clock ticks since boot.

    :raises NoSuchProcess, Unparsable: as `read_stat`
    """
    return int(read_stat(pid, root)[1][START_TIME])


class Held:
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
            os.close(self._pidfd)
            raise

    def verify(self) -> None:
        """
        :raises NoSuchProcess: it has exited
        """
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if poller.poll(0):
            raise NoSuchProcess(f"process {self.process.pid}", "it has exited")

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._pidfd)
