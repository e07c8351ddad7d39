# SPDX-License-Identifier: GPL-2.0-or-later
"""What is kept on disk, who may write, and what is put back: the journal, the lock, the executor, the stop."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.config.model import AtStop, OnDrift
from ksmd_ctl.errors import Busy, Denied, ExitCode, HostError, KsmdError, Refused, UsageError
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import HostKind
from ksmd_ctl.knobs.reconcile import Write
from ksmd_ctl.knobs.saved_knobs import (
    NEEDS_UNMERGE,
    TAKEN_OVER,
    UNMERGED,
    SavedKnob,
    SavedKnobs,
    ServiceRun,
    plan_stop,
)
from ksmd_ctl.statefiles import HostLock, holder
from ksmd_ctl.transactions.executor import Executor
from tests.fakes.host import FakeHost, FakeOperation

# -- the journal -------------------------------------------------------------------------------------------


def test_what_was_found_first_stays_across_restarts(tmp_path: Path) -> None:
    host = FakeHost()
    SavedKnobs(tmp_path, host.identity).note({Knob.RUN: 0}, {Knob.RUN: 1})
    again = SavedKnobs(tmp_path, host.identity)
    again.note({Knob.RUN: 1, Knob.SMART_SCAN: 1}, {})
    assert SavedKnobs(tmp_path, host.identity).entries == {
        Knob.RUN: SavedKnob(0, 1, 0),
        Knob.SMART_SCAN: SavedKnob(1, None, 1),
    }


def test_another_boot_starts_anew(tmp_path: Path) -> None:
    host = FakeHost()
    SavedKnobs(tmp_path, host.identity).note({Knob.RUN: 0}, {Knob.RUN: 1})
    journal = SavedKnobs(tmp_path, replace(host.identity, boot_id="boot-2"))
    assert (journal.entries, journal.damaged) == ({}, "")


def test_the_simulated_host_has_its_own(tmp_path: Path) -> None:
    host = FakeHost()
    SavedKnobs(tmp_path, host.identity).note({Knob.RUN: 0}, {})
    simulated = SavedKnobs(tmp_path, replace(host.identity, kind=HostKind.ENGINE, boot_id="other"))
    simulated.note({Knob.RUN: 1}, {})
    assert SavedKnobs(tmp_path, host.identity).entries == {Knob.RUN: SavedKnob(0, None, 0)}


def test_the_file_goes_with_the_last_knob(tmp_path: Path) -> None:
    journal = SavedKnobs(tmp_path, FakeHost().identity)
    journal.note({Knob.RUN: 0, Knob.SMART_SCAN: 1}, {})
    journal.settle({Knob.RUN: 0})
    assert list(json.loads(journal.path.read_text())["knobs"]) == ["smart_scan"]
    journal.settle({Knob.SMART_SCAN: 1})
    assert list(tmp_path.iterdir()) == []


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)).map(
        lambda value: json.dumps({"format": 1, "boot_id": "boot-1", "knobs": {"run": value}}).encode()
    )
)
def test_a_damaged_file_is_put_aside_and_not_believed(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("state")
    path = directory / "found-kernel.json"
    path.write_bytes(content)
    journal = SavedKnobs(directory, FakeHost().identity)
    assert journal.entries == {}
    assert Path(journal.damaged).read_bytes() == content
    assert not path.exists()


def test_what_is_no_file_is_put_aside_without_being_waited_for(tmp_path: Path) -> None:
    identity = FakeHost().identity
    path = SavedKnobs(tmp_path, identity).path
    for number, put in enumerate((os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir)):
        put(path)
        journal = SavedKnobs(tmp_path, identity)
        assert (journal.entries, journal.damaged) == ({}, f"{path}.damaged")
        os.rename(journal.damaged, tmp_path / str(number))


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = SavedKnobs(tmp_path, FakeHost().identity).path
    path.touch()
    os.truncate(path, 1 << 40)
    assert SavedKnobs(tmp_path, FakeHost().identity).damaged == f"{path}.damaged"


@pytest.mark.parametrize("value", [3, -1, "scan-time", True, 1.5, float("inf"), float("nan")])
def test_only_what_a_knob_takes_is_taken_from_the_file(tmp_path: Path, value: object) -> None:
    entry = {"at_first": value, "set": None}
    document = {"format": 1, "boot_id": "boot-1", "knobs": {"run": entry}}
    (tmp_path / "found-kernel.json").write_text(json.dumps(document))
    journal = SavedKnobs(tmp_path, FakeHost().identity)
    assert (journal.entries, bool(journal.damaged)) == ({}, True)


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    directory = tmp_path / "state"
    directory.mkdir()
    journal = SavedKnobs(directory, FakeHost().identity)
    journal.path.with_name(f"{journal.path.name}.new").symlink_to(victim)
    journal.note({Knob.RUN: 0}, {})
    assert victim.read_text() == "precious"
    assert SavedKnobs(directory, FakeHost().identity).entries == {Knob.RUN: SavedKnob(0, None, 0)}


def test_nothing_is_written_to_the_host_before_the_note_is_on_disk(tmp_path: Path) -> None:
    blocked = tmp_path / "state"
    host = FakeHost()
    executor = Executor(host, SavedKnobs(blocked, host.identity))
    blocked.write_text("a file where the directory should be")
    executor.begin({Knob.RUN: 0}, [Write(Knob.RUN, 1)])
    (outcome,) = executor.take_outcomes()
    assert isinstance(outcome.result, KsmdError)
    assert host.written == []
    # Later, when somebody else has changed it, what was found first is still known.
    blocked.unlink()
    host.put(Knob.RUN, 2)
    executor.begin({Knob.RUN: 2}, [Write(Knob.RUN, 1)])
    assert SavedKnobs(blocked, host.identity).entries == {Knob.RUN: SavedKnob(0, 1, 0)}
    assert host.knobs[Knob.RUN] == 1


# -- the lock ----------------------------------------------------------------------------------------------


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    path = tmp_path / "run/lock"
    with HostLock(path, "ksmd-ctl daemon"):
        with pytest.raises(Refused, match=rf"ksmd-ctl daemon \(pid {os.getpid()}\) holds {path}") as caught:
            HostLock(path, "ksmd-ctl set")
        assert caught.value.exit_code == ExitCode.REFUSED
    with HostLock(path, "ksmd-ctl set"):
        assert holder(path) == f"ksmd-ctl set (pid {os.getpid()})"
    assert holder(path) == ""


def test_a_lock_without_a_name_in_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open(path, "w") as held:
        path.chmod(0o600)
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Refused, match="another ksmd-ctl holds"):
            HostLock(path, "ksmd-ctl daemon")


@pytest.mark.parametrize("umask", [0, 0o027, 0o077])
def test_nobody_else_can_open_the_lock_and_all_can_see_who_holds_it(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "lock"
    before = os.umask(umask)
    try:
        with HostLock(path, "ksmd-ctl daemon"):
            assert path.stat().st_mode & 0o777 == 0o600
            assert (tmp_path / "lock.holder").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_an_older_lock_that_others_could_open_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("")
    path.chmod(0o644)
    with HostLock(path, "ksmd-ctl daemon"):
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "4194304 ksmd-ctl daemon\n"])
def test_an_older_lock_that_somebody_else_has_locked_is_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock"
    path.write_text(text)
    path.chmod(0o640)
    with open(path) as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with HostLock(path, "ksmd-ctl daemon"), pytest.raises(Refused, match="ksmd-ctl daemon"):
            HostLock(path, "ksmd-ctl set")


def test_an_older_service_that_holds_its_lock_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open(path, "w") as held:
        path.chmod(0o640)
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(f"{os.getpid()} ksmd-ctl daemon\n")
        held.flush()
        with pytest.raises(Refused, match=rf"ksmd-ctl daemon \(pid {os.getpid()}\) holds"):
            HostLock(path, "ksmd-ctl set")


def test_a_link_in_the_place_of_the_holder_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "run/lock"
    path.parent.mkdir()
    (tmp_path / "run/lock.holder").symlink_to(tmp_path / "elsewhere")
    with HostLock(path, "ksmd-ctl daemon"):
        assert holder(path).startswith("ksmd-ctl daemon")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_what_can_not_be_a_lock_is_said_to_be_none(tmp_path: Path, put: Callable[[Path], None]) -> None:
    path = tmp_path / "lock"
    put(path)
    with pytest.raises(UsageError, match=str(path)):
        HostLock(path, "ksmd-ctl daemon")


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_whoever_only_looks_for_the_holder_is_not_held_up(tmp_path: Path, put: Callable[[Path], None]) -> None:
    path = tmp_path / "lock"
    put(path)
    assert holder(path) == ""


def test_a_holder_that_can_not_be_shown_has_no_name(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(f"{os.getpid()} \x1b[2Jksmd-ctl\n")
    assert holder(path) == "another ksmd-ctl"
    path.write_text(f"{os.getpid()} ksmd-ctl set run=1\n")
    assert holder(path) == f"ksmd-ctl set run=1 (pid {os.getpid()})"


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from ksmd_ctl.statefiles import HostLock; "
        "lock = HostLock(Path(sys.argv[1]), 'victim'); print('held', flush=True); time.sleep(600)"
    )
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(Refused, match="victim"):
            HostLock(path, "x")
        process.kill()
        process.wait()
    HostLock(path, "x").release()


# -- the executor ------------------------------------------------------------------------------------------


def test_writes_follow_each_other_and_none_is_waited_for(tmp_path: Path) -> None:
    host = FakeHost()
    host.slow = {Knob.MERGE_ACROSS_NODES}
    executor = Executor(host, SavedKnobs(tmp_path, host.identity))
    writes = [Write(Knob.SMART_SCAN, 0), Write(Knob.MERGE_ACROSS_NODES, 0), Write(Knob.RUN, 1)]
    executor.begin({write.knob: host.read(write.knob) for write in writes}, writes)
    assert host.written == [(Knob.SMART_SCAN, 0)]
    assert executor.in_flight == {Knob.MERGE_ACROSS_NODES, Knob.RUN}
    assert executor.fileno() >= 0
    host.finish()
    executor.poll()
    assert host.written[1:] == [(Knob.MERGE_ACROSS_NODES, 0), (Knob.RUN, 1)]
    assert [outcome.result for outcome in executor.take_outcomes()] == [0, 0, 1]
    assert (executor.in_flight, executor.fileno(), executor.take_outcomes()) == (frozenset(), -1, ())


# -- the stop ----------------------------------------------------------------------------------------------


def stopped(
    host: FakeHost,
    entries: dict[Knob, SavedKnob],
    directory: Path,
    at_stop: AtStop = AtStop.RESTORE,
    on_drift: OnDrift = OnDrift.ENFORCE,
) -> dict[Knob, str]:
    journal = SavedKnobs(directory, host.identity)
    journal.note({knob: entry.at_first for knob, entry in entries.items()}, {})
    journal.note({}, {knob: entry.set for knob, entry in entries.items() if entry.set is not None})
    plan = plan_stop(at_stop, on_drift, journal.entries, host.sample())
    return dict(Executor(host, journal).carry_out(plan).left)


def test_restore_stops_first_and_brings_everything_back(tmp_path: Path) -> None:
    host = FakeHost({Knob.RUN: 1, Knob.PAGES_TO_SCAN: 1000, Knob.SMART_SCAN: 0})
    entries = {Knob.PAGES_TO_SCAN: SavedKnob(100, 1000), Knob.SMART_SCAN: SavedKnob(1, 0), Knob.RUN: SavedKnob(0, 1)}
    assert stopped(host, entries, tmp_path) == {}
    assert host.written == [(Knob.RUN, 0), (Knob.SMART_SCAN, 1), (Knob.PAGES_TO_SCAN, 100)]
    assert list(tmp_path.iterdir()) == []


def test_restore_never_unmerges_and_says_what_stays(tmp_path: Path) -> None:
    host = FakeHost({Knob.RUN: 1, Knob.MERGE_ACROSS_NODES: 0, Knob.MAX_PAGE_SHARING: 10})
    host.counters["pages_shared"] = 3
    entries = {
        Knob.RUN: SavedKnob(2, 1),
        Knob.MERGE_ACROSS_NODES: SavedKnob(1, 0),
        Knob.MAX_PAGE_SHARING: SavedKnob(256, 10),
    }
    left = stopped(host, entries, tmp_path)
    assert left == {
        Knob.RUN: UNMERGED,
        Knob.MERGE_ACROSS_NODES: NEEDS_UNMERGE,
        Knob.MAX_PAGE_SHARING: NEEDS_UNMERGE,
    }
    assert host.written == [(Knob.RUN, 0)]
    # The next stop tries again; but run, which is stopped, is as far back as it gets.
    kept = SavedKnobs(tmp_path, host.identity).entries
    assert {knob: entry.at_start for knob, entry in kept.items()} == {
        Knob.RUN: None,
        Knob.MERGE_ACROSS_NODES: 1,
        Knob.MAX_PAGE_SHARING: 256,
    }


def test_a_stop_that_waits_for_ksmd_waits_once_and_puts_back_the_rest(tmp_path: Path) -> None:
    host = FakeHost({Knob.RUN: 1, Knob.MERGE_ACROSS_NODES: 0, Knob.PAGES_TO_SCAN: 1000})
    host.stuck = {Knob.RUN, Knob.MERGE_ACROSS_NODES}
    entries = {
        Knob.RUN: SavedKnob(0, 1),
        Knob.MERGE_ACROSS_NODES: SavedKnob(1, 0),
        Knob.PAGES_TO_SCAN: SavedKnob(100, 1000),
    }
    left = stopped(host, entries, tmp_path)
    assert host.written == [(Knob.PAGES_TO_SCAN, 100)]
    assert left == {
        Knob.RUN: "its deadline of 30 s passed",
        Knob.MERGE_ACROSS_NODES: "not tried: the write of run is still waiting for ksmd",
    }
    # The next start knows what is still to be put back.
    kept = SavedKnobs(tmp_path, host.identity).entries
    assert {Knob.RUN, Knob.MERGE_ACROSS_NODES} <= {knob for knob, entry in kept.items() if entry.at_start is not None}


@pytest.mark.parametrize(("refusals", "left"), [(3, {}), (10**6, {Knob.RUN: "too many requests are being served"})])
def test_a_stop_insists_where_too_much_is_going_on(
    tmp_path: Path, refusals: int, left: dict[Knob, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crowded(FakeHost):
        refusals = 0

        def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> FakeOperation[KnobValue]:
            if self.refusals:
                self.refusals -= 1
                return FakeOperation(Busy(f"setting {knob}", "too many requests are being served"))
            return super().write(knob, value, deadline_seconds)

    host = Crowded({Knob.RUN: 1})
    host.refusals = refusals
    passed = [0.0]
    clock = "ksmd_ctl.transactions.executor.time"
    monkeypatch.setattr(f"{clock}.monotonic", lambda: passed[0])
    monkeypatch.setattr(f"{clock}.sleep", lambda seconds: passed.append(passed.pop() + seconds))
    assert stopped(host, {Knob.RUN: SavedKnob(0, 1)}, tmp_path) == left
    assert host.knobs[Knob.RUN] == (1 if left else 0)


def test_ebusy_at_the_stop_is_reported(tmp_path: Path) -> None:
    host = FakeHost({Knob.MERGE_ACROSS_NODES: 0})
    journal = SavedKnobs(tmp_path, host.identity)
    journal.note({Knob.MERGE_ACROSS_NODES: 1}, {Knob.MERGE_ACROSS_NODES: 0})
    plan = plan_stop(AtStop.RESTORE, OnDrift.ENFORCE, journal.entries, host.sample())
    host.counters["pages_shared"] = 1
    assert Executor(host, journal).carry_out(plan).left == {Knob.MERGE_ACROSS_NODES: NEEDS_UNMERGE}


def test_what_somebody_else_set_stays_when_drift_is_only_observed(tmp_path: Path) -> None:
    entries = {Knob.PAGES_TO_SCAN: SavedKnob(100, 1000), Knob.SLEEP_MILLISECS: SavedKnob(20)}
    for on_drift, pages, sleep in ((OnDrift.OBSERVE, 7, 9), (OnDrift.ENFORCE, 100, 20)):
        host = FakeHost({Knob.PAGES_TO_SCAN: 7, Knob.SLEEP_MILLISECS: 9})
        left = stopped(host, entries, tmp_path / on_drift, on_drift=on_drift)
        assert (host.knobs[Knob.PAGES_TO_SCAN], host.knobs[Knob.SLEEP_MILLISECS]) == (pages, sleep)
        assert set(left.values()) == ({TAKEN_OVER} if on_drift is OnDrift.OBSERVE else set())


@pytest.mark.parametrize(("first", "then"), [("none", "scan-time"), ("scan-time", "none")])
def test_the_advisor_and_what_it_overwrites(tmp_path: Path, first: str, then: str) -> None:
    host = FakeHost()
    host.put(Knob.ADVISOR_MODE, then)
    entries = {Knob.ADVISOR_MODE: SavedKnob(first, then), Knob.PAGES_TO_SCAN: SavedKnob(333)}
    stopped(host, entries, tmp_path, on_drift=OnDrift.OBSERVE)
    assert host.knobs[Knob.ADVISOR_MODE] == first
    assert host.knobs[Knob.PAGES_TO_SCAN] == (333 if first == "none" else 500)


@pytest.mark.parametrize(
    ("at_stop", "written"),
    [(AtStop.LEAVE, []), (AtStop.STOP_SCANNING, [(Knob.RUN, 0)])],
)
def test_other_ways_to_stop(tmp_path: Path, at_stop: AtStop, written: list[tuple[Knob, KnobValue]]) -> None:
    host = FakeHost({Knob.RUN: 1, Knob.PAGES_TO_SCAN: 1000})
    entries = {Knob.RUN: SavedKnob(0, 1), Knob.PAGES_TO_SCAN: SavedKnob(100, 1000)}
    assert stopped(host, entries, tmp_path, at_stop) == {}
    assert host.written == written
    # What they were at first can still be put back; what they are now is what a later start finds.
    kept = SavedKnobs(tmp_path, host.identity).entries
    assert {knob: (entry.at_first, entry.at_start) for knob, entry in kept.items()} == {
        knob: (entries[knob].at_first, None) for knob in entries if host.knobs[knob] != entries[knob].at_first
    }


def test_a_stop_without_permission_says_so_and_forgets_nothing(tmp_path: Path) -> None:
    host = FakeHost({Knob.RUN: 1})
    host.denied = True
    left = stopped(host, {Knob.RUN: SavedKnob(0, 1)}, tmp_path)
    assert "EACCES" in left[Knob.RUN]
    assert SavedKnobs(tmp_path, host.identity).entries == {Knob.RUN: SavedKnob(0, 1, 0)}


class Life:
    """A host on which services and people come and go, with one journal."""

    def __init__(self, directory: Path, host: FakeHost) -> None:
        self.directory = directory
        self.host = host

    def executor(self) -> Executor:
        return Executor(self.host, SavedKnobs(self.directory, self.host.identity))

    def started(self, *writes: Write) -> Executor:
        """A service that has come to hold these."""
        executor = self.executor()
        executor.begin({write.knob: self.host.read(write.knob) for write in writes}, writes)
        return executor

    def set(self, knob: Knob, value: KnobValue, *, held: bool = False) -> None:
        """A person's change, noted as a transaction notes it."""
        own = frozenset() if held else frozenset({knob})
        self.executor().journal.note_change({knob: self.host.read(knob)}, {knob: value}, own)
        self.host.put(knob, value)

    def stop(self, at_stop: AtStop = AtStop.RESTORE, *, first: bool = False) -> dict[Knob, str]:
        executor = self.executor()
        plan = plan_stop(at_stop, OnDrift.ENFORCE, executor.journal.entries, self.host.sample(), first=first)
        return dict(executor.carry_out(plan).left)


def test_a_stop_puts_back_what_a_person_had_set_before_the_start(tmp_path: Path) -> None:
    life = Life(tmp_path, FakeHost())
    life.set(Knob.RUN, 1)
    life.started(Write(Knob.RUN, 1), Write(Knob.PAGES_TO_SCAN, 1000))
    life.stop()
    assert (life.host.knobs[Knob.RUN], life.host.knobs[Knob.PAGES_TO_SCAN]) == (1, 100)
    # The first state of the boot is still known, and is what --restore puts back.
    assert SavedKnobs(tmp_path, life.host.identity).entries == {Knob.RUN: SavedKnob(0, 1)}
    life.stop(first=True)
    assert life.host.knobs[Knob.RUN] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_killed_service_that_is_started_again_puts_back_what_was_before_it_and_not_its_own(tmp_path: Path) -> None:
    life = Life(tmp_path, FakeHost())
    life.started(Write(Knob.RUN, 1), Write(Knob.PAGES_TO_SCAN, 1000))
    life.started(Write(Knob.RUN, 1), Write(Knob.PAGES_TO_SCAN, 2000))
    life.stop()
    assert (life.host.knobs[Knob.RUN], life.host.knobs[Knob.PAGES_TO_SCAN]) == (0, 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_person_sets_while_a_service_runs_or_after_it_was_killed_stays(tmp_path: Path, killed: bool) -> None:
    life = Life(tmp_path, FakeHost())
    life.started(Write(Knob.RUN, 1), Write(Knob.SLEEP_MILLISECS, 10))
    knob = Knob.SLEEP_MILLISECS if killed else Knob.PAGES_TO_SCAN
    life.set(knob, 500)
    life.stop()
    assert (life.host.knobs[Knob.RUN], life.host.knobs[knob]) == (0, 500)
    life.stop(first=True)
    assert life.host.knobs[knob] != 500


def test_a_person_who_carries_out_what_is_declared_changes_nothing_about_the_stop(tmp_path: Path) -> None:
    life = Life(tmp_path, FakeHost())
    life.host.counters["pages_shared"] = 1
    life.started(Write(Knob.MERGE_ACROSS_NODES, 0))
    life.set(Knob.MERGE_ACROSS_NODES, 0, held=True)
    life.host.counters["pages_shared"] = 0
    life.stop()
    assert life.host.knobs[Knob.MERGE_ACROSS_NODES] == 1


def test_after_leave_the_next_start_begins_from_what_was_left(tmp_path: Path) -> None:
    life = Life(tmp_path, FakeHost())
    life.started(Write(Knob.PAGES_TO_SCAN, 1000))
    life.stop(AtStop.LEAVE)
    life.started(Write(Knob.PAGES_TO_SCAN, 2000))
    life.stop()
    assert life.host.knobs[Knob.PAGES_TO_SCAN] == 1000
    life.stop(first=True)
    assert life.host.knobs[Knob.PAGES_TO_SCAN] == 100


def test_a_file_of_the_version_before_counts_what_was_found_first_as_before_the_start(tmp_path: Path) -> None:
    document = {"format": 1, "boot_id": "boot-1", "knobs": {"run": {"at_first": 0, "set": 1}}}
    (tmp_path / "found-kernel.json").write_text(json.dumps(document))
    assert SavedKnobs(tmp_path, FakeHost().identity).entries == {Knob.RUN: SavedKnob(0, 1, 0)}


def test_the_service_that_has_not_put_back_is_in_the_file_until_a_stop(tmp_path: Path) -> None:
    host = FakeHost()
    run = ServiceRun(4711, 5.0, "/etc/x.toml")
    journal = SavedKnobs(tmp_path, host.identity, run)
    journal.note({}, {})
    assert journal.service is None
    journal.note({Knob.RUN: 0, Knob.SMART_SCAN: 1}, {Knob.RUN: 1})
    seen = SavedKnobs(tmp_path, host.identity)
    assert seen.service == run
    seen.note_change({Knob.SMART_SCAN: 1}, {Knob.SMART_SCAN: 0}, {Knob.SMART_SCAN})
    assert SavedKnobs(tmp_path, host.identity).service == run
    seen.settle({Knob.RUN: 0}, ended=True)
    assert SavedKnobs(tmp_path, host.identity).service is None
    assert SavedKnobs(tmp_path, host.identity).entries == {Knob.SMART_SCAN: SavedKnob(1, 0)}


def test_a_directory_that_may_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((HostError, KsmdError)) as caught:
        HostLock(tmp_path / "file/run/lock", "x")
    assert caught.value.exit_code in (ExitCode.USAGE, ExitCode.DENIED)
    assert not isinstance(caught.value, Denied) or os.geteuid() != 0
