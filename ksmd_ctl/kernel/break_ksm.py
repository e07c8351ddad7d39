# SPDX-License-Identifier: GPL-2.0-or-later
"""Gives a process its own copy of a KSM page from outside, without touching its contents.

The call is process_vm_writev(2) to the page, from a local buffer that can't be read. The kernel first takes the remote
pages for writing, which gives the process a copy of each merged one (mm/ksm.c calls that breaking COW), and then fails
to read what it should write: EFAULT, and not one byte is written (mm/process_vm_access.c: process_vm_rw_single_vec
pins with FOLL_WRITE before copy_page_from_iter). Seen on 5.10, 6.1, 6.12 and 6.18 (docs/findings.md: F7, F8, F15).
What follows from it:

- EFAULT is the only success, and says nothing about any page: pagemap has to be read afterwards.
- It is for pages that are KSM pages at that moment, and for pages between these that are the process's own (mapped
  once, anonymous, present), which it leaves as they are. An untouched page would be allocated, a swapped one read in,
  and what fork shares would be copied.
- One contiguous run a call, at most 1024 pages, one remote range: of more the kernel does the first only.
- A copy comes from where the mapping's policy says, else from where the *caller's* policy and cpuset say; the
  process's own task policy and cpuset are not asked.
- A copy is charged to the process's memory cgroup, which may kill it on a host with memory to spare.
- A mapping that is not writable refuses. A mapping that userfaultfd watches makes the call wait for its handler.
- The process's contents never change. That is tried on a page of our own before anything else: before 4.12 what could
  not be read was written as zero (F20). That nothing else is touched is not promised: where the process unmaps and
  maps again under the call, a fresh page may be allocated to it.
- It needs ptrace access to the process (CAP_SYS_PTRACE); Yama's ptrace_scope 3 refuses root as well.
"""

from __future__ import annotations

import errno
import os

from ksmd_ctl.errors import Absent, CheckFailed, Denied, NoSuchProcess, Rejected, errno_text
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, Closing

#: Pages in one call: the kernel would do 1024, and twice as many as this are hardly quicker (findings F15).
MAXIMUM_RUN_PAGES = 512


class Breaker(Closing):
    """The primitive, with the buffer that can't be read."""

    def __init__(self) -> None:
        self._length = MAXIMUM_RUN_PAGES * PAGE_SIZE
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
        self._buffer = syscalls.mmap(0, self._length, syscalls.PROT_NONE, flags)
        try:
            self._prove_harmless()
        except BaseException:
            self.close()
            raise

    def _prove_harmless(self) -> None:
        protection = syscalls.PROT_READ | syscalls.PROT_WRITE
        page = syscalls.mmap(0, PAGE_SIZE, protection, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS)
        content = b"\xa5" * PAGE_SIZE
        try:
            syscalls.store(page, content)
            self.break_run(os.getpid(), page, 1)
            if syscalls.load(page, PAGE_SIZE) != content:
                raise Absent(
                    "un-merging pages of a process from outside",
                    "a write that fails changes memory on this kernel",
                    hint="kernels since 4.12 do it right; here only run=2 un-merges",
                    path="process_vm_writev",
                )
        finally:
            syscalls.munmap(page, PAGE_SIZE)

    def break_run(self, pid: int, start: int, pages: int) -> None:
        """Give a process a copy of its own of each of these pages, where they are merged.

        :param pages: adjacent pages that are all KSM pages now, at most `MAXIMUM_RUN_PAGES`
        :raises NoSuchProcess: it is gone
        :raises Denied: no ptrace access to it
        :raises CheckFailed: the call did something else than fail with EFAULT
        """
        length = pages * PAGE_SIZE
        if not 0 < length <= self._length:
            raise ValueError(f"{pages} pages are not between 1 and {MAXIMUM_RUN_PAGES}")
        what = f"un-merging {pages} pages of process {pid} at {start:#x}"
        try:
            written = syscalls.process_vm_writev(pid, self._buffer, start, length)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return
            if error.errno == errno.ESRCH:
                raise NoSuchProcess(what, "it is gone", errno=error.errno) from error
            if error.errno in (errno.EPERM, errno.EACCES):
                raise Denied(
                    what,
                    f"no access to its memory, by Yama or for lack of CAP_SYS_PTRACE: {errno_text(error.errno)}",
                    hint="needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3",
                    path="process_vm_writev",
                    errno=error.errno,
                ) from error
            raise Rejected(what, errno_text(error.errno or 0), path="process_vm_writev", errno=error.errno) from error
        # Nothing in the kernel lets this happen: then none of the above is true here, and nothing more is tried.
        raise CheckFailed(what, f"the kernel read {written} bytes from a buffer that can't be read")

    def close(self) -> None:
        if self._buffer:
            syscalls.munmap(self._buffer, self._length)
            self._buffer = 0
