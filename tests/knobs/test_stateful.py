# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever others do to the knobs: what is wanted is reached, bounds are kept, and what was there comes back."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ksmd_ctl.config.model import AtStop, OnDrift, Want
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.knobs.reconcile import ADVISED, MAX_CORRECTIONS, WINDOW_SECONDS, Decision, Desired, KnobState, reconcile
from ksmd_ctl.knobs.saved_knobs import SavedKnobs, plan_stop
from ksmd_ctl.transactions.executor import Executor
from tests.fakes.host import FakeHost

VALUES: dict[Knob, list[KnobValue]] = {
    Knob.RUN: [0, 1],
    Knob.PAGES_TO_SCAN: [50, 100, 500],
    Knob.MERGE_ACROSS_NODES: [0, 1],
    Knob.SMART_SCAN: [0, 1],
    Knob.ADVISOR_MODE: ["none", "scan-time"],
}
KNOB = st.sampled_from(list(VALUES))


@st.composite
def wanted(draw: st.DrawFn) -> dict[Knob, KnobValue]:
    values = {knob: draw(st.sampled_from(VALUES[knob])) for knob in draw(st.sets(KNOB))}
    if values.get(Knob.ADVISOR_MODE) == "scan-time":
        values.pop(Knob.PAGES_TO_SCAN, None)
    return values


class Service(RuleBasedStateMachine):
    """The loop without its clock: ticks, other writers, slow writes, kills, and a stop at the end."""

    @initialize(
        found=st.fixed_dictionaries({knob: st.sampled_from(values) for knob, values in VALUES.items()}),
        values=wanted(),
        on_drift=st.sampled_from(OnDrift),
        slow=st.sets(KNOB),
    )
    def start(
        self, found: dict[Knob, KnobValue], values: dict[Knob, KnobValue], on_drift: OnDrift, slow: set[Knob]
    ) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.host = FakeHost(found)
        self.host.slow = slow
        self.found = dict(found)
        self.touched: set[Knob] = set()
        self.changes = 0
        self.want(values, on_drift)
        self.begin()

    def want(self, values: dict[Knob, KnobValue], on_drift: OnDrift) -> None:
        self.desired = Desired({knob: Want(value) for knob, value in values.items()}, on_drift)

    def begin(self) -> None:
        self.executor = Executor(self.host, SavedKnobs(self.directory, self.host.identity))
        self.decision = Decision()

    @rule(seconds=st.sampled_from([0.1, 1.0, 60.0]))
    def tick(self, seconds: float) -> None:
        self.host.now += seconds
        executor = self.executor
        executor.poll()
        self.decision = reconcile(
            self.desired, self.host.sample(), self.decision, executor.take_outcomes(), executor.in_flight
        )
        executor.begin(self.decision.adopt, self.decision.writes)

    @rule()
    def slow_writes_take_place(self) -> None:
        self.host.finish()

    @rule(data=st.data(), knob=KNOB)
    def somebody_writes(self, data: st.DataObject, knob: Knob) -> None:
        value = data.draw(st.sampled_from(VALUES[knob]))
        before = dict(self.host.knobs)
        self.host.set(knob, value)
        self.host.written = [write for write in self.host.written if write != (knob, value)]
        changed = {other for other in Knob if self.host.knobs[other] != before[other]}
        self.touched |= changed
        self.changes += len(changed)

    @rule(shared=st.sampled_from([0, 10]))
    def pages_merge(self, shared: int) -> None:
        self.host.counters["pages_shared"] = shared

    @rule()
    def memory_goes_offline_or_is_done(self) -> None:
        self.host.offline = not self.host.offline

    @rule(values=wanted(), on_drift=st.sampled_from(OnDrift))
    def reload(self, values: dict[Knob, KnobValue], on_drift: OnDrift) -> None:
        self.want(values, on_drift)

    @rule()
    def killed_and_started_again(self) -> None:
        # What the broker was asked for takes place, or doesn't; nobody waits for it.
        self.host.finish()
        self.begin()

    @precondition(lambda self: not self.touched)
    @rule()
    def left_alone_everything_is_reached(self) -> None:
        self.host.offline = False
        self.host.counters["pages_shared"] = 0
        for _ in range(8):
            self.tick(400.0)
            self.host.finish()
        self.tick(1.0)
        for knob, want in self.desired.knobs.items():
            if knob is Knob.PAGES_TO_SCAN and self.host.knobs[Knob.ADVISOR_MODE] == "scan-time":
                # An advisor that nobody says is to be off keeps it, unless it is as wanted by chance.
                assert self.decision.records[knob].reason == ADVISED or self.host.knobs[knob] == want.value
                continue
            assert self.host.knobs[knob] == want.value
            assert self.decision.records[knob].state is KnobState.HELD

    @invariant()
    def unmerging_is_never_written(self) -> None:
        assert (Knob.RUN, 2) not in self.host.written

    @invariant()
    def corrections_are_bounded(self) -> None:
        for record in self.decision.records.values():
            recent = [time for time in record.corrections if time > self.host.now - WINDOW_SECONDS]
            assert len(recent) <= MAX_CORRECTIONS

    @invariant()
    def drift_is_counted_at_most_once_a_change(self) -> None:
        assert sum(record.drift_total for record in self.decision.records.values()) <= self.changes

    def teardown(self) -> None:
        if not hasattr(self, "directory"):
            return
        host, executor = self.host, self.executor
        host.finish()
        host.slow = set()
        host.offline = False
        host.counters["pages_shared"] = 0
        executor.wait()
        plan = plan_stop(AtStop.RESTORE, OnDrift.ENFORCE, executor.journal.entries, host.sample())
        left = executor.carry_out(plan)
        for knob in VALUES:
            # Who else has written it may have done so before the service first looked.
            advised = knob is Knob.PAGES_TO_SCAN and host.knobs[Knob.ADVISOR_MODE] == "scan-time"
            if knob not in self.touched and not advised:
                assert host.knobs[knob] == self.found[knob] or knob in left
        shutil.rmtree(self.directory)


class TestService(Service.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=150, stateful_step_count=30)


def test_every_value_here_is_one_that_a_kernel_takes() -> None:
    for knob, values in VALUES.items():
        spec = KNOBS[knob]
        assert all(value in spec.choices or (isinstance(value, int) and spec.minimum <= value) for value in values)
