# SPDX-License-Identifier: GPL-2.0-or-later
"""A short hand for tests: processes with regions of labelled pages on a simulated machine."""

from __future__ import annotations

from collections.abc import Sequence

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE, Page
from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.engine.state import Head, RmapItem, StableNode, folio_test_ksm, page_to_nid
from tests.engine.scenario_runner import content
from tests.engine.validate import validate

ALL = tuple(PROFILES)
OLD = ("4.1", "4.10")
CHAINS = ("5.10", "6.1", "6.12", "7.2")
NEW = ("6.12", "7.2")
COLLAPSE = ("6.1", *NEW)
RESTART = ("4.10", *CHAINS)


class Region:
    """A region of one process; `region[2]` is its third page."""

    def __init__(self, lab: Lab, pid: int, start: int, count: int) -> None:
        self.lab, self.pid, self.start, self.count = lab, pid, start, count

    def address(self, index: int) -> int:
        return self.start + index * PAGE_SIZE

    def __getitem__(self, index: int) -> Page:
        page = self.lab.machine.mm(self.pid).page(self.address(index))
        assert page is not None, f"page {index} is not present"
        return page

    def present(self, index: int) -> bool:
        return self.lab.machine.mm(self.pid).page(self.address(index)) is not None

    def pages(self) -> list[Page]:
        return [self[index] for index in range(self.count) if self.present(index)]

    def frames(self) -> int:
        return len(set(self.pages()))

    def nodes(self) -> list[int]:
        return [page_to_nid(page) for page in self.pages()]

    def write(self, index: int, label: str) -> None:
        self.lab.machine.write(self.pid, self.address(index), content(label))

    def read(self, index: int) -> bytes:
        return self.lab.machine.read(self.pid, self.address(index))

    def discard(self, first: int = 0, count: int | None = None) -> None:
        self.lab.machine.discard(self.pid, self.address(first), count or self.count - first)

    def advise(self, mergeable: bool) -> None:
        self.lab.machine.madvise(self.pid, self.start, self.count, mergeable=mergeable)

    def break_sharing(self, nid: int | None = None) -> int:
        return self.lab.machine.break_sharing(self.pid, self.start, self.count, nid)

    def move(self, nid: int) -> tuple[int, list[int]]:
        """Move every frame of the region, one address a frame."""
        first = {page: index for index, page in reversed(list(enumerate(self.pages())))}
        addresses = sorted(self.address(index) for index in first.values())
        return self.lab.machine.move_pages(self.pid, addresses, nid, move_all=True)

    def exit(self) -> None:
        self.lab.machine.exit(self.pid)

    def fork(self, name: str) -> Region:
        return Region(self.lab, self.lab.machine.fork(self.pid, name), self.start, self.count)

    def item(self, index: int) -> RmapItem | None:
        """The rmap_item of a page."""
        slot = self.lab.machine.mm(self.pid).slot
        item = None if slot is None else slot.rmap_list
        while item is not None and item.address != self.address(index):
            item = item.rmap_list
        return item

    def node(self, index: int = 0) -> StableNode:
        """The stable node of a KSM page."""
        stable_node = self[index].stable_node
        assert stable_node is not None
        return stable_node


class Lab:
    """A machine with per-node trees and without smart_scan, unless said otherwise."""

    def __init__(self, profile: str, nodes: int = 2, *, across: int = 0, **knobs: object) -> None:
        self.machine = Machine(nodes, PROFILES[profile])
        self.ksm = self.machine.ksm
        features = self.ksm.profile
        defaults: dict[str, object] = {"merge_across_nodes": across}
        if features.smart_scan:
            defaults["smart_scan"] = 0
        if features.chains:
            defaults["stable_node_chains_prune_millisecs"] = 0
        for name, value in {**defaults, **knobs}.items():
            self.machine.store(name, value)

    def region(self, name: str, labels: Sequence[str], node: int | None = 0, *, mergeable: bool = True) -> Region:
        """A process of its own with one region; a label "-" leaves its page untouched."""
        return self.more(self.machine.spawn(name, node or 0), labels, node, mergeable=mergeable)

    def more(self, pid: int, labels: Sequence[str], node: int | None = 0, *, mergeable: bool = True) -> Region:
        """A further region of a process."""
        region = Region(self, pid, self.machine.mmap(pid, len(labels), node), len(labels))
        if mergeable:
            region.advise(True)
        for index, label in enumerate(labels):
            if label != "-":
                region.write(index, label)
        return region

    def scan(self, count: int = 1) -> Lab:
        for _ in range(count):
            self.machine.scan()
            validate(self.machine)
        return self

    def batch(self, pages: int) -> Lab:
        self.machine.batch(pages)
        validate(self.machine)
        return self

    def store(self, name: str, value: object, nid: int = 0) -> None:
        self.machine.store(name, value, nid)
        validate(self.machine)

    def unmerge(self, nid: int = 0) -> None:
        self.store("run", 2, nid)
        self.store("run", 0)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """shared, sharing, unshared, volatile."""
        ksm = self.ksm
        return ksm.pages_shared, ksm.pages_sharing, ksm.pages_unshared, ksm.pages_volatile

    @property
    def chains(self) -> tuple[int, int]:
        """chains, dups."""
        return self.ksm.stable_node_chains, self.ksm.stable_node_dups

    def exiled(self) -> int:
        return len(self.ksm.migrate_nodes)


def is_ksm(page: Page) -> bool:
    return folio_test_ksm(page)


def is_exiled(stable_node: StableNode) -> bool:
    return stable_node.head is Head.MIGRATE_NODES
