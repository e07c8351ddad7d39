# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether ksmd keeps to its share of a CPU, and for how long it has to rest where it did not.

Some kernels look at every page of a mergeable mapping, there or not (findings F11): ksmd then takes a second for each
40 GiB of empty address space, within one batch, whatever pages_to_scan is. Only a long sleep afterwards makes good for
that. Writing sleep_millisecs wakes ksmd, so it is written while ksmd is still at it, and then left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.control.policies.change import grown
from ksmd_ctl.control.policies.figures import seconds
from ksmd_ctl.host.sample import Sample

__all__ = ["Allowance"]

#: Seconds of ksmd's time over its share, above which it is to rest: what pages_to_scan can set right is less.
_OVERDRAWN_SECONDS: Final = 0.5
_LONGEST_REST_SECONDS: Final = 6 * 3600.0
# It is still at it where it took more than this share of the time since the last sample.
_BUSY: Final = 0.5
_WORTH_WRITING: Final = 1.15


@dataclass(frozen=True, slots=True)
class Allowance:
    """ksmd's time against its share.

    :ivar balance: seconds of ksmd's time; below 0 it has taken so much more than its share
    :ivar rest_seconds: how long it is to sleep now, 0 where it need not rest
    :ivar deepest: the lowest balance of this rest
    :ivar expected: how far the last rest's balance had fallen, as seconds above 0
    """

    before: Sample | None = None
    balance: float = 0.0
    rest_seconds: float = 0.0
    deepest: float = 0.0
    expected: float = 0.0

    def again(self, sample: Sample) -> Allowance:
        """Begin anew, for another share."""
        return Allowance(before=sample, expected=self.expected)

    def step(self, sample: Sample, share: float) -> Allowance:
        """Take a sample in.

        :param share: what ksmd may take of a CPU
        """
        used = grown(self.before, sample, "ksmd_cpu_seconds")
        passed = 0.0 if self.before is None else sample.time_seconds - self.before.time_seconds
        if used is None or passed <= 0:
            return self.again(sample)
        # What it did not take is not saved up.
        balance = min(0.0, self.balance + share * passed - used)
        after = replace(self, before=sample, balance=balance)
        if not self.rest_seconds:
            if balance > -_OVERDRAWN_SECONDS:
                return after
            return replace(after, deepest=balance, rest_seconds=_rest(max(-balance, self.expected), share))
        if balance >= 0:
            return replace(after, rest_seconds=0.0, expected=-self.deepest)
        needed = _rest(-balance, share)
        if used > _BUSY * passed and needed > _WORTH_WRITING * self.rest_seconds:
            after = replace(after, rest_seconds=needed)
        return replace(after, deepest=min(self.deepest, balance))

    def text(self) -> str:
        """What it rests for."""
        return (
            f"it rests for {seconds(self.rest_seconds)}, for it took {seconds(-self.deepest)} more than its share: "
            "this kernel may look at empty address space"
        )


def _rest(overdrawn: float, share: float) -> float:
    return min(overdrawn / max(share, 1e-4), _LONGEST_REST_SECONDS)
