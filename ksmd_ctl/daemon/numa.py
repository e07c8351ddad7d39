# SPDX-License-Identifier: GPL-2.0-or-later
"""NUMA in the service: surveys in the background and on request, and migrations.

A survey costs CPU time of the host. So the background takes one seldom, within a share of one CPU, and none while
nothing is merged. A request gets a survey that is at most 5 s old, or 20 times the CPU time that it took
(`NumaWatch.nodes`). Simultaneous requests get the same one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from typing import Final

from ksmd_ctl.codec import encode
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import Survey
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import split_pages
from ksmd_ctl.reports.numa import Group, Largest, grouped, nodes_document, numa_section, processes_document
from ksmd_ctl.reports.saving import NOBODY_SAW, Counters
from ksmd_ctl.transactions.migration import Migration, MigrationOrder

# The first survey, after the start.
_FIRST_SECONDS: Final = 3.0
# After failures the next survey is later: 2, 4, 8, 16 times the interval.
_MOST_DOUBLINGS: Final = 4
# What is no older than this answers a request.
_FRESH_SECONDS: Final = 5.0
# A survey for a request has at least this budget.
_ASKED_BUDGET_SECONDS: Final = 1.0
#: Enough to count all frames of the largest host.
MOST_BUDGET_SECONDS: Final = 60.0


def background_budget(config: Config) -> float:
    """CPU seconds that a look in the background may take by ``[census]``."""
    return min(config.census_interval * config.census_cpu_share, MOST_BUDGET_SECONDS)


def is_fresh(age_seconds: float, cpu_seconds: float) -> bool:
    """Whether a look answers another request: repeated ones must not keep a CPU busy if looks are expensive.

    :param cpu_seconds: what it took
    """
    return age_seconds < max(_FRESH_SECONDS, 20 * cpu_seconds)


class NumaWatch:
    """Keeps the latest survey, and moves memory.

    :param tasks: where surveys are waited for
    :param config: gives the current configuration
    :param changed: called when there is a new survey
    :param busy: what else moves or un-merges pages now, as a phrase; empty for nothing
    :param counters: whether KSM's counters are up to date
    :ivar failures: number of failed surveys
    :ivar switched: gives who was switched on or off (`ksmd_ctl.switch.keep`) at a time
    :ivar moving: the running migration as a phrase; empty for none
    """

    def __init__(
        self,
        host: Host,
        tasks: Tasks,
        config: Callable[[], Config],
        changed: Callable[[], None],
        busy: Callable[[], str] = lambda: "",
        counters: Callable[[], Counters] = lambda: NOBODY_SAW,
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._config = config
        self._changed = changed
        self._busy = busy
        self._counters = counters
        self._survey: Survey | None = None
        # The latest sample, and the last one before the latest survey began.
        self._sample: Sample | None = None
        self._surveyed: Sample | None = None
        self._error = ""
        self._failed_in_a_row = 0
        self._largest = Largest()
        self._section: dict[str, object] | None = None
        self._surveying: asyncio.Task[Survey | KsmdError] | None = None
        self._due = host.clock() + _FIRST_SECONDS
        # Nodes or their memory have changed since the latest survey.
        self._stale = False
        self._nodes: Set[int] = frozenset()
        # Anybody who can connect may ask for dry runs: they take turns.
        self._dry_run = asyncio.Lock()
        self.moving = ""
        self.switched: Callable[[float], list[dict[str, object]]] = lambda _: []
        self.failures = 0
        self.surveys = 0

    @property
    def survey(self) -> Survey | None:
        """The latest survey; None before the first one."""
        return self._survey

    @property
    def surveyed_at(self) -> float | None:
        """When the latest survey began, by `Host.clock`."""
        return None if self._survey is None else self._survey.time_seconds

    def section(self) -> Mapping[str, object] | None:
        """The `numa` part of a report; None before the first survey."""
        if self._section is None:
            return None
        since = {"split_since_pages": self.split_since_pages}
        return {"surveys": self.surveys, "failures": self.failures, **self._section, **since}

    @property
    def merging_pages(self) -> int | None:
        """Merged pages of all processes in the latest survey; None if the kernel or the survey lacks a process's."""
        return None if self._survey is None else self._survey.total(lambda process: process.merging_pages)

    @property
    def mapped_pages(self) -> int | None:
        """KSM pages that all processes mapped in the latest survey; None if not known of all (before 6.7)."""
        return None if self._survey is None else self._survey.total(lambda process: process.ksm_mapped_pages)

    @property
    def split_zero_pages(self) -> int | None:
        """Pages of zeroes that splits of huge pages freed, as of the latest survey; None where that isn't known."""
        found = None if self._section is None else self._section["split_zero_pages"]
        return found if isinstance(found, int) else None

    @property
    def split_since_pages(self) -> int | None:
        """Pages of huge pages that were split since the latest survey, whose zeroes it has not counted; None where the
        kernel doesn't count them."""
        if self._surveyed is None or self._sample is None:
            return None
        pages = split_pages(self._surveyed, self._sample)
        return None if pages is None else int(pages)

    def ksm_pages(self) -> Mapping[str, int | None]:
        """KSM pages by node in the latest survey."""
        if self._survey is None:
            return {}
        census, nodes = self._survey.census, self._survey.topology.nodes
        return {str(node.number): None if census is None else census.pages.get(node.number, 0) for node in nodes}

    # -- in the background -----------------------------------------------------------------------------------

    def tick(self, sample: Sample) -> None:
        """Start a survey if it is due."""
        self._sample = sample
        if sample.nodes.keys() != self._nodes:
            if self._nodes:
                self.stale()
            self._nodes = sample.nodes.keys()
        if self._surveying is not None or sample.time_seconds < self._due or not self._config().census_cpu_share:
            return
        survey = self._survey
        if survey is not None and survey.census is not None and not self._stale:
            merged = any(sample.number(name) for name in ("pages_shared", "ksm_zero_pages"))
            if not merged and not any(survey.census.pages.values()) and not self.split_zero_pages:
                # Nothing was merged and nothing is. Once something is merged, a survey is due at once. Zeroes that
                # splits freed are counted on: a write takes them back.
                return
        self._start(self._budget())

    def stale(self) -> None:
        """Nodes or their memory have changed: start a survey at the next tick."""
        self._due = self._host.clock()
        self._stale = True

    def _budget(self) -> float:
        return background_budget(self._config())

    def _start(self, budget_cpu_seconds: float) -> asyncio.Task[Survey | KsmdError]:
        self._stale = False
        self._surveying = self._tasks.start(self._take_survey(budget_cpu_seconds))
        return self._surveying

    async def _take_survey(self, budget_cpu_seconds: float) -> Survey | KsmdError:
        before = self._sample
        came = await self._tasks.outcome(self._host.survey(budget_cpu_seconds))
        self._surveying = None
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
            self._surveyed = before
        # After an expensive survey the next one is later, so that the CPU share holds.
        share = config.census_cpu_share
        if not self._stale:
            self._due = now + max(config.census_interval, spent / share if share else 0.0)
        self._render()
        return came

    def _render(self) -> None:
        groups: tuple[Group, ...] = ()
        other = Group("")
        if self._survey is not None:
            found = grouped(self._survey.processes, self._host.identity.page_size_bytes)
            groups, other = self._largest.choose(found)
        self._section = numa_section(self._survey, groups, other, self._error, self._config().floor_bytes)
        self._changed()

    # -- requests --------------------------------------------------------------------------------------------

    async def nodes(self) -> dict[str, object]:
        """The document of ``ksmd-ctl nodes``.

        :raises KsmdError: the survey failed
        """
        survey, floor_bytes = await self.fresh_survey(), self._config().floor_bytes
        return {"nodes": nodes_document(self._host.identity, self._host.sample(), survey, floor_bytes)}

    async def processes(self) -> dict[str, object]:
        """The document of ``ksmd-ctl processes``.

        :raises KsmdError: the survey failed
        """
        survey = await self.fresh_survey()
        identity, sample = self._host.identity, self._host.sample()
        switched = self.switched(sample.time_seconds)
        document = processes_document(identity, survey, sample, survey, self._counters(), switched)
        return {"processes": document}

    async def fresh_survey(self, *, asked: bool = True) -> Survey:
        """The latest survey if it is new enough, else a new one.

        :param asked: somebody waits for it; else it keeps within the budget of the background
        :raises KsmdError: it failed
        """
        if self._surveying is None and self._survey is not None and self._is_fresh(self._survey):
            return self._survey
        surveying = self._surveying or self._start(max(self._budget(), _ASKED_BUDGET_SECONDS if asked else 0.0))
        came = await self._tasks.joined(surveying)
        if isinstance(came, KsmdError):
            raise came
        return came

    def _is_fresh(self, survey: Survey) -> bool:
        return not self._stale and is_fresh(self._host.clock() - survey.time_seconds, survey.cpu_seconds)

    async def migrate(self, order: MigrationOrder, report: Callable[[Mapping[str, object]], None]) -> dict[str, object]:
        """Move memory, or with `dry_run` find out what that would do.

        :param report: called with the progress
        :raises KsmdError: it can't be done, or another migration is running
        """
        if not order.dry_run:
            if self.moving:
                raise Refused("moving memory", "the service is moving memory already", hint="try again when it is done")
            if other := self._busy():
                raise Refused("moving memory", other, hint="`ksmd-ctl status` shows how far a transaction is")
        order.check()

        def progress(at: Progress) -> None:
            report({"progress": encode(at), "result": None})

        migration = Migration(self._host, order.within(self._config().floor_bytes, self._config().batch_latency))
        if order.dry_run:
            async with self._dry_run:
                result = await self._tasks.completed(migration, progress)
        else:
            whose = f"process {order.pid}" if order.pid is not None else f"unit {order.unit}"
            self.moving = f"the service is moving memory of {whose} to node {order.to}"
            try:
                result = await self._tasks.completed(migration, progress)
            finally:
                self.moving = ""
            self.stale()
        return {"result": result.document(), "progress": None}
