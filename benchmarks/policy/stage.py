# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays a script with real processes under one contender, and measures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from benchmarks.policy.contenders import Contender, Place
from benchmarks.policy.figures import Arrival, Run, Sample, Step
from benchmarks.policy.held import Holder
from benchmarks.policy.host import Alone, Unfit, busy_seconds
from benchmarks.policy.oracle import Hold, HugePages, huge_pages, replay
from benchmarks.policy.pages import PAGE, ZERO
from benchmarks.policy.script import Event, Kind, Script
from benchmarks.policy.tenant import HEADER
from benchmarks.policy.thp import HUGE_PAGES, Memory, fault_fallbacks
from benchmarks.policy.traces import Trace
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES

__all__ = ["INTERVAL", "Library", "Watch", "play"]

INTERVAL = 0.25
#: What a contender has to come up before the script begins; its CPU time until then is not counted.
LEAD_SECONDS = 6.0
TENANT = Path(__file__).with_name("tenant.py")


class Library:
    """The contents of all traces in one file in memory, each once, and the traces as lists of numbers of them."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        """
        :param traces: each is filled up with zeroes to whole huge pages, as the memory of a guest has only such
        """
        self.pool = os.memfd_create("contents")
        #: The number of the content of zeroes.
        self.zero = 0
        self.traces: list[array[int]] = []
        numbers = {ZERO: self.zero}
        os.write(self.pool, ZERO)
        for trace in traces:
            own = []
            for at in range(0, len(trace.contents), PAGE):
                content = trace.contents[at : at + PAGE]
                if content not in numbers:
                    numbers[content] = len(numbers)
                    os.write(self.pool, content)
                own.append(numbers[content])
            missing = -len(trace.pages) % HUGE_PAGES
            self.traces.append(array("I", [*(own[number] for number in trace.pages), *missing * [self.zero]]))


class Tenant:
    """The process of one tenant, named so that ksmtuned takes it for a virtual machine."""

    def __init__(self, pool: int, host: Alone) -> None:
        python = os.path.realpath(sys.executable)
        command = [python, "-s", "-S", str(TENANT), str(pool), str(os.getpid()), host.memory, "-enable-kvm"]
        self.process = subprocess.Popen(
            host.tenants.inside(command, "qemu-system-trace"),
            # Under another name, Python does not find its library.
            env={"PATH": os.defpath, "PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[pool],
        )  # fmt: skip

    def tell(self, kind: bytes, *columns: array[int]) -> None:
        """Give a command, and wait until it is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(HEADER.pack(kind, len(columns[0])) + b"".join(map(bytes, columns)))
        self.process.stdin.flush()
        if self.process.stdout.readline() != b"done\n":
            raise RuntimeError("a tenant has ended by itself")

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Watch:
    """Takes the samples of one run."""

    def __init__(self, contender: Contender, host: Alone) -> None:
        self._contender, self._host = contender, host
        self.tenants: dict[int, Holder] = {}
        self.samples: list[Sample] = []

    def begin(self) -> None:
        """The script begins now."""
        self.origin = time.monotonic()
        self._before = self._host.ksm.cpu_seconds(), self._host.service.cpu_seconds()
        self._busy, self._not_huge = busy_seconds(), fault_fallbacks()

    @property
    def now(self) -> float:
        return time.monotonic() - self.origin

    def add(self, pid: int) -> None:
        """A tenant has come."""
        self.tenants[pid] = Holder(pid)

    def others(self) -> float:
        """CPU seconds that others than ksmd and the contender used until now."""
        last = self.samples[-1]
        return busy_seconds() - self._busy - last.ksmd - last.service

    def not_huge(self) -> int:
        """Huge pages that the host could not give until now."""
        return fault_fallbacks() - self._not_huge

    def take(self) -> None:
        """A sample.

        :raises Unfit: the knobs aren't as this contender sets them
        """
        ksm, (ksmd, service) = self._host.ksm, self._before
        pages = sum(tenant.pages() for tenant in self.tenants.values())
        frames = self._host.tenants.frames()
        self.samples.append(
            Sample(
                at=round(self.now, 3),
                # A KSM page is one frame, and a page of each process that maps it.
                saved=pages - frames,
                counted=ksm.read("pages_sharing") + ksm.read("ksm_zero_pages"),
                huge_pages=sum(len(tenant.huge_pages()) for tenant in self.tenants.values()),
                ksmd=round(ksm.cpu_seconds() - ksmd, 4),
                service=round(self._host.service.cpu_seconds() - service, 4),
                full_scans=ksm.read("full_scans"),
                run=ksm.read("run"),
                pages_to_scan=ksm.read("pages_to_scan"),
                sleep_millisecs=ksm.read("sleep_millisecs"),
                smart_scan=ksm.read("smart_scan"),
            )
        )
        if not self._contender.may_be(self.samples[-1]):
            raise Unfit(f"somebody else writes KSM's knobs: {self.samples[-1]}\nhint: find out who, and run it again")

    def huge_pages(self, contents: Mapping[tuple[int, int], Sequence[int]], zero: int) -> HugePages:
        """What is left of the tenants' huge pages; `contents` and `zero` as `oracle.huge_pages` takes them."""
        if self._host.memory is Memory.SMALL:
            return HugePages()
        end = {(pid, place) for pid, tenant in self.tenants.items() for place in tenant.huge_pages()}
        return huge_pages(contents, end, zero, HUGE_PAGES)


class _Play:
    """A script under way."""

    def __init__(self, script: Script, library: Library, host: Alone, watch: Watch) -> None:
        self.script, self.library, self.host, self.watch = script, library, host, watch
        self.tenants: dict[int, Tenant] = {}
        self.done: dict[int, float] = {}
        self.failed: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def begin(self, number: int) -> None:
        """Have an event happen; it takes up to a second, in which samples go on."""
        event = self.script.events[number]
        if event.kind is Kind.ARRIVE:
            self.tenants[event.tenant] = Tenant(self.library.pool, self.host)
            self.watch.add(self.tenants[event.tenant].process.pid)
        thread = threading.Thread(target=self._happen, args=(number, event), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _happen(self, number: int, event: Event) -> None:
        try:
            tenant = self.tenants[event.tenant]
            if event.kind is Kind.ARRIVE:
                assert event.trace is not None
                tenant.tell(b"F", self.library.traces[event.trace])
            elif event.kind is Kind.REWRITE:
                tenant.tell(b"W", array("I", event.places), array("I", event.contents))
            else:
                tenant.leave()
            self.done[number] = self.watch.now
        except BaseException as error:  # told by the main thread
            self.failed = error

    def end(self) -> None:
        """All tenants leave."""
        self.host.tenants.empty()
        for tenant in self.tenants.values():
            tenant.process.wait()
        for thread in self._threads:
            thread.join()

    def contents(self, hold: Hold) -> Mapping[tuple[int, int], Sequence[int]]:
        """What is in each huge page's place: its process, and its address divided by its size."""
        found = {}
        for tenant, pages in hold.tenants.items():
            pid = self.tenants[tenant].process.pid
            first = self.watch.tenants[pid].mergeable()[0].start // HUGE_BYTES
            for at in range(0, len(pages), HUGE_PAGES):
                found[pid, first + at // HUGE_PAGES] = pages[at : at + HUGE_PAGES]
        return found


def play(contender: Contender, script: Script, library: Library, place: Place) -> Run:
    """One run; afterwards nothing is merged, and nobody is there."""
    host = place.host
    watch = Watch(contender, host)
    run = _Play(script, library, host, watch)
    contender.start(place)
    try:
        time.sleep(LEAD_SECONDS)
        watch.begin()
        following = 0
        while (now := watch.now) < script.seconds:
            while following < len(script.events) and script.events[following].at <= now:
                run.begin(following)
                following += 1
            watch.take()
            if run.failed is not None:
                raise run.failed
            due = watch.origin + (now // INTERVAL + 1) * INTERVAL
            if following < len(script.events):
                due = min(due, watch.origin + script.events[following].at)
            time.sleep(max(0.0, due - time.monotonic()))
        others, not_huge = watch.others(), watch.not_huge()
        hold = Hold(library.traces, library.zero if host.zeroes_free else None)
        states = replay(script, hold)
        huge = watch.huge_pages(run.contents(hold), library.zero)
    finally:
        contender.stop(place)
        run.end()
        host.ksm.reset()
    # An event counts when all before it have happened, too.
    times = list(accumulate((run.done[number] for number in range(len(script.events))), max))
    steps = [Step(round(at, 3), *state) for at, state in zip(times, states, strict=True)]
    arrivals = [
        Arrival(event.tenant, round(at, 3), script.window_end(event))
        for event, at in zip(script.events, times, strict=True)
        if event.kind is Kind.ARRIVE
    ]
    return Run(contender.name, watch.samples, steps, arrivals, huge, round(others, 1), not_huge)
