# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service promises at every moment, whatever the load does, and once it does nothing any more."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from ksmd_ctl.engine.survey import find_duplicates
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs.reconcile import KnobState
from ksmd_ctl.policies.policy import Intervention
from ksmd_ctl.policies.scan_rate import MOST_PAGES
from tests.engine.validate import validate
from tests.weeks.world import World

__all__ = ["HOUR", "Promises"]

HOUR = 3600.0
#: A share of a CPU is kept over so long, and by so much: what a page costs is learned, and differs from page to page.
WINDOW_SECONDS, SLACK = 60.0, 1.15
#: What bursts that do not pay may take beside what ksmd takes at rest, over an hour (`ksmd_ctl/policies/backlog.py`).
WASTE = 0.05
#: Pressure is smoothed, and samples come seldom.
CALM_SECONDS = 60.0
#: Pulses of smart_scan in an hour that bring nothing, between two that bring something: each such one waits for twice
#: as many full scans, or as long, as the one before (`ksmd_ctl/policies/knob_recovery.py`).
FRUITLESS = 12
#: Knob writes for a change of phase, of which a burst has two or three, and a look in it; for a pulse of smart_scan,
#: the switch and the pace for it, and back; for what somebody else changed; and an hour for no such reason.
PHASE_WRITES, PULSE_WRITES, STRANGER_WRITES, IDLE_WRITES = 6, 6, 10, 20


class Window:
    """How much something has grown in the last so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.values: deque[tuple[float, float]] = deque()
        self.greatest = 0.0

    def add(self, now: float, value: float) -> float:
        """The rate, over no less than the window."""
        self.values.append((now, value))
        while len(self.values) > 2 and self.values[1][0] <= now - self.seconds:
            self.values.popleft()
        since, before = self.values[0]
        rate = (value - before) / max(now - since, self.seconds)
        self.greatest = max(self.greatest, rate)
        return rate

    @property
    def since(self) -> float:
        return self.values[0][0]


@dataclass
class Promises:
    """Watches a world, and fails at the first promise that is broken.

    :ivar writes: the knob writes of the last hour; `reasons`: how many there may be, and for what that was when
    :ivar busiest_hour: most writes in an hour; `gentle`: ticks at which ksmd was busy while tasks waited for a CPU
    """

    world: World
    writes: deque[tuple[float, Knob, KnobValue]] = field(default_factory=deque)
    reasons: deque[tuple[float, int]] = field(default_factory=deque)
    total_writes: int = 0
    busiest_hour: int = 0
    gentle: int = 0
    fruitless: deque[float] = field(default_factory=deque)
    minute: Window = field(default_factory=lambda: Window(WINDOW_SECONDS))
    hour: Window = field(default_factory=lambda: Window(HOUR))
    _pressed_since: float | None = None
    _validated_at: float = 0.0
    _stranger: float = -HOUR
    _phase: str = ""
    _recovered: Intervention = field(default_factory=Intervention)

    def __post_init__(self) -> None:
        self.world.watch(self.look)
        self.world.host.written = self.wrote

    def somebody_else(self) -> None:
        """Somebody else has written knobs: what ksmd does until they are put back is not the service's."""
        self._stranger = self.world.now
        self.reasons.append((self._stranger, STRANGER_WRITES))

    # -- at every moment ---------------------------------------------------------------------------------------

    def wrote(self, knob: Knob, value: KnobValue) -> None:
        """The service writes a knob: within what the kernel takes and the policy promises, and not too often."""
        now, spec = self.world.now, KNOBS[knob]
        if spec.choices:
            assert value in spec.choices, (now, knob, value)
        else:
            assert isinstance(value, int)
            assert spec.minimum <= value <= spec.maximum, (now, knob, value)
            assert knob is not Knob.PAGES_TO_SCAN or 0 <= value <= MOST_PAGES, (now, value)
            assert knob is not Knob.RUN or value == 1, (now, value)
        self.writes.append((now, knob, value))
        self.total_writes += 1
        while self.writes[0][0] <= now - HOUR:
            self.writes.popleft()
        self.busiest_hour = max(self.busiest_hour, len(self.writes))

    def _writes_have_reasons(self, now: float) -> None:
        if self._phase != self.world.phase:
            self._phase = self.world.phase
            self.reasons.append((now, PHASE_WRITES))
        # What happened a little earlier may be written now.
        while self.reasons and self.reasons[0][0] <= now - HOUR - WINDOW_SECONDS:
            self.reasons.popleft()
        while self.writes and self.writes[0][0] <= now - HOUR:
            self.writes.popleft()
        most = IDLE_WRITES + sum(writes for _, writes in self.reasons)
        assert len(self.writes) <= most, f"{len(self.writes)} writes in the hour before {now:.0f} s, {most} explained"

    def look(self, sample: Sample) -> None:
        """A sample is taken."""
        world, config, now = self.world, self.world.config, sample.time_seconds
        used = world.machine.ksm.cpu_ns / 1e9
        share, over_an_hour = self.minute.add(now, used), self.hour.add(now, used)
        limit = config.adaptive_max_cpu
        if self._pressed(now):
            # What was said at the tick before.
            assert world.phase != "quick", f"quick at {now:.0f} s, and tasks wait for a CPU since {self._pressed_since}"
            self.gentle += world.phase == "gentle"
            if self.minute.since >= (self._pressed_since or now) + CALM_SECONDS:
                limit /= 4
        if now > self._stranger + HOUR:
            assert share <= limit * SLACK, f"{share:.4f} of a CPU in the minute before {now:.0f} s"
            assert over_an_hour <= config.adaptive_idle_cpu * SLACK + WASTE, f"{over_an_hour:.4f} before {now:.0f} s"
        self._pulses_back_off(now)
        self._writes_have_reasons(now)
        if now - self._validated_at >= 6 * HOUR:
            self._validated_at = now
            validate(world.machine)

    def _pressed(self, now: float) -> bool:
        """Whether tasks have waited for a CPU for long."""
        if self.world.host.waiting[0] <= self.world.config.adaptive_max_cpu_pressure:
            self._pressed_since = None
            return False
        if self._pressed_since is None:
            self._pressed_since = now
        return now >= self._pressed_since + CALM_SECONDS

    def _pulses_back_off(self, now: float) -> None:
        before, self._recovered = self._recovered, self.world.decision.recovered.get("smart_scan", self._recovered)
        if self._recovered.pulses == before.pulses:
            return
        self.reasons.append((now, PULSE_WRITES))
        if self._recovered.pages > before.pages:
            self.fruitless.clear()
            return
        self.fruitless.append(now)
        while self.fruitless[0] <= now - HOUR:
            self.fruitless.popleft()
        assert len(self.fruitless) <= FRUITLESS, (
            f"{len(self.fruitless)} pulses for nothing in the hour before {now:.0f} s"
        )

    # -- once the load is constant -----------------------------------------------------------------------------

    def apart(self) -> int:
        """Frames that could be one and are not, by a plain grouping of contents."""
        found = find_duplicates(self.world.machine).pages
        assert found is not None
        return found

    async def steady(self, settle_seconds: float, seconds: float) -> None:
        """From now on the load is constant: what is seen after it had time to settle, for so long.

        Nothing oscillates: one phase, one speed. What is left are pulses of smart_scan, at growing intervals, and a
        look an hour; every few hours a look goes on with a full scan, as hit rates that are low double each hour.
        """
        world = self.world
        await asyncio.sleep(settle_seconds)
        phases, writes, pulses = len(world.phases), self.total_writes, self._recovered.pulses
        speeds: set[tuple[KnobValue, KnobValue]] = set()
        until = world.now + seconds
        while world.now < until:
            await world.tick()
            if world.phase == "background":
                speeds.add(self._speed())
        pulses = self._recovered.pulses - pulses
        bursts = pulses + 1 + seconds / HOUR
        assert len(world.phases) - phases <= 2.5 * bursts, world.phases[phases:]
        assert pulses <= 1 + seconds / (settle_seconds / 2), pulses
        assert self.total_writes - writes <= PULSE_WRITES * bursts, (self.total_writes - writes, pulses)
        assert len(speeds) <= 2 + pulses, speeds
        records = world.service._decision.records.values()
        assert {record.state for record in records} <= {KnobState.HELD, KnobState.UNMANAGED, KnobState.LACKING}

    def _speed(self) -> tuple[KnobValue, KnobValue]:
        host = self.world.host
        return host.read(Knob.PAGES_TO_SCAN), host.read(Knob.SLEEP_MILLISECS)

    def text(self) -> str:
        """What was seen."""
        world, now = self.world, self.world.now
        share = world.machine.ksm.cpu_ns / 1e9 / now
        return (
            f"{now / 86400:.1f} days, {world.ticks:,} ticks, {len(world.phases)} changes of phase, "
            f"{self.total_writes:,} knob writes, {self.busiest_hour} in the busiest hour; ksmd {100 * share:.2f} % of "
            f"a CPU, {100 * self.hour.greatest:.2f} % in the busiest hour, {100 * self.minute.greatest:.0f} % in the "
            f"busiest minute; {self._recovered.pulses} pulses, {self.gentle} ticks gentle, "
            f"{world.machine.ksm.pages_sharing:,} pages saved, {self.apart()} left apart"
        )
