# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service does about domains that are separated by their nodes (docs/domains.md, mode ``nodes``).

After each audit, pages of confined processes on nodes that are not their own are un-merged and moved there. While a
domain is not isolated, ``on_violation`` decides: whether that is done with processes that are not confined as well, and
whether ksmd is stopped until an audit finds each domain isolated.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.config.domains import DomainMode, OnViolation
from ksmd_ctl.config.model import Config, Want
from ksmd_ctl.daemon.domains import DomainsWatch
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.daemon.transactions import Transactions
from ksmd_ctl.domains.audit import Audit, Verdict
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.figures import plural
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.transactions.migration import Migration, MigrationOrder
from ksmd_ctl.transactions.plan import limits_of
from ksmd_ctl.transactions.unmerging import UnmergeOrder, Unmerging

# From one audit that finds a domain not isolated to the next: twice as long each time, up to [census] interval.
_FIRST_PAUSE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Homing:
    """A process that has pages on nodes that are not its own.

    :ivar nodes: its own; none where the domains have all
    """

    process: ProcessId
    name: str
    domain: str
    nodes: frozenset[int]


def homings(audit: Audit, memory: frozenset[int]) -> tuple[Homing, ...]:
    """Whose pages are to be brought home: of those that are not confined only where ``on_violation`` says so.

    :param memory: the nodes that have memory
    """
    owned = {one.name: one.nodes & memory for one in audit.domains if one.nodes}
    # Of whoever belongs to no domain with nodes.
    rest = memory.difference(*owned.values())
    confined_only = audit.config.on_violation is OnViolation.REPORT
    found = {
        stray.process: Homing(stray.process, str(stray), stray.domain, owned.get(stray.domain, rest))
        for one in audit.domains
        # On nodes of a domain without members nobody is in the way.
        if one.verdict is Verdict.NOT_ISOLATED
        for stray in (*one.strays, *one.intruders)
        if stray.pages and not (confined_only and stray.allowed)
    }
    return tuple(found.values())


def unsound(audit: Audit) -> str:
    """Which domain of the configuration is not isolated, and why, as a sentence; empty where all are."""
    for one in audit.domains:
        if one.configured and one.verdict is Verdict.NOT_ISOLATED:
            return f"domain {one.name} is not isolated: {one.reasons[0].text}"
    return ""


class Measures:
    """Brings pages home, and says whether ksmd has to be stopped.

    :param domains: gives audits
    :param busy: what else moves or un-merges pages now, as a phrase; empty for nothing
    :param config: gives the current configuration
    :param changed: called when there is something new to report
    :ivar stopped: why ksmd is not to run; empty where it may
    """

    def __init__(
        self,
        host: Host,
        tasks: Tasks,
        log: Log,
        domains: DomainsWatch,
        transactions: Transactions,
        busy: Callable[[], str],
        config: Callable[[], Config],
        changed: Callable[[], None],
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._log = log
        self._domains = domains
        self._transactions = transactions
        self._busy = busy
        self._config = config
        self._changed = changed
        self._audit: Audit | None = None
        self._waiting: tuple[Homing, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._pause = 0.0
        self._again_at: float | None = None
        self._text = ""
        self._moved = self._unmerged = 0
        self.stopped = ""

    def section(self) -> dict[str, object]:
        """What a report has of it (docs/json.md)."""
        return {
            "stopped": self.stopped,
            "unmerged_pages": self._unmerged,
            "moved_pages": self._moved,
            "text": self._text,
        }

    def held(self, config: Config) -> Config:
        """A configuration with what is held beyond it: whoever plans or changes knobs goes by that."""
        if not self.stopped:
            return config
        return replace(config, knobs={**config.knobs, Knob.RUN: Want(0, True, self.stopped)})

    def tick(self, sample: Sample) -> str:
        """Take a sample, and start what is due; why ksmd is not to run, empty where it may."""
        domains = self._config().domains
        if domains is None or domains.mode is not DomainMode.NODES or not self._config().policy.writes:
            self._stop("")
            self._audit, self._waiting, self._again_at, self._pause = None, (), None, 0.0
            return ""
        audit = self._domains.audit
        if audit is not None and audit.config != domains:
            # Of another configuration, until the next tick of whoever audits.
            audit = None
        if audit is not None and audit is not self._audit:
            memory = frozenset(node.number for node in self._host.topology().with_memory())
            self._audit, self._waiting, self._again_at = audit, homings(audit, memory), None
        if audit is None:
            reason = "no audit has found each domain isolated yet"
        elif self._domains.error:
            reason = f"the latest audit of domains failed: {self._domains.error}"
        else:
            reason = unsound(audit)
        self._stop(reason if domains.on_violation is OnViolation.STOP else "")
        if not reason:
            self._pause = 0.0
        elif audit is not None and self._again_at is None:
            self._pause = min(self._config().census_interval, 2 * self._pause or _FIRST_PAUSE_SECONDS)
            self._again_at = sample.time_seconds + self._pause
        # Before that moved pages would be merged again at once, across nodes, or while ksmd is about to be stopped.
        ready = sample.knob(Knob.MERGE_ACROSS_NODES) == 0 and (not self.stopped or sample.knob(Knob.RUN) == 0)
        idle = self._task is None or self._task.done()
        if self._waiting and ready and idle and not self._busy():
            those, self._waiting = self._waiting, ()
            self._task = self._tasks.start(self._bring_home(those))
        elif self._again_at is not None and sample.time_seconds >= self._again_at and idle:
            self._again_at = math.inf
            self._domains.stale()
        return self.stopped

    def _stop(self, reason: str) -> None:
        if reason == self.stopped:
            return
        before, self.stopped = self.stopped, reason
        if reason and not before:
            self._log.event(Event.MERGING_STOPPED, f"ksmd is stopped (on_violation): {reason}")
        elif before and not reason:
            self._log.event(Event.MERGING_RESUMED, "ksmd may run again: each domain is isolated, or need not be")
        self._changed()

    async def _bring_home(self, those: tuple[Homing, ...]) -> None:
        config = self._config()
        limits = limits_of(config)
        unmerged = moved = left = 0
        errors: list[str] = []
        with self._transactions.doing("bringing memory of domains home"):
            inventory = await self._tasks.outcome(self._host.inventory(limits.floor_bytes))
            if isinstance(inventory, KsmdError):
                errors.append(inventory.why)
                there: tuple[Homing, ...] = ()
            else:
                # Those that have ended since the audit need nothing.
                known = {memory.process for memory in inventory.memories}
                there = tuple(one for one in those if one.process in known)
                looked = Operation.done(inventory)
            free = self._host.sample(fresh=True).nodes
            for one in there:
                keep = tuple(sorted(one.nodes))
                to = max(keep, key=lambda node: free[node].free_bytes if node in free else 0, default=None)
                try:
                    order = UnmergeOrder(one.process.pid, to=to, keep=keep)
                    came = await self._tasks.completed(Unmerging(self._host, order, limits, lambda _: looked))
                    unmerged += sum(part.unshared_pages for part in came.processes.values())
                    if to is not None and self._host.find(one.process.pid) == one.process:
                        wanted = MigrationOrder(to, one.process.pid, keep=keep)
                        moving = Migration(self._host, wanted.within(limits.floor_bytes, limits.latency_seconds))
                        totals = (await self._tasks.completed(moving)).totals()
                        moved, left = moved + totals["moved"], left + totals["left"]
                except KsmdError as error:
                    errors.append(f"{one.name}: {error.why}")
        self._unmerged += unmerged
        self._moved += moved
        names = ", ".join(f"{one.name} of {one.domain}" for one in those[:3]) + (" and more" if those[3:] else "")
        self._text = f"{names}: {plural(unmerged, 'page')} un-merged, {moved:,} moved home, {left:,} left"
        self._log.event(Event.DOMAIN_MEASURES, "; ".join([self._text, *errors[:3]]), moved=moved, unmerged=unmerged)
        self._changed()
