# SPDX-License-Identifier: GPL-2.0-or-later
"""Which policy a configuration names, with its limits."""

from __future__ import annotations

from dataclasses import dataclass

from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.adaptive import Adaptive, Limits
from ksmd_ctl.policies.knob_recovery import Healing, SwapIn
from ksmd_ctl.policies.ksmtuned import Ksmtuned
from ksmd_ctl.policies.policy import Policy, PolicyDecision, Reason
from ksmd_ctl.policies.scan_time import Advised, Aim
from ksmd_ctl.policies.smart_scan import SmartScan

__all__ = ["Resting", "make_policy"]


@dataclass(frozen=True, slots=True)
class Resting:
    """``observe`` and ``fixed``: nothing to steer."""

    text: str

    @property
    def fresh(self) -> bool:
        return False

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Nothing, whatever the sample says."""
        return self, PolicyDecision({}, (Reason("policy", self.text),))


def make_policy(config: Config, page_size_bytes: int) -> Policy:
    """The policy at its beginning, with the healing that is switched on for it."""
    policy = _policy(config, page_size_bytes)
    if config.policy is PolicyName.ADAPTIVE:
        return policy
    smart = SmartScan() if config.heal_smart_scan.acts(config.policy) else None
    swapin = SwapIn() if config.heal_swapin.acts(config.policy) else None
    if smart is None and swapin is None:
        return policy
    return Healing(policy, {knob: want.value for knob, want in config.knobs.items()}, smart, swapin)


def _policy(config: Config, page_size_bytes: int) -> Policy:
    match config.policy:
        case PolicyName.OBSERVE:
            return Resting('"observe" writes nothing')
        case PolicyName.FIXED:
            return Resting('"fixed" holds what [knobs] names')
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
                )
            )
