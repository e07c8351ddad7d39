# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries a scenario out on any `Lab`, in lockstep: ksmd does single batches when a step says so, and nothing else.

Placement is determined: processes and the lab itself prefer the first node with memory, so memory without a policy
comes from there. Pruning of chains does not depend on time (stable_node_chains_prune_millisecs = 0) unless the
scenario says so.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.errors import Absent, CheckFailed, HostError, NoSuchProcess, Refused, Rejected
from ksmd_ctl.host.interface import Lab
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.host.memory import PageState, ProcessId
from ksmd_ctl.scenario.check import step_key
from ksmd_ctl.scenario.compare import Observation, Outcome, check_expectations, counters_of, observe
from ksmd_ctl.scenario.model import (
    UNTOUCHED,
    Advise,
    Batch,
    Break,
    Discard,
    Exit,
    Fork,
    Merge,
    Migrate,
    Observe,
    Protect,
    Region,
    RegionStep,
    Scan,
    Scenario,
    Set,
    Sleep,
    Step,
    Unmap,
    Unmerge,
    Write,
    runs,
)

#: pages_to_scan of a batch that ends a full scan: more pages than a scenario can have.
WHOLE = 1 << 24

#: `fails` of a step that may be refused or not: the hosts only have to agree.
ANY_ERROR = "any"

# Values that a scenario begins with where it names none; in this order, for the advisor overwrites pages_to_scan.
_DEFAULTS: dict[Knob, int | str] = {
    Knob.ADVISOR_MODE: "none",
    Knob.MERGE_ACROSS_NODES: 1,
    Knob.MAX_PAGE_SHARING: 256,
    Knob.USE_ZERO_PAGES: 0,
    Knob.SMART_SCAN: 1,
    Knob.STABLE_NODE_CHAINS_PRUNE_MILLISECS: 0,
}

# So many batches find out whether other processes are registered: the first may reap those that have exited.
_SETTLING_BATCHES = 4


class _Lacking(Exception):
    """The host turns out to lack something in the middle of a scenario."""


Watch = Callable[[int, Step | None, "Run"], None]
"""Called before the first step (number 0, no step) and after each step."""


def run(scenario: Scenario, lab: Lab, profile: str, watch: Watch | None = None) -> Outcome:
    """Carry a scenario out and end its processes.

    :param profile: the engine's profile, or the one that the kernel behaves like; for expectations
    :raises Refused: somebody else has memory registered with KSM
    :raises NoSuchProcess: somebody has killed one of its processes, which says nothing about the host
    :raises HostError: the host can't be set up for it
    """
    going = Run(scenario, lab)
    going.outcome.skipped = going.lacks()
    if going.outcome.skipped:
        return going.outcome
    try:
        going.begin()
        if watch is not None:
            watch(0, None, going)
        for number, step in enumerate(scenario.steps, 1):
            try:
                going.do(number, step)
            except NoSuchProcess:
                raise
            except (HostError, CheckFailed) as error:
                going.outcome.broken = f"{step_key(number, step)}: {error}"
                break
            if watch is not None:
                watch(number, step, going)
    except _Lacking as lacking:
        going.outcome.skipped = str(lacking)
    finally:
        going.end()
    if not going.outcome.skipped and not going.outcome.broken:
        check_expectations(scenario, going.outcome, profile)
    return going.outcome


class Run:
    """One scenario under way on one host."""

    def __init__(self, scenario: Scenario, lab: Lab) -> None:
        self.scenario = scenario
        self.lab = lab
        self.outcome = Outcome()
        self.processes: dict[str, ProcessId] = {}
        self.regions: dict[str, dict[str, tuple[int, Region]]] = {}
        self.unmapped: dict[str, set[tuple[str, int]]] = {}
        self.start: dict[str, int] = {}
        self.size = lab.identity.page_size_bytes
        self.nodes = sorted(node.number for node in lab.topology().with_memory())
        self.indices = {number: index for index, number in enumerate(self.nodes)}
        self.contents: dict[str, bytes] = {}

    # -- before and after ----------------------------------------------------------------------------------

    def lacks(self) -> str:
        """What this host lacks for the scenario, empty for nothing."""
        if len(self.nodes) < self.scenario.nodes:
            return f"needs {self.scenario.nodes} nodes with memory; this host has {len(self.nodes)}"
        wanted = [knob for knob, setting in self.scenario.knobs.items() if not setting.optional]
        wanted += [knob for step in self.scenario.steps if isinstance(step, Set) for knob in step.knobs]
        for knob in wanted:
            try:
                self.lab.read(knob)
            except Absent:
                return f"this kernel has no {knob} (it came with {KNOBS[knob].since})"
        return ""

    def begin(self) -> None:
        """Un-merge, set the knobs, make sure that nobody else is there, and build processes and regions."""
        self.reset()
        for knob, value in _DEFAULTS.items():
            self.preset(knob, value)
        for knob, setting in self.scenario.knobs.items():
            self.preset(knob, setting.value)
        self.settle()
        self.reset()
        self.start = counters_of(self.lab.sample())
        for name in self.scenario.processes():
            self.processes[name] = self.lab.spawn(name)
            self.regions[name] = {}
            self.unmapped[name] = set()
        for region in self.scenario.regions:
            process = self.processes[region.process]
            node = None if region.node is None else self.nodes[region.node]
            address = self.lab.map(process, len(region.pages), node)
            self.regions[region.process][region.name] = (address, region)
            contents = [None if label == UNTOUCHED else self.content(label) for label in region.pages]
            if any(content is not None for content in contents):
                self.lab.store(process, address, contents)
        # In the order of the file, so that processes register in order of first appearance.
        for region in self.scenario.regions:
            if region.mergeable:
                address, _ = self.regions[region.process][region.name]
                self.lab.advise(self.processes[region.process], address, len(region.pages), mergeable=True)

    def reset(self) -> None:
        self.lab.set(Knob.RUN, 2)
        self.lab.set(Knob.RUN, 0)

    def preset(self, knob: Knob, value: int | str) -> None:
        try:
            self.lab.set(knob, value)
        except Absent:
            # Of the scenario's own knobs, only optional ones can be missing: `lacks` has looked.
            pass
        except Rejected as error:
            if error.errno != errno.EBUSY:
                raise
            raise self.foreign(f"{knob} can't be changed") from error

    def settle(self) -> None:
        """With none of our processes there, full_scans has to stand still: it advances for registered ones only.

        :raises Refused: it does not
        """
        for _ in range(_SETTLING_BATCHES):
            if not self.whole_batch():
                return
        raise self.foreign("full scans go on")

    def foreign(self, sign: str) -> Refused:
        return Refused(
            "running a scenario",
            f"somebody else's memory is registered with KSM ({sign}), and would be in every figure",
            hint="`ksmd-ctl processes` shows whose; end it, or run this in a virtual machine of its own",
        )

    def end(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            self.lab.exit(process)
        self.processes.clear()

    # -- steps ---------------------------------------------------------------------------------------------

    def do(self, number: int, step: Step) -> None:
        """Carry a step out."""
        event = self.act(number, step)
        if event is not None:
            self.outcome.events.append({"step": number, step.kind: event})

    def act(self, number: int, step: Step) -> object:
        match step:
            case Scan(times=times):
                return self.scan(times)
            case Batch(size=size):
                self.lab.batch(size)
            case Migrate():
                return self.migrate(step)
            case Write(process=process, region=region, label=label):
                for first, count in runs(self.chosen(step)):
                    address = self.address(process, region, first)
                    self.lab.store(self.processes[process], address, [self.content(label)] * count)
            case Discard():
                self.each_run(step, self.lab.discard)
            case Unmap():
                self.unmapped[step.process].update((step.region, page) for page in self.chosen(step))
                self.each_run(step, self.lab.unmap)
            case Break(node=node):
                target = None if node is None else self.nodes[node]
                self.each_run(step, lambda *where: self.lab.break_sharing(*where, node=target))
            case Advise(mergeable=mergeable):
                self.each_run(step, lambda *where: self.lab.advise(*where, mergeable=mergeable))
            case Protect(writable=writable):
                self.each_run(step, lambda *where: self.lab.protect(*where, writable=writable))
            case Merge(process=process, on=on):
                self.merge(process, on)
            case Fork(process=process, child=child):
                self.processes[child] = self.lab.fork(self.processes[process], child)
                self.regions[child] = dict(self.regions[process])
                self.unmapped[child] = set(self.unmapped[process])
            case Exit(process=process):
                self.lab.exit(self.processes.pop(process))
            case Set():
                return self.set(number, step)
            case Unmerge():
                self.reset()
            case Sleep(milliseconds=milliseconds):
                self.lab.sleep(milliseconds / 1000)
            case Observe(label=label):
                self.outcome.observations[label] = self.look()
        return None

    def scan(self, times: int) -> int:
        done = 0
        while done < times and self.whole_batch():
            done += 1
        return done

    def whole_batch(self) -> bool:
        """One batch that ends a full scan; False where it did nothing, because nobody is registered.

        :raises CheckFailed: it ended none or several
        """
        before = self.full_scans()
        self.lab.batch(WHOLE)
        done = self.full_scans() - before
        if done not in (0, 1):
            raise CheckFailed("a single batch of ksmd", f"full_scans went up by {done}: somebody else wakes it")
        return done == 1

    def full_scans(self) -> int:
        return int(self.lab.sample().value("full_scans"))

    def migrate(self, step: Migrate) -> list[int]:
        process = self.processes[step.process]
        frames: dict[int, int] = {}
        for first, count in runs(self.chosen(step)):
            address = self.address(step.process, step.region, first)
            for page, state in enumerate(self.lab.pages(process, address, count)):
                # One address a frame: a second one of the same frame reads EBUSY (findings F4).
                if state.frame is not None and state.node is not None:
                    frames.setdefault(state.frame, address + page * self.size)
        if not frames:
            return []
        target = self.nodes[step.to]
        statuses = self.lab.move_pages(process, list(frames.values()), target, shared=step.shared)
        return [self.indices[status] if status >= 0 else status for status in statuses]

    def set(self, number: int, step: Set) -> dict[str, str]:
        said: dict[str, str] = {}
        for knob, value in step.knobs.items():
            try:
                self.lab.set(knob, value)
                said[knob] = ""
            except Rejected as error:
                said[knob] = errno.errorcode.get(error.errno or 0, "refused")
            self.outcome.expectations += step.fails not in ("", ANY_ERROR)
            if step.fails != ANY_ERROR and said[knob] != step.fails:
                found, wanted = said[knob] or "taken", step.fails or "taken"
                self.outcome.failures.append(f"{step_key(number, step)}: {knob} = {value} was {found}, not {wanted}")
        return said

    def merge(self, process: str, on: bool) -> None:
        try:
            self.lab.merge(self.processes[process], on=on)
        except Rejected as error:
            raise _Lacking("this kernel has no prctl(PR_SET_MEMORY_MERGE) (it came with 6.4)") from error

    # -- places --------------------------------------------------------------------------------------------

    def content(self, label: str) -> bytes:
        if label not in self.contents:
            self.contents[label] = page_content(label, self.size)
        return self.contents[label]

    def address(self, process: str, region: str, page: int) -> int:
        return self.regions[process][region][0] + page * self.size

    def chosen(self, step: RegionStep) -> tuple[int, ...]:
        if step.pages is not None:
            return step.pages
        return tuple(range(len(self.regions[step.process][step.region][1].pages)))

    def each_run(self, step: RegionStep, call: Callable[[ProcessId, int, int], None]) -> None:
        for first, count in runs(self.chosen(step)):
            call(self.processes[step.process], self.address(step.process, step.region, first), count)

    def pages(self) -> Iterator[tuple[str, PageState]]:
        """Every page of every process, by name."""
        for name, process in self.processes.items():
            gone = self.unmapped[name]
            for address, region in self.regions[name].values():
                there = tuple(page for page in range(len(region.pages)) if (region.name, page) not in gone)
                for first, count in runs(there):
                    for page, state in enumerate(self.lab.pages(process, address + first * self.size, count), first):
                        yield f"{name}.{region.name}.{page}", state

    def look(self) -> Observation:
        """Everything that can be seen now."""
        return observe(self.lab.sample(), self.start, self.pages(), self.indices)
