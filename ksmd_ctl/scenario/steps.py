# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of steps. Each class is all that there is about its kind: what the file may have, what makes it impossible,
what it does to a host, how a random scenario gets it. A new kind is a new class here, last in `_STEPS`.

Pages are numbers within their region; None stands for all of them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from ksmd_ctl.errors import Rejected
from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob, parse_wanted
from ksmd_ctl.host.memory import PageState, ProcessId
from ksmd_ctl.scenario import values
from ksmd_ctl.scenario.model import SETTABLE, Argument, Process, Step

if TYPE_CHECKING:
    from ksmd_ctl.scenario.check import State
    from ksmd_ctl.scenario.format import Reading
    from ksmd_ctl.scenario.generate import Abilities, Draw
    from ksmd_ctl.scenario.runner import Run


class Lacking(Exception):
    """The host lacks something that the scenario needs."""


#: `fails` of a step that may be refused or not: the hosts only have to agree.
ANY_ERROR = "any"

#: Knobs that a `set` step with `fails` may write: not the advisor's mode, which would undo pages_to_scan.
WRITABLE = frozenset(SYSFS_KNOBS) - {Knob.ADVISOR_MODE}

RegionName = Annotated[str, Argument(values.NAME, "its region")]
Pages = Annotated[tuple[int, ...] | None, Argument(values.PAGES, "pages of the region; all of them where left out")]


# -- ksmd ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scan(Step):
    """So many full scans; one that is under way is finished first, and counts."""

    kind, bare, weight = "scan", True, 4
    times: Annotated[int, Argument(values.COUNT, "how many")]

    def run(self, run: Run) -> int:
        done = 0
        while done < self.times and run.whole_batch():
            done += 1
        return done

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Scan(draw.choice((1, 1, 1, 2, 3)))
        if draw.chance(0.5):
            yield draw.observe()

    def smaller(self) -> Iterator[Step]:
        if self.times > 1:
            yield replace(self, times=self.times - 1)


@dataclass(frozen=True, slots=True)
class Batch(Step):
    """One batch of so many pages: a scan stopped in the middle."""

    kind, bare, weight = "batch", True, 4
    size: Annotated[int, Argument(values.COUNT, "pages_to_scan")]

    def run(self, run: Run) -> None:
        run.batch(self.size)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Batch(draw.choice((1, 1, 2, 3, 5, 8)))
        if draw.chance(0.3):
            yield draw.observe()

    def smaller(self) -> Iterator[Step]:
        if self.size > 1:
            yield replace(self, size=self.size - 1)


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
        return _move(run, self.process, found, self.to, shared=self.shared)

    @classmethod
    def drawn(cls, draw: Draw, process: str, length: int) -> dict[str, Any]:
        return {"to": draw.node(process), "pages": draw.pages(length), "shared": draw.chance(0.92)}


#: What a migration gives whose target the process's cpuset does not have.
REFUSED = "EACCES"


def _move(
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


# -- the host ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Set(Step):
    """Write knobs."""

    kind, bare, weight = "set", True, 0.8
    knobs: Mapping[Knob, int | str]
    fails: str = ""

    @classmethod
    def read(cls, reading: Reading, where: str, table: Mapping[str, Any]) -> dict[str, Any]:
        reading.unknown(f"{where}: ", table, {cls.kind, "fails"})
        given, fails = table[cls.kind], table.get("fails", "")
        if not isinstance(given, dict) or not given:
            reading.wrong(where, "takes a table of knobs and their values")
            return {}
        if fails not in ("", ANY_ERROR, *errno.errorcode.values()):
            reading.wrong(f"{where}: fails", f"{fails!r} is not the name of an errno")
        knobs = {}
        for key, value in given.items():
            # What the kernel has to refuse can be any knob and any value.
            if key not in (WRITABLE if fails else SETTABLE):
                reading.wrong(f"{where}: {key}", f"is not one of {', '.join(sorted(WRITABLE if fails else SETTABLE))}")
                continue
            try:
                knobs[Knob(key)] = _any_value(value) if fails else parse_wanted(Knob(key), value)
            except ValueError as error:
                reading.wrong(f"{where}: {key}", str(error))
        return {"knobs": knobs, "fails": fails}

    def write(self) -> Iterator[str]:
        yield f"set = {values.inline_table({knob.value: values.plain(value) for knob, value in self.knobs.items()})}"
        if self.fails:
            yield f"fails = {values.text(self.fails)}"

    def need(self, run: Run) -> None:
        for knob in self.knobs:
            run.need_knob(knob)

    def run(self, run: Run) -> dict[str, str]:
        said: dict[str, str] = {}
        for knob, value in self.knobs.items():
            try:
                run.lab.set(knob, value)
                said[knob] = ""
            except Rejected as error:
                said[knob] = errno.errorcode.get(error.errno or 0, "refused")
            run.outcome.expectations += self.fails not in ("", ANY_ERROR)
            if self.fails != ANY_ERROR and said[knob] != self.fails:
                found, wanted = said[knob] or "taken", self.fails or "taken"
                run.outcome.failures.append(f"{run.at}: {knob} = {value} was {found}, not {wanted}")
        return said

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        found: dict[Knob, tuple[int, ...]] = {
            Knob.MERGE_ACROSS_NODES: (0, 1),
            Knob.MAX_PAGE_SHARING: (2, 3, 256),
            Knob.SMART_SCAN: (0, 1),
            Knob.USE_ZERO_PAGES: (0, 1),
        }
        knob = draw.choice(sorted(found.keys() & draw.abilities.knobs))
        # Some are refused while pages are merged: then the hosts have to agree on that.
        yield Set({knob: draw.choice(found[knob])}, ANY_ERROR)


def _any_value(value: object) -> int | str:
    if isinstance(value, str) or (isinstance(value, int) and values.whole(value, -(2**63), 2**63)):
        return value
    raise ValueError(f"{value!r} is not a number or text")


@dataclass(frozen=True, slots=True)
class Unmerge(Step):
    """run=2, then run=0."""

    kind, bare, weight = "unmerge", True, 0.25

    def run(self, run: Run) -> None:
        run.unmerge()

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Unmerge()


@dataclass(frozen=True, slots=True)
class Sleep(Step):
    """Let time pass on the host's clock, for pruning of chains."""

    kind, bare, weight = "sleep", True, 0.1
    milliseconds: Annotated[int, Argument(values.MILLISECONDS, "how long")]

    def run(self, run: Run) -> None:
        run.lab.sleep(self.milliseconds / 1000)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Sleep(1)


@dataclass(frozen=True, slots=True)
class Offline(Step):
    """The memory of a node goes offline, as far as it can, and comes back; whether it went."""

    kind, bare, weight = "offline", True, 0.6
    node: Annotated[int, Argument(values.NODE, "which node")]

    def check(self, state: State) -> None:
        if state.domains:
            raise ValueError("with domains no memory goes offline: cpusets and policies would lose the node")

    def need(self, run: Run) -> None:
        if run.nodes[self.node] not in run.lab.removable_nodes():
            raise Lacking(f"needs two nodes, and memory of node {self.node} that can go offline")

    def run(self, run: Run) -> bool:
        return run.lab.offline(run.nodes[self.node])

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        return bool(abilities.offline)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        # A mapping that ksmd has not seen yet keeps a KSM page where it is.
        yield Scan(2)
        yield Offline(draw.choice(sorted(draw.abilities.offline)))
        yield draw.observe()


@dataclass(frozen=True, slots=True)
class Observe(Step):
    """Look at counters and page tables; the label is for [[expect]] and reports."""

    kind, bare, weight = "observe", True, 3
    label: Annotated[str, Argument(values.TEXT, "the observation's label")]

    def check(self, state: State) -> None:
        if self.label in state.labels:
            raise ValueError(f"there is an observation {self.label!r} already")
        state.labels.add(self.label)

    def run(self, run: Run) -> None:
        run.outcome.observations[self.label] = run.look()

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield draw.observe()


@dataclass(frozen=True, slots=True)
class Home(Step):
    """Pages that are not on a node of their domain move to its first one, with all who map them; the statuses."""

    kind, bare = "home", True

    def check(self, state: State) -> None:
        if not state.domains:
            raise ValueError("there is no domain")

    def run(self, run: Run) -> dict[str, list[int] | str]:
        return {
            process: _move(run, process, run.strays(process), domain.nodes[0])
            for process, domain in run.state.domains.items()
            if process in run.processes
        }

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        # Only scenarios with domains have it (ksmd_ctl.scenario.generate_domains).
        return False


_STEPS = (
    Migrate,
    Scan,
    Batch,
    Write,
    Discard,
    Unmap,
    Break,
    Advise,
    Protect,
    Fork,
    Exit,
    Set,
    Unmerge,
    Sleep,
    Observe,
    Merge,
    Exec,
    Remap,
    Read,
    SwapOut,
    Collapse,
    Offline,
    Home,
)

#: The classes of steps, by the key that names them in a file. A new one comes last: what a seed makes depends on it.
KINDS: dict[str, type[Step]] = {step.kind: step for step in _STEPS}


def migrations_during_a_scan(draw: Draw) -> Iterator[Step]:
    """Steps for a random scenario: pages move while a scan is stopped in the middle, and each batch is observed."""
    if draw.chance(0.5):
        yield from Batch.random(draw)
    yield from Migrate.random(draw)
    if draw.chance(0.4):
        yield from Migrate.random(draw)
    if draw.chance(0.4):
        yield from Write.random(draw)
    if draw.chance(0.3):
        yield from Fork.random(draw)
    yield from Batch.random(draw)
    yield draw.observe()
    if draw.chance(0.3):
        yield from Exit.random(draw)
    yield Scan(1)
    yield draw.observe()
