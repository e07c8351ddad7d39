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
from ksmd_ctl.kernel.kpageflags import runs
from ksmd_ctl.scenario.check import State
from ksmd_ctl.scenario.compare import Observation, Outcome, check_expectations, counters_of, observe
from ksmd_ctl.scenario.host_steps import Batch, Scan
from ksmd_ctl.scenario.memory_steps import RegionStep
from ksmd_ctl.scenario.model import Lacking, Region, Scenario, Step, step_key
from ksmd_ctl.scenario.separation import Separation
from ksmd_ctl.scenario.values import UNTOUCHED

# pages_to_scan of a batch that ends a full scan: more pages than a scenario can have.
_WHOLE = 1 << 24

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


Watch = Callable[[int, Step | None, "Run"], None]
"""Called before the first step (number 0, no step) and after each step."""


def run(scenario: Scenario, lab: Lab, profile: str, *watches: Watch) -> Outcome:
    """Carry a scenario out and end its processes.

    :param profile: the engine's profile, or the one that the kernel behaves like; for expectations
    :raises Refused: somebody else has memory registered with KSM
    :raises NoSuchProcess: somebody has killed one of its processes, which says nothing about the host
    :raises HostError: the host can't be set up for it
    """
    going = Run(scenario, lab)
    outcome = going.outcome
    try:
        going.need()
        going.begin()
        for watch in watches:
            watch(0, None, going)
        for number, step in enumerate(scenario.steps, 1):
            try:
                going.do(number, step)
            except NoSuchProcess:
                raise
            except (HostError, CheckFailed) as error:
                outcome.broken = f"{going.at}: {error}"
                break
            for watch in watches:
                watch(number, step, going)
    except Lacking as lacking:
        outcome.skipped = str(lacking)
    finally:
        going.end()
    if not outcome.skipped and not outcome.broken:
        check_expectations(scenario, outcome, profile)
    return outcome


class Run:
    """One scenario under way on one host; steps carry themselves out with it.

    :ivar at: the step under way, for errors
    :ivar state: who lives and what is mapped after the steps so far
    :ivar processes: those that live, by name
    :ivar addresses: of each process's regions, by name; also of processes that have ended
    :ivar nodes: the numbers of the nodes with memory; `indices` is the way back
    """

    def __init__(self, scenario: Scenario, lab: Lab) -> None:
        self.scenario = scenario
        self.lab = lab
        self.outcome = Outcome()
        self.at = ""
        self.state = State(scenario)
        self.processes: dict[str, ProcessId] = {}
        self.addresses: dict[str, dict[str, int]] = {}
        self.page_size = lab.identity.page_size_bytes
        self.nodes = sorted(node.number for node in lab.topology().with_memory())
        self.indices = {number: index for index, number in enumerate(self.nodes)}
        self._separation = Separation(self.state.domains, self.indices)
        self._start: dict[str, int] = {}
        self._contents: dict[str, bytes] = {}

    # -- before and after ----------------------------------------------------------------------------------

    def need(self) -> None:
        """Find out whether the host has what the scenario needs.

        :raises Lacking: it has not
        """
        if len(self.nodes) < self.scenario.nodes:
            raise Lacking(f"needs {self.scenario.nodes} nodes with memory; this host has {len(self.nodes)}")
        for knob, setting in self.scenario.knobs.items():
            if not setting.optional:
                self.need_knob(knob)
        lacks = self.lab.lacks_huge_pages() if any(region.huge for region in self.scenario.regions) else ""
        if self.scenario.domains:
            self.need_knob(Knob.MERGE_ACROSS_NODES)
            lacks = lacks or self.lab.lacks_cpusets()
        if lacks:
            raise Lacking(lacks)
        for step in self.scenario.steps:
            step.need(self)

    def need_knob(self, knob: Knob) -> None:
        """Find out whether the kernel has a knob.

        :raises Lacking: it has not
        """
        try:
            self.lab.read(knob)
        except Absent as error:
            raise Lacking(f"this kernel has no {knob} (it came with {KNOBS[knob].since})") from error

    def begin(self) -> None:
        """Un-merge, set the knobs, make sure that nobody else is there, and build processes and regions."""
        self.unmerge()
        for knob, value in _DEFAULTS.items():
            self._preset(knob, value)
        for knob, setting in self.scenario.knobs.items():
            self._preset(knob, setting.value)
        self._settle()
        self.unmerge()
        self._start = counters_of(self.lab.sample())
        for name in self.scenario.processes():
            domain = self.state.domains.get(name)
            nodes = frozenset(self.nodes[index] for index in domain.nodes) if domain else frozenset()
            self.processes[name] = self.lab.spawn(name, nodes)
            self.addresses[name] = {}
        for region in self.scenario.regions:
            process = self.processes[region.process]
            address = self.map(region.process, region)
            contents = [None if label == UNTOUCHED else self.content(label) for label in region.pages]
            if any(content is not None for content in contents):
                self.lab.store(process, address, contents)
            if region.huge and not all(self.lab.collapse(process, address, len(region.pages))):
                raise HostError(f"making {region.process}.{region.name}", "the kernel had no huge page at hand")
        # In the order of the file, so that processes register in order of first appearance.
        for region in self.scenario.regions:
            if region.mergeable:
                address = self.addresses[region.process][region.name]
                self.lab.advise(self.processes[region.process], address, len(region.pages), mergeable=True)
        self.outcome.expectations += bool(self.scenario.domains)

    def _preset(self, knob: Knob, value: int | str) -> None:
        try:
            self.lab.set(knob, value)
        except Absent:
            # Of the scenario's own knobs, only optional ones can be missing: `need` has looked.
            pass
        except Rejected as error:
            if error.errno != errno.EBUSY:
                raise
            raise _foreign(f"{knob} can't be changed") from error

    def _settle(self) -> None:
        # With none of our processes there, full_scans must not advance: it does for registered ones only.
        for _ in range(_SETTLING_BATCHES):
            if not self.whole_batch():
                return
        raise _foreign("full scans go on")

    def end(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            self.lab.exit(process)
        self.processes.clear()

    # -- steps ---------------------------------------------------------------------------------------------

    def do(self, number: int, step: Step) -> None:
        """Carry a step out."""
        self.at = step_key(number, step)
        event = step.run(self)
        step.check(self.state)
        if not isinstance(step, Scan | Batch):
            self._look_at_domains()
        if event is not None:
            self.outcome.events.append({"step": number, step.kind: event})

    def map(self, process: str, region: Region) -> int:
        """Map a region in a process, untouched; its address."""
        node = None if region.node is None else self.nodes[region.node]
        address = self.lab.map(self.processes[process], len(region.pages), node)
        self.addresses[process][region.name] = address
        return address

    def unmerge(self) -> None:
        """Un-merge everything and stop ksmd."""
        self.lab.set(Knob.RUN, 2)
        self.lab.set(Knob.RUN, 0)

    def whole_batch(self) -> bool:
        """One batch that ends a full scan; False where it did nothing, because nobody is registered.

        :raises CheckFailed: it ended none or several
        """
        before = self._full_scans()
        self.batch(_WHOLE)
        done = self._full_scans() - before
        if done not in (0, 1):
            raise CheckFailed("a single batch of ksmd", f"full_scans went up by {done}: somebody else wakes it")
        return done == 1

    def batch(self, pages: int) -> None:
        """One batch of ksmd. It leaves domains apart, unless pages merge across nodes or had strayed before."""
        self.lab.batch(pages)
        for names in self._look_at_domains():
            if self.lab.read(Knob.MERGE_ACROSS_NODES) == 0:
                self.outcome.failures.append(f"{self.at}: {', '.join(names)} share a frame across domains")

    def _look_at_domains(self) -> list[list[str]]:
        if not self.scenario.domains:
            return []
        found = self._separation.look(self.pages(ksm=False))
        self.outcome.strays, self.outcome.across = self._separation.with_strays, self._separation.with_across
        return found

    def _full_scans(self) -> int:
        return int(self.lab.sample().value("full_scans"))

    def content(self, label: str) -> bytes:
        """The content of a page with a label."""
        if label not in self._contents:
            self._contents[label] = page_content(label, self.page_size)
        return self._contents[label]

    def address(self, process: str, region: str, page: int) -> int:
        """Where a page is or was."""
        return self.addresses[process][region] + page * self.page_size

    def ranges(self, step: RegionStep) -> Iterator[tuple[ProcessId, int, int]]:
        """The adjacent pages that a step is about: process, address, number of pages."""
        whole = self.state.processes[step.process][step.region].length
        for first, end in runs(range(whole) if step.pages is None else step.pages, 1):
            yield self.processes[step.process], self.address(step.process, step.region, first), end - first

    # -- observing -----------------------------------------------------------------------------------------

    def pages(self, *, ksm: bool = True) -> Iterator[tuple[str, PageState]]:
        """Every mapped page of every process, by name."""
        for process in self.processes:
            for name, _, state in self._mapped(process, ksm=ksm):
                yield name, state

    def _mapped(self, process: str, *, ksm: bool) -> Iterator[tuple[str, int, PageState]]:
        for region, memory in self.state.processes[process].items():
            for first, end in runs(memory.mapped, 1):
                start = self.address(process, region, first)
                states = self.lab.pages(self.processes[process], start, end - first, ksm=ksm)
                for page, state in enumerate(states):
                    yield f"{process}.{region}.{first + page}", start + page * self.page_size, state

    def strays(self, process: str) -> Iterator[tuple[int, PageState]]:
        """The pages of a process that are not on a node of its domain, by address."""
        home = self.state.domains[process].nodes
        for _, address, state in self._mapped(process, ksm=False):
            if state.node is not None and self.indices[state.node] not in home:
                yield address, state

    def look(self) -> Observation:
        """Everything that can be seen now."""
        return observe(self.lab.sample(), self._start, self.pages(), self.indices)


def _foreign(sign: str) -> Refused:
    return Refused(
        "running a scenario",
        f"somebody else's memory is registered with KSM ({sign}), and would be in every figure",
        hint="`ksmd-ctl processes` shows whose; end it, or run this in a virtual machine of its own",
    )
