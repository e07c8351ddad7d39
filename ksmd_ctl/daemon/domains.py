# SPDX-License-Identifier: GPL-2.0-or-later
"""Trust domains in the service: audits in the background and on request (docs/domains.md).

An audit follows each survey of nodes and processes, as often and within the same share of a CPU ([census]).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from ksmd_ctl.config.domains import EACH_ITS_OWN, Domains
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.numa import NumaWatch, background_budget, is_fresh
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.domains.audit import Audit, Cause, Verdict, auditing
from ksmd_ctl.domains.documents import domains_document, domains_section
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import ROUND_PAGES
from ksmd_ctl.host.sample import Sample

# The first audit, after the start: after the first survey.
_FIRST_SECONDS: Final = 4.0
# With less a host with a few hundred processes could not be looked at. The next audit is later then.
_LEAST_BUDGET_SECONDS: Final = 1.0
_ASKED_BUDGET_SECONDS: Final = 5.0


class DomainsWatch:
    """Keeps the latest audit.

    :param numa: gives surveys
    :param config: gives the current configuration
    :param changed: called when there is a new audit to report
    :ivar audit: the latest one of the configured domains, None before the first
    :ivar error: why the latest try failed; empty where it did not
    """

    def __init__(
        self,
        host: Host,
        tasks: Tasks,
        log: Log,
        numa: NumaWatch,
        config: Callable[[], Config],
        changed: Callable[[], None],
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._log = log
        self._numa = numa
        self._config = config
        self._changed = changed
        self._domains: Domains | None = None
        self._due = host.clock() + _FIRST_SECONDS
        self._stale = False
        self._auditing: asyncio.Task[Audit | KsmdError] | None = None
        self.error = ""
        # By domain, why it was not isolated at the latest audit.
        self._causes: Mapping[str, frozenset[Cause]] = {}
        self.audit: Audit | None = None
        self.audits = 0
        self.failures = 0

    def section(self, now: float) -> Mapping[str, object] | None:
        """The `domains` part of a report; None where no domains are configured.

        Every user of the host can read the page and the metrics, so counts are rounded for all.
        """
        if (config := self._config().domains) is None:
            return None
        audit = None if self.audit is None or self.audit.config != config else self.audit
        facts = {"audits": self.audits, "failures": self.failures, "error": self.error}
        page = self._host.identity.page_size_bytes
        return {**facts, **domains_section(config, audit, now, page, ROUND_PAGES)}

    def tick(self, sample: Sample) -> None:
        """Start an audit if it is due."""
        config = self._config()
        if config.domains != self._domains:
            # What was found of other domains says nothing of these.
            if self._domains is not None:
                self._due, self._stale = sample.time_seconds, True
            self._domains, self.audit, self.error, self._causes = config.domains, None, "", {}
        due = sample.time_seconds >= self._due and config.census_cpu_share
        if self._domains is not None and self._auditing is None and due:
            self._start(asked=False)

    def stale(self) -> None:
        """Something has changed that the latest audit is about: start a survey and an audit at the next tick."""
        self._numa.stale()
        self._due, self._stale = self._host.clock(), True

    def _start(self, *, asked: bool) -> asyncio.Task[Audit | KsmdError]:
        self._auditing = self._tasks.start(self._run(asked=asked))
        return self._auditing

    async def _run(self, *, asked: bool) -> Audit | KsmdError:
        config = self._config()
        domains = config.domains or Domains()
        budget = max(background_budget(config), _ASKED_BUDGET_SECONDS if asked else _LEAST_BUDGET_SECONDS)
        self._stale = False
        self._due = self._host.clock() + config.census_interval
        came: Audit | KsmdError
        try:
            survey = await self._numa.fresh_survey(asked=asked)
            came = await self._tasks.completed(auditing(self._host, domains, survey, budget))
        except KsmdError as error:
            came = error
        self._auditing = None
        if isinstance(came, KsmdError):
            self.failures += 1
            self.error = str(came)
        else:
            self.audits += 1
            self._take(came)
        self._changed()
        return came

    def _take(self, audit: Audit) -> None:
        config = self._config()
        if config.census_cpu_share and not self._stale:
            # After an expensive audit the next one is later, so that the CPU share holds.
            self._due = max(self._due, self._host.clock() + audit.cpu_seconds / config.census_cpu_share)
        if audit.config == (config.domains or Domains()):
            self.audit, self.error = audit, ""
        if audit.config == config.domains:
            self._report(audit)

    def _report(self, audit: Audit) -> None:
        """Log which domains are not isolated any more, or again, or for other reasons than before."""
        causes: dict[str, frozenset[Cause]] = {}
        said: dict[str, str] = {}
        for one in audit.domains:
            if one.verdict is Verdict.NOT_ISOLATED and one.configured:
                causes[one.name] = frozenset(reason.cause for reason in one.reasons)
                reasons = "; ".join(reason.text for reason in one.reasons)
                said[one.name] = f"domain {one.name} is not isolated: {reasons}"
        others = [one for one in audit.domains if one.verdict is Verdict.NOT_ISOLATED and not one.configured]
        if others:
            # Of these there may be many.
            causes[EACH_ITS_OWN] = frozenset()
            first = f"{others[0].name}: {others[0].reasons[0].text}"
            said[EACH_ITS_OWN] = f"{len(others)} that are domains of their own are not isolated: {first}"
        before, self._causes = self._causes, causes
        for name, text in said.items():
            if before.get(name) != causes[name]:
                listed = ", ".join(sorted(causes[name]))
                self._log.event(Event.DOMAIN_NOT_ISOLATED, text, domain=name, causes=listed)
        for name in sorted(before.keys() - causes.keys()):
            verdict = next((one.verdict for one in audit.domains if one.name == name and one.configured), "")
            whose = f"domain {name}" if verdict else "domains of their own"
            text = f"{whose}: {verdict or Verdict.NOTHING_SHARED}"
            self._log.event(Event.DOMAIN_ISOLATED, text, domain=name)

    async def _audited(self) -> Audit:
        """The audit that is under way, or another one.

        :raises KsmdError: it failed
        """
        came = await self._tasks.joined(self._auditing or self._start(asked=True))
        if isinstance(came, KsmdError):
            raise came
        return came

    async def document(self, *, rounded: bool) -> dict[str, object]:
        """The document of ``ksmd-ctl domains``; where none are configured, of each group as a domain of its own.

        :param rounded: counts are rounded, as for whoever is not root
        :raises KsmdError: the audit failed
        """
        domains, audit = self._config().domains or Domains(), self.audit
        if audit is None or not is_fresh(self._host.clock() - audit.time_seconds, audit.cpu_seconds):
            audit = await self._audited()
        if audit.config != domains:
            # It had begun before a reload.
            audit = await self._audited()
        step = ROUND_PAGES if rounded else 1
        return {"domains": domains_document(self._host.identity, audit, self._host.clock(), round_pages=step)}
