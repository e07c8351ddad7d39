# SPDX-License-Identifier: GPL-2.0-or-later
"""/proc/PID/pagemap in bulk. Source: Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c:pagemap_read."""

from __future__ import annotations

import errno
import os
import sys
from array import array
from pathlib import Path
from types import TracebackType

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess, Unreadable, errno_text

__all__ = [
    "EXCLUSIVE",
    "PRESENT",
    "SWAPPED",
    "Pagemap",
    "all_have",
    "frame_limits",
    "frames_of",
]

PRESENT = 1 << 63
SWAPPED = 1 << 62
#: Mapped exactly once. A KSM page whose other mappings went away has it: it says nothing about KSM.
EXCLUSIVE = 1 << 56

_FRAME_BITS = 55
_FRAME = (1 << _FRAME_BITS) - 1
_ENTRY_BYTES = 8
_MASK_ENTRIES = 512
_MASKS: dict[int, int] = {}


def frames_of(entries: array[int]) -> list[int]:
    """The frame of each entry, 0 where no page is present. Frame 0 itself is never mapped to a process."""
    return [entry & _FRAME if entry >> 63 else 0 for entry in entries]


def all_have(entries: array[int], bits: int) -> bool:
    """Whether every entry has all of these bits."""
    count = len(entries)
    if not count:
        return True
    if bits not in _MASKS:
        _MASKS[bits] = int.from_bytes(bits.to_bytes(_ENTRY_BYTES, sys.byteorder) * _MASK_ENTRIES, sys.byteorder)
    # As one big number: a loop over them would cost more than to move the pages does.
    wanted = bits.bit_count() * _MASK_ENTRIES
    for first in range(0, count - count % _MASK_ENTRIES, _MASK_ENTRIES):
        number = int.from_bytes(entries[first : first + _MASK_ENTRIES].tobytes(), sys.byteorder)
        if (number & _MASKS[bits]).bit_count() != wanted:
            return False
    return all(entry & bits == bits for entry in entries[count - count % _MASK_ENTRIES :])


def frame_limits(entries: array[int]) -> tuple[int, int] | None:
    """The least and the greatest frame of entries, if all are present and alike otherwise; None says nothing."""
    least, greatest = min(entries, default=0), max(entries, default=0)
    if not least & PRESENT or least >> _FRAME_BITS != greatest >> _FRAME_BITS:
        return None
    return least & _FRAME, greatest & _FRAME


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
