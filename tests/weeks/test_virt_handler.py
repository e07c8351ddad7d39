# SPDX-License-Identifier: GPL-2.0-or-later
"""KubeVirt's virt-handler, still configured, writes the knobs beside the service: a day of it on the simulated host."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.host.sample import Writer
from ksmd_ctl.knobs.reconcile import KnobState
from tests.weeks.loads import residents
from tests.weeks.world import World

DAY, HOUR, INTERVAL = 86400.0, 3600.0, 180.0
# Where the policy does not look at what there is to merge there is nothing: ksmd at virt-handler's speed takes hours.
FIXED = 'policy = "fixed"\n[service]\nsample_interval = 10\n[knobs]\nrun = 1\npages_to_scan = 1000\n'
ADAPTIVE = 'policy = "adaptive"\n[service]\nsample_interval = 10\n[adaptive]\nidle_cpu = 0.0005\nmax_cpu = 0.1\n'
KUBEVIRT = 'policy = "kubevirt"\n[service]\nsample_interval = 10\n'


class VirtHandler:
    """What virt-handler would write with its defaults; memory is short for an hour, and then for an hour it isn't.

    :ivar changed: when it gave which knob another value
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.changed: list[tuple[float, Knob]] = []
        world.host.writers = lambda: Operation.done((Writer("virt-handler", 812),))  # type: ignore[method-assign]

    def value(self, knob: Knob) -> int:
        found = self.world.host.sample().knob(knob)
        assert isinstance(found, int)
        return found

    def write(self, knob: Knob, value: KnobValue) -> None:
        if self.value(knob) != value:
            self.changed.append((self.world.now, knob))
        self.world.store(knob, value)

    def round(self) -> None:
        running, pages = self.value(Knob.RUN) == 1, self.value(Knob.PAGES_TO_SCAN)
        if int(self.world.now // HOUR) % 2:
            pages = min(pages + 300, 1250) if running else 100
            running = True
        elif running:
            running = pages - 50 >= 64
            pages -= 50
        if running:
            self.write(Knob.SLEEP_MILLISECS, 28)
            self.write(Knob.PAGES_TO_SCAN, pages)
        self.write(Knob.RUN, int(running))

    async def live(self) -> None:
        # As its pod is started, and once it is taken away.
        self.write(Knob.RUN, 0)
        rounds = int(DAY / INTERVAL) - 1
        for _ in range(rounds):
            await asyncio.sleep(INTERVAL)
            self.round()
        self.write(Knob.RUN, 0)


@pytest.mark.parametrize("text", [FIXED, ADAPTIVE, KUBEVIRT], ids=["fixed", "adaptive", "kubevirt"])
def test_a_day_beside_it(text: str, tmp_path: Path) -> None:
    world = World(tmp_path, text)
    handler = VirtHandler(world)
    if text is ADAPTIVE:
        residents(world, 2, 300)
    written: list[tuple[float, Knob]] = []
    world.host.written = lambda knob, value: written.append((world.now, knob))
    world.run(DAY + 300, handler.live())

    held = [knob for knob, record in world.service._decision.records.items() if record.wanted is not None]
    for knob, record in world.service._decision.records.items():
        if knob in held:
            # Nothing was given up, and all is as wanted at the end.
            assert record.state is KnobState.HELD, (knob, record)
    told = [line for _, line in world.said if "was changed from" in line]
    # The log has the first ones, and the report all of them: with its name.
    assert told
    assert all("virt-handler" in line for line in told)
    assert all(entry.writers == ("virt-handler",) for entry in world.service._foreign.entries)
    changed = Counter(knob for _, knob in handler.changed)
    records = world.service._decision.records
    for knob in held:
        # What the policy comes to want at the same moment is no drift.
        agreed = 4 if text is KUBEVIRT else 0
        assert changed[knob] - agreed <= records[knob].drift_total <= changed[knob], knob
    # A knob that it has changed is written once; the policy itself writes for its own reasons.
    for at, knob in handler.changed:
        again = [when for when, name in written if name is knob and at < when <= at + 60]
        if text is FIXED and knob in held:
            assert len(again) == 1, (at, knob)
    drifts = sum(records[knob].drift_total for knob in held)
    print(f"{drifts} noticed of {len(handler.changed)} changes by virt-handler, {len(written)} writes of the service")
