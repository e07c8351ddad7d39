# SPDX-License-Identifier: GPL-2.0-or-later
"""When `adaptive` begins a burst for what is owed: not before that is worth it, has settled, and has rested."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.control.policies.debts import PRIORS, Debts
from ksmd_ctl.control.policies.figures import count, seconds

__all__ = ["FEW_GAINED", "FEW_PAGES", "Patience"]

#: Less than this that is new, or to be gained, is no reason to write knobs.
FEW_PAGES: Final = 512
FEW_GAINED: Final = 100
# What is new has settled once it has not grown for so long; but it does not wait for longer than that.
_SETTLED_SECONDS: Final = 1.0
_IMPATIENT_SECONDS: Final = 4.0
# Growth by less than this share of what is owed is none.
_GROWTH: Final = 0.05
# Bursts that did not pay take this share of a CPU at most: the next one waits for so long.
_WASTE: Final = 0.05
_REST_SECONDS: Final = (1.0, 60.0)
# One burst that brought nothing says little; a yield below this share of what is believed at first says more.
_FAILING: Final = 0.25


@dataclass(frozen=True, slots=True)
class Patience:
    """Why a burst waits.

    :ivar rest_until, rest_kind: no burst before that time for pages of that kind: the last one did not pay
    :ivar owed_since: since when there is something that is worth a burst
    :ivar grown_at, grown_to: when that grew last, and to how many pages
    """

    rest_until: float = 0.0
    rest_kind: int = 0
    owed_since: float | None = None
    grown_at: float = 0.0
    grown_to: float = 0.0

    def step(self, now: float, debts: Debts, cost: float, worth: float) -> Patience:
        """Look at what is owed.

        :param cost: seconds of ksmd's time that a burst takes
        :param worth: pages that it has to save for each of them
        """
        if not _pays(debts, cost, worth) or self._rests(now, debts):
            return replace(self, owed_since=None, grown_to=0.0)
        owed = max(debts.pages)
        if self.owed_since is None or owed > self.grown_to * (1 + _GROWTH):
            since = now if self.owed_since is None else self.owed_since
            return replace(self, owed_since=since, grown_at=now, grown_to=owed)
        return self

    def over(self, now: float) -> bool:
        """Whether a burst should begin."""
        return self.owed_since is not None and (
            now - self.grown_at >= _SETTLED_SECONDS or now - self.owed_since >= _IMPATIENT_SECONDS
        )

    def begun(self) -> Patience:
        """A burst has begun."""
        return replace(self, owed_since=None)

    def ended(self, now: float, kind: int, used: float | None, *, paid: bool) -> Patience:
        """A burst for pages of a kind has ended, and has taken so many seconds of ksmd's time."""
        least, most = _REST_SECONDS
        rest = 0.0 if paid else least if used is None else min(max(used / _WASTE, least), most)
        return replace(self, rest_until=now + rest, rest_kind=kind)

    def text(self, now: float, debts: Debts, cost: float, worth: float) -> str:
        """What it waits for."""
        text = f"since then {debts.text()}"
        if max(debts.pages) < FEW_PAGES:
            return text
        text += f": about {count(debts.gain)} may merge"
        if not _pays(debts, cost, worth):
            return f"{text}, not worth {seconds(cost)} of ksmd's time"
        if self._rests(now, debts):
            return f"{text}; waiting, as recent bursts for such pages did not pay"
        return f"{text}; waiting for more pages to appear"

    def _rests(self, now: float, debts: Debts) -> bool:
        # It waits though it is worth a burst: bursts for such pages have not paid, time and again.
        kind = debts.main()
        failing = debts.yields[kind] < PRIORS[kind] * _FAILING
        return failing and now < self.rest_until and kind == self.rest_kind


def _pays(debts: Debts, cost: float, worth: float) -> bool:
    return max(debts.pages) >= FEW_PAGES and debts.gain >= max(FEW_GAINED, worth * cost)
