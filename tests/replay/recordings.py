# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings of a simulated host, made step by step in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE, page_content
from ksmd_ctl.engine.page_sample import EnginePages
from ksmd_ctl.host.page_sample import Selection
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.recorder import Recorder
from ksmd_ctl.recording.writer import Writer
from ksmd_ctl.replay.player import Choices, Player, Point


class Stage:
    """A simulated host that is being recorded."""

    def __init__(
        self, path: Path, *, one_in: int = 1, nodes: int = 2, key: bytes | None = None, domains: str | None = None
    ) -> None:
        self.path = path
        self.host = EngineHost(Machine(nodes, node_pages=1 << 18))
        selection = Selection(one_in, key)
        self.writer = Writer(path, selection.number(bytes(PAGE_SIZE)), keyed=key is not None)
        self._sampler = EnginePages(self.host.machine, selection, self.host.clock)
        release = self.host.identity.release
        self.writer.facts({"program": "0", "kind": "engine", "release": release, "profile": release, "begun": 0.0})
        self.writer.facts({"page_size_bytes": PAGE_SIZE, "one_in": one_in, "keyed": key is not None, "numa": True})
        self.writer.facts({"anonymous": False, "domains": domains, "service": None})
        self.writer.topology(self.host.topology())

    @cached_property
    def recorder(self) -> Recorder:
        """It begins when it is first asked for."""
        return Recorder(self.host, self._sampler, self.writer)

    def change(self, action: Callable[[], object]) -> None:
        """Change the host between two samples and two looks at one moment."""
        self.recorder.sample()
        self.recorder.look()
        action()
        self.recorder.sample()
        self.recorder.look()

    def spawn(self, contents: list[bytes], node: int = 0) -> int:
        """A process whose mergeable memory has these contents."""
        machine = self.host.machine
        pid = machine.spawn(f"p{node}", node)
        start = machine.mmap(pid, len(contents), node)
        machine.madvise(pid, start, len(contents), mergeable=True)
        for index, content in enumerate(contents):
            machine.write(pid, start + index * PAGE_SIZE, content)
        return pid

    def write(self, pid: int, page: int, content: bytes) -> None:
        """One of its processes writes a page."""
        start = self.host.machine.mm(pid).vmas[0].start
        self.host.machine.write(pid, start + page * PAGE_SIZE, content)

    def pass_time(self, seconds: int) -> None:
        """Seconds go by, with a sample each."""
        for _ in range(seconds):
            self.host.advance(1.0)
            self.recorder.sample()

    def end(self) -> Path:
        self.writer.facts({"seconds": self.recorder.seconds})
        self.writer.close()
        return self.path


def contents(seed: int, pages: int, *, common: float = 0.5, zeroes: float = 0.1) -> list[bytes]:
    """Contents of a process: some that others have, pages of zeroes, its own."""
    chance = random.Random(seed)
    found = []
    for page in range(pages):
        kind = chance.random()
        if kind < zeroes:
            found.append(page_content("0"))
        elif kind < zeroes + common:
            found.append(page_content(f"common {chance.randrange(pages)}"))
        else:
            found.append(page_content(f"own {seed} {page}"))
    return found


def replayed(path: Path, choices: Choices | None = None) -> list[Point]:
    """All points of a replay."""
    with Recording(path) as recording:
        return list(Player(recording, choices or Choices({})).play())
