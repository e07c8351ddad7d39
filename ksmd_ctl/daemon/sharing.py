# SPDX-License-Identifier: GPL-2.0-or-later
"""The service looks at who shares frames with whom: in the background by unit, and on request (docs/sharing.md).

A look takes CPU time of the host, as a survey does (`ksmd_ctl.daemon.numa`): the background has the same interval and
share for it; units that the latest look had not yet are looked at sooner. The processes are those of the latest
survey.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from ksmd_ctl.config.domains import Domains
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.numa import MOST_BUDGET_SECONDS, NumaWatch, background_budget, is_fresh
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.domains.members import domain_of
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import ROUND_PAGES, Survey
from ksmd_ctl.host.operation import in_thread
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.host.sharing import Sharing
from ksmd_ctl.reports.numa import Largest
from ksmd_ctl.reports.sharing import NO_LOOK, Grouping, grouping, sharing_document, sharing_section

# With less a host with a few hundred processes could not be looked at. The next look is later then.
_LEAST_BUDGET_SECONDS: Final = 1.0
_ASKED_BUDGET_SECONDS: Final = 5.0
# Units come one after the other, as when a host starts its virtual machines.
_NEWCOMERS_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Answer:
    """A look that was asked for."""

    groups: Grouping
    sharing: Sharing
    domains: Domains
    budget: float

    def answers(self, domains: Domains, budget: float) -> bool:
        """Whether another look would tell no more: of these domains, and with no greater budget."""
        return self.domains == domains and (self.sharing.complete or budget <= self.budget)


class SharingWatch:
    """Keeps the latest look, and looks for who asks.

    :param config: gives the current configuration
    :param changed: called when there is a new look
    :param numa: has the processes
    """

    def __init__(
        self, host: Host, tasks: Tasks, config: Callable[[], Config], changed: Callable[[], None], numa: NumaWatch
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._config = config
        self._changed = changed
        self._numa = numa
        self._largest = Largest()
        self._section: dict[str, object] | None = None
        self._looked_at = 0.0
        self._error = ""
        self._looks = self._failures = 0
        self._due = self._soonest = host.clock()
        # The units of the latest look, and whether a survey has others.
        self._units: frozenset[str] = frozenset()
        self._compared: Survey | None = None
        self._newcomers = False
        self._task: asyncio.Task[None] | None = None
        # Anybody who can connect may ask: they take turns, and who comes soon afterwards gets the same.
        self._turn = asyncio.Lock()
        self._latest: dict[str, _Answer] = {}

    def section(self, now: float) -> Mapping[str, object] | None:
        """The `sharing` part of a report; None before the first look.

        Every user of the host can read the page and the metrics, so counts are rounded for all.
        """
        if not (self._looks or self._failures):
            return None
        figures = {"looks": self._looks, "failures": self._failures, "error": self._error}
        age = max(0.0, now - self._looked_at) if self._looks else None
        return {"age_seconds": age, **figures, **(self._section or NO_LOOK)}

    # -- in the background -----------------------------------------------------------------------------------

    def tick(self, sample: Sample) -> None:
        """Start a look if one is due: while something is merged, and once afterwards."""
        share, shown, survey = self._config().census_cpu_share, self._section, self._numa.survey
        looking = self._task is not None and not self._task.done()
        if looking or not share or survey is None or sample.time_seconds < self._soonest:
            return
        if sample.time_seconds < self._due and not self._has_newcomers(survey):
            return
        if sample.number("pages_shared") or (shown and shown["merged_bytes"]):
            self._task = self._tasks.start(self._look())

    def _has_newcomers(self, survey: Survey) -> bool:
        """Whether a survey has units that the latest look had not yet."""
        if survey is not self._compared:
            self._compared = survey
            self._newcomers = not self._units.issuperset(grouping(survey.processes, "unit").names)
        return self._newcomers

    async def _look(self) -> None:
        config = self._config()
        survey = self._numa.survey
        assert survey is not None
        groups = grouping(survey.processes, "unit")
        budget = background_budget(config)
        came = await self._tasks.outcome(self._host.sharing(groups.members, max(budget, _LEAST_BUDGET_SECONDS)))
        if isinstance(came, KsmdError):
            self._failures += 1
            self._error, spent = str(came), 2 * budget
        else:
            sharing, page = came, self._host.identity.page_size_bytes
            # With thousands of sets of groups this takes a while.
            section = in_thread(lambda: sharing_section(groups, sharing, self._largest, page, ROUND_PAGES))
            self._section = await self._tasks.completed(section)
            self._looks += 1
            self._error, self._looked_at, spent = "", came.time_seconds, came.cpu_seconds
            self._units, self._compared = frozenset(groups.names), None
        now, rest = self._host.clock(), spent / (config.census_cpu_share or 1.0)
        self._due = now + max(config.census_interval, rest)
        failed = isinstance(came, KsmdError)
        self._soonest = self._due if failed else now + max(min(config.census_interval, _NEWCOMERS_SECONDS), rest)
        self._changed()

    # -- requests --------------------------------------------------------------------------------------------

    async def sharing(self, by: str, budget_cpu_seconds: float | None, *, rounded: bool) -> dict[str, object]:
        """The document of ``ksmd-ctl sharing``.

        :param by: a key of `ksmd_ctl.reports.sharing.GROUPINGS`, or ``domain``
        :param rounded: counts are rounded, as for whoever is not root
        :raises KsmdError: a look failed
        """
        async with self._turn:
            survey = await self._numa.fresh_survey()
            domains = self._config().domains or Domains()
            budget = min(budget_cpu_seconds or _ASKED_BUDGET_SECONDS, MOST_BUDGET_SECONDS)
            latest = self._latest.get(by)
            if latest is None or not (self._is_fresh(latest.sharing) and latest.answers(domains, budget)):
                label = partial(domain_of, domains) if by == "domain" else None
                groups = grouping(survey.processes, by, label)
                sharing = await self._tasks.completed(self._host.sharing(groups.members, budget))
                latest = self._latest[by] = _Answer(groups, sharing, domains, budget)
        groups, sharing = latest.groups, latest.sharing
        identity, now = self._host.identity, self._host.clock()
        step = ROUND_PAGES if rounded else 1
        made = in_thread(lambda: sharing_document(identity, groups, sharing, now, round_pages=step))
        return {"sharing": await self._tasks.completed(made)}

    def _is_fresh(self, sharing: Sharing) -> bool:
        return is_fresh(self._host.clock() - sharing.time_seconds, sharing.cpu_seconds)
