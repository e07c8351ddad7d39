# SPDX-License-Identifier: GPL-2.0-or-later
"""One instance: the service as ``ksmd-ctl daemon --host engine`` runs it, on a small host of its own.

``python -m benchmarks.fleet.instance SPEC.json``
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

import ksmd_ctl
from benchmarks.fleet.hosts import Ails, Spec
from ksmd_ctl.engine import host as engine
from ksmd_ctl.engine.demo import Demo, Guest
from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.profile import CURRENT, profile

#: Enough for the alert, and less than what the service gives up after.
_DRIFTS = 8
# A sample must see each of them.
_DRIFT_SECONDS = 2.0
_LOOK_SECONDS = 0.5
_NODE_PAGES = 1 << 17


@dataclass(slots=True)
class Load(Demo):
    """The demonstration's guests, that stop writing at some time, and somebody who changes a knob.

    :ivar go: a file with whose coming the rehearsal begins
    :ivar quiet_after: how long after that the guests write
    """

    go: Path = Path()
    quiet_after: float = 0.0
    drifts: int = 0
    _quiet_at: float = inf

    def __post_init__(self) -> None:
        Demo.__post_init__(self)
        self._at(_LOOK_SECONDS, self._look)

    def _look(self, now: float) -> None:
        if not self.go.exists():
            self._at(now + _LOOK_SECONDS, self._look)
            return
        self._quiet_at = now + self.quiet_after
        for number in range(self.drifts):
            self._at(now + number * _DRIFT_SECONDS, self._change)

    def _change(self, now: float) -> None:
        self.machine.store("stable_node_chains_prune_millisecs", "1777")

    def _write(self, guest: Guest, pid: int, address: int, own_from: int, now: float) -> None:
        if now < self._quiet_at:
            Demo._write(self, guest, pid, address, own_from, now)

    def _restart(self, guest: Guest, now: float) -> None:
        # Later than any rehearsal ends: there always is a next event.
        self._at(now + 1e6, partial(self._restart, guest))


def simulated(spec: Spec) -> engine.EngineHost:
    """The simulated host of an instance."""
    names = (
        ["web-1", "web-2", "db-1", "db-2"] if spec.guests <= 4 else [f"vm-{number}" for number in range(spec.guests)]
    )
    guests = tuple(
        Guest(name, "debian", number // 2 % 2, 0.0, name, spec.guest_pages)
        for number, name in enumerate(names[: spec.guests])
    )
    drifts = {Ails.DRIFT: _DRIFTS, Ails.OBSERVED: 1}.get(spec.ails, 0)
    machine = Machine(2, profile(CURRENT.name), node_pages=_NODE_PAGES)
    load = Load(machine, guests, spec.number, go=Path(spec.go), quiet_after=spec.quiet_after, drifts=drifts)
    return engine.EngineHost(machine, source=time.monotonic, load=load)


def main(path: str) -> int:
    """Run the service until it is stopped; its exit code."""
    found = json.loads(Path(path).read_text())
    spec = Spec(**{**found, "ails": Ails(found["ails"])})
    # Before modules that copy it are imported.
    ksmd_ctl.__version__ = spec.version
    engine.open_engine_host = lambda *_, **__: simulated(spec)
    from ksmd_ctl.cli.main import main as run

    return run(["daemon", "--host", "engine", "--config", spec.config, "--metrics-listen", spec.address])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
