# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this kernel walks empty address space when it un-merges, and how fast (findings F11).

run = 2 and MADV_UNMERGEABLE use one function (mm/ksm.c:break_ksm, called by unmerge_ksm_pages). Kernels up to 6.18 call
it for every page of a mapping, present or not; 7.2 walks page tables and skips what is not there. So a child un-merges
a mapping of its own in which one page is present, and one that consists of that page, and compares the times.
"""

from __future__ import annotations

import functools
import os
import signal
import struct
import time
from contextlib import suppress
from typing import Final, NoReturn

from ksmd_ctl.host.operation import readable
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

# 16 MiB: 0.24 ms a round where the kernel walks (59 ns a page on 6.18), some 10 ms where a processor is emulated.
_PAGES: Final = 4096
_ROUNDS: Final = 3
_DEADLINE_SECONDS: Final = 0.5
# The quickest of the rounds by the quickest with one page: 110 on 6.18, 25 to 50 on an emulated 6.12, which walk; 0.5
# to 1 on an emulated 7.2, which does not.
_WALKS: Final = 16.0
_SKIPS: Final = 4.0
_ROUND: Final = struct.Struct("<qq")


@functools.cache
def seconds_per_gib() -> float | None:
    """How long un-merging takes for a GiB of mergeable address space with nothing in it: 0.0 where it is skipped.

    It is measured once a process, in a child, within milliseconds; at the deadline the child is killed.

    :returns: None where it can't be told: this kernel has no KSM, or it was too busy for three rounds
    """
    return judged(measured(_DEADLINE_SECONDS))


def judged(rounds: list[tuple[int, int]]) -> float | None:
    """What `seconds_per_gib` makes of its rounds.

    :param rounds: the times for one page, and for one page in 16 MiB, in nanoseconds
    """
    if len(rounds) < _ROUNDS:
        return None
    # What delays a round makes it longer, never shorter.
    one, many = max(1, min(first for first, _ in rounds)), min(second for _, second in rounds)
    if many >= _WALKS * one:
        return (many - one) / 1e9 / _PAGES * ((1 << 30) / PAGE_SIZE)
    return 0.0 if many <= _SKIPS * one else None


def measured(deadline_seconds: float) -> list[tuple[int, int]]:
    """The rounds of a child, as `judged` takes them; fewer where it did not get so far."""
    ours, theirs = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _measure(theirs, parent)
    os.close(theirs)
    found = b""
    until = time.monotonic() + deadline_seconds
    try:
        while readable(ours, max(0.0, until - time.monotonic())):
            data = os.read(ours, _ROUND.size)
            if not data:
                break
            found += data
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(_ROUND.iter_unpack(found[: len(found) // _ROUND.size * _ROUND.size]))


def _measure(out: int, parent: int) -> NoReturn:
    try:
        from ksmd_ctl.kernel import syscalls

        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            one, many = _mapping(1), _mapping(_PAGES)
            for _ in range(_ROUNDS):
                os.write(out, _ROUND.pack(_timed(one, 1), _timed(many, _PAGES)))
    finally:
        # Also after an error: the parent is told by what is missing.
        os._exit(0)


def _mapping(pages: int) -> int:
    from ksmd_ctl.kernel import syscalls

    size = pages * PAGE_SIZE
    start = syscalls.mmap(
        0, size, syscalls.PROT_READ | syscalls.PROT_WRITE, syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
    )
    # A huge page would be all of it. A kernel without them refuses.
    with suppress(OSError):
        syscalls.madvise(start, size, syscalls.MADV_NOHUGEPAGE)
    # Contents that nobody has: it is not to be merged meanwhile.
    syscalls.store(start + size - PAGE_SIZE, os.urandom(64))
    return start


def _timed(start: int, pages: int) -> int:
    from ksmd_ctl.kernel import syscalls

    syscalls.madvise(start, pages * PAGE_SIZE, syscalls.MADV_MERGEABLE)
    begin = time.perf_counter_ns()
    syscalls.madvise(start, pages * PAGE_SIZE, syscalls.MADV_UNMERGEABLE)
    return time.perf_counter_ns() - begin
