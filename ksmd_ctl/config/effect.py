# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings that are good by themselves and that the policy makes no use of.

One that reads as if it were in force is an error. The tables of policies may be prepared for a policy that is not
chosen yet, once some policy is: `unused` names them, so that ``--check-config`` can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from ksmd_ctl.config.model import AtStop, Heal, PolicyName, Want
from ksmd_ctl.config.settings import KNOB_SECTION, SETTINGS
from ksmd_ctl.errors import Problem
from ksmd_ctl.knobs import Knob

__all__ = ["unused", "without_effect"]

# Whose table it is, or whose setting.
_POLICY_OF: Final = {
    setting.name: PolicyName(setting.section)
    for setting in SETTINGS
    if setting.section in (PolicyName.ADAPTIVE, PolicyName.KERNEL, PolicyName.KSMTUNED)
} | {"heal_advisor": PolicyName.KERNEL}
_KEYS: Final = {setting.name: f"{setting.section}.{setting.key}" for setting in SETTINGS}
_NO_POLICY: Final = 'no file sets policy, and the default is "observe", which writes no knob'


def without_effect(
    values: Mapping[str, Any], origins: Mapping[str, str], knobs: Mapping[Knob, Want]
) -> Iterator[Problem]:
    """What reads as if it were in force and isn't.

    :param values: of all settings, by their name in `Config`
    :param origins: the files of those that a file sets
    """
    policy = PolicyName(values["policy"])
    why = f'policy = "{policy}" ({origins["policy"]}) writes no knob' if "policy" in origins else _NO_POLICY
    if not policy.writes:
        for file in dict.fromkeys(want.origin for want in knobs.values()):
            yield Problem(file, KNOB_SECTION, f'has no effect: {why}; policy = "fixed" holds what [knobs] names')
        for name in ("heal_smart_scan", "heal_swapin", "heal_twins"):
            if name in origins and values[name] in (Heal.ON, True):
                yield Problem(origins[name], _KEYS[name], f"true has no effect: {why}")
        if values["at_stop"] is AtStop.STOP_SCANNING:
            yield Problem(origins["at_stop"], _KEYS["at_stop"], f'"{AtStop.STOP_SCANNING}" has no effect: {why}')
    if "policy" not in origins:
        for file, table, owner in unused(policy, origins):
            yield Problem(file, table, f'has no effect: {why}; policy = "{owner}" uses it')
    yield from _healing(policy, values, origins, knobs)


def _healing(
    policy: PolicyName, values: Mapping[str, Any], origins: Mapping[str, str], knobs: Mapping[Knob, Want]
) -> Iterator[Problem]:
    def named(knob: Knob, value: object) -> str:
        want = knobs.get(knob)
        return "" if want is None or want.value != value else f"{KNOB_SECTION}.{knob} = {value} ({want.origin})"

    if not policy.writes:
        return
    off = named(Knob.RUN, 0)
    for name in ("heal_smart_scan", "heal_swapin", "heal_twins"):
        if off and values[name] in (Heal.ON, True):
            yield Problem(origins[name], _KEYS[name], f"true has no effect: {off} keeps KSM off")
    smart, advised = named(Knob.SMART_SCAN, 0), named(Knob.ADVISOR_MODE, "scan-time")
    if values["heal_smart_scan"] is Heal.ON and smart:
        yield Problem(origins["heal_smart_scan"], _KEYS["heal_smart_scan"], f"true has no effect: {smart} holds it off")
    if values["heal_swapin"] is Heal.ON and advised:
        text = f"true has no effect: {advised} leaves speed to the kernel"
        yield Problem(origins["heal_swapin"], _KEYS["heal_swapin"], text)
    if values["heal_twins"] and not values["census_cpu_share"]:
        text = f"true has no effect: nothing is looked at with census.cpu_share = 0 ({origins['census_cpu_share']})"
        yield Problem(origins["heal_twins"], _KEYS["heal_twins"], text)


def unused(policy: PolicyName, origins: Mapping[str, str]) -> tuple[tuple[str, str, PolicyName], ...]:
    """What other policies than this one would use: file, table or key, and whose it is."""
    found = (
        (origins[name], _KEYS[name] if name == "heal_advisor" else owner.value, owner)
        for name, owner in _POLICY_OF.items()
        if name in origins and owner is not policy
    )
    return tuple(dict.fromkeys(found))
