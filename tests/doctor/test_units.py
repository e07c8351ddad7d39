# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says of MemoryKSM= in units: which of systemd, kernel and unit is wrong."""

from __future__ import annotations

import pytest

from ksmd_ctl.doctor.finding import Code, Finding, Severity
from ksmd_ctl.doctor.snapshot import Snapshot
from ksmd_ctl.doctor.units import in_a_unit, memory_ksm
from ksmd_ctl.switch.persist import MemoryKsm, MemoryKsmUnit

RUNS = MemoryKsmUnit("web.service", True, "active", 4711, True)
WITHOUT = MemoryKsmUnit("web.service", True, "active", 4711, False)


def look(state: MemoryKsm | None, *units: MemoryKsmUnit, version: str = "252.39") -> Snapshot:
    return Snapshot({}, {}, 1.0, memory_ksm=state, systemd=version, memory_ksm_units=units)


def only(seen: Snapshot) -> Finding:
    (found,) = memory_ksm(seen)
    return found


@pytest.mark.parametrize(
    ("state", "version", "said"),
    [
        (MemoryKsm.UNKNOWN, "252.39", "Systemd 252.39 does not know MemoryKSM= (it came with 254) and ignores it"),
        (MemoryKsm.FAILS, "255.4", "Systemd 255.4 calls prctl wrongly (until 255.5): a unit with MemoryKSM= does not"),
        (MemoryKsm.NO_PRCTL, "257", "This kernel has no prctl(PR_SET_MEMORY_MERGE) (it came with 6.4)"),
    ],
)
def test_what_is_wrong(state: MemoryKsm, version: str, said: str) -> None:
    found = only(look(state, MemoryKsmUnit("web.service", True, "failed"), version=version))
    assert (found.code, found.severity) == (Code.MEMORY_KSM, Severity.LOSES)
    assert found.advice.startswith(said)
    assert found.command == "ksmd-ctl merge on --unit web.service --persist"
    assert ("don't start" in found.title) == (state is MemoryKsm.FAILS)
    assert [(one.name, one.value) for one in found.evidence[:2]] == [
        ("version of systemd", version),
        ("web.service (MemoryKSM=yes)", "failed"),
    ]


def test_a_unit_that_runs_without_it() -> None:
    found = only(look(MemoryKsm.WORKS, WITHOUT, RUNS))
    assert found.advice.startswith("They have run since before it was set, or set it back.")
    assert "ksm_merge_any in /proc/PID/ksm_stat: no" in found.evidence[1].source
    # At its next start it fails, although it is not mergeable now, as it should be.
    off = MemoryKsmUnit("db.service", False, "active", 4712, False)
    assert only(look(MemoryKsm.FAILS, off, version="254")).title == "Units with MemoryKSM= don't start"
    # One that is to be left out loses nothing.
    off = MemoryKsmUnit("db.service", False, "active", 4712, True)
    assert only(look(MemoryKsm.WORKS, off)).severity is Severity.NOTE


@pytest.mark.parametrize(
    "seen",
    [
        look(None, WITHOUT),
        look(MemoryKsm.UNKNOWN),
        look(MemoryKsm.WORKS, RUNS),
        # It is mergeable, whatever systemd's version is said to do.
        look(MemoryKsm.FAILS, RUNS, version="254.26"),
        look(MemoryKsm.UNKNOWN, RUNS),
        # It doesn't run, or the kernel doesn't tell.
        look(MemoryKsm.WORKS, MemoryKsmUnit("web.service", True, "inactive")),
        look(MemoryKsm.WORKS, MemoryKsmUnit("web.service", True, "active", 4711, None)),
    ],
)
def test_nothing_is_said_where_nothing_is_known_to_be_wrong(seen: Snapshot) -> None:
    assert list(memory_ksm(seen)) == []


def test_how_a_service_asks_for_merging() -> None:
    assert in_a_unit(look(MemoryKsm.WORKS)) == " A service does with MemoryKSM=yes in its unit."
    assert "254 to 255.4" in in_a_unit(look(None))
    said = in_a_unit(look(MemoryKsm.UNKNOWN))
    assert said.startswith(" MemoryKSM=yes in a unit is of no use here: systemd 252.39 does not know MemoryKSM=")
    assert "`ksmd-ctl merge on --unit U --persist` does without it" in said
    assert in_a_unit(look(MemoryKsm.UNKNOWN, version="")) == ""
