# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that may merge and that ksmd has not looked at twice, out of counters, and how many of such did merge before.

A fresh page needs two looks: at the first its checksum is taken, at the second it is compared. Four counters say that
there may be some, one of them in two ways:

- *new*: anonymous memory grew. Merged pages count once in nr_anon_pages, so pages_sharing is added: the sum does not
  change by merging or un-merging. It is known within a tick, but not whether ksmd may merge that memory.
- *seen*: the pages that ksmd keeps a record of grew. These it may merge; it has found them in its slow scan, or a
  process has marked old memory as mergeable.
- *written*: cow_ksm: merged pages were written or un-merged.
- *lasting*: what is new and has been there for some seconds. Much of what programs take they give back at once, and
  that teaches that little of what is new merges; so what stays has a yield of its own.
- *swapped*: ksm_swpin_copy: swap gives each mapping of a merged page a copy of its own (findings F16).
- *changed*: what a look met for the first time, or other than before: pages_volatile after it. That is a reason to look
  once more, not one to begin: with smart_scan on, pages that it skips are counted there as well.

The yield of a kind is the share of such pages that merged when ksmd looked at once: measured, halved or doubled
slowly, and forgotten slowly, so that a program that only takes and frees memory is looked at less and less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.control.policies.change import grown, tracked_pages
from ksmd_ctl.control.policies.figures import count, percent
from ksmd_ctl.host.sample import Sample

__all__ = ["KINDS", "PRIORS", "Debts", "anonymous_pages", "freed_by_splits", "gained_pages", "merged_pages"]

KINDS: Final = ("new", "seen", "written", "swapped", "lasting", "changed")
#: What is believed of each kind before anything was seen.
PRIORS: Final = (0.5, 0.5, 0.25, 1.0, 0.5, 0.5)
_LEAST_YIELD: Final = 0.003
# In so long a yield that was found low doubles, until it is the prior again.
_FORGET_SECONDS: Final = 3600.0

# Of a huge page's pages one merges, or it would not have been split.
_FREED_A_SPLIT: Final = 511

# What has been there for one to two of these lasts.
_LASTING_SECONDS: Final = 5.0

_WORDS: Final = (
    "new anonymous pages",
    "pages that ksmd has newly found",
    "merged pages written",
    "merged pages copied by swap",
    "new anonymous pages that stay",
    "pages that had changed",
)


@dataclass(frozen=True, slots=True)
class Debts:
    """What is owed, and what paying it has brought.

    :ivar anonymous: the level of anonymous pages, merged or not, up to which all was looked at; None before the first
    :ivar tracked: the same of pages that ksmd keeps a record of
    :ivar written, swapped: pages since the last looks
    :ivar yields: by kind
    :ivar lowest: the lowest levels of anonymous pages in the last few seconds and in those before
    :ivar lowest_since: when these last few seconds began
    """

    before: Sample | None = None
    anonymous: float | None = None
    tracked: float | None = None
    written: float = 0.0
    swapped: float = 0.0
    yields: tuple[float, ...] = PRIORS
    mind_swap: bool = True
    lowest: tuple[float | None, float | None] = (None, None)
    lowest_since: float = 0.0

    def step(self, sample: Sample) -> Debts:
        """Take a sample in."""
        anonymous, tracked = anonymous_pages(sample), tracked_pages(sample)
        yields = self.yields
        if self.before is not None and yields != PRIORS:
            grows = 2.0 ** (min(max(0.0, sample.time_seconds - self.before.time_seconds), 86400.0) / _FORGET_SECONDS)
            # A yield that was found high is only taken back by what is found.
            yields = tuple(max(value, min(prior, value * grows)) for value, prior in zip(yields, PRIORS, strict=True))
        lowest, since = (self.lowest[0], _lower(self.lowest[1], anonymous)), self.lowest_since
        if sample.time_seconds - since >= _LASTING_SECONDS:
            lowest, since = (lowest[1], anonymous), sample.time_seconds
        return replace(
            self,
            before=sample,
            lowest=lowest,
            lowest_since=since,
            # What was freed is owed no more; whatever comes next is new again.
            anonymous=_lower(self.anonymous, anonymous),
            tracked=_lower(self.tracked, tracked),
            written=self.written + (grown(self.before, sample, "cow_ksm") or 0.0),
            swapped=self.swapped + ((grown(self.before, sample, "ksm_swpin_copy") or 0.0) if self.mind_swap else 0.0),
            yields=yields,
        )

    def looked(self, anonymous: float | None, tracked: float | None) -> Debts:
        """All is paid that was there when the looks began: these levels of anonymous and of tracked pages."""
        return replace(
            self,
            anonymous=self.anonymous if anonymous is None else anonymous,
            tracked=self.tracked if tracked is None else tracked,
            written=0.0,
            swapped=0.0,
        )

    @property
    def pages(self) -> tuple[float, ...]:
        """What is owed, by kind."""
        sample = self.before
        if sample is None:
            return (0.0,) * len(KINDS)
        return (
            _above(anonymous_pages(sample), self.anonymous),
            _above(tracked_pages(sample), self.tracked),
            self.written,
            self.swapped,
            _above(_lower(*self.lowest), self.anonymous),
            0.0,
        )

    @property
    def gain(self) -> float:
        """Pages that looking now is expected to save. What is new and what was found may be the same pages."""
        expected = (pages * share for pages, share in zip(self.pages, self.yields, strict=True))
        new, seen, written, swapped, lasting, _ = expected
        return max(new, seen, lasting) + written + swapped

    def learned(self, kind: int, owed: float, gained: float) -> Debts:
        """After looking: what it brought.

        :param kind: the kind for which it was done
        :param owed: pages of that kind when it began
        """
        if owed < 1:
            return self
        found = min(max(gained / owed, 0.0), 1.0)
        value = max((self.yields[kind] + 2 * found) / 3, _LEAST_YIELD)
        return replace(self, yields=(*self.yields[:kind], value, *self.yields[kind + 1 :]))

    def main(self) -> int:
        """The kind that most is expected of."""
        expected = [pages * share for pages, share in zip(self.pages, self.yields, strict=True)]
        return max(range(len(KINDS)), key=expected.__getitem__)

    def text(self) -> str:
        """What is owed, in words."""
        found = zip(KINDS, self.pages, _WORDS, self.yields, strict=True)
        # What lasts is new as well: it is told of where more is expected of it.
        left_out = "new" if KINDS[self.main()] == "lasting" else "lasting"
        said = [
            f"{count(pages)} {words} ({percent(share)} of these merged recently)"
            for kind, pages, words, share in found
            if pages >= 1 and kind != left_out
        ]
        return ", ".join(said) or "nothing new"


def anonymous_pages(sample: Sample) -> float | None:
    """Anonymous pages as processes see them: merged ones once a mapping."""
    mapped = sample.number("nr_anon_pages")
    return None if mapped is None else mapped + merged_pages(sample)


def merged_pages(sample: Sample) -> float:
    """Pages that merging saves, by the kernel's counters: pages of zeroes that ksmd replaced among them."""
    return (sample.number("pages_sharing") or 0.0) + max(0.0, sample.number("ksm_zero_pages") or 0.0)


def freed_by_splits(before: Sample, sample: Sample) -> float:
    """Pages of zeroes that splits of huge pages freed between two samples: no counter of KSM has them (findings F32).

    A split leaves anonymous memory as it is, but for these; what programs gave back at the same time can't be told
    from that.
    """
    first, last, split = anonymous_pages(before), anonymous_pages(sample), grown(before, sample, "thp_split_page")
    if first is None or last is None or not split:
        return 0.0
    return max(0.0, min(first - last, split * _FREED_A_SPLIT))


def gained_pages(before: Sample, sample: Sample) -> float:
    """Pages that merging has freed between two samples; below 0 where more came apart."""
    return merged_pages(sample) - merged_pages(before) + freed_by_splits(before, sample)


def _lower(before: float | None, now: float | None) -> float | None:
    if before is None or now is None:
        return now if before is None else before
    return min(before, now)


def _above(now: float | None, base: float | None) -> float:
    return 0.0 if now is None or base is None else max(0.0, now - base)
