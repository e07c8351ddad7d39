# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether domains share memory, and whether they could: the audit and its verdicts (docs/domains.md).

A domain with nodes of its own is isolated if pages of different nodes are never merged (merge_across_nodes = 0, and no
zero page in place of pages), if its members can allocate on its nodes only and have no pages elsewhere, and if the same
holds of all others and their nodes. That no frame is shared is looked at as well: it is what the rest is for.

A domain without nodes of its own can't be isolated by anything that is looked at here: if it shares nothing, that is so
now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from ksmd_ctl.config.domains import Domains
from ksmd_ctl.domains.members import DomainMembers, domains_of
from ksmd_ctl.errors import Absent, Cancelled, KsmdError, ReadError
from ksmd_ctl.figures import count_text, plural, ranges_text
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ROUND_PAGES, Placements, Process, ProcessId, Survey
from ksmd_ctl.host.operation import Operation, Steps, waited
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.host.sharing import MOST_PROCESSES, GroupFigures, Sharing, figures, pairs

# How many are named where there are more.
_NAMED: Final = 3


class Verdict(StrEnum):
    """What an audit says of a domain."""

    ISOLATED = "isolated"
    NOTHING_SHARED = "nothing is shared now"
    NOT_ISOLATED = "not isolated"
    NO_MEMBERS = "no members"


class Cause(StrEnum):
    """Why a domain is not isolated."""

    SHARED_FRAMES = "shared frames"
    UNSEEN_MAPPINGS = "unseen mappings"
    NOT_LOOKED_AT = "not looked at"
    KNOB = "knob"
    NODES = "nodes"
    MAY_ALLOCATE_ELSEWHERE = "may allocate elsewhere"
    PAGES_ELSEWHERE = "pages elsewhere"
    OTHERS_ON_ITS_NODES = "others on its nodes"


@dataclass(frozen=True, slots=True)
class Violation:
    """One cause, and a phrase that says more of it."""

    cause: Cause
    text: str


@dataclass(frozen=True, slots=True)
class Stray:
    """A process that is, or may be, on nodes where it must not be.

    :ivar domain: that it belongs to
    :ivar allowed: those of these nodes that it may allocate on
    :ivar pages: the pages of its mergeable memory on these nodes
    """

    process: ProcessId
    name: str
    unit: str
    domain: str
    allowed: frozenset[int]
    pages: Mapping[int, int]

    def __str__(self) -> str:
        return f"{self.name} (pid {self.process.pid})"


@dataclass(frozen=True, slots=True)
class DomainAudit:
    """What an audit found of one domain.

    :ivar configured: it is one of the configuration's, and not a group that is its own domain
    :ivar processes: its members with mergeable memory; others are none, as nothing of theirs is merged
    :ivar units: what these belong to (`Process.group`), in order
    :ivar resident_pages: pages of their mergeable memory
    :ivar figures: its merged pages and what it shares; None where that could not be counted
    :ivar shared_with: frames that it shares with each other domain
    :ivar strays: members outside of its nodes; none where it has no nodes of its own
    :ivar intruders: processes of others on its nodes
    """

    name: str
    configured: bool
    nodes: frozenset[int]
    processes: int
    units: tuple[str, ...]
    resident_pages: int
    figures: GroupFigures | None
    shared_with: Mapping[str, int]
    strays: tuple[Stray, ...]
    intruders: tuple[Stray, ...]
    verdict: Verdict
    reasons: tuple[Violation, ...]

    @property
    def shared_frames(self) -> int | None:
        """Merged frames that others map, too."""
        return None if self.figures is None else self.figures.shared_frames

    @property
    def elsewhere_pages(self) -> int:
        """Pages of its mergeable memory outside of its nodes."""
        return sum(sum(stray.pages.values()) for stray in self.strays)


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found of all domains.

    :ivar time_seconds: `Host.clock` when the survey began
    :ivar share: the share of frames that was counted; None where none could be
    :ivar lacking: why none could be, empty where they were
    :ivar uncounted: processes whose frames were not counted, as there was no time; where they may be is known
    :ivar cpu_seconds: what it cost, survey and all
    :ivar cpusets: this host can confine processes to nodes
    """

    config: Domains
    time_seconds: float
    domains: tuple[DomainAudit, ...]
    share: float | None
    lacking: str
    uncounted: int
    cpu_seconds: float
    cpusets: bool

    @property
    def isolated(self) -> bool:
        """No domain is found to be not isolated."""
        return all(domain.verdict is not Verdict.NOT_ISOLATED for domain in self.domains)


def auditing(host: Host, config: Domains, survey: Survey, budget_cpu_seconds: float) -> Operation[Audit]:
    """Look where members may allocate and which frames they share, after a survey.

    :param budget_cpu_seconds: for counting frames
    """
    return Operation(_steps(host, config, survey, budget_cpu_seconds))


def _steps(host: Host, config: Domains, survey: Survey, budget_cpu_seconds: float) -> Steps[Audit]:
    for again in (True, False):
        found = domains_of(config, sorted(filter(_concerned, survey.processes), key=_size))
        placements = yield from waited(host.placements([one.id for domain in found for one in domain.processes]))
        sharing, lacking = None, ""
        try:
            sharing = yield from waited(host.sharing(_groups(found), budget_cpu_seconds))
        except Cancelled:
            raise
        except KsmdError as error:
            # All else can be told.
            lacking = str(error)
        if not (again and sharing is not None and sharing.unseen_frames and not sharing.unread):
            break
        # Whoever was started after the survey is not unseen for good.
        listed = yield from waited(host.processes())
        survey = replace(
            survey,
            processes=listed.processes,
            skipped=listed.skipped,
            unmergeable=listed.unmergeable,
            denied=listed.denied,
        )
    return audit(config, survey, found, placements, sharing, host.sample(), lacking)


def _concerned(process: Process) -> bool:
    """Whether a process has memory that may be merged."""
    return process.mergeable_mappings != 0 or process.merged_pages > 0


def _size(process: Process) -> tuple[int, ProcessId]:
    return -process.merged_pages, process.id


def _groups(found: Sequence[DomainMembers]) -> list[list[ProcessId]]:
    """Whose frames are counted: everybody's, or with too many processes those with most merged pages."""
    everybody = sorted((process for domain in found for process in domain.processes), key=_size)
    counted = {process.id for process in everybody[:MOST_PROCESSES]}
    return [[process.id for process in domain.processes if process.id in counted] for domain in found]


def audit(
    config: Domains,
    survey: Survey,
    found: Sequence[DomainMembers],
    placements: Placements,
    sharing: Sharing | None,
    sample: Sample,
    lacking: str = "",
) -> Audit:
    """What all this says of each domain.

    :param found: whose processes were looked at; those of `sharing` are its groups
    :param sharing: None where frames could not be counted; `lacking` says why
    """
    facts = _Facts(survey, placements, found, sharing, lacking, tuple(_knobs(sample)))
    cost = survey.cpu_seconds + placements.cpu_seconds + (0.0 if sharing is None else sharing.cpu_seconds)
    domains = tuple(facts.domain(number, one) for number, one in enumerate(found))
    share = None if sharing is None else sharing.share
    return Audit(config, survey.time_seconds, domains, share, lacking, facts.uncounted, cost, placements.cpusets)


def _knobs(sample: Sample) -> Iterator[Violation]:
    """What of the knobs lets pages of different nodes become one."""
    across = sample.readings.get(Knob.MERGE_ACROSS_NODES)
    if isinstance(across, Absent) or across is None:
        yield Violation(Cause.KNOB, "this kernel has no merge_across_nodes: it merges pages of all nodes")
    elif isinstance(across, ReadError):
        yield Violation(Cause.KNOB, f"merge_across_nodes can't be read: {across.why}")
    elif across != 0:
        yield Violation(Cause.KNOB, f"merge_across_nodes is {across}: pages of all nodes are merged")
    if sample.knob(Knob.USE_ZERO_PAGES) == 1:
        yield Violation(Cause.KNOB, "use_zero_pages is 1: the zero page is one for all nodes")


class _Facts:
    """All that was looked at, by the number of the domain."""

    def __init__(
        self,
        survey: Survey,
        placements: Placements,
        found: Sequence[DomainMembers],
        sharing: Sharing | None,
        lacking: str,
        knobs: tuple[Violation, ...],
    ) -> None:
        self.survey = survey
        self.placements = placements
        self.found = found
        self.lacking = lacking
        self.knobs = knobs
        memory = {node.number for node in self.survey.topology.with_memory()}
        owners = {node: number for number, one in enumerate(self.found) for node in one.nodes}
        self.strays: list[list[Stray]] = [[] for _ in found]
        self.intruders: list[list[Stray]] = [[] for _ in found]
        for number, one in enumerate(self.found):
            for process in one.processes:
                allowed = self.placements.nodes.get(process.id)
                if allowed is None:
                    # It has ended, or is among those that could not be looked at.
                    continue
                self._place(number, process, allowed & memory, owners)
        self.figures: list[GroupFigures | None] = [None] * len(found)
        self.shared_with: list[dict[str, int]] = [{} for _ in found]
        self.unseen: set[int] = set()
        if sharing is not None:
            for pair in pairs(sharing):
                for group, other in (pair.groups, pair.groups[::-1]):
                    if pair.frames:
                        self.shared_with[group][self.found[other].name] = pair.frames
            for shared in sharing.sets:
                if shared.merged and shared.unseen:
                    self.unseen.update(shared.groups)
        unread = set() if sharing is None else set(sharing.unread)
        if sharing is not None:
            # Of a domain of which no process was counted nothing is known.
            for number, (members, told) in enumerate(zip(_groups(found), figures(sharing), strict=True)):
                none = bool(found[number].processes) and unread.issuperset(process.pid for process in members)
                self.figures[number] = None if none else told
        late = unread & {process.pid for process in placements.nodes}
        merged = sum(process.merged_pages > 0 for one in found for process in one.processes)
        self.uncounted = len(late) + max(0, merged - MOST_PROCESSES)
        self.unread = tuple(self._unread(unread - late))

    def _place(self, number: int, process: Process, allowed: frozenset[int], owners: Mapping[int, int]) -> None:
        own = self.found[number].nodes
        pages = {node: count for node, count in process.resident_nodes.items() if count}
        places = allowed | pages.keys()

        def stray(nodes: Iterable[int]) -> Stray:
            there = {node: pages[node] for node in sorted(nodes) if node in pages}
            domain = self.found[number].name
            return Stray(process.id, process.name, process.unit, domain, allowed.intersection(nodes), there)

        if own and (outside := places - own):
            self.strays[number].append(stray(outside))
        for owner in {owners[node] for node in places if node in owners} - {number}:
            self.intruders[owner].append(stray(places & self.found[owner].nodes))

    def _unread(self, more: Iterable[int]) -> Iterator[Violation]:
        """What could not be looked at, whoever it belongs to."""
        names = {one.pid: f"{one.name} (pid {one.pid})" for one in self.survey.skipped}
        unread = {*names, *self.survey.denied, *self.placements.denied, *more}
        if unread:
            listed = _listed([names.get(pid, f"pid {pid}") for pid in sorted(unread)])
            said = f"{plural(len(unread), 'process', 'processes')} could not be looked at: {listed}"
            yield Violation(Cause.NOT_LOOKED_AT, said)
        if self.lacking:
            yield Violation(Cause.NOT_LOOKED_AT, f"which frames are shared could not be counted: {self.lacking}")

    def domain(self, number: int, one: DomainMembers) -> DomainAudit:
        """What there is to say of a domain."""
        reasons = (*self._of_nodes(one), *(self._of_members(number, one) if one.processes else ()))
        isolated = Verdict.ISOLATED if one.nodes else Verdict.NOTHING_SHARED
        return DomainAudit(
            name=one.name,
            configured=one.domain is not None,
            nodes=one.nodes,
            processes=len(one.processes),
            units=tuple(sorted({process.group for process in one.processes})),
            resident_pages=sum(sum(process.resident_nodes.values()) for process in one.processes),
            figures=self.figures[number],
            shared_with=self.shared_with[number],
            strays=tuple(self.strays[number]),
            intruders=tuple(self.intruders[number]),
            verdict=Verdict.NO_MEMBERS if not one.processes else Verdict.NOT_ISOLATED if reasons else isolated,
            reasons=reasons,
        )

    def _of_members(self, number: int, one: DomainMembers) -> Iterator[Violation]:
        if shared := self.shared_with[number]:
            # Everybody may read this: who else has some page must not be found out by making one (docs/security.md).
            told = [name for name, frames in shared.items() if frames >= ROUND_PAGES]
            largest = sorted(told, key=lambda name: (-shared[name], name))
            whom = _listed(largest) if largest else "other domains"
            yield Violation(Cause.SHARED_FRAMES, f"merged frames are shared with {whom}")
        # With processes that were not counted these may be theirs. Of a domain with nodes their places say enough.
        if number in self.unseen and not self.uncounted:
            said = "merged frames are also mapped by processes that belong to no domain, or could not be looked at"
            yield Violation(Cause.UNSEEN_MAPPINGS, said)
        if one.nodes:
            yield from self.knobs
            yield from self._of_places(number)
        elif self.uncounted:
            said = f"frames of {plural(self.uncounted, 'process', 'processes')} were not counted: they are too many"
            yield Violation(Cause.NOT_LOOKED_AT, said)
        yield from self.unread

    def _of_places(self, number: int) -> Iterator[Violation]:
        strays, intruders = self.strays[number], self.intruders[number]
        if may := [stray for stray in strays if stray.allowed]:
            nodes = ranges_text(node for stray in may for node in stray.allowed)
            said = f"{_processes(may)} may allocate on {_nodes(nodes)} as well: {_listed(may)}"
            if not self.placements.cpusets:
                said += "; this host has no cpuset controller, which confines processes to nodes"
            yield Violation(Cause.MAY_ALLOCATE_ELSEWHERE, said)
        if away := [stray for stray in strays if stray.pages]:
            pages = sum(sum(stray.pages.values()) for stray in away)
            nodes = ranges_text(node for stray in away for node in stray.pages)
            said = f"{plural(pages, 'page')} of {_processes(away)} on {_nodes(nodes)}: {_listed(away)}"
            yield Violation(Cause.PAGES_ELSEWHERE, said)
        if intruders:
            pages = sum(sum(stray.pages.values()) for stray in intruders)
            there = f"have {plural(pages, 'page')}" if pages else "may allocate"
            listed = _listed([f"{stray} of {stray.domain}" for stray in intruders])
            yield Violation(Cause.OTHERS_ON_ITS_NODES, f"others {there} on its nodes: {listed}")

    def _of_nodes(self, one: DomainMembers) -> Iterator[Violation]:
        """Nodes that can't hold its memory."""
        topology = self.survey.topology
        there = {node.number for node in topology.nodes}
        memory = {node.number for node in topology.with_memory()}
        alone = "" if len(memory) > 1 else "; numa=fake= divides its one node into several (docs/domains.md)"
        if missing := one.nodes - there:
            said = f"this host has no {_nodes(ranges_text(missing))}, but {ranges_text(there)}{alone}"
            yield Violation(Cause.NODES, said)
        if empty := (one.nodes & there) - memory:
            yield Violation(Cause.NODES, f"there is no memory on {_nodes(ranges_text(empty))}")


def _nodes(listed: str) -> str:
    return f"node{'' if listed.isdigit() else 's'} {listed}"


def _processes(strays: Sequence[Stray]) -> str:
    return plural(len(strays), "process", "processes")


def _listed(names: Sequence[object]) -> str:
    """The first few, and how many more there are."""
    said, more = ", ".join(map(str, names[:_NAMED])), len(names) - _NAMED
    return f"{said} and {count_text(more)} more" if more > 0 else said
