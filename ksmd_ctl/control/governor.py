# SPDX-License-Identifier: GPL-2.0-or-later
"""Has the policy of a configuration decide at each tick, and keeps what it said. No clock, no host."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.config.model import Config, Want
from ksmd_ctl.control.desired import Desired
from ksmd_ctl.control.policies.advice import Advice
from ksmd_ctl.control.policies.choice import steering
from ksmd_ctl.control.reconcile import found_value
from ksmd_ctl.control.state import Entry
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import Knob, KnobValue

__all__ = ["RECENT", "Governor"]

#: So many of the latest decisions are kept.
RECENT: Final = 20
# Finding the right speed is no decision of its own.
_TUNING: Final = frozenset({Knob.PAGES_TO_SCAN, Knob.SLEEP_MILLISECS})
AS_FOUND: Final = "as it was found at first: the policy before steered it"


@dataclass(frozen=True, slots=True)
class _Past:
    time_seconds: float
    phase: str
    text: str
    knobs: Mapping[Knob, KnobValue]


class Governor:
    """The policy of one configuration after the other.

    :param page_size_bytes: of the host
    :ivar desired: the same object as long as nothing about it changes
    """

    def __init__(self, config: Config, page_size_bytes: int) -> None:
        self._page_size_bytes = page_size_bytes
        self._config = config
        self._steering = steering(config, page_size_bytes)
        self._advice = Advice()
        self._returning: dict[Knob, KnobValue] = {}
        self._recent: deque[_Past] = deque(maxlen=RECENT)
        self.desired = self._made()

    @property
    def fresh(self) -> bool:
        """Whether samples should be fresh as a whole."""
        return self._steering.fresh

    @property
    def within_seconds(self) -> float | None:
        """When the policy wants the next sample at the latest."""
        return self._advice.within_seconds

    @property
    def unrealised(self) -> Mapping[str, int]:
        """By kind of healing, pages that could be merged and are not yet, where the policy knows."""
        return self._advice.unrealised

    def take(self, config: Config, entries: Mapping[Knob, Entry]) -> None:
        """Go on with another configuration.

        A knob that was steered and that nobody wants any more goes back to what it was at first. Where nothing about
        the policy has changed it goes on as it was, with all that it has learned.

        :param entries: what knobs were at first
        """
        after = steering(config, self._page_size_bytes)
        before = steering(self._config, self._page_size_bytes)
        self._config = config
        if after != before:
            steered = set(self._advice.knobs) | set(self._returning)
            self._steering, self._advice = after, Advice()
            self._returning = {
                knob: entries[knob].at_first for knob in steered if knob in entries and knob not in config.knobs
            }
        self.desired = self._made()

    def tick(self, sample: Sample) -> Desired:
        """Let the policy decide."""
        self._steering, advice = self._steering.step(sample)
        # What this kernel lacks can't be steered, and that is nobody's fault; the policy's reasons say what it means.
        there = {knob: value for knob, value in advice.knobs.items() if found_value(sample, knob) is not None}
        if len(there) < len(advice.knobs):
            advice = replace(advice, knobs=there)
        before, self._advice = self._advice, advice
        back = {knob for knob, value in self._returning.items() if found_value(sample, knob) == value}
        back |= self._returning.keys() & advice.knobs.keys()
        for knob in back:
            del self._returning[knob]
        if back or advice.knobs != before.knobs:
            self.desired = self._made()
        self._remember(sample, before, advice)
        return self.desired

    def _made(self) -> Desired:
        config = self._config
        origin = f'policy = "{config.policy}"'
        wants = {knob: Want(value, True, AS_FOUND) for knob, value in self._returning.items()}
        if config.policy.writes:
            wants.update(config.knobs)
        wants.update({knob: Want(value, True, origin) for knob, value in self._advice.knobs.items()})
        return Desired(wants, config.on_drift)

    def _remember(self, sample: Sample, before: Advice, advice: Advice) -> None:
        changed = {knob: value for knob, value in advice.knobs.items() if before.knobs.get(knob) != value}
        if not advice.reasons or (advice.phase == before.phase and changed.keys() <= _TUNING and before.reasons):
            return
        reason = advice.reasons[0]
        if advice.phase == before.phase:
            reason = next((reason for reason in advice.reasons if reason.subject in changed.keys() - _TUNING), reason)
        self._recent.append(_Past(sample.time_seconds, advice.phase, reason.text, changed))

    def section(self, now: float) -> dict[str, object]:
        """What stands in the report about it (docs/json.md)."""
        return {
            "phase": self._advice.phase,
            "reasons": [{"subject": reason.subject, "text": reason.text} for reason in self._advice.reasons],
            "recent": [
                {
                    "age_seconds": max(0.0, now - past.time_seconds),
                    "phase": past.phase,
                    "text": past.text,
                    "knobs": {knob.value: value for knob, value in past.knobs.items()},
                }
                for past in reversed(self._recent)
            ],
            "healed": {
                kind: {"pulses": pulse.pulses, "pages": pulse.pages} for kind, pulse in self._advice.healed.items()
            },
        }
