# SPDX-License-Identifier: GPL-2.0-or-later
"""The document that is made of a recording (docs/json.md, docs/recordings.md): what was saved and what it cost over
time, who had most memory, who had contents in common with whom, and what happened.

What depends on contents is of the last look that found any, calculated from the sample: contents of which the sample
has n pages stand for `share` times as many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final, NamedTuple, TypeVar

from ksmd_ctl.host.sample import Sample
from ksmd_ctl.recording.reader import Facts, PageChange, ProcessLook, RecordedProcess, Recording
from ksmd_ctl.reports.saving import saving

#: Points of a timeline at most.
MOST_POINTS: Final = 400
# As many pairs as a person looks at; of some hundred groups nearly all have something in common.
_MOST_PAIRS: Final = 100
_MOST_EVENTS: Final = 1000
_RATE_SECONDS: Final = 1.0
# The kernel's default, for kernels without the knob.
_MAX_PAGE_SHARING: Final = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RecordedHost:
    """Where and how a recording was made.

    :ivar begun: seconds since 1970
    :ivar seconds: how long it took; where it did not come to its end, until the last sample
    :ivar complete: it came to its end
    """

    kind: str
    release: str
    profile: str
    page_size_bytes: int
    nodes: tuple[int, ...]
    program: str
    begun: float
    seconds: float
    complete: bool
    one_in: int
    keyed: bool
    anonymous: bool
    service: Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """One moment; None where it isn't known. Rates are over a second or more until then."""

    seconds: float
    run: int | None
    pages_shared: int | None
    pages_sharing: int | None
    saved_bytes: int | None
    pages_scanned_per_second: float | None
    ksmd_cpu_ratio: float | None


@dataclass(frozen=True, slots=True)
class RecordedGroup:
    """A unit or a virtual machine with mergeable memory, at the last look that found it.

    :ivar merged_bytes: its merged pages as the kernel counts them
    :ivar equal_bytes: its pages of which there is an equal one somewhere, about
    :ivar shared_bytes: of these, those of which another group has an equal one, about
    """

    group: str
    processes: int
    mergeable_bytes: int
    merged_bytes: int | None
    equal_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class RecordedDomain:
    """A trust domain with mergeable memory at the last look, as `RecordedGroup`.

    :ivar nodes: that are its alone
    :ivar shared_bytes: its pages of which another domain has an equal one, about
    :ivar could_save_bytes: what merging its equal pages with one another would free, about
    """

    domain: str
    nodes: tuple[int, ...]
    processes: int
    mergeable_bytes: int
    merged_bytes: int | None
    equal_bytes: int
    shared_bytes: int
    could_save_bytes: int


@dataclass(frozen=True, slots=True)
class RecordedPair:
    """Two groups with contents in common: so many bytes if each of these contents is counted once, about."""

    groups: tuple[str, str]
    common_bytes: int


@dataclass(frozen=True, slots=True)
class Happened:
    """Something that happened.

    :ivar service: a service told it; the kind is then one of its history
    """

    seconds: float
    kind: str
    text: str
    service: bool


@dataclass(frozen=True, slots=True)
class Contents:
    """What the last look with any page found.

    :ivar looks: how many looks there were, and `cpu_seconds` what all of them took
    :ivar seconds: when it was, None where there was none
    :ivar pages: mergeable pages, and `sampled` those in the sample
    :ivar could_save_bytes: what merging all equal pages would free, about, before ksmd's records
    """

    looks: int
    cpu_seconds: float
    seconds: float | None
    pages: int
    sampled: int
    could_save_bytes: int


@dataclass(frozen=True, slots=True)
class RecordingReport:
    """`report --json`."""

    format: int
    recording: RecordedHost
    timeline: tuple[TimelinePoint, ...]
    contents: Contents
    groups: tuple[RecordedGroup, ...]
    domains: tuple[RecordedDomain, ...]
    pairs: tuple[RecordedPair, ...]
    events: tuple[Happened, ...]
    events_left_out: int


def recording_report(recording: Recording) -> RecordingReport:
    """The report of a recording.

    :raises Unparsable: it is damaged
    """
    facts = recording.facts
    samples = list(recording.samples())
    processes = {one.process: one for one in recording.processes()}
    # Of a recording anything may be expected.
    limits = [limit for one in samples if (limit := one.number("max_page_sharing") or 0) >= 2]
    limit = int(limits[-1]) if limits else _MAX_PAGE_SHARING
    contents, groups, domains, pairs = _contents(recording, processes, limit)
    events = recording.events()
    return RecordingReport(
        1,
        recorded_host(facts, recording.nodes(), samples),
        tuple(timeline(samples, facts.page_size_bytes)),
        contents,
        groups,
        domains,
        pairs,
        tuple(Happened(*event) for event in events[:_MOST_EVENTS]),
        max(0, len(events) - _MOST_EVENTS),
    )


def recorded_host(facts: Facts, nodes: tuple[int, ...], samples: Sequence[Sample]) -> RecordedHost:
    """Where a recording was made."""
    return RecordedHost(
        kind=facts.kind,
        release=facts.release,
        profile=facts.profile,
        page_size_bytes=facts.page_size_bytes,
        nodes=nodes,
        program=facts.program,
        begun=facts.begun,
        seconds=facts.seconds if facts.seconds is not None else samples[-1].time_seconds if samples else 0.0,
        complete=facts.seconds is not None,
        one_in=facts.one_in,
        keyed=facts.keyed,
        anonymous=facts.anonymous,
        service=facts.service,
    )


def thinned(points: Sequence[T], most: int = MOST_POINTS) -> Sequence[T]:
    """At most so many of them at equal distances, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[index * (len(points) - 1) // (most - 1)] for index in range(most)]


def timeline(samples: Sequence[Sample], page_size_bytes: int) -> Iterator[TimelinePoint]:
    """The points of a timeline."""
    chosen = thinned(samples)
    before = 0
    for sample in chosen:
        # Where a knob changed, two samples may be very near to each other; ksmd's time is counted in hundredths.
        while before + 1 < len(chosen) and chosen[before + 1].time_seconds <= sample.time_seconds - _RATE_SECONDS:
            before += 1
        run, saved = sample.number("run"), saving(sample, page_size_bytes)
        yield TimelinePoint(
            sample.time_seconds,
            None if run is None else int(run),
            _whole(sample, "pages_shared"),
            _whole(sample, "pages_sharing"),
            None if saved is None else saved.saved_bytes,
            _rate(chosen[before], sample, "pages_scanned"),
            _rate(chosen[before], sample, "ksmd_cpu_seconds"),
        )


def _whole(sample: Sample, name: str) -> int | None:
    found = sample.number(name)
    return None if found is None else int(found)


def _rate(before: Sample, sample: Sample, name: str) -> float | None:
    was, now = before.number(name), sample.number(name)
    seconds = sample.time_seconds - before.time_seconds
    return None if was is None or now is None or now < was or seconds <= 0 else (now - was) / seconds


# -- contents ----------------------------------------------------------------------------------------------------


def _contents(
    recording: Recording, processes: Mapping[int, RecordedProcess], limit: int
) -> tuple[Contents, tuple[RecordedGroup, ...], tuple[RecordedDomain, ...], tuple[RecordedPair, ...]]:
    page = recording.facts.page_size_bytes
    looks = recording.looks()
    found: dict[int, dict[int, ProcessLook]] = {}
    for one in recording.process_looks():
        found.setdefault(one.look, {})[one.process] = one
    last = max(found, default=0)
    there = found.get(last, {})
    state: dict[int, dict[int, PageChange]] = {}
    for row in recording.changes():
        if row.look > last:
            break
        pages = state.setdefault(row.process, {})
        if row.content is None:
            pages.pop(row.page, None)
        else:
            pages[row.page] = row
    seen = sum(one.pages for one in there.values())
    sampled = sum(len(state.get(number, ())) for number in there)
    share = seen / sampled if sampled else 0.0
    names = {number: processes[number].group if number in processes else "?" for number in there}
    by_group = _counted(names, state)
    groups = [RecordedGroup(name, *figures) for name, figures in _figures(names, by_group, there, share, page)]
    groups.sort(key=lambda one: (-one.mergeable_bytes, one.group))
    domains = _domains(recording, processes, state, there, share, limit)
    holders = Counter(content for counts in by_group.values() for content in counts)
    contents = Contents(
        looks=len(looks),
        cpu_seconds=sum(one.cpu_seconds for one in looks),
        seconds=next((one.ended for one in looks if one.look == last), None),
        pages=seen,
        sampled=sampled,
        could_save_bytes=round(_freed(processes, state, there, limit) * share * page),
    )
    return contents, tuple(groups), domains, tuple(_pairs(by_group, holders, share * page))


_State = Mapping[int, Mapping[int, PageChange]]


class _Figures(NamedTuple):
    """As of `RecordedGroup`."""

    processes: int
    mergeable_bytes: int
    merged_bytes: int | None
    equal_bytes: int
    shared_bytes: int


def _counted(names: Mapping[int, str], state: _State) -> Mapping[str, Counter[int]]:
    """By name, how many pages of the sample have each content."""
    found: dict[str, Counter[int]] = {name: Counter() for name in names.values()}
    for number, name in names.items():
        found[name].update(row.content for row in state.get(number, {}).values() if row.content is not None)
    return found


def _figures(
    names: Mapping[int, str],
    counted: Mapping[str, Counter[int]],
    there: Mapping[int, ProcessLook],
    share: float,
    page: int,
) -> Iterator[tuple[str, _Figures]]:
    """The figures of each name."""
    total: Counter[int] = sum(counted.values(), Counter())
    holders = Counter(content for counts in counted.values() for content in counts)
    for name, counts in counted.items():
        members = [there[number] for number, other in names.items() if other == name]
        merging = [one.merging_pages for one in members if one.merging_pages is not None]
        equal = sum(count for content, count in counts.items() if total[content] > 1)
        shared = sum(count for content, count in counts.items() if holders[content] > 1)
        yield (
            name,
            _Figures(
                processes=len(members),
                mergeable_bytes=sum(one.pages for one in members) * page,
                merged_bytes=sum(merging) * page if merging else None,
                equal_bytes=round(equal * share * page),
                shared_bytes=round(shared * share * page),
            ),
        )


def _domains(
    recording: Recording,
    processes: Mapping[int, RecordedProcess],
    state: _State,
    there: Mapping[int, ProcessLook],
    share: float,
    limit: int,
) -> tuple[RecordedDomain, ...]:
    page, nodes = recording.facts.page_size_bytes, recording.domains()
    names = {number: name for number in there if number in processes and (name := processes[number].domain) is not None}
    found = []
    for name, figures in _figures(names, _counted(names, state), there, share, page):
        own = [number for number, other in names.items() if other == name]
        saved = round(_freed(processes, state, own, limit) * share * page)
        found.append(RecordedDomain(name, tuple(sorted(nodes.get(name, ()))), *figures, saved))
    return tuple(sorted(found, key=lambda one: (-one.mergeable_bytes, one.domain)))


def _freed(
    processes: Mapping[int, RecordedProcess],
    state: Mapping[int, Mapping[int, PageChange]],
    there: Iterable[int],
    limit: int,
) -> int:
    """Frames of the sample that merging all equal pages frees, as `ksmd_ctl.host.merging` counts them.

    What forks of one program map at one address, in a frame that several map, is one page.
    """
    mappings: Counter[int] = Counter()
    places: Counter[tuple[int, int, int]] = Counter()
    for number in there:
        family = processes[number].family if number in processes else 0
        for row in state.get(number, {}).values():
            if row.content is not None:
                mappings[row.content] += 1
                places[row.content, family or -number, row.page] += not row.frame
    pages: Counter[int] = Counter()
    for (content, _, _), alone in places.items():
        pages[content] += max(1, alone)
    return sum(max(0, pages[content] - -(-count // limit)) for content, count in mappings.items())


def _pairs(by_group: Mapping[str, Counter[int]], holders: Counter[int], bytes_each: float) -> list[RecordedPair]:
    members: dict[int, list[str]] = {}
    for name, counts in by_group.items():
        for content in counts:
            if holders[content] > 1:
                members.setdefault(content, []).append(name)
    # Most contents that several groups have, the same groups have.
    sets = Counter(tuple(names) for names in members.values())
    common: Counter[tuple[str, str]] = Counter()
    for names, count in sets.items():
        for pair in combinations(sorted(names), 2):
            common[pair] += count
    return [RecordedPair(pair, round(count * bytes_each)) for pair, count in common.most_common(_MOST_PAIRS)]
