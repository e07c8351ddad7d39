# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays a script with real processes under one contender, and measures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from benchmarks.policy.cgroups import Group
from benchmarks.policy.contenders import Contender, Place
from benchmarks.policy.figures import Arrival, Run, Sample, Step
from benchmarks.policy.host import Unfit, busy_seconds
from benchmarks.policy.oracle import replay
from benchmarks.policy.pages import PAGE, anonymous_pages
from benchmarks.policy.script import Event, Kind, Script
from benchmarks.policy.tenant import HEADER
from benchmarks.policy.traces import Trace

__all__ = ["INTERVAL", "Library", "Watch", "play"]

INTERVAL = 0.25
#: What a contender has to come up before the script begins; its CPU time until then is not counted.
LEAD_SECONDS = 6.0
TENANT = Path(__file__).with_name("tenant.py")


class Library:
    """The contents of all traces in one file in memory, each once, and the traces as lists of numbers of them."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self.pool = os.memfd_create("contents")
        self.traces: list[array[int]] = []
        numbers: dict[bytes, int] = {}
        for trace in traces:
            own = []
            for at in range(0, len(trace.contents), PAGE):
                content = trace.contents[at : at + PAGE]
                if content not in numbers:
                    numbers[content] = len(numbers)
                    os.write(self.pool, content)
                own.append(numbers[content])
            self.traces.append(array("I", (own[number] for number in trace.pages)))


class Tenant:
    """The process of one tenant, named so that ksmtuned takes it for a virtual machine."""

    def __init__(self, pool: int, group: Group) -> None:
        python = os.path.realpath(sys.executable)
        command = [python, "-s", "-S", str(TENANT), str(pool), str(os.getpid()), "-enable-kvm"]
        self.process = subprocess.Popen(
            group.inside(command, "qemu-system-trace"),
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

    def __init__(self, contender: Contender, place: Place, tenants: Group) -> None:
        self._contender, self._ksm, self._tenants, self._service = contender, place.ksm, tenants, place.group
        self.samples: list[Sample] = []

    def begin(self) -> None:
        """The script begins now."""
        self.origin = time.monotonic()
        self._before = self._ksm.cpu_seconds(), self._service.cpu_seconds()
        self._busy = busy_seconds()

    @property
    def now(self) -> float:
        return time.monotonic() - self.origin

    def others(self) -> float:
        """CPU seconds that others than ksmd and the contender used until now."""
        last = self.samples[-1]
        return busy_seconds() - self._busy - last.ksmd - last.service

    def take(self, pages: int) -> None:
        """A sample; `pages` are what the tenants hold.

        :raises Unfit: the knobs aren't as this contender sets them
        """
        read = self._ksm.read
        zero = read("ksm_zero_pages")
        self.samples.append(
            Sample(
                at=round(self.now, 3),
                # A KSM page is one frame, and a page of each process that maps it. A zero page is nobody's.
                saved=pages + zero - self._tenants.frames(),
                counted=read("pages_sharing") + zero,
                ksmd=round(self._ksm.cpu_seconds() - self._before[0], 4),
                service=round(self._service.cpu_seconds() - self._before[1], 4),
                full_scans=read("full_scans"),
                run=read("run"),
                pages_to_scan=read("pages_to_scan"),
                sleep_millisecs=read("sleep_millisecs"),
                smart_scan=read("smart_scan"),
            )
        )
        if not self._contender.may_be(self.samples[-1]):
            raise Unfit(f"somebody else writes KSM's knobs: {self.samples[-1]}\nhint: find out who, and run it again")


class _Play:
    """A script under way."""

    def __init__(self, script: Script, library: Library, group: Group) -> None:
        self.script, self.library, self.group = script, library, group
        self.tenants: dict[int, Tenant] = {}
        self.done: dict[int, float] = {}
        self.failed: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def begin(self, number: int, watch: Watch) -> None:
        """Have an event happen; it takes up to a second, in which samples go on."""
        event = self.script.events[number]
        if event.kind is Kind.ARRIVE:
            self.tenants[event.tenant] = Tenant(self.library.pool, self.group)
        thread = threading.Thread(target=self._happen, args=(number, event, watch), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _happen(self, number: int, event: Event, watch: Watch) -> None:
        try:
            tenant = self.tenants[event.tenant]
            if event.kind is Kind.ARRIVE:
                assert event.trace is not None
                tenant.tell(b"F", self.library.traces[event.trace])
            elif event.kind is Kind.REWRITE:
                tenant.tell(b"W", array("I", event.places), array("I", event.contents))
            else:
                tenant.leave()
            self.done[number] = watch.now
        except BaseException as error:  # told by the main thread
            self.failed = error

    def end(self) -> None:
        """All tenants leave."""
        self.group.empty()
        for tenant in self.tenants.values():
            tenant.process.wait()
        for thread in self._threads:
            thread.join()


def play(contender: Contender, script: Script, library: Library, place: Place, tenants: Group) -> Run:
    """One run; afterwards nothing is merged, and nobody is there."""
    run = _Play(script, library, tenants)
    watch = Watch(contender, place, tenants)
    contender.start(place)
    try:
        time.sleep(LEAD_SECONDS)
        watch.begin()
        following = 0
        while (now := watch.now) < script.seconds:
            while following < len(script.events) and script.events[following].at <= now:
                run.begin(following, watch)
                following += 1
            watch.take(sum(anonymous_pages(tenant.process.pid) for tenant in run.tenants.values()))
            if run.failed is not None:
                raise run.failed
            due = watch.origin + (now // INTERVAL + 1) * INTERVAL
            if following < len(script.events):
                due = min(due, watch.origin + script.events[following].at)
            time.sleep(max(0.0, due - time.monotonic()))
        others = watch.others()
    finally:
        contender.stop(place)
        run.end()
        place.ksm.reset()
    return _run(contender.name, script, library, run.done, watch.samples, others)


def _run(
    policy: str, script: Script, library: Library, done: dict[int, float], samples: list[Sample], others: float
) -> Run:
    # An event counts when all before it have happened, too.
    times = list(accumulate((done[number] for number in range(len(script.events))), max))
    states = replay(script, library.traces)
    steps = [Step(round(at, 3), *state) for at, state in zip(times, states, strict=True)]
    arrivals = [
        Arrival(event.tenant, round(at, 3), script.window_end(event))
        for event, at in zip(script.events, times, strict=True)
        if event.kind is Kind.ARRIVE
    ]
    return Run(policy, samples, steps, arrivals, round(others, 1))
