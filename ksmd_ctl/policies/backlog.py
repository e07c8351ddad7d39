# SPDX-License-Identifier: GPL-2.0-or-later
"""The backlog of `adaptive`: pages that may merge and that ksmd has not scanned twice yet, and when to scan them.

A page needs two full scans to merge: the first takes its checksum, the second compares it. Counters of the kernel show
six kinds of candidates (`Kind`). Each kind has a hit rate: the share of its pages that merged after recent scans. The
hit rate is measured, moves by at most two thirds at a time, and a low one doubles each hour, so that a program that
only takes and frees memory causes fewer and fewer scans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from ksmd_ctl.figures import rough_count, rough_percent, rough_seconds
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import anonymous_pages, counter_delta, saved_pages, tracked_pages

#: Fewer new pages, or fewer pages to be gained, are no reason to write knobs.
FEW_PAGES: Final = 512
FEW_GAINED: Final = 100

_LOWEST_HIT_RATE: Final = 0.003
# A hit rate that was measured low doubles in this time, up to its initial value.
_FORGET_SECONDS: Final = 3600.0
# New memory counts as lasting once it has existed for one to two of these.
_LASTING_SECONDS: Final = 5.0

# New memory has settled once it has not grown for this time; a burst does not wait longer than the second.
_SETTLED_SECONDS: Final = 1.0
_LONGEST_WAIT_SECONDS: Final = 4.0
# Relative growth below this is noise.
_GROWTH: Final = 0.05
# Bursts that did not pay take at most this share of a CPU; the back-off is that long, within these limits.
_WASTE: Final = 0.05
_BACKOFF_SECONDS: Final = (1.0, 60.0)
# A single burst without gain is no evidence; a hit rate below this share of the initial one is.
_FAILING: Final = 0.25


# Looks for what no counter shows: the rest before the first, and the merged pages written, and new or freed anonymous
# pages, that are a sign.
_SHORTEST_REST_SECONDS: Final = 10.0
_FEW_WRITTEN: Final = 16
_FEW_GROWN: Final = 64
_UNASKED_SECONDS: Final = 3600.0
# The rest doubles up to this time at least: a look changes knobs, however little it takes.
_LONG_REST_SECONDS: Final = 300.0
# Looks take at most this share of a CPU.
_LOOKS: Final = 0.1


class Kind(Enum):
    """Why pages are candidates, and how a reason names them."""

    #: Anonymous memory grew. Known within a tick, but not whether ksmd may merge that memory.
    NEW = "new anonymous pages"
    #: ksmd keeps records of more pages: it found them in a scan, so it may merge them.
    FOUND = "pages that ksmd has newly found"
    #: cow_ksm: merged pages were written or un-merged.
    WRITTEN = "merged pages written"
    #: ksm_swpin_copy: swap gave each mapping of a merged page its own copy (findings F16).
    SWAPPED = "merged pages copied by swap"
    #: New pages that have existed for some seconds. Programs soon free much of what they take; these have their own
    #: hit rate because of that.
    LASTING = "new anonymous pages that stay"
    #: pages_volatile after a full scan: new or changed at that scan. A reason for one more full scan, never for the
    #: first: with smart_scan on, pages that it skips count there too.
    CHANGED = "pages that had changed"


#: Hit rates before anything was measured.
INITIAL_HIT_RATES: Final[Mapping[Kind, float]] = {
    Kind.NEW: 0.5,
    Kind.FOUND: 0.5,
    # Each stands for others that were written and not merged before: no counter shows these.
    Kind.WRITTEN: 1.0,
    Kind.SWAPPED: 1.0,
    Kind.LASTING: 0.5,
    Kind.CHANGED: 0.5,
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """Pages of one kind that may merge, and the share of such pages that merged recently."""

    kind: Kind
    pages: float
    hit_rate: float

    @property
    def gain(self) -> float:
        """Pages that scanning them is expected to save."""
        return self.pages * self.hit_rate


@dataclass(frozen=True, slots=True)
class Backlog:
    """Unscanned candidates, and what was learned about their kinds.

    :ivar scanned_anonymous: anonymous pages, merged or not, that were scanned twice; None before the first sample
    :ivar scanned_tracked: the same of pages that ksmd keeps a record of
    :ivar written, swapped: pages since the last full scans
    :ivar unnoticed: merged pages that were written and that pages_sharing still counts, because ksmd has not met them
    :ivar lowest: the lowest number of anonymous pages in the last few seconds and in those before
    :ivar lowest_since: when these last few seconds began
    """

    before: Sample | None = None
    scanned_anonymous: float | None = None
    scanned_tracked: float | None = None
    written: float = 0.0
    swapped: float = 0.0
    unnoticed: float = 0.0
    hit_rates: Mapping[Kind, float] = field(default_factory=lambda: INITIAL_HIT_RATES)
    count_swap: bool = True
    lowest: tuple[float | None, float | None] = (None, None)
    lowest_since: float = 0.0

    def step(self, sample: Sample) -> Backlog:
        """The backlog after another sample."""
        anonymous = anonymous_pages(sample)
        swapped = (counter_delta(self.before, sample, "ksm_swpin_copy") or 0.0) if self.count_swap else 0.0
        lowest, since = (self.lowest[0], _minimum(self.lowest[1], anonymous)), self.lowest_since
        if sample.time_seconds - since >= _LASTING_SECONDS:
            lowest, since = (lowest[1], anonymous), sample.time_seconds
        written = counter_delta(self.before, sample, "cow_ksm") or 0.0
        return replace(
            self,
            before=sample,
            lowest=lowest,
            lowest_since=since,
            # Pages that were freed are no candidates any more; pages that come after them are new again.
            scanned_anonymous=_minimum(self.scanned_anonymous, anonymous),
            scanned_tracked=_minimum(self.scanned_tracked, tracked_pages(sample)),
            written=self.written + written,
            unnoticed=max(0.0, self.unnoticed + written - _noticed(self.before, sample)),
            swapped=self.swapped + swapped,
            hit_rates=self._forgotten(sample),
        )

    def _forgotten(self, sample: Sample) -> Mapping[Kind, float]:
        if self.before is None or self.hit_rates == INITIAL_HIT_RATES:
            return self.hit_rates
        grows = 2.0 ** (min(max(0.0, sample.time_seconds - self.before.time_seconds), 86400.0) / _FORGET_SECONDS)
        # A high hit rate falls only by measurement.
        return {kind: max(rate, min(INITIAL_HIT_RATES[kind], rate * grows)) for kind, rate in self.hit_rates.items()}

    def scanned(self, anonymous: float | None, tracked: float | None) -> Backlog:
        """The backlog after full scans that began with so many anonymous and tracked pages."""
        return replace(
            self,
            scanned_anonymous=self.scanned_anonymous if anonymous is None else anonymous,
            scanned_tracked=self.scanned_tracked if tracked is None else tracked,
            written=0.0,
            swapped=0.0,
            unnoticed=0.0,
        )

    def learned(self, kind: Kind, pages: float, gained: float) -> Backlog:
        """The backlog after a scan of so many pages of a kind has gained so many."""
        if pages < 1:
            return self
        found = min(max(gained / pages, 0.0), 1.0)
        rate = max((self.hit_rates[kind] + 2 * found) / 3, _LOWEST_HIT_RATE)
        return replace(self, hit_rates={**self.hit_rates, kind: rate})

    @property
    def pages(self) -> Mapping[Kind, float]:
        """Candidates by kind."""
        sample = self.before
        if sample is None:
            return dict.fromkeys(Kind, 0.0)
        # A written page is one more anonymous page, and still counts as a merged one.
        base = None if self.scanned_anonymous is None else self.scanned_anonymous + self.unnoticed
        return {
            Kind.NEW: _excess(anonymous_pages(sample), base),
            Kind.FOUND: _excess(tracked_pages(sample), self.scanned_tracked),
            Kind.WRITTEN: self.written,
            Kind.SWAPPED: self.swapped,
            Kind.LASTING: _excess(_minimum(*self.lowest), base),
            Kind.CHANGED: 0.0,
        }

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """One for each kind, in the order of `Kind`."""
        return tuple(Candidate(kind, pages, self.hit_rates[kind]) for kind, pages in self.pages.items())

    @property
    def most_pages(self) -> float:
        """Pages of the largest kind."""
        return max(self.pages.values())

    @property
    def gain(self) -> float:
        """Pages that full scans now are expected to save. New, found and lasting pages may be the same pages."""
        new, found, written, swapped, lasting, _ = (candidate.gain for candidate in self.candidates)
        return max(new, found, lasting) + written + swapped

    @property
    def main(self) -> Candidate:
        """The candidates with the largest expected gain."""
        return max(self.candidates, key=lambda candidate: candidate.gain)

    def text(self) -> str:
        """The candidates in words."""
        # Lasting pages are new pages too: only the one with the larger expected gain is named.
        left_out = Kind.NEW if self.main.kind is Kind.LASTING else Kind.LASTING
        said = [
            f"{rough_count(each.pages)} {each.kind.value} (recent hit rate {rough_percent(each.hit_rate)})"
            for each in self.candidates
            if each.pages >= 1 and each.kind is not left_out
        ]
        return ", ".join(said) or "nothing new"


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays a burst until the backlog is worth it, has settled, and bursts that did not pay are long enough ago.

    :ivar until, kind: no burst before that time for pages of that kind: the last one did not pay
    :ivar pending_since: since when the backlog is worth a burst, None while it is not
    :ivar grown_at, grown_to: when the backlog grew last, and to how many pages
    """

    until: float = 0.0
    kind: Kind = Kind.NEW
    pending_since: float | None = None
    grown_at: float = 0.0
    grown_to: float = 0.0

    def step(self, now: float, backlog: Backlog, cost: float, worth: float) -> Backoff:
        """The back-off after another sample.

        :param cost: seconds of ksmd's time that a burst takes
        :param worth: pages that it has to save for each of them
        """
        if not _pays(backlog, cost, worth) or self._holds(now, backlog):
            return replace(self, pending_since=None, grown_to=0.0)
        pages = backlog.most_pages
        if self.pending_since is None or pages > self.grown_to * (1 + _GROWTH):
            since = now if self.pending_since is None else self.pending_since
            return replace(self, pending_since=since, grown_at=now, grown_to=pages)
        return self

    def over(self, now: float) -> bool:
        """Whether a burst should begin."""
        return self.pending_since is not None and (
            now - self.grown_at >= _SETTLED_SECONDS or now - self.pending_since >= _LONGEST_WAIT_SECONDS
        )

    def begun(self) -> Backoff:
        """The back-off after a burst began."""
        return replace(self, pending_since=None)

    def ended(self, now: float, kind: Kind, used: float | None, *, paid: bool) -> Backoff:
        """The back-off after a burst for a kind of pages ended that took so many seconds of ksmd's time."""
        least, most = _BACKOFF_SECONDS
        wait = 0.0 if paid else least if used is None else min(max(used / _WASTE, least), most)
        return replace(self, until=now + wait, kind=kind)

    def text(self, now: float, backlog: Backlog, cost: float, worth: float) -> str:
        """Why no burst begins, in words."""
        text = f"since then {backlog.text()}"
        if backlog.most_pages < FEW_PAGES:
            return text
        text += f": about {rough_count(backlog.gain)} may merge"
        if not _pays(backlog, cost, worth):
            return f"{text}, not worth {rough_seconds(cost)} of ksmd's time"
        if self._holds(now, backlog):
            return f"{text}; waiting, as recent bursts for such pages did not pay"
        return f"{text}; waiting for more pages to appear"

    def _holds(self, now: float, backlog: Backlog) -> bool:
        main = backlog.main
        failing = main.hit_rate < INITIAL_HIT_RATES[main.kind] * _FAILING
        return failing and now < self.until and main.kind is self.kind


@dataclass(frozen=True, slots=True)
class Looks:
    """Scans of all pages for what no counter shows: a process that takes another's place, pages that are written.

    After a burst that paid, the first follows soon, if anything happened at all. One that brings nothing doubles the
    time until the next, up to what `idle_cpu` allows. One an hour comes without a sign.

    :ivar since: the sample at which ksmd began to rest, None before the first burst
    :ivar rest_seconds: how long it rests at least
    :ivar sign_at: when something was first seen to have happened since, None while nothing has
    """

    since: Sample | None = None
    rest_seconds: float = _SHORTEST_REST_SECONDS
    sign_at: float | None = None

    def step(self, sample: Sample, backlog: Backlog) -> Looks:
        """After another sample in which ksmd rests."""
        if self.since is None or self.sign_at is not None:
            return self
        sign = backlog.written >= _FEW_WRITTEN or abs(self._grown(sample)) >= _FEW_GROWN
        return replace(self, sign_at=sample.time_seconds) if sign else self

    def due(self, sample: Sample) -> bool:
        """Whether ksmd has rested, and something happened that had the time to become a backlog."""
        if self.since is None:
            return False
        now, rested = sample.time_seconds, sample.time_seconds - self.since.time_seconds
        settled = self.sign_at is not None and now - self.sign_at >= _LASTING_SECONDS
        return rested >= (self.rest_seconds if settled else max(self.rest_seconds, _UNASKED_SECONDS))

    def _grown(self, sample: Sample) -> float:
        assert self.since is not None
        return (anonymous_pages(sample) or 0.0) - (anonymous_pages(self.since) or 0.0)

    def ended(self, sample: Sample, cost: float, idle_cpu: float, *, paid: bool, look: bool) -> Looks:
        """After a burst.

        :param cost: seconds of ksmd's time for a look
        :param look: the burst was one; another says nothing about looks where it brings nothing
        """
        shortest = max(_SHORTEST_REST_SECONDS, cost / _LOOKS)
        longest = max(cost / idle_cpu, _LONG_REST_SECONDS)
        rest = min(2 * self.rest_seconds, longest) if look else self.rest_seconds
        return Looks(sample, shortest if paid else max(rest, shortest))

    def text(self, sample: Sample, backlog: Backlog) -> str:
        """Why one is due, in words."""
        grown, written = self._grown(sample), rough_count(backlog.written)
        if self.sign_at is None:
            return f"a look after {rough_seconds(sample.time_seconds - self.since.time_seconds)}" if self.since else ""
        memory = f"{rough_count(abs(grown))} anonymous pages {'more' if grown > 0 else 'fewer'}"
        return f"{memory} and {written} merged pages written since ksmd began to rest: a look"


def _pays(backlog: Backlog, cost: float, worth: float) -> bool:
    return backlog.most_pages >= FEW_PAGES and backlog.gain >= max(FEW_GAINED, worth * cost)


def _minimum(before: float | None, now: float | None) -> float | None:
    if before is None or now is None:
        return now if before is None else before
    return min(before, now)


def _excess(now: float | None, base: float | None) -> float:
    return 0.0 if now is None or base is None else max(0.0, now - base)


def _noticed(before: Sample | None, sample: Sample) -> float:
    """Written pages that ksmd met between two samples: pages_sharing falls, and their records stay."""
    if before is None:
        return 0.0
    gone = max(0.0, (tracked_pages(before) or 0) - (tracked_pages(sample) or 0))
    return max(0.0, saved_pages(before) - saved_pages(sample) - gone)
