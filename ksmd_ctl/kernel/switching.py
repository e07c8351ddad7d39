# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes memory of a process that runs mergeable, or not mergeable any more, from outside.

The kernel takes both from the process itself only, so one of its threads makes the calls
(`ksmd_ctl.kernel.injection`): prctl(PR_SET_MEMORY_MERGE) for all memory, now and from now on (since 6.4), madvise(2)
for each mapping where the kernel lacks that, or only some addresses are meant.

To take memory out, the kernel un-merges it within the call, without asking whether there is room, and holds the
process's mmap_lock meanwhile (mm/ksm.c:ksm_disable_merge_any, ksm_madvise): its page faults wait. It looks at every
page of the mapping, merged or not. So pages are un-merged before, in batches and with headroom
(`ksmd_ctl.kernel.unshare`), then madvise(MADV_UNMERGEABLE) takes out one part of the memory after the other, and the
thread goes on between them; prctl comes last, and finds nothing to do.

smaps tells what came of it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Denied, NoSuchProcess, Refused, Rejected, Unmapped, errno_text
from ksmd_ctl.figures import plural
from ksmd_ctl.host.memory import Range
from ksmd_ctl.host.operation import Progress, Unshare, UnsharePart
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.kernel.architecture import Call, architecture
from ksmd_ctl.kernel.detection import PageReader, reader_or_none
from ksmd_ctl.kernel.headroom import STOPPED
from ksmd_ctl.kernel.injection import inject
from ksmd_ctl.kernel.proc_pid import NO_MEMORY, Held, read_stat
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import holds_pages, mappings
from ksmd_ctl.kernel.syscalls import MADV_MERGEABLE, MADV_UNMERGEABLE, PR_SET_MEMORY_MERGE
from ksmd_ctl.kernel.threads import threads
from ksmd_ctl.kernel.traceable import AT_START, need_traceable
from ksmd_ctl.kernel.unshare import AGAIN, ELSEWHERE, GONE, NOT_WRITABLE, STILL, UNDECIDED, WATCHED, unshare

_PRCTL_TEXT: Final = "prctl(PR_SET_MEMORY_MERGE)"
# What one call takes out. The kernel looks at a page in about 55 ns (findings F11), but takes 4 to 8 us for one that
# ksmd has merged again since it was un-merged: 4 ms at most. A signal that comes meanwhile has it begin again.
_CALL_BYTES: Final = 2 << 20
# What is un-merged before it is taken out, while ksmd may merge it again. Each time all of smaps is read.
_GROUP_BYTES, _GROUPS = 1 << 30, 16
_PASSES: Final = 3
_PAUSE_SECONDS: Final = 0.001
# Why a mapping does not merge, by its VmFlags (mm/ksm.c:vma_ksm_compatible).
_NEVER: Final = frozenset({"sh", "ms", "io", "pf", "de", "mm", "ht", "dp"})
# What the call un-merges by itself. Any other cause is that there is no room.
_BY_THE_CALL: Final = frozenset({AGAIN, ELSEWHERE, GONE, NOT_WRITABLE, STILL, UNDECIDED, WATCHED})
#: What is left where the kernel has no prctl for it.
LATER: Final = "memory that it maps from now on: this kernel has no prctl(PR_SET_MEMORY_MERGE)"

Part = tuple[int, int]


def switch(
    request: Switch,
    *,
    root: Path = Path("/"),
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
) -> SwitchResult:
    """Make memory of a process mergeable, or take it out. For a process of its own with one thread, that ends soon.

    :raises Absent: it can't be done on this machine
    :raises NoSuchProcess, Denied, ReadError: the process is gone, has no memory, or is not ours to look at or trace
    :raises Refused: it is in no state for that, has no memory that could merge, or there is no room to un-merge
    :raises Rejected, TimedOut: the kernel or the process did not do it
    """
    with Held(request.process, root):
        return _Job(request, root, progress, stop, sleep).run()


def state(request: Switch, root: Path = Path("/")) -> tuple[str, bool | None]:
    """The name of a process that could be switched, and what it is now; nothing is attached to it.

    :raises KsmdError: as `switch`, as far as that can be told
    """
    with Held(request.process, root):
        job = _Job(request, root)
        return job.name, _is_on(job.looked_at())


def unmerge(
    request: Switch,
    *,
    root: Path = Path("/"),
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Un-merge pages of a process that is about to be switched off otherwise; how many were.

    :raises NoSuchProcess, Denied, ReadError: the process is gone, or is not ours to look at
    :raises Refused: there is no room for all
    """
    with Held(request.process, root), reader_or_none(root) as reader:
        job = _Job(request, root, progress, stop, sleep)
        ranges = [item for item in job.ranges() if item.mergeable and holds_pages(item)]
        job.unmerge(reader, ranges, job.parts(ranges))
        return job.unmerged_pages


def _mergeable_kind(item: Range) -> bool:
    """Whether a mapping could be merged: private memory that is no device's, and not of files that nobody changed."""
    return not item.flags & _NEVER and ("wr" in item.flags or holds_pages(item))


def _is_on(ranges: Iterable[Range]) -> bool | None:
    """Whether mappings are mergeable: all of those with pages, none, or some (None)."""
    found = {item.mergeable for item in ranges if holds_pages(item)} or {item.mergeable for item in ranges}
    return found.pop() if len(found) == 1 else None


class _Job:
    def __init__(
        self,
        request: Switch,
        root: Path,
        progress: Callable[[Progress], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.request = request
        self.pid = request.process.pid
        self.root = root
        self.progress = progress
        self.stop = stop
        self.sleep = sleep
        self.name = read_stat(self.pid, root)[0]
        self.what = f"switching KSM {'on' if request.on else 'off'} for process {self.pid}"
        self.stopped_seconds = 0.0
        self.advised: set[Part] = set()
        self.by_prctl = False
        self.left: list[str] = []
        self.unmerged_pages = 0

    def looked_at(self) -> list[Range]:
        """What is meant of its memory; it is left as it is until all that can be told before is as it has to be."""
        need_traceable(self.pid, self.what, self.root)
        try:
            found = self.ranges()
            if not (found or mappings(self.pid, self.root)):
                raise NoSuchProcess(f"process {self.pid}", NO_MEMORY)
        except NoSuchProcess as error:
            if error.why == NO_MEMORY:
                self.need_memory()
            raise
        if not found:
            where = "there" if self.request.ranges else "of it"
            why = f"nothing {where} can be merged: it has no private memory, or only what KSM never merges"
            raise Refused(self.what, why, hint=f"/proc/{self.pid}/smaps says what it has")
        return found

    def need_memory(self) -> None:
        """
        :raises Refused: it lives and has none that could be seen
        """
        states = {thread.tid: thread.state for thread in threads(self.pid, self.root)}
        # Any of them may end meanwhile.
        if states.pop(self.pid, "X") not in "ZX":
            raise Refused(self.what, "it has no memory: it is a kernel thread", hint="name another process")
        if any(state not in "ZX" for state in states.values()):
            # What /proc/PID says of memory is what its main thread has.
            why = "its main thread has ended, and the kernel no longer shows its memory"
            raise Refused(self.what, why, hint=AT_START)

    def run(self) -> SwitchResult:
        was_on = _is_on(self.looked_at())
        turn = self.switch_on if self.request.on else self.switch_off
        if not self.is_so_already():
            turn()
        after = self.ranges()
        counts = read_counts(self.pid, self.root)
        done = _is_on(after)
        if not self.request.ranges and not self.request.on and counts.merge_any:
            # What it maps from now on would be mergeable.
            done = None
        if done is not self.request.on and not self.left:
            wrong = _pages((item.start, item.end) for item in after if item.mergeable != self.request.on)
            what = f"{plural(wrong, 'page')} of address space: mapped or advised meanwhile"
            self.left.append(
                what if wrong else "memory that it maps from now on: it executed another program meanwhile"
            )
        how = [f"madvise of {plural(_apart(self.advised), 'mapping')}"] if self.advised else []
        return SwitchResult(
            process=self.request.process,
            on=self.request.on,
            method=Method.INJECT,
            how=", ".join([*how, _PRCTL_TEXT] if self.by_prctl else how)
            or ("nothing was switched" if self.left else "nothing was to be done"),
            before=was_on,
            after=done,
            mergeable_bytes=sum(item.end - item.start for item in after if item.mergeable),
            merging_pages=counts.merging_pages or 0,
            stopped_seconds=self.stopped_seconds,
            left=tuple(dict.fromkeys(self.left)),
            unmerged_pages=self.unmerged_pages,
            name=self.name,
        )

    def is_so_already(self) -> bool:
        """Whether no call is needed: all that is meant is as asked for, and what it maps from now on, too."""
        on = self.request.on
        if any(item.mergeable != on for item in self.ranges()):
            return False
        return bool(self.request.ranges) or read_counts(self.pid, self.root).merge_any is on

    def ranges(self) -> list[Range]:
        """The mappings that are meant and could merge."""
        meant = self.request.ranges
        return [
            item
            for item in mappings(self.pid, self.root)
            if (item.mergeable or _mergeable_kind(item))
            and (not meant or any(start < item.end and item.start < end for start, end in meant))
        ]

    def parts(self, ranges: Iterable[Range]) -> list[Part]:
        """What is meant of mappings."""
        meant = self.request.ranges or ((0, 1 << 64),)
        return [
            (max(start, item.start), min(end, item.end))
            for item in ranges
            for start, end in meant
            if start < item.end and item.start < end
        ]

    # -- on and off ------------------------------------------------------------------------------------------

    def switch_on(self) -> None:
        lacking = not self.request.ranges and not self.prctl(on=True)
        # Where prctl was on already it changes nothing, also not what madvise took out since.
        for _ in range(_PASSES):
            # Without prctl, what is mapped meanwhile has to be found.
            missing = [item for item in self.ranges() if not item.mergeable]
            if not missing or self.left:
                break
            self.madvise(self.parts(missing), MADV_MERGEABLE)
        if lacking:
            self.left.append(LATER)

    def switch_off(self) -> None:
        # Advice about nothing: where no call can be made, nothing is to be un-merged for it either.
        self.calls([(architecture().madvise, 0, 0, MADV_UNMERGEABLE)])
        for number in range(_PASSES):
            on = [item for item in self.ranges() if item.mergeable]
            if number == 0:
                # What holds no pages costs prctl nothing.
                on = [item for item in on if holds_pages(item)]
            elif not on:
                break
            # What is mapped meanwhile is found by the next pass, and is little.
            parts = self.parts(on)
            done, total = 0, _pages(parts)
            with reader_or_none(self.root) as reader:
                for group in _groups(parts):
                    if why := STOPPED if self.stop() else self.unmerge(reader, on, group):
                        self.left.append(f"{plural(total - done, 'page')} of address space: {why}")
                        return
                    try:
                        self.madvise(_pieces(group) if not number else group, MADV_UNMERGEABLE)
                    except (Denied, Refused, Rejected) as error:
                        # It could be called a moment ago: since then a debugger has come, for example.
                        if not (self.unmerged_pages or self.advised):
                            raise
                        self.left.append(f"{plural(total - done, 'page')} of address space: {error.why}")
                        return
                    done += _pages(group)
                    self.progress(Progress(done, total, "pages"))
            if number == 0 and not self.request.ranges and read_counts(self.pid, self.root).merge_any is not False:
                self.prctl(on=False)

    def unmerge(self, reader: PageReader | None, ranges: Iterable[Range], parts: Sequence[Part]) -> str:
        """Un-merge pages from outside, each onto its home; why the rest must stay, empty where nothing must.

        :param ranges: mappings that parts are of
        :raises Refused: there is no room, and nothing was switched yet
        """
        if reader is None or all(item.ksm_pages == 0 for item in ranges):
            return ""
        request = self.request
        limits = (request.latency_seconds, request.floor_bytes, request.headroom_share, request.max_pressure)
        asked = Unshare((UnsharePart(request.process, tuple(parts)),), *limits)
        try:
            found = unshare(asked, reader=reader, root=self.root, stop=self.stop, sleep=self.sleep)
        except Unmapped:
            return ""
        self.unmerged_pages += found.unshared
        why = "; ".join(cause for cause in found.left if cause not in _BY_THE_CALL) or found.stopped
        if why and not self.advised and not self.stop():
            hint = "what was un-merged merges again; free memory there, then try again"
            raise Refused(self.what, f"pages of it can't be un-merged: {why}", hint=hint)
        return why

    # -- calls -----------------------------------------------------------------------------------------------

    def prctl(self, *, on: bool) -> bool:
        """Whether this kernel has the call.

        :raises Rejected: it has, and refused
        """
        result = self.calls([(architecture().prctl, PR_SET_MEMORY_MERGE, int(on), 0, 0, 0)])[0]
        # Before 6.4; a build without CONFIG_KSM is no host of ours.
        if result == -errno.EINVAL:
            return False
        if result:
            why = f"{_PRCTL_TEXT}: {errno_text(-result)}"
            raise Rejected(self.what, why, path=_PRCTL_TEXT, value=int(on), errno=-result)
        self.by_prctl = True
        return True

    def madvise(self, parts: Sequence[Part], advice: int) -> None:
        number = architecture().madvise
        results = self.calls([(number, start, end - start, advice) for start, end in parts])
        for (start, end), result in zip(parts, results, strict=True):
            # ENOMEM: some of it is not mapped any more, the rest is done; or it has too many mappings, which the
            # next pass tells.
            if result and result != -errno.ENOMEM:
                self.left.append(f"{start:x}-{end:x}: madvise: {errno_text(-result)}")
            elif not result:
                self.advised.add((start, end))

    def calls(self, calls: Sequence[Call]) -> list[int]:
        """Have calls made; the process goes on after some milliseconds of them."""
        results: list[int] = []
        while len(results) < len(calls):
            if results:
                self.sleep(_PAUSE_SECONDS)
            came = inject(self.request.process, calls[len(results) :], root=self.root)
            results += came.results
            self.stopped_seconds = max(self.stopped_seconds, came.stopped_seconds)
        return results


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts in groups of about a sixteenth of the whole, 1 GiB at least; large ones are cut."""
    most = max(_GROUP_BYTES, -(-sum(end - start for start, end in parts) // _GROUPS // PAGE_SIZE) * PAGE_SIZE)
    group: list[Part] = []
    room = most
    for start, end in parts:
        at = start
        while at < end:
            upto = min(end, at + room)
            group.append((at, upto))
            room -= upto - at
            at = upto
            if not room:
                yield group
                group, room = [], most
    if group:
        yield group


def _pages(parts: Iterable[Part]) -> int:
    return sum(end - start for start, end in parts) // PAGE_SIZE


def _apart(parts: Iterable[Part]) -> int:
    """How many there are, where those that follow one another are one."""
    starts, ends = zip(*parts, strict=True)
    return len(set(starts) - set(ends))


def _pieces(parts: Iterable[Part]) -> list[Part]:
    return [(at, min(end, at + _CALL_BYTES)) for start, end in parts for at in range(start, end, _CALL_BYTES)]
