# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated host's identity, time, knobs, counters, nodes, and its operations."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable
from typing import Final, TypeVar, cast

from ksmd_ctl.engine.demo import Demo
from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.engine.state import KSM_RUN_OFFLINE
from ksmd_ctl.engine.sysfs import counters, run_store
from ksmd_ctl.errors import Absent, Cancelled, TimedOut
from ksmd_ctl.host.fields import FIELDS, Source
from ksmd_ctl.host.knobs import Knob, KnobValue, format_value, parse_value, same_value, write_error
from ksmd_ctl.host.memory import Node, Topology
from ksmd_ctl.host.operation import Operation, Progress, Steps
from ksmd_ctl.host.sample import HostIdentity, HostKind, NodeMemory, Reading, Sample, Writer

T = TypeVar("T")

# What a page costs that is moved or un-merged, in virtual time.
_NS_PER_PAGE: Final = 2_500

# Pages that ksmd scans in one call at most. With more to do, virtual time falls behind.
_PAGES_PER_CALL: Final = 20_000


def _absent(name: str, profile_name: str) -> Absent:
    return Absent(
        f"reading {name}", f"profile {profile_name} of the simulated host does not have it", errno=errno.ENOENT
    )


class SteppedOperation(Operation[T]):
    """An operation on the engine: each poll does one step, so there is nothing to wait on.

    :param what: what is being done, for errors
    :param clock: the host's time
    """

    def __init__(self, what: str, steps: Steps[T], clock: Callable[[], float], deadline_seconds: float) -> None:
        super().__init__(self._bounded(what, steps, clock, clock() + deadline_seconds, deadline_seconds))

    def _bounded(
        self, what: str, steps: Steps[T], clock: Callable[[], float], ends: float, deadline_seconds: float
    ) -> Steps[T]:
        while True:
            at = self.progress
            state = f"stopped at {at.done} of {at.total} {at.unit}".rstrip()
            if self.cancelled:
                raise Cancelled(what, state)
            if clock() > ends:
                raise TimedOut(what, f"{state}, after {deadline_seconds:g} s")
            try:
                step = next(steps)
            except StopIteration as stop:
                return cast(T, stop.value)
            yield step


class EngineBase:
    """The part of a host that does not read its processes. Not for several threads at once.

    :param source: the clock that virtual time follows; without it, time passes by `advance` and by what operations
        and batches cost
    :param load: what happens on the machine as time passes
    """

    def __init__(
        self, machine: Machine, *, source: Callable[[], float] | None = None, load: Demo | None = None
    ) -> None:
        self.machine = machine
        self._load = load
        self._source = source
        self._offset = -source() if source is not None else 0.0
        self._spawned: list[int] = []
        self._before = {name: machine.show(name) for name in machine.ksm.profile.knobs}
        self._identity = HostIdentity(HostKind.ENGINE, machine.ksm.profile.name, PAGE_SIZE, str(uuid.uuid4()))
        self._catch_up()

    # -- Host: identity, time, knobs, counters -------------------------------------------------------------

    @property
    def identity(self) -> HostIdentity:
        return self._identity

    def clock(self) -> float:
        """Virtual seconds since this host was made."""
        self._catch_up()
        return self.machine.ksm.now_ns / 1e9

    def advance(self, seconds: float) -> None:
        """Let time pass, in addition to its source's."""
        self._offset += seconds
        until = self.machine.ksm.now_ns + round(seconds * 1e9)
        while self.machine.ksm.now_ns < until:
            self._pass(until, 1 << 62)

    # Virtual time follows its source; time for which ksmd can't be simulated is lost.
    def _catch_up(self) -> None:
        if self._source is None:
            self._pass(self.machine.ksm.now_ns, 0)
            return
        until = round((self._source() + self._offset) * 1e9)
        budget = _PAGES_PER_CALL
        while budget > 0 and (self.machine.ksm.now_ns < until):
            budget -= max(1, self._pass(until, budget))
        if self.machine.ksm.now_ns < until:
            self._offset -= (until - self.machine.ksm.now_ns) / 1e9

    # Run to a time or to the next event of the load; how many pages were scanned.
    def _pass(self, until: int, most_pages: int) -> int:
        machine = self.machine
        if self._load is None:
            return machine.run_until(until, most_pages)
        self._load.until(machine.ksm.now_ns / 1e9)
        event = int(self._load.next_event() * 1e9) + 1
        scanned = machine.run_until(min(until, event), most_pages)
        self._load.until(machine.ksm.now_ns / 1e9)
        return scanned

    def sample(self, *, fresh: bool = False) -> Sample:
        now = self.clock()
        machine = self.machine
        seen = counters(machine.ksm)
        nodes = self._node_memory()
        readings: dict[str, Reading] = {
            "mem_total_bytes": sum(node.total_bytes for node in nodes.values()),
            "mem_available_bytes": sum(node.free_bytes for node in nodes.values()),
            "ksmd_cpu_seconds": machine.ksm.cpu_ns / 1e9,
            "nr_anon_pages": sum(node.used for node in self.machine.memory.nodes),
        }
        for field in FIELDS:
            if field.source is Source.KNOB:
                try:
                    readings[field.name] = self.read(Knob(field.name))
                except Absent as error:
                    readings[field.name] = error
            elif field.name in seen:
                readings[field.name] = seen[field.name]
            elif field.name not in readings:
                readings[field.name] = _absent(field.name, machine.ksm.profile.name)
        return Sample(now, readings, nodes)

    def _node_memory(self) -> dict[int, NodeMemory]:
        return {
            node.nid: NodeMemory(node.capacity * PAGE_SIZE, (node.capacity - node.used) * PAGE_SIZE)
            for node in self.machine.memory.nodes
            if node.online
        }

    def read(self, knob: Knob) -> KnobValue:
        try:
            return parse_value(knob, self.machine.show(knob))
        except OSError as error:
            raise _absent(knob, self.machine.ksm.profile.name) from error

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> Operation[KnobValue]:
        what = f"writing {format_value(value)} to {knob}"
        return self._operation(what, self._write_steps(knob, value), deadline_seconds)

    def _write_steps(self, knob: Knob, value: KnobValue) -> Steps[KnobValue]:
        found = self.read(knob)
        if same_value(knob, found, value):
            return value
        if knob is Knob.RUN:
            done = 0
            try:
                for pages in run_store(self.machine.ksm, format_value(value), 0):
                    done += pages
                    self._cost(pages)
                    yield Progress(done, 0, "pages")
            except OSError as error:
                raise write_error(knob, value, error) from error
        else:
            self.set(knob, value)
        return self.read(knob)

    def set(self, knob: Knob, value: KnobValue) -> None:
        try:
            self.machine.store(knob, format_value(value))
        except OSError as error:
            raise write_error(knob, value, error) from error

    def _cost(self, pages: int) -> None:
        self.machine.ksm.now_ns += pages * _NS_PER_PAGE

    def _operation(self, what: str, steps: Steps[T], deadline_seconds: float) -> SteppedOperation[T]:
        return SteppedOperation(what, steps, self.clock, deadline_seconds)

    def writers(self) -> Operation[tuple[Writer, ...]]:
        """Only the kernel's own advisor, where it is on."""
        profile = self.machine.ksm.profile
        on = profile.advisor and self.read(Knob.ADVISOR_MODE) == "scan-time"
        return Operation.done((Writer("advisor"),) if on else ())

    def _restore_knobs(self) -> None:
        self.machine.store("run", 0)
        self.machine.store("run", 2)
        # pages_to_scan after the advisor, which changes it; run last.
        last = ("pages_to_scan", "run")
        for name in (*(name for name in self._before if name not in last), *last):
            text = self._before[name]
            if name == Knob.ADVISOR_MODE:
                text = str(parse_value(Knob.ADVISOR_MODE, text))
            self.machine.store(name, text)

    def topology(self) -> Topology:
        """The nodes that are online: one CPU on each, all as far from one another."""
        online = [node for node in self.machine.memory.nodes if node.online]
        nodes = tuple(
            Node(
                node.nid,
                frozenset({node.nid}),
                node.capacity * PAGE_SIZE,
                {other.nid: 10 if other is node else 20 for other in online},
            )
            for node in online
        )
        return Topology(nodes, numa=True, going_offline=bool(self.machine.ksm.run & KSM_RUN_OFFLINE))
