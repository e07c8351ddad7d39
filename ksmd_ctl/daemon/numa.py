# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's eyes and hands on NUMA: surveys in the background and on demand, and migrations.

Looking takes CPU time of other processes than this one, but of the same host. So it is done seldom, within a share
of one CPU, and not at all while nothing is merged; whoever asks gets a survey that is 5 s old at most, or 20
times the CPU time that it took (`NumaWatch.nodes`), and those who ask at the same time get the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Final, Generic, Protocol, TypeVar

from ksmd_ctl.codec import encode
from ksmd_ctl.config.model import Config
from ksmd_ctl.control.executor import Migration
from ksmd_ctl.control.groups import Group, Largest, grouped
from ksmd_ctl.control.migration import Order, Outcome
from ksmd_ctl.control.numa import nodes_document, numa_section, processes_document
from ksmd_ctl.control.saving import NOBODY_SAW, Counters
from ksmd_ctl.daemon.dry_runs import DryRuns
from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import Survey
from ksmd_ctl.host.operation import Operation, Progress
from ksmd_ctl.host.sample import Sample

T = TypeVar("T")

# After the start the host has other things to do first.
_FIRST_SECONDS: Final = 3.0
# A look that fails time and again is tried less and less often: 2, 4, 8, 16 times the interval.
_MOST_DOUBLINGS: Final = 4
# What was found so short a time ago is what somebody who asks wants to know.
_FRESH_SECONDS: Final = 5.0
# For those who ask, a survey is better than the background's where that has little time.
_ASKED_BUDGET_SECONDS: Final = 1.0
# Nothing takes longer than to count all frames of the largest host, and somebody may wait for it to be over.
_MOST_BUDGET_SECONDS: Final = 60.0


class Answer(Protocol):
    """Where an answer goes that takes its time. Called on the event loop, and never from within the request."""

    def progress(self, parameters: Mapping[str, object]) -> None:
        """How far it is; nobody may want to know."""

    def done(self, parameters: Mapping[str, object]) -> None:
        """It is over, and this came of it."""

    def failed(self, error: KsmdError) -> None:
        """It is over, and failed."""


class Job(Protocol):
    """What was begun for somebody."""

    def cancel(self) -> None:
        """They are gone, or want it stopped; the answer may still come."""


class NumaWatch:
    """Keeps the latest survey, and moves memory for those who may ask for it.

    :param config: gives the configuration that is in force
    :param changed: is called when there is a new survey
    :param busy: what else moves or un-merges pages now, as a phrase; empty for nothing
    :param counters: whether KSM's counters say what is merged now
    :ivar failures: how often looking failed
    :ivar moving: the migration that is under way, as a phrase; empty for none
    """

    def __init__(
        self,
        host: Host,
        config: Callable[[], Config],
        changed: Callable[[], None],
        busy: Callable[[], str] = lambda: "",
        counters: Callable[[], Counters] = lambda: NOBODY_SAW,
    ) -> None:
        self._host = host
        self._config = config
        self._changed = changed
        self._busy = busy
        self._counters = counters
        self._survey: Survey | None = None
        self._error = ""
        self._failed_in_a_row = 0
        self._largest = Largest()
        self._section: dict[str, object] | None = None
        self._running: Running[Survey] | None = None
        self._due = host.clock() + _FIRST_SECONDS
        # What the latest survey says may not be so any more.
        self._stale = False
        self._nodes: Set[int] = frozenset()
        self._waiting: list[Waiting[Survey]] = []
        self._dry_runs = DryRuns()
        self._migration: Running[Outcome] | None = None
        self.moving = ""
        self.failures = 0
        self.surveys = 0

    @property
    def surveyed_at(self) -> float | None:
        """When the latest survey began, by `Host.clock`."""
        return None if self._survey is None else self._survey.time_seconds

    def section(self) -> Mapping[str, object] | None:
        """What a report has of it; None before the first survey."""
        if self._section is None:
            return None
        return {"surveys": self.surveys, "failures": self.failures, **self._section}

    @property
    def merging_pages(self) -> int | None:
        """Merged pages of all processes in the latest survey, as the kernel counts them.

        None where it doesn't, or a process could not be looked at.
        """
        if self._survey is None or self._survey.skipped or self._survey.denied:
            return None
        counts = [process.merging_pages for process in self._survey.processes]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def ksm_pages(self) -> Mapping[str, int | None]:
        """KSM pages by node in the latest survey."""
        if self._survey is None:
            return {}
        census, nodes = self._survey.census, self._survey.topology.nodes
        return {str(node.number): None if census is None else census.pages.get(node.number, 0) for node in nodes}

    # -- in the background -----------------------------------------------------------------------------------

    def tick(self, sample: Sample) -> None:
        """Look again if it is time to."""
        if sample.nodes.keys() != self._nodes:
            if self._nodes:
                self.stale()
            self._nodes = sample.nodes.keys()
        if self._running is not None or sample.time_seconds < self._due or not self._config().census_cpu_share:
            return
        survey = self._survey
        if survey is not None and survey.census is not None and not self._stale:
            merged = any(sample.number(name) for name in ("pages_shared", "ksm_zero_pages"))
            if not merged and not any(survey.census.pages.values()):
                # Nothing is merged, and that is what was found the last time. Once something is, it is due at once.
                return
        self._start(self._budget())

    def stale(self) -> None:
        """Nodes or their memory have changed: look at the next tick."""
        self._due = self._host.clock()
        self._stale = True

    def _budget(self) -> float:
        config = self._config()
        return min(config.census_interval * config.census_cpu_share, _MOST_BUDGET_SECONDS)

    def _start(self, budget_cpu_seconds: float) -> None:
        self._stale = False
        self._running = Running(self._host.survey(budget_cpu_seconds), self._took)

    def _took(self, came: Survey | KsmdError) -> None:
        self._running = None
        config, now = self._config(), self._host.clock()
        if isinstance(came, KsmdError):
            # What it has cost nobody says; it may have been all of its budget, and the next one may fail as well.
            self._failed_in_a_row += 1
            spent = self._budget() * 2 ** min(self._failed_in_a_row, _MOST_DOUBLINGS)
            self.failures += 1
            self._error = str(came)
        else:
            self.surveys += 1
            self._failed_in_a_row = 0
            self._survey, self._error, spent = came, "", came.cpu_seconds
        # One that was dearer than its share is paid for by waiting longer.
        share = config.census_cpu_share
        if not self._stale:
            self._due = now + max(config.census_interval, spent / share if share else 0.0)
        self._render()
        self._give(came)

    def _render(self) -> None:
        groups: tuple[Group, ...] = ()
        other = Group("")
        if self._survey is not None:
            found = grouped(self._survey.processes, self._host.identity.page_size_bytes)
            groups, other = self._largest.choose(found)
        self._section = numa_section(self._survey, groups, other, self._error)
        self._changed()

    # -- for those who ask -----------------------------------------------------------------------------------

    def nodes(self, answer: Answer) -> Job:
        """Where KSM pages are: a document."""

        def make(survey: Survey) -> dict[str, object]:
            return {"nodes": nodes_document(self._host.identity, self._host.sample(), survey)}

        return self._ask(answer, make)

    def processes(self, answer: Answer) -> Job:
        """Who gains from merging: a document."""

        def make(survey: Survey) -> dict[str, object]:
            sample = self._host.sample()
            return {
                "processes": processes_document(self._host.identity, survey.listed, sample, survey, self._counters())
            }

        return self._ask(answer, make)

    def _ask(self, answer: Answer, make: Callable[[Survey], Mapping[str, object]]) -> Job:
        waiting = Waiting(answer, make)
        self._waiting.append(waiting)
        survey = self._survey
        if self._running is None:
            if survey is not None and self._is_fresh(survey):
                self._running = Running(Operation.done(survey), self._give)
            else:
                self._start(max(self._budget(), _ASKED_BUDGET_SECONDS))
        return waiting

    def _is_fresh(self, survey: Survey) -> bool:
        # Who asks over and over must not keep a CPU busy where looking is dear.
        age = self._host.clock() - survey.time_seconds
        return not self._stale and age < max(_FRESH_SECONDS, 20 * survey.cpu_seconds)

    def _give(self, came: Survey | KsmdError) -> None:
        self._running = None
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.give(came)

    # -- moving ----------------------------------------------------------------------------------------------

    def migrate(self, order: Order, answer: Answer) -> Job:
        """Move memory, or find out what that would do.

        :raises KsmdError: it can't be done, or somebody else's is under way
        """
        if self._migration is not None and not order.dry_run:
            raise Refused("moving memory", "the service is moving memory already", hint="try again when it is done")
        if not order.dry_run and (other := self._busy()):
            raise Refused("moving memory", other, hint="`ksmd-ctl status` shows how far a transaction is")

        def done(came: Outcome | KsmdError) -> None:
            if not order.dry_run:
                self._migration, self.moving = None, ""
            if isinstance(came, KsmdError):
                answer.failed(came)
                return
            if not order.dry_run:
                self.stale()
            answer.done({"result": came.document(), "progress": None})

        def progress(at: Progress) -> None:
            answer.progress({"progress": encode(at), "result": None})

        limited = order.within(self._config().floor_bytes, self._config().batch_latency)
        order.check()
        if order.dry_run:
            return self._dry_runs.begin(lambda: Migration(self._host, limited), done, progress)
        self._migration = Running(Migration(self._host, limited), done, progress)
        whose = f"process {order.pid}" if order.pid is not None else f"unit {order.unit}"
        self.moving = f"the service is moving memory of {whose} to node {order.to}"
        return self._migration

    def close(self) -> None:
        """The service ends: stop what runs."""
        self._dry_runs.close()
        for running in (self._running, self._migration):
            if running is not None:
                running.abandon()
        self._running = self._migration = None


class Waiting(Generic[T]):
    """Somebody who waits for a document: a `Job`.

    :param make: makes the document of what the others wait for, too
    """

    def __init__(self, answer: Answer, make: Callable[[T], Mapping[str, object]]) -> None:
        self._answer = answer
        self._make = make

    def cancel(self) -> None:
        """Nothing to stop: others may wait for it, and who has only said everything still wants to know."""

    def give(self, came: T | KsmdError) -> None:
        """It is there, or failed."""
        try:
            if isinstance(came, KsmdError):
                raise came
            document = self._make(came)
        except KsmdError as error:
            self._answer.failed(error)
        else:
            self._answer.done(document)
