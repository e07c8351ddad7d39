# SPDX-License-Identifier: GPL-2.0-or-later
"""Has calls made that a thread's seccomp filters refuse.

They are suspended for such a call. If this process is killed then, they are in force again at once. So where they would
end the thread for that call, the thread enters another one that they permit, and it is replaced once it is in the
kernel and before they are asked. From there until they are asked, which is two system calls of ours and the time that
the thread takes to run, being killed would have the filter end the thread. Against the latter, which is most of it,
this process takes its time to end: it lets the thread go first, and has page tables to free before the kernel lets go
of whom it traces (kernel/exit.c:do_exit).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Final

from ksmd_ctl.errors import Denied, Refused, Rejected
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.architecture import Call, architecture
from ksmd_ctl.kernel.ptrace import Tracee
from ksmd_ctl.kernel.seccomp import Action, action
from ksmd_ctl.kernel.threads import Thread
from ksmd_ctl.kernel.traceable import AT_START

# Address space of the zero page: its page tables are 8 MiB, and take about 20 ms to free.
_ADDRESSES_BYTES: Final = 4 << 30
_PERMITTED: Final = frozenset({Action.ALLOW, Action.LOG})
_SURVIVED: Final = _PERMITTED | {Action.ERRNO}


def permit(tracee: Tracee, thread: Thread, calls: Sequence[Call], pointer: int, what: str) -> Mapping[Call, Call]:
    """Find out what a thread's filters do with calls, and have them suspended where they refuse one.

    :param thread: one that seccomp filters
    :param pointer: where the calls are made
    :param what: what it is for, for errors
    :returns: for each call that would end the thread another one, which is to be entered first
    :raises Refused: they can't be suspended
    """
    harmless_ones = architecture().harmless
    try:
        verdicts = _verdicts(tracee, thread, (*calls, *harmless_ones), pointer)
        if all(verdicts[call] in _PERMITTED for call in calls):
            return {}
        tracee.suspend_seccomp()
    except (Denied, Rejected) as error:
        why = f"seccomp filters it and may refuse the call or end it, and can't be suspended: {error.why}"
        raise Refused(what, why, hint=error.hint or AT_START) from error
    harmless = next((call for call in harmless_ones if verdicts[call] in _SURVIVED), None)
    return {call: harmless for call in calls if verdicts[call] not in _SURVIVED and harmless}


def permits(tracee: Tracee, thread: Thread, number: int, pointer: int) -> bool:
    """Whether a thread's filters let a call pass, whatever its arguments; as far as they may be read."""
    if not thread.seccomp:
        return True
    try:
        return _verdicts(tracee, thread, [(number,)], pointer)[number,] in _PERMITTED
    except (Denied, Rejected):
        return False


def _verdicts(tracee: Tracee, thread: Thread, calls: Iterable[Call], pointer: int) -> dict[Call, Action]:
    # Mode 1 (strict) has no filter: read, write, _exit and rt_sigreturn, all else ends the thread.
    filters, strict = tracee.filters() if thread.seccomp == 2 else (), thread.seccomp == 1
    return {call: action(filters, call, pointer, strict=strict, architecture=architecture()) for call in calls}


@cache
def end_slowly() -> None:
    """Have this process take its time when it is killed."""
    # Before 5.14 there is no such advice.
    with suppress(OSError):
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
        address = syscalls.mmap(0, _ADDRESSES_BYTES, syscalls.PROT_READ, flags)
        syscalls.madvise(address, _ADDRESSES_BYTES, syscalls.MADV_NOHUGEPAGE)
        syscalls.madvise(address, _ADDRESSES_BYTES, syscalls.MADV_POPULATE_READ)
