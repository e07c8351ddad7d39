# SPDX-License-Identifier: GPL-2.0-or-later
"""A load for demonstrations: virtual machines on two nodes that arrive, write and restart.

It depends only on virtual time and its seed. The guests have what real ones have: pages that all guests of one system
have in common, pages of zeroes, pages of an image that two guests started from, and pages of their own that change.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE, ZERO_CONTENT, page_content


@dataclass(frozen=True, slots=True)
class Guest:
    """A virtual machine of the demonstration.

    :ivar system: what it runs: guests with the same word have their system's pages in common
    :ivar arrives: when it starts, in seconds
    :ivar image: guests with the same word began as copies of one another
    """

    name: str
    system: str
    node: int
    arrives: float
    image: str
    pages: int = 2048


DEMO_GUESTS: Final = (
    Guest("web-1", "debian", 0, 0.0, "web"),
    Guest("web-2", "debian", 1, 2.0, "web"),
    Guest("web-3", "debian", 0, 4.0, "web"),
    Guest("db-1", "debian", 1, 6.0, "db"),
    Guest("build-1", "fedora", 0, 10.0, "build"),
    Guest("build-2", "fedora", 1, 14.0, "build"),
    Guest("cache-1", "alpine", 0, 20.0, "cache", 1024),
    Guest("cache-2", "alpine", 1, 30.0, "cache", 1024),
)

# Of a guest's pages, in percent: its system's, zeroes, its image's; the rest are its own.
_SYSTEM: Final = 45
_ZERO: Final = 15
_IMAGE: Final = 15
_WRITE_SECONDS: Final = 2.0
_WRITE_PAGES: Final = 24
_RESTART_SECONDS: Final = 300.0


@dataclass(slots=True)
class Demo:
    """The load on one machine.

    :ivar running: pids of guests by name
    """

    machine: Machine
    guests: tuple[Guest, ...] = DEMO_GUESTS
    seed: int = 1
    running: dict[str, int] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _count: int = 0
    _random: Random = field(default_factory=Random)

    def __post_init__(self) -> None:
        self._random.seed(self.seed)
        for number, guest in enumerate(self.guests):
            self._at(guest.arrives, partial(self._start, guest))
            self._at(guest.arrives + _RESTART_SECONDS + 37.0 * number, partial(self._restart, guest))

    def next_event(self) -> float:
        """When something happens next, in seconds."""
        return self._events[0][0]

    def until(self, seconds: float) -> None:
        """Let everything happen that is due by a time."""
        while self._events[0][0] <= seconds:
            when, _, action = heapq.heappop(self._events)
            action(when)

    def _at(self, seconds: float, action: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (seconds, self._count, action))

    def _start(self, guest: Guest, now: float) -> None:
        node = guest.node % self.machine.memory.nr_node_ids
        pid = self.machine.spawn(guest.name, node)
        process = self.machine.processes[pid]
        process.unit, process.machine = f"machine-qemu-{guest.name}.scope", True
        address = self.machine.mmap(pid, guest.pages, node)
        self.machine.madvise(pid, address, guest.pages, mergeable=True)
        system, zero, image = (guest.pages * percent // 100 for percent in (_SYSTEM, _ZERO, _IMAGE))
        contents = [page_content(f"{guest.system} {page}") for page in range(system)]
        contents += [ZERO_CONTENT] * zero
        contents += [page_content(f"{guest.image} image {page}") for page in range(image)]
        own_from = len(contents)
        contents += [page_content(f"{guest.name} {page} at {now}") for page in range(own_from, guest.pages)]
        for page, content in enumerate(contents):
            self.machine.write(pid, address + page * PAGE_SIZE, content)
        self.running[guest.name] = pid
        self._at(now + _WRITE_SECONDS, partial(self._write, guest, pid, address, own_from))

    # A guest writes, mostly to its own pages, sometimes to one that it shares.
    def _write(self, guest: Guest, pid: int, address: int, own_from: int, now: float) -> None:
        if pid not in self.machine.processes:
            return
        for _ in range(_WRITE_PAGES):
            shared = self._random.random() < 0.05
            page = self._random.randrange(0 if shared else own_from, guest.pages)
            self.machine.write(pid, address + page * PAGE_SIZE, page_content(f"{guest.name} {page} at {now}"))
        self._at(now + _WRITE_SECONDS, partial(self._write, guest, pid, address, own_from))

    def _restart(self, guest: Guest, now: float) -> None:
        pid = self.running.pop(guest.name, None)
        if pid is not None and pid in self.machine.processes:
            self.machine.exit(pid)
        self._at(now + 5.0, partial(self._start, guest))
        self._at(now + 5.0 + _RESTART_SECONDS, partial(self._restart, guest))
