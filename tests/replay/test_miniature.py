# SPDX-License-Identifier: GPL-2.0-or-later
"""A host of the n-th part that counts and takes time as the whole one."""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.memory import PAGE_SIZE, ZERO_CONTENT
from ksmd_ctl.engine.mm import write_fault
from ksmd_ctl.engine.profile import CURRENT
from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import NodeMemory, Sample
from ksmd_ctl.replay.miniature import MiniatureHost, MiniatureMachine, content_of
from ksmd_ctl.replay.pace import Pace, Speed

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
