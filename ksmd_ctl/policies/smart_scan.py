# SPDX-License-Identifier: GPL-2.0-or-later
"""Healing of smart_scan's lock-out: when to switch smart_scan off for a few full scans, and what that brought.

With smart_scan on, a page that did not merge is looked at in its first three scans and then in every second to ninth.
Two equal pages merge only in a scan that looks at both: where they were registered 13 scans or more apart, every
third pair never does (findings F2), and a fifth of what pairs of processes could share stays away (F13). No counter
says so. With smart_scan off every scan looks at every page: the first takes the checksums, the second merges.

There are pages that may be locked out when ksmd came to keep records of new pages after the last such look. The
newcomers get the three scans first in which smart_scan looks at them anyway, so that what the pulse brings is its own.
Pages may also get equal by being written, which nothing tells: so there is a pulse now and then as well. Each pulse
that brings next to nothing doubles the wait for the next one of its sort.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import tracked_pages
from ksmd_ctl.policies.figures import count, seconds
from ksmd_ctl.policies.policy import Intervention

__all__ = ["FULL_SCANS", "SmartScan"]

#: The rest of the scan that runs, one for the checksums, one that merges.
FULL_SCANS: Final = 3
# So many newcomers are not worth a pulse: a share of all, and pages.
_FEW: Final = 0.001
_FEW_PAGES: Final = 64
_SETTLING_SCANS: Final = 3
_MOST_SETTLING_SCANS: Final = 384
_FIRST_WAIT_SECONDS: Final = 900.0
_LONGEST_WAIT_SECONDS: Final = 86400.0
# A pulse that brought less than this share of what might have been locked out brought next to nothing.
_SUCCESS: Final = 0.02


@dataclass(frozen=True, slots=True)
class SmartScan:
    """Pulses, and what they brought.

    :ivar known: pages that ksmd kept records of at the last look at all, or the least since
    :ivar grown_at: full_scans when newcomers were first seen
    :ivar settling_scans: how long newcomers are waited for
    :ivar wait_seconds: from one pulse now and then to the next
    :ivar since: full_scans when the pulse began, None while there is none
    :ivar cause: why it began, in words
    :ivar waiting: newcomers since the last look
    :ivar tried, brought: newcomers for which there were pulses, and what these brought
    :ivar total: what there was so far
    """

    known: float | None = None
    grown_at: float | None = None
    settling_scans: int = _SETTLING_SCANS
    wait_seconds: float = _FIRST_WAIT_SECONDS
    scanned_at: float | None = None
    since: float | None = None
    sharing: float = 0.0
    newcomers: float = 0.0
    cause: str = ""
    last: str = ""
    waiting: float = 0.0
    tried: float = 0.0
    brought: float = 0.0
    total: Intervention = field(default_factory=Intervention)

    @property
    def off(self) -> bool:
        """Whether smart_scan shall be off now."""
        return self.since is not None

    @property
    def locked_out(self) -> int | None:
        """Newcomers that smart_scan has locked out, estimated from earlier pulses; None before the first."""
        return round(self.waiting * min(1.0, self.brought / self.tried)) if self.tried else None

    def step(self, sample: Sample) -> SmartScan:
        """Take a sample in: begin with a pulse, go on with it, or end it."""
        scans, tracked = sample.number("full_scans"), tracked_pages(sample)
        sharing = sample.number("pages_sharing")
        if scans is None or tracked is None or sharing is None:
            return self
        if self.since is not None:
            if scans < self.since:
                return replace(self, since=None, known=None, grown_at=None)
            return self._ended(sample, tracked, sharing) if scans - self.since >= FULL_SCANS else self
        known = tracked if self.known is None else min(self.known, tracked)
        now = sample.time_seconds
        after = replace(self, known=known, scanned_at=now if self.scanned_at is None else self.scanned_at)
        newcomers = tracked - known
        after = replace(after, waiting=newcomers)
        if newcomers < max(_FEW_PAGES, _FEW * tracked):
            after = replace(after, grown_at=None)
        elif after.grown_at is None or scans < after.grown_at:
            after = replace(after, grown_at=scans)
        elif scans - after.grown_at >= self.settling_scans:
            cause = f"{count(newcomers)} pages have come since smart_scan was off last"
            return replace(after, since=scans, sharing=sharing, newcomers=newcomers, cause=cause)
        assert after.scanned_at is not None
        if tracked and now - after.scanned_at >= self.wait_seconds:
            cause = (
                f"smart_scan was on for {seconds(now - after.scanned_at)}, and pages may have become equal meanwhile"
            )
            return replace(after, since=scans, sharing=sharing, newcomers=0.0, cause=cause)
        return after

    def scanned(self, sample: Sample) -> SmartScan:
        """Somebody else has had ksmd look at everything with smart_scan off."""
        known = tracked_pages(sample)
        return replace(self, since=None, known=known, grown_at=None, scanned_at=sample.time_seconds, waiting=0.0)

    def _ended(self, sample: Sample, tracked: float, sharing: float) -> SmartScan:
        gained = max(0.0, sharing - self.sharing)
        good = gained >= _SUCCESS * (self.newcomers or tracked)
        settling, wait = self.settling_scans, self.wait_seconds
        if self.newcomers:
            settling = _SETTLING_SCANS if good else min(2 * settling, _MOST_SETTLING_SCANS)
        else:
            wait = _FIRST_WAIT_SECONDS if good else min(2 * wait, _LONGEST_WAIT_SECONDS)
        last = f"the last pulse brought {count(gained)} pages"
        if not good:
            wait_text = f"{settling} full scans" if self.newcomers else seconds(wait)
            last += f", next to nothing: the next such one waits {wait_text}"
        return replace(
            self.scanned(sample),
            settling_scans=settling,
            wait_seconds=wait,
            last=last,
            tried=self.tried + self.newcomers,
            brought=self.brought + (gained if self.newcomers else 0.0),
            total=self.total.and_one(round(gained)),
        )

    def text(self) -> str:
        """How it stands, in words."""
        if self.off:
            return f"off for {FULL_SCANS} full scans: {self.cause}"
        return "on" + (f"; {self.last}" if self.last else "")
