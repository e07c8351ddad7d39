# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a scenario file on a simulated machine and observes it as the recorded kernels were observed."""

from __future__ import annotations

import errno
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE, Page, page_content
from ksmd_ctl.engine.profile import Profile
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.engine.sysfs import counters

ALL_PAGES = 1 << 40


content = page_content


class Run:
    """One run of one scenario.

    :ivar observations: label -> what was seen, in the form of the recorded ones
    :ivar events: what migrate, set and break said, in order
    """

    def __init__(self, scenario: dict[str, Any], profile: Profile, check: Callable[[Machine], None]) -> None:
        self.check = check
        self.machine = Machine(4, profile)
        self.regions: dict[tuple[str, str], tuple[int, int]] = {}
        self.pids: dict[str, int] = {}
        self.observations: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.scans: list[int] = []
        knobs = {"stable_node_chains_prune_millisecs": 0, **scenario.get("knobs", {})}
        for name, value in knobs.items():
            if name in profile.knobs:
                self.machine.store(name, value["value"] if isinstance(value, dict) else value)
        for region in scenario["region"]:
            self.make_region(**region)
        for step in scenario["step"]:
            fails = step.pop("fails", None)
            ((kind, argument),) = step.items()
            if kind == "set":
                self.set(argument, fails)
            elif isinstance(argument, dict):
                getattr(self, kind.replace("break", "break_").replace("exit", "exit_"))(**argument)
            else:
                getattr(self, kind)(argument)
            check(self.machine)

    def make_region(
        self, process: str, name: str, pages: list[str], node: int | None = None, mergeable: bool = True
    ) -> None:
        if process not in self.pids:
            self.pids[process] = self.machine.spawn(process)
        pid = self.pids[process]
        start = self.machine.mmap(pid, len(pages), node)
        self.regions[process, name] = (start, len(pages))
        if mergeable:
            self.machine.madvise(pid, start, len(pages), mergeable=True)
        for index, label in enumerate(pages):
            if label != "-":
                self.machine.write(pid, start + index * PAGE_SIZE, content(label))

    def where(self, process: str, region: str, pages: str | None = None) -> tuple[int, int, int]:
        start, count = self.regions[process, region]
        if pages is None:
            return self.pids[process], start, count
        first, _, last = str(pages).partition("-")
        return self.pids[process], start + int(first) * PAGE_SIZE, int(last or first) - int(first) + 1

    def scan(self, count: int) -> None:
        done = 0
        for _ in range(count):
            done += self.machine.scan()
            self.check(self.machine)
        self.scans.append(done)

    def batch(self, pages: int) -> None:
        self.machine.batch(pages)

    def migrate(self, process: str, region: str, pages: str, to: int, shared: bool = True) -> None:
        pid, start, count = self.where(process, region, pages)
        frames: dict[Page, int] = {}
        for address in range(start, start + count * PAGE_SIZE, PAGE_SIZE):
            page = self.machine.mm(pid).page(address)
            if page is not None:
                frames.setdefault(page, address)
        result, status = self.machine.move_pages(pid, list(frames.values()), to, move_all=shared)
        nodes = [page_to_nid(page) for page in frames]
        self.events.append({"migrate": {"frames": len(frames), "result": result, "status": status, "nodes": nodes}})

    def write(self, process: str, region: str, page: int, label: str) -> None:
        pid, address, _ = self.where(process, region, str(page))
        self.machine.write(pid, address, content(label))

    def discard(self, process: str, region: str, pages: str) -> None:
        self.machine.discard(*self.where(process, region, pages))

    def unmap(self, process: str, region: str, pages: str) -> None:
        self.machine.munmap(*self.where(process, region, pages))

    def break_(self, process: str, region: str, pages: str, node: int | None = None) -> None:
        broken = self.machine.break_sharing(*self.where(process, region, pages), node)
        self.events.append({"break": {"ksm_pages": broken, "broken": broken}})

    def advise(self, process: str, region: str, mergeable: bool, pages: str | None = None) -> None:
        self.machine.madvise(*self.where(process, region, pages), mergeable=mergeable)

    def fork(self, process: str, **child: str) -> None:
        name = child["as"]
        self.pids[name] = self.machine.fork(self.pids[process], name)
        for (owner, region), place in list(self.regions.items()):
            if owner == process:
                self.regions[name, region] = place

    def exit_(self, process: str) -> None:
        self.machine.exit(self.pids.pop(process))

    def unmerge(self, _: bool) -> None:
        self.machine.store("run", 2)
        self.machine.store("run", 0)

    def set(self, knobs: dict[str, Any], fails: str | None) -> None:
        said = {}
        for name, value in knobs.items():
            try:
                self.machine.store(name, value)
                said[name] = "ok"
            except OSError as error:
                said[name] = errno.errorcode[error.errno or 0]
            assert said[name] == (fails or "ok"), (name, value)
        self.events.append({"set": said})

    def observe(self, label: str) -> None:
        frames: dict[Page, list[str]] = {}
        for (process, region), (start, count) in self.regions.items():
            if process not in self.pids:
                continue
            mm = self.machine.mm(self.pids[process])
            for index in range(count):
                page = mm.page(start + index * PAGE_SIZE)
                if page is not None:
                    frames.setdefault(page, []).append(f"{process}.{region}.{index}")
        ksm = self.machine.ksm
        seen = {name: value for name, value in counters(ksm).items() if name not in ksm.profile.vmstat}
        self.observations[label] = {
            "counters": seen,
            "groups": sorted(sorted(names) for names in frames.values()),
            "nodes": {name: page_to_nid(page) for page, names in frames.items() for name in names},
            "ksm": sorted(name for page, names in frames.items() if folio_test_ksm(page) for name in names),
        }


def run_file(path: Path, profile: Profile, check: Callable[[Machine], None] = lambda machine: None) -> Run:
    """Run a scenario file."""
    return Run(tomllib.loads(path.read_text()), profile, check)
