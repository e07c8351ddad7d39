# SPDX-License-Identifier: GPL-2.0-or-later
"""A host of the n-th part that counts and takes time as the whole one."""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.memory import PAGE_SIZE, ZERO_CONTENT
from ksmd_ctl.engine.mm import Mm, write_fault, zap_pte
from ksmd_ctl.engine.profile import CURRENT
from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import NodeMemory, Sample
from ksmd_ctl.replay.miniature import MiniatureHost, MiniatureMachine, content_of
from ksmd_ctl.replay.pace import Pace, Speed
from ksmd_ctl.replay.progress import Progress

SPEED = Speed(1000.0, 0.0)


def host(one_in: int, contents: list[int], speed: Speed = SPEED) -> MiniatureHost:
    machine = MiniatureMachine(1, CURRENT, one_in, Pace((), (), speed))
    pid = machine.spawn("p")
    start = machine.mmap(pid, len(contents))
    machine.madvise(pid, start, len(contents), mergeable=True)
    for page, number in enumerate(contents):
        write_fault(machine.ksm, machine.mm(pid).vmas[0], start + page * PAGE_SIZE, content_of(number), 0)
    found = MiniatureHost(machine)
    found.set(Knob.SMART_SCAN, 0)
    return found


def test_contents_are_those_of_the_recording() -> None:
    assert content_of(0) is ZERO_CONTENT
    assert len({content_of(number) for number in range(10_000)}) == 10_000


@pytest.mark.parametrize("one_in", [1, 8, 64])
def test_a_scan_of_the_part_takes_the_time_of_the_whole(one_in: int) -> None:
    """6,400 pages at 100 in each 20 ms, and 1 us a page: 64 batches and one that finds the end."""
    small = host(one_in, list(range(1, 6400 // one_in + 1)))
    small.set(Knob.RUN, 1)
    small.advance(13.2)
    sample = small.sample()
    assert sample.number("full_scans") == pytest.approx(13.2 / (65 * 0.0201), abs=0.6)
    assert sample.number("pages_unshared") == pytest.approx(6400, rel=0.02)
    assert sample.number("pages_scanned") == pytest.approx(64_000, rel=0.03)
    assert sample.number("ksmd_cpu_seconds") == pytest.approx(0.065, rel=0.05)


def test_a_batch_of_less_than_a_page_is_added_to_the_next() -> None:
    small = host(64, list(range(1, 11)))
    small.set(Knob.PAGES_TO_SCAN, 16)
    assert [small.machine.batch(16) for _ in range(8)] == [0, 0, 0, 1, 0, 0, 0, 1]


def test_a_delay_is_added_to_each_sleep() -> None:
    slow, quick = (host(1, list(range(1, 10_001)), Speed(1000.0, delay)) for delay in (20e6, 0.0))
    for each in (slow, quick):
        each.set(Knob.RUN, 1)
        each.advance(1.0)
    assert slow.sample().number("pages_scanned") == pytest.approx(2500, rel=0.05)
    assert quick.sample().number("pages_scanned") == pytest.approx(5000, rel=0.05)


def test_counters_are_those_of_the_whole() -> None:
    small = host(8, [1, 1, 1, 2, 2, 3])
    small.set(Knob.RUN, 1)
    small.advance(5)
    sample = small.sample()
    assert [sample.number(name) for name in ("pages_shared", "pages_sharing", "pages_unshared")] == [16, 24, 8]
    assert sample.number("general_profit") == 24 * PAGE_SIZE - 48 * 64
    assert sample.number("pages_to_scan") == 100


def test_what_counts_up_begins_with_the_replay() -> None:
    small = host(8, [1, 1, 2])
    small.machine.scan(3)
    small.begin()
    sample = small.sample()
    assert [sample.number(name) for name in ("full_scans", "pages_scanned", "ksmd_cpu_seconds")] == [0, 0, 0]
    assert sample.number("pages_sharing") == 8
    assert sample.time_seconds == 0


def test_what_does_not_depend_on_ksm_reads_as_recorded() -> None:
    small = host(1, [1, 1, 1, 2])
    small.set(Knob.RUN, 1)
    small.advance(5)
    readings = {field.name: 0 for field in FIELDS} | {
        "mem_total_bytes": 1 << 30,
        "mem_available_bytes": 1 << 20,
        "nr_anon_pages": 500,
        "pressure_some_seconds": 7.5,
        "ksmd_cpus": "0-3",
    }
    small.recorded = Sample(5.0, readings, {0: NodeMemory(10, 5)})
    sample = small.sample()
    assert sample.number("pressure_some_seconds") == 7.5
    assert sample.nodes == {0: NodeMemory(10, 5)}
    # Two pages are saved that the recorded host did not save.
    assert sample.number("pages_sharing") == 2
    assert sample.number("mem_available_bytes") == (1 << 20) + 2 * PAGE_SIZE
    assert sample.number("nr_anon_pages") == 498
    assert sample.number("pages_scanned") != 0


# -- as far as ksmd had come -------------------------------------------------------------------------------------


def following(one_in: int, contents: list[int], progress: Progress) -> MiniatureMachine:
    machine = host(one_in, contents).machine
    machine.ksm.run = 1
    machine.begin()
    machine.progress = progress
    return machine


def done(machine: MiniatureMachine, seconds: float) -> tuple[int, int]:
    """Pages that were scanned by a time, and full scans."""
    machine.run_until(round(seconds * 1e9))
    return machine.ksm.pages_scanned, machine.scans


def test_as_many_pages_are_scanned_as_were() -> None:
    machine = following(8, list(range(1, 101)), Progress((0.0, 1.0, 2.0), (0, 80, 400), (0, 0, 0), (0.0, 0.5, 0.7)))
    assert [done(machine, at) for at in (0.5, 1.0, 1.5, 2.0)] == [(5, 0), (10, 0), (30, 0), (50, 0)]
    assert machine.ksm.cpu_ns == 700_000_000


def test_a_full_scan_ends_when_it_ended() -> None:
    """100 pages: the host's first scan is longer, and its second is shorter."""
    progress = Progress((0.0, 1.0, 2.0, 3.0, 4.0), (0, 90, 120, 200, 230), (0, 0, 1, 1, 2), (0.0,) * 5)
    machine = following(1, list(range(1, 101)), progress)
    assert done(machine, 1.0) == (90, 0)
    # It is at its end too early, and goes on with what was scanned after the end.
    assert done(machine, 2.0) == (120, 1)
    assert done(machine, 3.0)[1] in (1, 2)
    assert done(machine, 4.0)[1] == 2


def test_a_full_scan_that_is_late_is_brought_to_its_end() -> None:
    machine = following(1, list(range(1, 101)), Progress((0.0, 1.0), (0, 50), (0, 1), (0.0, 0.0)))
    assert done(machine, 1.0) == (100, 1)


def arrive(machine: MiniatureMachine, pages: int) -> Mm:
    pid = machine.spawn("new")
    start = machine.mmap(pid, pages)
    machine.madvise(pid, start, pages, mergeable=True)
    mm = machine.mm(pid)
    for page in range(pages):
        write_fault(machine.ksm, mm.vmas[0], start + page * PAGE_SIZE, content_of(5000 + page), 0)
    machine.reach(mm)
    return mm


@pytest.mark.parametrize(("passed", "seen"), [(10, 20), (90, 10)])
def test_what_ksmd_came_to_is_next(passed: int, seen: int) -> None:
    """Of 100 pages some have been scanned; 20 more are then scanned."""
    machine = following(
        1, list(range(1, 101)), Progress((0.0, 1.0, 2.0), (0, passed, passed + 20), (0,) * 3, (0.0,) * 3)
    )
    done(machine, 1.0)
    mm = arrive(machine, 40)
    done(machine, 2.0)
    assert mm.ksm_rmap_items == seen


def test_what_has_ended_is_reaped_before_what_ksmd_came_to() -> None:
    machine = following(1, list(range(1, 101)), Progress((0.0, 1.0), (0, 90), (0, 0), (0.0, 0.0)))
    pid = machine.spawn("gone")
    start = machine.mmap(pid, 1)
    machine.madvise(pid, start, 1, mergeable=True)
    write_fault(machine.ksm, machine.mm(pid).vmas[0], start, content_of(7000), 0)
    gone = machine.mm(pid)
    machine.reach(gone)
    done(machine, 1.0)
    machine.exit(pid)
    slot = arrive(machine, 10).slot
    assert slot is not None
    assert slot.prev.mm is gone or gone.slot is None


def test_a_page_that_leaves_the_sample_ends_no_search() -> None:
    """In the unstable tree, a page that is gone would end the search for each that comes after it."""
    machine = host(8, [1, 2, 3, 3]).machine
    machine.scan(1)
    machine.batch(8 * 2)
    (vma,) = next(iter(machine.processes.values())).mm.vmas
    for index in (0, 1):
        zap_pte(machine.ksm, vma, index)
    machine.leave(vma.mm, {vma.start, vma.start + PAGE_SIZE})
    machine.batch(8 * 2)
    assert machine.ksm.pages_sharing == 1
