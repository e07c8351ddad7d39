# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports as they come, for ``ksmd-ctl watch``: the service's, or this process's own while no service answers.

Nothing here waits, so that whoever reads them can serve a terminal meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Final

from ksmd_ctl.cli.client import Conversation, NoService, socket_path, wait
from ksmd_ctl.cli.host import left_by_service, open_host
from ksmd_ctl.cli.source import REPORT_SECONDS
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.service import need_ksm
from ksmd_ctl.daemon.varlink_wire import HistoryParameters
from ksmd_ctl.errors import Denied, ExitCode, KsmdError, Unreachable
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import ROUND_PAGES, Survey
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.host.sample import HostKind, Writer
from ksmd_ctl.knobs.reconcile import Decision, Desired, reconcile
from ksmd_ctl.reports.document import part, text
from ksmd_ctl.reports.numa import OTHER, Group, Largest, grouped, numa_section
from ksmd_ctl.reports.report import History, Report, document
from ksmd_ctl.reports.sharing import NO_LOOK, grouping, sharing_section

#: A service that doesn't answer is asked again so often.
_AGAIN_SECONDS: Final = 2.0
#: It accepts the connection within this time; the view stands still meanwhile.
_CONNECT_SECONDS: Final = 1.0
#: Figures are old if no report has come for this time and two of its intervals.
_LATE_SECONDS: Final = 5.0
#: Who watches gets figures of processes that are about so old. The service's own are up to five minutes old; it makes
#: newer ones for whoever asks, unless that would take too much CPU time.
_SURVEY_SECONDS: Final = 10.0
# Events of the service that are not older than this are shown at first, so many at most.
_PAST_SECONDS: Final = 3600.0
_PAST_EVENTS: Final = 1000
# Without a service the same holds: a look may take so much, and all of them this share of a CPU.
_BUDGET_SECONDS: Final = 1.0
_CPU_SHARE: Final = 0.05
_LAST: Final = "these are the last ones"
# How long an operation without a descriptor is left alone.
_POLL_SECONDS: Final = 0.05


class OwnReports:
    """Reports from this process's own samples, and from what it finds out about processes in the background.

    :param interval_seconds: between samples
    :raises Absent: this kernel has no KSM
    """

    def __init__(self, host: Host, interval_seconds: float, left: Mapping[str, object] | None = None) -> None:
        self._host = host
        self._interval = interval_seconds
        self._left = left
        self._floor_bytes = Config().floor_bytes
        need_ksm(host.sample())
        self._history = History()
        self._writers: tuple[Writer, ...] = ()
        self._survey: Survey | None = None
        self._numa: Mapping[str, object] | None = None
        self._sharing: Mapping[str, object] | None = None
        self._shared_at: float | None = None
        self._largest = Largest(), Largest()
        self._surveys = self._failures = 0
        self._looks = self._look_round()
        self._operation: Operation[Any] | None = next(self._looks)
        self._looks_due = 0.0
        self._due = time.monotonic()

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` can go on; -1 for none."""
        return -1 if self._operation is None else self._operation.fileno()

    def wait_seconds(self) -> float:
        """After how long `poll` has something to do if the descriptor is not readable before."""
        running = self._operation is not None and self._operation.fileno() < 0
        due = max(0.0, self._due - time.monotonic())
        return min(due, _POLL_SECONDS) if running else due

    def poll(self) -> dict[str, object] | None:
        """The next report if it is time for one.

        :raises KsmdError: the host can't be sampled
        """
        now = time.monotonic()
        if self._operation is None and now >= self._looks_due:
            self._looks = self._look_round()
            self._operation = next(self._looks)
        while self._operation is not None and self._operation.poll():
            self._go_on(self._operation)
        if now < self._due:
            return None
        self._due = now + self._interval
        return self._report()

    def _go_on(self, operation: Operation[Any]) -> None:
        try:
            try:
                found = operation.result()
            except KsmdError as error:
                self._operation = self._looks.throw(error)
            else:
                self._operation = self._looks.send(found)
        except StopIteration as stop:
            self._operation = None
            self._looks_due = time.monotonic() + max(_SURVEY_SECONDS, stop.value / _CPU_SHARE)

    def _look_round(self) -> Generator[Operation[Any], Any, float]:
        """Look at everything once; the CPU seconds that it took. What fails leaves what was known."""
        spent, page = 0.0, self._host.identity.page_size_bytes
        try:
            self._writers = yield self._host.writers()
        except KsmdError:
            self._writers = ()
        try:
            survey: Survey = yield self._host.survey(_BUDGET_SECONDS)
        except KsmdError as error:
            self._failures += 1
            denied = error.exit_code is ExitCode.DENIED
            who = "; root may look, and a service shows it to everybody" if denied else ""
            self._numa = self._numa_section((), Group(OTHER), f"{error}{who}")
            return spent
        self._surveys += 1
        self._survey, spent = survey, survey.cpu_seconds
        groups, other = self._largest[0].choose(grouped(survey.processes, page))
        self._numa = self._numa_section(groups, other, "")
        units = grouping(survey.processes, "unit")
        try:
            found = yield self._host.sharing(units.members, _BUDGET_SECONDS)
        except KsmdError as error:
            self._sharing = {"looks": 0, "failures": 1, "error": str(error), **NO_LOOK}
            return spent
        # Whoever isn't root learns nothing of pages of others (docs/security.md).
        step = 1 if os.geteuid() == 0 else ROUND_PAGES
        facts = {"looks": self._surveys, "failures": 0, "error": ""}
        self._sharing = {**facts, **sharing_section(units, found, self._largest[1], page, step)}
        self._shared_at = found.time_seconds
        return spent + float(found.cpu_seconds)

    def _numa_section(self, groups: tuple[Group, ...], other: Group, error: str) -> Mapping[str, object]:
        facts = {"surveys": self._surveys, "failures": self._failures, "split_since_pages": None}
        return {**facts, **numa_section(self._survey, groups, other, error, self._floor_bytes)}

    def _report(self) -> dict[str, object]:
        sample, survey = self._host.sample(), self._survey
        self._history.add(sample)
        at = None if survey is None else survey.time_seconds
        merging = None if survey is None else survey.total(lambda process: process.merging_pages)
        mapped = None if survey is None else survey.total(lambda process: process.ksm_mapped_pages)
        age = None if self._shared_at is None else sample.time_seconds - self._shared_at
        return document(
            Report(
                self._host.identity,
                sample,
                reconcile(Desired(), sample, Decision()),
                self._history.rates(),
                writers=self._writers,
                numa=self._numa,
                surveyed_at=at,
                counters=self._history.watch.counters(at, merging, mapped),
                sharing=self._sharing and {"age_seconds": age, **self._sharing},
                left_by_service=self._left,
            )
        )


class Feed:
    """The reports of the service where one answers, else of this process; to be closed at the end.

    A service that does not answer is asked again every few seconds. While the figures shown were a simulated
    host's, nothing takes their place: the kernel's would be about something else.

    :param listen: ask for the service's events, too
    :ivar note: where reports are from, or why there are none; empty for from the service
    :raises Unreachable: something listens on the socket that does not answer as the service does
    :raises Absent: this kernel has no KSM
    """

    def __init__(self, args: argparse.Namespace, interval_seconds: float, *, listen: bool = False) -> None:
        self.note = ""
        self._args = args
        self._path = socket_path(args.socket)
        self._interval = interval_seconds
        self._stream: Conversation | None = None
        # Asks the service for a survey, which then is in its reports.
        self._survey: Conversation | None = None
        self._survey_at = 0.0
        # Has the service's history, and what comes to it; and whether its first answer is still to come.
        self._history: Conversation | None = None
        self._anew = True
        self._listen = listen
        self._events_at = 0.0
        self._own: OwnReports | None = None
        self._opened = ExitStack()
        # The kind of host that the latest report is about.
        self._kind: str | None = args.host
        self._ask_at = self._asked_at = 0.0
        # When the latest report came, and how long after the one before; 0 before the first.
        self._came = self._between = 0.0

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for conversation in (self._stream, self._survey, self._history):
            if conversation is not None:
                conversation.close()
        self._stream = self._survey = self._history = self._own = None
        self._opened.close()

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` can go on; -1 for none."""
        source = self._stream or self._own
        return -1 if source is None else source.fileno()

    def wait_seconds(self) -> float:
        """After how long `poll` has something to do if the descriptor is not readable before."""
        if self._stream is not None:
            return 1.0
        ask = max(0.0, self._ask_at - time.monotonic())
        return ask if self._own is None else min(ask, self._own.wait_seconds())

    @property
    def stopped(self) -> bool:
        """Whether nobody makes reports now."""
        return self._stream is None and self._own is None

    @property
    def late_seconds(self) -> float:
        """How long no report has come that should have; 0 where none is late."""
        silent = time.monotonic() - self._came if self._came else 0.0
        return silent if silent > _LATE_SECONDS + 2 * self._between else 0.0

    def poll(self) -> Mapping[str, object] | None:
        """The next report if there is one.

        :raises KsmdError: there has been none yet, and there can be none
        """
        try:
            if self._stream is None and time.monotonic() >= self._ask_at:
                self._ask()
            if self._stream is not None:
                report = self._from_service(self._stream)
            else:
                report = None if self._own is None else self._own.poll()
        except KsmdError as error:
            if not self._came:
                raise
            self._close()
            self.note = f"{_LAST}: {error}"
            self._ask_at = time.monotonic() + _AGAIN_SECONDS
            return None
        if report:
            now = time.monotonic()
            self._between = min(now - self._came, 60.0) if self._came else 0.0
            self._came = now
            self._kind = text(part(report, "host"), "kind")
        return report

    def events(self) -> Iterator[tuple[Mapping[str, object], bool]]:
        """What has come of the service's history (docs/json.md), and whether that is all of the last hour, anew."""
        try:
            while self._history is not None and (answer := self._history.arrived()) is not None:
                yield part(answer, "history"), self._anew
                self._anew = False
        except KsmdError:
            # The report says that there is none; a service that ends is said to, and asked again.
            if self._history is not None:
                self._history.close()
                self._history = None

    def next(self) -> Mapping[str, object]:
        """Wait for the next report.

        :raises KsmdError: as `poll`
        """
        while not (report := self.poll()):
            wait(self.wait_seconds(), self.fileno())
        return report

    def _from_service(self, stream: Conversation) -> Mapping[str, object] | None:
        answer = stream.arrived()
        if answer is None:
            if time.monotonic() > self._asked_at + REPORT_SECONDS and self._came < self._asked_at:
                why = f"no answer within {REPORT_SECONDS:g} s"
                raise Unreachable(f"asking the service at {self._path}", why, hint="it may hang, restart it")
            return None
        report = part(answer, "report")
        kind = text(part(report, "host"), "kind")
        if not kind:
            why = "its answer has no report"
            raise Unreachable(f"asking the service at {self._path}", why, hint="are both of one version?")
        if self._args.host not in (None, kind):
            self._read_directly(f"the service runs on the {kind}")
            # Nor will it later.
            self._ask_at = math.inf
            return None
        self.note = ""
        self._ask_for_survey()
        if self._history is None and self._listen and time.monotonic() >= self._events_at:
            self._ask_for_events()
        return report

    def _ask_for_survey(self) -> None:
        now = time.monotonic()
        try:
            if self._survey is not None and self._survey.arrived() is not None:
                self._survey.close()
                self._survey = None
            if self._survey is None and now >= self._survey_at:
                self._survey_at = now + _SURVEY_SECONDS
                self._survey = Conversation(self._path, "Nodes", more=False, timeout_seconds=_CONNECT_SECONDS)
        except KsmdError:
            # The report says why it failed.
            self._survey = None

    def _ask_for_events(self) -> None:
        self._events_at = time.monotonic() + _SURVEY_SECONDS
        parameters = HistoryParameters(time.time() - _PAST_SECONDS, limit=_PAST_EVENTS, follow=True)
        try:
            self._history = Conversation(self._path, "History", parameters, timeout_seconds=_CONNECT_SECONDS)
            self._anew = True
        except KsmdError:
            self._history = None

    def _ask(self) -> None:
        """Ask the service for its reports, or see to it that they are made here."""
        self._asked_at = time.monotonic()
        self._ask_at = self._asked_at + _AGAIN_SECONDS
        try:
            stream = Conversation(self._path, "Status", timeout_seconds=_CONNECT_SECONDS)
        except NoService:
            self._read_directly(f"no service runs ({self._path})")
        except Denied as error:
            self._read_directly(f"no permission to query the service ({error.why})")
        else:
            self._close()
            self._stream = stream
            self._events_at = 0.0

    def _read_directly(self, why: str) -> None:
        if self._args.host is None and self._kind == HostKind.ENGINE:
            self._close()
            self.note = f"{_LAST}: {why}"
            return
        if self._own is None:
            self._close()
            host = self._opened.enter_context(open_host(self._args.host, self._args.root, merged=True))
            self._own = OwnReports(host, self._interval, left_by_service(self._args))
        self.note = f"read from the {self._args.host or 'kernel'} directly: {why}"
