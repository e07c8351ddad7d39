# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the engine's profiles a kernel behaves like: by the files that it has, then by what it does.

Files alone don't tell all: a kernel between 6.8 and 6.10 has all of 6.12's files and orders its tests as 6.1 does,
and distributions carry changes back. So a few small scenarios are run on the kernel and on the profiles, the
likeliest first; the first profile that shows the same is the one. Releases are not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ksmd_ctl.engine.profile import PROFILES, profile_for
from ksmd_ctl.errors import ReadError
from ksmd_ctl.host.interface import Lab
from ksmd_ctl.scenario.compare import compare
from ksmd_ctl.scenario.format import load
from ksmd_ctl.scenario.library import PROBES
from ksmd_ctl.scenario.model import Scenario
from ksmd_ctl.scenario.runner import Outcome, run
from ksmd_ctl.scenario.session import ENGINE, KERNEL, abilities_of, engine_for

__all__ = ["Found", "find_profile"]


@dataclass(frozen=True, slots=True)
class Found:
    """The profile that a kernel behaves like.

    :ivar certain: every probe showed the same on both; else the profile is the one that the files tell
    """

    profile: str
    certain: bool


def find_profile(lab: Lab, ksm_stat: set[str]) -> Found:
    """Run the probes.

    :param ksm_stat: the names of the lines in /proc/PID/ksm_stat, empty where there is none
    """
    readings = lab.sample().readings
    files = {name for name, reading in readings.items() if not isinstance(reading, ReadError)}
    likely = profile_for(files, ksm_stat=ksm_stat).name
    probes = [load(path) for path in sorted(PROBES.glob("*.toml"))]
    seen = [(probe, run(probe, lab, likely)) for probe in probes]
    for name in _candidates(lab, likely):
        if all(_same(probe, name, outcome) for probe, outcome in seen):
            return Found(name, True)
    return Found(likely, False)


def _candidates(lab: Lab, likely: str) -> Iterator[str]:
    yield likely
    knobs = abilities_of(lab, 1).knobs
    for name in PROFILES:
        # With other knobs it is another kernel, whatever these probes show.
        if name != likely and abilities_of(engine_for(name, 1), 1).knobs == knobs:
            yield name


def _same(probe: Scenario, profile: str, there: Outcome) -> bool:
    here = run(probe, engine_for(profile, probe.nodes), profile)
    if here.skipped or there.skipped:
        return True
    return not any(compare(probe, KERNEL, there, ENGINE, here))
