# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated host behind the interface: samples, operations, refusals, the lab, and the demonstration load."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from ksmd_ctl.config.model import SETTINGS_BY_KEY
from ksmd_ctl.engine.demo import DEMO_GUESTS
from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.errors import Absent, Cancelled, HostError, NoSuchProcess, Rejected, TimedOut
from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.knobs import KSMD_KNOBS, Knob
from ksmd_ctl.host.memory import KsmDetection, ProcessId
from ksmd_ctl.host.operation import Move, finish
from ksmd_ctl.host.sample import HostKind
from tests.engine.lab import ALL, NEW, OLD
from tests.engine.scenario_runner import content
from tests.engine.validate import validate
from tests.fakes.unsharing import unshare_one


def lab(profile: str = "7.2", nodes: int = 2) -> EngineHost:
    """A host without a load, whose time passes by `advance` only."""
    host = open_engine_host(profile, nodes, demo=False, source=None)
    if host.machine.ksm.profile.smart_scan:
        host.set(Knob.SMART_SCAN, 0)
    host.set(Knob.MERGE_ACROSS_NODES, 0)
    return host


def process_with(host: EngineHost, labels: list[str], node: int | None = 0) -> tuple[ProcessId, int]:
    process = host.spawn("p")
    start = host.map(process, len(labels), node)
    host.advise(process, start, len(labels), mergeable=True)
    host.store(process, start, [None if label == "-" else content(label) for label in labels])
    return process, start


def scan(host: EngineHost, count: int) -> None:
    for _ in range(count):
        host.batch(1 << 20)
        validate(host.machine)


# -- identity, samples, knobs ----------------------------------------------------------------------------------


def test_identity_and_topology() -> None:
    host = lab("6.1", 3)
    assert (host.identity.kind, host.identity.release, host.identity.simulated) == (HostKind.ENGINE, "6.1", True)
    assert host.identity.page_size_bytes == PAGE_SIZE
    assert host.identity.boot_id != lab("6.1").identity.boot_id
    nodes = host.topology().nodes
    assert [node.number for node in nodes] == [0, 1, 2]
    assert nodes[1].distances == {0: 20, 1: 10, 2: 20}
    host.machine.going_offline(2)
    assert host.topology().going_offline
    host.machine.offline(2)
    assert len(host.topology().with_memory()) == 2
    assert set(host.sample().nodes) == {0, 1}


@pytest.mark.parametrize("profile", ALL)
def test_a_sample_has_every_field_and_absent_is_not_zero(profile: str) -> None:
    host = lab(profile)
    readings = host.sample().readings
    assert readings.keys() == {field.name for field in FIELDS}
    features = host.machine.ksm.profile
    there = {name for name, reading in readings.items() if not isinstance(reading, Absent)}
    expected = {*features.knobs, *features.counters, *features.vmstat}
    expected |= {"mem_total_bytes", "mem_available_bytes", "ksmd_cpu_seconds", "nr_anon_pages", *KSMD_KNOBS}
    assert there == expected


def test_memory_in_a_sample() -> None:
    host = lab()
    before = host.sample()
    process_with(host, ["a", "b"], 1)
    after = host.sample()
    assert before.nodes[1].free_bytes - after.nodes[1].free_bytes == 2 * PAGE_SIZE
    assert before.number("mem_available_bytes") == after.number("mem_available_bytes") + 2 * PAGE_SIZE  # type: ignore[operator]


def test_knobs_are_written_and_read_back() -> None:
    host = lab()
    assert finish(host.write(Knob.PAGES_TO_SCAN, 4000, 1)) == 4000
    assert host.read(Knob.PAGES_TO_SCAN) == 4000
    assert finish(host.write(Knob.ADVISOR_MODE, "scan-time", 1)) == "scan-time"
    assert [writer.name for writer in finish(host.writers())] == ["advisor"]
    with pytest.raises(Rejected) as refusal:
        finish(host.write(Knob.PAGES_TO_SCAN, 5, 1))
    assert refusal.value.errno == errno.EINVAL


def test_a_knob_that_is_so_already_is_not_written() -> None:
    host = lab()
    process_with(host, ["x", "x"])
    scan(host, 3)
    assert finish(host.write(Knob.MERGE_ACROSS_NODES, 0, 1)) == 0
    with pytest.raises(Rejected, match="pages are merged") as refusal:
        finish(host.write(Knob.MERGE_ACROSS_NODES, 1, 1))
    assert refusal.value.errno == errno.EBUSY
    assert refusal.value.hint


@pytest.mark.parametrize("profile", ["seed", *OLD])
def test_a_knob_that_the_profile_lacks_is_absent(profile: str) -> None:
    host = lab(profile)
    for call in (lambda: host.read(Knob.SMART_SCAN), lambda: host.set(Knob.SMART_SCAN, 1)):
        with pytest.raises(Absent) as refusal:
            call()
        assert refusal.value.errno == errno.ENOENT


# -- operations ------------------------------------------------------------------------------------------------


def test_unmerging_takes_time_and_can_be_cancelled() -> None:
    host = lab()
    for _ in range(3):
        process_with(host, ["x"] * 50)
    scan(host, 3)
    host.set(Knob.RUN, 1)
    before = host.clock()
    operation = host.write(Knob.RUN, 2, 10)
    assert not operation.poll()
    assert operation.fileno() == -1
    assert operation.progress.done == 50
    with pytest.raises(RuntimeError, match="not over"):
        operation.result()
    operation.cancel()
    with pytest.raises(Cancelled, match="50"):
        finish(operation)
    assert host.read(Knob.RUN) == 0
    validate(host.machine)
    ids = [each.id for each in finish(host.processes()).processes]
    merged = [sum(page.ksm for page in host.pages(each, host.ranges(each)[0].start, 50)) for each in ids]
    assert merged == [0, 50, 50]  # what was not reached is still merged
    assert host.clock() > before
    assert finish(host.write(Knob.RUN, 2, 10)) == 2
    assert host.sample().number("pages_shared") == 0


def test_a_deadline_ends_an_operation() -> None:
    host = lab()
    for _ in range(3):
        process_with(host, ["x"] * 50)
    scan(host, 3)
    host.set(Knob.RUN, 1)
    with pytest.raises(TimedOut, match="after 0"):
        finish(host.write(Knob.RUN, 2, 0.0002))
    assert host.read(Knob.RUN) == 0
    validate(host.machine)


def test_processes_ranges_and_census() -> None:
    host = lab()
    process, start = process_with(host, ["x", "x", "u"], 1)
    plain = host.spawn("plain")
    host.map(plain, 2, None)
    scan(host, 3)
    found = {each.name: each for each in finish(host.processes()).processes}
    assert found["p"].merging_pages == 2
    assert (found["p"].rmap_items, found["p"].zero_pages) == (3, 0)
    assert found["p"].profit_bytes == 2 * PAGE_SIZE - 3 * 64
    assert (found["p"].nodes, found["p"].home) == ({1: 2}, 1)
    assert (found["plain"].home, found["plain"].merging_pages) == (None, 0)
    (mapping,) = host.ranges(process)
    assert (mapping.start, mapping.mergeable, mapping.ksm_pages, mapping.resident_pages) == (start, True, 2, 3)
    assert mapping.policy_nodes == {1}
    census = finish(host.survey(1)).census
    assert census is not None
    assert (census.pages, census.complete, census.detection) == ({0: 0, 1: 1}, True, KsmDetection.ENGINE)


@pytest.mark.parametrize("profile", ["4.10", "5.10", "6.1", "6.12"])
def test_what_a_profile_does_not_tell_is_none(profile: str) -> None:
    host = lab(profile)
    process_with(host, ["x", "x"])
    (process,) = finish(host.processes()).processes
    assert (process.merging_pages is None) == (profile in ("4.10", "5.10"))
    assert (process.profit_bytes is None) == (profile not in NEW)
    assert (host.ranges(process.id)[0].ksm_pages is None) == (profile not in NEW)


def test_moving_memory() -> None:
    host = lab()
    process, start = process_with(host, ["x", "x", "a", "-"], 0)
    scan(host, 3)
    result = finish(host.move(Move(process, 1), 10))
    assert (result.moved, result.already, result.left) == (2, 0, {})
    assert [page.node for page in host.pages(process, start, 4)] == [1, 1, 1, None]
    result = finish(host.move(Move(process, 1, ranges=((start, start + PAGE_SIZE),)), 10))
    assert (result.moved, result.already) == (0, 1)
    host.machine.memory.pinned.add(host.machine.mm(process.pid).page(start + 2 * PAGE_SIZE))  # type: ignore[arg-type]
    result = finish(host.move(Move(process, 0), 10))
    assert (result.moved, sum(result.left.values())) == (1, 1)
    with pytest.raises(Rejected) as refusal:
        finish(host.move(Move(process, 7), 10))
    assert refusal.value.errno == errno.ENODEV


def test_pages_on_nodes_that_keep_theirs_stay() -> None:
    host = lab(nodes=3)
    process = host.spawn("p")
    starts = [host.map(process, 2, node) for node in range(3)]
    for start in starts:
        host.advise(process, start, 2, mergeable=True)
        host.store(process, start, [content("x"), content("x")])
    scan(host, 3)
    request = unshare_one(process, to=1)
    keeping = replace(request, parts=(replace(request.parts[0], keep=(0,)),))
    assert finish(host.unshare(keeping, 10)).unshared == 4
    assert [[page.ksm for page in host.pages(process, start, 2)] for start in starts] == [
        [True] * 2,
        [False] * 2,
        [False] * 2,
    ]
    plan = finish(host.plan(Move(process, 1, keep=(0,))))
    assert (plan.nodes, plan.already) == ({2: 2}, 3)
    result = finish(host.move(Move(process, 1, keep=(0,)), 10))
    assert (result.moved, result.already, result.left) == (2, 3, {})
    assert [host.pages(process, start, 1)[0].node for start in starts] == [0, 1, 1]


def test_moving_stops_at_the_floor() -> None:
    host = lab()
    process, _ = process_with(host, ["x", "y"], 0)
    free = host.sample().nodes[1].free_bytes
    result = finish(host.move(Move(process, 1, floor_bytes=free), 10))
    assert (result.moved, result.left) == (0, {"the node is full": 2})


def test_unsharing() -> None:
    host = lab()
    process, start = process_with(host, ["x", "x", "a"], None)
    scan(host, 3)
    host.protect(process, start, 1, writable=False)
    result = finish(host.unshare(unshare_one(process, to=1), 10))
    assert (result.unshared, result.left) == (1, {"the mapping can't be written": 1})
    assert [page.ksm for page in host.pages(process, start, 3)] == [True, False, False]
    assert host.pages(process, start, 2)[1].node == 1
    assert host.load(process, start, 3) == (content("x"), content("x"), content("a"))


@pytest.mark.parametrize("profile", OLD)
def test_unsharing_is_refused_where_it_would_harm(profile: str) -> None:
    host = lab(profile)
    process, start = process_with(host, ["x", "x"])
    scan(host, 3)
    with pytest.raises(Rejected, match="clear a byte"):
        finish(host.unshare(unshare_one(process), 10))
    assert host.load(process, start, 1) == (content("x"),)


# -- the lab ---------------------------------------------------------------------------------------------------


def test_refusals_carry_the_errno() -> None:
    host = lab()
    process, start = process_with(host, ["x"])
    hole = start + PAGE_SIZE
    for number, call in (
        (errno.EFAULT, lambda: host.store(process, hole, [content("a")])),
        (errno.ENODEV, lambda: host.map(process, 1, 9)),
        (errno.ENODEV, lambda: host.move_pages(process, [start], 9, shared=True)),
        (errno.ENODEV, lambda: host.break_sharing(process, start, 1, node=9)),
        (errno.ENOMEM, lambda: host.discard(process, start, 2)),
        (errno.ENOMEM, lambda: host.advise(process, start, 2, mergeable=True)),
        (errno.EINVAL, lambda: host.set(Knob.RUN, 9)),
    ):
        with pytest.raises(HostError) as refusal:
            call()
        assert refusal.value.errno == number
    gone = ProcessId(process.pid, process.start_time_ticks + 1)
    for look in (lambda: host.ranges(gone), lambda: host.exit(gone), lambda: host.load(gone, start, 1)):
        with pytest.raises(NoSuchProcess):
            look()


def test_fork_exit_discard_and_unmap() -> None:
    host = lab()
    process, start = process_with(host, ["x", "y", "-"])
    child = host.fork(process, "q")
    host.discard(process, start, 1)
    host.unmap(process, start + PAGE_SIZE, 1)
    assert host.load(process, start, 3) == (b"", b"", b"")
    assert host.load(child, start, 3) == (content("x"), content("y"), b"")
    host.exit(process)
    with pytest.raises(NoSuchProcess):
        host.ranges(process)
    host.close()
    assert host.machine.processes == {}
    assert host.machine.memory.nodes[0].used == 0


def test_close_puts_the_knobs_back() -> None:
    host = open_engine_host("7.2", demo=False, source=None)
    before = {knob: host.read(knob) for knob in Knob}
    process_with(host, ["x", "x"])
    host.set(Knob.ADVISOR_MODE, "scan-time")
    host.set(Knob.SMART_SCAN, 0)
    host.set(Knob.RUN, 1)
    scan(host, 3)
    host.close()
    assert {knob: host.read(knob) for knob in Knob} == before


# -- time and the demonstration load ---------------------------------------------------------------------------


def test_time_that_was_let_pass_is_not_waited_for_again() -> None:
    now = [100.0]
    host = open_engine_host("7.2", demo=False, source=lambda: now[0])
    host.advance(30)
    assert host.clock() == pytest.approx(30)
    now[0] += 1
    assert host.clock() == pytest.approx(31)


def test_time_follows_its_source_and_falls_behind_where_ksmd_has_too_much_to_do() -> None:
    now = [100.0]
    host = open_engine_host("7.2", demo=False, source=lambda: now[0])
    assert host.clock() == 0
    now[0] += 5
    assert host.clock() == 5
    process_with(host, [f"l{number}" for number in range(30_000)])
    host.set(Knob.PAGES_TO_SCAN, 100_000)
    host.set(Knob.SLEEP_MILLISECS, 0)
    host.set(Knob.RUN, 1)
    now[0] += 1000
    assert 5 < host.clock() < 10
    assert 0 < host.machine.ksm.pages_scanned <= 60_000
    behind = host.clock()
    assert host.clock() >= behind


@pytest.mark.parametrize("profile", ["seed", "6.1", "7.2"])
def test_the_demonstration_shows_living_figures(profile: str) -> None:
    host = open_engine_host(profile, source=None)
    host.set(Knob.MERGE_ACROSS_NODES, 0)
    host.set(Knob.PAGES_TO_SCAN, 200)
    host.set(Knob.RUN, 1)
    sharing = []
    for _ in range(9):
        host.advance(4)
        sharing.append(host.sample().number("pages_sharing"))
    assert len(set(sharing)) > 4
    assert min(sharing[4:]) > 1000  # type: ignore[type-var]
    processes = finish(host.processes()).processes
    assert {each.name for each in processes} == {guest.name for guest in DEMO_GUESTS}
    assert {each.home for each in processes} == {0, 1}
    assert all(each.unit.startswith("machine-qemu-") for each in processes)
    census = finish(host.survey(1)).census
    assert census is not None
    assert set(census.pages) == {0, 1}
    validate(host.machine)


def test_the_demonstration_restarts_guests_and_repeats_itself() -> None:
    def history() -> list[object]:
        host = open_engine_host("7.2", source=None)
        host.set(Knob.RUN, 1)
        host.advance(320)
        return [sorted(host.machine.processes), dict(host.sample().readings).get("pages_sharing")]

    first = history()
    assert first == history()
    assert 1000 not in first[0]  # type: ignore[operator]


def test_the_demonstration_bears_what_others_do_to_its_guests() -> None:
    host = open_engine_host("7.2", source=None)
    host.set(Knob.RUN, 1)
    host.advance(40)
    for process in finish(host.processes()).processes:
        finish(host.move(Move(process.id, 1), 60))
        finish(host.unshare(unshare_one(process.id), 60))
    host.exit(finish(host.processes()).processes[0].id)
    host.advance(400)
    validate(host.machine)
    assert {process.name for process in host.machine.processes.values()} == {guest.name for guest in DEMO_GUESTS}


def test_a_service_on_the_demonstration_has_room_to_un_merge_with_the_default_configuration() -> None:
    host = open_engine_host(source=None)
    host.set(Knob.RUN, 1)
    host.advance(120)
    floor_bytes = SETTINGS_BY_KEY["limits", "floor_bytes"].default
    assert isinstance(floor_bytes, int)
    found = finish(host.inventory(floor_bytes))
    assert sum(memory.merged_pages for memory in found.memories) > 1000
    assert all(2 * room.growth_bytes < room.free_bytes for room in found.demands)


def test_how_the_simulated_ksmd_is_scheduled() -> None:
    host = lab()
    assert [host.read(knob) for knob in KSMD_KNOBS] == ["0-1", "other", 5]
    assert finish(host.housekeeping()) == "0-1"
    for knob, value in ((Knob.KSMD_CPUS, "1"), (Knob.KSMD_SCHEDULING, "idle"), (Knob.KSMD_NICE, -3)):
        assert finish(host.write(knob, value, 10)) == value
        assert host.sample().readings[knob] == value
    with pytest.raises(Rejected, match="this host has no CPU 7: it can have 0-1"):
        finish(host.write(Knob.KSMD_CPUS, "1,7", 10))
    with pytest.raises(Rejected, match="is not one of"):
        finish(host.write(Knob.KSMD_SCHEDULING, "fifo", 10))
    assert host.read(Knob.KSMD_CPUS) == "1"
