# SPDX-License-Identifier: GPL-2.0-or-later
"""What a replay has shown, beside what was recorded, as a document (docs/json.md). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ksmd_ctl.host.knobs import KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.replay.domains import DomainPages
from ksmd_ctl.replay.player import Point
from ksmd_ctl.reports.recording import RecordedHost, thinned
from ksmd_ctl.reports.saving import saving


@dataclass(frozen=True, slots=True)
class Moment:
    """KSM's counters at one moment; None where they aren't known. CPU seconds are since the beginning."""

    pages_shared: int | None
    pages_sharing: int | None
    saved_bytes: int | None
    full_scans: int | None
    ksmd_cpu_seconds: float | None


@dataclass(frozen=True, slots=True)
class ReplayPoint:
    """One moment of both."""

    seconds: float
    recorded: Moment
    replayed: Moment


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much pages_sharing differs, as a share of the greatest that was recorded; None where that is 0.

    :ivar largest_at_seconds: when it differs most
    """

    median: float | None
    largest: float | None
    largest_at_seconds: float | None


@dataclass(frozen=True, slots=True)
class Means:
    """Over the whole time: what was saved in the mean, and ksmd's CPU seconds."""

    saved_bytes: float | None
    ksmd_cpu_seconds: float | None


@dataclass(frozen=True, slots=True)
class ReplayedDomain:
    """A trust domain at the end of the replay.

    :ivar merged_bytes: its merged pages
    :ivar shared_bytes: those that another domain maps, too
    """

    domain: str
    processes: int
    merged_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """`replay --json`.

    :ivar knobs: values that were chosen
    :ivar policy: that decided, empty for the knobs as recorded
    :ivar apart: trust domains were kept apart
    :ivar sampling_error: the standard error that the sample brings to pages_sharing, as a share of the greatest; 0 at
        1:1, None where the sample has no equal pages
    :ivar refused: writes of knobs that the simulated host refused
    """

    format: int
    recording: RecordedHost
    profile: str
    knobs: Mapping[str, KnobValue]
    policy: str
    timeline: tuple[ReplayPoint, ...]
    pages_sharing_difference: Difference
    sampling_error: float | None
    recorded: Means
    replayed: Means
    apart: bool
    domains: tuple[ReplayedDomain, ...]
    refused: tuple[str, ...]


def replay_report(
    host: RecordedHost,
    profile: str,
    knobs: Mapping[str, KnobValue],
    policy: str,
    points: Sequence[Point],
    refused: Sequence[str],
    sampling_error: float | None = 0.0,
    *,
    apart: bool = False,
    domains: Sequence[DomainPages] = (),
) -> ReplayReport:
    """The document of a replay."""
    page = host.page_size_bytes
    bases = [points[0].recorded, points[0].replayed]
    moments = [
        ReplayPoint(
            point.recorded.time_seconds,
            _moment(point.recorded, bases[0], page),
            _moment(point.replayed, bases[1], page),
        )
        for point in points
    ]
    return ReplayReport(
        1,
        host,
        profile,
        knobs,
        policy,
        tuple(thinned(moments)),
        difference(moments),
        sampling_error,
        _means([(one.seconds, one.recorded) for one in moments]),
        _means([(one.seconds, one.replayed) for one in moments]),
        apart,
        tuple(
            ReplayedDomain(one.domain, one.processes, round(one.merged * page), round(one.shared * page))
            for one in domains
        ),
        tuple(refused),
    )


def _moment(sample: Sample, first: Sample, page: int) -> Moment:
    def whole(name: str) -> int | None:
        found = sample.number(name)
        return None if found is None else int(found)

    cpu, before, saved = sample.number("ksmd_cpu_seconds"), first.number("ksmd_cpu_seconds"), saving(sample, page)
    return Moment(
        whole("pages_shared"),
        whole("pages_sharing"),
        None if saved is None else saved.saved_bytes,
        whole("full_scans"),
        None if cpu is None or before is None else max(0.0, cpu - before),
    )


def difference(points: Sequence[ReplayPoint]) -> Difference:
    """By how much pages_sharing differs."""
    found = [
        (one.seconds, one.recorded.pages_sharing, one.replayed.pages_sharing)
        for one in points
        if one.recorded.pages_sharing is not None and one.replayed.pages_sharing is not None
    ]
    most = max((recorded or 0 for _, recorded, _ in found), default=0)
    if not most:
        return Difference(None, None, None)
    errors = [(abs((recorded or 0) - (replayed or 0)) / most, seconds) for seconds, recorded, replayed in found]
    largest, at = max(errors, key=lambda error: error[0])
    return Difference(median(error for error, _ in errors), largest, at)


def _means(moments: Sequence[tuple[float, Moment]]) -> Means:
    known = [(seconds, one.saved_bytes) for seconds, one in moments if one.saved_bytes is not None]
    total = length = 0.0
    for (begins, before), (ends, after) in pairwise(known):
        total += (before + after) / 2 * (ends - begins)
        length += ends - begins
    cpu = [one.ksmd_cpu_seconds for _, one in moments if one.ksmd_cpu_seconds is not None]
    alone = known[0][1] if known else None
    return Means(total / length if length else alone, cpu[-1] if cpu else None)
