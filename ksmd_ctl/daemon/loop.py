# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop of the service: each tick samples, decides, starts the writes, and publishes a report."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import math
import os
import signal
import time
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from ksmd_ctl import __version__
from ksmd_ctl.config.loader import check_knobs, not_reloadable
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.domains import DomainsWatch
from ksmd_ctl.daemon.history import KIND_OF, WRITE_SECONDS, HistoryKeeper, Past
from ksmd_ctl.daemon.housekeeping import HousekeepingWatch
from ksmd_ctl.daemon.http import HttpServer
from ksmd_ctl.daemon.knob_writes import Change, KnobWrites, WatchedHost
from ksmd_ctl.daemon.log import Event, Log, Record
from ksmd_ctl.daemon.measures import Measures
from ksmd_ctl.daemon.missed_savings import MissedSavings
from ksmd_ctl.daemon.notify import Notifier, sentence, state_event
from ksmd_ctl.daemon.numa import NumaWatch
from ksmd_ctl.daemon.recovery import DuplicatesWatch
from ksmd_ctl.daemon.service import lacking_knobs
from ksmd_ctl.daemon.sharing import SharingWatch
from ksmd_ctl.daemon.switching import SwitchWatch
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.daemon.transactions import Transactions
from ksmd_ctl.daemon.udev import KernelEvents, TopologyWatch
from ksmd_ctl.daemon.varlink import ControlServer
from ksmd_ctl.daemon.writers import WritersWatch
from ksmd_ctl.errors import ConfigError, Denied, HostError, Problem
from ksmd_ctl.history.model import Kind, Means
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.kernel.proc_pid import own_resident_bytes
from ksmd_ctl.knobs.foreign import ForeignChange, ForeignChanges, foreign_section
from ksmd_ctl.knobs.reconcile import (
    BY_OTHERS,
    Decision,
    forgiven,
    reconcile,
)
from ksmd_ctl.policies import policy_runner
from ksmd_ctl.policies.policy_runner import PolicyRunner
from ksmd_ctl.render.exposition import Exposition
from ksmd_ctl.render.page_history import PageHistory, Point, Span
from ksmd_ctl.reports.report import DaemonFacts, History, Report, document
from ksmd_ctl.reports.saving import Counters, saved_frames_bytes, saving
from ksmd_ctl.transactions.executor import Executor
from ksmd_ctl.transactions.journal import TransactionJournal

#: On time; late enough to affect a rate; late enough to affect a policy.
BOUNDS_SECONDS: Final = (0.005, 0.05, 0.5)


class Lateness:
    """A histogram of how late ticks were."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)

    def add(self, seconds: float) -> None:
        self._seconds += seconds
        self._counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1

    def document(self) -> dict[str, object]:
        within, so_far = {}, 0
        for bound, count in zip(BOUNDS_SECONDS, self._counts, strict=False):
            so_far += count
            within[str(bound)] = so_far
        return {"ticks": sum(self._counts), "seconds": self._seconds, "within": within}


#: The service waits at most this long for the first writes, before it is ready.
FIRST_WRITES_SECONDS: Final = 10.0
# The service waits at most this long for the disk to have its start, before it is ready.
_FIRST_EVENT_SECONDS: Final = 1.0
# How long a page of more than an hour is shown.
_PAGE_SECONDS: Final = 60.0
# How often the time stamp of the lock is updated.
_ALIVE_SECONDS: Final = 10.0


class ServiceLoop:
    """The running service; control socket and HTTP server call it, too.

    :param load: reads the configuration again
    :param events: opens the source of events of memory and CPUs; None for a host that has none
    :param alive: called every 10 s
    :param watched: tells who writes the knobs; None for a host that can't tell
    """

    def __init__(
        self,
        config: Config,
        host: Host,
        executor: Executor,
        log: Log,
        notifier: Notifier,
        load: Callable[[], Config],
        events: Callable[[], KernelEvents] | None = None,
        alive: Callable[[], None] = lambda: None,
        watched: WatchedHost | None = None,
    ) -> None:
        self.config = config
        self.metrics_address = ""
        self._host = host
        self._executor = executor
        self._log = log
        self._notifier = notifier
        self._load = load
        self._policy_runner = PolicyRunner(config, host.identity.page_size_bytes, executor.journal.entries)
        self._decision = Decision()
        # Whether a transaction was active at the last tick, and how many had ended.
        self._transactions_seen = (False, 0)
        self._history = History()
        self._sample: Sample | None = None
        self._document: dict[str, object] | None = None
        self._started_at = host.clock()
        self._ticks = 0
        self._lateness = Lateness()
        self._reload_error = ""
        self._reload_failures = 0
        self._restart_needed_for: tuple[str, ...] = ()
        self._ready = False
        self._exposition = Exposition(self._document_for_metrics)
        journal = TransactionJournal(executor.journal.path.parent, host.identity)
        self.tasks = Tasks()
        self.transactions = Transactions(
            host,
            self.tasks,
            executor,
            journal,
            log,
            lambda: self.measures.held(self.config),
            self._out_of_date,
            lambda: self.numa.moving,
        )
        self._foreign = ForeignChanges(executor.journal.path.parent, host.identity)
        self.history = HistoryKeeper(executor.journal.path.parent, host.identity, self.tasks, lambda: self.config, log)
        self._decided: policy_runner.Past | None = None
        # Each with the time from which on it is made again.
        self._pages: dict[Span, tuple[float, bytes]] = {}
        self._page_history = PageHistory()
        log.listen(self._mark)
        self.numa = NumaWatch(
            host,
            self.tasks,
            lambda: self.config,
            self._out_of_date,
            lambda: self.transactions.under_way,
            self._counters,
        )
        self.domains = DomainsWatch(host, self.tasks, log, self.numa, lambda: self.config, self._out_of_date)
        self.sharing = SharingWatch(host, self.tasks, lambda: self.config, self._out_of_date, self.numa)
        self.switches = SwitchWatch(
            host, self.tasks, log, self.numa, self.transactions, lambda: self.config, self._out_of_date
        )
        self.numa.switched = self.switches.section
        self.measures = Measures(
            host,
            self.tasks,
            log,
            self.domains,
            self.transactions,
            lambda: self.transactions.under_way or self.numa.moving,
            lambda: self.config,
            self._out_of_date,
        )
        self.duplicates = DuplicatesWatch(
            host, self.tasks, log, lambda: self.config, self._out_of_date, self._moves_pages
        )
        self.writers = WritersWatch(host, self.tasks, self._out_of_date)
        self._writes = KnobWrites(watched, self.tasks, log, host.clock)
        self._housekeeping = HousekeepingWatch(host, self.tasks, log, self._policy_runner)
        self.missed_savings = MissedSavings(host, self.tasks, lambda: self.config, self._out_of_date)
        self._events = events
        self._alive = alive
        self._alive_at = host.clock()
        self._topology: TopologyWatch | None = None
        self._control: ControlServer | None = None
        self._watched = -1
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[int] | None = None

    # -- running -------------------------------------------------------------------------------------------

    async def run(self, control: ControlServer | None, http: HttpServer | None) -> int:
        """Run until a signal asks to stop; its number.

        :param control: a started control server, told of each report
        :param http: a started HTTP server
        :raises Denied: the knobs may not be written
        """
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._control = control
        self.metrics_address = "" if http is None else http.address
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        # Blocked since before the configuration was read (ksmd_ctl.daemon.service.run).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            self._writes.begin()
            self.history.begin(self._host.clock())
            self._take_past(self._page_history, self.history.past_at_start(Span.HOUR.seconds, int(WRITE_SECONDS)))
            self.transactions.recover()
            self.tick()
            await self._first_writes()
            # systemd makes a reload that is asked for during the start wait for its end, and then sends no signal.
            changed = self._configuration_changed()
            if changed:
                self.reload()
            self._ready = True
            self._log.event(Event.STARTED, f"started: {self._sentence()}; {self._where()}", version=__version__)
            # Also on the disk, if that is quick.
            await asyncio.wait((self.history.write(self._host.clock()),), timeout=_FIRST_EVENT_SECONDS)
            self._notifier.ready(self._sentence())
            self._schedule(loop.time() + (0 if changed else self._interval()))
            return await self._ended
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._watch(-1)
            self._report_foreign(self._writes.rest(self.config.sample_interval))
            self._writes.close()
            if self._topology is not None:
                self._topology.close()
            self.tasks.close()
            self._foreign.save(self._host.clock())
            self._notifier.stopping("stopping")

    def _where(self) -> str:
        metrics = f"metrics at http://{self.metrics_address}/metrics" if self.metrics_address else "no metrics endpoint"
        return f"{metrics}, control socket {self.config.socket}"

    def _watch_topology(self, sample: Sample) -> None:
        """Listen to events if there is more than one node: they cost 2 MiB, and with one node say nothing new."""
        if self._events is None or len(sample.nodes) < 2:
            return
        events, self._events = self._events, None
        try:
            self._topology = TopologyWatch(events(), self.numa.stale)
        except (OSError, ImportError) as error:
            # Then the next survey notices it.
            self._log.event(Event.NO_EVENTS, f"memory and CPUs that come and go are not noticed at once: {error}")

    def _stop(self, number: int) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(number)

    async def _first_writes(self) -> None:
        """Wait for the writes of the first tick, with a limit; then tick again.

        :raises Denied: the knobs may not be written
        """
        assert self._ended is not None
        loop = asyncio.get_running_loop()
        until = loop.time() + FIRST_WRITES_SECONDS
        wanted = self._executor.in_flight
        pause = 0.001
        while self._executor.in_flight and loop.time() < until and not self._ended.done():
            # An operation without a descriptor has to be polled.
            await asyncio.wait({self._ended}, timeout=pause)
            pause = min(2 * pause, 0.1)
            self._executor.poll()
        if wanted or self._decision.writes:
            self.tick()
        # How ksmd is scheduled may be forbidden where the knobs are not: that is reported, and the knobs are held.
        errors = [self._decision.records[knob].error for knob in SYSFS_KNOBS]
        denied = next((error for error in errors if isinstance(error, Denied)), None)
        # `observe` needs no permission to write; a knob that it can't restore is pending.
        if denied is not None and self.config.policy.writes:
            raise Denied(
                denied.what,
                denied.why,
                hint=denied.hint
                if denied.errno == errno.EROFS
                else 'run as root, or through ksmd-ctl.service; policy = "observe" writes nothing',
                path=denied.path,
                value=denied.value,
                errno=denied.errno,
            ) from denied

    def _interval(self) -> float:
        wanted = self._policy_runner.decision.within_seconds
        return self.config.sample_interval if wanted is None else min(wanted, self.config.sample_interval)

    def _schedule(self, when: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._on_time, when)

    def _on_time(self, when: float) -> None:
        self._lateness.add(max(0.0, asyncio.get_running_loop().time() - when))
        try:
            self.tick()
        except Exception as error:
            # A tick failed: the service ends with the error, and systemd starts it again.
            if self._ended is not None and not self._ended.done():
                self._ended.set_exception(error)
            return
        # At fixed times, so that samples don't drift; a missed tick is not made up for.
        now, interval = asyncio.get_running_loop().time(), self._interval()
        following = when + interval
        self._schedule(following if following > now else now + interval)

    def _watch(self, descriptor: int) -> None:
        """Watch the descriptor of the running write; -1 for none."""
        if descriptor == self._watched:
            return
        loop = asyncio.get_running_loop()
        if self._watched >= 0:
            loop.remove_reader(self._watched)
        self._watched = descriptor
        if descriptor >= 0:
            loop.add_reader(descriptor, self._on_news)

    def _on_news(self) -> None:
        # The next operation may get the same descriptor.
        self._watch(-1)
        self._executor.poll()
        self._watch(self._executor.fileno())

    # -- one tick ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Sample, decide, begin the writes, publish."""
        executor = self._executor
        if executor.in_flight:
            self._on_news()
        before = self._decision
        sample = self._host.sample(fresh=self._policy_runner.policy.fresh)
        # A transaction changes `run` and more for a while: that is no drift, and nothing else may be written meanwhile.
        busy = frozenset(Knob) if self.transactions.active else executor.in_flight
        self._policy_runner.stop(self.measures.tick(sample), executor.journal.entries)
        desired = self._policy_runner.desired
        # The policy ignores what a transaction does.
        if not self.transactions.active:
            desired = self._policy_runner.tick(sample)
            if (latest := self._policy_runner.latest) is not None and latest is not self._decided:
                self._decided = latest
                self.history.decided(latest.text, latest.phase, latest.knobs)
            if self._policy_runner.given_back:
                executor.gave_back(self._policy_runner.given_back)
                text = ", ".join(f"{knob} = {value}" for knob, value in self._policy_runner.given_back.items())
                self._log.event(
                    Event.RESTORED, f"restored to the value from before the start; no longer managed: {text}"
                )
        seen = self.transactions.active, self.transactions.ended
        ours, self._transactions_seen = seen[0] or seen != self._transactions_seen, seen
        decision = reconcile(desired, sample, before, executor.take_outcomes(), busy, ours=ours)
        foreign = (*decision.drifts, *decision.others)
        changes = [Change(one, decision.records[one.knob].reason, sample.time_seconds) for one in foreign]
        # Before the service writes them itself.
        told = self._writes.told(changes, executor.in_flight, self.config.sample_interval)
        if not self.transactions.active and (decision.adopt or decision.writes):
            executor.begin(decision.adopt, decision.writes)
            self._watch(executor.fileno())
        self._sample, self._decision, self._document = sample, decision, None
        self._history.add(sample)
        self._ticks += 1
        if told:
            # The messages name known writers.
            self.writers.search(lambda: self._report_foreign(told))
        else:
            self._foreign.add((), sample.time_seconds)
        self._log_states(before, decision)
        self._exposition.invalidate()
        if sample.time_seconds >= self._alive_at:
            self._alive_at = sample.time_seconds + _ALIVE_SECONDS
            self._alive()
        if self._ready:
            self._watch_topology(sample)
        self.numa.tick(sample)
        self.domains.tick(sample)
        self.sharing.tick(sample)
        self.switches.tick()
        self.duplicates.tick(sample)
        self.missed_savings.tick(sample)
        self._housekeeping.tick(sample)
        self._pages.pop(Span.HOUR, None)
        if self._page_history.due(sample.time_seconds):
            self._page_history.add(sample.time_seconds, self._point())
            self.history.add(self._means())
        self.history.tick(sample.time_seconds)
        if self._control is not None:
            self._control.publish()
        if self._ready:
            self._notifier.progress(sample.time_seconds, self._sentence, news=bool(foreign or decision.changed))

    def _log_states(self, before: Decision, decision: Decision) -> None:
        for knob in decision.changed:
            record = decision.records[knob]
            event, text = state_event(before.records.get(knob), record)
            if event is not None and record.wanted is not None:
                self._log.event(
                    event,
                    f"{knob}: {text}",
                    knob=knob,
                    state=record.state,
                    wanted=record.wanted.value,
                    found="" if record.found is None else record.found,
                )

    def _report_foreign(self, changes: Sequence[Change]) -> None:
        names = tuple(dict.fromkeys(writer.name for writer in self.writers.known))
        others = ", ".join(names)
        known = f" (known to write it and running: {others})" if others else ""
        for change in changes:
            drift, by = change.drift, change.who or f"somebody else{known}"
            self._log.event(
                Event.DRIFT if drift.held else Event.CHANGED,
                f"{drift.knob} was changed from {drift.expected} to {drift.found} by {by}"
                + (f": {change.reason.removeprefix(BY_OTHERS)}" if drift.held else "; the service does not hold it"),
                knob=drift.knob,
                expected=drift.expected,
                found=drift.found,
                writers=others,
                who=change.who,
            )
        noted = (
            ForeignChange(
                *(one.drift.knob, one.drift.expected, one.drift.found, one.drift.held, names),
                *(one.seen_at, one.seen_at),
                who=one.who,
            )
            for one in changes
        )
        self._foreign.add(noted, self._host.clock())

    def _sentence(self) -> str:
        assert self._sample is not None
        return sentence(
            self._host.identity,
            self.config,
            self._sample,
            self._decision,
            self._counters(),
            reload_failed=bool(self._reload_error),
            split_zero_pages=self.numa.split_zero_pages,
        )

    # -- the configuration ---------------------------------------------------------------------------------

    def reload(self) -> Sequence[Problem]:
        """Read the configuration again; the problems that kept the old one in place, none if it was taken."""
        # Before the first writes have ended the service is not ready, and no reload makes it so.
        if self._ready:
            self._notifier.reloading()
        problems: Sequence[Problem] = ()
        try:
            config = self._load()
            if self._sample is not None and config.policy.writes:
                problems = check_knobs(config, lacking_knobs(self._sample))
        except ConfigError as error:
            problems = error.problems
        if problems:
            self._reload_failures += 1
            self._reload_error = "; ".join(map(str, problems))
            text = f"the new configuration is wrong, and the old one stays: {self._reload_error}"
            self._log.event(Event.RELOAD_FAILED, text, problems=len(problems))
        else:
            self._take(config)
        if self._ready:
            self._notifier.ready(self._sentence())
        self._out_of_date()
        return problems

    def _configuration_changed(self) -> bool:
        try:
            return self._load() != self.config
        except ConfigError:
            return True

    def _take(self, config: Config) -> None:
        self._reload_error = ""
        self._restart_needed_for = tuple(not_reloadable(self.config, config))
        # Settings that wait for a restart keep their values.
        kept = {key: getattr(self.config, key) for key in self._restart_needed_for}
        self.config = dataclasses.replace(config, **kept)
        self._policy_runner.take(self.config, self._executor.journal.entries)
        self._decision = forgiven(self._decision)
        waits = ", ".join(self._restart_needed_for)
        text = "the configuration was read again"
        self._log.event(Event.RELOADED, f"{text}; these wait for a restart: {waits}" if waits else text, waits=waits)
        if self._timer is not None:
            self._schedule(asyncio.get_running_loop().time())

    # -- requests ------------------------------------------------------------------------------------------

    def document(self) -> Mapping[str, object]:
        """The report (docs/json.md).

        :raises KsmdError: there is none yet
        """
        self.writers.search()
        return self._document_for_metrics()

    async def status(self) -> dict[str, object]:
        """The report, with the other writers that are known now.

        :raises KsmdError: there is none yet
        """
        await self.writers.fresh()
        return {"report": self.document()}

    def metrics_text(self) -> str:
        """The metrics in Prometheus' text format."""
        return self._exposition.text()

    def exposition(self, accept: str) -> tuple[str, bytes]:
        """The metrics: content type and body, for an Accept header.

        :raises KsmdError: there are none yet
        """
        return self._exposition.render(accept)

    def page(self, span: Span = Span.HOUR) -> bytes | Coroutine[Any, Any, bytes]:
        """The status page, of an hour rendered at most once in a tick, of a longer time once a minute.

        :raises KsmdError: there is no report yet
        """
        now = self._host.clock()
        until, found = self._pages.get(span, (now, b""))
        if until > now:
            return found
        return self._page_of(self._page_history) if span is Span.HOUR else self._longer_page(PageHistory(span))

    async def _longer_page(self, history: PageHistory) -> bytes:
        span = history.span
        self._take_past(history, await self.history.past(span.seconds, int(span.step_seconds)))
        return self._page_of(history)

    def _page_of(self, history: PageHistory) -> bytes:
        # Not imported before somebody opens the page.
        from ksmd_ctl.render.page import page

        now = self._host.clock()
        found = page(self.document(), history, now)
        self._pages[history.span] = (math.inf if history.span is Span.HOUR else now + _PAGE_SECONDS, found)
        return found

    def _take_past(self, history: PageHistory, past: Past) -> None:
        history.take(*past, self.history.calendar(), self._host.clock())

    def _mark(self, record: Record) -> None:
        foreign = KIND_OF[record.event] is Kind.FOREIGN
        self._page_history.mark(self._host.clock(), record.text, bad=record.bad, foreign=foreign)

    def _point(self) -> Point:
        assert self._sample is not None
        return Point(
            self._saved_bytes(),
            self._history.rates().pages_scanned_per_second,
            self.numa.ksm_pages(),
            {knob: record.found for knob, record in self._decision.records.items()},
        )

    def _means(self) -> Means:
        assert self._sample is not None
        rates = self._history.rates()
        return Means(
            0,
            self._saved_bytes(),
            self._sample.number("pages_shared"),
            self._sample.number("pages_sharing"),
            rates.pages_scanned_per_second,
            rates.ksmd_cpu_ratio,
            {node: pages for node, pages in self.numa.ksm_pages().items() if pages is not None},
        )

    def _document_for_metrics(self) -> Mapping[str, object]:
        """The report, with the other writers of the latest look."""
        if self._sample is None:
            raise HostError("making a report", "nothing has been sampled yet", hint="try again")
        if self._document is None:
            facts = DaemonFacts(
                os.getpid(),
                __version__,
                self._sample.time_seconds - self._started_at,
                self._ticks,
                self.metrics_address,
                self._reload_error,
                self._reload_failures,
                self._restart_needed_for,
                self._lateness.document(),
                time.process_time(),
                own_resident_bytes(),
            )
            self._document = document(
                Report(
                    self._host.identity,
                    self._sample,
                    self._decision,
                    self._history.rates(),
                    self._executor.journal.entries,
                    self.writers.known,
                    facts,
                    self.config,
                    self.numa.section(),
                    self.numa.surveyed_at,
                    self.transactions.section(),
                    self._policy_runner.section(self._sample.time_seconds),
                    self.duplicates.section(
                        self._sample.time_seconds,
                        {**self.missed_savings.pages(), **self._policy_runner.decision.unrealised},
                    ),
                    foreign_section(self._foreign.entries, self._sample.time_seconds),
                    counters=self._counters(),
                    sharing=self.sharing.section(self._sample.time_seconds),
                    domains=self._domains_section(self._sample.time_seconds),
                    history=self.history.section(),
                    switched=self.switches.section(self._sample.time_seconds),
                    switches=self.switches.counts(),
                )
            )
        return self._document

    def _domains_section(self, now: float) -> Mapping[str, object] | None:
        found = self.domains.section(now)
        return None if found is None else {**found, "measures": self.measures.section()}

    def _counters(self) -> Counters:
        return self._history.watch.counters(self.numa.surveyed_at, self.numa.merging_pages, self.numa.mapped_pages)

    def _saved_bytes(self) -> int | None:
        assert self._sample is not None
        page = self._host.identity.page_size_bytes
        split = self.numa.split_zero_pages or 0
        return saved_frames_bytes(saving(self._sample, page), self._counters(), split, page)

    def _moves_pages(self) -> bool:
        return bool(self.transactions.under_way or self.numa.moving)

    def _out_of_date(self) -> None:
        self._document = None
        self._exposition.invalidate()
