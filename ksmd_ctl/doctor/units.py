# SPDX-License-Identifier: GPL-2.0-or-later
"""Units that have ``MemoryKSM=``, and what comes of it (`ksmd_ctl.switch.persist`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import Snapshot
from ksmd_ctl.switch.persist import MemoryKsm, memory_ksm_text

_SYSTEMD: Final = "systemctl show"
_MERGE_ANY: Final = "ksm_merge_any in /proc/PID/ksm_stat"
#: How many units are named.
_NAMED: Final = 5


def in_a_unit(seen: Snapshot) -> str:
    """How a service asks for merging on this host, as a sentence after a blank; empty where no systemd runs."""
    match seen.memory_ksm:
        case MemoryKsm.WORKS:
            return " A service does with MemoryKSM=yes in its unit."
        case None:
            return " A service does with MemoryKSM=yes in its unit (systemd 255.5; with 254 to 255.4 the unit fails)."
        case state if seen.systemd:
            why = memory_ksm_text(state, seen.systemd)
            instead = "`ksmd-ctl merge on --unit U --persist` does without it"
            return f" MemoryKSM=yes in a unit is of no use here: {why}; {instead}."
    return ""


def memory_ksm(seen: Snapshot) -> Iterator[Finding]:
    """Units that have the setting without effect, and whether it is systemd, the kernel or the unit that is wrong."""
    if seen.memory_ksm is None or not seen.memory_ksm_units:
        return
    why = memory_ksm_text(seen.memory_ksm, seen.systemd)
    # Whatever the version says: a distribution may have mended it, or `ksmd-ctl merge` has switched it on.
    units = [one for one in seen.memory_ksm_units if not (one.on and one.merge_any)]
    without = [one for one in units if why or (one.pid and one.merge_any is (not one.on))]
    if not without:
        return
    first = without[0]
    word = "on" if first.on else "off"
    fails = seen.memory_ksm is MemoryKsm.FAILS
    advice = (
        f"{why}. Take it out of these units; " if why else "They have run since before it was set, or set it back. "
    ) + "`ksmd-ctl merge` switches a unit that runs, and with --persist write its drop-in does so at each start."
    yield Finding.of(
        Code.MEMORY_KSM,
        Severity.LOSES if any(one.on for one in without) else Severity.NOTE,
        "Units with MemoryKSM= don't start" if fails else "MemoryKSM= in units has no effect",
        advice[0].upper() + advice[1:],
        Figure("version of systemd", seen.systemd or "none runs", _SYSTEMD),
        *(
            Figure(
                f"{one.unit} (MemoryKSM={'yes' if one.on else 'no'})",
                one.state or "unknown",
                _SYSTEMD if one.merge_any is None else f"{_SYSTEMD}; {_MERGE_ANY}: {'yes' if one.merge_any else 'no'}",
            )
            for one in without[:_NAMED]
        ),
        Figure("units with that", len(without), _SYSTEMD),
        command=f"ksmd-ctl merge {word} --unit {first.unit} --persist",
    )
