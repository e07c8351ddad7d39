# SPDX-License-Identifier: GPL-2.0-or-later
"""A load for demonstrations: virtual machines on two nodes that arrive, idle, write and restart.

It follows a script on virtual time and depends on nothing but its seed. What its machines hold is made to
look like guests: a part that all guests of one system have in common, pages of zeroes, pages that only
one has and that change, and on each node a pair of guests that began as copies of one another.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE, ZERO_CONTENT


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


def pattern(label: str) -> bytes:
    """A page that a label stands for."""
    unit = label.encode() + b"\0"
    return (unit * (PAGE_SIZE // len(unit) + 1))[:PAGE_SIZE]


@dataclass(slots=True)
class _Running:
    pid: int
    start: int
    own_from: int


@dataclass(slots=True)
class Demo:
    """The load, on one machine. `until` is called as virtual time passes."""

    machine: Machine
    guests: tuple[Guest, ...] = DEMO_GUESTS
    seed: int = 1
    running: dict[str, _Running] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _count: int = 0
    _random: Random = field(default_factory=Random)

    def __post_init__(self) -> None:
        self._random.seed(self.seed)
        for number, guest in enumerate(self.guests):
            self._at(guest.arrives, self._starter(guest))
            self._at(guest.arrives + _RESTART_SECONDS + 37.0 * number, self._restarter(guest))

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

    def _starter(self, guest: Guest) -> Callable[[float], None]:
        def start(now: float) -> None:
            node = guest.node % self.machine.memory.nr_node_ids
            pid = self.machine.spawn(guest.name, node)
            self.machine.processes[pid].unit = f"machine-qemu-{guest.name}.scope"
            address = self.machine.mmap(pid, guest.pages, node)
            self.machine.madvise(pid, address, guest.pages, mergeable=True)
            shares = [guest.pages * percent // 100 for percent in (_SYSTEM, _ZERO, _IMAGE)]
            contents = [pattern(f"{guest.system} {page}") for page in range(shares[0])]
            contents += [ZERO_CONTENT] * shares[1]
            contents += [pattern(f"{guest.image} image {page}") for page in range(shares[2])]
            own_from = len(contents)
            contents += [pattern(f"{guest.name} {page} at {now}") for page in range(own_from, guest.pages)]
            for page, content in enumerate(contents):
                self.machine.write(pid, address + page * PAGE_SIZE, content)
            self.running[guest.name] = _Running(pid, address, own_from)
            self._at(now + _WRITE_SECONDS, self._writer(guest, pid))

        return start

    # Now and then a guest writes: mostly to its own pages, sometimes to one that it shares.
    def _writer(self, guest: Guest, pid: int) -> Callable[[float], None]:
        def write(now: float) -> None:
            running = self.running.get(guest.name)
            if running is None or running.pid != pid or pid not in self.machine.processes:
                return
            for _ in range(_WRITE_PAGES):
                shared = self._random.random() < 0.05
                page = self._random.randrange(0 if shared else running.own_from, guest.pages)
                content = pattern(f"{guest.name} {page} at {now}")
                self.machine.write(pid, running.start + page * PAGE_SIZE, content)
            self._at(now + _WRITE_SECONDS, write)

        return write

    def _restarter(self, guest: Guest) -> Callable[[float], None]:
        def restart(now: float) -> None:
            running = self.running.pop(guest.name, None)
            if running is not None and running.pid in self.machine.processes:
                self.machine.exit(running.pid)
            self._at(now + 5.0, self._starter(guest))
            self._at(now + 5.0 + _RESTART_SECONDS, restart)

        return restart
