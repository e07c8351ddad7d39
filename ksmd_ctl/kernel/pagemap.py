# SPDX-License-Identifier: GPL-2.0-or-later
"""/proc/PID/pagemap in bulk. Source: Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c:pagemap_read."""

from __future__ import annotations

import errno
import os
from array import array
from pathlib import Path
from types import TracebackType

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess, Unreadable, errno_text

__all__ = [
    "EXCLUSIVE",
    "PRESENT",
    "SWAPPED",
    "Pagemap",
    "frames_of",
]

PRESENT = 1 << 63
SWAPPED = 1 << 62
#: Mapped exactly once. A KSM page whose other mappings went away has it: it says nothing about KSM.
EXCLUSIVE = 1 << 56

_FRAME = (1 << 55) - 1
_ENTRY_BYTES = 8


def frames_of(entries: array[int]) -> list[int]:
    """The frame of each entry, 0 where no page is present. Frame 0 itself is never mapped to a process."""
    return [entry & _FRAME if entry >> 63 else 0 for entry in entries]


class Pagemap:
    """One process's pagemap. The descriptor stays with the process, whoever gets its pid later."""

    def __init__(self, pid: int, root: Path = Path("/"), page_size: int = 4096) -> None:
        """
        :raises NoSuchProcess: there is none
        :raises Denied: it is not ours to look at
        :raises Absent: the kernel has no pagemap (CONFIG_PROC_PAGE_MONITOR)
        """
        self._pid = pid
        self._page_size = page_size
        self._path = root / "proc" / str(pid) / "pagemap"
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise Denied(
                    f"pages of process {pid}",
                    f"its pagemap can't be opened: {errno_text(error.errno)}",
                    hint="needs CAP_SYS_PTRACE, and CAP_DAC_READ_SEARCH for another user's process",
                    path=str(self._path),
                    errno=error.errno,
                ) from error
            if not self._path.parent.is_dir():
                raise NoSuchProcess(f"process {pid}", "it is gone", errno=error.errno) from error
            raise Absent(
                f"pages of process {pid}",
                "this kernel has no pagemap",
                path=str(self._path),
                errno=error.errno,
            ) from error

    def read(self, start: int, pages: int) -> array[int]:
        """The entries of pages from an address on; fewer where the address space ends.

        :raises NoSuchProcess: it exited
        """
        entries = array("Q")
        offset, left = start // self._page_size * _ENTRY_BYTES, pages * _ENTRY_BYTES
        while left:
            try:
                data = os.pread(self._fd, left, offset)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    raise NoSuchProcess(f"process {self._pid}", "it is gone", errno=error.errno) from error
                raise Unreadable(
                    f"pages of process {self._pid}",
                    errno_text(error.errno or 0),
                    path=str(self._path),
                    errno=error.errno,
                ) from error
            # The kernel hands out whole entries only, unless the file is a test's.
            data = data[: len(data) // _ENTRY_BYTES * _ENTRY_BYTES]
            if not data:
                # At exit the memory goes first: the file then reads as empty, wherever one reads it.
                self._verify_alive()
                break
            entries.frombytes(data)
            offset += len(data)
            left -= len(data)
        return entries

    def _verify_alive(self) -> None:
        try:
            empty = not os.pread(self._fd, _ENTRY_BYTES, 0)
        except OSError:
            empty = True
        if empty:
            raise NoSuchProcess(f"process {self._pid}", "it is gone, or has no memory any more")

    def need_frames(self, entries: array[int]) -> None:
        """Make sure that entries tell frames: without CAP_SYS_ADMIN the kernel shows 0 for each.

        :raises Denied: pages are present and no frame is shown
        """
        if any(entry >> 63 for entry in entries) and not any(entry & _FRAME for entry in entries if entry >> 63):
            raise Denied(
                f"frames of process {self._pid}",
                "its pagemap shows pages without their frames",
                hint="needs CAP_SYS_ADMIN",
                path=str(self._path),
            )

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Pagemap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
