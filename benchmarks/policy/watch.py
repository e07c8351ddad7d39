# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes samples of one run, and what is left to measure at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from benchmarks.policy.contenders import Contender, Place
from benchmarks.policy.figures import Arrival, Run, Sample, Step
from benchmarks.policy.held import Holder
from benchmarks.policy.host import Unfit, busy_seconds
from benchmarks.policy.neighbours import Neighbours
from benchmarks.policy.oracle import HugePages, huge_pages
from benchmarks.policy.thp import HUGE_PAGES, Memory, fault_fallbacks

__all__ = ["INTERVAL", "LEAD_SECONDS", "Watch", "watched"]

#: Seconds from one sample to the next.
INTERVAL = 0.25
#: What a contender has to come up before the script begins; its CPU time until then is not counted.
LEAD_SECONDS = 6.0


class Watch:
    """Takes the samples of one run."""

    def __init__(self, contender: Contender, place: Place) -> None:
        self._contender, self._host, self._seconds = contender, place.host, place.seconds
        self._neighbours = Neighbours(place.host.neighbours, place.busy)
        self.tenants: dict[int, Holder] = {}
        self.samples: list[Sample] = []

    def begin(self) -> None:
        """The script begins now."""
        self._before = self._host.ksm.cpu_seconds(), self._host.service.cpu_seconds()
        self._busy, self._not_huge = busy_seconds(), fault_fallbacks()
        self._neighbours.begin(self._seconds)
        self.origin = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic() - self.origin

    def add(self, pid: int) -> None:
        """A tenant has come."""
        self.tenants[pid] = Holder(pid)

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

    def end(self) -> None:
        """The script ends now; tenants and contender are still there."""
        last = self.samples[-1]
        self._others = busy_seconds() - self._busy - last.ksmd - last.service
        self._not_huge = fault_fallbacks() - self._not_huge
        self._huge_pages = {(pid, place) for pid, tenant in self.tenants.items() for place in tenant.huge_pages()}
        self._latency = self._neighbours.latency()

    def run(
        self,
        steps: Sequence[Step],
        arrivals: Sequence[Arrival],
        contents: Mapping[tuple[int, int], Sequence[int]],
        zero: int,
    ) -> Run:
        """All of it, after the end.

        :param contents: and `zero`: as `oracle.huge_pages` takes them
        """
        huge = HugePages()
        if self._host.memory is not Memory.SMALL:
            huge = huge_pages(contents, self._huge_pages, zero, HUGE_PAGES)
        return Run(self._contender.name, self.samples, steps, arrivals, huge, self._latency,
                   round(self._others, 1), self._not_huge, self._host.zeroes_free)  # fmt: skip

    def clear(self) -> None:
        """Nobody is there any more, and nothing is merged."""
        self._host.tenants.empty()
        self._host.neighbours.empty()
        self._neighbours.wait()
        self._host.ksm.reset()


@contextmanager
def watched(contender: Contender, place: Place) -> Iterator[Watch]:
    """A run: what is watched begins and has its end in the block."""
    watch = Watch(contender, place)
    contender.start(place)
    try:
        time.sleep(LEAD_SECONDS)
        watch.begin()
        yield watch
    finally:
        contender.stop(place)
        watch.clear()
