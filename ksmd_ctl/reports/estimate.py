# SPDX-License-Identifier: GPL-2.0-or-later
"""The document that is made of an estimate of what merging would save (docs/json.md, docs/estimate.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.host.estimate import Estimate, Outcome, Rules, Stage
from ksmd_ctl.host.memory import PAGE_ITEM_BYTES, Process
from ksmd_ctl.host.sample import HostIdentity, Sample
from ksmd_ctl.host.sampling import Bounds
from ksmd_ctl.policies.counters import counter_delta
from ksmd_ctl.reports.numa import FORMAT, OTHER, host_document

# What a page takes ksmd, where it doesn't run and can't be measured: the first time (its checksum alone), when it is
# merged, later where it is merged, and later where it is not, with a thousand pages and more for each fourfold
# (measured on Linux 6.18 in November 2026: docs/estimate.md), on a machine on which a look needed so long for a page.
_LOOK_SECONDS: Final = 1.95e-6
_CHECKSUM_SECONDS: Final = 1.8e-6
_MERGING_SECONDS: Final = 3.5e-6
_MERGED_SECONDS: Final = 0.33e-6
_UNMERGED_SECONDS: Final = 2.8e-6
_FOURFOLD_SECONDS: Final = 1.1e-6
_LEAST_PAGES: Final = 1000
# Of fewer pages ksmd's clock doesn't tell what one took.
_ENOUGH_PAGES: Final = 10_000


@dataclass(frozen=True, slots=True)
class LookedAt:
    """What an estimate is of.

    :ivar processes: those that were looked at, in the order of `Estimate.owners`
    :ivar page_cpu_seconds: CPU time that reading a page and its contents took; None where that isn't known
    :ivar domains: the domain of each, where domains are configured
    :ivar empty_domains: those that are configured, and to which none of them belongs
    :ivar left_out: why others could not be looked at, by pid
    :ivar gone: pids of those that ended meanwhile
    :ivar only: whose memory was asked for; empty for everybody's
    """

    processes: Sequence[Process]
    rules: Rules
    cpu_share: float
    interval_seconds: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    page_cpu_seconds: float | None = None
    domains: Sequence[str] | None = None
    empty_domains: Sequence[str] = ()
    left_out: Mapping[int, str] | None = None
    gone: Sequence[int] = ()
    only: str = ""
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class EstimatedOutcome:
    """What a document has of a setting of the knobs (docs/json.md)."""

    merge_across_nodes: int
    use_zero_pages: int
    current: bool
    pages_shared: int | None
    pages_sharing: int
    zero_pages: int
    split_zero_pages: int
    freed_bytes: int
    records_bytes: int
    saved_bytes: int
    saved_low_bytes: int
    saved_high_bytes: int


@dataclass(frozen=True, slots=True)
class EstimatedGroup:
    """What a document has of a process or of a unit (docs/json.md)."""

    group: str
    pid: int | None
    processes: int
    marked_bytes: int
    unmarked_bytes: int
    saved_bytes: int
    saved_with_unmarked_bytes: int | None


@dataclass(frozen=True, slots=True)
class EstimatedDomain:
    """What a document has of a trust domain (docs/json.md)."""

    domain: str
    processes: int
    marked_bytes: int
    saved_bytes: int
    saved_apart_bytes: int
    saved_apart_low_bytes: int
    saved_apart_high_bytes: int


@dataclass(frozen=True, slots=True)
class KsmdCost:
    """What ksmd would take (docs/json.md)."""

    first_cpu_seconds: float
    scan_cpu_seconds: float
    page_cpu_seconds: float
    measured: bool


def _outcome(one: Outcome, rules: Rules, page: int) -> EstimatedOutcome:
    records = one.items * PAGE_ITEM_BYTES
    found, low, high = (round(value * page) for value in one.freed)
    return EstimatedOutcome(
        merge_across_nodes=int(one.merge_across_nodes),
        use_zero_pages=int(one.use_zero_pages),
        current=(one.merge_across_nodes, one.use_zero_pages) == (rules.merge_across_nodes, rules.use_zero_pages),
        pages_shared=one.pages_shared,
        pages_sharing=one.pages_sharing,
        zero_pages=one.zero_pages,
        split_zero_pages=one.split_zero_pages,
        freed_bytes=found,
        records_bytes=records,
        saved_bytes=found - records,
        saved_low_bytes=low - records,
        saved_high_bytes=high - records,
    )


def ksmd_cost(outcome: Outcome, samples: Sequence[Sample], page_cpu_seconds: float | None = None) -> KsmdCost:
    """What ksmd's CPU time would be, until everything is merged once, and for each full scan of every page later.

    :param samples: of the time that the look took; where ksmd scanned enough then, they say what a page takes it
    :param page_cpu_seconds: of the look: ksmd reads the same pages on the same machine, and is as much slower as it
    """
    pages = outcome.items
    slower = 1.0 if page_cpu_seconds is None else page_cpu_seconds / _LOOK_SECONDS
    merged = min(pages, outcome.pages_sharing + (outcome.pages_shared or 0))
    fourfolds = math.log(max(pages, _LEAST_PAGES) / _LEAST_PAGES, 4)
    unmerged = _UNMERGED_SECONDS + _FOURFOLD_SECONDS * fourfolds
    each = (merged * _MERGED_SECONDS + (pages - merged) * unmerged) / pages if pages else unmerged
    measured = _measured(samples)
    scan = outcome.items * (measured or each * slower)
    # Pages of zeroes that come free have no record later, and are read before.
    first = (outcome.items + outcome.zero_pages + outcome.split_zero_pages) * _CHECKSUM_SECONDS
    first += (merged + outcome.zero_pages) * _MERGING_SECONDS + (pages - merged) * unmerged
    return KsmdCost(
        first_cpu_seconds=max(first * slower, scan),
        scan_cpu_seconds=scan,
        page_cpu_seconds=measured or each * slower,
        measured=measured is not None,
    )


def _measured(samples: Sequence[Sample]) -> float | None:
    if len(samples) < 2:
        return None
    scanned = counter_delta(samples[0], samples[-1], "pages_scanned")
    used = counter_delta(samples[0], samples[-1], "ksmd_cpu_seconds")
    return used / scanned if scanned and used and scanned >= _ENOUGH_PAGES else None


def current(outcomes: Iterable[Outcome], rules: Rules) -> Outcome:
    """The one of the knobs as they are now."""
    now = rules.merge_across_nodes, rules.use_zero_pages
    return next(one for one in outcomes if (one.merge_across_nodes, one.use_zero_pages) == now)


def estimate_document(
    identity: HostIdentity, found: Estimate, looked: LookedAt, samples: Sequence[Sample]
) -> dict[str, object]:
    """What merging would save."""
    page, more = identity.page_size_bytes, found.outcomes_with_more
    units = [one.group or OTHER for one in looked.processes]
    cost = ksmd_cost(current(more or found.outcomes, looked.rules), samples, looked.page_cpu_seconds)
    return {
        "format": FORMAT,
        "host": host_document(identity),
        "look": _look(found, looked),
        "max_page_sharing": looked.rules.max_page_sharing,
        "marked_bytes": found.pages * page,
        "freed_already_bytes": found.merged_pages * page,
        "outcomes": [encode_fields(_outcome(one, looked.rules, page)) for one in found.outcomes],
        "unmarked_bytes": found.more_pages * page if more else None,
        "outcomes_with_unmarked": [encode_fields(_outcome(one, looked.rules, page)) for one in more] if more else None,
        "processes": [encode_fields(one) for one in _groups(found, looked, page)],
        "units": [encode_fields(one) for one in _groups(found, looked, page, units)],
        "domains": _domains(found, looked, page),
        "ksmd": encode_fields(cost),
    }


def _look(found: Estimate, looked: LookedAt) -> dict[str, object]:
    stable = None if found.stable is None else found.stable.pages
    left_out = looked.left_out or {}
    return {
        "only": looked.only,
        "stage": found.stage.value,
        "complete": found.stage in (Stage.READ, Stage.FINAL) and found.content_share == 1 and not left_out,
        "interrupted": looked.interrupted,
        "seconds": round(looked.seconds, 3),
        "cpu_seconds": round(looked.cpu_seconds, 3),
        "cpu_share": looked.cpu_share,
        "interval_seconds": looked.interval_seconds,
        "read_share": found.read_share,
        "content_share": found.content_share,
        "unchanged_share": None if stable is None else stable.found,
        "unchanged_low": None if stable is None else stable.low,
        "unchanged_high": None if stable is None else stable.high,
        "processes": len(looked.processes),
        "left_out": [{"pid": pid, "why": why} for pid, why in sorted(left_out.items())],
        "gone": sorted(looked.gone),
    }


def _groups(found: Estimate, looked: LookedAt, page: int, names: Sequence[str] | None = None) -> list[EstimatedGroup]:
    """The groups, those that save most first; none as long as it is not known whose part is what.

    :param names: of the group of each process; None for each process by itself
    """
    by_process = names is None
    names = [f"{one.name}[{one.id.pid}]" for one in looked.processes] if names is None else names
    members: dict[str, list[int]] = {}
    for owner, name in enumerate(names if found.owners else ()):
        members.setdefault(name, []).append(owner)
    groups = []
    for name, owners in members.items():
        parts = [found.owners[owner] for owner in owners]
        saved = sum(one.freed for one in parts) * page - sum(one.items for one in parts) * PAGE_ITEM_BYTES
        more = sum(one.freed_with_more for one in parts) * page
        more -= sum(one.items_with_more for one in parts) * PAGE_ITEM_BYTES
        groups.append(
            EstimatedGroup(
                group=name,
                pid=looked.processes[owners[0]].id.pid if by_process else None,
                processes=len(owners),
                marked_bytes=sum(one.pages for one in parts) * page,
                unmarked_bytes=sum(one.more_pages for one in parts) * page,
                saved_bytes=round(saved),
                saved_with_unmarked_bytes=round(more) if found.outcomes_with_more else None,
            )
        )
    return sorted(groups, key=lambda one: (-(one.saved_with_unmarked_bytes or one.saved_bytes), one.group))


def _domains(found: Estimate, looked: LookedAt, page: int) -> list[Mapping[str, object]] | None:
    if looked.domains is None or found.domains is None:
        return None
    told: list[Mapping[str, object]] = []
    for one in _groups(found, looked, page, looked.domains):
        apart = found.domains.get(one.group, Bounds(0.0, 0.0, 0.0))
        items = sum(part.items for name, part in zip(looked.domains, found.owners, strict=True) if name == one.group)
        values = [round(value * page) - items * PAGE_ITEM_BYTES for value in apart]
        told.append(
            encode_fields(EstimatedDomain(one.group, one.processes, one.marked_bytes, one.saved_bytes, *values))
        )
    told += [encode_fields(EstimatedDomain(name, *[0] * 6)) for name in looked.empty_domains]
    return told
