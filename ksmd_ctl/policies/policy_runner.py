# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the policy of a configuration, has it decide at each tick, and keeps what it said. No clock, no host."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ksmd_ctl.codec import encode
from ksmd_ctl.config.model import HOUSEKEEPING, STEERED, Config, PolicyName, Want
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs.reconcile import Desired, found_value
from ksmd_ctl.knobs.saved_knobs import SavedKnob
from ksmd_ctl.policies.adaptive import Adaptive, Limits
from ksmd_ctl.policies.knob_recovery import KnobRecovery, SmartScan, SwapIn
from ksmd_ctl.policies.ksmtuned import Ksmtuned
from ksmd_ctl.policies.kubevirt import Kubevirt
from ksmd_ctl.policies.policy import Policy, PolicyDecision, Reason
from ksmd_ctl.policies.scan_time import Advised, Aim

#: So many of the latest decisions are kept.
RECENT: Final = 20
# Finding the right speed is no decision of its own.
_TUNING: Final = frozenset({Knob.PAGES_TO_SCAN, Knob.SLEEP_MILLISECS})
BEFORE_START: Final = "as it was before the service was started: the policy before steered it"


@dataclass(frozen=True, slots=True)
class Resting:
    """``observe`` and ``fixed``: nothing to steer."""

    fresh: ClassVar = False
    text: str

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Nothing, whatever the sample says."""
        return self, PolicyDecision({}, (Reason("policy", self.text),))


def make_policy(config: Config, page_size_bytes: int) -> Policy:
    """The policy at its beginning, with the recovery that is switched on for it."""
    policy = _policy(config, page_size_bytes)
    if config.policy is PolicyName.ADAPTIVE:
        return policy
    smart = SmartScan() if config.heal_smart_scan.acts(config.policy) else None
    swapin = SwapIn() if config.heal_swapin.acts(config.policy) else None
    zero_pages = config.holds_zero_pages
    if smart is None and swapin is None and not zero_pages:
        return policy
    own = {knob: want.value for knob, want in config.knobs.items()}
    return KnobRecovery(policy, own, smart, swapin, zero_pages)


def _policy(config: Config, page_size_bytes: int) -> Policy:
    match config.policy:
        case PolicyName.OBSERVE:
            return Resting('"observe" writes nothing')
        case PolicyName.FIXED:
            return Resting('"fixed" holds what [knobs] and [ksmd] name')
        case PolicyName.KSMTUNED:
            return Ksmtuned(
                config.ksmtuned_interval,
                config.ksmtuned_npages_boost,
                config.ksmtuned_npages_decay,
                config.ksmtuned_npages_min,
                config.ksmtuned_npages_max,
                config.ksmtuned_sleep_millisecs,
                config.ksmtuned_thres_coef,
                config.ksmtuned_thres_const_bytes,
                page_size_bytes,
            )
        case PolicyName.KUBEVIRT:
            return Kubevirt(
                config.kubevirt_interval,
                config.kubevirt_pages_boost,
                config.kubevirt_pages_decay,
                config.kubevirt_pages_min,
                config.kubevirt_pages_max,
                config.kubevirt_pages_init,
                config.kubevirt_sleep_ms_baseline,
                config.kubevirt_free_percent,
            )
        case PolicyName.KERNEL:
            return Advised(
                Aim(
                    config.kernel_target_scan_time,
                    config.kernel_max_cpu,
                    config.kernel_min_pages_to_scan,
                    config.kernel_max_pages_to_scan,
                ),
                config.heal_advisor,
            )
        case PolicyName.ADAPTIVE:
            return Adaptive(
                Limits(
                    config.adaptive_max_cpu,
                    config.adaptive_idle_cpu,
                    config.adaptive_worth,
                    config.adaptive_max_cpu_pressure,
                    config.max_pressure,
                    config.heal_smart_scan.acts(config.policy),
                    config.heal_swapin.acts(config.policy),
                    config.holds_zero_pages,
                    config.chooses_scheduling,
                )
            )


@dataclass(frozen=True, slots=True)
class Past:
    """A decision that is kept: the phase that it began or went on with, why, and the knobs that it changed."""

    time_seconds: float
    phase: str
    text: str
    knobs: Mapping[Knob, KnobValue]


class PolicyRunner:
    """The policy of one configuration after the other.

    :param page_size_bytes: of the host
    :param entries: what knobs were, where a service before this one has changed them
    :ivar policy: the one that is at work, and `decision` its latest
    :ivar desired: the same object as long as nothing about it changes
    :ivar housekeeping: the CPUs that ``cpus = "housekeeping"`` stands for; None while that is being found out
    :ivar given_back: knobs that are as before the start again since the last tick, and that nobody wants any more
    :ivar stopped: why ksmd is not to run, whatever the policy and the configuration want; empty where it may
    """

    def __init__(self, config: Config, page_size_bytes: int, entries: Mapping[Knob, SavedKnob] | None = None) -> None:
        self._page_size_bytes = page_size_bytes
        self._config = config
        self.policy = make_policy(config, page_size_bytes)
        self.decision = PolicyDecision()
        # What the policy of a service before this one steered and this one doesn't goes back, as after a reload.
        gone = frozenset(entries or ())
        if config.policy.writes:
            gone &= STEERED | {Knob.USE_ZERO_PAGES, Knob.KSMD_SCHEDULING}
        self._returning = _before_start(entries or {}, gone - config.knobs.keys())
        self._recent: deque[Past] = deque(maxlen=RECENT)
        self.given_back: Mapping[Knob, KnobValue] = {}
        self.stopped = ""
        self.housekeeping: str | KsmdError | None = None
        self.desired = self._made()

    def take(self, config: Config, entries: Mapping[Knob, SavedKnob]) -> None:
        """Go on with another configuration.

        A knob that was steered and that nobody wants any more goes back to what it was before the service was started;
        under a policy that writes nothing, so does what ``[knobs]`` named. Where nothing about the policy has changed
        it goes on as it was, with all that it has learned.

        :param entries: what knobs were
        """
        after = make_policy(config, self._page_size_bytes)
        before = make_policy(self._config, self._page_size_bytes)
        gone = _in_the_way(self._config, config)
        if after != before:
            gone |= self.decision.knobs.keys() | self._returning.keys()
            if not config.policy.writes:
                gone |= self._config.knobs.keys()
            if Knob.ADVISOR_MODE in gone:
                # The kernel sets it whenever the mode is switched.
                gone.add(Knob.PAGES_TO_SCAN)
            self.policy, self.decision = after, PolicyDecision()
            self._returning = {}
        self._returning |= _before_start(entries, gone - config.knobs.keys())
        self._config = config
        self.desired = self._made()

    @property
    def needs_housekeeping(self) -> bool:
        """Whether the configuration says so."""
        cpus = self._config.knobs.get(Knob.KSMD_CPUS)
        return self._config.policy.writes and cpus is not None and cpus.value == HOUSEKEEPING

    def set_housekeeping(self, cpus: str | KsmdError) -> None:
        """Hold ksmd on these CPUs, where the configuration says so, or say why that can't be."""
        self.housekeeping = cpus
        self.desired = self._made()

    def stop(self, why: str, entries: Mapping[Knob, SavedKnob]) -> None:
        """Hold `run` at 0 for a reason; with none, hold it no more: then it is as wanted, or as it was before.

        :param entries: what knobs were
        """
        if why == self.stopped:
            return
        if not why:
            self._returning |= _before_start(entries, {Knob.RUN} - self._config.knobs.keys())
        self.stopped = why
        self.desired = self._made()

    def tick(self, sample: Sample) -> Desired:
        """Let the policy decide. While ksmd is stopped it does not."""
        if self.stopped:
            self.given_back = {}
            return self.desired
        self.policy, decision = self.policy.step(sample)
        # What this kernel lacks can't be steered, and that is nobody's fault; the policy's reasons say what it means.
        there = {knob: value for knob, value in decision.knobs.items() if found_value(sample, knob) is not None}
        if len(there) < len(decision.knobs):
            decision = replace(decision, knobs=there)
        before, self.decision = self.decision, decision
        over = self._give_back(sample)
        if over or decision.knobs != before.knobs:
            self.desired = self._made()
        self._remember(sample, before, decision)
        return self.desired

    def _give_back(self, sample: Sample) -> bool:
        """Find what has gone back, and what can't; whether there was any."""
        merged = (sample.number("pages_shared") or 0) > 0
        wanted = dict(self.decision.knobs)
        if self._config.policy.writes:
            wanted |= {knob: want.value for knob, want in self._config.knobs.items()}
        # A knob that may be lacking (optional = true) and is.
        wanted = {knob: value for knob, value in wanted.items() if found_value(sample, knob) is not None}
        before_start = self._returning.get(Knob.ADVISOR_MODE, sample.knob(Knob.ADVISOR_MODE))
        back: dict[Knob, KnobValue] = {}
        over: set[Knob] = set()
        for knob, value in self._returning.items():
            found = found_value(sample, knob)
            if knob in wanted or found is None or (KNOBS[knob].needs_unmerge and merged and found != value):
                over.add(knob)
            elif knob is Knob.PAGES_TO_SCAN and wanted.get(Knob.ADVISOR_MODE, before_start) == "scan-time":
                # The kernel's advisor sets it. Where it is on and not by us, there is nothing to give back.
                over.add(knob)
                if Knob.ADVISOR_MODE not in {*wanted, *self._returning}:
                    back[knob] = value
            elif found == value:
                back[knob] = value
        for knob in over | back.keys():
            del self._returning[knob]
        self.given_back = back
        return bool(over or back)

    def _made(self) -> Desired:
        config = self._config
        origin = f'policy = "{config.policy}"'
        wants = {knob: Want(value, True, BEFORE_START) for knob, value in self._returning.items()}
        if config.policy.writes:
            wants.update(config.knobs)
        if self.needs_housekeeping:
            wants |= self._housekeeping_wants(wants.pop(Knob.KSMD_CPUS))
        wants.update({knob: Want(value, True, origin) for knob, value in self.decision.knobs.items()})
        if self.stopped:
            wants[Knob.RUN] = Want(0, True, self.stopped)
        return Desired(wants, config.on_drift)

    def _housekeeping_wants(self, want: Want) -> dict[Knob, Want]:
        if self.housekeeping is None:
            return {}
        if isinstance(self.housekeeping, KsmdError):
            return {Knob.KSMD_CPUS: replace(want, unknown=self.housekeeping.why)}
        return {Knob.KSMD_CPUS: replace(want, value=self.housekeeping)}

    def _remember(self, sample: Sample, before: PolicyDecision, decision: PolicyDecision) -> None:
        changed = {knob: value for knob, value in decision.knobs.items() if before.knobs.get(knob) != value}
        if not decision.reasons or (decision.phase == before.phase and changed.keys() <= _TUNING and before.reasons):
            return
        reason = decision.reasons[0]
        if decision.phase == before.phase:
            reason = next((reason for reason in decision.reasons if reason.subject in changed.keys() - _TUNING), reason)
        self._recent.append(Past(sample.time_seconds, decision.phase, reason.text, changed))

    @property
    def latest(self) -> Past | None:
        """The latest decision that is kept, None before the first."""
        return self._recent[-1] if self._recent else None

    def section(self, now: float) -> dict[str, object]:
        """What stands in the report about it (docs/json.md)."""
        return {
            "phase": self.decision.phase,
            "reasons": [{"subject": reason.subject, "text": reason.text} for reason in self.decision.reasons],
            "recent": [
                {
                    "age_seconds": max(0.0, now - past.time_seconds),
                    "phase": past.phase,
                    "text": past.text,
                    "knobs": {knob.value: value for knob, value in past.knobs.items()},
                }
                for past in reversed(self._recent)
            ],
            "healed": encode(self.decision.recovered),
        }


def _before_start(entries: Mapping[Knob, SavedKnob], knobs: Set[Knob]) -> dict[Knob, KnobValue]:
    """What some knobs go back to."""
    values = {knob: entries[knob].at_start for knob in knobs if knob in entries}
    # run = 2 would un-merge everything; 0 stops as well.
    return {
        knob: 0 if knob is Knob.RUN and value == 2 else value for knob, value in values.items() if value is not None
    }


def _in_the_way(before: Config, after: Config) -> set[Knob]:
    """What the next configuration names no more and has to go back all the same, for something that it names."""
    # The kernel refuses pages_to_scan while its advisor is on.
    advisor = Knob.ADVISOR_MODE in before.knobs.keys() - after.knobs.keys()
    return {Knob.ADVISOR_MODE} if advisor and Knob.PAGES_TO_SCAN in after.knobs else set()
