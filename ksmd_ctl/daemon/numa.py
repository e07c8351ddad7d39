# SPDX-License-Identifier: GPL-2.0-or-later
"""NUMA in the service: surveys in the background and on request, and migrations.

A survey costs CPU time of the host. So the background takes one seldom, within a share of one CPU, and none while
nothing is merged. A request gets a survey that is at most 5 s old, or 20 times the CPU time that it took
(`NumaWatch.nodes`). Simultaneous requests get the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Final, Generic, Protocol, TypeVar

from ksmd_ctl.codec import encode
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.dry_runs import DryRuns
from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import Survey
from ksmd_ctl.host.operation import Operation, Progress
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.reports.numa import Group, Largest, grouped, nodes_document, numa_section, processes_document
from ksmd_ctl.reports.saving import NOBODY_SAW, Counters
from ksmd_ctl.transactions.migration import Migration, MigrationOrder, MigrationResult

T = TypeVar("T")

# The first survey, after the start.
_FIRST_SECONDS: Final = 3.0
# After failures the next survey is later: 2, 4, 8, 16 times the interval.
_MOST_DOUBLINGS: Final = 4
# A survey that is no older than this answers a request.
_FRESH_SECONDS: Final = 5.0
# A survey for a request has at least this budget.
_ASKED_BUDGET_SECONDS: Final = 1.0
# Enough to count all frames of the largest host.
_MOST_BUDGET_SECONDS: Final = 60.0


class Answer(Protocol):
    """Where the answer of a job goes. Called on the event loop, never from within the request."""

    def progress(self, parameters: Mapping[str, object]) -> None:
        """Progress."""

    def done(self, parameters: Mapping[str, object]) -> None:
        """The job is done; its result."""

    def failed(self, error: KsmdError) -> None:
        """The job failed."""


class Job(Protocol):
    """Work that was started by a request."""

    def cancel(self) -> None:
        """The client is gone, or wants it stopped; the answer may still come."""


class NumaWatch:
    """Keeps the latest survey, and moves memory.

    :param config: gives the current configuration
    :param changed: called when there is a new survey
    :param busy: what else moves or un-merges pages now, as a phrase; empty for nothing
    :param counters: whether KSM's counters are up to date
    :ivar failures: number of failed surveys
    :ivar moving: the running migration as a phrase; empty for none
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
        # Nodes or their memory have changed since the latest survey.
        self._stale = False
        self._nodes: Set[int] = frozenset()
        self._waiting: list[Waiting[Survey]] = []
        self._dry_runs = DryRuns()
        self._migration: Running[MigrationResult] | None = None
        self.moving = ""
        self.failures = 0
        self.surveys = 0

    @property
    def surveyed_at(self) -> float | None:
        """When the latest survey began, by `Host.clock`."""
        return None if self._survey is None else self._survey.time_seconds

    def section(self) -> Mapping[str, object] | None:
        """The `numa` part of a report; None before the first survey."""
        if self._section is None:
            return None
        return {"surveys": self.surveys, "failures": self.failures, **self._section}

    @property
    def merging_pages(self) -> int | None:
        """Merged pages of all processes in the latest survey; None if the kernel or the survey lacks a process's."""
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
        """Start a survey if it is due."""
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
                # Nothing was merged and nothing is. Once something is merged, a survey is due at once.
                return
        self._start(self._budget())

    def stale(self) -> None:
        """Nodes or their memory have changed: start a survey at the next tick."""
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
            # Its cost is unknown; the next one may fail as well.
            self._failed_in_a_row += 1
            spent = self._budget() * 2 ** min(self._failed_in_a_row, _MOST_DOUBLINGS)
            self.failures += 1
            self._error = str(came)
        else:
            self.surveys += 1
            self._failed_in_a_row = 0
            self._survey, self._error, spent = came, "", came.cpu_seconds
        # After an expensive survey the next one is later, so that the CPU share holds.
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
        self._section = numa_section(self._survey, groups, other, self._error, self._config().floor_bytes)
        self._changed()

    # -- requests --------------------------------------------------------------------------------------------

    def nodes(self, answer: Answer) -> Job:
        """The document of ``ksmd-ctl nodes``."""

        def make(survey: Survey) -> dict[str, object]:
            floor_bytes = self._config().floor_bytes
            return {"nodes": nodes_document(self._host.identity, self._host.sample(), survey, floor_bytes)}

        return self._ask(answer, make)

    def processes(self, answer: Answer) -> Job:
        """The document of ``ksmd-ctl processes``."""

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
        # Repeated requests must not keep a CPU busy if surveys are expensive.
        age = self._host.clock() - survey.time_seconds
        return not self._stale and age < max(_FRESH_SECONDS, 20 * survey.cpu_seconds)

    def _give(self, came: Survey | KsmdError) -> None:
        self._running = None
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.give(came)

    # -- moving ----------------------------------------------------------------------------------------------

    def migrate(self, order: MigrationOrder, answer: Answer) -> Job:
        """Move memory, or with `dry_run` find out what that would do.

        :raises KsmdError: it can't be done, or another migration is running
        """
        if self._migration is not None and not order.dry_run:
            raise Refused("moving memory", "the service is moving memory already", hint="try again when it is done")
        if not order.dry_run and (other := self._busy()):
            raise Refused("moving memory", other, hint="`ksmd-ctl status` shows how far a transaction is")

        def done(came: MigrationResult | KsmdError) -> None:
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
        """Stop everything."""
        self._dry_runs.close()
        for running in (self._running, self._migration):
            if running is not None:
                running.abandon()
        self._running = self._migration = None


class Waiting(Generic[T]):
    """A request that waits for a document, with others.

    :param make: makes the document from the result that they all wait for
    """

    def __init__(self, answer: Answer, make: Callable[[T], Mapping[str, object]]) -> None:
        self._answer = answer
        self._make = make

    def cancel(self) -> None:
        """Nothing is stopped: others may wait for it, and the client may only have closed its sending side."""

    def give(self, came: T | KsmdError) -> None:
        """Answer with the result."""
        try:
            if isinstance(came, KsmdError):
                raise came
            document = self._make(came)
        except KsmdError as error:
            self._answer.failed(error)
        else:
            self._answer.done(document)
