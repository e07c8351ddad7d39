# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays a script with real processes under one contender, and measures."""

from __future__ import annotations

import hashlib
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
from benchmarks.policy.figures import Arrival, Run, Step
from benchmarks.policy.host import Alone, Unfit
from benchmarks.policy.oracle import Hold, replay
from benchmarks.policy.pages import PAGE, ZERO
from benchmarks.policy.script import Event, Kind, Script
from benchmarks.policy.tenant import HEADER
from benchmarks.policy.thp import HUGE_PAGES
from benchmarks.policy.traces import Trace
from benchmarks.policy.watch import INTERVAL, Watch, watched
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES

__all__ = ["Library", "play"]

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
        digest = hashlib.sha256()
        for trace in traces:
            own = []
            for at in range(0, len(trace.contents), PAGE):
                content = trace.contents[at : at + PAGE]
                if content not in numbers:
                    numbers[content] = len(numbers)
                    os.write(self.pool, content)
                    digest.update(content)
                own.append(numbers[content])
            missing = -len(trace.pages) % HUGE_PAGES
            self.traces.append(array("I", [*(own[number] for number in trace.pages), *missing * [self.zero]]))
            digest.update(self.traces[-1])
        #: Of all of this.
        self.digest = digest.hexdigest()[:16]


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
            start_new_session=True,
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

    def verify_done(self) -> None:
        """
        :raises Unfit: an event took longer than the script
        """
        if self.failed is not None:
            raise self.failed
        for number, event in enumerate(self.script.events):
            if number not in self.done:
                raise Unfit(f"a tenant did not {event.kind} within {self.watch.now - event.at:.0f} s\n"
                            "hint: this machine is too busy; wait until it is quiet")  # fmt: skip

    def wait(self) -> None:
        """Until all tenants have ended."""
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
    with watched(contender, place) as watch:
        run = _Play(script, library, place.host, watch)
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
        watch.end()
        run.verify_done()
    run.wait()
    hold = Hold(library.traces, library.zero if place.host.zeroes_free else None)
    states = replay(script, hold)
    # An event counts when all before it have happened, too.
    times = list(accumulate((run.done[number] for number in range(len(script.events))), max))
    steps = [Step(round(at, 3), *state) for at, state in zip(times, states, strict=True)]
    arrivals = [
        Arrival(event.tenant, round(at, 3), script.window_end(event))
        for event, at in zip(script.events, times, strict=True)
        if event.kind is Kind.ARRIVE
    ]
    return watch.run(steps, arrivals, run.contents(hold), library.zero)
