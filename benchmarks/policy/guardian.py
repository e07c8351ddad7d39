# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits until a run is over, however it ends, then ends what it started and restores the settings of KSM and THP.

On the standard input: a line of JSON, and the end when the run is over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.policy import thp
from benchmarks.policy.cgroups import Group
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.scenario.lab_restore import Before


def main() -> None:
    state = json.loads(sys.stdin.readline())
    sys.stdin.read()
    for path in state["groups"]:
        Group(Path(path)).remove()
    knobs = {Knob(name): value for name, value in state["knobs"].items()}
    try:
        Before(knobs, state["ksmd"], frozenset(state["cpus"])).restore(KsmFs())
    finally:
        thp.restore(state["thp"])


if __name__ == "__main__":
    main()
