# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service knows, as one immutable value; `document` makes the JSON document of it that everything renders."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.config.model import Config
from ksmd_ctl.errors import Absent, ReadError, Unreadable
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.sample import HostIdentity, Sample, Writer
from ksmd_ctl.knobs.reconcile import Decision, Desired, KnobState, reconcile
from ksmd_ctl.knobs.saved_knobs import SavedKnob
from ksmd_ctl.policies.counters import counter_delta
from ksmd_ctl.reports.numa import host_document
from ksmd_ctl.reports.saving import (
    CURRENT,
    Counters,
    CountersWatch,
    least_saved_bytes,
    merged_pages,
    saved_frames_bytes,
    saving,
)

FORMAT: Final = 1

#: Rates are those of about so long.
RATE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class ScanRates:
    """What changes with time; each None where it isn't known.

    :ivar rate_seconds: how long it was looked at
    """

    rate_seconds: float | None = None
    pages_scanned_per_second: float | None = None
    full_scan_seconds: float | None = None
    ksmd_cpu_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """The service itself.

    :ivar tick_lateness: how late ticks came (`ksmd_ctl.daemon.loop`)
    :ivar cpu_seconds: CPU time that its process has taken, without that of the broker
    :ivar resident_bytes: memory of its process; None where that can't be read
    """

    pid: int
    version: str
    uptime_seconds: float
    ticks: int
    metrics_address: str
    reload_error: str = ""
    reload_failures: int = 0
    restart_needed_for: tuple[str, ...] = ()
    tick_lateness: Mapping[str, object] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    resident_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """One tick, ready to be rendered.

    :ivar daemon: None where no service runs and a command has looked itself
    :ivar config: None in the same case
    :ivar numa: what `ksmd_ctl.reports.numa.numa_section` made of the latest survey, None where there was none
    :ivar surveyed_at: when that was, by `Host.clock`
    :ivar transactions: what is known of transactions, None where their journal was not looked at
    :ivar policy: what the policy decided and why (`ksmd_ctl.policies.policy_runner`), None where there is none at work
    :ivar healing: what is known of duplicate KSM pages (`ksmd_ctl.transactions.duplicates`), None where no service runs
    :ivar foreign_changes: what others changed within a day (`ksmd_ctl.knobs.foreign`), None where it isn't known
    :ivar left_by_service: what a service left changed that ended without a stop (`left_section`), None for nothing
    :ivar counters: whether the kernel's counters say what is merged now
    :ivar domains: what is known of trust domains (`ksmd_ctl.domains.documents`), None where none are configured
    :ivar history: what is known of the file of the history (`ksmd_ctl.daemon.history`), None where none is kept
    :ivar switched: who was switched on or off (`ksmd_ctl.switch.keep`); None where that isn't known
    :ivar switches: how many the service has switched, by method and result (`ksmd_ctl.daemon.switching`)
    :ivar sharing: the latest look at who shares frames with whom (`ksmd_ctl.reports.sharing`); None before that
    """

    identity: HostIdentity
    sample: Sample
    decision: Decision
    rates: ScanRates = field(default_factory=ScanRates)
    journal: Mapping[Knob, SavedKnob] = field(default_factory=dict)
    writers: tuple[Writer, ...] = ()
    daemon: DaemonFacts | None = None
    config: Config | None = None
    numa: Mapping[str, object] | None = None
    surveyed_at: float | None = None
    transactions: Mapping[str, object] | None = None
    policy: Mapping[str, object] | None = None
    healing: Mapping[str, object] | None = None
    foreign_changes: Sequence[Mapping[str, object]] | None = None
    left_by_service: Mapping[str, object] | None = None
    counters: Counters = CURRENT
    domains: Mapping[str, object] | None = None
    sharing: Mapping[str, object] | None = None
    history: Mapping[str, object] | None = None
    switched: Sequence[Mapping[str, object]] | None = None
    switches: Mapping[str, Mapping[str, int]] | None = None


class History:
    """The samples of about the last `RATE_SECONDS`, when full scans ended, and what happened while ksmd was stopped.

    :ivar watch: tells whether the counters of the latest sample are stale
    """

    def __init__(self) -> None:
        self.watch = CountersWatch()
        self._samples: deque[Sample] = deque()
        self._full_scans: int | float | None = None
        self._changed_at: float | None = None
        self._full_scan_seconds: float | None = None

    def add(self, sample: Sample) -> None:
        self.watch.add(sample)
        samples = self._samples
        samples.append(sample)
        oldest = sample.time_seconds - RATE_SECONDS
        # The one before the window stays, or there were no rate at all at long intervals.
        while len(samples) > 2 and samples[1].time_seconds <= oldest:
            samples.popleft()
        full_scans = sample.number("full_scans")
        if full_scans == self._full_scans:
            return
        before, self._full_scans = self._full_scans, full_scans
        # A sample with another value: of the scans that ended since the one before, all took as long. After an
        # un-merge the count begins again, and then nothing is known.
        if before is None or full_scans is None or full_scans < before:
            self._changed_at = self._full_scan_seconds = None
            return
        if self._changed_at is not None:
            self._full_scan_seconds = (sample.time_seconds - self._changed_at) / (full_scans - before)
        self._changed_at = sample.time_seconds

    def rates(self) -> ScanRates:
        if len(self._samples) < 2:
            return ScanRates()
        first, last = self._samples[0], self._samples[-1]
        seconds = last.time_seconds - first.time_seconds
        if seconds <= 0:
            return ScanRates()
        scans = counter_delta(first, last, "full_scans")
        return ScanRates(
            seconds,
            _per(counter_delta(first, last, "pages_scanned"), seconds),
            seconds / scans if scans else self._full_scan_seconds,
            _per(counter_delta(first, last, "ksmd_cpu_seconds"), seconds),
        )


def report_of_samples(
    identity: HostIdentity,
    samples: Sequence[Sample],
    writers: tuple[Writer, ...] = (),
    merging_pages: int | None = None,
    mapped_pages: int | None = None,
) -> Report:
    """A report where no service runs, from one sample or several.

    :param merging_pages: how many merged pages all processes had after the last sample, by the kernel's count of each
    :param mapped_pages: how many KSM pages they mapped then
    """
    history = History()
    for sample in samples:
        history.add(sample)
    decision = reconcile(Desired(), samples[-1], Decision())
    counters = history.watch.counters(samples[-1].time_seconds, merging_pages, mapped_pages)
    return Report(identity, samples[-1], decision, history.rates(), writers=writers, counters=counters)


def document(report: Report) -> dict[str, object]:
    """The JSON document of a report (docs/json.md). What isn't known is null or missing, never 0."""
    sample, config, daemon = report.sample, report.config, report.daemon
    page = report.identity.page_size_bytes
    return {
        "format": FORMAT,
        "host": host_document(report.identity),
        "daemon": None
        if daemon is None
        else {
            **encode_fields(daemon),
            "config_files": [] if config is None else list(config.files),
            "config_digest": "" if config is None else config.digest,
        },
        "policy": None if config is None else config.policy.value,
        "on_drift": None if config is None else config.on_drift.value,
        "at_stop": None if config is None else config.at_stop.value,
        "switch_allow": None if config is None else config.switch_allow,
        "knobs": _knobs(report),
        "readings": {name: reading for name, reading in sample.readings.items() if not isinstance(reading, ReadError)},
        "errors": {
            name: {"kind": _kind(reading), "text": reading.why}
            for name, reading in sample.readings.items()
            if isinstance(reading, ReadError)
        },
        "derived": {
            **_saving(report, page),
            "merged_pages": merged_pages(sample),
            **encode_fields(report.rates),
        },
        "nodes": {str(number): encode_fields(memory) for number, memory in sample.nodes.items()},
        "numa": _numa(report),
        "writers": [encode_fields(writer) for writer in report.writers],
        "transaction": report.transactions,
        "decision": report.policy,
        "healing": report.healing,
        "sharing": report.sharing,
        "foreign_changes": report.foreign_changes,
        "left_by_service": report.left_by_service,
        "domains": report.domains,
        "history": report.history,
        "switched": report.switched,
        "switches": report.switches,
    }


def _saving(report: Report, page: int) -> dict[str, object]:
    found, counters = saving(report.sample, page), report.counters
    saved = None if found is None or counters.stale else found.saved_bytes
    forked = _pages(report, "forked_pages")
    low = None if saved is None or forked is None else least_saved_bytes(saved, forked, page)
    split, split_low = (_pages(report, name) for name in ("split_zero_pages", "split_zero_low_pages"))
    return {
        "saved_bytes": saved,
        "saved_low_bytes": low,
        "saved_frames_bytes": saved_frames_bytes(found, counters, split, page),
        "saved_frames_low_bytes": None if low is None or split_low is None else low + split_low * page,
        "split_zero_bytes": None if split is None else split * page,
        "freed_bytes": None if found is None else found.freed_bytes,
        "zero_bytes": None if found is None else found.zero_bytes,
        "metadata_bytes": None if found is None else found.records_bytes,
        "stale": counters.stale,
        "stale_text": counters.text,
        "gone_pages": counters.gone_pages,
    }


def _pages(report: Report, name: str) -> int | None:
    found = None if report.numa is None else report.numa.get(name)
    return found if isinstance(found, int) else None


def _numa(report: Report) -> dict[str, object] | None:
    if report.numa is None:
        return None
    at = report.surveyed_at
    age = None if at is None else max(0.0, report.sample.time_seconds - at)
    return {"age_seconds": age, **report.numa}


@dataclass(frozen=True, slots=True)
class KnobReport:
    """What a report has of a knob, with the values from before the service's first change and at its start."""

    wanted: KnobValue | None
    found: KnobValue | None
    default: KnobValue
    at_first: KnobValue | None
    at_start: KnobValue | None
    state: KnobState
    reason: str
    drift_total: int


def _knobs(report: Report) -> dict[str, object]:
    knobs: dict[str, object] = {}
    for knob, record in report.decision.records.items():
        entry = report.journal.get(knob)
        found = KnobReport(
            wanted=None if record.wanted is None else record.wanted.value,
            found=record.found,
            default=KNOBS[knob].default,
            at_first=None if entry is None else entry.at_first,
            at_start=None if entry is None else entry.at_start,
            state=record.state,
            reason=record.reason,
            drift_total=record.drift_total,
        )
        knobs[knob.value] = encode_fields(found)
    return knobs


def _kind(error: ReadError) -> str:
    if isinstance(error, Absent):
        return "absent"
    return "unreadable" if isinstance(error, Unreadable) else "unparsable"


def _per(amount: float | None, seconds: float) -> float | None:
    return None if amount is None else amount / seconds
