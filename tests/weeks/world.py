# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole service at work on the engine in virtual time, as fast as this machine can: a week takes minutes.

An asyncio loop whose clock is the engine's: where it would wait for a timer, the engine passes that time, with ksmd at
work in it. So the service's own loop decides when a tick is due, and a load is a coroutine that sleeps.

A page stands for some ten pages of a real host: it costs ksmd so much more, and shares of a CPU keep their meaning.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Log
from ksmd_ctl.daemon.loop import ServiceLoop
from ksmd_ctl.daemon.notify import Notifier
from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.engine.profile import CURRENT, Profile
from ksmd_ctl.engine.scan import cmp_and_merge_page, scan_get_next_rmap_item
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.policies.policy import PolicyDecision
from ksmd_ctl.transactions.executor import Executor

__all__ = ["Tenant", "World", "content"]

#: What a page that is not merged, or merged, costs ksmd: ten times of what it costs a kernel (findings F5, F18), and
#: merged ones more than that, or a week would take hours.
UNIQUE_NS, MERGED_NS = 40_000, 20_000


def content(label: str) -> bytes:
    """A page that begins with a label."""
    return label.encode().ljust(PAGE_SIZE, b"\0")


class PricedMachine(Machine):
    """A machine on which merged pages are cheaper for ksmd than others."""

    def batch(self, pages: int) -> int:
        """`ksmd_ctl.engine.scan.ksm_do_scan`, with a look at what each page is."""
        ksm = self.ksm
        scanned = merged = 0
        if not pages:
            return 0
        for item, page in scan_get_next_rmap_item(ksm):
            merged += page.stable_node is not None
            cmp_and_merge_page(ksm, page, item)
            scanned += 1
            if scanned == pages:
                break
        ksm.pages_scanned += scanned
        cost = merged * MERGED_NS + (scanned - merged) * UNIQUE_NS
        ksm.cpu_ns += cost
        ksm.now_ns += cost
        return scanned


class WatchedHost(EngineHost):
    """The simulated host with what is around ksmd; it tells of each sample and of each knob that is written.

    :ivar waiting: shares of the time in which some task waits: for a CPU, for memory
    """

    def __init__(self, machine: Machine) -> None:
        self.waiting = (0.0, 0.0)
        self._waited = [0.0, 0.0]
        self._waited_at = 0.0
        self.sampled: Callable[[Sample], None] = lambda sample: None
        self.written: Callable[[Knob, KnobValue], None] = lambda knob, value: None
        super().__init__(machine)

    def wait(self, cpu: float, memory: float) -> None:
        """From now on tasks wait so much."""
        now = self.clock()
        for index, share in enumerate(self.waiting):
            self._waited[index] += share * (now - self._waited_at)
        self._waited_at, self.waiting = now, (cpu, memory)

    def sample(self, *, fresh: bool = False) -> Sample:
        """Everything that a tick needs."""
        self.wait(*self.waiting)
        sample = super().sample(fresh=fresh)
        readings: dict[str, Reading] = {
            **sample.readings,
            "cpu_pressure_some_seconds": self._waited[0],
            "pressure_some_seconds": self._waited[1],
            # In hundredths, as a kernel shows it.
            "ksmd_cpu_seconds": self.machine.ksm.cpu_ns // 10_000_000 / 100,
        }
        sample = dataclasses.replace(sample, readings=readings)
        self.sampled(sample)
        return sample

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> Operation[KnobValue]:
        """Give a knob a value."""
        self.written(knob, value)
        return super().write(knob, value, deadline_seconds)


class _Selector(selectors.PollSelector):
    """Nothing is waited for: time passes."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> Any:
        # Beside the loop's own socket pair there is one for each thread that works, in no time of this world.
        ready = super().select(1 if len(self.get_map()) > 1 else 0)
        assert ready or timeout is not None, "nothing is ever to happen again"
        if not ready and timeout:
            # Never short of a timer by a rounding.
            self._advance(math.ceil(timeout * 1e6) / 1e6)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio in a host's time."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        super().__init__(_Selector(host.advance))

    def time(self) -> float:
        return self._host.machine.ksm.now_ns / 1e9


@dataclass(slots=True)
class Tenant:
    """A process, and the labels of its pages."""

    id: ProcessId
    name: str
    start: int
    labels: list[str]


class World:
    """A machine with two nodes, the service, and whoever lives there.

    :param text: the configuration
    :ivar tenants: who lives there, by name
    :ivar phases: when the policy came to which phase
    """

    def __init__(self, directory: Path, text: str, profile: Profile = CURRENT) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "c.toml").write_text(text)
        self.config: Config = load(str(directory / "c.toml"))
        self.machine = PricedMachine(2, profile, node_pages=1 << 16)
        self.host = WatchedHost(self.machine)
        self.said: list[tuple[float, str]] = []
        self.service = ServiceLoop(
            self.config,
            self.host,
            Executor(self.host, SavedKnobs(directory / "state", self.host.identity)),
            Log(lambda text, fields: self.said.append((self.now, text))),
            Notifier({}, lambda text: None),
            lambda: self.config,
        )
        self.tenants: dict[str, Tenant] = {}
        self.phases: list[tuple[float, str]] = []
        self.ticks = 0
        self._ticked_at = 0.0
        self._next_tick: asyncio.Future[None] | None = None
        self._watchers: list[Callable[[Sample], None]] = [self._ticked]
        self.host.sampled = self._sampled

    @property
    def now(self) -> float:
        return self.machine.ksm.now_ns / 1e9

    @property
    def decision(self) -> PolicyDecision:
        """What the policy said last."""
        return self.service._policy_runner.decision

    @property
    def phase(self) -> str:
        """The phase that the policy is in."""
        return self.decision.phase

    def watch(self, watcher: Callable[[Sample], None]) -> None:
        """Have every sample shown to somebody, before the service sees it."""
        self._watchers.append(watcher)

    def _sampled(self, sample: Sample) -> None:
        for watcher in self._watchers:
            watcher(sample)

    def _ticked(self, sample: Sample) -> None:
        self.ticks += 1
        # What it said at the tick before.
        if not self.phases or self.phases[-1][1] != self.phase:
            self.phases.append((self._ticked_at, self.phase))
        self._ticked_at = sample.time_seconds
        if self._next_tick is not None and not self._next_tick.done():
            self._next_tick.set_result(None)

    # -- for loads -------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Wait for the service's next tick to be over."""
        self._next_tick = asyncio.get_running_loop().create_future()
        await self._next_tick

    def start(self, name: str, labels: Sequence[str], node: int | None = None, *, mergeable: bool = True) -> Tenant:
        """A process with pages of these contents."""
        process = self.host.spawn(name)
        tenant = Tenant(process, name, self.host.map(process, len(labels), node), list(labels))
        self.host.store(process, tenant.start, [content(label) for label in labels])
        if mergeable:
            self.host.advise(process, tenant.start, len(labels), mergeable=True)
        self.tenants[name] = tenant
        return tenant

    def rewrite(self, name: str, index: int, label: str) -> None:
        """A process writes a page."""
        tenant = self.tenants[name]
        tenant.labels[index] = label
        self.host.store(tenant.id, tenant.start + index * PAGE_SIZE, [content(label)])

    def end(self, name: str) -> None:
        """A process ends."""
        self.host.exit(self.tenants.pop(name).id)

    def store(self, knob: Knob, value: KnobValue) -> None:
        """Somebody else writes a knob."""
        self.host.set(knob, value)

    # -- running ---------------------------------------------------------------------------------------------

    def run(self, seconds: float, load: Coroutine[Any, Any, None] | None = None) -> None:
        """The service's life from its start to its end, and a load beside it that may end sooner."""
        loop = VirtualLoop(self.host)
        try:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(self._live(seconds, load))
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    async def _live(self, seconds: float, load: Coroutine[Any, Any, None] | None) -> None:
        tasks = [asyncio.create_task(self.service.run(None, None))]
        if load is not None:
            tasks.append(asyncio.create_task(load))
        clock = asyncio.create_task(asyncio.sleep(seconds))
        try:
            while not clock.done():
                done, _ = await asyncio.wait({clock, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                tasks = [task for task in tasks if task not in done]
        finally:
            for task in (clock, *tasks):
                task.cancel()
            await asyncio.gather(clock, *tasks, return_exceptions=True)
