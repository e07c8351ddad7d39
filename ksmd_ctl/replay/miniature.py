# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated host of the n-th part of a recorded one, which counts and takes time as the whole one.

A batch scans the n-th part of ``pages_to_scan``; what is less than a page is left to the next batch. A page stands for
n pages in every counter, and in ksmd's CPU time. Knobs have the values of the whole host.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE, ZERO_CONTENT
from ksmd_ctl.engine.mm import Mm, Vma, write_fault
from ksmd_ctl.engine.profile import Profile
from ksmd_ctl.engine.scan import ksm_do_scan, ksmd_should_run
from ksmd_ctl.engine.state import UNSTABLE
from ksmd_ctl.engine.trees import remove_rmap_item_from_tree
from ksmd_ctl.host.fields import FIELDS, Source
from ksmd_ctl.host.knobs import KNOBS
from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.recording.schema import ZEROES
from ksmd_ctl.replay.pace import Pace
from ksmd_ctl.replay.progress import Progress

_CONTENT_BYTES: Final = 8
_STEP_PAGES: Final = 8
_SPREAD: Final = 0x9E3779B97F4A7C15
# No node is ever full: where pages are is recorded.
_NODE_PAGES: Final = 1 << 24
#: Counters of pages.
_PAGES: Final = frozenset(
    {field.name for field in FIELDS if field.source is Source.KSM and field.name != "full_scans"}
    | {"cow_ksm", "ksm_swpin_copy"}
)
_SINCE_BEGIN: Final = ("full_scans", "pages_scanned", "pages_skipped", "cow_ksm", "ksm_swpin_copy")
# What the kernel counts as saved.
_SAVED: Final = ("pages_sharing", "ksm_zero_pages")


def content_of(number: int) -> bytes:
    """Bytes that stand for a recorded content; as contents in memory, they lie in no order."""
    return ZERO_CONTENT if number == ZEROES else (number * _SPREAD & (1 << 64) - 1).to_bytes(_CONTENT_BYTES, "big")


class MiniatureMachine(Machine):
    """The machine.

    :ivar share: the n: for how many pages one stands
    :ivar weights: for how many pages one of an address space stands
    :ivar progress: what ksmd had done when, where the replay is to do the same
    :ivar rewritten: pages that are written all the time: the nodes of their pages by address, by mapping
    :param pace: how fast ksmd was
    """

    def __init__(self, nodes: int, profile: Profile, one_in: int, pace: Pace) -> None:
        super().__init__(nodes, profile, node_pages=_NODE_PAGES, content_bytes=_CONTENT_BYTES)
        self.share = float(one_in)
        self.progress: Progress | None = None
        self.weights: dict[Mm, float] = {}
        self.rewritten: dict[Vma, dict[int, int]] = {}
        self._written = 0
        self._whole = one_in == 1
        self._pace = pace
        # Pages of the whole host that were to be scanned, and are less than one here.
        self._owed = 0.0
        self._first_scan = 0

    def batch(self, pages: int) -> int:
        ksm = self.ksm
        self._owed += pages
        wanted = int(self._owed / self.share)
        scanned = self._scan(wanted)
        # A batch ends with the full scan that it is in.
        self._owed = self._owed - wanted * self.share if scanned == wanted else 0
        if scanned < wanted:
            pages = min(pages, round(scanned * self.share))
        spent = round(pages * self._pace.at(ksm.now_ns / 1e9).cost_ns)
        ksm.cpu_ns += spent
        ksm.now_ns += spent
        return scanned

    def _scan(self, pages: int) -> int:
        scans = self.ksm.scan.seqnr
        scanned = ksm_do_scan(self.ksm, pages)
        if self.ksm.scan.seqnr != scans:
            for vma, nodes in self.rewritten.items():
                for address, node in nodes.items():
                    self._write_another(vma, address, node)
        return scanned

    def keep_writing(self, vma: Vma, address: int, node: int) -> None:
        """Have a page that each full scan finds with another content, which no other page has."""
        self.rewritten.setdefault(vma, {})[address] = node
        self._write_another(vma, address, node)

    def _write_another(self, vma: Vma, address: int, node: int) -> None:
        self._written -= 1
        write_fault(self.ksm, vma, address, content_of(self._written), node)

    def run_until(self, time_ns: int, most_pages: int = 1 << 62) -> int:
        """As ksm_scan_thread, with the delays of the recorded host, or as far as ksmd had come on it."""
        if self.progress is not None:
            return self._follow(self.progress, time_ns)
        ksm, scanned = self.ksm, 0
        while ksm.now_ns < time_ns and scanned < most_pages:
            if not ksmd_should_run(ksm) or ksm.wakes_ns >= time_ns:
                ksm.now_ns = time_ns
                break
            ksm.now_ns = max(ksm.now_ns, ksm.wakes_ns)
            scanned += self.batch(ksm.pages_to_scan)
            delay = self._pace.at(ksm.now_ns / 1e9).delay_ns
            ksm.wakes_ns = ksm.now_ns + max(ksm.sleep_millisecs * 1_000_000, 50_000) + round(delay)
        return scanned

    def _follow(self, progress: Progress, time_ns: int) -> int:
        """Do what ksmd had done by a time.

        The sample has about its part of the pages of each full scan. So a full scan may end too early here, and then
        the next one waits; or too late, and then it is brought to its end.
        """
        ksm, scanned, seconds = self.ksm, 0, time_ns / 1e9
        sample = progress.interval(seconds)
        self._owed += progress.pages_at(seconds) - progress.pages_at(ksm.now_ns / 1e9)
        ksm.cpu_ns = round(progress.cpu_at(seconds) * 1e9)
        ksm.now_ns = max(ksm.now_ns, time_ns)
        while ksmd_should_run(ksm):
            slot = ksm.scan.mm_slot
            if slot is ksm.mm_head:
                if self.scans > progress.scans[sample]:
                    self._owed = 0.0
                    break
                slot = slot.next
            share = self.share if slot.mm is None else self.weights.get(slot.mm, self.share)
            if (wanted := int(self._owed / share)) <= 0:
                break
            # Pages of the next process may stand for more or fewer.
            done = self._scan(wanted if self._whole else min(wanted, _STEP_PAGES))
            scanned += done
            self._owed -= done * share
        if seconds >= progress.times[sample]:
            while ksmd_should_run(ksm) and self.scans < progress.scans[sample]:
                scanned += self._scan(1 << 40)
                self._owed = 0.0
        return scanned

    @property
    def scans(self) -> int:
        """Full scans since the beginning."""
        return self.ksm.scan.seqnr - self._first_scan

    def begin(self) -> None:
        """Have time begin now, with what was merged before."""
        self.ksm.now_ns = self.ksm.cpu_ns = self.ksm.wakes_ns = 0
        self._owed = 0.0
        self._first_scan = self.ksm.scan.seqnr

    def reach(self, mm: Mm) -> None:
        """Have ksmd come to an address space next: it has just done so on the recorded host.

        Which address space comes before it in the list is known by where the cursor is, and that only nearly. So where
        the cursor has just begun with another one, it goes back to its beginning.
        """
        ksm = self.ksm
        slot, under = mm.slot, ksm.scan.mm_slot
        if slot is None or slot is under or slot.rmap_list is not None:
            return
        slot.unlink()
        if under.mm is not None and not under.mm.exited and self._passed(under.mm) < 0.5:
            slot.insert_before(under)
            ksm.scan.mm_slot, ksm.scan.address, ksm.scan.rmap_list = slot, 0, slot
        else:
            place = under.next
            if place is ksm.mm_head and self._ends_scan():
                # It is the first of the next full scan. None is the last: it is put before the one under the cursor.
                place = place.next
            # What has ended ksmd reaps next.
            while place.mm is not None and place.mm.exited:
                place = place.next
            slot.insert_before(place)

    def _ends_scan(self) -> bool:
        """Whether a full scan ended on the recorded host between the samples around now."""
        if (progress := self.progress) is None:
            return False
        sample = progress.interval(self.ksm.now_ns / 1e9)
        return progress.scans[sample] > progress.scans[max(0, sample - 1)]

    def leave(self, mm: Mm, addresses: Collection[int]) -> None:
        """Have the unstable tree without pages that were written, and by that left the sample.

        On the recorded host they are still there. In the tree, a page that is gone ends every search that meets it.
        """
        rmap_item = None if mm.slot is None else mm.slot.rmap_list
        while rmap_item is not None:
            if rmap_item.address in addresses and rmap_item.state == UNSTABLE:
                remove_rmap_item_from_tree(self.ksm, rmap_item)
            rmap_item = rmap_item.rmap_list

    def _passed(self, mm: Mm) -> float:
        """What part of an address space the cursor has passed."""
        address = self.ksm.scan.address
        passed = sum(min(max(0, address - vma.start), vma.end - vma.start) for vma in mm.vmas)
        return passed / max(1, sum(vma.end - vma.start for vma in mm.vmas))


class MiniatureHost(EngineHost):
    """The host. What does not depend on KSM reads as it was recorded.

    :ivar recorded: the sample of the recording that is of this time, None before the first
    :ivar shared_share: for how many KSM pages one stands, and `sharing_share` one of those merged into others
    """

    machine: MiniatureMachine

    def __init__(self, machine: MiniatureMachine) -> None:
        super().__init__(machine)
        self.recorded: Sample | None = None
        self.shared_share = self.sharing_share = machine.share
        self._base: dict[str, int | float] = {}

    def begin(self) -> None:
        """Have time begin now: what counts up begins at 0."""
        self.machine.begin()
        self._base = {name: super(MiniatureHost, self).sample().number(name) or 0 for name in _SINCE_BEGIN}

    def sample(self, *, fresh: bool = False) -> Sample:
        found = super().sample(fresh=fresh)
        readings: dict[str, Reading] = dict(found.readings)
        for name, base in self._base.items():
            if (now := found.number(name)) is not None:
                readings[name] = now - base
        shares = {"pages_shared": self.shared_share, "pages_sharing": self.sharing_share}
        for name in _PAGES:
            if isinstance(count := readings.get(name), int):
                readings[name] = round(count * shares.get(name, self.machine.share))
        recorded = self.recorded
        if recorded is None:
            return Sample(found.time_seconds, readings, found.nodes)
        own = (Source.KSM, Source.KNOB)
        for field in FIELDS:
            if field.source not in own and field.name not in (*KNOBS, *_PAGES, "ksmd_cpu_seconds"):
                readings[field.name] = recorded.readings[field.name]
        more = sum(int(str(readings.get(name) or 0)) for name in _SAVED if isinstance(readings.get(name), int))
        more -= sum(int(recorded.number(name) or 0) for name in _SAVED)
        for name, change in (("mem_available_bytes", more * PAGE_SIZE), ("nr_anon_pages", -more)):
            if (was := recorded.number(name)) is not None:
                readings[name] = max(0, int(was) + change)
        return Sample(found.time_seconds, readings, recorded.nodes)
