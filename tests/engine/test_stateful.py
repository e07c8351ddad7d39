# SPDX-License-Identifier: GPL-2.0-or-later
"""Random histories on every profile: the validators after each step, the oracle at rest."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import HUGE_PAGES, PAGE_SIZE
from ksmd_ctl.engine.profile import PROFILES, Profile
from tests.engine.oracle import unexplained
from tests.engine.scenario_runner import content
from tests.engine.validate import validate

LABELS = st.sampled_from(["0", "a", "b", "c", "m", "x"])
INDEX = st.integers(0, 7)
FEW = st.integers(1, 4)


@contextmanager
def refused(number: int) -> Iterator[None]:
    """It may be refused, but for no other reason."""
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise


class History(RuleBasedStateMachine):
    """Processes with regions of eight pages on a small machine."""

    profile: Profile

    @initialize(nodes=st.integers(1, 4), across=st.booleans(), smart=st.booleans())
    def start(self, nodes: int, across: bool, smart: bool) -> None:
        self.machine = Machine(nodes, self.profile)
        self.nodes = nodes
        self.regions: list[tuple[int, int]] = []
        self.huge: list[tuple[int, int]] = []
        if not across:
            self.machine.store("merge_across_nodes", 0)
        if self.profile.smart_scan:
            self.machine.store("smart_scan", int(smart))

    def region(self, index: int) -> tuple[int, int]:
        return self.regions[index % len(self.regions)]

    def online(self, node: int) -> int:
        online = [each.nid for each in self.machine.memory.nodes if each.online]
        return online[node % len(online)]

    have_regions = precondition(lambda self: bool(self.regions))

    @precondition(lambda self: len(self.machine.processes) < 5)
    @rule(node=INDEX, bound=st.booleans(), labels=st.lists(LABELS, min_size=8, max_size=8))
    def spawn(self, node: int, bound: bool, labels: list[str]) -> None:
        nid = self.online(node)
        pid = self.machine.spawn(f"p{len(self.regions)}", nid)
        start = self.machine.mmap(pid, 8, nid if bound else None)
        self.machine.madvise(pid, start, 8, mergeable=True)
        self.regions.append((pid, start))
        for page, label in enumerate(labels):
            self.machine.write(pid, start + page * PAGE_SIZE, content(label))

    @precondition(lambda self: self.profile.collapse and len(self.machine.processes) < 5 and not self.huge)
    @rule(node=INDEX, labels=st.lists(LABELS, min_size=1, max_size=4))
    def spawn_huge(self, node: int, labels: list[str]) -> None:
        nid = self.online(node)
        pid = self.machine.spawn("huge", nid)
        start = self.machine.mmap(pid, HUGE_PAGES, nid)
        self.machine.madvise(pid, start, HUGE_PAGES, mergeable=True)
        self.regions.append((pid, start))
        self.huge.append((pid, start))
        for page, label in enumerate(labels):
            self.machine.write(pid, start + page * PAGE_SIZE, content(label))

    @precondition(lambda self: self.huge and self.huge[0] in self.regions)
    @rule()
    def collapse(self) -> None:
        self.machine.collapse(*self.huge[0], HUGE_PAGES)

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW, label=LABELS)
    def write(self, index: int, page: int, count: int, label: str) -> None:
        pid, start = self.region(index)
        for each in range(page, min(8, page + count)):
            with suppress(OSError):
                self.machine.write(pid, start + each * PAGE_SIZE, content(label))

    @have_regions
    @rule(index=INDEX, page=INDEX)
    def read(self, index: int, page: int) -> None:
        pid, start = self.region(index)
        with suppress(OSError):
            self.machine.read(pid, start + page * PAGE_SIZE)

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW, unmap=st.booleans())
    def take_away(self, index: int, page: int, count: int, unmap: bool) -> None:
        pid, start = self.region(index)
        address, count = start + page * PAGE_SIZE, min(count, 8 - page)
        if unmap and count < 3:
            self.machine.munmap(pid, address, count)
        else:
            with suppress(OSError):
                self.machine.discard(pid, address, count)

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW, mergeable=st.booleans())
    def advise(self, index: int, page: int, count: int, mergeable: bool) -> None:
        pid, start = self.region(index)
        with suppress(OSError):
            self.machine.madvise(pid, start + page * PAGE_SIZE, min(count, 8 - page), mergeable=mergeable)

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW, writable=st.booleans())
    def protect(self, index: int, page: int, count: int, writable: bool) -> None:
        pid, start = self.region(index)
        with suppress(OSError):
            self.machine.mprotect(pid, start + page * PAGE_SIZE, min(count, 8 - page), writable=writable)

    @precondition(lambda self: self.regions and len(self.machine.processes) < 5)
    @rule(index=INDEX)
    def fork(self, index: int) -> None:
        pid, _ = self.region(index)
        child = self.machine.fork(pid, f"q{len(self.regions)}")
        self.regions += [(child, start) for owner, start in self.regions if owner == pid]

    @have_regions
    @rule(index=INDEX)
    def exit(self, index: int) -> None:
        pid, _ = self.region(index)
        self.machine.exit(pid)
        self.regions = [region for region in self.regions if region[0] != pid]

    @have_regions
    @rule(index=INDEX)
    def exec(self, index: int) -> None:
        pid, _ = self.region(index)
        self.machine.exec(pid)
        self.regions = [region for region in self.regions if region[0] != pid]
        start = self.machine.mmap(pid, 8)
        self.regions.append((pid, start))

    @have_regions
    @rule(index=INDEX)
    def mremap(self, index: int) -> None:
        at = index % len(self.regions)
        pid, start = self.regions[at]
        self.regions[at] = (pid, self.machine.mremap(pid, start, 8))

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW, node=INDEX, everything=st.booleans())
    def migrate(self, index: int, page: int, count: int, node: int, everything: bool) -> None:
        pid, start = self.region(index)
        addresses = [start + each * PAGE_SIZE for each in range(page, min(8, page + count))]
        self.machine.move_pages(pid, addresses, self.online(node), move_all=everything)

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW, node=INDEX)
    def break_sharing(self, index: int, page: int, count: int, node: int) -> None:
        pid, start = self.region(index)
        self.machine.break_sharing(pid, start + page * PAGE_SIZE, min(count, 8 - page), self.online(node))

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW)
    def swap_out(self, index: int, page: int, count: int) -> None:
        pid, start = self.region(index)
        self.machine.swap_out(pid, start + page * PAGE_SIZE, min(count, 8 - page))

    @have_regions
    @rule(index=INDEX, page=INDEX, count=FEW)
    def pageout(self, index: int, page: int, count: int) -> None:
        pid, start = self.region(index)
        self.machine.pageout(pid, start + page * PAGE_SIZE, min(count, 8 - page))

    @have_regions
    @rule(index=INDEX, page=INDEX, locked=st.booleans())
    def hold(self, index: int, page: int, locked: bool) -> None:
        pid, start = self.region(index)
        found = self.machine.mm(pid).page(start + page * PAGE_SIZE)
        if found is not None:
            (self.machine.memory.locked if locked else self.machine.memory.pinned).add(found)

    @rule()
    def let_go(self) -> None:
        self.machine.memory.locked.clear()
        self.machine.memory.pinned.clear()

    @rule(count=st.integers(1, 3))
    def scan(self, count: int) -> None:
        self.machine.scan(count)

    @rule(pages=st.integers(0, 20))
    def batch(self, pages: int) -> None:
        self.machine.batch(pages)

    @rule(run=st.integers(0, 2))
    def run(self, run: int) -> None:
        self.machine.store("run", run)

    @rule(value=st.integers(0, 1))
    def merge_across_nodes(self, value: int) -> None:
        with refused(errno.EBUSY):
            self.machine.store("merge_across_nodes", value)

    @rule(knob=st.sampled_from(["use_zero_pages", "smart_scan"]), value=st.booleans())
    def switch(self, knob: str, value: bool) -> None:
        if knob in self.profile.knobs:
            self.machine.store(knob, int(value))

    @rule(value=st.integers(2, 5))
    def max_page_sharing(self, value: int) -> None:
        if self.profile.chains:
            with refused(errno.EBUSY):
                self.machine.store("max_page_sharing", value)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.machine.run_until(self.machine.ksm.now_ns + seconds * 1_000_000_000, 500)

    @rule(node=INDEX, succeeds=st.booleans())
    def offline(self, node: int, succeeds: bool) -> None:
        nid = self.online(node)
        with refused(errno.EBUSY):
            self.machine.going_offline(nid)
            if succeeds:
                self.machine.offline(nid)
            else:
                self.machine.cancel_offline()

    @rule()
    def all_online(self) -> None:
        for node in self.machine.memory.nodes:
            self.machine.online(node.nid)

    @invariant()
    def valid(self) -> None:
        if hasattr(self, "machine"):
            validate(self.machine)

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        self.let_go()
        if self.profile.smart_scan:
            self.machine.store("smart_scan", 0)
        self.machine.store("run", 1 if self.machine.ksm.run == 2 else self.machine.ksm.run)
        self.machine.scan(8)
        validate(self.machine)
        assert unexplained(self.machine) == []


@pytest.mark.parametrize("name", PROFILES)
def test_any_history_keeps_what_must_hold(name: str) -> None:
    machine = type(f"History_{name}", (History,), {"profile": PROFILES[name]})
    run_state_machine_as_test(machine, settings=settings(max_examples=80, stateful_step_count=50))
