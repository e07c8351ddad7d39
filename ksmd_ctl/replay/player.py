# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays a recording on a simulated host of its sample's size: pages change and knobs are written as they were recorded,
or the knobs as somebody else decides.

When a page was written between two looks isn't known: it is spread over that time. A page that is first seen mapped
more than once was merged, or shared by fork, before the recording began; so it is merged at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from ksmd_ctl.config.model import Config
from ksmd_ctl.engine.machine import Process
from ksmd_ctl.engine.memory import PAGE_SHIFT, Page
from ksmd_ctl.engine.migrate import migrate_page
from ksmd_ctl.engine.mm import Vma, write_fault, zap_pte
from ksmd_ctl.engine.profile import profile
from ksmd_ctl.engine.state import AdvisorMode, folio_test_ksm, page_to_nid
from ksmd_ctl.errors import KsmdError, Rejected, UsageError
from ksmd_ctl.host.knobs import KNOBS, SYSFS_KNOBS, Knob, KnobValue, same_value
from ksmd_ctl.host.sample import HostKind, Sample
from ksmd_ctl.policies.policy_runner import PolicyRunner
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.replay.domains import DomainNodes, DomainPages, domain_pages
from ksmd_ctl.replay.miniature import MiniatureHost, MiniatureMachine, content_of
from ksmd_ctl.replay.pace import SIMULATED, measure
from ksmd_ctl.replay.progress import first_reached, read_progress
from ksmd_ctl.replay.rewritten import REWRITTEN
from ksmd_ctl.replay.timing import Changes, Shares, read_pages

_TICK_SECONDS: Final = 1.0
_WARM_SCANS: Final = 3
# Switching the advisor sets pages_to_scan; run comes when all else is as it should be.
_ORDER: Final = (
    *(knob for knob in SYSFS_KNOBS if knob not in (Knob.ADVISOR_MODE, Knob.PAGES_TO_SCAN, Knob.RUN)),
    Knob.ADVISOR_MODE,
    Knob.PAGES_TO_SCAN,
    Knob.RUN,
)


class Point(NamedTuple):
    """One moment: what was recorded, and what the simulated host reads."""

    recorded: Sample
    replayed: Sample


@dataclass(frozen=True, slots=True)
class Choices:
    """What is to be other than recorded.

    :ivar knobs: values that hold all the time
    :ivar config: with a policy that decides about the knobs; None to write them as they were recorded. Knobs that
        neither it nor its policy names are written as they were recorded
    :ivar profile: of the engine, empty for the recorded one
    :ivar apart: trust domains are kept apart, each on nodes of its own
    """

    knobs: Mapping[Knob, KnobValue]
    config: Config | None = None
    profile: str = ""
    apart: bool = False

    @property
    def as_recorded(self) -> bool:
        """Whether nothing is other than recorded; a policy that writes nothing changes nothing."""
        other = self.knobs or self.profile or self.apart
        return not other and (self.config is None or not self.config.policy.writes)


class Player:
    """A recording that is played once.

    :ivar host: the simulated host
    :ivar refused: writes of knobs that the simulated host refused, in words
    :ivar sampling_error: the standard error that the sample brings to pages_sharing, as a share of the whole; None
        where it has no equal pages
    """

    def __init__(self, recording: Recording, choices: Choices) -> None:
        """
        :raises UsageError: the recording has no samples, or the profile is not known or lacks a chosen knob
        """
        self._choices = choices
        self.samples = list(recording.samples())
        if not self.samples:
            raise UsageError("reading the recording", "it has no samples", hint="record for longer")
        try:
            kind = profile(choices.profile or recording.facts.profile)
        except ValueError as error:
            raise UsageError("choosing the engine's profile", str(error), hint="--profile names another") from error
        if lacking := [knob for knob in choices.knobs if knob not in kind.knobs]:
            why = f"profile {kind.name} does not have {lacking[0]}"
            raise UsageError("choosing knobs", why, hint="--profile names another")
        nodes = max(recording.nodes(), default=0) + 1
        self._apart = DomainNodes(recording, nodes) if choices.apart else None
        nodes = nodes if self._apart is None else self._apart.nodes
        pace = SIMULATED if recording.facts.kind == HostKind.ENGINE else measure(self.samples)
        machine = MiniatureMachine(nodes, kind, recording.facts.one_in, pace)
        self.host = MiniatureHost(machine)
        self.refused: dict[str, None] = {}
        self._processes = {one.process: one for one in recording.processes()}
        self._domains = {one.process: one.domain for one in self._processes.values() if one.domain is not None}
        # When ksmd first came to them, where it is followed.
        self._reached: Mapping[int, float] = {}
        progress = None if recording.facts.kind == HostKind.ENGINE else read_progress(self.samples)
        if progress is not None:
            self._reached = first_reached(progress, recording.counts())
            if choices.as_recorded:
                machine.progress = progress
        self._awaited: set[int] = set()
        self._sampled = recording.facts.one_in > 1
        self._families: dict[int, list[int]] = {}
        for process in self._processes.values():
            if process.family:
                self._families.setdefault(process.family, []).append(process.process)
        self._memory: dict[int, _Memory] = {}
        history = read_pages(recording)
        self._places, self._changes, self._shares = history.places, dict(history.changes), history.shares
        self.sampling_error = history.sampling_error
        # For how many pages one of each process stands, as far as a look has told.
        self._weights: dict[int, float] = {}
        for _, share in reversed(self._shares):
            self._weights |= share.processes
        self._runner = None
        if choices.config is not None and choices.config.policy.writes:
            self._runner = PolicyRunner(choices.config, recording.facts.page_size_bytes)
        self._tick_at = 0.0
        # What the policy and its configuration hold.
        self._wanted: Mapping[Knob, KnobValue] = {}

    def play(self) -> Iterator[Point]:
        """What was recorded and what the engine made of it, sample by sample."""
        self._begin()
        events = iter([*self._events(), _Event(math.inf)])
        event = next(events)
        for recorded in self.samples:
            while event.seconds <= recorded.time_seconds:
                self._run_until(event.seconds)
                self._apply(event)
                event = next(events)
            self._run_until(recorded.time_seconds)
            self.host.recorded = recorded
            yield Point(recorded, self.host.sample())

    def domain_pages(self) -> tuple[DomainPages, ...]:
        """What each trust domain has merged and shares, now."""
        weights, share = self.host.machine.weights, self.host.machine.share
        there = [(number, one.vma, weights.get(one.process.mm, share)) for number, one in self._memory.items()]
        return domain_pages(self._domains, there)

    def _node(self, number: int, recorded: int) -> int:
        """The node of a process's page."""
        return recorded if self._apart is None else self._apart.node(number, recorded)

    def _begin(self) -> None:
        first = self.samples[0]
        values = {knob: first.knob(knob) for knob in _ORDER}
        if (run := values[Knob.RUN]) not in (0, 1):
            values[Knob.RUN] = int(run or 0) & 1
        values |= self._choices.knobs
        run = values.pop(Knob.RUN)
        self._set({knob: value for knob, value in values.items() if value is not None})
        machine, start = self.host.machine, self._changes.pop(0.0, {})
        for number in sorted(start, key=self._place):
            self._memory_of(number)
        merged = bool(first.number("pages_shared"))
        if merged:
            self._write(start, shared=True)
            smart, machine.ksm.smart_scan = machine.ksm.smart_scan, False
            machine.scan(_WARM_SCANS)
            machine.ksm.smart_scan = smart
        self._write(start, shared=False if merged else None)
        self.host.begin()
        self.host.recorded = first
        if machine.progress is not None:
            # Where they are in ksmd's list is known when it comes to them.
            self._awaited = self._reached.keys() - start.keys()
        if run is not None:
            self._set({Knob.RUN: run})

    def _place(self, number: int) -> tuple[float, float, int]:
        """Where a process that ran when the recording began is in ksmd's list: in the order of a first scan."""
        return self._reached.get(number, -1.0), self._processes[number].began, number

    def _events(self) -> list[_Event]:
        found = [_Event(seconds, changes=changes) for seconds, changes in self._changes.items()]
        found += [_Event(seconds, share=share) for seconds, share in self._shares]
        found += [_Event(one.ended, gone=one.process) for one in self._processes.values() if one.ended is not None]
        if self.host.machine.progress is not None:
            found += [_Event(self._reached[number], reached=number) for number in self._awaited]
        for before, sample in pairwise(self.samples):
            values = {knob: sample.knob(knob) for knob in _ORDER if sample.knob(knob) != before.knob(knob)}
            known = {knob: value for knob, value in values.items() if value is not None}
            if known.keys() - self._choices.knobs.keys():
                found.append(_Event((before.time_seconds + sample.time_seconds) / 2, knobs=known))
        return sorted(found, key=lambda event: event.seconds)

    def _apply(self, event: _Event) -> None:
        if event.share:
            self.host.machine.share = event.share.pages
            self._weights |= event.share.processes
            for number, memory in self._memory.items():
                self.host.machine.weights[memory.process.mm] = self._weights.get(number, event.share.pages)
            self.host.shared_share, self.host.sharing_share = event.share.shared, event.share.sharing
        if event.changes:
            self._write(event.changes, shared=None)
        if event.knobs:
            held = self._choices.knobs.keys() | self._wanted.keys()
            self._set({knob: value for knob, value in event.knobs.items() if knob not in held})
        if event.reached in self._awaited:
            self._awaited.remove(event.reached)
            if (reached := self._memory.get(event.reached)) is not None:
                self._register(reached)
                self.host.machine.reach(reached.process.mm)
        if event.gone is not None and event.gone in self._memory:
            memory, machine = self._memory.pop(event.gone), self.host.machine
            machine.exit(memory.process.pid)
            machine.weights.pop(memory.process.mm, None)
            machine.rewritten.pop(memory.vma, None)

    def _run_until(self, seconds: float) -> None:
        machine = self.host.machine
        while self._runner is not None and self._tick_at <= seconds:
            machine.run_until(round(self._tick_at * 1e9))
            desired = self._runner.tick(self.host.sample())
            self._wanted = {knob: want.value for knob, want in desired.knobs.items()} | dict(self._choices.knobs)
            self._set(self._wanted)
            within = self._runner.decision.within_seconds
            self._tick_at = max(self._tick_at, machine.ksm.now_ns / 1e9) + min(_TICK_SECONDS, within or _TICK_SECONDS)
        machine.run_until(round(seconds * 1e9))

    # -- knobs -----------------------------------------------------------------------------------------------

    def _set(self, values: Mapping[Knob, KnobValue]) -> None:
        known = self.host.machine.ksm.profile.knobs
        for knob in _ORDER:
            if (value := values.get(knob)) is None or knob not in known:
                continue
            if same_value(knob, self.host.read(knob), value):
                continue
            if knob is Knob.PAGES_TO_SCAN and self.host.machine.ksm.advisor is not AdvisorMode.NONE:
                continue  # The advisor, which is simulated too, sets it.
            try:
                self._set_one(knob, value)
            except KsmdError as error:
                self.refused[str(error)] = None

    def _set_one(self, knob: Knob, value: KnobValue) -> None:
        try:
            self.host.set(knob, value)
        except Rejected:
            if not KNOBS[knob].needs_unmerge or self._runner is not None:
                raise
            # On the recorded host somebody un-merged everything in between.
            run = self.host.read(Knob.RUN)
            self.host.set(Knob.RUN, 2)
            self.host.set(knob, value)
            self.host.set(Knob.RUN, run)

    # -- pages -----------------------------------------------------------------------------------------------

    def _memory_of(self, number: int) -> _Memory:
        found = self._memory.get(number)
        if found is None:
            recorded = self._processes[number]
            machine, places = self.host.machine, self._places[number]
            # Copies of what is un-merged are where the process belongs.
            home = recorded.home if recorded.home in range(machine.memory.nr_node_ids) else None
            if self._apart is not None:
                home = self._apart.node(number, home or 0)
            pid = machine.spawn(recorded.name, home or 0)
            machine.mmap(pid, len(places), home)
            process = machine.processes[pid]
            found = self._memory[number] = _Memory(process, process.mm.vmas[0], places)
            if number in self._weights:
                machine.weights[process.mm] = self._weights[number]
            if number not in self._awaited:
                self._register(found)
        return found

    def _register(self, memory: _Memory) -> None:
        pid, vma = memory.process.pid, memory.vma
        self.host.machine.madvise(pid, vma.start, len(memory.places), mergeable=True)

    def _write(self, changes: Changes, *, shared: bool | None) -> None:
        """Have pages change.

        :param shared: only those that had a frame with others, or only the others; None for all
        """
        machine, ksm = self.host.machine, self.host.machine.ksm
        for number, rows in changes.items():
            if (ended := self._processes[number].ended) is not None and ksm.now_ns / 1e9 > ended:
                continue
            memory = self._memory_of(number)
            vma, left = memory.vma, set()
            for row in rows:
                if shared is not None and shared != bool(row.frame):
                    continue
                index = memory.places[row.page]
                address = vma.start + (index << PAGE_SHIFT)
                if row.content == REWRITTEN:
                    machine.keep_writing(vma, address, self._node(number, row.node))
                    continue
                machine.rewritten.get(vma, {}).pop(address, None)
                if row.content is None:
                    zap_pte(ksm, vma, index)
                    left.add(address)
                    continue
                content, page, node = content_of(row.content), vma.ptes[index], self._node(number, row.node)
                if not isinstance(page, Page) or page.content != content:
                    if row.frame and (forked := self._forked(number, row.page, content)) is not None:
                        vma.anon_vma_prepare()
                        zap_pte(ksm, vma, index)
                        vma.ptes[index] = forked
                        forked.mapcount += 1
                        continue
                    write_fault(ksm, vma, address, content, node)
                # A merged page is on the node of its frame, which tells nothing of the process.
                page = vma.ptes[index]
                plain = isinstance(page, Page) and not folio_test_ksm(page) and not row.frame
                if plain and isinstance(page, Page) and page_to_nid(page) != node:
                    migrate_page(ksm, page, node)
            if left and self._sampled:
                machine.leave(vma.mm, left)

    def _forked(self, number: int, place: int, content: bytes) -> Page | None:
        """The page that fork shares: it has the same address in a fork of the same program."""
        for other in self._families.get(self._processes[number].family, ()):
            memory = self._memory.get(other)
            if memory is None or other == number or (index := memory.places.get(place)) is None:
                continue
            page = memory.vma.ptes[index]
            if isinstance(page, Page) and page.content == content:
                return page
        return None


class _Memory(NamedTuple):
    """A process of the simulated host, its one mapping, and where each recorded page is in it."""

    process: Process
    vma: Vma
    places: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class _Event:
    seconds: float
    changes: Changes = field(default_factory=dict)
    knobs: Mapping[Knob, KnobValue] = field(default_factory=dict)
    gone: int | None = None
    reached: int = 0
    share: Shares | None = None
