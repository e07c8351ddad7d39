# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of a scenario that processes do with their memory (`ksmd_ctl.scenario.steps`).

Pages are numbers within their region; None stands for all of them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from ksmd_ctl.errors import Rejected
from ksmd_ctl.host.memory import PageState, ProcessId
from ksmd_ctl.scenario import values
from ksmd_ctl.scenario.model import Argument, Lacking, Process, Step

if TYPE_CHECKING:
    from ksmd_ctl.scenario.check import State
    from ksmd_ctl.scenario.generate import Abilities, Draw
    from ksmd_ctl.scenario.runner import Run

RegionName = Annotated[str, Argument(values.NAME, "its region")]
Pages = Annotated[tuple[int, ...] | None, Argument(values.PAGES, "pages of the region; all of them where left out")]


# -- pages of a region ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RegionStep(Step):
    """What steps about pages of a region have in common."""

    process: Process
    region: RegionName
    pages: Pages = field(default=None, kw_only=True)

    def check(self, state: State) -> None:
        state.touch(self.process, self.region, self.pages)

    def run(self, run: Run) -> object:
        for where in run.ranges(self):
            self.act(run, *where)
        return None

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        """Carry it out on adjacent pages."""
        raise NotImplementedError

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        if place := draw.place():
            process, region, length = place
            yield cls(process, region, **cls.drawn(draw, process, length))

    @classmethod
    def drawn(cls, draw: Draw, process: str, length: int) -> dict[str, Any]:
        """The other fields of a random one.

        :param length: of the region, in pages
        """
        return {"pages": draw.pages(length)}


@dataclass(frozen=True, slots=True)
class Migrate(RegionStep):
    """move_pages(2), one address a frame."""

    kind, weight = "migrate", 5
    to: Annotated[int, Argument(values.NODE, "the node that they go to")]
    shared: Annotated[bool, Argument(values.FLAG, "MPOL_MF_MOVE_ALL (default), or plain MPOL_MF_MOVE")] = True

    def run(self, run: Run) -> list[int] | str:
        found = [
            (address + page * run.page_size, state)
            for process, address, count in run.ranges(self)
            for page, state in enumerate(run.lab.pages(process, address, count, ksm=False))
        ]
        return move_frames(run, self.process, found, self.to, shared=self.shared)

    @classmethod
    def drawn(cls, draw: Draw, process: str, length: int) -> dict[str, Any]:
        return {"to": draw.node(process), "pages": draw.pages(length), "shared": draw.chance(0.92)}


#: What a migration gives whose target the process's cpuset does not have.
REFUSED = "EACCES"


def move_frames(
    run: Run, process: str, found: Iterable[tuple[int, PageState]], to: int, *, shared: bool = True
) -> list[int] | str:
    frames: dict[int, int] = {}
    for address, state in found:
        # One address a frame: a second one of the same frame reads EBUSY (findings F4).
        if state.frame is not None and state.node is not None:
            frames.setdefault(state.frame, address)
    if not frames:
        return []
    try:
        statuses = run.lab.move_pages(run.processes[process], list(frames.values()), run.nodes[to], shared=shared)
    except Rejected as error:
        if error.errno != errno.EACCES:
            raise
        return REFUSED
    return [run.indices[status] if status >= 0 else status for status in statuses]


@dataclass(frozen=True, slots=True)
class Write(RegionStep):
    """Write whole pages."""

    kind, weight = "write", 3
    label: Annotated[str, Argument(values.LABEL, "their content")]
    pages: Annotated[
        tuple[int, ...] | None,
        Argument(values.PAGES, "or several pages; all of them where both are left out"),
        Argument(values.PAGE, "the page", "page"),
    ] = field(default=None, kw_only=True)

    def check(self, state: State) -> None:
        memory, pages = state.touch(self.process, self.region, self.pages)
        if pages & memory.locked:
            raise ValueError(f"page {min(pages & memory.locked)} can't be written: the process would die")

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        run.lab.store(process, address, [run.content(self.label)] * pages)

    @classmethod
    def drawn(cls, draw: Draw, process: str, length: int) -> dict[str, Any]:
        pages = draw.pages(length) if draw.chance(0.3) else (draw.number(length),)
        return {"label": draw.label(), "pages": pages}


@dataclass(frozen=True, slots=True)
class Discard(RegionStep):
    """MADV_DONTNEED."""

    kind, weight = "discard", 1.2

    def check(self, state: State) -> None:
        state.whole(self.process, self.region, self.pages)

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        run.lab.discard(process, address, pages)


@dataclass(frozen=True, slots=True)
class SwapOut(RegionStep):
    """MADV_PAGEOUT: swaps out those of the pages that no other page table entry maps."""

    kind, weight = "swap-out", 1.5

    def check(self, state: State) -> None:
        memory, _ = state.touch(self.process, self.region, self.pages)
        if memory.region.huge:
            raise ValueError(f"{self.process}.{self.region} has huge pages: kernels swap them out in different ways")

    def need(self, run: Run) -> None:
        if lacks := run.lab.lacks_swap():
            raise Lacking(lacks)

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        run.lab.swap_out(process, address, pages)

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        return abilities.swap

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        if place := draw.place():
            process, region, length = place
            yield cls(process, region, pages=draw.pages(length))
            if draw.chance(0.5):
                yield from Fork.random(draw)
            if draw.chance(0.6):
                yield Read(process, region, pages=draw.pages(length))


@dataclass(frozen=True, slots=True)
class Read(RegionStep):
    """The process reads the pages: swaps in, or maps the zero page where nothing was."""

    kind, weight = "read", 1

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        run.lab.read_pages(process, address, pages)


@dataclass(frozen=True, slots=True)
class Unmap(RegionStep):
    """munmap."""

    kind, weight = "unmap", 0.6

    def check(self, state: State) -> None:
        memory, pages = state.whole(self.process, self.region, self.pages)
        memory.mapped -= pages
        memory.locked -= pages

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        run.lab.unmap(process, address, pages)


@dataclass(frozen=True, slots=True)
class Break(RegionStep):
    """Unshare, from outside, those of the pages that are KSM pages at that moment."""

    kind, weight = "break", 1.5
    node: Annotated[int | None, Argument(values.NODE, "the caller's policy; where left out, the first node")] = None

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        node = None if self.node is None else run.nodes[self.node]
        run.lab.break_sharing(process, address, pages, node=node)

    @classmethod
    def drawn(cls, draw: Draw, process: str, length: int) -> dict[str, Any]:
        return {"pages": draw.pages(length), "node": None if draw.chance(0.5) else draw.node(process)}


@dataclass(frozen=True, slots=True)
class Advise(RegionStep):
    """MADV_MERGEABLE or MADV_UNMERGEABLE."""

    kind, weight = "advise", 0.8
    mergeable: Annotated[bool, Argument(values.FLAG, "which of the two")]

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        run.lab.advise(process, address, pages, mergeable=self.mergeable)

    @classmethod
    def drawn(cls, draw: Draw, process: str, length: int) -> dict[str, Any]:
        pages = draw.pages(length) if draw.chance(0.4) else None
        return {"mergeable": draw.chance(0.5), "pages": pages}


@dataclass(frozen=True, slots=True)
class Protect(RegionStep):
    """mprotect: read only, or readable and writable again."""

    kind, weight = "protect", 0.3
    writable: Annotated[bool, Argument(values.FLAG, "which of the two")]

    def check(self, state: State) -> None:
        memory, pages = state.touch(self.process, self.region, self.pages)
        memory.locked = memory.locked - pages if self.writable else memory.locked | pages

    def act(self, run: Run, process: ProcessId, address: int, pages: int) -> None:
        run.lab.protect(process, address, pages, writable=self.writable)

    @classmethod
    def drawn(cls, draw: Draw, process: str, length: int) -> dict[str, Any]:
        return {"writable": draw.chance(0.3), "pages": draw.pages(length)}


# -- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fork(Step):
    """A child with all of the process's memory."""

    kind, weight = "fork", 1.5
    process: Process
    child: Annotated[str, Argument(values.NAME, "the child's name", "as")]

    def check(self, state: State) -> None:
        memory = state.process(self.process)
        if self.child in state.names:
            raise ValueError(f"there is or was a process {self.child} already")
        if any(region.region.huge for region in memory.values()):
            raise ValueError(f"process {self.process} has huge pages: kernels copy shared ones in different ways")
        state.add(self.child, {name: region.copy() for name, region in memory.items()})
        if self.process in state.domains:
            state.domains[self.child] = state.domains[self.process]

    def run(self, run: Run) -> None:
        run.processes[self.child] = run.lab.fork(run.processes[self.process], self.child)
        run.addresses[self.child] = dict(run.addresses[self.process])

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        if draw.state.processes and len(draw.state.processes) <= draw.most_processes:
            draw.children += 1
            yield Fork(draw.process(), f"c{draw.children}")


@dataclass(frozen=True, slots=True)
class Exit(Step):
    """End the process."""

    kind, weight = "exit", 0.8
    process: Process

    def check(self, state: State) -> None:
        state.process(self.process)
        del state.processes[self.process]

    def run(self, run: Run) -> None:
        run.lab.exit(run.processes.pop(self.process))

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        # The last one goes seldom: nothing happens afterwards.
        if len(draw.state.processes) > 1 or (draw.state.processes and draw.chance(0.1)):
            yield Exit(draw.process())


@dataclass(frozen=True, slots=True)
class Merge(Step):
    """prctl(PR_SET_MEMORY_MERGE); of the process's memory only the regions are left mergeable."""

    kind, weight = "prctl", 0.25
    process: Process
    on: Annotated[bool, Argument(values.FLAG, "on or off")]

    def check(self, state: State) -> None:
        state.process(self.process)

    def run(self, run: Run) -> None:
        try:
            run.lab.merge(run.processes[self.process], on=self.on)
        except Rejected as error:
            raise Lacking("this kernel has no prctl(PR_SET_MEMORY_MERGE) (it came with 6.4)") from error

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        return abilities.merge

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        if draw.state.processes:
            yield Merge(draw.process(), draw.chance(0.7))


@dataclass(frozen=True, slots=True)
class Exec(Step):
    """execve: the process goes on with another program, which maps the process's regions anew, untouched."""

    kind, weight = "exec", 0.4
    process: Process

    def check(self, state: State) -> None:
        memory = state.process(self.process)
        memory.update({name: region.new() for name, region in memory.items()})

    def run(self, run: Run) -> None:
        run.lab.exec(run.processes[self.process])
        for memory in run.state.process(self.process).values():
            run.map(self.process, memory.region)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        if draw.state.processes:
            process = draw.process()
            yield Exec(process)
            # Nothing is in its memory now.
            for region in draw.state.process(process):
                if draw.chance(0.8):
                    yield Write(process, region, draw.label())
                    yield Advise(process, region, True)


@dataclass(frozen=True, slots=True)
class Collapse(Step):
    """MADV_COLLAPSE of each 2 MiB of a region with huge pages; which of them are huge pages then."""

    kind, weight = "collapse", 2.5
    process: Process
    region: RegionName

    def check(self, state: State) -> None:
        memory, _ = state.touch(self.process, self.region, None)
        if not memory.region.huge:
            raise ValueError(f"{self.process}.{self.region} is not a region with huge pages")

    def run(self, run: Run) -> list[bool]:
        pages = run.state.process(self.process)[self.region].length
        address = run.addresses[self.process][self.region]
        return list(run.lab.collapse(run.processes[self.process], address, pages))

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        return abilities.huge

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        processes = draw.state.processes.items()
        huge = [(name, region) for name, memory in processes for region in memory if memory[region].region.huge]
        if huge:
            yield Collapse(*draw.choice(huge))
            if draw.chance(0.5):
                yield draw.observe()


@dataclass(frozen=True, slots=True)
class Remap(Step):
    """mremap: what is left of a region goes to another address, above all others of the process."""

    kind, weight = "mremap", 0.8
    process: Process
    region: RegionName

    def check(self, state: State) -> None:
        memory, _ = state.touch(self.process, self.region, ())
        if not memory.mapped:
            raise ValueError(f"nothing of {self.process}.{self.region} is mapped any more")

    def run(self, run: Run) -> None:
        process, pages = run.processes[self.process], run.state.process(self.process)[self.region].length
        addresses = run.addresses[self.process]
        addresses[self.region] = run.lab.mremap(process, addresses[self.region], pages)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        if place := draw.place():
            process, region, _length = place
            yield Remap(process, region)
