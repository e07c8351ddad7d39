# SPDX-License-Identifier: GPL-2.0-or-later
"""Decisions about knobs, one tick at a time."""

from __future__ import annotations

import errno

import pytest

from ksmd_ctl.config.model import OnDrift, Want
from ksmd_ctl.errors import Rejected, Unparsable, Unreadable
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.knobs import reconcile as module
from ksmd_ctl.knobs.reconcile import (
    MAX_CORRECTIONS,
    WINDOW_SECONDS,
    Decision,
    Desired,
    Drift,
    KnobState,
    Write,
    WriteResult,
    forgiven,
    ordered,
    reconcile,
)
from tests.fakes.host import FakeHost


class Ticks:
    """A host and decisions about it; each tick carries its writes out before the next one."""

    def __init__(self, wanted: dict[Knob, KnobValue], host: FakeHost, on_drift: OnDrift = OnDrift.ENFORCE) -> None:
        self.host = host
        self.want(wanted, on_drift)
        self.decision = Decision()
        self.outcomes: list[WriteResult] = []

    def want(self, wanted: dict[Knob, KnobValue], on_drift: OnDrift = OnDrift.ENFORCE) -> None:
        self.desired = Desired({knob: Want(value) for knob, value in wanted.items()}, on_drift)

    def tick(self, seconds: float = 1.0) -> Decision:
        self.host.now += seconds
        self.decision = reconcile(self.desired, self.host.sample(), self.decision, tuple(self.outcomes))
        self.outcomes = [WriteResult(write, self.host.set(write.knob, write.value)) for write in self.decision.writes]
        return self.decision

    def state(self, knob: Knob) -> KnobState:
        return self.decision.records[knob].state

    def reason(self, knob: Knob) -> str:
        return self.decision.records[knob].reason

    def drifts(self, knob: Knob) -> int:
        return self.decision.records[knob].drift_total


def test_nothing_wanted_nothing_written() -> None:
    ticks = Ticks({}, FakeHost({Knob.RUN: 1}))
    decision = ticks.tick()
    assert (decision.writes, decision.adopt, decision.changed) == ((), {}, ())
    assert {record.state for record in decision.records.values()} == {KnobState.UNMANAGED}
    assert decision.records[Knob.RUN].found == 1


def test_wanted_values_are_written_and_then_held() -> None:
    ticks = Ticks({Knob.RUN: 1, Knob.PAGES_TO_SCAN: 1000, Knob.SLEEP_MILLISECS: 20}, FakeHost())
    first = ticks.tick()
    assert first.writes == (Write(Knob.PAGES_TO_SCAN, 1000), Write(Knob.RUN, 1))
    assert first.adopt == {Knob.RUN: 0, Knob.PAGES_TO_SCAN: 100, Knob.SLEEP_MILLISECS: 20}
    assert ticks.state(Knob.RUN) is KnobState.PENDING
    second = ticks.tick()
    assert second.writes == ()
    assert second.count(KnobState.HELD) == 3
    assert second.changed == (Knob.RUN, Knob.PAGES_TO_SCAN)


def test_a_quiet_tick_decides_nothing_anew() -> None:
    ticks = Ticks({Knob.RUN: 1}, FakeHost({Knob.RUN: 1}, lacks=[Knob.SMART_SCAN]))
    ticks.tick()
    quiet = ticks.tick()
    assert (quiet.changed, quiet.writes) == ((), ())
    assert ticks.tick() is quiet


def test_drift_is_counted_once_and_put_back() -> None:
    ticks = Ticks({Knob.PAGES_TO_SCAN: 1000}, FakeHost())
    ticks.tick()
    ticks.tick()
    ticks.host.put(Knob.PAGES_TO_SCAN, 7)
    drifted = ticks.tick()
    assert drifted.writes == (Write(Knob.PAGES_TO_SCAN, 1000),)
    assert [(drift.knob, drift.expected, drift.found) for drift in drifted.drifts] == [(Knob.PAGES_TO_SCAN, 1000, 7)]
    assert ticks.state(Knob.PAGES_TO_SCAN) is KnobState.DRIFTED
    ticks.tick()
    assert ticks.state(Knob.PAGES_TO_SCAN) is KnobState.HELD
    assert ticks.host.knobs[Knob.PAGES_TO_SCAN] == 1000
    assert ticks.drifts(Knob.PAGES_TO_SCAN) == 1


def test_drift_is_left_and_counted_once_a_change_when_only_observing() -> None:
    ticks = Ticks({Knob.PAGES_TO_SCAN: 1000}, FakeHost(), OnDrift.OBSERVE)
    ticks.tick()
    ticks.tick()
    for value, total in ((7, 1), (7, 1), (8, 2), (8, 2), (1000, 2), (7, 3)):
        ticks.host.put(Knob.PAGES_TO_SCAN, value)
        assert ticks.tick().writes == ()
        assert ticks.drifts(Knob.PAGES_TO_SCAN) == total
        assert ticks.state(Knob.PAGES_TO_SCAN) is (KnobState.HELD if value == 1000 else KnobState.DRIFTED)
    assert ticks.host.knobs[Knob.PAGES_TO_SCAN] == 7


def test_a_change_that_is_faster_than_a_tick_counts() -> None:
    ticks = Ticks({Knob.PAGES_TO_SCAN: 1000}, FakeHost())
    for _ in range(3):
        ticks.tick()
        ticks.host.put(Knob.PAGES_TO_SCAN, 7)
    # Each time 1000 was written, and 7 was there again when the next tick looked.
    ticks.tick()
    assert ticks.drifts(Knob.PAGES_TO_SCAN) == 3


def test_a_fight_ends() -> None:
    ticks = Ticks({Knob.RUN: 1}, FakeHost({Knob.RUN: 1}))
    ticks.tick()
    for _ in range(1000):
        ticks.host.put(Knob.RUN, 0)
        ticks.tick()
    assert len(ticks.host.written) == MAX_CORRECTIONS
    assert ticks.state(Knob.RUN) is KnobState.DRIFTED
    assert ticks.reason(Knob.RUN) == module.GIVEN_UP
    # Nor does it begin again when the other side does what was wanted, or when time goes by.
    ticks.host.put(Knob.RUN, 1)
    ticks.tick(WINDOW_SECONDS * 2)
    assert ticks.state(Knob.RUN) is KnobState.HELD
    ticks.host.put(Knob.RUN, 0)
    ticks.tick()
    assert len(ticks.host.written) == MAX_CORRECTIONS
    # A person who reloads wants it held.
    ticks.decision = forgiven(ticks.decision)
    ticks.tick()
    ticks.tick()
    assert ticks.state(Knob.RUN) is KnobState.HELD


def test_now_and_then_is_no_fight() -> None:
    ticks = Ticks({Knob.RUN: 1}, FakeHost({Knob.RUN: 1}))
    ticks.tick()
    for _ in range(MAX_CORRECTIONS * 3):
        ticks.host.put(Knob.RUN, 0)
        ticks.tick(WINDOW_SECONDS / 5)
        ticks.tick()
        assert ticks.state(Knob.RUN) is KnobState.HELD


def test_what_needs_unmerging_is_pending_and_never_unmerged() -> None:
    host = FakeHost({Knob.RUN: 1})
    host.counters["pages_shared"] = 5
    ticks = Ticks({Knob.RUN: 1, Knob.MERGE_ACROSS_NODES: 0}, host)
    for _ in range(10):
        ticks.tick()
    assert host.written == []
    assert ticks.state(Knob.MERGE_ACROSS_NODES) is KnobState.PENDING
    assert ticks.reason(Knob.MERGE_ACROSS_NODES) == module.MERGED
    assert ticks.state(Knob.RUN) is KnobState.HELD
    host.counters["pages_shared"] = 0
    ticks.tick()
    ticks.tick()
    assert ticks.state(Knob.MERGE_ACROSS_NODES) is KnobState.HELD


def test_ebusy_without_shared_pages_is_pending_too_and_tried_less_and_less() -> None:
    # A stable node whose page is only mapped by a child counts as no shared page and still is in the way.
    host = FakeHost({Knob.RUN: 1})
    refusal = Rejected("writing", "EBUSY", errno=errno.EBUSY)
    ticks = Ticks({Knob.MERGE_ACROSS_NODES: 0}, host)
    tries = 0
    for _ in range(600):
        decision = ticks.tick()
        tries += len(decision.writes)
        host.knobs[Knob.MERGE_ACROSS_NODES] = 1
        ticks.outcomes = [WriteResult(write, refusal) for write in decision.writes]
    assert 5 < tries < 15
    assert (ticks.state(Knob.MERGE_ACROSS_NODES), ticks.reason(Knob.MERGE_ACROSS_NODES)) == (
        KnobState.PENDING,
        module.MERGED,
    )
    assert ticks.drifts(Knob.MERGE_ACROSS_NODES) == 0


def test_a_write_that_fails_is_tried_again_and_says_why() -> None:
    host = FakeHost()
    host.denied = True
    ticks = Ticks({Knob.SMART_SCAN: 0}, host)
    ticks.tick()
    ticks.tick()
    assert ticks.state(Knob.SMART_SCAN) is KnobState.FAILED
    assert "EACCES" in ticks.reason(Knob.SMART_SCAN)
    host.denied = False
    ticks.tick(300)
    ticks.tick()
    assert ticks.state(Knob.SMART_SCAN) is KnobState.HELD


def test_a_value_that_reads_back_as_another_is_a_failure_and_no_drift() -> None:
    host = FakeHost()
    ticks = Ticks({Knob.ADVISOR_MAX_CPU: 50}, host)
    writes = 0
    for _ in range(60):
        decision = ticks.tick()
        writes += len(decision.writes)
        host.knobs[Knob.ADVISOR_MAX_CPU] = 49
        ticks.outcomes = [WriteResult(write, 49) for write in decision.writes]
    assert writes < 10
    assert ticks.state(Knob.ADVISOR_MAX_CPU) is KnobState.FAILED
    assert ticks.drifts(Knob.ADVISOR_MAX_CPU) == 0


def test_offlining_is_no_drift_and_makes_blocking_writes_wait() -> None:
    host = FakeHost({Knob.RUN: 1})
    ticks = Ticks({Knob.RUN: 1, Knob.SLEEP_MILLISECS: 5, Knob.MERGE_ACROSS_NODES: 0}, host)
    host.offline = True
    assert [write.knob for write in ticks.tick().writes] == [Knob.SLEEP_MILLISECS]
    ticks.tick()
    assert (ticks.state(Knob.RUN), ticks.drifts(Knob.RUN)) == (KnobState.HELD, 0)
    assert ticks.reason(Knob.MERGE_ACROSS_NODES) == module.OFFLINE
    host.offline = False
    ticks.tick()
    ticks.tick()
    assert ticks.state(Knob.MERGE_ACROSS_NODES) is KnobState.HELD


def test_what_the_kernels_advisor_does_is_no_drift() -> None:
    host = FakeHost()
    ticks = Ticks({Knob.PAGES_TO_SCAN: 300}, host)
    ticks.tick()
    ticks.tick()
    host.put(Knob.ADVISOR_MODE, "scan-time")
    for value in (500, 620, 10):
        host.knobs[Knob.PAGES_TO_SCAN] = value
        assert ticks.tick().writes == ()
    assert (ticks.state(Knob.PAGES_TO_SCAN), ticks.reason(Knob.PAGES_TO_SCAN)) == (KnobState.PENDING, module.ADVISED)
    host.put(Knob.ADVISOR_MODE, "none")
    ticks.tick()
    ticks.tick()
    assert ticks.state(Knob.PAGES_TO_SCAN) is KnobState.HELD
    assert ticks.drifts(Knob.PAGES_TO_SCAN) == 0


def test_switching_the_advisor_off_comes_before_pages_to_scan_and_is_no_drift_of_it() -> None:
    host = FakeHost()
    host.put(Knob.ADVISOR_MODE, "scan-time")
    ticks = Ticks({Knob.ADVISOR_MODE: "none", Knob.PAGES_TO_SCAN: 300}, host)
    decision = ticks.tick()
    assert decision.writes == (Write(Knob.ADVISOR_MODE, "none"), Write(Knob.PAGES_TO_SCAN, 300))
    ticks.tick()
    assert host.knobs[Knob.PAGES_TO_SCAN] == 300
    assert (ticks.state(Knob.PAGES_TO_SCAN), ticks.drifts(Knob.PAGES_TO_SCAN)) == (KnobState.HELD, 0)


def test_holding_the_advisor_adopts_what_it_overwrites() -> None:
    decision = Ticks({Knob.ADVISOR_MODE: "scan-time"}, FakeHost({Knob.PAGES_TO_SCAN: 333})).tick()
    assert decision.adopt == {Knob.ADVISOR_MODE: "none", Knob.PAGES_TO_SCAN: 333}


def test_a_knob_that_this_kernel_lacks() -> None:
    ticks = Ticks({Knob.SMART_SCAN: 0, Knob.RUN: 1}, FakeHost(lacks=[Knob.SMART_SCAN, Knob.ADVISOR_MODE]))
    assert [write.knob for write in ticks.tick().writes] == [Knob.RUN]
    assert ticks.state(Knob.SMART_SCAN) is KnobState.LACKING
    assert ticks.state(Knob.ADVISOR_MODE) is KnobState.UNMANAGED


@pytest.mark.parametrize("error", [Unreadable("reading run", "EIO"), Unparsable("reading run", "'x' is not a number")])
def test_a_knob_that_cannot_be_read_is_not_written(error: Unreadable | Unparsable) -> None:
    host = FakeHost()
    host.broken["run"] = error
    ticks = Ticks({Knob.RUN: 1}, host)
    decision = ticks.tick()
    assert (decision.writes, decision.adopt) == ((), {})
    assert ticks.state(Knob.RUN) is KnobState.FAILED
    assert error.why in ticks.reason(Knob.RUN)


def test_a_write_under_way_is_not_judged() -> None:
    host = FakeHost()
    desired = Desired({Knob.RUN: Want(1)})
    first = reconcile(desired, host.sample(), Decision())
    host.put(Knob.RUN, 2)
    second = reconcile(desired, host.sample(), first, (), frozenset({Knob.RUN}))
    assert (second.writes, second.drifts) == ((), ())
    assert second.records[Knob.RUN].reason == module.WRITING


def test_another_wanted_value_is_no_drift() -> None:
    ticks = Ticks({Knob.PAGES_TO_SCAN: 1000}, FakeHost())
    ticks.tick()
    ticks.tick()
    ticks.want({Knob.PAGES_TO_SCAN: 2000})
    assert ticks.tick().drifts == ()
    ticks.tick()
    assert (ticks.state(Knob.PAGES_TO_SCAN), ticks.drifts(Knob.PAGES_TO_SCAN)) == (KnobState.HELD, 0)
    ticks.want({})
    ticks.tick()
    assert ticks.state(Knob.PAGES_TO_SCAN) is KnobState.UNMANAGED


def test_merging_begins_last_and_stops_first() -> None:
    def order(run: int) -> list[Knob]:
        values = dict.fromkeys(Knob, 1) | {Knob.RUN: run}
        return [write.knob for write in ordered([Write(knob, value) for knob, value in values.items()])]

    assert order(1)[-1] is Knob.RUN
    for run in (0, 2):
        assert order(run)[0] is Knob.RUN
    assert len(order(1)) == len(Knob)
    assert order(1).index(Knob.ADVISOR_MIN_PAGES_TO_SCAN) < order(1).index(Knob.ADVISOR_MODE)
    assert order(1).index(Knob.ADVISOR_MODE) < order(1).index(Knob.PAGES_TO_SCAN)


# -- knobs that nobody wants anything of ---------------------------------------------------------------------


def test_a_change_of_a_knob_that_is_not_held_is_told_once_and_written_by_nobody() -> None:
    ticks = Ticks({Knob.RUN: 1}, FakeHost())
    for _ in range(3):
        assert ticks.tick().others == ()
    ticks.host.put(Knob.SLEEP_MILLISECS, 5)
    decision = ticks.tick()
    assert decision.others == (Drift(Knob.SLEEP_MILLISECS, 20, 5, held=False),)
    assert (decision.drifts, decision.writes) == ((), ())
    assert ticks.tick().others == ()


def test_what_the_kernels_advisor_does_is_nobodys_change() -> None:
    ticks = Ticks({}, FakeHost())
    ticks.tick()
    ticks.host.put(Knob.ADVISOR_MODE, "scan-time")
    assert ticks.tick().others == (Drift(Knob.ADVISOR_MODE, "none", "scan-time", held=False),)
    ticks.host.put(Knob.PAGES_TO_SCAN, 909)
    assert ticks.tick().others == ()
    ticks.host.put(Knob.ADVISOR_MODE, "none")
    assert ticks.tick().others == (Drift(Knob.ADVISOR_MODE, "scan-time", "none", held=False),)
    ticks.host.put(Knob.PAGES_TO_SCAN, 5)
    assert ticks.tick().others == (Drift(Knob.PAGES_TO_SCAN, 100, 5, held=False),)


def test_memory_that_goes_offline_and_a_knob_that_can_not_be_read_are_nobodys_change() -> None:
    ticks = Ticks({}, FakeHost())
    ticks.tick()
    ticks.host.offline = True
    assert ticks.tick().others == ()
    ticks.host.broken[Knob.RUN] = Unreadable("reading run", "EIO")
    assert ticks.tick().others == ()
    del ticks.host.broken[Knob.RUN]
    assert ticks.tick().others == ()


def test_what_the_service_itself_writes_is_nobodys_change_once_it_wants_nothing_any_more() -> None:
    ticks = Ticks({Knob.PAGES_TO_SCAN: 1000}, FakeHost())
    ticks.tick()
    ticks.want({})
    assert ticks.tick().others == ()
    assert ticks.tick().others == ()


def test_what_a_transaction_of_the_service_changed_is_nobodys_change() -> None:
    host = FakeHost()
    before = reconcile(Desired(), host.sample(), Decision())
    host.put(Knob.USE_ZERO_PAGES, 1)
    assert reconcile(Desired(), host.sample(), before, ours=True).others == ()
    assert len(reconcile(Desired(), host.sample(), before).others) == 1


def test_while_a_transaction_runs_only_what_is_not_as_wanted_is_pending() -> None:
    ticks = Ticks({Knob.RUN: 1, Knob.PAGES_TO_SCAN: 300}, FakeHost({Knob.RUN: 1, Knob.PAGES_TO_SCAN: 300}))
    ticks.tick()
    # It makes ksmd quicker until everything is merged again.
    ticks.host.put(Knob.PAGES_TO_SCAN, 1200)
    decision = reconcile(ticks.desired, ticks.host.sample(), ticks.decision, in_flight=frozenset(Knob), ours=True)
    states = {knob: decision.records[knob].state for knob in ticks.desired.knobs}
    assert states == {Knob.RUN: KnobState.HELD, Knob.PAGES_TO_SCAN: KnobState.PENDING}
    assert decision.drifts == ()
